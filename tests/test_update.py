"""A whole PPO or A2C update and the advantages, against Stable-Baselines3 from the same weights and rollout."""

import copy
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv

import sa2c_atari
from sppo_atari import Agent, Args, act, compute_gae, minibatch_loss, update

pytestmark = pytest.mark.quick

STEPS, ENVS, ACTIONS = 16, 4, 6


class Screens(gym.Env):
    """The spaces of an Atari game; never played."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(ACTIONS)


def random_rollout(agent):
    """A rollout of random frames whose log-probabilities come from a policy near the agent's."""
    rng = np.random.default_rng(0)
    obs = torch.from_numpy(rng.integers(0, 256, (STEPS, ENVS, 4, 84, 84), dtype=np.uint8))
    actions = torch.from_numpy(rng.integers(0, ACTIONS, (STEPS, ENVS)))
    with torch.no_grad():
        all_logprobs, values = agent(obs.flatten(0, 1))
    logprobs = all_logprobs.gather(-1, actions.flatten()[:, None]).view(STEPS, ENVS)
    logprobs += 0.1 * torch.from_numpy(rng.standard_normal((STEPS, ENVS))).float()
    values = values.view(STEPS, ENVS)
    rewards = torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], (STEPS, ENVS))).float()
    dones = torch.from_numpy(rng.random((STEPS, ENVS)) < 0.15).float()
    return obs, actions, logprobs, values, rewards, dones


def fill(buffer, obs, actions, logprobs, values, rewards, dones):
    starts = torch.cat([torch.ones(1, ENVS), dones[:-1]])  # SB3 stores "this step starts an episode"
    for t in range(STEPS):
        buffer.add(obs[t].numpy(), actions[t].numpy(), rewards[t].numpy(), starts[t].numpy(), values[t][:, None], logprobs[t])


@pytest.mark.parametrize("norm_adv", [True, False])
def test_update_matches_stable_baselines3(monkeypatch, norm_adv):
    torch.manual_seed(3)
    agent = Agent(ACTIONS)
    torch.nn.init.orthogonal_(agent.actor.weight, 1.0)  # far from uniform, so that no term is small
    obs, actions, logprobs, values, rewards, dones = random_rollout(agent)

    args = Args(alpha=1.0, beta=0.0, minibatch_size=16, update_epochs=4, norm_adv=norm_adv)
    sb3 = PPO(
        "CnnPolicy",
        DummyVecEnv([Screens] * ENVS),
        learning_rate=args.learning_rate,
        n_steps=STEPS,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        normalize_advantage=norm_adv,
        device="cpu",
    )
    sb3.set_logger(Logger(None, []))
    theirs = sb3.policy
    pairs = [
        *((theirs.features_extractor.cnn[i], agent.network[i]) for i in (0, 2, 4)),
        (theirs.features_extractor.linear[0], agent.network[7]),
        (theirs.action_net, agent.actor),
        (theirs.value_net, agent.critic),
    ]
    for module, ours in pairs:
        module.load_state_dict(ours.state_dict())
    before = agent.actor.weight.clone()

    next_values = torch.full((ENVS,), 0.3)
    fill(sb3.rollout_buffer, obs, actions, logprobs, values, rewards, dones)
    sb3.rollout_buffer.compute_returns_and_advantage(next_values, dones[-1].numpy())
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, 0.95)

    torch.manual_seed(5)
    ours_order = [torch.randperm(STEPS * ENVS) for _ in range(args.update_epochs)]
    # ours counts samples step by step, SB3 environment by environment
    orders = iter([(order % ENVS * STEPS + order // ENVS).numpy() for order in ours_order])
    monkeypatch.setattr(np.random, "permutation", lambda count: next(orders))
    sb3.train()

    torch.manual_seed(5)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))
    update(agent, optimizer, minibatch_loss, args, torch.tensor(args.clip_coef), batch)

    assert (agent.actor.weight - before).abs().max() > 1e-3  # 16 Adam steps moved it
    for module, ours in pairs:
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, module.get_parameter(name), atol=5e-5, rtol=1e-5)


def test_rmsprop_steps_worked_by_hand():
    """lr 0.1, alpha 0.9, eps 0.04: v = 0.9 + 0.1 * 4 = 1.3, then 0.9 * 1.3 + 0.1 * 1 = 1.27."""
    weight = torch.tensor([1.0, 5.0])
    square_avg = torch.ones(2)
    weight.grad = torch.tensor([2.0, 0.0])
    sa2c_atari.rmsprop_tf([weight], [square_avg], 0.1, 0.9, 0.04)
    assert square_avg.tolist() == pytest.approx([1.3, 0.9])
    first = 1 - 0.1 * 2 / (1.3 + 0.04) ** 0.5
    assert weight.tolist() == pytest.approx([first, 5.0])
    weight.grad = torch.tensor([-1.0, 0.5])
    sa2c_atari.rmsprop_tf([weight], [square_avg], 0.1, 0.9, 0.04)
    assert square_avg.tolist() == pytest.approx([1.27, 0.835])
    assert weight.tolist() == pytest.approx([first + 0.1 / 1.31**0.5, 5 - 0.05 / 0.875**0.5])


@pytest.mark.parametrize("norm_adv", [True, False])
def test_a2c_update_matches_stable_baselines3(norm_adv):
    """Three updates with RMSprop in TensorFlow's form."""
    torch.manual_seed(3)
    agent = Agent(ACTIONS)
    torch.nn.init.orthogonal_(agent.actor.weight, 1.0)
    obs, actions, logprobs, values, rewards, dones = random_rollout(agent)
    args = sa2c_atari.Args(alpha=1.0, beta=0.0, norm_adv=norm_adv)
    sb3 = A2C(
        "CnnPolicy",
        DummyVecEnv([Screens] * ENVS),
        learning_rate=args.learning_rate,
        n_steps=STEPS,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        normalize_advantage=norm_adv,
        policy_kwargs={"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}},
        device="cpu",
    )
    sb3.set_logger(Logger(None, []))
    theirs = sb3.policy
    pairs = [
        *((theirs.features_extractor.cnn[i], agent.network[i]) for i in (0, 2, 4)),
        (theirs.features_extractor.linear[0], agent.network[7]),
        (theirs.action_net, agent.actor),
        (theirs.value_net, agent.critic),
    ]
    for module, ours in pairs:
        module.load_state_dict(ours.state_dict())
    before = agent.actor.weight.clone()

    next_values = torch.full((ENVS,), 0.3)
    fill(sb3.rollout_buffer, obs, actions, logprobs, values, rewards, dones)
    sb3.rollout_buffer.compute_returns_and_advantage(next_values, dones[-1].numpy())
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, 1.0)
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, advantages, returns))
    square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
    for _ in range(3):
        sb3.train()
        sa2c_atari.update(agent, square_avgs, args.learning_rate, sa2c_atari.rollout_loss, args, batch)
    assert (agent.actor.weight - before).abs().max() > 1e-5
    for module, ours in pairs:
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, module.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_sppo_update_matches_its_control():
    """Fact 2 on the real network: alpha 0.5, beta 10 and alpha 10.5, beta 0 end at the same weights."""
    weights = []
    for alpha, beta in ((0.5, 10.0), (10.5, 0.0), (1.0, 0.0)):
        torch.manual_seed(3)
        agent = Agent(ACTIONS)
        obs, actions, logprobs, values, rewards, dones = random_rollout(agent)
        advantages, returns = compute_gae(rewards, values, dones, torch.zeros(ENVS), 0.99, 0.95)
        batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))
        args = Args(alpha=alpha, beta=beta, minibatch_size=16, update_epochs=1)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        update(agent, optimizer, minibatch_loss, args, torch.tensor(0.1), batch)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    assert (weights[0] - weights[2]).abs().max() > 3e-4  # and PPO ends elsewhere


def test_target_kl_ends_the_update_after_an_epoch():
    torch.manual_seed(3)
    agent = Agent(ACTIONS)
    obs, actions, logprobs, values, rewards, _ = random_rollout(agent)
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, rewards, values))
    for target_kl, epochs in ((1e-9, 1), (1e9, 4), (None, 4)):
        args = Args(minibatch_size=16, target_kl=target_kl)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, fused=True)
        update(agent, optimizer, minibatch_loss, args, torch.tensor(0.1), batch)
        assert optimizer.state[agent.actor.weight]["step"] == epochs * STEPS * ENVS // 16


def test_gae_closed_form():
    """One environment, no episode end: A_t = sum_l (gamma lambda)^l delta_{t+l}; ends cut the sum and the bootstrap."""
    rng = np.random.default_rng(1)
    rewards, values, last, gamma, lam = rng.standard_normal(6), rng.standard_normal(6), 0.7, 0.9, 0.8
    for end in (None, 2, 5):
        expected = np.zeros(6)
        for t in range(6):
            for k in range(t, 6):
                following = 0.0 if k == end else (values[k + 1] if k < 5 else last)
                expected[t] += (gamma * lam) ** (k - t) * (rewards[k] + gamma * following - values[k])
                if k == end:
                    break
        dones = torch.zeros(6, 1, dtype=torch.float64)
        if end is not None:
            dones[end] = 1
        column = lambda array: torch.from_numpy(array)[:, None]  # noqa: E731
        advantages, returns = compute_gae(
            column(rewards), column(values), dones, torch.tensor([last], dtype=torch.float64), gamma, lam
        )
        np.testing.assert_allclose(advantages[:, 0].numpy(), expected)
        np.testing.assert_allclose(returns[:, 0].numpy(), expected + values)


def test_gae_matches_sb3_buffer_with_terminations_and_truncations():
    _, actions, logprobs, values, rewards, dones = random_rollout(Agent(ACTIONS))
    rewards[3, 1] += 0.99 * 0.4  # a truncated step: gamma V(final observation) is part of its reward, in SB3 too
    dones[3, 1] = 1
    buffer = RolloutBuffer(
        STEPS, gym.spaces.Box(0, 255, (1,)), gym.spaces.Discrete(ACTIONS), "cpu", gae_lambda=0.95, gamma=0.99, n_envs=ENVS
    )
    fill(buffer, torch.zeros(STEPS, ENVS, 1), actions, logprobs, values, rewards, dones)
    next_values = torch.tensor([0.1, -0.2, 0.3, 0.4])
    buffer.compute_returns_and_advantage(next_values, dones[-1].numpy())
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, 0.95)
    np.testing.assert_allclose(advantages.numpy(), buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(returns.numpy(), buffer.returns, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_a_compiled_update_equals_the_plain_one(device, monkeypatch):
    """On a GPU one of its six steps records a CUDA graph, and later ones replay it on other minibatches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(3)
    agent = Agent(ACTIONS)
    obs, actions, logprobs, values, rewards, dones = random_rollout(agent)
    advantages, returns = compute_gae(rewards, values, dones, torch.ones(ENVS), 0.99, 0.95)
    batch = [tensor.flatten(0, 1).to(device) for tensor in (obs, actions, logprobs, advantages, returns)]
    args, clip_coef = Args(beta=10.0, update_epochs=3, minibatch_size=STEPS * ENVS // 2), torch.tensor(0.1, device=device)
    results = []
    for loss_fn in (minibatch_loss, torch.compile(minibatch_loss, mode="reduce-overhead")):
        learner = copy.deepcopy(agent).to(device)
        optimizer = torch.optim.Adam(learner.parameters(), lr=2.5e-4, eps=1e-5)
        torch.manual_seed(5)  # the same minibatches
        results.append((update(learner, optimizer, loss_fn, args, clip_coef, batch), dict(learner.named_parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-5)  # weights move by 1e-3

    compiled_act, obs = torch.compile(act, mode="reduce-overhead"), batch[0]
    with torch.no_grad():
        samples = [tuple(tensor.clone() for tensor in compiled_act(learner, obs)) for _ in range(4)]
        all_logprobs, values = learner(obs)
    for actions, logprobs, found in samples:
        torch.testing.assert_close(logprobs, all_logprobs.gather(-1, actions[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)
    assert len({tuple(actions.tolist()) for actions, *_ in samples}) == 4  # a replay draws anew


def test_statistics_of_an_a2c_update_outlive_the_next_one():
    """CUDA graphs write each update's statistics to the same tensors."""
    torch.manual_seed(3)
    agent = sa2c_atari.Agent(ACTIONS)
    obs, actions, _, values, rewards, _ = random_rollout(agent)
    batch = [tensor.flatten(0, 1) for tensor in (obs, actions, rewards, values)]
    output = torch.zeros(())

    def loss_fn(agent, args, *batch):
        return sa2c_atari.rollout_loss(agent, args, *batch)[0], {"losses/value_loss": output.add_(1.0)}

    square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
    history = [sa2c_atari.update(agent, square_avgs, 1e-4, loss_fn, sa2c_atari.Args(), batch) for _ in range(3)]
    assert [float(stats["losses/value_loss"]) for stats in history] == [1.0, 2.0, 3.0]
