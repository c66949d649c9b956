"""The A2C losses and the losses over several action dimensions: worked by hand, the paper's gradients, float64 autograd."""

import math
from dataclasses import replace

import helpers
import pytest
import torch

import dsa2c_continuous
import dsppo_continuous
import sa2c_atari
from dsa2c_continuous import factored_a2c_reverse
from dsppo_continuous import factored_ppo_reverse, symmetric_ppo_loss
from sa2c_atari import symmetric_a2c_loss

pytestmark = pytest.mark.quick

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
A2C, REVERSE = 0, 1


def gradient(which, action, advantage, **kwargs):
    logits = LOGITS.clone().requires_grad_()
    logprob = torch.log_softmax(logits, -1)[action]
    loss = symmetric_a2c_loss(logprob[None], torch.tensor([advantage], dtype=torch.float64), **kwargs)[which]
    return torch.autograd.grad(loss, logits)[0]


def test_a2c_values_worked_by_hand():
    # -(2 ln 0.5 - 3 ln 0.2) / 2 and, with Z = -3, (2 * 3 * 0.5 - 3 * 3 * 0.8) / 2; as printed A < 0 turns to +
    logprobs, advantages = torch.tensor([0.5, 0.2]).log(), torch.tensor([2.0, -3.0])
    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs, advantages, Z=-3.0)
    assert policy_loss.item() == pytest.approx(-(2 * math.log(0.5) - 3 * math.log(0.2)) / 2, rel=1e-6)
    assert reverse_loss.item() == pytest.approx((3.0 - 7.2) / 2, rel=1e-6)
    assert symmetric_a2c_loss(logprobs, advantages, -3.0, True)[1].item() == pytest.approx((3.0 + 7.2) / 2, rel=1e-6)


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.7, -0.6])
@pytest.mark.parametrize("Z", [-1.0, -0.3])
@pytest.mark.parametrize("literal_signs", [False, True])
def test_a2c_gradients_are_eq_11_and_12(action, advantage, Z, literal_signs):
    """Eq. 11 (16-18) for L_a2c; Eq. 12 (21, 22) for L_ra2c, whose sign turns where A < 0 as printed (Eq. 23-25)."""
    pi = LOGITS.softmax(-1)
    expected = advantage * pi  # y != i
    expected[action] = advantage * (pi[action] - 1)  # y = i
    torch.testing.assert_close(gradient(A2C, action, advantage), expected)
    expected = -advantage * Z * pi * pi[action]
    expected[action] = -advantage * Z * pi[action] * (pi[action] - 1)
    if literal_signs and advantage < 0:
        expected = -expected
    torch.testing.assert_close(gradient(REVERSE, action, advantage, Z=Z, literal_signs=literal_signs), expected)


def test_fact_1_printed_signs_point_against_a2c_where_a_is_negative():
    cosine = torch.nn.functional.cosine_similarity
    for advantage, printed in ((0.8, 1.0), (-0.8, -1.0)):
        a2c = gradient(A2C, 1, advantage)
        assert cosine(gradient(REVERSE, 1, advantage), a2c, dim=0).item() == pytest.approx(1.0)
        assert cosine(gradient(REVERSE, 1, advantage, literal_signs=True), a2c, dim=0).item() == pytest.approx(printed)


def test_reverse_a2c_value_is_the_sum_over_the_other_actions():
    pi = LOGITS.softmax(-1)
    for action in range(4):
        expected = sum(-1.7 * -0.5 * pi[j] for j in range(4) if j != action)  # Eq. 7
        logprobs = torch.log_softmax(LOGITS, -1)[action][None]
        torch.testing.assert_close(symmetric_a2c_loss(logprobs, torch.tensor([1.7]).double(), Z=-0.5)[1], expected)


@pytest.mark.parametrize("module", [sa2c_atari, dsa2c_continuous])
@pytest.mark.parametrize(("alpha", "beta", "Z"), [(0.5, 5.0, -1.0), (0.3, 4.0, -0.25), (1.0, 0.0, -1.0)])
def test_fact_3_sa2c_weights_each_sample_by_alpha_plus_beta_pi(module, alpha, beta, Z):
    """grad L_ra2c = |Z| pi_i grad L_a2c, seen through the whole loss: the gradient of A2C with weighted advantages."""
    generator = torch.Generator().manual_seed(0)
    samples, random = 64, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    logits, values = random(samples, 5).requires_grad_(), random(samples).requires_grad_()
    actions, advantages, returns = torch.randint(5, (samples,), generator=generator), random(samples), random(samples)
    all_logprobs = torch.log_softmax(logits, -1)
    logprobs = all_logprobs[torch.arange(samples), actions]
    args = module.Args(alpha=alpha, beta=beta, Z=Z, vf_coef=0.4, ent_coef=0.03)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    if module is sa2c_atari:
        agent, taken = lambda obs: (all_logprobs, values), actions
    else:
        agent, taken = lambda obs, actions: (logprobs.unsqueeze(-1), entropies, values), actions.unsqueeze(-1)
    loss, stats = module.rollout_loss(agent, args, None, taken, advantages, returns)
    grads = torch.autograd.grad(loss, (logits, values), retain_graph=True)

    weights = (alpha + beta * -Z * logprobs.exp()).detach()
    weighted = -(weights * advantages * torch.distributions.Categorical(logits=logits).log_prob(actions)).mean()
    expected = weighted + 0.4 * ((values - returns) ** 2).mean() - 0.03 * entropies.mean()
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (logits, values)))
    assert stats["losses/entropy"].item() == pytest.approx(entropies.mean().item())
    assert stats["charts/adv_sign_change"].item() == 0.0  # nothing is normalised by default
    args.norm_adv = True
    _, stats = module.rollout_loss(agent, args, None, taken, advantages + 0.3, returns)
    changed = ((advantages + 0.3 > 0) != (advantages > advantages.mean())).double().mean().item()
    assert stats["charts/adv_sign_change"].item() == pytest.approx(changed) and changed > 0


@pytest.mark.parametrize("logprob", [-200.0, -100.0, -1e-7, 0.0])
@pytest.mark.parametrize("advantage", [3.0, 0.0, -3.0])
def test_a2c_finite_in_float32(logprob, advantage):
    logprobs = torch.tensor([logprob], requires_grad=True)
    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs, torch.tensor([advantage]))
    factored = factored_a2c_reverse(logprobs.unsqueeze(-1).expand(1, 17), torch.tensor([advantage]))
    (grad,) = torch.autograd.grad(policy_loss + reverse_loss + factored, logprobs)
    for value in (policy_loss, reverse_loss, factored, grad):
        assert torch.isfinite(value).all()
    assert reverse_loss.item() == pytest.approx(-advantage * math.expm1(logprob), rel=1e-6)


# --- several action dimensions ----------------------------------------------------------------------------------------


def dims(count, samples=200, bins=11, spread=0.1):
    """logits [samples, D, bins] with gradient, chosen bins, log-probabilities now and of the policy that acted, advantages."""
    generator = torch.Generator().manual_seed(count)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = random(samples, count, bins).requires_grad_()
    actions = torch.randint(bins, (samples, count, 1), generator=generator)
    logprobs = torch.log_softmax(logits, -1).gather(-1, actions).squeeze(-1)
    return logits, actions, logprobs, logprobs.detach() + spread * random(samples, count), random(samples)


@pytest.mark.parametrize("literal_signs", [False, True])
def test_for_one_dimension_factored_is_joint(literal_signs):
    logits, _, logprobs, old_logprobs, advantages = dims(1)
    joint = symmetric_ppo_loss(logprobs.sum(-1), old_logprobs.sum(-1), advantages, 0.1, -0.7, literal_signs)[1]
    factored = factored_ppo_reverse(logprobs, old_logprobs, advantages, 0.1, -0.7, literal_signs)
    torch.testing.assert_close(factored, joint)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (joint, factored)]
    torch.testing.assert_close(*grads)
    assert 0.1 < (grads[0] == 0).all(-1).double().mean() < 0.9  # the mask was met on both sides

    joint = symmetric_a2c_loss(logprobs.sum(-1), advantages, -0.7, literal_signs)[1]
    factored = factored_a2c_reverse(logprobs, advantages, -0.7, literal_signs)
    torch.testing.assert_close(factored, joint)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (joint, factored)))


@pytest.mark.parametrize("count", [3, 17])
@pytest.mark.parametrize("literal_signs", [False, True])
def test_factored_values_and_gradients_by_dimension(count, literal_signs):
    """Sums of Eq. 7 and 8 over the dimensions, bin by bin, with the mask of the joint ratio; D = 17 is HumanoidStandup."""
    logits, actions, logprobs, old_logprobs, advantages = dims(count, samples=40, spread=0.05)
    pi = torch.softmax(logits, -1)
    signs = advantages.abs() if literal_signs else advantages
    ppo, a2c, kept = 0.0, 0.0, 0
    for b in range(40):
        ratio = math.prod((logprobs[b, d] - old_logprobs[b, d]).exp().item() for d in range(count))
        is_cut = ratio > 1.2 if advantages[b] > 0 else ratio < 0.8
        kept += not is_cut
        for d in range(count):
            others = sum(pi[b, d, j] for j in range(11) if j != actions[b, d, 0])
            a2c = a2c + signs[b] * 0.5 * others / 40
            if not is_cut:
                constant = 1 / old_logprobs[b, d].exp()  # has no gradient, and is left out
                ppo = ppo + signs[b] * 0.5 * (others / old_logprobs[b, d].exp() - constant) / 40
    assert 5 < kept < 40
    for ours, expected in (
        (factored_ppo_reverse(logprobs, old_logprobs, advantages, 0.2, -0.5, literal_signs), ppo),
        (factored_a2c_reverse(logprobs, advantages, -0.5, literal_signs), a2c),
    ):
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, expected)]
        torch.testing.assert_close(*grads)


def test_joint_loss_of_17_dimensions_keeps_fact_2():
    logits, _, logprobs, old_logprobs, advantages = dims(17, spread=0.05)
    losses = symmetric_ppo_loss(logprobs.sum(-1), old_logprobs.sum(-1), advantages, 0.2)[:2]
    ppo, reverse = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(ppo, reverse)


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


@pytest.mark.parametrize("logprob", [-200 / 17, -200.0, -1e-8, 0.0])
@pytest.mark.parametrize("old_logprob", [-200 / 17, -200.0, -1e-8, 0.0])
@pytest.mark.parametrize("advantage", [3.0, 0.0, -3.0])
def test_factored_ppo_finite_in_float32_for_17_dimensions(logprob, old_logprob, advantage):
    logprobs = torch.full((1, 17), logprob, requires_grad=True)
    old_logprobs, advantages = torch.full((1, 17), old_logprob), torch.tensor([advantage])
    factored = factored_ppo_reverse(logprobs, old_logprobs, advantages, 0.2)
    policy_loss, joint, _ = symmetric_ppo_loss(logprobs.sum(-1), old_logprobs.sum(-1), advantages, 0.2)
    (grad,) = torch.autograd.grad(factored + joint + policy_loss, logprobs)
    for value in (factored, joint, policy_loss, grad):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("norm_adv", [True, False])
def test_dsa2c_rollout_loss_is_the_sum_of_its_parts(norm_adv):
    """alpha, beta, vf_coef and ent_coef reach the parts; --reverse-prob chooses between the reverse losses."""
    logits, _, logprobs, _, advantages = dims(3, samples=64)
    values, returns = torch.zeros(64).double(), torch.ones(64).double() * 3
    entropies = torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1).entropy()
    agent = lambda obs, actions: (logprobs, entropies, values)  # noqa: E731
    used = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
    pi = logprobs.exp()
    reverse = {"joint": (used * (1 - pi.prod(-1))).mean(), "factored": (used * (1 - pi).sum(-1)).mean()}
    for reverse_prob, expected_reverse in reverse.items():
        settings = {"alpha": 0.7, "beta": 3.0, "vf_coef": 0.4, "ent_coef": 0.05}
        args = dsa2c_continuous.Args(**settings, norm_adv=norm_adv, reverse_prob=reverse_prob)
        loss, stats = dsa2c_continuous.rollout_loss(agent, args, None, None, advantages, returns)
        expected = 0.7 * -(used * logprobs.sum(-1)).mean() + 3.0 * expected_reverse + 0.4 * 9.0 - 0.05 * entropies.mean()
        torch.testing.assert_close(loss, expected)
        assert stats["losses/reverse_loss"].item() == pytest.approx(expected_reverse.item())


@pytest.mark.parametrize("script", [sa2c_atari, dsa2c_continuous], ids=lambda module: module.__name__)
def test_mean_weight_is_sa2c_with_one_weight_for_all_samples(script):
    """Its gradient is (alpha + beta |Z| mean pi) grad L_a2c, with the mean of SA2C's own weights (fact 3)."""
    torch.manual_seed(0)
    logits = torch.randn(64, 3, 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (64, 3))
    all_logprobs = torch.log_softmax(logits, -1)
    logprobs = all_logprobs.gather(-1, actions[..., None]).squeeze(-1)
    advantages, zeros = torch.randn(64).double(), torch.zeros(64).double()
    if script is sa2c_atari:
        actions, logprobs = actions[:, 0], logprobs[:, :1]
        agent = lambda obs: (all_logprobs[:, 0], zeros)  # noqa: E731
    else:
        agent = lambda obs, actions: (logprobs, zeros, zeros)  # noqa: E731
    args = script.Args(alpha=0.5, beta=3.0, Z=-0.4, ent_coef=0.0, mean_weight=True)
    loss, _ = script.rollout_loss(agent, args, None, actions, advantages, zeros)
    joint = logprobs.sum(-1)
    a2c = -(advantages * joint).mean()
    weight = 0.5 + 3.0 * 0.4 * joint.detach().exp().mean()
    ours, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, weight * a2c))
    torch.testing.assert_close(ours, expected)
    own, _ = script.rollout_loss(agent, replace(args, mean_weight=False), None, actions, advantages, zeros)
    assert (torch.autograd.grad(own, logits)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("sa2c_atari.py", ["--beta", "0"]),
        ("sa2c_atari.py", ["--literal-signs"]),
        ("dsa2c_continuous.py", ["--beta", "0"]),
        ("dsa2c_continuous.py", ["--reverse-prob", "factored"]),
    ],
)
def test_mean_weight_needs_the_reverse_term_that_it_averages(script, argv, tmp_path):
    env = ["--env-id", "Pendulum-v1", "--max-episode-steps", "200"] if "continuous" in script else []
    _, err = helpers.run(script, *env, *argv, "--mean-weight", "--run-dir", tmp_path / "runs", code=2)
    assert "--mean-weight True: expected off, or beta above 0" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_densities_above_1_leave_a_gaussian_a2c_finite():
    logprobs = torch.tensor([[60.0, 60.0]], requires_grad=True)  # jointly e^120, more than float32 holds
    for reverse_loss in (symmetric_a2c_loss(logprobs.sum(-1), torch.ones(1))[1], factored_a2c_reverse(logprobs, torch.ones(1))):
        (grad,) = torch.autograd.grad(0.0 * reverse_loss, logprobs)
        assert reverse_loss.item() == 0.0 and not grad.any()


def test_dsppo_minibatch_loss_is_the_sum_of_its_parts():
    """alpha, beta, vf_coef and ent_coef reach the parts; --reverse-prob chooses between the reverse losses."""
    logits, _, logprobs, old_logprobs, advantages = dims(3, samples=64)
    values, returns = torch.zeros(64).double(), torch.ones(64).double() * 3
    entropies = torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1).entropy()
    agent = lambda obs, actions: (logprobs, entropies, values)  # noqa: E731
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for reverse_prob in ("joint", "factored"):
        args = dsppo_continuous.Args(alpha=0.7, beta=3.0, vf_coef=0.4, ent_coef=0.05, reverse_prob=reverse_prob)
        loss, stats = dsppo_continuous.minibatch_loss(agent, args, None, None, old_logprobs, advantages, returns)
        policy_loss, joint, _ = symmetric_ppo_loss(logprobs.sum(-1), old_logprobs.sum(-1), normalised, 0.2)
        factored = factored_ppo_reverse(logprobs, old_logprobs, normalised, 0.2)
        reverse_loss = joint if reverse_prob == "joint" else factored
        expected = 0.7 * policy_loss + 3.0 * reverse_loss + 0.4 * 9.0 - 0.05 * entropies.mean()
        torch.testing.assert_close(loss, expected)
        assert stats["losses/reverse_loss"].item() == pytest.approx(reverse_loss.item())
        assert (advantages.sign() != normalised.sign()).any()
        changed = (advantages.sign() != normalised.sign()).double().mean().item()
        assert stats["charts/adv_sign_change"].item() == pytest.approx(changed)
    assert not torch.isclose(joint, factored)
