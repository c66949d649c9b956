"""SPPO is PPO with four settings divided by w = alpha + beta |Z|: vf_coef, ent_coef, max_grad_norm and Adam's eps.

w L_ppo + v L_value - e H, norm clip c, eps   has the updates of   L_ppo + (v/w) L_value - (e/w) H, norm clip c/w, eps/w:
Adam and the norm clip do not see a common factor. In float64, through the scripts' own loss and update. The four settings in
other libraries: test_recipes.py.
"""

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import ROOT

import dsa2c_continuous
import dsppo_continuous
import sa2c_atari
import sppo_atari
import sppo_rlhf_imdb
import sppo_rlhf_tldr

pytestmark = pytest.mark.quick

ARGS = sppo_atari.Args(minibatch_size=16, update_epochs=4, clip_coef=0.1, max_grad_norm=0.5, ent_coef=0.01, vf_coef=0.5)


class Shared(nn.Module):
    """A policy head and a value head on one trunk, as NatureCNN's, small and in float64."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 16)
        self.actor, self.critic = nn.Linear(16, 4), nn.Linear(16, 1)
        self.double()

    def forward(self, obs):
        hidden = torch.tanh(self.trunk(obs.flatten(1)))
        return F.log_softmax(self.actor(hidden), dim=-1), self.critic(hidden).squeeze(-1)


class RMSpropTF(torch.optim.Optimizer):
    """sa2c_atari's RMSprop as an optimizer; `first` is where the square averages start."""

    def __init__(self, parameters, lr, eps, first=1.0):
        super().__init__(parameters, {"lr": lr, "eps": eps})
        self.square_avgs = [torch.full_like(p, first) for p in self.param_groups[0]["params"]]

    def step(self):
        group = self.param_groups[0]
        sa2c_atari.rmsprop_tf(group["params"], self.square_avgs, group["lr"], 0.99, group["eps"])


def rollout(seed):
    rng = torch.Generator().manual_seed(seed)
    obs = torch.randn(128, 6, generator=rng, dtype=torch.float64)
    advantages = 3 * torch.randn(128, generator=rng, dtype=torch.float64) + 0.5
    returns = 2 * torch.randn(128, generator=rng, dtype=torch.float64)
    return obs, torch.randint(4, (128,), generator=rng), advantages, returns


def exact_clip(parameters, max_norm, **_):
    """clip_grad_norm_ without its 1e-6 in the denominator, which is not divided by w."""
    grads = [parameter.grad for parameter in parameters]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    for grad in grads:
        grad.mul_(min(1.0, max_norm / norm.item()))
    return norm


def train(args, make_optimizer, update=sppo_atari.update):
    """128 gradient steps on four rollouts, each acted by the policy of its time. Returns the movement of all weights."""
    torch.manual_seed(0)
    agent = Shared()
    first = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])
    optimizer = make_optimizer(agent.parameters(), args)
    torch.manual_seed(1)
    for seed in range(4):
        obs, actions, advantages, returns = rollout(seed)
        with torch.no_grad():
            logprobs = agent(obs)[0].gather(-1, actions[:, None]).squeeze(-1)
        batch = (obs[..., None, None], actions, logprobs, advantages, returns)  # `update` takes frames
        clip_coef = torch.tensor(args.clip_coef, dtype=torch.float64)
        update(agent, optimizer, sppo_atari.gradient_step, args, clip_coef, batch)
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]) - first


def adam(parameters, args):
    return torch.optim.Adam(parameters, lr=1e-3, eps=args.adam_eps)


def divided(args, names="vf_coef ent_coef max_grad_norm adam_eps"):
    """PPO with these settings divided by SPPO's w."""
    w = args.alpha + args.beta * -args.Z
    return replace(args, alpha=1.0, beta=0.0, **{name: getattr(args, name) / w for name in names.split()})


def difference(movement, other):
    return ((movement - other).norm() / other.norm()).item()


WEIGHTS = [(0.5, 1.0, -1.0), (0.5, 10.0, -1.0), (0.5, 20.0, -1.0), (0.5, 10.0, -2.5), (0.2, 0.3, -0.1)]


@pytest.mark.parametrize(("alpha", "beta", "Z"), WEIGHTS)
def test_sppo_is_ppo_with_four_settings_divided(alpha, beta, Z, monkeypatch):
    sppo = replace(ARGS, alpha=alpha, beta=beta, Z=Z)
    movement = train(sppo, adam)
    assert movement.abs().max() > 1e-2
    torch.testing.assert_close(train(divided(sppo), adam), movement, rtol=0, atol=2e-8)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    torch.testing.assert_close(train(divided(sppo), adam), train(sppo, adam), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("left_out", "share"), [("vf_coef", 0.493), ("max_grad_norm", 0.042), ("ent_coef", 0.015), ("adam_eps", 0.0048)]
)
def test_each_of_the_four_settings_is_needed(left_out, share, monkeypatch):
    """`share`: how far the weights end from SPPO's, as a share of their movement; the README has these numbers."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    sppo = replace(ARGS, alpha=0.5, beta=10.0)
    movement = train(sppo, adam)
    three = " ".join(name for name in ("vf_coef", "ent_coef", "max_grad_norm", "adam_eps") if name != left_out)
    assert difference(train(divided(sppo), adam), movement) < 1e-12
    assert difference(train(divided(sppo, three), adam), movement) == pytest.approx(share, rel=0.1)
    assert difference(train(replace(sppo, alpha=1.0, beta=0.0), adam), movement) == pytest.approx(0.493, rel=0.1)


def test_adamw_and_both_forms_of_rmsprop(monkeypatch):
    """AdamW's decoupled decay stays; torch's RMSprop wants eps / w, TensorFlow's eps / w^2 and first squares of 1 / w^2."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    sppo = replace(ARGS, alpha=0.5, beta=10.0)
    ppo, w = divided(sppo), 10.5

    def adamw(parameters, args):
        return torch.optim.AdamW(parameters, lr=1e-3, eps=args.adam_eps, weight_decay=0.1)

    def rmsprop(parameters, args):
        return torch.optim.RMSprop(parameters, lr=1e-3, eps=args.adam_eps)

    for optimizer in (adamw, rmsprop):
        assert difference(train(ppo, optimizer), train(sppo, optimizer)) < 1e-12
    theirs = train(sppo, lambda parameters, _: RMSpropTF(parameters, 1e-3, 1e-5))
    ours = train(ppo, lambda parameters, _: RMSpropTF(parameters, 1e-3, 1e-5 / w**2, 1 / w**2))
    assert difference(ours, theirs) < 1e-12
    for eps, first in ((1e-5 / w, 1 / w**2), (1e-5 / w**2, 1.0)):
        wrong = train(ppo, lambda parameters, _, eps=eps, first=first: RMSpropTF(parameters, 1e-3, eps, first))
        assert difference(wrong, theirs) > 1e-5


def test_printed_signs_are_not_covered(monkeypatch):
    """With Eq. 8 as printed a sample's weight is alpha + beta |Z| where A > 0 and alpha - beta |Z| where A < 0: no one w."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    sppo = replace(ARGS, alpha=0.5, beta=10.0)
    assert difference(train(divided(sppo), adam), train(sppo, adam)) < 1e-12
    assert difference(train(divided(sppo), adam), train(replace(sppo, literal_signs=True), adam)) > 0.5


def test_the_l2_weight_decay_of_adam_is_divided_too(monkeypatch):
    """Adam adds decay times weight to the gradient; AdamW, which does not, is in the test above."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    sppo = replace(ARGS, alpha=0.5, beta=10.0)

    def decayed(weight_decay):
        return lambda parameters, args: torch.optim.Adam(parameters, lr=1e-3, eps=args.adam_eps, weight_decay=weight_decay)

    movement = train(sppo, decayed(0.1))
    assert difference(train(divided(sppo), decayed(0.1 / 10.5)), movement) < 1e-12
    assert difference(train(divided(sppo), decayed(0.1)), movement) > 0.1


def test_an_adam_state_carried_over_is_divided_by_w_and_its_square(monkeypatch):
    """SPPO until the second rollout, PPO with the four settings from there on, with Adam's state of SPPO."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    sppo, w = replace(ARGS, alpha=0.5, beta=10.0), 10.5

    def switched(divide_first, divide_second):
        rollouts = iter([sppo, divided(sppo), divided(sppo), divided(sppo)])

        def update(agent, optimizer, step_fn, _, clip_coef, batch):
            args = next(rollouts)
            if args.beta == 0 and optimizer.param_groups[0]["eps"] == sppo.adam_eps:
                optimizer.param_groups[0]["eps"] = args.adam_eps
                for state in optimizer.state.values():
                    state["exp_avg"] /= divide_first
                    state["exp_avg_sq"] /= divide_second
            return sppo_atari.update(agent, optimizer, step_fn, args, clip_coef, batch)

        return train(sppo, adam, update)

    movement = train(sppo, adam)
    assert difference(switched(w, w**2), movement) < 1e-12
    assert min(difference(switched(*wrong), movement) for wrong in ((1, 1), (w, 1), (1, w**2))) > 0.05


def test_the_readmes_table_is_the_defaults_divided_by_w():
    rows = re.findall(r"(?m)^\| ([^|:]+): (0\.5), ([^|]+?) (?:\(\*\) )?\|(.*)\|$", (ROOT / "README.md").read_text())
    scripts = {
        "Atari": sppo_atari, "Atari, noisy rewards": sppo_atari, "continuous": dsppo_continuous,
        "movie reviews": sppo_rlhf_imdb, "TL;DR": sppo_rlhf_tldr,
    }  # fmt: skip
    assert list(dict.fromkeys(cell for cell, *_ in rows)) == list(scripts)
    assert [beta for cell, _, beta, _ in rows if cell == "continuous"] == ["20", "25", "50"]
    for cell, alpha, beta, columns in rows:
        found = [float(number) for number in columns.split("|")]
        args, w = scripts[cell].Args(), float(alpha) + float(beta)
        assert found[0] == w
        defaults = (args.vf_coef, args.ent_coef, args.max_grad_norm, getattr(args, "adam_eps", 1e-5))
        assert found[1:] == pytest.approx([default / w for default in defaults], rel=0.005), cell


def grads_by_hand(agent, logprobs, entropy, values, advantages, returns, args, ratio):
    """The gradients of the three parts of a loss before any update, where every ratio is 1 and no sample is cut."""
    used = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages
    weights = args.alpha + args.beta * (1.0 if ratio else logprobs.detach().exp())  # facts 2 and 3
    policy = -(weights * used * logprobs).mean()
    parts = (policy, args.vf_coef * ((values - returns) ** 2).mean(), -args.ent_coef * entropy)
    parameters = list(agent.parameters())
    for part in parts:
        grads = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        yield torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, parameters, strict=True)]
        )


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, dsppo_continuous, dsa2c_continuous], ids=lambda m: m.__name__)
def test_shares_of_the_gradient_by_hand(script):
    """Each part's own gradient by autograd; |g|^2 = sum <g_i, g>. Logging them leaves the training as it is."""
    torch.manual_seed(0)
    obs, actions, advantages, returns = rollout(0)
    ratio, atari = "ppo" in script.__name__, "atari" in script.__name__
    args = script.Args(alpha=0.5, beta=3.0, ent_coef=0.3, **({"minibatch_size": 128} if ratio else {}))
    if atari:
        agent = Shared()
        all_logprobs, values = agent(obs)
        logprobs = old = all_logprobs.gather(-1, actions[:, None]).squeeze(-1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    else:
        agent, actions = script.Agent(6, [4, 4]).double(), torch.stack([actions, actions.flip(0)], dim=-1)
        nn.init.normal_(agent.actor[4].weight)  # away from equal probabilities, where the entropy has no gradient
        old, entropies, values = agent(obs, actions)
        logprobs, entropy = old.sum(-1), entropies.mean()
    grads = list(grads_by_hand(agent, logprobs, entropy, values, advantages, returns, args, ratio))
    total = sum(grads)
    expected = [((grad @ total) / (total @ total)).item() for grad in grads]
    assert sum(expected) == pytest.approx(1) and all(abs(share) > 1e-3 for share in expected)

    state = torch.get_rng_state()
    clip_coef = (torch.tensor(0.1, dtype=torch.float64),) if script is sppo_atari else ()
    batch = (obs, actions, old.detach(), advantages, returns) if ratio else (obs, actions, advantages, returns)
    loss_fn = script.minibatch_loss if ratio else script.rollout_loss
    shares = script.grad_shares(agent, args, loss_fn, (*clip_coef, *batch))
    names = [f"losses/grad_share_{name}" for name in ("policy", "value", "entropy")]
    assert list(shares) == names and list(shares.values()) == pytest.approx(expected, rel=1e-6)
    assert (torch.get_rng_state() == state).all() and all(parameter.grad is None for parameter in agent.parameters())


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, dsppo_continuous, dsa2c_continuous], ids=lambda m: m.__name__)
def test_norm_and_share_of_the_clip(script):
    """The norm before the clip, worked out on a copy, and whether it is above the limit."""
    obs, actions, advantages, returns = rollout(0)
    ratio, atari = "ppo" in script.__name__, "atari" in script.__name__
    obs = obs[..., None, None] if atari else obs
    torch.manual_seed(0)
    first = Shared() if atari else script.Agent(6, [4]).double()
    actions = actions if atari else actions[:, None]
    old = torch.full(actions.shape, -1.4, dtype=torch.float64)
    batch = (obs, actions, old, advantages, returns) if ratio else (obs, actions, advantages, returns)
    loss_fn = script.minibatch_loss if ratio else script.rollout_loss
    clip_coef = (torch.tensor(0.1, dtype=torch.float64),) if script is sppo_atari else ()
    args = script.Args(**({"minibatch_size": 128, "update_epochs": 1} if ratio else {}))
    grads = torch.autograd.grad(loss_fn(first, args, *clip_coef, *batch)[0], list(first.parameters()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    for limit, clipped in ((0.99 * norm, 1.0), (1.01 * norm, 0.0)):
        agent, args = copy.deepcopy(first), replace(args, max_grad_norm=limit)
        weights = [] if atari else [script.flatten_parameters(agent)]
        if script is sa2c_atari:
            optimizer = [[torch.ones_like(p) for p in agent.parameters()], 1e-3]
        else:
            optimizer = [torch.optim.SGD(weights or agent.parameters(), lr=0.0)]
        generator = (torch.Generator(),) if script is dsppo_continuous else ()
        step_fn = (script.gradient_step,) if ratio else ()
        stats = script.update(agent, *weights, *optimizer, *step_fn, args, *clip_coef, batch, *generator)
        assert float(stats["losses/grad_norm"]) == pytest.approx(norm) and float(stats["losses/grad_clipped"]) == clipped


def dsppo_weights(alpha, beta, max_grad_norm, eps):
    torch.manual_seed(0)
    agent = dsppo_continuous.Agent(6, [5, 5]).double()
    weights = dsppo_continuous.flatten_parameters(agent)
    args = dsppo_continuous.Args(alpha=alpha, beta=beta, minibatch_size=16, update_epochs=4, max_grad_norm=max_grad_norm)
    optimizer = torch.optim.Adam([weights], lr=1e-3, eps=eps)
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        obs, _, advantages, returns = rollout(seed)
        actions = torch.randint(5, (128, 2), generator=generator)
        with torch.no_grad():
            logprobs = agent(obs, actions)[0]
        batch = (obs, actions, logprobs, advantages, returns)
        dsppo_continuous.update(agent, weights, optimizer, dsppo_continuous.gradient_step, args, batch, generator)
    return weights.detach().clone()


def test_with_separate_networks_only_the_clip_and_eps_can_tell_dsppo_from_dppo():
    dppo = dsppo_weights(1.0, 0.0, 1e12, 1e-30)
    for beta in (0.2, 20.0, 50.0):
        torch.testing.assert_close(dsppo_weights(0.5, beta, 1e12, 1e-30), dppo, rtol=0, atol=1e-9)
    assert (dsppo_weights(0.5, 20.0, 0.5, 1e-30) - dppo).abs().max() > 1e-4
    assert (dsppo_weights(0.5, 20.0, 1e12, 1e-2) - dsppo_weights(1.0, 0.0, 1e12, 1e-2)).abs().max() > 1e-4


def test_raw_advantages_let_the_reward_level_into_the_gradient():
    """The released Atari baseline is PPO with --no-norm-adv: a shift of all advantages changes its gradient, not SPPO's."""
    torch.manual_seed(0)
    agent = Shared()
    obs, actions, advantages, returns = rollout(0)
    with torch.no_grad():
        old = agent(obs)[0].gather(-1, actions[:, None]).squeeze(-1)

    def gradient(norm_adv, shift):
        args = replace(ARGS, alpha=1.0, beta=0.0, norm_adv=norm_adv)
        loss, _ = sppo_atari.minibatch_loss(agent, args, torch.tensor(0.1), obs, actions, old, advantages + shift, returns)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(agent.parameters()))])

    torch.testing.assert_close(gradient(True, 2.0), gradient(True, 0.0), rtol=0, atol=1e-12)
    logprobs = agent(obs)[0].gather(-1, actions[:, None]).squeeze(-1)
    shifted = torch.cat(
        [grad.flatten() for grad in torch.autograd.grad(-2.0 * logprobs.mean(), list(agent.trunk.parameters()))]
    )
    found = (gradient(False, 2.0) - gradient(False, 0.0))[: len(shifted)]
    torch.testing.assert_close(found, shifted, rtol=0, atol=1e-10)
    assert found.norm() > 1e-2
