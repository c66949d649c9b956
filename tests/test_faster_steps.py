"""What makes the control scripts faster gives the same numbers: minibatches, bf16, compiled steps, noise in blocks."""

import importlib

import numpy as np
import pytest
import torch
from helpers import needs_compiler

import dsppo_continuous
import sppo_atari

CONTINUOUS = [importlib.import_module(name) for name in ("dsppo_continuous", "dsa2c_continuous")]


def test_minibatches_of_frames_are_rows_of_the_rollout_bit_for_bit(monkeypatch):
    """In the memory order of the convolutions, too: it decides how they round."""
    torch.manual_seed(0)
    obs = torch.randint(0, 256, (8, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    batch, seen = (obs, *torch.arange(32.0).view(4, 8)), []

    def minibatch_loss(agent, args, clip_coef, *minibatch):
        seen.append(minibatch)
        return agent.actor.bias.sum(), {"losses/approx_kl": torch.zeros(())}

    monkeypatch.setattr(sppo_atari, "minibatch_loss", minibatch_loss)

    agent = sppo_atari.Agent(3)
    args = sppo_atari.Args(minibatch_size=4, update_epochs=2)
    torch.manual_seed(5)
    optimizer = torch.optim.Adam(agent.parameters())
    sppo_atari.update(agent, optimizer, sppo_atari.gradient_step, args, torch.tensor(0.1), batch)
    torch.manual_seed(5)
    expected = [indices for _ in range(2) for indices in torch.randperm(8).split(4)]
    assert len(seen) == len(expected) == 4
    for minibatch, indices in zip(seen, expected, strict=True):
        for tensor, whole in zip(minibatch, batch, strict=True):
            assert torch.equal(tensor, whole[indices]) and tensor.stride() == whole[indices].stride()


def test_bf16_is_as_near_to_float32_as_bfloat16_allows():
    """An independent bf16 forward pass, which divides the pixels as float32 does, is the measure."""
    torch.manual_seed(0)
    plain, fast = sppo_atari.Agent(6), sppo_atari.Agent(6, bf16=True)
    fast.load_state_dict(plain.state_dict())
    obs = torch.randint(0, 256, (64, 4, 84, 84), dtype=torch.uint8)
    batch = (obs, torch.randint(6, (64,)), torch.full((64,), -1.8), torch.randn(64), torch.randn(64))

    def gradient(agent, forward=None):
        loss, _ = sppo_atari.minibatch_loss(forward or agent, sppo_atari.Args(), torch.tensor(0.1), *batch)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(agent.parameters()))])

    def divided_pixels(obs):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = plain.network(obs.float() / 255)
            logits, values = plain.actor(hidden), plain.critic(hidden)
        return torch.log_softmax(logits.float(), -1), values.float().squeeze(-1)

    exact, ours, other = gradient(plain), gradient(fast), gradient(plain, divided_pixels)
    distance, measure = (ours - exact).norm() / exact.norm(), (other - exact).norm() / exact.norm()
    assert 0 < distance < min(0.05, 1.2 * measure)
    assert abs(ours.norm() / exact.norm() - 1) < 0.01


def steps(script, compiled, state=None, start=0, count=3):
    """The weights, and the optimiser's state, after `count` rollouts with an annealed learning rate."""
    torch.manual_seed(0)
    agent, ppo = script.Agent(5, [4, 4, 4]), "ppo" in script.__name__
    weights = script.flatten_parameters(agent)
    args = script.Args(compile=compiled, max_grad_norm=0.3, **({"minibatch_size": 16, "update_epochs": 2} if ppo else {}))
    if ppo:
        optimizer = torch.optim.Adam([weights], lr=1e-3, eps=args.adam_eps, fused=not compiled)
    else:
        optimizer = torch.optim.RMSprop([weights], lr=1e-3, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    if state:
        weights.data.copy_(state[0])
        optimizer.load_state_dict(state[1])
    function = script.gradient_step if ppo else script.update
    if compiled:
        torch._dynamo.config.trace_autograd_ops = True
        function = torch.compile(function)
    for i in range(start, count):
        generator = torch.Generator().manual_seed(i)
        old = [-1.4 + 0.1 * torch.randn(48, 3, generator=generator)] if ppo else []
        batch = [torch.randn(48, 5, generator=generator), torch.randint(4, (48, 3), generator=generator), *old]
        batch += [torch.randn(48, generator=generator), torch.randn(48, generator=generator)]
        learning_rate = 1e-3 * (1 - i / 4)
        optimizer.param_groups[0]["lr"] = torch.tensor(learning_rate) if compiled else learning_rate
        if ppo:
            script.update(agent, weights, optimizer, function, args, batch, generator)
        else:
            function(agent, weights, optimizer, args, batch)
    return weights.detach().clone(), optimizer.state_dict()


@needs_compiler
@pytest.mark.parametrize("script", CONTINUOUS, ids=lambda script: script.__name__)
def test_a_compiled_step_moves_the_weights_as_the_plain_one_and_takes_over_its_state(script):
    plain, first = steps(script, False)[0], steps(script, False, count=1)
    compiled = steps(script, True, state=first, start=1, count=2)  # a run that goes on with --compile
    back, _ = steps(script, False, state=compiled, start=2)  # and without it again
    moved = (plain - first[0]).abs().max()
    assert moved > 1e-4 and 0 <= (back - plain).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("script", [*CONTINUOUS, sppo_atari], ids=lambda script: script.__name__)
def test_a_resumed_run_has_its_own_optimiser_settings(script, tmp_path):
    """A compiled run on a GPU leaves capturable=True and a tensor as the rate, which an optimiser on a CPU refuses."""
    sizes = {"env_id": "Pong" if script is sppo_atari else "Pendulum-v1", "num_envs": 2, "num_steps": 8, "eval_episodes": 0}
    sizes |= {"minibatch_size": 16} if "ppo" in script.__name__ else {}
    script.main(script.Args(**sizes, total_timesteps=160, run_dir=str(tmp_path), num_threads=1))
    (folder,) = tmp_path.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    (group,) = checkpoint["optimizer"]["param_groups"]
    steps = checkpoint["optimizer"]["state"][0]["step"].item()
    group |= {"capturable": True, "lr": torch.tensor(7.0)} | ({"fused": False} if "fused" in group else {})
    torch.save(checkpoint, folder / "checkpoint.pt")
    script.main(script.parse_args(["--resume", str(folder), "--total-timesteps", "320"]))
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]
    assert saved["param_groups"][0]["capturable"] is False and saved["param_groups"][0].get("fused", True) in (True, None)
    assert saved["state"][0]["step"] == 2 * steps


def test_noise_in_blocks_is_the_stream_of_one_draw():
    for name, shape in (("gumbel", (2, 3, 5)), ("standard_normal", (2, 3))):
        whole = getattr(np.random.default_rng([1, 4, 0]), name)(size=(150, *shape))
        rng = np.random.default_rng([1, 4, 0])
        blocks = [getattr(rng, name)(size=(min(64, 150 - step), *shape)) for step in range(0, 150, 64)]
        np.testing.assert_array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("script", CONTINUOUS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("bins", [7, 0])
def test_a_rollout_plays_the_stream_of_one_draw(script, bins, monkeypatch, tmp_path):
    played, act = [], script.act

    def note(actor, obs, noise=None):
        if noise is not None:
            played.append(noise)
        return act(actor, obs, noise)

    monkeypatch.setattr(script, "act", note)
    more = {"minibatch_size": 100} if script is dsppo_continuous else {}
    args = {"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 100, "total_timesteps": 400, "eval_episodes": 0, **more}
    script.main(script.Args(**args, num_bins=bins, alpha=1.0, beta=0.0, run_dir=str(tmp_path)))
    draw = "gumbel" if bins else "standard_normal"
    rng, shape = np.random.default_rng([1, script.ACTIONS, 0]), (100, 2, 1, 7) if bins else (100, 2, 1)
    expected = np.concatenate([getattr(rng, draw)(size=shape) for _ in range(2)])  # one draw a rollout
    np.testing.assert_array_equal(np.array(played), expected)
