"""Settings at other values than their defaults, each of which no other test has: optimisers, compiled runs."""

import numpy as np
import pytest
import torch
from helpers import SCRIPTS, needs_compiler, scalars, train

import sa2c_atari


@pytest.mark.parametrize("script", SCRIPTS[2:], ids=lambda script: script.name)
def test_a_gradient_below_the_maximum_norm_is_left_as_it_is(script):
    module, ppo = script.module, "ppo" in script.name
    torch.manual_seed(0)
    agent, old = module.Agent(4, [5, 5]), [torch.full((16, 2), -1.6)] if ppo else []
    args, weights = module.Args(max_grad_norm=1e3), module.flatten_parameters(agent)
    batch = (torch.randn(16, 4), torch.randint(5, (16, 2)), *old, torch.randn(16), torch.randn(16))
    loss, _ = (module.minibatch_loss if ppo else module.rollout_loss)(agent, args, *batch)
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(agent.parameters()))])
    assert 0.1 < expected.norm() < 100
    (module.gradient_step if ppo else module.update)(agent, weights, torch.optim.SGD([weights], lr=0.0), args, batch)
    torch.testing.assert_close(weights.grad, expected, rtol=1e-4, atol=1e-6)


def test_rmsprop_alpha_reaches_the_optimiser_of_sa2c_atari():
    torch.manual_seed(0)
    agent = sa2c_atari.Agent(3)
    square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
    batch = (torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8), torch.randint(3, (4,)), torch.randn(4), torch.randn(4))
    args = sa2c_atari.Args(rmsprop_alpha=0.25, max_grad_norm=1e6)
    (grad,) = torch.autograd.grad(sa2c_atari.rollout_loss(agent, args, *batch)[0], agent.critic.bias)
    sa2c_atari.update(agent, square_avgs, 1e-9, args, batch)
    expected = 0.25 + 0.75 * grad**2
    torch.testing.assert_close(square_avgs[-1], expected)
    assert (expected - 0.25).item() > 1e-6


@needs_compiler
@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.name)
def test_a_compiled_run_begins_like_a_plain_one(script, tmp_path):
    """test_update.py has sppo_atari.py's. A compiled `act` samples other actions, so that Atari's losses are not compared."""
    words = "--total-timesteps 128 --eval-episodes 0"
    plain, compiled = (scalars(train(script, tmp_path / flag, words, flag)) for flag in ("--no-compile", "--compile"))
    for tag in ("losses/policy_loss", "losses/reverse_loss", "losses/value_loss", "losses/grad_norm"):
        assert np.isfinite(compiled[tag][0][1])
        assert script.env_id == "Breakout" or compiled[tag][0][1] == pytest.approx(plain[tag][0][1], rel=1e-3), tag
