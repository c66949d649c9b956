"""The Atari environments, the noise and the evaluation, against the emulator itself."""

import inspect
import math
import tomllib
from pathlib import Path

import ale_py
import gymnasium
import imageio
import numpy as np
import pytest
import torch

import sppo_atari
from sppo_atari import Agent, Args, act, bsc_noise, evaluate, games_over, make_envs, resolve_env

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("env_id", "game"),
    [
        ("Alien", ("Alien", "alien")),
        ("AlienNoFrameskip-v4", ("Alien", "alien")),
        ("ALE/Alien-v5", ("Alien", "alien")),
        ("UpNDown", ("UpNDown", "up_n_down")),
        ("MsPacmanDeterministic-v0", ("MsPacman", "ms_pacman")),
        ("ALE/TicTacToe3D-v5", ("TicTacToe3D", "tic_tac_toe_3d")),
    ],
)
def test_resolve_env(env_id, game):
    assert resolve_env(env_id) == game


def test_every_game_of_the_paper_resolves_and_others_are_gymnasiums_errors():
    settings = tomllib.loads((Path(__file__).parents[1] / "benchmark/paper/hyperparameters.toml").read_text())
    games = settings["atari"]["games"]
    assert len(games) == 22 and [resolve_env(game)[0] for game in games] == games
    with pytest.raises(gymnasium.error.NameNotFound, match="Did you mean: `Alien`"):
        resolve_env("Alien2")
    for env_id in ("xyzzy", "Combat", "PongNoFrameskip-v5"):  # Combat needs two players
        with pytest.raises(gymnasium.error.Error):
            resolve_env(env_id)


class Emulator:
    """One game on the bare emulator, as a vector environment with seed-free start (no noops) should play it."""

    def __init__(self, rom):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("random_seed", 0)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(ale_py.roms.get_rom_path(rom))
        self.actions = self.ale.getMinimalActionSet()

    def reset(self, noops):
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(0)

    def step(self, action):
        """Four frames: the sum of the rewards, and the larger of each of the last two frames' pixels."""
        reward, frames = 0, []
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            frames.append(self.ale.getScreenGrayscale())
            if self.ale.game_over():
                break
        return reward, np.maximum(*frames[-2:]) if len(frames) == 4 else None


def test_rewards_frames_lives_and_game_overs_match_the_bare_emulator():
    """Three games of two environments at once: raw rewards, frames, lost lives, ends of games, nothing lost, nothing twice."""
    envs = make_envs("space_invaders", 2, Args(), use_fire_reset=False, img_height=210, img_width=160, stack_num=1)
    _, info = envs.reset(seed=7)
    emulators = [Emulator("space_invaders") for _ in range(2)]
    for i, emulator in enumerate(emulators):
        emulator.reset(int(info["episode_frame_number"][i]))  # as many noops as the environment drew
    rng, games, lives_lost, ours, theirs = np.random.default_rng(0), 0, 0, np.zeros(2), np.zeros(2)
    flickers = 0
    while games < 3:
        actions = rng.integers(6, size=2)
        last_info = info
        obs, rewards, terminated, truncated, info = envs.step(actions)
        over = games_over(terminated | truncated, info, last_info)
        ours += rewards
        for i, emulator in enumerate(emulators):
            lives = emulator.ale.lives()
            reward, frame = emulator.step(actions[i])
            theirs[i] += reward
            assert terminated[i] == (emulator.ale.lives() < lives or emulator.ale.game_over())
            assert over[i] == emulator.ale.game_over()
            if over[i]:
                assert ours[i] == theirs[i]
                games, ours[i], theirs[i] = games + 1, 0, 0
                emulator.reset(int(info["episode_frame_number"][i]))
            else:
                lives_lost += terminated[i]
                assert info["lives"][i] == emulator.ale.lives() and (obs[i, 0] == frame).all()
                flickers += (frame != emulator.ale.getScreenGrayscale()).any()
        assert not truncated.any()
    assert lives_lost >= 4 and flickers > 100  # the maximum of two frames is not the last one


def test_games_start_with_fire_keep_sticky_actions_and_last_108_000_frames():
    envs = make_envs("breakout", 1, Args())
    _, info = envs.reset(seed=1)
    for _ in range(40):  # doing nothing loses the ball: FIRE has put it into play
        _, _, _, _, info = envs.step(np.array([0]))
    assert info["lives"][0] < 5
    for probability in (0.0, 1.0):  # with 1 no action ever follows another, and two games stay the same
        envs = make_envs("breakout", 2, Args(repeat_action_probability=probability))
        envs.reset(seed=np.array([3, 3]))
        played = [envs.step(np.array([2, 3]))[0] for _ in range(20)]
        assert all((obs[0] == obs[1]).all() for obs in played) == (probability == 1.0)
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sppo_atari, "AtariVectorEnv", lambda rom, num_envs, **kwargs: given.update(kwargs))
        make_envs("alien", 1, Args())
    limit = inspect.signature(ale_py.vector_env.AtariVectorEnv).parameters["max_num_frames_per_episode"].default
    assert given.get("max_num_frames_per_episode", limit) == 108_000


def test_a_truncated_game_gives_the_observation_on_which_it_was_cut():
    """The same game without a limit shows what comes at that step; with one, that is `final_obs`.

    ALE cuts within the last frame skip: the newest of the four frames is up to three emulator frames old.
    """
    limited = make_envs("up_n_down", 2, Args(), max_num_frames_per_episode=400)
    unlimited = make_envs("up_n_down", 2, Args())
    _, info = limited.reset(seed=1)
    unlimited.reset(seed=1)
    for _ in range(100):
        last_info = info
        obs, _, terminated, truncated, info = limited.step(np.array([0, 5]))
        expected = unlimited.step(np.array([0, 5]))[0]
        assert truncated.any() or (obs == expected).all()
    assert truncated.all() and not terminated.any()
    assert games_over(truncated, info, last_info).all()
    assert (info["final_obs"][:, :3] == expected[:, :3]).all()
    assert ((info["final_obs"] == expected).mean(axis=(1, 2, 3)) > 0.98).all()
    assert ((obs == expected).mean(axis=(1, 2, 3)) < 0.5).all()  # while the observation is the next game's


def within_binomial_bounds(count, trials, probability):
    """Five standard deviations around the mean: a right sampler fails once in a million."""
    return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))


def test_bsc_noise_flips_zero_and_one_at_the_given_rate():
    rewards = np.tile(np.array([0.0, 1.0, -1.0]), 20_000)
    noisy, flips = bsc_noise(rewards, 0.1, np.random.default_rng(0))
    assert (noisy[rewards == -1] == -1).all() and not flips[rewards == -1].any()
    assert (noisy[flips] == 1 - rewards[flips]).all() and (noisy[~flips] == rewards[~flips]).all()
    for symbol in (0, 1):
        assert within_binomial_bounds(flips[rewards == symbol].sum(), 20_000, 0.1)


def test_act_samples_the_policy_and_reports_its_logprobs():
    class Fixed(torch.nn.Module):
        def forward(self, obs):
            return torch.tensor([0.1, 0.2, 0.7]).log().expand(len(obs), 3), torch.zeros(len(obs))

    actions, logprobs, _ = act(Fixed(), torch.zeros(30_000, 1), torch.Generator().manual_seed(0))
    for action, probability in enumerate((0.1, 0.2, 0.7)):
        assert within_binomial_bounds((actions == action).sum().item(), 30_000, probability)
        assert torch.allclose(logprobs[actions == action].exp(), torch.tensor(probability))


def test_evaluate_plays_whole_games_and_films_the_first(tmp_path):
    """The returns of evaluate() against the sum of rewards that the filmed emulator and fresh environments give."""
    torch.manual_seed(0)
    agent, args = Agent(6), Args(env_id="SpaceInvaders", eval_episodes=2, seed=5)
    rng_state = torch.get_rng_state()
    returns = evaluate(agent, args, torch.device("cpu"), tmp_path / "0.mp4")
    assert torch.equal(rng_state, torch.get_rng_state())  # the training's generator is left alone
    assert len(returns) == 2 and all(score >= 0 and score % 5 == 0 for score in returns)

    # an independent replay: the same seeds and generator, one frame of video a step
    seeds = np.random.default_rng([5, 1]).integers(2**31, size=2)
    generator = torch.Generator().manual_seed(int(seeds[0]))
    envs = make_envs("space_invaders", 2, args)
    obs, info = envs.reset(seed=seeds)
    colour = make_envs("space_invaders", 2, args, grayscale=False, img_height=210, img_width=160, stack_num=1)
    pictures = [colour.reset(seed=seeds)[0][:, 0]]
    totals, playing, steps = np.zeros(2), [0, 1], 0
    while playing:
        with torch.no_grad():
            chosen, _, _ = act(agent, torch.from_numpy(obs[playing]), generator)
        actions = np.zeros(2, dtype=np.int64)
        actions[playing] = chosen.numpy()
        last_lives = info["lives"]
        obs, rewards, _, _, info = envs.step(actions)
        pictures.append(colour.step(actions)[0][:, 0])
        steps += 0 in playing
        totals[playing] += rewards[playing]
        playing = [i for i in playing if info["lives"][i] <= last_lives[i]]
    assert returns == totals.tolist()

    reader = imageio.get_reader(tmp_path / "0.mp4")
    assert reader.get_meta_data()["size"] == (160, 210)
    assert reader.count_frames() == steps  # the reset's frame and each step's but the last
    for step in (0, steps // 2, steps - 1):  # the first game's pictures but for the compression, and not the second's
        errors = [np.abs(reader.get_data(step).astype(float) - picture).mean() for picture in pictures[step][:2]]
        assert errors[0] < 4 and (step == 0 or errors[0] < errors[1] / 2)
    assert evaluate(agent, args, torch.device("cpu"), stop=[2]) == [0.0, 0.0]  # nothing is played after a signal
