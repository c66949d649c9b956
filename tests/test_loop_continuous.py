"""The rollout loops of the continuous scripts' main(), on scripted environments: what reaches the learner and the log."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import only, scalars, unchanged_process

import dsa2c_continuous
import dsppo_continuous

pytestmark = pytest.mark.quick

STEPS, GAMMA = 6, 0.9
RAW = np.array([[3, -2], [0, 5], [1, 0], [0, 4], [-7, 1], [2, 0]], dtype=float)  # rewards of steps 0 to 5, two environments
# (step, environment); nothing on step 5; at step 3 environment 0 is at the limit, and over all the same
TERMINATED, TRUNCATED = {(1, 0), (3, 0), (3, 1)}, {(2, 1), (3, 0)}


class Scripted(gym.Env):
    """Observation number n of environment i, counted over all episodes, is (n, 10 i); the last one of an episode (99, 10 i)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))

    def __init__(self, number, log):
        self.number, self.log, self.seen, self.t = number, log, 0, 0

    def observe(self):
        self.seen += 1
        return np.array([self.seen - 1, 10 * self.number], dtype=float)

    def reset(self, seed=None, options=None):
        self.log.append(("reset", self.number, self.t, seed))
        return self.observe(), {}

    def step(self, action):
        self.log.append(("step", self.number, self.t, action.copy()))
        key = (self.t % STEPS, self.number)
        self.t += 1
        ends = key in TERMINATED | TRUNCATED
        obs = np.array([99.0, 10 * self.number]) if ends else self.observe()
        return obs, RAW[key[0], self.number], key in TERMINATED, key in TRUNCATED, {}


def history():
    """By hand, over two iterations: normalised observations, next and last ones, normalised rewards, dones."""
    rows, returns, discounted = [], [], np.zeros(2)
    counts = np.zeros(2)
    obs, final, rewards, dones = [], {}, [], []

    def statistics(values):  # of all values so far, with SB3's 1e-4 of a first guess (mean 0, variance 1)
        values = np.array(values)
        total = len(values) + 1e-4
        mean = values.sum(0) / total
        var = (1e-4 * (1 + mean**2) + ((values - mean) ** 2).sum(0)) / total
        return mean, np.sqrt(var + 1e-8)

    def normalised(raw):
        mean, std = statistics(rows)
        return ((raw - mean) / std).clip(-10, 10)

    raw = np.array([[counts[i], 10 * i] for i in range(2)])
    rows.extend(raw)
    for t in range(2 * STEPS):
        obs.append(normalised(raw))
        counts += 1  # one new observation a step: of the same episode, or of the next one
        raw = np.array([[counts[i], 10 * i] for i in range(2)])
        rows.extend(raw)
        discounted = GAMMA * discounted + RAW[t % STEPS]
        returns.extend(discounted)
        rewards.append((RAW[t % STEPS] / statistics(returns)[1]).clip(-10, 10))
        ends = [(t % STEPS, i) in TERMINATED | TRUNCATED for i in range(2)]
        for i in range(2):
            if (t % STEPS, i) in TRUNCATED:
                final[t] = normalised(np.array([99.0, 10 * i]))
        dones.append(ends)
        discounted[ends] = 0
    obs.append(normalised(raw))
    return np.array(obs), final, np.array(rewards), np.array(dones, dtype=float)


@pytest.fixture(params=[dsppo_continuous, dsa2c_continuous], ids=["dsppo", "dsa2c"])
def loop(request, monkeypatch, tmp_path):
    """Runs main() for two iterations; returns what it gave to compute_gae and update, the environments' log, the scalars."""
    script, log, seen = request.param, [], {"gae": [], "update": []}
    plain_gae, numbers = script.compute_gae, itertools.cycle(range(2))

    def compute_gae(*args):
        seen["gae"].append([arg.clone() if torch.is_tensor(arg) else arg for arg in args])
        return plain_gae(*args)

    def update(agent, weights, optimizer, *step_fn_and_args):
        (batch,) = (each for each in step_fn_and_args if isinstance(each, list))
        seen["agent"] = agent
        seen["update"].append((optimizer, [tensor.clone() for tensor in batch]))
        stats = {"losses/policy_loss": torch.tensor(0.5)}
        return stats if script is dsa2c_continuous else {name: value.item() for name, value in stats.items()}

    monkeypatch.setattr(script, "make_env", lambda *_, **__: script.PlainEnv(Scripted(next(numbers), log)))
    monkeypatch.setattr(script, "check", lambda args: None)  # it plays a step
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    monkeypatch.setattr(script, "update", update)

    def run(own=None, total_timesteps=4 * STEPS, resume=None, **changed):
        settings = {"num_envs": 2, "num_steps": STEPS, "total_timesteps": total_timesteps, "eval_episodes": 0, "gamma": GAMMA}
        settings |= {"gae_lambda": 0.8} | ({"log_interval": 1} if script is dsa2c_continuous else {})
        args = script.Args(run_dir=str(tmp_path), **(settings | changed | (own or {}).get(script.__name__, {})))
        if resume:
            args = script.parse_args(["--resume", str(resume), "--total-timesteps", str(total_timesteps)])
        with unchanged_process():
            script.main(args)
        return script, seen, log, scalars(only(tmp_path))

    run.folder, run.script = tmp_path, script
    return run


@pytest.mark.parametrize("noise", ["none", "gaussian"])
@pytest.mark.parametrize("num_bins", [0, 5])
def test_what_the_advantages_and_the_update_see(loop, noise, num_bins):
    script, seen, log, scalars = loop(noise=noise, noise_std=0.5, num_bins=num_bins, beta=0.0)
    obs, final, rewards, dones = history()
    noises = []
    rng = np.random.default_rng([1, 2, 0])  # purpose 2 is noise, from step 0
    for iteration in range(2):
        part = slice(iteration * STEPS, (iteration + 1) * STEPS)
        critic = lambda raw: seen["agent"].critic(torch.as_tensor(raw, dtype=torch.float32))[..., 0].detach().numpy()  # noqa: E731
        expected = rewards[part].copy()
        if noise == "gaussian":
            noises.append(0.5 * rng.standard_normal((STEPS, 2)))
            expected += noises[-1]
        expected[2, 1] += GAMMA * critic(final[iteration * STEPS + 2])  # after the noise; a terminated one gets nothing
        got_rewards, values, got_dones, next_values, gamma, gae_lambda = seen["gae"][iteration]
        np.testing.assert_allclose(got_rewards.numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got_dones.numpy(), dones[part])
        np.testing.assert_allclose(values.numpy(), critic(obs[part]), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(next_values.numpy(), critic(obs[part.stop]), rtol=1e-3, atol=1e-5)
        assert (gamma, gae_lambda) == (GAMMA, 0.8)

        _, batch = seen["update"][iteration]
        np.testing.assert_allclose(batch[0].numpy(), obs[part].reshape(-1, 2), rtol=1e-4, atol=1e-5)
        played = [entry[3] for t in range(part.start, part.stop) for entry in log if entry[0] == "step" and entry[2] == t]
        chosen = batch[1].numpy()
        low, high = Scripted.action_space.low, Scripted.action_space.high
        expected = low + (high - low) * chosen / (num_bins - 1) if num_bins else chosen.clip(low, high)
        np.testing.assert_allclose(np.array(played), expected, rtol=1e-6)
        assert len(np.unique(chosen)) > 2
        if script is dsppo_continuous:  # log-probabilities of the policy that acted
            with torch.no_grad():
                torch.testing.assert_close(batch[2], seen["agent"](batch[0], batch[1])[0])
        torch.testing.assert_close(batch[-1] - batch[-2], values.flatten())
        explained = 1 - np.var((batch[-1] - values.flatten()).numpy()) / np.var(batch[-1].numpy())
        assert scalars["losses/explained_variance"][iteration][1] == pytest.approx(explained, rel=1e-3)
    if noise == "gaussian":
        measured = [value for _, value in scalars["charts/noise_std"]]
        assert measured == pytest.approx([each.std() for each in noises])
    else:
        assert "charts/noise_std" not in scalars


def test_logged_returns_are_raw_whole_episodes_and_seeds_are_given_once(loop):
    _, _, log, scalars = loop(noise="gaussian", noise_std=9.0)
    # iteration 1: environment 0 ends with 3 + 0, cut is environment 1 with -2 + 5 + 0; both end: 1 + 0 and 4;
    # iteration 2 goes on from -7 + 2 and 1 + 0
    first, second = [3, 3, 1, 4], [-5 + 3, 1 + 3, 1, 4]
    lengths = [[2, 3, 2, 1], [2 + 2, 2 + 3, 2, 1]]
    assert scalars["charts/episodic_return"] == [(12, pytest.approx(np.mean(first))), (24, pytest.approx(np.mean(second)))]
    windows = [np.mean(first), np.mean(first + second)]
    assert [value for _, value in scalars["charts/episodic_return_100"]] == pytest.approx(windows)
    assert [value for _, value in scalars["charts/episodic_length"]] == pytest.approx(np.mean(lengths, axis=1))
    seeds = [entry[3] for entry in log if entry[0] == "reset" and entry[2] == 0]
    assert len(set(seeds)) == 2 and None not in seeds
    assert all(entry[3] is None for entry in log if entry[0] == "reset" and entry[2] > 0)


def test_a_resumed_run_draws_environments_noise_and_actions_from_its_step(loop):
    loop(total_timesteps=2 * STEPS, noise="gaussian", noise_std=1e3, num_bins=0, beta=0.0)
    script, seen, log, _ = loop(resume=only(loop.folder))
    resets = [entry[3] for entry in log if entry[0] == "reset" and entry[2] == 0]
    assert resets == [int(s) for step in (0, 12) for s in np.random.default_rng([1, 3, step]).integers(2**31, size=2)]
    for iteration, step in enumerate((0, 12)):
        noise = 1e3 * np.random.default_rng([1, 2, step]).standard_normal((STEPS, 2))
        np.testing.assert_allclose(seen["gae"][iteration][0].numpy(), noise, atol=20)  # rewards are within +-10
        _, (obs, actions, *_) = seen["update"][iteration]
        drawn = np.random.default_rng([1, 4, step]).standard_normal((STEPS, 2, 2))
        with torch.no_grad():  # the agent has not learned: `update` is a stand-in
            np.testing.assert_allclose((actions - seen["agent"].actor(obs)).numpy(), drawn.reshape(-1, 2), atol=1e-4)
    assert len({script.EVALUATION, script.NOISE, script.ENVS, script.ACTIONS}) == 4


def test_normalised_rewards_are_cut_at_ten_and_noise_comes_in_blocks_of_one_stream(loop, monkeypatch):
    """One reward among 200 returns of 0 is sqrt(201) standard deviations."""
    raw = np.zeros((STEPS * 40, 2))
    raw[100] = [1e3, -1e3]
    monkeypatch.setitem(globals(), "RAW", raw)
    monkeypatch.setitem(globals(), "STEPS", len(raw))
    settings = {"total_timesteps": 2 * len(raw), "num_bins": 0, "beta": 0.0}
    _, seen, _, _ = loop({"dsppo_continuous": {"minibatch_size": 240}}, **settings)
    assert seen["gae"][0][0][100].tolist() == [10.0, -10.0]
    _, (obs, actions, *_) = seen["update"][0]
    drawn = np.random.default_rng([1, 4, 0]).standard_normal((len(raw), 2, 2)).reshape(-1, 2)
    np.testing.assert_allclose((actions - seen["agent"].actor(obs)).detach().numpy(), drawn, atol=1e-4)


def test_explained_variance_is_left_out_where_returns_are_constant(loop, monkeypatch):
    """With gamma 0 they are the rewards but for rounding: (r - V) + V."""
    monkeypatch.setitem(globals(), "RAW", np.ones((STEPS, 2)))
    monkeypatch.setattr(loop.script.RunningMeanStd, "update", lambda self, rows: None)
    _, seen, _, logged = loop(gamma=0.0)
    assert 0 < seen["update"][0][1][-1].var() < 1e-11
    assert "losses/policy_loss" in logged and "losses/explained_variance" not in logged


def test_optimiser_and_learning_rate(loop):
    script, seen, _, scalars = loop(
        {"dsppo_continuous": {"adam_eps": 1e-6}, "dsa2c_continuous": {"rmsprop_alpha": 0.9, "rmsprop_eps": 1e-3}},
        anneal_lr=True,
    )
    optimizer, _ = seen["update"][0]
    rate = script.Args().learning_rate
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx([rate, rate / 2])
    settings = optimizer.param_groups[0]
    if script is dsppo_continuous:
        assert isinstance(optimizer, torch.optim.Adam) and settings["eps"] == 1e-6
    else:
        assert isinstance(optimizer, torch.optim.RMSprop) and (settings["alpha"], settings["eps"]) == (0.9, 1e-3)


@pytest.mark.parametrize("loop", [dsa2c_continuous], indirect=True)
def test_explained_variance_is_of_all_rollouts_since_the_last_log(loop):
    """One log of two iterations: 1 - var(returns - values) / var(returns) over both."""
    script, seen, _, scalars = loop(log_interval=2)
    ((_, logged),) = scalars["losses/explained_variance"]
    rollouts = [(script.compute_gae(*given)[1], given[1]) for given in seen["gae"][:2]]
    returns, values = (torch.stack(parts) for parts in zip(*rollouts, strict=True))
    assert logged == pytest.approx(1 - ((returns - values).var() / returns.var()).item(), rel=1e-4)
