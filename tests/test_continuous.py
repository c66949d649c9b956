"""The continuous scripts: bins, Gaussian and categorical policies, normalisers, environments, evaluation."""

import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import dsa2c_continuous
import dsppo_continuous
import sppo_atari
from dsppo_continuous import (
    Agent,
    Args,
    RunningMeanStd,
    act,
    evaluate,
    flatten_parameters,
    make_bins,
    make_env,
    numpy_actor,
    resolve_env,
    step_envs,
    to_env,
)

pytestmark = pytest.mark.quick

SETTINGS = Path(__file__).parents[1] / "benchmark/paper/hyperparameters.toml"
OBS, D = 5, 3
SPACE = gym.spaces.Box(np.array([-1, -2, 0.5], np.float32), np.array([1, 6, 0.75], np.float32))


def random_policy(bins):
    """An agent far from uniform, and observations."""
    torch.manual_seed(3)
    agent = Agent(OBS, bins)
    torch.nn.init.orthogonal_(agent.actor[4].weight, 1.0)
    return agent, torch.randn(64, OBS)


@pytest.mark.parametrize(
    ("space", "counts", "chosen", "expected"),
    [
        (gym.spaces.Discrete(4), [4], [3], 3),
        (gym.spaces.Discrete(3, start=-1), [3], [0], -1),
        (gym.spaces.MultiDiscrete([3, 5, 2]), [3, 5, 2], [2, 4, 0], [2, 4, 0]),
        (gym.spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 7], [0, 0]]), [2, 3, 4, 5], [1, 2, 3, 4], [[1, 9], [3, 4]]),
    ],
    ids=str,
)
def test_discrete_actions_are_bins_already(space, counts, chosen, expected):
    found, bins = make_bins(space, 11)  # --num-bins is not used
    (env_action,) = to_env(np.array([chosen]), space, bins)
    assert found == counts and env_action.tolist() == expected and space.contains(env_action)


def test_bins_that_a_dimension_lacks_are_never_drawn_and_count_for_nothing():
    agent, obs = random_policy([3, 5, 2])
    noise = np.random.default_rng(0).gumbel(size=(64, D, 5))
    drawn = act(numpy_actor(agent), obs.numpy(), noise)
    assert drawn.max(0).tolist() == [2, 4, 1]
    logits = agent.actor(obs).view(64, D, 5)
    alone = [Categorical(logits=logits[:, d, :count]) for d, count in enumerate((3, 5, 2))]
    logprobs, entropies, _ = agent(obs, torch.from_numpy(drawn))
    expected = [each.log_prob(torch.from_numpy(drawn[:, d])) for d, each in enumerate(alone)]
    torch.testing.assert_close(logprobs, torch.stack(expected, -1))
    torch.testing.assert_close(entropies, sum(each.entropy() for each in alone))


def test_actions_are_distributed_as_the_policy_says():
    count, rng = 20_000, np.random.default_rng(1)
    agent, obs = random_policy([5] * D)
    one = obs[:1].numpy()
    pi = agent.actor(obs[:1]).detach().view(D, 5).softmax(-1).numpy()
    drawn = act(numpy_actor(agent), one.repeat(count, 0), rng.gumbel(size=(count, D, 5)))
    for d in range(D):
        counts = np.bincount(drawn[:, d], minlength=5)
        assert ((counts - count * pi[d]) ** 2 / (count * pi[d])).sum() < 24  # chi square with 4 degrees, p = 1e-4
    np.testing.assert_array_equal(act(numpy_actor(agent), one)[0], pi.argmax(-1))  # greedy

    agent, _ = random_policy([0] * D)
    agent.log_std.data = torch.tensor([0.3, -1.0, 0.0])
    mean, std = agent.actor(obs[:1])[0].detach().numpy(), agent.log_std.exp().detach().numpy()
    drawn = act(numpy_actor(agent), one, rng.standard_normal((count, D)))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * std.max() / count**0.5)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.03)
    np.testing.assert_allclose(act(numpy_actor(agent), one)[0], mean, rtol=1e-4, atol=1e-6)  # greedy


def test_flat_parameters_are_the_layers_own():
    agent = Agent(OBS, [0] * D)
    weights = flatten_parameters(agent)
    assert weights.numel() == sum(parameter.numel() for parameter in agent.parameters())
    agent.critic(torch.ones(1, OBS)).backward()
    assert weights.grad.norm() > 0 and agent.critic[0].weight.grad.norm() > 0
    torch.testing.assert_close(weights.grad.norm(), torch.cat([p.grad.flatten() for p in agent.parameters()]).norm())
    weights.data.zero_()
    assert all(not parameter.any() for parameter in agent.parameters())
    agent.load_state_dict(Agent(OBS, [0] * D).state_dict())  # as a resumed run does
    assert weights.norm() > 0


def test_initialisation_is_orthogonal_with_the_usual_gains():
    agent, atari, hidden = Agent(OBS, [11] * D), sppo_atari.Agent(6), 2**0.5
    layers = [(network[i], hidden) for network in (agent.actor, agent.critic) for i in (0, 2)]
    layers += [(agent.actor[4], 0.01), (agent.critic[4], 1.0), (atari.actor, 0.01), (atari.critic, 1.0)]
    for layer, gain in [*layers, *((atari.network[i], hidden) for i in (0, 2, 4, 7))]:
        weight = layer.weight.detach().flatten(1)
        weight = weight if len(weight) <= weight.shape[1] else weight.T
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


@pytest.mark.parametrize("task", tomllib.loads(SETTINGS.read_text())["continuous"]["tasks"])
def test_the_papers_tasks_resolve_by_short_name_and_play(task):
    for module in (dsppo_continuous, dsa2c_continuous):
        assert module.resolve_env(task.split("-")[0]) == module.resolve_env(task) == (task, task)
    env = make_env(Args(env_id=task))
    assert env.spec.id == task
    env.reset(seed=0)
    counts, bins = make_bins(env.action_space, 11)
    obs, rewards, *_ = step_envs([env], to_env(np.zeros((1, len(counts)), int), env.action_space, bins))
    assert obs.shape == (1, *env.observation_space.shape) and rewards.shape == (1,) and np.isfinite(obs).all()


def test_other_environments_by_their_ids():
    assert resolve_env("gymnasium.envs:Hopper-v5") == ("Hopper-v5", "gymnasium.envs:Hopper-v5")
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `Walker2d`"):
        make_env(Args(env_id="Walker2"))


def test_evaluation_plays_greedily_with_the_frozen_normaliser_and_no_noise():
    """Returns of `evaluate` against an episode played by hand."""
    agent = Agent(8, [11] * 2)
    obs_stats = RunningMeanStd(np.zeros(8), np.ones(8))
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
    assert evaluate((agent, obs_stats), args, "cpu", stop=[2]) == []  # after a signal no environment is made, which may be slow
