"""Stable-Baselines3's PPO on Atari with the paper's settings: the peer of `sppo_atari.py`.

    python benchmark/sb3_peer.py --env-id RoadRunner --seed 1 --total-timesteps 200000 --csv sb3_1.csv

The same game, network, optimiser, schedules and minibatches as `sppo_atari.py --alpha 1 --beta 0`, with SB3's own
environments (`make_atari_env`: one Python process, noop reset, episodic life, fire reset, clipped reward) and its own
training loop. Writes one csv row per rollout: the step and the mean raw return of the whole games that ended in it.
"""

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack


@dataclass
class Args:
    env_id: str = "RoadRunner"
    """the game, without a suffix"""
    seed: int = 1
    """seed of the environments, the weights and the actions"""
    total_timesteps: int = 200_000
    """environment steps"""
    num_envs: int = 8
    """parallel games"""
    num_threads: int = 1
    """torch CPU threads"""
    eval_episodes: int = 10
    """whole games of the trained policy at the end"""
    csv: Path = Path("sb3.csv")
    """where the curve goes"""
    times: Path | None = None
    """where the time at which each rollout began goes, as JSON"""


def make_envs(env_id: str, num_envs: int, seed: int) -> VecFrameStack:
    """SB3's own Atari stack: `AtariWrapper` in a DummyVecEnv, four frames stacked."""
    import ale_py

    gym.register_envs(ale_py)
    return VecFrameStack(make_atari_env(f"{env_id}NoFrameskip-v4", n_envs=num_envs, seed=seed), n_stack=4)


def make_ppo(envs, seed: int) -> PPO:
    """PPO with the settings of `benchmark/paper/hyperparameters.toml` [atari.ppo]."""
    return PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda left: 2.5e-4 * left,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=lambda left: 0.1 * left,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
    )


class GameReturns(BaseCallback):
    """Collects the raw return of every whole game (SB3's Monitor sits below the wrappers that cut and clip)."""

    def __init__(self):
        super().__init__()
        self.rows, self.games, self.times = [], [], []

    def _on_rollout_start(self) -> None:
        self.times.append(time.time())

    def _on_step(self) -> bool:
        self.games += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        if self.games:
            self.rows.append((self.num_timesteps, float(np.mean(self.games)), len(self.games)))
            self.games = []


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    games = GameReturns()
    model = make_ppo(make_envs(args.env_id, args.num_envs, args.seed), args.seed)
    # whole rollouts, as in sppo_atari.py: SB3 would round up, and its last learning rate would be below 0
    model.learn(args.total_timesteps - args.total_timesteps % (model.n_steps * args.num_envs), callback=games)
    if args.times:
        args.times.write_text(json.dumps([*games.times, time.time()]))
    returns = []
    if args.eval_episodes:
        returns, _ = evaluate_policy(
            model,
            make_envs(args.env_id, 1, args.seed + 10_000),
            n_eval_episodes=args.eval_episodes,
            deterministic=False,
            return_episode_rewards=True,
        )
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["global_step", "episodic_return", "games", "kind"])
        writer.writerows([*row, "train"] for row in games.rows)
        writer.writerows([args.total_timesteps, r, 1, "eval"] for r in returns)


if __name__ == "__main__":
    main(tyro.cli(Args))
