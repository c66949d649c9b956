"""A whole PPO or A2C update and the advantages, against Stable-Baselines3 from the same weights and rollout."""

import copy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from helpers import needs_compiler
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv

import dsa2c_continuous
import dsppo_continuous
import sa2c_atari
import sppo_atari
from sppo_atari import compute_gae

pytestmark = pytest.mark.quick

STEPS, ENVS = 16, 4
BINS = [3, 5, 2]
# observations and actions; with unequal bins the scripts mask what a dimension lacks
SPACES = {
    "atari": (Box(0, 255, (4, 84, 84), np.uint8), Discrete(6)),
    "gaussian": (Box(-np.inf, np.inf, (5,), np.float64), Box(-1, 1, (3,), np.float32)),
    "bins": (Box(-np.inf, np.inf, (5,), np.float64), MultiDiscrete(BINS)),
}


def random_rollout(kind="atari"):
    """An agent and a rollout whose log-probabilities come from a policy near the agent's."""
    torch.manual_seed(3)
    rng, action_space = np.random.default_rng(0), SPACES[kind][1]
    if kind == "atari":
        agent, obs = sppo_atari.Agent(6), rng.integers(0, 256, (STEPS, ENVS, 4, 84, 84), dtype=np.uint8)
    else:
        agent = dsppo_continuous.Agent(5, BINS if kind == "bins" else [0] * 3)
        obs = rng.standard_normal((STEPS, ENVS, 5)).astype(np.float32)
    if kind == "gaussian":
        agent.log_std.data = torch.tensor([0.3, -1.0, 0.1])
    head = agent.actor if kind == "atari" else agent.actor[4]
    torch.nn.init.orthogonal_(head.weight, 1.0)  # far from uniform, so that no term is small
    action_space.seed(0)
    actions = np.array([[action_space.sample() for _ in range(ENVS)] for _ in range(STEPS)])
    obs, actions = torch.from_numpy(obs), torch.from_numpy(actions)
    with torch.no_grad():
        if kind == "atari":
            all_logprobs, values = agent(obs.flatten(0, 1))
            logprobs = all_logprobs.gather(-1, actions.flatten()[:, None]).squeeze(-1)
        else:
            logprobs, _, values = agent(obs.flatten(0, 1), actions.flatten(0, 1))
    logprobs = logprobs.unflatten(0, (STEPS, ENVS))
    logprobs += 0.1 * torch.from_numpy(rng.standard_normal(logprobs.shape)).float()
    rewards = torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], (STEPS, ENVS))).float()
    dones = torch.from_numpy(rng.random((STEPS, ENVS)) < 0.15).float()
    return agent, obs, actions, logprobs, values.view(STEPS, ENVS), rewards, dones


def fill(buffer, obs, actions, logprobs, values, rewards, dones):
    starts = torch.cat([torch.ones(1, ENVS), dones[:-1]])  # SB3 stores "this step starts an episode"
    for t in range(STEPS):
        joint = logprobs[t].flatten(1).sum(-1) if logprobs.ndim > 2 else logprobs[t]
        buffer.add(obs[t].numpy(), actions[t].numpy(), rewards[t].numpy(), starts[t].numpy(), values[t][:, None], joint)


def make_sb3(algorithm, kind, args):
    settings = {"ent_coef": args.ent_coef, "vf_coef": args.vf_coef, "max_grad_norm": args.max_grad_norm}
    network = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh} if kind != "atari" else {}
    if algorithm is PPO:
        settings |= {"batch_size": args.minibatch_size, "n_epochs": args.update_epochs, "clip_range": args.clip_coef}
    elif kind == "atari":
        network |= {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    else:
        settings["rms_prop_eps"] = args.rmsprop_eps

    class Spaces(gym.Env):  # never played
        observation_space, action_space = SPACES[kind]

    sb3 = algorithm(
        "CnnPolicy" if kind == "atari" else "MlpPolicy",
        DummyVecEnv([Spaces] * ENVS),
        n_steps=STEPS,
        learning_rate=args.learning_rate,
        normalize_advantage=args.norm_adv,
        policy_kwargs=network,
        device="cpu",
        **settings,
    )
    sb3.set_logger(Logger(None, []))
    return sb3


def weights_of(kind, agent, policy):
    """[(ours, SB3's)] of each layer and of log_std. Ours are copies where rows are left out that a dimension lacks."""
    if kind == "atari":
        layers = [(agent.network[i], policy.features_extractor.cnn[i]) for i in (0, 2, 4)]
        layers += [(agent.network[7], policy.features_extractor.linear[0])]
        layers += [(agent.actor, policy.action_net), (agent.critic, policy.value_net)]
    else:
        extractor = policy.mlp_extractor
        layers = [(agent.actor[i], extractor.policy_net[i]) for i in (0, 2)]
        layers += [(agent.critic[i], extractor.value_net[i]) for i in (0, 2)]
        layers += [(agent.actor[4], policy.action_net), (agent.critic[4], policy.value_net)]
    pairs = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in layers for name in ("weight", "bias")]
    if kind == "bins":
        live = (torch.arange(max(BINS)) < torch.tensor(BINS)[:, None]).flatten()
        pairs = [(ours[live] if len(ours) == len(live) else ours, theirs) for ours, theirs in pairs]
    return pairs + ([(agent.log_std, policy.log_std)] if kind == "gaussian" else [])


def updater(script, agent, args):
    """batch -> one update of the script, with an optimiser that it keeps. PPO's minibatches are those of seed 5."""
    if script is sa2c_atari:
        square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
        return lambda batch: script.update(agent, square_avgs, args.learning_rate, args, batch)
    generator = torch.random.default_generator.manual_seed(5)
    if script is sppo_atari:
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
        clip_coef = torch.tensor(args.clip_coef)
        return lambda batch: script.update(agent, optimizer, script.gradient_step, args, clip_coef, batch)
    weights = script.flatten_parameters(agent)
    if script is dsppo_continuous:
        optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=args.adam_eps, fused=True)
        return lambda batch: script.update(agent, weights, optimizer, script.gradient_step, args, batch, generator)
    optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    return lambda batch: script.update(agent, weights, optimizer, args, batch)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("kind", SPACES)
def test_updates_match_stable_baselines3(kind, algorithm, norm_adv, monkeypatch):
    """PPO: eight minibatches. A2C: three updates, so that two meet RMSprop's memory."""
    agent, obs, actions, logprobs, values, rewards, dones = random_rollout(kind)
    continuous = dsppo_continuous if algorithm is PPO else dsa2c_continuous
    script = continuous if kind != "atari" else sppo_atari if algorithm is PPO else sa2c_atari
    args = script.Args(alpha=1.0, beta=0.0, ent_coef=0.01, norm_adv=norm_adv)
    if algorithm is PPO:
        args.minibatch_size, args.update_epochs = 16, 2
    sb3 = make_sb3(algorithm, kind, args)
    if kind == "atari":  # in float32 rounding opens and closes a ReLU after a few steps
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what both turn their observations into
        agent.double(), sb3.policy.double()
    with torch.no_grad():
        for ours, theirs in weights_of(kind, agent, sb3.policy):
            theirs.copy_(ours)
    first = sb3.policy.action_net.weight.detach().clone()

    next_values = torch.full((ENVS,), 0.3)
    fill(sb3.rollout_buffer, obs, actions, logprobs, values, rewards, dones)
    sb3.rollout_buffer.compute_returns_and_advantage(next_values, dones[-1].numpy())
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, args.gae_lambda)

    if algorithm is PPO:
        torch.manual_seed(5)
        ours_order = [torch.randperm(STEPS * ENVS) for _ in range(args.update_epochs)]
        # ours counts samples step by step, SB3 environment by environment
        orders = iter([(order % ENVS * STEPS + order // ENVS).numpy() for order in ours_order])
        monkeypatch.setattr(np.random, "permutation", lambda count: next(orders))
    old_logprobs = (logprobs,) if algorithm is PPO else ()
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, *old_logprobs, advantages, returns))
    update = updater(script, agent, args)
    for _ in range(1 if algorithm is PPO else 3):
        sb3.train()
        update(batch)

    allowed = 1e-5 if algorithm is PPO or kind != "atari" else 5e-7
    assert (sb3.policy.action_net.weight - first).abs().max() > 20 * allowed
    for ours, theirs in weights_of(kind, agent, sb3.policy):
        torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)
    if kind == "bins":
        lacking = (torch.arange(max(BINS)) >= torch.tensor(BINS)[:, None]).flatten()
        assert (agent.actor[4].bias[lacking] == -1e8).all()  # still masked


def many_bins():
    """An agent with 17 dimensions, whose 1 / pi_old is near 1e18, and a batch before its advantages."""
    torch.manual_seed(3)
    agent, obs, actions = dsppo_continuous.Agent(5, [11] * 17), torch.randn(128, 5), torch.randint(11, (128, 17))
    with torch.no_grad():
        logprobs, _, values = agent(obs, actions)
    assert logprobs.sum(-1).mean() < -40
    return agent, (obs, actions, logprobs + 0.03 * torch.randn(128, 17), torch.randn(128), values + 1)


def frames():
    agent, obs, actions, logprobs, values, rewards, dones = random_rollout()
    advantages, returns = compute_gae(rewards, values, dones, torch.zeros(ENVS), 0.99, 0.95)
    return agent, tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))


both = pytest.mark.parametrize(("script", "make"), [(sppo_atari, frames), (dsppo_continuous, many_bins)], ids=["sppo", "dsppo"])


@both
def test_an_update_matches_its_control(script, make):
    """Fact 2 in float32: alpha 0.5, beta 10 and alpha 10.5, beta 0 end at the same weights, and PPO elsewhere."""
    ends = []
    for alpha, beta in ((0.5, 10.0), (10.5, 0.0), (1.0, 0.0)):
        agent, batch = make()
        updater(script, agent, script.Args(alpha=alpha, beta=beta, minibatch_size=16, update_epochs=1))(batch)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    assert (ends[0] - ends[2]).abs().max() > 3e-4


@both
def test_target_kl_ends_the_update_after_an_epoch(script, make, monkeypatch):
    """With log r = -s throughout old_approx_kl is s, and approx_kl is about s^2 / 2."""
    agent, (obs, actions, _, *rest) = make()
    with torch.no_grad():
        now = agent(obs, actions)[0] if script is dsppo_continuous else agent(obs)[0].gather(-1, actions[:, None])[:, 0]
    step, steps = torch.optim.Adam.step, []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *args: steps.append(step(*args)))
    for shift, target_kl, epochs in ((0.1, 0.05, 4), (-0.1, 1e-3, 1), (0.1, 1e-3, 1), (0.1, None, 4)):
        args = script.Args(minibatch_size=len(obs) // 2, target_kl=target_kl, learning_rate=1e-9, update_epochs=4)
        steps.clear()
        stats = updater(script, agent, args)((obs, actions, now + shift / now[0].numel(), *rest))
        assert len(steps) == 2 * epochs
        assert stats["losses/old_approx_kl"] == pytest.approx(shift, rel=1e-3)


def updated(script, agent, batch, compiled):
    """The weights after six steps at changing learning rates, and the last statistics."""
    torch._dynamo.reset()
    agent, device = copy.deepcopy(agent), batch[0].device
    agent.to(device)
    compile_or_not = partial(torch.compile, mode="reduce-overhead") if compiled else lambda function: function
    if script is sppo_atari:
        args = script.Args(beta=10.0, update_epochs=1, minibatch_size=STEPS * ENVS // 2)
        optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=not compiled)
        clip_coef, step_fn = torch.tensor(0.1, device=device), compile_or_not(script.gradient_step)
        torch.manual_seed(5)  # the same minibatches
        for rate in (2.5e-4, 0.5e-4, 1e-4):
            optimizer.param_groups[0]["lr"] = torch.tensor(rate, device=device) if compiled else rate
            stats = script.update(agent, optimizer, step_fn, args, clip_coef, batch)
    else:
        obs, actions, _, advantages, returns = batch
        args, square_avgs = script.Args(), [torch.ones_like(parameter) for parameter in agent.parameters()]
        for square_avg in square_avgs:
            torch._dynamo.mark_static_address(square_avg)
        update = compile_or_not(script.update)
        for step in range(6):
            rate = 0.1 * (1 - step / 6)
            rate = torch.tensor(rate, device=device) if compiled else rate
            stats = update(agent, square_avgs, rate, args, (obs, actions, advantages, returns))
    return {name: float(value) for name, value in stats.items()}, dict(agent.named_parameters())


@needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari], ids=["sppo", "sa2c"])
def test_a_compiled_update_equals_the_plain_one(script, device, monkeypatch):
    """On a GPU one of the six steps records a CUDA graph, and later ones replay it on other minibatches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    agent, batch = frames()
    batch = [tensor.to(device) for tensor in batch]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        (plain_stats, plain), (stats, compiled) = (updated(script, agent, batch, compiled) for compiled in (False, True))
    assert stats == pytest.approx(plain_stats, rel=1e-3, abs=1e-5)
    for name, first in agent.to(device).named_parameters():
        moved, apart = plain[name] - first, compiled[name] - plain[name]
        assert apart.norm() < 0.01 * moved.norm(), name
    if device == "cpu":  # act differs in nothing but the CUDA graphs
        return
    obs, compiled_act = batch[0], torch.compile(script.act, mode="reduce-overhead")
    with torch.no_grad():
        samples = [tuple(tensor.clone() for tensor in compiled_act(agent, obs)) for _ in range(4)]
        all_logprobs, values = agent(obs)
    for actions, logprobs, found in samples:
        torch.testing.assert_close(logprobs, all_logprobs.gather(-1, actions[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)
    assert len({tuple(actions.tolist()) for actions, *_ in samples}) == 4  # a replay draws anew
