"""The rollout loops of the Atari scripts' main(), on scripted games: what reaches the advantages, the update and the log."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from helpers import only, scalars, unchanged_process

import sa2c_atari
import sppo_atari

pytestmark = pytest.mark.quick

RAW = np.array([[3, -2], [0, 5], [1, 0], [0, 4], [-7, 1], [2, 0]])  # rewards of steps 0 to 5, two games
LIFE_LOST, CUT, BOTH_OVER = 1, 2, 3  # step 1: game 0 loses a life; 2: game 1 is truncated; 3: both games end


class ScriptedGames:
    """Two games; every frame of the observation before step t is filled with t, that of a cut game with 200."""

    single_action_space = Discrete(3)

    def __init__(self):
        self.t, self.actions, self.seeds = 0, [], []
        self.lives, self.frames = np.array([3, 3]), np.array([20, 20])

    def close(self):
        self.closed = True

    def observe(self):
        return np.full((2, 4, 84, 84), self.t, dtype=np.uint8)

    def info(self):
        return {"lives": self.lives.copy(), "episode_frame_number": self.frames.copy()}

    def reset(self, seed):
        self.seeds.append(seed.tolist())
        return self.observe(), self.info()

    def step(self, actions):
        t = self.t % 6
        self.actions.append(actions.copy())
        terminated, truncated = np.zeros(2, dtype=bool), np.zeros(2, dtype=bool)
        self.frames += 4
        if t == 0:
            self.lives[0] += 1  # a bonus life
        if t == LIFE_LOST:
            terminated[0], self.lives[0] = True, 2
        if t == CUT:
            truncated[1], self.frames[1] = True, 9  # the lives stay: only the frame count tells the new game
        if t == BOTH_OVER:
            terminated[:], self.lives[:], self.frames[:] = True, 3, 5
            truncated[0] = True  # at the limit, and over all the same: no value of what would come
        self.t += 1
        final_obs = np.full((2, 4, 84, 84), 200, dtype=np.uint8)
        return self.observe(), RAW[t], terminated, truncated, {**self.info(), "final_obs": final_obs}


@pytest.fixture(params=[sppo_atari, sa2c_atari], ids=["sppo", "sa2c"])
def loop(request, monkeypatch, tmp_path):
    """Runs main() for two iterations of six steps; returns what it gave to compute_gae and update, and the scalars."""
    script, games, seen = request.param, ScriptedGames(), {"gae": [], "update": []}
    plain_gae, output = script.compute_gae, torch.zeros(())  # a CUDA graph writes each update's statistics to the same tensor

    def compute_gae(*args):
        seen["gae"].append([arg.clone() if torch.is_tensor(arg) else arg for arg in args])
        return plain_gae(*args)

    def update_ppo(agent, optimizer, step_fn, args, clip_coef, batch):
        group = optimizer.param_groups[0]
        assert isinstance(optimizer, torch.optim.Adam) and group["eps"] == 1e-5
        seen["update"].append((agent, group["lr"], clip_coef.item(), [tensor.clone() for tensor in batch]))
        return {"losses/policy_loss": 0.0}

    def update(agent, square_avgs, learning_rate, args, batch):
        for square_avg, parameter in zip(square_avgs, agent.parameters(), strict=True):  # TensorFlow's form starts at one
            assert torch.equal(square_avg, torch.ones_like(parameter))
        seen["update"].append((agent, learning_rate, None, [tensor.clone() for tensor in batch]))
        return {"losses/policy_loss": output.add_(1.0)}

    monkeypatch.setattr(script, "make_envs", lambda *args: games)
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    monkeypatch.setattr(script, "update", update_ppo if script is sppo_atari else update)

    def run(total_timesteps=24, resume=None, **changed):
        settings = {"num_envs": 2, "num_steps": 6, "total_timesteps": total_timesteps, "eval_episodes": 0, "gae_lambda": 0.8}
        settings |= {"minibatch_size": 12, "clip_coef": 0.2} if script is sppo_atari else {"log_interval": 1}
        args = script.Args(**{**settings, **changed}, run_dir=str(tmp_path))
        if resume:
            args = script.parse_args(["--resume", str(resume), "--total-timesteps", str(total_timesteps)])
        with unchanged_process():
            script.main(args)
        return script, games, seen, scalars(only(tmp_path))

    run.folder, run.script = tmp_path, script
    return run


def test_averages_of_dead_units_end_at_zero_not_in_slow_denormal_numbers(loop, monkeypatch):
    script, act, decayed = loop.script, loop.script.act, []
    tiny = torch.full((64,), 1e-38)
    monkeypatch.setattr(script, "act", lambda *args: (decayed.append((tiny * 0.9).max().item()), act(*args))[1])
    assert (tiny * 0.9).max() > 0
    loop()
    assert decayed and set(decayed) == {0.0}


@pytest.mark.parametrize("noise_prob", [0.0, 0.5, 1.0])
def test_rewards_and_dones_that_the_advantages_see(loop, noise_prob):
    _, _, seen, _ = loop(noise="bsc" if noise_prob else "none", noise_prob=noise_prob)
    agent = seen["update"][0][0]
    with torch.no_grad():
        final_obs = torch.tensor([200, 6], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 84, 84)
        cut_value, next_value = agent(final_obs.to(agent.actor.weight.device))[1].tolist()
    clipped = np.sign(RAW).astype(float)
    flips = np.random.default_rng([1, 2, 0]).random((6, 2)) < noise_prob  # purpose 2 is noise, from step 0
    clipped = np.where(flips & (clipped >= 0), 1 - clipped, clipped)  # a -1 passes
    clipped[CUT, 1] += 0.99 * cut_value  # after the noise
    dones = np.zeros((6, 2))
    dones[LIFE_LOST, 0] = dones[CUT, 1] = dones[BOTH_OVER] = 1
    rewards, values, saw_dones, next_values, gamma, gae_lambda = seen["gae"][0]
    np.testing.assert_allclose(rewards.numpy(), clipped, atol=1e-6)
    np.testing.assert_array_equal(saw_dones.numpy(), dones)
    np.testing.assert_allclose(next_values.numpy(), next_value, atol=1e-6)
    assert (gamma, gae_lambda) == (0.99, 0.8)
    with torch.no_grad():
        expected = agent(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 4, 84, 84))[1]
    np.testing.assert_allclose(values.numpy(), expected[:, None].expand(6, 2).numpy(), atol=1e-5)


def test_a_resumed_run_draws_games_and_noise_from_its_step(loop):
    loop(total_timesteps=12, noise="bsc", noise_prob=0.5)
    script, games, seen, _ = loop(resume=only(loop.folder))
    assert games.seeds == [np.random.default_rng([1, 3, step]).integers(2**31, size=2).tolist() for step in (0, 12)]
    clipped = np.sign(RAW).astype(float)
    flips = np.random.default_rng([1, 2, 12]).random((6, 2)) < 0.5
    clipped = np.where(flips & (clipped >= 0), 1 - clipped, clipped)
    kept = np.ones((6, 2), dtype=bool)
    kept[CUT, 1] = False  # there a value is added
    np.testing.assert_array_equal(seen["gae"][1][0].numpy()[kept], clipped[kept])
    assert len({script.EVALUATION, script.NOISE, script.GAMES}) == 3


def test_batch_and_schedules_that_the_update_sees(loop):
    script, games, seen, logged = loop(anneal_lr=True)
    first_rate = script.Args().learning_rate
    for iteration, (agent, rate, clip_coef, batch) in enumerate(seen["update"]):
        obs, actions, *logprobs, advantages, returns = batch
        assert [int(frame.float().mean()) for frame in obs] == [6 * iteration + t for t in range(6) for _ in range(2)]
        played = np.concatenate(games.actions[6 * iteration : 6 * iteration + 6])
        assert actions.tolist() == played.tolist()
        values = seen["gae"][iteration][1].flatten()
        torch.testing.assert_close(returns - advantages, values)
        explained = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
        assert logged["losses/explained_variance"][iteration][1] == pytest.approx(explained, rel=1e-3)
        assert rate == pytest.approx(first_rate * (1 - iteration / 2))
        if script is sppo_atari:
            with torch.no_grad():
                expected = agent(obs)[0].gather(-1, actions[:, None])[:, 0]
            torch.testing.assert_close(logprobs[0], expected, rtol=0, atol=1e-5)
            assert clip_coef == pytest.approx(0.2 * (1 - iteration / 2))
    assert not seen["update"][0][0].bf16
    assert [value for _, value in logged["charts/learning_rate"]] == pytest.approx([first_rate, first_rate / 2])


def test_no_annealing_bf16_and_cuda_graphs_are_what_was_asked_for(loop, monkeypatch):
    """ "reduce-overhead" is torch's name for CUDA graphs; a CPU compiles as without it."""
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.update({function.__name__: mode}) or function)
    script, _, seen, _ = loop(anneal_lr=False, bf16=True, compile=True)
    clip_coef = pytest.approx(0.2) if script is sppo_atari else None
    assert [(rate, clip) for _, rate, clip, _ in seen["update"]] == [(script.Args().learning_rate, clip_coef)] * 2
    assert seen["update"][0][0].bf16
    step = "gradient_step" if script is sppo_atari else "update"
    assert asked == {"act": "reduce-overhead", step: "reduce-overhead"}


def test_logged_returns_are_raw_whole_games_and_none_is_lost(loop):
    _, _, _, logged = loop(noise="bsc", noise_prob=1.0)
    # iteration 1: game 1 is cut with -2 + 5 + 0 after 3 steps; then both end, game 0 with 3 + 0 + 1 + 0 after 4, game 1
    # with 4 after 1. Iteration 2 begins with -7 + 2 and 1 + 0 of two steps each, to which its own first steps add.
    first, second = [3, 4, 4], [1 + 3, -5 + 4, 4]
    lengths = [(3 + 4 + 1) / 3, (2 + 3 + 2 + 4 + 1) / 3]
    assert logged["charts/episodic_return"] == [(12, pytest.approx(np.mean(first))), (24, pytest.approx(np.mean(second)))]
    assert [value for _, value in logged["charts/episodic_length"]] == pytest.approx(lengths)
    windows = [np.mean(first), np.mean(first + second)]
    assert [value for _, value in logged["charts/episodic_return_100"]] == pytest.approx(windows)
    assert [value for _, value in logged["charts/noise_rate"]] == pytest.approx([1.0, 1.0])


def test_explained_variance_is_left_out_where_returns_are_constant(loop, monkeypatch):
    """With gamma 0 they are the rewards but for rounding: (r - V) + V."""
    monkeypatch.setitem(globals(), "RAW", np.ones((6, 2)))
    _, _, seen, logged = loop(gamma=0.0)
    assert 0 < seen["update"][0][3][-1].var() < 1e-12
    assert "losses/policy_loss" in logged and "losses/explained_variance" not in logged


def test_an_evaluation_counts_each_game_to_its_end(loop):
    """Game 1 is over after three steps with -2 + 5 + 0, game 0 after four. What game 1's successor earns, idle, is nobody's."""
    script, games, *_ = loop(total_timesteps=12)
    games.t, games.lives, games.frames, games.actions = 0, np.array([3, 3]), np.array([20, 20]), []
    assert script.evaluate(script.Agent(3), script.Args(eval_episodes=2), torch.device("cpu")) == [3 + 0 + 1 + 0, -2 + 5 + 0]
    assert len(games.actions) == 4 and games.actions[3][1] == 0


@pytest.mark.parametrize("loop", [sa2c_atari], indirect=True)
def test_a_log_is_of_all_rollouts_since_the_last_one(loop):
    """One log of two iterations; explained variance is 1 - var(returns - values) / var(returns) over both."""
    script, _, seen, scalars = loop(log_interval=2)
    assert scalars["losses/policy_loss"] == [(24, 1.5)]
    ((_, logged),) = scalars["losses/explained_variance"]
    rollouts = [(script.compute_gae(*given)[1], given[1]) for given in seen["gae"][:2]]
    returns, values = (torch.stack(parts) for parts in zip(*rollouts, strict=True))
    assert logged == pytest.approx(1 - ((returns - values).var() / returns.var()).item(), rel=1e-4)
