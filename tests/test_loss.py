"""The symmetric loss against hand-worked cases, the paper's gradients and float64 autograd."""

import math

import pytest
import torch

from sppo_atari import Args, minibatch_loss, symmetric_ppo_loss

pytestmark = pytest.mark.quick

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
OLD_LOGITS = torch.tensor([0.4, -1.1, 1.7, 0.8], dtype=torch.float64)


def losses(logits, old_logits, action, advantage, clip_coef, **kwargs):
    """Both losses of one sample with k = len(logits) actions; float64 unless the logits say otherwise."""
    logprob = torch.log_softmax(logits, -1)[action]
    old_logprob = torch.log_softmax(old_logits, -1)[action]
    advantages = torch.tensor([advantage], dtype=logits.dtype)
    return symmetric_ppo_loss(logprob[None], old_logprob[None], advantages, clip_coef, **kwargs)[:2]


def gradient(which, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(losses(logits, *args, **kwargs)[which], logits)
    return grad


PPO, REVERSE = 0, 1


def test_values_worked_by_hand():
    # two samples, eps 0.1: pi 0.5 / 0.4 = 1.25 (A 2, cut: 2 * 1.1) and pi 0.2 / 0.25 = 0.8 (A 1, kept: 0.8)
    policy_loss, reverse_loss, stats = symmetric_ppo_loss(
        torch.tensor([0.5, 0.2]).log(), torch.tensor([0.4, 0.25]).log(), torch.tensor([2.0, 1.0]), 0.1, Z=-3.0
    )
    assert policy_loss.item() == pytest.approx(-(2.2 + 0.8) / 2, rel=1e-6)
    # Eq. 8 is 0 and 3 (1 - 0.2) / 0.25; the second without its constant 3 / 0.25 is -3 * 0.8; the mean is over both
    assert reverse_loss.item() == pytest.approx((0 - 3 * 0.2 / 0.25) / 2, rel=1e-6)
    assert stats["clipfrac"].item() == 1.0
    assert stats["old_approx_kl"].item() == pytest.approx(-(math.log(1.25) + math.log(0.8)) / 2, abs=1e-6)
    assert stats["approx_kl"].item() == pytest.approx((0.25 - math.log(1.25) - 0.2 - math.log(0.8)) / 2, rel=1e-5)


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_ppo_gradient_is_eq_26_to_28(action, advantage):
    pi, old = LOGITS.softmax(-1), OLD_LOGITS.softmax(-1)[action]
    expected = advantage * pi[action] * pi / old  # y != i
    expected[action] = advantage * pi[action] * (pi[action] - 1) / old  # y = i
    torch.testing.assert_close(gradient(PPO, LOGITS, OLD_LOGITS, action, advantage, 10.0), expected)


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.7, -0.6])
@pytest.mark.parametrize("Z", [-1.0, -0.3])
@pytest.mark.parametrize("literal_signs", [False, True])
def test_reverse_gradient_is_eq_29(action, advantage, Z, literal_signs):
    """Eq. 12 and 21-25 over pi_old; as printed the sign turns where A < 0 (Eq. 23-25), aligned it does not."""
    pi, old = LOGITS.softmax(-1), OLD_LOGITS.softmax(-1)[action]
    expected = -advantage * Z * pi * pi[action] / old  # y != i
    expected[action] = -advantage * Z * pi[action] * (pi[action] - 1) / old  # y = i
    if literal_signs and advantage < 0:
        expected = -expected
    grad = gradient(REVERSE, LOGITS, OLD_LOGITS, action, advantage, 10.0, Z=Z, literal_signs=literal_signs)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_reverse_gradient_with_pi_old_1_is_ra2c_and_fact_3(action, advantage):
    """With pi_old = 1, Eq. 8 is Eq. 7: the gradients of Eq. 12, 21, 22, and grad L_ra2c = pi_i grad L_a2c."""
    logits = LOGITS.clone().requires_grad_()
    logprob = torch.log_softmax(logits, -1)[action]
    _, reverse_loss, _ = symmetric_ppo_loss(logprob[None], torch.zeros(1).double(), torch.tensor([advantage]).double(), 1.0)
    (grad,) = torch.autograd.grad(reverse_loss, logits, retain_graph=True)
    (a2c_grad,) = torch.autograd.grad(-advantage * logprob, logits)
    pi = LOGITS.softmax(-1)
    expected = advantage * pi * pi[action]
    expected[action] = advantage * pi[action] * (pi[action] - 1)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(grad, pi[action] * a2c_grad)


def test_reverse_value_is_the_sum_over_the_other_actions_without_its_constant():
    pi, old = LOGITS.softmax(-1), OLD_LOGITS.softmax(-1)
    for action in range(4):
        expected = sum(-1.7 * -0.5 * pi[j] / old[action] for j in range(4) if j != action)  # Eq. 7 over pi_old
        reverse_loss = losses(LOGITS, OLD_LOGITS, action, 1.7, 10.0, Z=-0.5)[REVERSE]
        constant = -1.7 * -0.5 / old[action]  # has no gradient
        torch.testing.assert_close(reverse_loss + constant, expected)


def test_fact_1_printed_signs_point_against_ppo_where_a_is_negative():
    cosine = torch.nn.functional.cosine_similarity
    for advantage, printed in ((0.8, 1.0), (-0.8, -1.0)):
        args = (LOGITS, OLD_LOGITS, 1, advantage, 10.0)
        assert cosine(gradient(REVERSE, *args), gradient(PPO, *args), dim=0).item() == pytest.approx(1.0)
        grad = gradient(REVERSE, *args, literal_signs=True)
        assert cosine(grad, gradient(PPO, *args), dim=0).item() == pytest.approx(printed)


def test_fact_2_reverse_gradient_is_ppos_sample_by_sample():
    torch.manual_seed(0)
    logits, old_logits = torch.randn(2, 500, 6, dtype=torch.float64) * 0.3
    cut = 0
    for logit, old_logit, advantage in zip(logits, old_logits, torch.randn(500).tolist(), strict=True):
        ppo = gradient(PPO, logit, old_logit, 2, advantage, 0.2)
        torch.testing.assert_close(gradient(REVERSE, logit, old_logit, 2, advantage, 0.2), ppo)
        cut += (ppo == 0).all().item()
    assert 50 < cut < 450  # the mask was met on both sides


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9 - 1e-6, 0.9 + 1e-6, 1.0, 1.1 - 1e-6, 1.1 + 1e-6, 1.6])
def test_mask_at_and_around_the_clip_edges(advantage, ratio):
    """Cut: r > 1 + eps with A > 0, r < 1 - eps with A < 0. d L_ppo / d log pi = -A r where it is not cut."""
    logprob = torch.tensor([math.log(0.3 * ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.log(0.3)], dtype=torch.float64)
    policy_loss, reverse_loss, _ = symmetric_ppo_loss(logprob, old, torch.tensor([advantage]).double(), 0.1)
    is_cut = ratio > 1.1 if advantage > 0 else ratio < 0.9
    for loss in (policy_loss, reverse_loss):
        (grad,) = torch.autograd.grad(loss, logprob, retain_graph=True)
        assert grad.item() == pytest.approx(0.0 if is_cut else -advantage * ratio, abs=1e-12)
    expected = 0.0 if is_cut else advantage * ((1 - 0.3 * ratio) / 0.3 - 1 / 0.3)
    assert reverse_loss.item() == pytest.approx(expected, abs=1e-9)


def test_zero_advantage_contributes_nothing():
    for ratio in (0.5, 1.0, 2.0):
        logprob = torch.tensor([math.log(0.3 * ratio)], requires_grad=True)
        policy_loss, reverse_loss, _ = symmetric_ppo_loss(logprob, torch.tensor([0.3]).log(), torch.zeros(1), 0.1)
        (grad,) = torch.autograd.grad(policy_loss + reverse_loss, logprob)
        assert policy_loss.item() == reverse_loss.item() == grad.item() == 0.0


def test_beta_and_z_act_through_their_product():
    args = (LOGITS, OLD_LOGITS, 0, -0.7, 0.2)
    assert losses(*args, Z=-1.0)[REVERSE].item() == pytest.approx(10 * losses(*args, Z=-0.1)[REVERSE].item())


@pytest.mark.parametrize("logprob", [-200.0, -100.0, -1e-7, 0.0])
@pytest.mark.parametrize("old_logprob", [-200.0, -100.0, -1e-7, 0.0])
@pytest.mark.parametrize("advantage", [3.0, 0.0, -3.0])
def test_finite_for_any_logprob_in_float32(logprob, old_logprob, advantage):
    logprob = torch.tensor([logprob], requires_grad=True)
    policy_loss, reverse_loss, stats = symmetric_ppo_loss(
        logprob, torch.tensor([old_logprob]), torch.tensor([advantage]), 0.1, Z=-1.0
    )
    (grad,) = torch.autograd.grad(policy_loss + reverse_loss, logprob)
    for value in (policy_loss, reverse_loss, grad, *stats.values()):
        assert torch.isfinite(value).all()


def test_gradient_is_exact_for_a_logprob_of_minus_200():
    """1 / pi_old overflows float32 beyond -88; the loss -A r and its gradient do not depend on it."""
    logprob = torch.tensor([-200.05], requires_grad=True)
    for loss in symmetric_ppo_loss(logprob, torch.tensor([-200.0]), torch.tensor([2.0]), 0.1)[:2]:
        (grad,) = torch.autograd.grad(loss, logprob, retain_graph=True)
        assert grad.item() == pytest.approx(-2 * math.exp(-0.05), rel=1e-4)


class TableAgent(torch.nn.Module):
    """Stands in for the network: logits and values of each sample are parameters."""

    def __init__(self, samples, actions):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.nn.Parameter(torch.randn(samples, actions, generator=generator, dtype=torch.float64))
        self.values = torch.nn.Parameter(torch.randn(samples, generator=generator, dtype=torch.float64))

    def forward(self, obs):
        return torch.log_softmax(self.logits[obs], -1), self.values[obs]


def table_batch(samples, actions):
    generator = torch.Generator().manual_seed(2)
    random = lambda: torch.randn(samples, generator=generator, dtype=torch.float64)  # noqa: E731
    taken = torch.randint(actions, (samples,), generator=generator)
    return torch.arange(samples), taken, -1.5 + 0.3 * random(), 0.5 + random(), random()


def test_alpha_1_beta_0_is_ppo_written_independently():
    agent, clip_coef = TableAgent(64, 5), 0.15
    _, actions, old_logprobs, advantages, returns = batch = table_batch(64, 5)
    args = Args(alpha=1.0, beta=0.0, vf_coef=0.7, ent_coef=0.03)
    loss, stats = minibatch_loss(agent, args, torch.tensor(clip_coef), *batch)
    grads = torch.autograd.grad(loss, agent.parameters())

    distribution = torch.distributions.Categorical(logits=agent.logits)
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    objective = 0.0
    for i in range(64):  # the cases of Eq. 3 one by one
        ratio = (distribution.log_prob(actions)[i] - old_logprobs[i]).exp()
        limit = 1 + clip_coef if normalised[i] > 0 else 1 - clip_coef
        is_cut = ratio > limit if normalised[i] > 0 else ratio < limit
        objective = objective + normalised[i] * (limit if is_cut else ratio) / 64
    value_loss = ((agent.values - returns) ** 2).mean()
    expected = -objective + 0.7 * value_loss - 0.03 * distribution.entropy().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, agent.parameters()))

    assert stats["losses/entropy"].item() == pytest.approx(distribution.entropy().mean().item())
    changed = sum((a > 0) != (b > 0) for a, b in zip(advantages.tolist(), normalised.tolist(), strict=True)) / 64
    assert 0 < changed < 1
    assert stats["charts/adv_sign_change"].item() == pytest.approx(changed)


@pytest.mark.parametrize(("alpha", "beta", "Z"), [(0.5, 10.0, -1.0), (0.5, 1.0, -1.0), (0.3, 4.0, -0.25)])
def test_control_alpha_plus_beta_z_has_the_gradient_of_sppo(alpha, beta, Z):
    agent, batch = TableAgent(64, 5), table_batch(64, 5)
    grads = []
    for args in (Args(alpha=alpha, beta=beta, Z=Z), Args(alpha=alpha - beta * Z, beta=0.0)):
        loss, _ = minibatch_loss(agent, args, torch.tensor(0.1), *batch)
        grads.append(torch.autograd.grad(loss, agent.parameters()))
    torch.testing.assert_close(grads[0], grads[1])
