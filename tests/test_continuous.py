"""The continuous scripts: bins, Gaussian and categorical policies, normalisers, whole updates against Stable-Baselines3."""

import tomllib
from pathlib import Path

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
    evaluate,
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

pytestmark = pytest.mark.quick

SETTINGS = Path(__file__).parents[1] / "benchmark/paper/hyperparameters.toml"
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


def test_dsppo_update_matches_its_control():
    """Fact 2 in float32 at D = 17: alpha 0.5, beta 20 and alpha 20.5, beta 0 end at the same weights, 1 / pi_old near 1e18."""
    ends = []
    for alpha, beta in ((0.5, 20.0), (20.5, 0.0), (1.0, 0.0)):
        torch.manual_seed(3)
        agent, generator = Agent(OBS, 17, 11), torch.Generator().manual_seed(4)
        obs, actions = torch.randn(128, OBS, generator=generator), torch.randint(11, (128, 17), generator=generator)
        with torch.no_grad():
            logprobs, _, values = agent(obs, actions)
        assert logprobs.sum(-1).mean() < -40
        logprobs += 0.03 * torch.randn(128, 17, generator=generator)
        batch = (obs, actions, logprobs, torch.randn(128, generator=generator), values + 1)
        weights = flatten_parameters(agent)
        optimizer = torch.optim.Adam([weights], lr=3e-4, eps=1e-5, fused=True)
        update(agent, weights, optimizer, minibatch_loss, Args(alpha=alpha, beta=beta, update_epochs=4), batch)
        ends.append(weights.detach().clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    assert (ends[0] - ends[2]).abs().max() > 3e-4  # and DPPO ends elsewhere


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


def test_running_statistics_are_those_of_all_rows():
    rows = np.random.default_rng(0).standard_normal((500, 4)) * [1, 10, 0.1, 0] + [0, 5, -3, 2]
    stats = RunningMeanStd((4,))
    for part in np.split(rows, [1, 4, 100]):
        stats.update(part)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4, atol=1e-5)


# --- bins and policies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [2, 5, 11])
def test_bins_are_linspace_of_each_dimension(num_bins):
    bins = make_bins(SPACE, num_bins)
    assert bins.dtype == np.float32 and bins.shape == (3, num_bins)
    for d in range(3):
        low, high = float(SPACE.low[d]), float(SPACE.high[d])
        np.testing.assert_allclose(bins[d], [low + (high - low) * k / (num_bins - 1) for k in range(num_bins)], atol=1e-6)
    chosen = np.random.default_rng(0).integers(0, num_bins, (50, 3))
    env_actions = to_env(chosen, SPACE, bins)
    assert all(SPACE.contains(action) for action in env_actions)
    for row in range(50):
        assert env_actions[row].tolist() == [bins[d, chosen[row, d]] for d in range(3)]


def test_gaussian_actions_are_cut_to_the_box():
    actions = np.array([[-3.0, 0.25, 9.0], [0.5, 7.0, 0.6]], dtype=np.float32)
    np.testing.assert_array_equal(to_env(actions, SPACE, None), np.array([[-1, 0.25, 0.75], [0.5, 6, 0.6]], np.float32))


@pytest.mark.parametrize("num_bins", [0, 11])
def test_logprobs_and_entropy_equal_torch_distributions(num_bins):
    agent, obs, actions, *_ = random_rollout(num_bins)
    obs, actions = obs.flatten(0, 1), actions.flatten(0, 1)
    if num_bins:
        distribution = Independent(Categorical(logits=agent.actor(obs).view(-1, D, num_bins)), 1)
    else:
        agent.log_std.data = torch.tensor([0.3, -1.0, 0.0])
        distribution = Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1)
    logprobs, entropies, values = agent(obs, actions)
    torch.testing.assert_close(logprobs.sum(-1), distribution.log_prob(actions))
    torch.testing.assert_close(entropies, distribution.entropy())
    torch.testing.assert_close(values, agent.critic(obs)[:, 0])


def test_bin_actions_are_distributed_as_the_policy_says():
    agent, obs, *_ = random_rollout(5)
    one, rng, count = obs[0, :1], np.random.default_rng(1), 20_000
    with torch.no_grad():
        pi = agent.actor(one).view(D, 5).softmax(-1).numpy()
    noise = exploration_noise(rng, (count, D), 5)
    assert noise.shape == (count, D, 5)
    drawn = act(numpy_actor(agent), one.numpy().repeat(count, 0), noise)
    for d in range(D):
        counts = np.bincount(drawn[:, d], minlength=5)
        assert ((counts - count * pi[d]) ** 2 / (count * pi[d])).sum() < 24  # chi square with 4 degrees, p = 1e-4
    np.testing.assert_array_equal(act(numpy_actor(agent), one.numpy())[0], pi.argmax(-1))  # greedy


def test_gaussian_actions_are_distributed_as_the_policy_says():
    agent, obs, *_ = random_rollout(0)
    agent.log_std.data = torch.tensor([0.3, -1.0, 0.0])
    one, count = obs[0, :1], 20_000
    mean, std = agent.actor(one)[0].detach().numpy(), agent.log_std.exp().detach().numpy()
    drawn = act(numpy_actor(agent), one.numpy(), exploration_noise(np.random.default_rng(1), (count, D), 0))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * std.max() / count**0.5)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.03)
    np.testing.assert_allclose(act(numpy_actor(agent), one.numpy())[0], mean, rtol=1e-4, atol=1e-6)  # greedy


def test_flat_parameters_are_the_layers_own():
    agent = Agent(OBS, D, 0)
    weights = flatten_parameters(agent)
    assert weights.numel() == sum(parameter.numel() for parameter in agent.parameters())
    agent.critic(torch.ones(1, OBS)).backward()
    assert weights.grad.norm() > 0 and agent.critic[0].weight.grad.norm() > 0
    torch.testing.assert_close(weights.grad.norm(), torch.cat([p.grad.flatten() for p in agent.parameters()]).norm())
    weights.data.zero_()
    assert all(not parameter.any() for parameter in agent.parameters())
    agent.load_state_dict(Agent(OBS, D, 0).state_dict())  # as a resumed run does
    assert weights.norm() > 0


def test_initialisation_is_orthogonal_with_the_usual_gains():
    agent = Agent(OBS, D, 11)
    for network, last_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert [type(layer).__name__ for layer in network] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
        for layer, gain in ((network[0], 2**0.5), (network[2], 2**0.5), (network[4], last_gain)):
            weight = layer.weight.detach()
            weight = weight if len(weight) <= weight.shape[1] else weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5)
            assert not layer.bias.any()
    assert network[0].out_features == network[2].out_features == 64


# --- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tomllib.loads(SETTINGS.read_text())["continuous"]["tasks"])
def test_the_papers_tasks_resolve_by_short_name_and_play(task):
    for module in (dsppo_continuous, dsa2c_continuous):
        assert module.resolve_env(task.split("-")[0]) == module.resolve_env(task) == task
    env = make_env(Args(env_id=task))
    assert env.spec.id == task == make_env(Args(env_id=task.split("-")[0])).spec.id
    env.reset(seed=0)
    env_actions = to_env(np.zeros((1, *env.action_space.shape), int), env.action_space, make_bins(env.action_space, 11))
    obs, rewards, *_ = step_envs([env], env_actions)
    assert obs.shape == (1, *env.observation_space.shape) and rewards.shape == (1,) and np.isfinite(obs).all()


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("Walker2", "Environment `Walker2` doesn't exist. Did you mean: `Walker2d`?"),
        ("nomodule:Hopper-v5", "No module named 'nomodule'"),
        ("xyzzy", "expected one of Ant, BipedalWalker, "),
    ],
)
def test_unknown_environments_are_one_line_with_close_matches(env_id, reason, capsys):
    for module in (dsppo_continuous, dsa2c_continuous):
        with pytest.raises(SystemExit) as stopped:
            module.check_args(module.Args(env_id=env_id))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and f"--env-id {env_id}: " in err and reason in err
    assert resolve_env("gymnasium.envs:Hopper-v5") == "Hopper-v5"


def test_mujoco_writes_no_log_into_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_env(Args(env_id="HalfCheetah-v4")).reset(seed=0)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_plays_greedily_with_the_frozen_normaliser_and_no_noise():
    """Returns of `evaluate` against an episode played by hand."""
    agent = Agent(8, 2, 11)
    obs_stats = RunningMeanStd((8,))
    obs_stats.update(np.random.default_rng(0).standard_normal((10, 8)))
    before = vars(obs_stats).copy()
    args = Args(env_id="LunarLanderContinuous", eval_episodes=2, seed=4, noise="gaussian")
    returns = evaluate((agent, obs_stats), args, "cpu")
    assert vars(obs_stats) == before
    for expected, seed in zip(returns, np.random.default_rng([4, 1]).integers(2**31, size=2), strict=True):
        env = gym.make("LunarLanderContinuous-v3")
        obs, _ = env.reset(seed=int(seed))
        total, done = 0.0, False
        while not done:
            scaled = np.clip((obs - obs_stats.mean) / np.sqrt(obs_stats.var + 1e-8), -10, 10)
            with torch.no_grad():
                chosen = agent.actor(torch.as_tensor(scaled, dtype=torch.float32)).view(2, 11).argmax(-1)
            action = np.array([np.linspace(-1, 1, 11)[chosen[d]] for d in range(2)], dtype=np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        assert total == pytest.approx(expected, rel=1e-4)
    assert evaluate((agent, obs_stats), args, "cpu", stop=[2]) == []
