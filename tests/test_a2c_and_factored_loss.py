"""The losses over several action dimensions, and the whole loss of each script, in float64."""

import math
from dataclasses import replace

import pytest
import torch

import dsa2c_continuous
import dsppo_continuous
import sa2c_atari
import sppo_atari
from dsa2c_continuous import factored_a2c_reverse
from dsppo_continuous import factored_ppo_reverse
from sa2c_atari import symmetric_a2c_loss

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("logprob", [-200.0, -100.0, -1e-7, 0.0])
@pytest.mark.parametrize("advantage", [3.0, 0.0, -3.0])
def test_a2c_finite_in_float32(logprob, advantage):
    logprobs = torch.tensor([logprob], requires_grad=True)
    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs, torch.tensor([advantage]))
    factored = factored_a2c_reverse(logprobs.unsqueeze(-1).expand(1, 17), torch.tensor([advantage]))
    (grad,) = torch.autograd.grad(policy_loss + reverse_loss + factored, logprobs)
    assert all(torch.isfinite(value).all() for value in (policy_loss, reverse_loss, factored, grad))
    assert reverse_loss.item() == pytest.approx(-advantage * math.expm1(logprob), rel=1e-6)


def dims(count, samples=200, bins=11, spread=0.1):
    """logits [samples, D, bins] with gradient, chosen bins, log-probabilities now and of the policy that acted, advantages."""
    generator = torch.Generator().manual_seed(count)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = random(samples, count, bins).requires_grad_()
    actions = torch.randint(bins, (samples, count, 1), generator=generator)
    logprobs = torch.log_softmax(logits, -1).gather(-1, actions).squeeze(-1)
    return logits, actions, logprobs, logprobs.detach() + spread * random(samples, count), random(samples)


@pytest.mark.parametrize("count", [3, 17])
@pytest.mark.parametrize("literal_signs", [False, True])
def test_factored_values_and_gradients_by_dimension(count, literal_signs):
    """Sums of Eq. 7 and 8 over the dimensions, bin by bin, with the mask of the joint ratio; D = 17 is HumanoidStandup."""
    samples = 120 // count
    logits, actions, logprobs, old_logprobs, advantages = dims(count, samples, spread=0.05 if count == 3 else 0.1)
    pi = torch.softmax(logits, -1)
    signs = advantages.abs() if literal_signs else advantages
    ppo, a2c, kept = 0.0, 0.0, 0
    for b in range(samples):
        ratio = math.prod((logprobs[b, d] - old_logprobs[b, d]).exp().item() for d in range(count))
        is_cut = ratio > 1.2 if advantages[b] > 0 else ratio < 0.8
        kept += not is_cut
        for d in range(count):
            others = sum(pi[b, d, j] for j in range(11) if j != actions[b, d, 0])
            a2c = a2c + signs[b] * 0.5 * others / samples
            if not is_cut:
                constant = 1 / old_logprobs[b, d].exp()  # has no gradient, and is left out
                ppo = ppo + signs[b] * 0.5 * (others / old_logprobs[b, d].exp() - constant) / samples
    assert 2 < kept < samples
    for ours, expected in (
        (factored_ppo_reverse(logprobs, old_logprobs, advantages, 0.2, -0.5, literal_signs), ppo),
        (factored_a2c_reverse(logprobs, advantages, -0.5, literal_signs), a2c),
    ):
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, expected)]
        torch.testing.assert_close(*grads)


def test_joint_reverse_term_of_a2c_all_but_vanishes_for_many_dimensions():
    """Fact 4: at uniform bins its gradient is 11^-D times A2C's; factored it is 1/11 of it for any D."""
    for count in (1, 3, 8):
        logits = torch.zeros(1, count, 11, dtype=torch.float64, requires_grad=True)
        logprobs = torch.log_softmax(logits, -1)[..., 0]
        policy_loss, reverse_loss = symmetric_a2c_loss(logprobs.sum(-1), torch.ones(1).double())
        factored = factored_a2c_reverse(logprobs, torch.ones(1).double())
        losses = (policy_loss, reverse_loss, factored)
        a2c, joint, each = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
        torch.testing.assert_close(joint, a2c * 11.0**-count)
        torch.testing.assert_close(each, a2c / 11)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("literal_signs", [False, True])
@pytest.mark.parametrize("reverse_prob", ["joint", "factored"])
@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, dsppo_continuous, dsa2c_continuous], ids=lambda m: m.__name__)
def test_each_argument_reaches_the_loss(script, reverse_prob, literal_signs, norm_adv):
    """alpha, beta, Z, literal_signs, reverse_prob, norm_adv, vf_coef and ent_coef, from Eq. 3, 7, 8 and 9 bin by bin."""
    atari, ppo = "atari" in script.__name__, "ppo" in script.__name__
    logits, actions, logprobs, old_logprobs, advantages = dims(1 if atari else 3, samples=64)
    values, returns = torch.zeros(64).double(), torch.ones(64).double() * 3
    entropies = torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1).entropy()
    settings = {} if atari else {"reverse_prob": reverse_prob}
    settings |= {"alpha": 0.7, "beta": 3.0, "Z": -0.4, "literal_signs": literal_signs, "norm_adv": norm_adv}
    args = script.Args(**settings, vf_coef=0.4, ent_coef=0.05, **({"clip_coef": 0.15} if ppo else {}))
    used = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
    signed = used.abs() if literal_signs else used
    factored = reverse_prob == "factored" and not atari
    pi, joint = logprobs.exp(), logprobs.sum(-1).exp()
    if ppo:
        ratio = joint / old_logprobs.sum(-1).exp()
        clipped = ratio.clamp(0.85, 1.15)
        policy_loss = -torch.min(used * ratio, used * clipped).mean()
        ratios = (pi / old_logprobs.exp()).sum(-1) if factored else ratio
        reverse_loss = -(signed * 0.4 * ratios * (used * ratio <= used * clipped)).mean()
    else:
        policy_loss = -(used * logprobs.sum(-1)).mean()
        reverse_loss = (signed * 0.4 * ((1 - pi).sum(-1) if factored else 1 - joint)).mean()
    all_logprobs = torch.log_softmax(logits, -1)[:, 0]
    agent = (lambda obs: (all_logprobs, values)) if atari else (lambda obs, actions: (logprobs, entropies, values))
    taken, old = (actions[:, 0, 0], old_logprobs[:, 0]) if atari else (None, old_logprobs)
    clip_coef = (torch.tensor(0.15),) if script is sppo_atari else ()
    loss_fn = script.minibatch_loss if ppo else script.rollout_loss
    loss, stats = loss_fn(agent, args, *clip_coef, None, taken, *((old,) if ppo else ()), advantages, returns)
    expected = 0.7 * policy_loss + 3.0 * reverse_loss + 0.4 * 9.0 - 0.05 * entropies.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected)))
    parts = {"policy_loss": policy_loss, "reverse_loss": reverse_loss, "entropy": entropies.mean()}
    for name, value in parts.items():
        assert stats[f"losses/{name}"].item() == pytest.approx(value.item())
    changed = (advantages.sign() != used.sign()).double().mean().item()
    assert stats["charts/adv_sign_change"].item() == pytest.approx(changed) and (changed > 0) == norm_adv


@pytest.mark.parametrize("script", [sa2c_atari, dsa2c_continuous], ids=lambda module: module.__name__)
def test_mean_weight_is_sa2c_with_one_weight_for_all_samples(script):
    """Its gradient is (alpha + beta |Z| mean pi) grad L_a2c, with the mean of SA2C's own weights (fact 3)."""
    atari = script is sa2c_atari
    logits, actions, logprobs, _, advantages = dims(1 if atari else 3, samples=64, bins=5)
    all_logprobs, zeros, actions = torch.log_softmax(logits, -1)[:, 0], torch.zeros(64).double(), actions[:, 0, 0]
    agent = (lambda obs: (all_logprobs, zeros)) if atari else (lambda obs, actions: (logprobs, zeros, zeros))
    args = script.Args(alpha=0.5, beta=3.0, Z=-0.4, ent_coef=0.0, mean_weight=True)
    loss, _ = script.rollout_loss(agent, args, None, actions, advantages, zeros)
    joint = logprobs.sum(-1)
    a2c = -(advantages * joint).mean()
    weight = 0.5 + 3.0 * 0.4 * joint.detach().exp().mean()
    ours, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, weight * a2c))
    torch.testing.assert_close(ours, expected)
    own, _ = script.rollout_loss(agent, replace(args, mean_weight=False), None, actions, advantages, zeros)
    assert (torch.autograd.grad(own, logits)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("argv", [{"beta": 0.0}, {"literal_signs": True}, {"reverse_prob": "factored"}], ids=str)
def test_mean_weight_needs_the_reverse_term_that_it_averages(argv):
    with pytest.raises(ValueError, match="--mean-weight: expected beta above 0, reverse_prob joint and no literal_signs"):
        dsa2c_continuous.check(dsa2c_continuous.Args(env_id="Pendulum-v1", mean_weight=True, **argv))
    if "reverse_prob" not in argv:
        with pytest.raises(ValueError, match="--mean-weight"):
            sa2c_atari.check(sa2c_atari.Args(mean_weight=True, **argv))


def test_densities_above_1_leave_a_gaussian_a2c_finite():
    logprobs = torch.tensor([[60.0, 60.0]], requires_grad=True)  # jointly e^120, more than float32 holds
    for reverse_loss in (symmetric_a2c_loss(logprobs.sum(-1), torch.ones(1))[1], factored_a2c_reverse(logprobs, torch.ones(1))):
        (grad,) = torch.autograd.grad(0.0 * reverse_loss, logprobs)
        assert reverse_loss.item() == 0.0 and not grad.any()
