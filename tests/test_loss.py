"""The symmetric losses of one action dimension: worked by hand, the paper's gradients, float64 autograd."""

import math

import pytest
import torch

from dsppo_continuous import factored_ppo_reverse
from sa2c_atari import symmetric_a2c_loss
from sppo_atari import symmetric_ppo_loss

pytestmark = pytest.mark.quick

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
OLD_LOGITS = torch.tensor([0.4, -1.1, 1.7, 0.8], dtype=torch.float64)
FORWARD, REVERSE = 0, 1


def ppo(logits, action, advantage, clip_coef=10.0, old_logits=OLD_LOGITS, **kwargs):
    """Both losses of one sample; by default nothing is clipped."""
    logprob, old_logprob = (torch.log_softmax(each, -1)[action][None] for each in (logits, old_logits))
    return symmetric_ppo_loss(logprob, old_logprob, torch.tensor([advantage]).to(logits), clip_coef, **kwargs)[:2]


def a2c(logits, action, advantage, **kwargs):
    return symmetric_a2c_loss(torch.log_softmax(logits, -1)[action][None], torch.tensor([advantage]).to(logits), **kwargs)


def gradient(losses, which, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(losses(logits, *args, **kwargs)[which], logits)[0]


def test_ppo_values_worked_by_hand():
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


def test_a2c_values_worked_by_hand():
    # -(2 ln 0.5 - 3 ln 0.2) / 2 and, with Z = -3, (2 * 3 * 0.5 - 3 * 3 * 0.8) / 2; as printed A < 0 turns to +
    logprobs, advantages = torch.tensor([0.5, 0.2]).log(), torch.tensor([2.0, -3.0])
    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs, advantages, Z=-3.0)
    assert policy_loss.item() == pytest.approx(-(2 * math.log(0.5) - 3 * math.log(0.2)) / 2, rel=1e-6)
    assert reverse_loss.item() == pytest.approx((3.0 - 7.2) / 2, rel=1e-6)
    assert symmetric_a2c_loss(logprobs, advantages, -3.0, True)[1].item() == pytest.approx((3.0 + 7.2) / 2, rel=1e-6)


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_gradients_are_those_of_the_papers_appendix(action, advantage):
    """L_a2c: Eq. 11; L_ra2c: Eq. 12 (21, 22); L_ppo: Eq. 26 to 28; L_rppo: Eq. 29. As printed Eq. 23 to 25 turn where A < 0."""
    pi, old = LOGITS.softmax(-1), OLD_LOGITS.softmax(-1)[action]
    others = pi.clone()  # y != i
    others[action] -= 1  # y = i
    forward = {a2c: advantage * others, ppo: advantage * pi[action] * others / old}
    for losses, expected in forward.items():
        torch.testing.assert_close(gradient(losses, FORWARD, LOGITS, action, advantage), expected)
    reverse = {a2c: advantage * pi[action] * others, ppo: advantage * pi[action] * others / old}  # facts 3 and 2
    for losses, expected in reverse.items():
        for Z in (-1.0, -0.3):
            aligned = gradient(losses, REVERSE, LOGITS, action, advantage, Z=Z)
            torch.testing.assert_close(aligned, -Z * expected)
            printed = gradient(losses, REVERSE, LOGITS, action, advantage, Z=Z, literal_signs=True)  # fact 1
            torch.testing.assert_close(printed, aligned if advantage > 0 else -aligned)


@pytest.mark.parametrize("action", range(4))
def test_reverse_values_are_the_sums_over_the_other_actions(action):
    pi, old = LOGITS.softmax(-1), OLD_LOGITS.softmax(-1)[action]
    eq_7 = sum(-1.7 * -0.5 * pi[j] for j in range(4) if j != action)
    torch.testing.assert_close(a2c(LOGITS, action, 1.7, Z=-0.5)[REVERSE], eq_7)
    constant = -1.7 * -0.5 / old  # left out, as it has no gradient
    torch.testing.assert_close(ppo(LOGITS, action, 1.7, Z=-0.5)[REVERSE] + constant, eq_7 / old)


def test_fact_2_reverse_gradient_is_ppos_sample_by_sample():
    torch.manual_seed(0)
    logits, old_logits = torch.randn(2, 300, 6, dtype=torch.float64) * 0.3
    cut = 0
    for logit, old_logit, advantage in zip(logits, old_logits, torch.randn(300).tolist(), strict=True):
        forward, reverse = (gradient(ppo, which, logit, 2, advantage, 0.2, old_logit) for which in (FORWARD, REVERSE))
        torch.testing.assert_close(reverse, forward)
        cut += (forward == 0).all().item()
    assert 30 < cut < 270  # the mask was met on both sides


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
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


@pytest.mark.parametrize(("logprob", "old", "expected"), [(15.0, 0.0, 15.0), (25.0, 0.0, None), (-200.05, -200.0, -0.05)])
def test_gradient_is_exact_up_to_a_ratio_of_e_20(logprob, old, expected):
    """A < 0, not cut: -A r, also where 1 / pi_old overflows float32 (beyond e^88); above e^20 the ratio is held."""
    logprobs, old_logprobs = torch.tensor([logprob], requires_grad=True), torch.tensor([old])
    advantages, clip_coef = torch.tensor([-1.0]), 0.1
    policy_loss, reverse_loss, stats = symmetric_ppo_loss(logprobs, old_logprobs, advantages, clip_coef)
    factored = factored_ppo_reverse(logprobs[:, None], old_logprobs[:, None], advantages, clip_coef)
    for loss in (policy_loss, reverse_loss, factored):
        (grad,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
        assert grad.item() == pytest.approx(math.exp(expected) if expected else 0.0, rel=1e-4)
    kl = math.expm1(min(logprob - old, 20.0)) - (logprob - old)
    assert stats["approx_kl"].item() == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("logprob", [-200.0, -200 / 17, -1e-7, 0.0])
@pytest.mark.parametrize("old_logprob", [-200.0, -200 / 17, -1e-7, 0.0])
@pytest.mark.parametrize("advantage", [3.0, 0.0, -3.0])
def test_ppo_is_finite_in_float32_for_1_and_17_dimensions(logprob, old_logprob, advantage):
    for count in (1, 17):
        logprobs = torch.full((1, count), logprob, requires_grad=True)
        old_logprobs, advantages = torch.full((1, count), old_logprob), torch.tensor([advantage])
        policy_loss, joint, stats = symmetric_ppo_loss(logprobs.sum(-1), old_logprobs.sum(-1), advantages, 0.2)
        factored = factored_ppo_reverse(logprobs, old_logprobs, advantages, 0.2)
        (grad,) = torch.autograd.grad(factored + joint + policy_loss, logprobs)
        assert all(torch.isfinite(value).all() for value in (factored, joint, policy_loss, grad, *stats.values()))
