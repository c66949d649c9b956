"""The continuous scripts: bins, Gaussian and categorical policies, normalisers, whole updates against Stable-Baselines3."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.distributions import Categorical, Independent, Normal

import dsa2c_continuous
import dsppo_continuous
from dsppo_continuous import (
    Agent,
    Args,
    RunningMeanStd,
    act,
    compute_gae,
    exploration_noise,
    flatten_parameters,
    make_bins,
    make_env,
    minibatch_loss,
    normalise_obs,
    normalise_rewards,
    numpy_actor,
    resolve_env,
    step_envs,
    to_env,
    update,
)

OBS, D, STEPS, ENVS = 5, 3, 16, 4
SPACE = gym.spaces.Box(np.array([-1, -2, 0.5], np.float32), np.array([1, 6, 0.75], np.float32))


class Point(gym.Env):
    """The spaces of a continuous task; never played."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float64)
    action_space = SPACE


def random_rollout(num_bins):
    """Agent, batch before the advantages, with log-probabilities from a policy near the agent's."""
    torch.manual_seed(3)
    agent, rng = Agent(OBS, D, num_bins), np.random.default_rng(0)
    torch.nn.init.orthogonal_(agent.actor[4].weight, 1.0)  # far from uniform, so that no term is small
    random = lambda *shape: torch.from_numpy(rng.standard_normal((STEPS, ENVS, *shape))).float()  # noqa: E731
    obs = random(OBS)
    actions = torch.from_numpy(rng.integers(0, num_bins, (STEPS, ENVS, D))) if num_bins else random(D)
    with torch.no_grad():
        logprobs, _, values = agent(obs.flatten(0, 1), actions.flatten(0, 1))
    logprobs = logprobs.view(STEPS, ENVS, D) + 0.05 * random(D)
    return agent, obs, actions, logprobs, values.view(STEPS, ENVS), random(), (random() > 1).float()


def sb3_with_weights_of(agent, algorithm, **settings):
    sb3 = algorithm(
        "MlpPolicy",
        DummyVecEnv([Point] * ENVS),
        n_steps=STEPS,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh},
        device="cpu",
        **settings,
    )
    sb3.set_logger(Logger(None, []))
    extractor, theirs = sb3.policy.mlp_extractor, sb3.policy
    pairs = [
        *((extractor.policy_net[i], agent.actor[i]) for i in (0, 2)),
        *((extractor.value_net[i], agent.critic[i]) for i in (0, 2)),
        (theirs.action_net, agent.actor[4]),
        (theirs.value_net, agent.critic[4]),
    ]
    for module, ours in pairs:
        module.load_state_dict(ours.state_dict())
    return sb3, pairs


def fill(sb3, obs, actions, logprobs, values, rewards, dones, next_values):
    starts = torch.cat([torch.ones(1, ENVS), dones[:-1]])  # SB3 stores "this step starts an episode"
    for t in range(STEPS):
        joint = logprobs[t].sum(-1)
        sb3.rollout_buffer.add(obs[t].numpy(), actions[t].numpy(), rewards[t].numpy(), starts[t].numpy(), values[t], joint)
    sb3.rollout_buffer.compute_returns_and_advantage(next_values, dones[-1].numpy())


def assert_same_weights(agent, sb3, pairs, before):
    assert (agent.actor[4].weight - before).abs().max() > 1e-3  # the update moved it
    torch.testing.assert_close(agent.log_std, sb3.policy.log_std, atol=1e-5, rtol=1e-5)
    for module, ours in pairs:
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, module.get_parameter(name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_adv", [True, False])
def test_gaussian_ppo_update_matches_stable_baselines3(monkeypatch, norm_adv):
    agent, obs, actions, logprobs, values, rewards, dones = random_rollout(0)
    args = Args(num_bins=0, alpha=1.0, beta=0.0, minibatch_size=16, ent_coef=0.01, norm_adv=norm_adv)
    sb3, pairs = sb3_with_weights_of(
        agent,
        PPO,
        learning_rate=args.learning_rate,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        normalize_advantage=norm_adv,
    )
    next_values, before = torch.full((ENVS,), 0.3), agent.actor[4].weight.clone()
    fill(sb3, obs, actions, logprobs, values, rewards, dones, next_values)
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, 0.95)

    torch.manual_seed(5)
    ours_order = [torch.randperm(STEPS * ENVS) for _ in range(args.update_epochs)]
    # ours counts samples step by step, SB3 environment by environment
    orders = iter([(order % ENVS * STEPS + order // ENVS).numpy() for order in ours_order])
    monkeypatch.setattr(np.random, "permutation", lambda count: next(orders))
    sb3.train()

    torch.manual_seed(5)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))
    update(agent, weights, optimizer, minibatch_loss, args, batch)
    assert_same_weights(agent, sb3, pairs, before)


@pytest.mark.parametrize("norm_adv", [True, False])
def test_gaussian_a2c_update_matches_stable_baselines3(norm_adv):
    """Two updates, so that the second meets RMSprop's memory."""
    agent, obs, actions, logprobs, values, rewards, dones = random_rollout(0)
    args = dsa2c_continuous.Args(num_bins=0, alpha=1.0, beta=0.0, ent_coef=0.01, norm_adv=norm_adv)
    sb3, pairs = sb3_with_weights_of(
        agent,
        A2C,
        learning_rate=args.learning_rate,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        rms_prop_eps=args.rmsprop_eps,
        normalize_advantage=norm_adv,
    )
    next_values, before = torch.full((ENVS,), 0.3), agent.actor[4].weight.clone()
    fill(sb3, obs, actions, logprobs, values, rewards, dones, next_values)
    advantages, returns = compute_gae(rewards, values, dones, next_values, 0.99, 1.0)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, advantages, returns))
    for _ in range(2):
        sb3.train()
        dsa2c_continuous.update(agent, weights, optimizer, dsa2c_continuous.rollout_loss, args, batch)
    assert_same_weights(agent, sb3, pairs, before)


def test_normalisers_match_vecnormalize_on_a_recorded_sequence():
    """300 steps of 3 environments with terminations and truncations: observations, rewards, last observations, statistics."""
    rng = np.random.default_rng(0)

    class Recorded(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float64)
        action_space = SPACE

        def __init__(self):
            self.rng = np.random.default_rng(rng.integers(1000))

        def observe(self):
            return 30 * self.rng.standard_normal(OBS) ** 3 + np.arange(OBS)

        def reset(self, seed=None, options=None):
            return self.observe(), {}

        def step(self, action):
            terminated, truncated = self.rng.random(2) < 0.05
            return self.observe(), 5 * self.rng.standard_normal() ** 3, bool(terminated), bool(truncated), {}

    rng = np.random.default_rng(7)
    theirs = VecNormalize(DummyVecEnv([Recorded] * 3), gamma=0.9)
    rng = np.random.default_rng(7)
    envs = [Recorded() for _ in range(3)]
    obs_stats, return_stats, discounted = RunningMeanStd((OBS,)), RunningMeanStd(), np.zeros(3)
    raw_obs = np.array([env.reset()[0] for env in envs])
    obs_stats.update(raw_obs)
    np.testing.assert_allclose(normalise_obs(raw_obs, obs_stats), theirs.reset(), rtol=1e-5)
    ended = 0
    for _ in range(300):
        their_obs, their_rewards, their_dones, infos = theirs.step(np.zeros((3, D)))
        raw_obs, raw_rewards, terminated, truncated, final_obs = step_envs(envs, np.zeros((3, D)))
        obs_stats.update(raw_obs)
        discounted = 0.9 * discounted + raw_rewards
        return_stats.update(discounted)
        np.testing.assert_allclose(normalise_obs(raw_obs, obs_stats), their_obs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(normalise_rewards(raw_rewards, return_stats), their_rewards, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(terminated | truncated, their_dones)
        assert sorted(final_obs) == np.flatnonzero(their_dones).tolist()
        for i, last_obs in final_obs.items():
            expected = infos[i]["terminal_observation"]
            np.testing.assert_allclose(normalise_obs(last_obs, obs_stats), expected, rtol=1e-5, atol=1e-6)
            discounted[i] = 0
            ended += 1
    assert ended > 30
    np.testing.assert_allclose(obs_stats.var, theirs.obs_rms.var, rtol=1e-9)
    np.testing.assert_allclose(return_stats.var, theirs.ret_rms.var, rtol=1e-7)  # its rewards are float32
    assert obs_stats.count == pytest.approx(theirs.obs_rms.count)
