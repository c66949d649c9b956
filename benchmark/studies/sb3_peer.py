"""Stable-Baselines3's PPO and A2C with the paper's settings: the peers of our scripts, as their baselines (beta 0).

    python benchmark/studies/sb3_peer.py --algorithm ppo --env-id RoadRunner --seed 1 --total-timesteps 200000 --csv sb3.csv
    python benchmark/studies/sb3_peer.py --algorithm a2c --env-id Hopper-v4 --seed 1 --total-timesteps 300000 --csv sb3.csv

The same network, optimiser, schedules and minibatches as ours with `--alpha 1 --beta 0` (and `--num-bins 0` for continuous
tasks: SB3's policy is Gaussian), with SB3's own environments (Atari: `make_atari_env`, one Python process, noop reset, episodic
life, fire reset, clipped reward; else DummyVecEnv and VecNormalize) and its own training loop. Writes a csv row
as often as ours log (PPO after each rollout, A2C after 100): the step and the mean raw return of the episodes (of the whole
games) since; the mean over episodes depends on how many steps it spans, as failing episodes are short and many.
"""

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize


@dataclass
class Args:
    algorithm: Literal["ppo", "a2c"] = "ppo"
    """which of SB3's"""
    env_id: str = "RoadRunner"
    """an Atari game without a suffix, or a Gymnasium id with Box actions"""
    seed: int = 1
    """seed of the environments, the weights and the actions"""
    total_timesteps: int = 200_000
    """environment steps"""
    num_threads: int = 1
    """torch CPU threads"""
    eval_episodes: int = 10
    """whole episodes of the trained policy at the end"""
    csv: Path = Path("sb3.csv")
    """where the curve goes"""
    times: Path | None = None
    """where the time at which each rollout began goes, as JSON"""


def is_atari(env_id: str) -> bool:
    return env_id not in gym.registry


def make_envs(env_id: str, num_envs: int, seed: int) -> VecEnv:
    """SB3's own stack: `AtariWrapper`s with four frames stacked, or observations and rewards normalised."""
    if is_atari(env_id):
        import ale_py

        gym.register_envs(ale_py)
        return VecFrameStack(make_atari_env(f"{env_id}NoFrameskip-v4", n_envs=num_envs, seed=seed), n_stack=4)
    return VecNormalize(make_vec_env(env_id, n_envs=num_envs, seed=seed), gamma=0.99)


def make_model(algorithm: str, env_id: str, seed: int) -> PPO | A2C:
    """The settings of `benchmark/paper/hyperparameters.toml` [atari.ppo], [atari.a2c], [continuous.ppo], [continuous.a2c]."""
    atari = is_atari(env_id)
    common = {"gamma": 0.99, "max_grad_norm": 0.5, "seed": seed, "device": "cpu"}
    small = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    if algorithm == "ppo" and atari:
        return PPO(
            "CnnPolicy",
            make_envs(env_id, 8, seed),
            learning_rate=lambda left: 2.5e-4 * left,
            n_steps=128,
            batch_size=256,
            n_epochs=4,
            gae_lambda=0.95,
            clip_range=lambda left: 0.1 * left,
            ent_coef=0.01,
            vf_coef=0.5,
            **common,
        )
    if algorithm == "ppo":
        return PPO(
            "MlpPolicy",
            make_envs(env_id, 1, seed),
            learning_rate=3e-4,
            n_steps=2048,
            batch_size=64,
            n_epochs=10,
            gae_lambda=0.95,
            clip_range=0.2,
            ent_coef=0.0,
            vf_coef=0.5,
            policy_kwargs=small,
            **common,
        )
    if atari:
        tensorflow_form = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        return A2C(
            "CnnPolicy",
            make_envs(env_id, 16, seed),
            learning_rate=7e-4,
            n_steps=5,
            ent_coef=0.01,
            vf_coef=0.25,
            policy_kwargs=tensorflow_form,
            **common,
        )
    return A2C(
        "MlpPolicy",
        make_envs(env_id, 4, seed),
        learning_rate=7e-4,
        n_steps=8,
        ent_coef=0.0,
        vf_coef=0.5,
        rms_prop_eps=1e-5,
        policy_kwargs=small,
        **common,
    )


class GameReturns(BaseCallback):
    """Collects the raw return of every whole episode (SB3's Monitor sits below the wrappers that cut, clip and scale)."""

    def __init__(self, log_interval: int):
        super().__init__()
        self.rows, self.games, self.times, self.rollouts, self.log_interval = [], [], [], 0, log_interval

    def _on_rollout_start(self) -> None:
        self.times.append(time.time())

    def _on_step(self) -> bool:
        self.games += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        if self.games and self.rollouts % self.log_interval == 0:
            self.rows.append((self.num_timesteps, float(np.mean(self.games)), len(self.games)))
            self.games = []


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    games = GameReturns(log_interval=1 if args.algorithm == "ppo" else 100)
    model = make_model(args.algorithm, args.env_id, args.seed)
    # whole rollouts, as in our scripts: SB3 would round up, and an annealed learning rate would end below 0
    model.learn(args.total_timesteps - args.total_timesteps % (model.n_steps * model.n_envs), callback=games)
    if args.times:
        args.times.write_text(json.dumps([*games.times, time.time()]))
    returns = []
    if args.eval_episodes:
        envs = make_envs(args.env_id, 1, args.seed + 10_000)
        if isinstance(envs, VecNormalize):  # frozen
            envs.obs_rms, envs.training, envs.norm_reward = model.get_vec_normalize_env().obs_rms, False, False
        returns, _ = evaluate_policy(
            model,
            envs,
            n_eval_episodes=args.eval_episodes,
            deterministic=not is_atari(args.env_id),
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
