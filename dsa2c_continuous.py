"""DSA2C on MuJoCo and Box2D: A2C over discretised actions with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). Each of the D action dimensions is cut into bins, with one categorical distribution each.
The agent takes the bins i = (i_1 .. i_D) with joint probability pi_i; A is the advantage:

            L_a2c  = -A log pi_i
    Eq. 7   L_ra2c = -A Z sum_{j != i} pi_j      Z < 0, -1 in the paper
    Eq. 9   L      = alpha L_a2c + beta L_ra2c

Eq. 7 as printed has another sign for A < 0 (`--literal-signs`; docs/loss.md, fact 1).

    python dsa2c_continuous.py --env-id Hopper --beta 10 --noise gaussian               # DSA2C, noisy rewards
    python dsa2c_continuous.py --env-id Hopper --alpha 1 --beta 0 --noise gaussian      # DA2C; with --num-bins 0 Gaussian A2C
    python dsa2c_continuous.py --env-id Hopper --beta 10 --mean-weight --noise gaussian # the control: samples weigh the same
    python dsa2c_continuous.py --resume runs/Hopper-v4__dsa2c_continuous__1__1700000000

The algorithm ends at the line "Operations". docs/differences.md lists what differs from the paper and its released code.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "mujoco==4.0.0",
#     "box2d==2.3.10",
#     "pygame-ce==2.5.8",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "pydantic==2.14.4",
#     "filelock==4.2.12",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1",
# ]
# ///

import contextlib
import ctypes
import difflib
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import deque
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import gymnasium
import imageio
import numpy as np
import pydantic
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from gymnasium.spaces import Box
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Probability, Name = Annotated[float, Field(ge=0, le=1)], Annotated[str, Field(min_length=1)]


@pydantic.with_config(allow_inf_nan=False, use_attribute_docstrings=True)
@dataclass
class Args:
    """A2C, DA2C and DSA2C on continuous control. `--alpha 1 --beta 0` is DA2C, with `--num-bins 0` Gaussian A2C."""

    # symmetric loss
    alpha: NonNegativeFloat = 0.5
    """weight of the A2C loss (Eq. 9)"""
    beta: NonNegativeFloat = 0.2
    """weight of the reverse loss (Eq. 9); the paper uses 0.2 to 5 without noise and 0.2 to 10 with; num_bins 0 needs 0"""
    Z: Annotated[float, Field(lt=0)] = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 7)"""
    literal_signs: bool = False
    """use the sign that Eq. 7 prints for A < 0; its gradient opposes A2C's"""
    mean_weight: bool = False
    """a control: replace each sample's weight alpha + beta |Z| pi_i by its mean over the rollout"""
    reverse_prob: Literal["joint", "factored"] = "joint"
    """probability in the reverse loss: joint over dimensions, as released; factored: a sum with one term per dimension"""

    # noise
    noise: Literal["none", "gaussian"] = "none"
    """gaussian: adds N(0, noise_std^2) to the learner's normalised rewards"""
    noise_std: NonNegativeFloat = 0.05
    """standard deviation of the noise"""

    # environment
    env_id: str = "Hopper"
    """a task of the paper (Hopper is Hopper-v4), or a Gymnasium id (also module:Id) with Box spaces"""
    max_episode_steps: PositiveInt | None = None
    """time limit of an episode; by default the environment's own"""
    num_bins: NonNegativeInt = 11
    """bins of each action dimension; 0: a Gaussian policy with a state-independent standard deviation"""

    # algorithm
    total_timesteps: PositiveInt = 2_000_000
    """environment steps, rounded down to whole iterations"""
    learning_rate: PositiveFloat = 7e-4
    """learning rate of RMSprop"""
    rmsprop_alpha: Probability = 0.99
    """smoothing constant of RMSprop"""
    rmsprop_eps: PositiveFloat = 1e-5
    """epsilon of RMSprop, outside the root"""
    num_envs: PositiveInt = 4
    """number of environments, stepped in turn"""
    num_steps: PositiveInt = 8
    """steps of each environment per rollout"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0"""
    gamma: Probability = 0.99
    """discount factor; the paper uses 0.9999 on Swimmer"""
    gae_lambda: Probability = 1.0
    """lambda of generalised advantage estimation; 1 is the return of up to num_steps steps plus the bootstrap"""
    norm_adv: bool = False
    """normalise the advantages of each rollout"""
    ent_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus"""
    vf_coef: NonNegativeFloat = 0.5
    """weight of the value loss (mean squared error without a factor 1/2)"""
    max_grad_norm: PositiveFloat = 0.5
    """maximum norm of the gradient"""

    # evaluation
    eval_episodes: NonNegativeInt = 10
    """episodes that score the policy: raw rewards, no noise, greedy actions"""
    eval_interval: NonNegativeInt = 0
    """evaluate every this many steps; 0: only at the end"""
    capture_video: bool = False
    """film the first episode of each evaluation, in videos/ of the run folder"""

    # logging
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works without an account)"""
    wandb_project_name: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] = "symmetric-rl"
    """project in W&B"""
    wandb_entity: str | None = None
    """user or team in W&B"""
    wandb_group: str | None = None
    """group of the run in W&B"""
    wandb_tags: Annotated[str, Field(pattern=r"^[^,]{1,64}(,[^,]{1,64})*$")] | None = None
    """tags of the run in W&B, separated by commas"""
    log_interval: PositiveInt = 100
    """log the means of this many iterations"""

    # run and machine
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")] = "dsa2c_continuous"
    """name of the experiment, part of the run folder's name"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """seed of everything random"""
    run_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: Name | None = None
    """continue the run in this folder with its own arguments"""
    evaluate: Name | None = None
    """play --eval-episodes episodes with the policy of the run in this folder, and exit"""
    checkpoint_interval: PositiveInt = 1000
    """save a checkpoint every this many iterations, a multiple of log_interval"""
    cuda: bool = False
    """use a GPU if there is one; networks this small gain nothing from it"""
    torch_deterministic: bool = True
    """use deterministic cuDNN kernels"""
    compile: bool = False
    """torch.compile the loss; the first minute is slower"""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 1
    """CPU threads of torch; 0: all cores, slower for networks this small"""


# Random generators beside torch's, so that none disturbs another: each is seeded with [seed, its number, step], evaluation
# without the step, so that all evaluations of a run start alike
EVALUATION, NOISE, ENVS, ACTIONS = 1, 2, 3, 4
# The paper's tasks by short name
TASKS = {
    task.split("-")[0]: task
    for task in (
        "Ant-v4",
        "BipedalWalker-v3",
        "HalfCheetah-v4",
        "Hopper-v4",
        "HumanoidStandup-v4",
        "InvertedDoublePendulum-v4",
        "LunarLanderContinuous-v3",
        "Swimmer-v4",
        "Walker2d-v4",
    )
}


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_a2c_loss(logprobs, advantages, Z=-1.0, literal_signs=False):
    """L_a2c and L_ra2c of the actions taken (Eq. 7): means over the batch. The caller weights them (Eq. 9).

    Inputs are [B]. The sum over the other actions in Eq. 7 is 1 - pi_i, so L_ra2c needs only what L_a2c already
    computes. With Z = -1 its gradient is pi_i times that of L_a2c: together they weight a sample by alpha + beta pi_i.
    With literal_signs it opposes that of L_a2c where A < 0.
    """
    policy_loss = -(advantages * logprobs).mean()

    signed = advantages.abs() if literal_signs else advantages
    # expm1 is precise where pi_i is nearly 1. A density above 1 counts as 1: the Gaussian policy of the continuous script,
    # which has beta 0, can have it.
    others = -logprobs.clamp(max=0).expm1()  # sum_{j != i} pi_j = 1 - pi_i
    reverse_loss = (-signed * Z * others).mean()
    return policy_loss, reverse_loss


def factored_a2c_reverse(logprobs, advantages, Z=-1.0, literal_signs=False):
    """L_ra2c with one term per action dimension (`--reverse-prob factored`), in place of the joint one:

        L = -A Z sum_d (1 - pi_d)

    logprobs: [B, D], of each dimension's own bin; advantages: [B]. A scalar, the mean over the batch.
    """
    signed = advantages.abs() if literal_signs else advantages
    return (signed * Z * logprobs.clamp(max=0).expm1().sum(-1)).mean()


def rollout_loss(agent, args, obs, actions, advantages, returns):
    """The loss of a rollout and its statistics. obs: [B, obs_dim], actions: [B, D], advantages and returns: [B]."""
    logprobs, entropies, values = agent(obs, actions)
    raw_advantages = advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs.sum(-1), advantages, args.Z, args.literal_signs)
    if args.reverse_prob == "factored":
        reverse_loss = factored_a2c_reverse(logprobs, advantages, args.Z, args.literal_signs)
    if args.mean_weight:  # in place of each sample's own pi_i (its weight in the gradient) their mean
        reverse_loss = -args.Z * logprobs.detach().sum(-1).exp().mean() * policy_loss
    value_loss = F.mse_loss(values, returns)
    entropy = entropies.mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss
    if args.ent_coef:  # 0 in the paper; the gradient of the entropy takes time
        loss = loss - args.ent_coef * entropy

    stats = {"policy_loss": policy_loss, "reverse_loss": reverse_loss, "value_loss": value_loss, "entropy": entropy}
    stats = {f"losses/{name}": value.detach() for name, value in stats.items()}
    stats["charts/adv_sign_change"] = (raw_advantages.sign() != advantages.sign()).float().mean()  # Figure 2
    return loss, stats


# --- agent ------------------------------------------------------------------------------------------------------------


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights with gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Separate actor and critic, two hidden layers of 64 with tanh. num_bins: bins of each action dimension; 0: Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int, num_bins: int):
        super().__init__()

        def mlp(outputs: int, std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(obs_dim, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, outputs), std=std),
            )

        self.num_bins = num_bins
        self.actor = mlp(action_dim * (num_bins or 1), std=0.01)
        self.critic = mlp(1, std=1)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if num_bins == 0 else None

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [B, obs_dim], actions [B, D] (bins; real numbers if num_bins is 0) -> the log-probability of each
        dimension's action [B, D], the joint entropy [B], values [B]."""
        output, values = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.num_bins:
            all_logprobs = F.log_softmax(output.unflatten(-1, (-1, self.num_bins)), dim=-1)
            logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return logprobs, -(all_logprobs.exp() * all_logprobs).sum((-2, -1)), values
        scaled = (actions - output) * (-self.log_std).exp()
        logprobs = -0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return logprobs, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(obs)), values


def numpy_actor(agent):
    """The actor for `act`: its layers as numpy weights and biases, num_bins, and the standard deviation of a Gaussian.

    numpy takes a fraction of torch's time for one observation: the whole loop is 11 % (A2C) to 20 % (PPO) faster on Walker2d.
    """
    weights = {name: tensor.cpu().numpy() for name, tensor in agent.state_dict().items()}
    layers = [(weights[f"actor.{i}.weight"].T, weights[f"actor.{i}.bias"]) for i in (0, 2, 4)]
    return layers, agent.num_bins, None if agent.num_bins else np.exp(weights["log_std"])


def act(actor, obs: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """Actions [B, D] for obs [B, obs_dim]: bins, or real numbers from a Gaussian actor; greedy without `noise`.

    noise: for bins Gumbel [B, D, num_bins] (the argmax of logits plus Gumbel noise is a sample), for a Gaussian normal [B, D].
    """
    layers, num_bins, std = actor
    for weight, bias in layers[:-1]:
        obs = np.tanh(obs @ weight + bias)
    output = obs @ layers[-1][0] + layers[-1][1]
    if num_bins:
        logits = output.reshape(len(obs), -1, num_bins)
        return (logits if noise is None else logits + noise).argmax(axis=-1)
    return output if noise is None else output + std * noise


def exploration_noise(rng: np.random.Generator, shape: tuple[int, ...], num_bins: int) -> np.ndarray:
    """The noise of `act` for actions of this shape: Gumbel, num_bins each, or normal for a Gaussian actor."""
    return rng.gumbel(size=(*shape, num_bins)) if num_bins else rng.standard_normal(shape)


# --- environment ------------------------------------------------------------------------------------------------------


def make_env(args, **kwargs):
    """One environment with a time limit; observations flat."""
    import mujoco  # not at the top: mujoco reads MUJOCO_GL at its import, and `check_task` may set it

    mujoco.set_mju_user_warning(warnings.warn)  # mujoco would write MUJOCO_LOG.TXT into the working folder
    with warnings.catch_warnings():
        # the paper's tasks are the -v4 ones; some of their models have a deprecated attribute
        warnings.filterwarnings("ignore", message=".*(out of date|settotalmass).*")
        env_id, limit = TASKS.get(args.env_id, args.env_id), args.max_episode_steps
        env = gymnasium.make(env_id, disable_env_checker=True, max_episode_steps=limit, **kwargs)
    flat = not isinstance(env.observation_space, Box) or len(env.observation_space.shape) == 1
    return env if flat else gymnasium.wrappers.FlattenObservation(env)


def make_bins(space: Box, num_bins: int) -> np.ndarray:
    """[D, num_bins]: the actions of the bins of each dimension, evenly from low to high, both included."""
    return np.linspace(space.low, space.high, num_bins, axis=-1, dtype=space.dtype)


def to_env(actions: np.ndarray, space: Box, bins: np.ndarray | None) -> np.ndarray:
    """What the environments get, [num_envs, D]: the values of the chosen bins; Gaussian actions clipped to the box."""
    if bins is None:
        return actions.clip(space.low, space.high)
    return bins[np.arange(len(bins)), actions]


def step_envs(envs: list[gymnasium.Env], env_actions: np.ndarray):
    """One step of each environment; an episode that ends is reset within the same step (SAME_STEP).

    Returns obs [num_envs, obs_dim] (of the next episode where one ended), rewards [num_envs], terminated, truncated
    [num_envs] bool, and the final observations of the episodes that ended, as {environment: obs}.
    """
    obs, rewards, terminated, truncated, final_obs = [], [], [], [], {}
    for i, env in enumerate(envs):
        next_obs, reward, is_terminated, is_truncated, _ = env.step(env_actions[i])
        if is_terminated or is_truncated:
            final_obs[i] = np.array(next_obs)  # a copy: the reset may write to the same array
            next_obs, _ = env.reset()
        obs.append(next_obs)
        rewards.append(np.asarray(reward, dtype=np.float64).item())
        terminated.append(is_terminated)
        truncated.append(is_truncated)
    return np.array(obs), np.array(rewards), np.array(terminated), np.array(truncated), final_obs


class RunningMeanStd:
    """Running mean and variance of all rows so far (Welford 1962).

    They start at mean 0 and variance 1 with count 1e-4, as in SB3, whose numbers this reproduces. An offset far above
    the spread (a clock in seconds) therefore stays in the variance: subtract it in the environment.
    """

    def __init__(self, shape: tuple[int, ...] = ()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, rows: np.ndarray) -> None:
        """rows: [N, *shape]."""
        for row in rows:
            self.count += 1
            delta = row - self.mean
            self.mean = self.mean + delta / self.count
            self.var = self.var + (delta * (row - self.mean) - self.var) / self.count

    def state(self) -> list:
        return [self.mean.tolist(), self.var.tolist(), self.count]

    def load(self, state: list) -> None:
        self.mean, self.var, self.count = np.array(state[0]), np.array(state[1]), state[2]


def normalise_obs(obs: np.ndarray, stats: RunningMeanStd) -> np.ndarray:
    """Observations with mean 0 and standard deviation 1, clipped to +-10; float32."""
    scaled = (obs - stats.mean) / np.sqrt(stats.var + 1e-8)
    return np.minimum(np.maximum(scaled, -10), 10).astype(np.float32)  # np.clip takes three times as long for one row


def normalise_rewards(rewards: np.ndarray, stats: RunningMeanStd) -> np.ndarray:
    """Rewards divided by the running standard deviation of the discounted return, clipped to +-10."""
    return np.minimum(np.maximum(rewards / np.sqrt(stats.var + 1e-8), -10), 10)


# --- training ---------------------------------------------------------------------------------------------------------


def compute_gae(rewards, values, dones, next_values, gamma, gae_lambda):
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016), both [num_steps, num_envs].

    dones[t] is 1 if step t ended an episode. next_values: [num_envs], of the observation after the last step.
    """
    alive = 1.0 - dones
    deltas = rewards + gamma * alive * torch.cat([values[1:], next_values.unsqueeze(0)]) - values
    decays = gamma * gae_lambda * alive
    advantages, advantage = torch.zeros_like(values), torch.zeros_like(next_values)
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Makes all parameters and gradients of `module` views of one flat parameter, and returns it.

    The optimizer and the gradient norm then take one call for all layers: the whole loop is 6 % (A2C) to 10 % (PPO) faster on
    Walker2d.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return flat


def update(agent, weights, optimizer, loss_fn, args, batch):
    """One gradient step on the whole rollout. Returns the statistics as tensors: .item() would wait for the GPU.

    weights: the agent's flat parameter. batch: the inputs of `rollout_loss` after `args`, each
    [num_steps * num_envs, ...].
    """
    weights.grad.zero_()
    loss, stats = loss_fn(agent, args, *batch)
    loss.backward()
    # clip_grad_norm_, which takes three times as long for one small tensor
    norm = weights.grad.norm()
    weights.grad.mul_((args.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
    optimizer.step()
    return stats | {"losses/grad_norm": norm, "losses/grad_clipped": (norm > args.max_grad_norm).float()}


def train(args, run):
    """Acts, learns and logs until `total_timesteps`. `run` keeps the curves, checkpoints and scores (see Operations)."""
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    global_step = run.checkpoint["global_step"] if run.checkpoint else 0

    torch.manual_seed(args.seed + global_step)  # a resumed run seeds all its generators from the step it resumes at
    action_rng, noise_rng, env_rng = (np.random.default_rng([args.seed, i, global_step]) for i in (ACTIONS, NOISE, ENVS))
    envs = [run.cleanup.enter_context(contextlib.closing(make_env(args))) for _ in range(args.num_envs)]
    (obs_dim,), space = envs[0].observation_space.shape, envs[0].action_space
    bins = make_bins(space, args.num_bins) if args.num_bins else None
    agent = Agent(obs_dim, len(space.low), args.num_bins).to(run.device)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    loss_fn = torch.compile(rollout_loss) if args.compile else rollout_loss
    obs_stats, return_stats, recent_returns = RunningMeanStd((obs_dim,)), RunningMeanStd(), deque(maxlen=100)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        obs_stats.load(run.checkpoint["obs_stats"])
        return_stats.load(run.checkpoint["return_stats"])
        recent_returns.extend(run.checkpoint["recent_returns"])

    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((*shape, obs_dim), dtype=np.float32)
    actions = np.zeros((*shape, *space.shape), dtype=np.int64 if args.num_bins else np.float32)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    discounted_returns, episode_returns, episode_lengths = np.zeros((3, args.num_envs))
    seeds = env_rng.integers(2**31, size=args.num_envs).tolist()
    raw_obs = np.array([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    obs_stats.update(raw_obs)
    next_obs = normalise_obs(raw_obs, obs_stats)
    # of the iterations since the last log
    finished_returns, finished_lengths, history, fits, reward_noises, seconds = [], [], [], [], [], 0.0

    for iteration in range(global_step // batch_size, num_iterations):
        start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = fraction_left * args.learning_rate

        # stop if the last update made the weights non-finite; else act
        run.exit_if_not_finite(global_step, {"the sum of the weights": weights.sum().item()})
        actor, cut_steps, cut_envs, cut_obs = numpy_actor(agent), [], [], []
        exploration = exploration_noise(action_rng, actions.shape, args.num_bins)
        reward_noise = args.noise_std * noise_rng.standard_normal(shape) if args.noise == "gaussian" else np.zeros(shape)
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            actions[step] = act(actor, next_obs, exploration[step])
            raw_obs, raw_rewards, terminated, truncated, final_obs = step_envs(envs, to_env(actions[step], space, bins))
            obs_stats.update(raw_obs)
            next_obs = normalise_obs(raw_obs, obs_stats)
            discounted_returns = args.gamma * discounted_returns + raw_rewards
            return_stats.update(discounted_returns)
            rewards[step] = normalise_rewards(raw_rewards, return_stats) + reward_noise[step]
            dones[step] = terminated | truncated

            episode_returns += raw_rewards
            episode_lengths += 1
            for i, last_obs in final_obs.items():
                finished_returns.append(float(episode_returns[i]))
                finished_lengths.append(int(episode_lengths[i]))
                discounted_returns[i], episode_returns[i], episode_lengths[i] = 0, 0, 0
                if not terminated[i]:  # truncated by the time limit: bootstrap from the final observation
                    cut_steps.append(step)
                    cut_envs.append(i)
                    cut_obs.append(normalise_obs(last_obs, obs_stats))

        # learn; the weights are still those that acted, so one batch gives the values of all steps
        batch = [torch.from_numpy(array).flatten(0, 1).to(run.device) for array in (obs, actions)]
        with torch.no_grad():
            values = agent.critic(batch[0]).view(shape)
            next_values = agent.critic(torch.from_numpy(next_obs).to(run.device)).squeeze(-1)
            if cut_obs:
                final_values = agent.critic(torch.from_numpy(np.array(cut_obs)).to(run.device)).squeeze(-1)
                rewards[cut_steps, cut_envs] += args.gamma * final_values.cpu().numpy()
            rewards_t, dones_t = torch.as_tensor(np.stack([rewards, dones]), device=run.device)
            advantages, returns = compute_gae(rewards_t, values, dones_t, next_values, args.gamma, args.gae_lambda)
        batch += [advantages.flatten(), returns.flatten()]
        shares = grad_shares(agent, args, rollout_loss, batch) if (iteration + 1) % args.log_interval == 0 else {}
        history.append(update(agent, weights, optimizer, loss_fn, args, batch))
        fits.append(torch.stack([returns, values]))
        reward_noises.append(reward_noise)
        seconds += time.perf_counter() - start

        # log; before a stop, too: the curves since the last log would be lost
        stopping, last = bool(run.signals), iteration + 1 == num_iterations
        if last or stopping or (iteration + 1) % args.log_interval == 0:
            stats = {name: torch.stack([each[name] for each in history]).mean().item() for name in history[0]} | shares
            recent_returns.extend(finished_returns)
            if finished_returns:
                stats["charts/episodic_return"] = np.mean(finished_returns)
                stats["charts/episodic_return_100"] = np.mean(recent_returns)
                stats["charts/episodic_length"] = np.mean(finished_lengths)
            if args.noise == "gaussian":
                stats["charts/noise_std"] = np.std(reward_noises)
            all_returns, all_values = torch.stack(fits).unbind(1)
            unexplained = (all_returns - all_values).var(correction=0) / all_returns.var(correction=0).clamp(min=1e-30)
            stats["losses/explained_variance"] = (1 - unexplained).item()
            stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.log(global_step, stats, seconds)
            finished_returns, finished_lengths, history, fits, reward_noises, seconds = [], [], [], [], [], 0.0
        if args.eval_interval and global_step % args.eval_interval < batch_size and not last:
            run.evaluate((agent, obs_stats), global_step)
        if last or stopping or (iteration + 1) % args.checkpoint_interval == 0:
            state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "recent_returns": list(recent_returns)}
            run.save(global_step, obs_stats=obs_stats.state(), return_stats=return_stats.state(), **state)
        if stopping:
            break
    run.finish(global_step, run.evaluate((agent, obs_stats), global_step))


# === Operations: nothing below changes what is learned ================================================================

# Specific to these environments: packages that decide the numbers, the gradient's shares, evaluation, loading, checks
PACKAGES = ("torch", "gymnasium", "mujoco", "box2d", "numpy")
# Parts of the loss, each with the arguments that weight it
PARTS = {"policy": ("alpha", "beta"), "value": ("vf_coef",), "entropy": ("ent_coef",)}


def grad_shares(agent, args, loss_fn, batch):
    """The share of each of the PARTS of the loss in its gradient.

    g_i is the gradient of part i, g their sum. The share is <g_i, g> / |g|^2. The shares sum to 1; a part that opposes g
    has a negative one. batch: the inputs of `loss_fn` after `args`.
    """
    parameters = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    weights = {weight for own in PARTS.values() for weight in own}
    grads = {}
    for name, own in PARTS.items():
        if any(getattr(args, weight) for weight in own):  # else the part has no gradient
            loss, _ = loss_fn(agent, replace(args, **dict.fromkeys(weights - set(own), 0.0)), *batch)
            grads[name] = torch.autograd.grad(loss, parameters)
    total = [sum(parts) for parts in zip(*grads.values(), strict=True)]

    def dot_total(grad):
        return sum(torch.dot(own.flatten().double(), whole.flatten().double()) for own, whole in zip(grad, total, strict=True))

    square = max(float(dot_total(total)), 1e-300)
    return {f"losses/grad_share_{name}": float(dot_total(grads[name])) / square if name in grads else 0.0 for name in PARTS}


def evaluate(policy, args, device, video_path=None, stop=()):
    """The raw returns of `eval_episodes` episodes, each in a fresh environment: greedy actions, frozen normaliser.

    It draws from no generator of the training. `video_path`: an mp4 of the first episode. `stop`: a list that a signal
    handler fills; evaluation then returns [].
    """
    agent, obs_stats = policy
    actor, returns = numpy_actor(agent), []
    for seed in np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes):
        film = video_path is not None and not returns
        with contextlib.ExitStack() as cleanup:
            env = cleanup.enter_context(contextlib.closing(make_env(args, **({"render_mode": "rgb_array"} if film else {}))))
            bins = make_bins(env.action_space, args.num_bins) if args.num_bins else None
            if film:
                fps = env.metadata.get("render_fps", 30)
                video = cleanup.enter_context(imageio.get_writer(video_path, fps=fps, macro_block_size=2))
            obs, _ = env.reset(seed=int(seed))
            episode_return, done = 0.0, False
            while not done and not stop:
                if film:
                    video.append_data(env.render())
                actions = act(actor, normalise_obs(np.asarray(obs)[None], obs_stats))
                obs, reward, terminated, truncated, _ = env.step(to_env(actions, env.action_space, bins)[0])
                episode_return += np.asarray(reward, dtype=np.float64).item()
                done = terminated or truncated
        returns.append(episode_return)
    return [] if stop else returns


def load_agent(args, checkpoint, device):
    """The trained agent and the statistics that normalise its observations, from a run's checkpoint."""
    weights, obs_stats = checkpoint["agent"], RunningMeanStd()
    agent = Agent(weights["actor.0.weight"].shape[1], len(weights["actor.4.bias"]) // (args.num_bins or 1), args.num_bins)
    agent.load_state_dict(weights)
    obs_stats.load(checkpoint["obs_stats"])
    return agent.to(device), obs_stats


def load_policy(run_folder):
    """A trained policy and an environment for it: `policy(obs)` is the greedy action for `env`."""
    args, checkpoint = load_run(run_folder)
    agent, obs_stats = load_agent(args, checkpoint, "cpu")
    env, actor = make_env(args), numpy_actor(agent)
    bins = make_bins(env.action_space, args.num_bins) if args.num_bins else None

    def policy(obs):
        return to_env(act(actor, normalise_obs(np.asarray(obs)[None], obs_stats)), env.action_space, bins)[0]

    return policy, env


def resolve_env(env_id):
    """The environment's name in the run folder and in args.json."""
    return TASKS.get(env_id, env_id).rpartition(":")[2]


def check_env(args):
    """Refuses combinations of arguments, and environments, that this script cannot learn."""
    multiple = args.checkpoint_interval % args.log_interval == 0
    require(args, "checkpoint_interval", multiple, f"a multiple of log_interval = {args.log_interval}")
    enough = args.num_envs * args.num_steps > 1 or not args.norm_adv
    require(args, "norm_adv", enough, "num_envs x num_steps of 2 or more with it")
    plain = args.beta > 0 and not args.literal_signs and args.reverse_prob == "joint"
    require(args, "mean_weight", plain or not args.mean_weight, "off, or beta above 0, reverse_prob joint, no literal_signs")
    require(args, "num_bins", args.num_bins != 1, "0 (Gaussian) or 2 or more")
    require(args, "beta", args.num_bins or args.beta == 0, "0 with num_bins 0: a density has no sum over other actions")
    old_run = args.resume or args.evaluate  # may have had a GPU where there is none now
    require(args, "cuda", old_run or torch.cuda.is_available() or not args.cuda, "a GPU that torch can use")
    check_task(args)


def check_task(args):
    """Plays one step of the environment, which has to fit this script."""
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    sys.path.append(os.getcwd())  # for module:Id
    given = f"--env-id {args.env_id}"
    with contextlib.ExitStack() as cleanup:
        try:
            env = cleanup.enter_context(contextlib.closing(make_env(args)))
        except Exception as error:  # each family of environments has errors of its own
            fail(f"{given}: Gymnasium cannot make it ({one_line(error)}); expected one of {', '.join(TASKS)} or a Gymnasium id")
        space = env.action_space
        boxes = isinstance(env.observation_space, Box) and isinstance(space, Box)
        if not boxes or len(space.shape) != 1 or not space.shape[0] or space.dtype.kind != "f":
            spaces = f"{type(env.observation_space).__name__} observations and {type(space).__name__} actions"
            found = f"{spaces} ({space.dtype}, shape {space.shape})"
            fail(f"{given}: has {found}; expected Box observations and a one-dimensional Box of float actions")
        with np.errstate(over="ignore"):  # bounds near the largest float leave no room for bins
            bounded = space.is_bounded() and np.isfinite(space.high - space.low).all()
        if args.num_bins and not bounded:
            fail(f"{given}: its actions are unbounded; expected bounded ones with bins, or --num-bins 0")
        if args.eval_episodes and env.spec.max_episode_steps is None:
            fail(f"{given}: has no time limit, so evaluation may never end; set --max-episode-steps or --eval-episodes 0")
        try:
            env.reset(seed=0)
            obs, reward, *_ = env.step(np.clip(np.zeros(space.shape, space.dtype), space.low, space.high))
            np.asarray(obs, dtype=np.float64).reshape(env.observation_space.shape)
            np.asarray(reward, dtype=np.float64).item()
        except Exception as error:
            fail(f"{given}: cannot play a step of it ({one_line(error)}); expected its own observations and a number as reward")
    if args.capture_video:
        with contextlib.ExitStack() as cleanup:
            try:
                env = cleanup.enter_context(contextlib.closing(make_env(args, render_mode="rgb_array")))
                env.reset(seed=0)
                frame = np.asarray(env.render())
            except Exception as error:  # and so has each renderer
                sys.unraisablehook = lambda unraisable: None  # the half-made renderer complains when it is deleted
                fail(f"--capture-video: cannot render ({one_line(error)}); expected a screen, or MUJOCO_GL=egl or osmesa")
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
                fail(f"--capture-video: {given} renders {frame.dtype} {frame.shape}; expected uint8 height x width x 3")


# --- run: one text in the control scripts from here on ----------------------------------------------------------------

SCRIPT = Path(__file__).name
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Run:
    """A run's folder: arguments, curves, checkpoints, videos and result. Resumes a run. Saves and exits on a signal."""

    def __init__(self, args):
        self.args, self.checkpoint, self.signals, self.cleanup = args, None, [], contextlib.ExitStack()
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.record = {
            "script": SCRIPT,
            "run_id": (args.track and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],  # a sweep's agent names the run
            "env_id": resolve_env(args.env_id),
            "args": asdict(args) | {"resume": None},
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
            "commit": git_commit(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        try:
            if args.resume:
                self.open(Path(args.resume).resolve())
            else:
                self.make_folder()
            if args.track:
                self.track()
            (self.folder / "result.json").unlink(missing_ok=True)
            write_json(self.folder / "args.json", self.record)
        except OSError as error:
            fail(f"{f'--resume {args.resume}' if args.resume else f'--run-dir {args.run_dir}'}: {error.strerror}")
        self.start_step = self.checkpoint["global_step"] if self.checkpoint else 0
        self.seconds = self.start_seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        # purge_step hides what was logged after the checkpoint, so that no step shows twice
        self.writer = SummaryWriter(self.folder, purge_step=self.start_step + 1)
        self.cleanup.callback(self.writer.close)
        rows = "\n".join(f"|{name}|{value}|" for name, value in self.record["args"].items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.last_line, self.status = time.monotonic(), {}
        self.recent_steps = deque([(self.last_line, self.start_step)])  # of the last minute
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        batch_size = args.num_envs * args.num_steps
        total = args.total_timesteps // batch_size * batch_size  # whole iterations
        self.progress = tqdm(total=total, initial=self.start_step, unit_scale=True, bar_format=bar, disable=None)
        self.cleanup.callback(self.progress.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        threads = torch.get_num_threads()
        say(f"{self.record['env_id']} on {self.record['device']}, {threads} CPU threads; run folder {self.folder}")

    def make_folder(self):
        """runs/{env}__{exp_name}__{seed}__{unix time}/"""
        name = f"{self.record['env_id'].replace('/', '_')}__{self.args.exp_name}__{self.args.seed}"
        while True:
            self.folder = Path(self.args.run_dir) / f"{name}__{int(time.time())}"
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                if not self.folder.is_dir():
                    raise
                time.sleep(1)  # a run of the same name began in this second
        self.lock()

    def open(self, folder):
        """The run to resume: its checkpoint, its id, and the versions, commit and device it had before, if they changed."""
        self.folder = folder
        self.lock()
        before = json.loads((folder / "args.json").read_text())
        changed = {key: before.get(key) for key in ("versions", "commit", "device") if before.get(key) != self.record[key]}
        self.record |= {"run_id": before["run_id"], "earlier": before.get("earlier", []) + [changed] * bool(changed)}
        if (folder / "checkpoint.pt").exists():
            self.checkpoint = load_checkpoint(folder, "--resume")

    def lock(self):
        """Only one process may train a run. The operating system releases the lock of a process that is killed."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            fail(f"--resume {self.args.resume}: another process is training this run")
        self.cleanup.callback(lock.release)

    def track(self):
        """Starts the W&B run, or continues it. W&B logs what TensorBoard gets."""
        import wandb  # a second and 20 MB that only a tracked run pays

        self.wandb = wandb
        try:
            wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                group=self.args.wandb_group,
                tags=self.args.wandb_tags.split(",") if self.args.wandb_tags else None,
                id=self.record["run_id"],
                name=self.folder.name,
                resume="allow",
                dir=self.folder.parent,  # in the run folder W&B would find its own copies of the event files
                config=self.record["args"] | {key: value for key, value in self.record.items() if key != "args"},
                sync_tensorboard=True,  # with global_step as the x axis
                save_code=True,
            )
        except (wandb.errors.Error, ValueError) as error:
            if not self.args.resume:
                shutil.rmtree(self.folder)
            fail(f"--track: {one_line(error)}")

    def on_signal(self, number, frame):
        """The first signal ends the run after this iteration, the second one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            sys.exit(128 + number)
        with contextlib.suppress(OSError):  # not print, which may be what the signal has interrupted
            os.write(2, b"\nfinishing this iteration, then saving; Ctrl-C again quits now\n")

    def exit_if_not_finite(self, global_step, values):
        for name, value in values.items():
            if not math.isfinite(value):
                saved = (self.folder / "checkpoint.pt").exists()
                kept = f"{self.folder / 'checkpoint.pt'} is from before" if saved else "there is no checkpoint yet"
                sys.exit(f"{SCRIPT}: {name} is {value} at step {global_step:,}; the run ends, {kept}")

    def log(self, global_step, stats, seconds):
        """Logs the iterations since the last call, which took `seconds`; ends the run if a number is not finite."""
        self.exit_if_not_finite(global_step, stats)
        self.seconds += seconds
        stats["charts/SPS"] = (global_step - self.start_step) / (self.seconds - self.start_seconds)
        for name, value in stats.items():
            self.writer.add_scalar(name, value, global_step)
        if "charts/episodic_return_100" in stats:
            self.status["return"] = f"{stats['charts/episodic_return_100']:.1f}"

        now = time.monotonic()
        self.recent_steps.append((now, global_step))
        while self.recent_steps[0][0] < now - 60 and len(self.recent_steps) > 2:
            self.recent_steps.popleft()
        then, first_step = self.recent_steps[0]
        speed = (global_step - first_step) / (now - then)
        left = tqdm.format_interval((self.progress.total - global_step) / speed)
        known = [f"{name} {value}" for name, value in self.status.items()]
        status = ", ".join([*known, f"{speed:,.0f} steps/s", f"{left} left"])
        self.progress.set_postfix_str(status, refresh=False)
        self.progress.update(global_step - self.progress.n)
        if self.progress.disable and now > self.last_line + 60:  # no terminal: one line a minute
            self.last_line = now
            say(f"step {global_step:,}, {status}")

    def save(self, global_step, **state):
        # the last gradient step can break the policy after its losses were finite
        weights = sum(tensor.sum().item() for tensor in state["agent"].values())
        self.exit_if_not_finite(global_step, {"the sum of the weights": weights})
        self.writer.flush()
        buffer = io.BytesIO()
        torch.save({"global_step": global_step, "seconds": self.seconds, **state}, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())

    def evaluate(self, policy, global_step):
        """Scores of the policy, [] if there is to be no evaluation or a signal ends it."""
        if self.signals or not self.args.eval_episodes:
            return []
        video = self.folder / "videos" / f"{global_step}.mp4" if self.args.capture_video else None
        scores = evaluate_and_film(policy, self.args, self.device, video, self.signals)
        if scores:
            self.exit_if_not_finite(global_step, {"the mean return of the evaluation": float(np.mean(scores))})
            self.writer.add_scalar("eval/episodic_return", np.mean(scores), global_step)
            self.status["last evaluation"] = f"{np.mean(scores):.1f}"
        if scores and video and self.args.track:
            self.wandb.log({"videos/eval": self.wandb.Video(str(video), format="mp4"), "global_step": global_step})
        return scores

    def finish(self, global_step, scores):
        """Writes result.json. After a signal, prints how to resume instead."""
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            ending = f"{name} at step {global_step:,}, saved; continue with --resume {self.folder}"
        else:
            result = {
                "score": float(np.mean(scores)) if scores else None,
                "score_stderr": float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
                "returns": scores,
                "global_step": global_step,
                "seconds": self.seconds,
                "steps_per_second": global_step / self.seconds,
                **self.record,
            }
            write_json(self.folder / "result.json", result)
            score = f"score {result['score']:.1f} over {len(scores)} episodes" if scores else "not evaluated"
            ending = f"{global_step:,} steps in {self.seconds:.0f} s, {score}; {self.folder / 'result.json'}"
            if self.args.track:
                self.wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
        self.progress.close()
        self.writer.close()
        if self.args.track:
            self.wandb.finish()
        say(ending)
        if self.signals:
            sys.exit(128 + self.signals[0])


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, content):
    """`content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def git_commit() -> str | None:
    """The commit of this script's checkout, followed by "-dirty" if files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_run(run_folder):
    """The arguments and the checkpoint of a run."""
    args = Args(**json.loads(Path(run_folder, "args.json").read_text())["args"])
    return args, torch.load(Path(run_folder, "checkpoint.pt"), map_location="cpu", weights_only=True)


def load_checkpoint(folder, argument):
    """Loads a run's checkpoint, or fails in one line."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        checkpoint["seconds"], checkpoint["agent"]  # KeyError if it is of something else
        return checkpoint
    except Exception as error:  # torch has no common type for them
        fail(f"{argument} {folder}: cannot load its checkpoint.pt ({type(error).__name__})")


def evaluate_and_film(policy, args, device, video, stop=()):
    """`evaluate`, with a video that is written completely or not at all."""
    if not video:
        return evaluate(policy, args, device, None, stop)
    video.parent.mkdir(exist_ok=True)
    unfinished = video.with_name("unfinished.mp4")
    try:
        scores = evaluate(policy, args, device, unfinished, stop)
        if scores:
            os.replace(unfinished, video)
        return scores
    finally:
        unfinished.unlink(missing_ok=True)


# --- command line -----------------------------------------------------------------------------------------------------

# the groups of --help, by their first argument
GROUPS = {
    "alpha": "symmetric loss",
    "noise": "noise",
    "env_id": "environment",
    "total_timesteps": "algorithm",
    "eval_episodes": "evaluation",
    "track": "logging",
    "exp_name": "run and machine",
}
# names of other libraries
HINTS = {
    "num-minibatches": "minibatch-size",
    "batch-size": "minibatch-size",
    "num-updates": "total-timesteps",
    "clip-vloss": None,  # close to --clip-coef, which is something else
    "n-steps": "num-steps",
    "n-envs": "num-envs",
    "n-epochs": "update-epochs",
    "noptepochs": "update-epochs",
    "clip-range": "clip-coef",
    "lr": "learning-rate",
    "env": "env-id",
}
LENGTH = "total_timesteps"  # the argument for the length of a run
TRAINING_ONLY = ("track", "capture_video", "compile")  # switches of a run that --evaluate does not take over
# what may change with --resume, and with --evaluate
RESUMABLE = "total_timesteps track wandb_project_name wandb_entity wandb_group wandb_tags eval_episodes eval_interval"
RESUMABLE = [*RESUMABLE.split(), "capture_video", "num_threads", "cuda", "compile", "checkpoint_interval"]
EVALUABLE = ["seed", "eval_episodes", "capture_video", "num_threads", "cuda"]


def say(line):
    """One line on stdout, at once. A closed pipe or a full disk there does not end the run."""
    try:
        print(f"{SCRIPT}: {line}", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def fail(message):
    """Bad input: one line on stderr, exit status 2."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def flag(name):
    return f"--{name.replace('_', '-')}"


def require(args, name, accepted, expected):
    """Unless `accepted`: one line that names the argument, its value and what is expected, exit status 2."""
    if not accepted:
        fail(f"{flag(name)} {getattr(args, name)}: expected {expected}")


def read_command_line(argv, defaults):
    """The command line as Args: tyro with the groups of --help, hints for unknown names, and errors of one line."""
    names = {flag(field.name) for field in fields(Args)}
    for word in argv:
        name = word.split("=")[0].replace("_", "-").replace("--no-", "--")
        if word.startswith("--") and name not in names | {"--help"}:
            close = [f"--{HINTS[name[2:]]}"] if name[2:] in HINTS else difflib.get_close_matches(name, names, n=1, cutoff=0.75)
            hint = next((f"; did you mean {other}?" for other in close if other in names), "; see --help")
            fail(f"{word.split('=')[0]}: unknown argument{hint}")
    switches = {flag(field.name) for field in fields(Args) if field.type is bool}
    for name, value in itertools.pairwise(argv):
        if value in ("True", "False") and name.replace("_", "-").replace("--no-", "--") in switches:
            fail(f"{name} {value}: a switch takes no value; write {name} or {name.replace('--', '--no-', 1)}")

    about = pydantic.TypeAdapter(Args).json_schema()["properties"]
    groups, title = {}, None
    for field in fields(Args):
        title = GROUPS.get(field.name, title)
        helped = Annotated[field.type, tyro.conf.arg(help=about[field.name]["description"])]
        groups.setdefault(title, []).append((field.name, helped, getattr(defaults, field.name)))
    groups = {title.replace(" ", "_"): make_dataclass(title.replace(" ", "_"), group) for title, group in groups.items()}
    Grouped = make_dataclass("Grouped", [(title, tyro.conf.OmitArgPrefixes[group]) for title, group in groups.items()])
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(Grouped, args=argv, prog=SCRIPT, description=Args.__doc__)
    except SystemExit as stopped:
        if stopped.code:  # tyro's box of several lines, as one line
            text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{3,}|[|+]", " ", captured.getvalue()).split())
            titles = "Value error|Parsing error|Missing argument|Invalid choice|Unrecognized options"
            text = re.sub(rf"^({titles}) (?=[A-Z]|invalid)", "", text)
            fail(re.split(r" (For full|Argument) helptext", text)[0] + "; see --help")
        raise
    except BrokenPipeError:  # `--help | head` has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()
    return Args(**{name: value for group in asdict(parsed).values() for name, value in group.items()})


def parse_args(argv, defaults):
    """The command line as Args. With --resume or --evaluate, that run's own arguments, of which some may change."""
    args = read_command_line(argv, defaults)
    if args.resume and args.evaluate:
        fail("--resume and --evaluate: expected one of them")
    if not (args.resume or args.evaluate):
        return args
    name, folder, allowed = ("resume", args.resume, RESUMABLE) if args.resume else ("evaluate", args.evaluate, EVALUABLE)
    try:
        saved = json.loads(Path(folder, "args.json").read_text())
        if saved["script"] != SCRIPT:
            fail(f"{flag(name)} {folder}: a run of {saved['script']}; expected a run of {SCRIPT}")
        own = replace(Args(**saved["args"]), **{name: folder})
        if name == "evaluate":
            own = replace(own, **dict.fromkeys(TRAINING_ONLY, False))
        saved["run_id"]  # KeyError for a folder without one
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{flag(name)} {folder}: not the folder of a run of this script; expected one with its args.json ({error})")
    args = read_command_line(argv, own)
    for field in fields(Args):
        value, old = getattr(args, field.name), getattr(own, field.name)
        if value != old and field.name not in allowed:
            others = ", ".join(map(flag, allowed))
            fail(f"{flag(field.name)} {value}: with {flag(name)} the run keeps its own, {old}; only {others} may change")
    longer = getattr(args, LENGTH) >= getattr(own, LENGTH)
    require(args, LENGTH, longer, f"{getattr(own, LENGTH)}, the run's own, or more")
    return args


def check_args(args):
    """Rejects invalid arguments before any file is written."""
    try:
        pydantic.TypeAdapter(Args).validate_python(asdict(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        fail(f"{flag(first['loc'][0])} {first['input']}: {re.sub('^(Input|String|Value) should', 'must', first['msg'])}")
    batch_size = args.num_envs * args.num_steps
    require(args, "total_timesteps", args.total_timesteps >= batch_size, f"num_envs x num_steps = {batch_size} or more")
    require(args, "capture_video", args.eval_episodes > 0 or not args.capture_video, "--eval-episodes 1 or more with it")
    require(args, "evaluate", args.eval_episodes > 0 or not args.evaluate, "--eval-episodes 1 or more with it")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    require(args, "compile", compiler or not args.compile, "no --compile, or a C++ compiler on the PATH")
    check_env(args)
    check_tracking(args)


def check_tracking(args):
    """Fails early if W&B cannot start. Last of all checks, as W&B may ask for a key."""
    mode, modes = os.environ.get("WANDB_MODE", "online"), ("online", "offline", "shared", "disabled", "dryrun", "run")
    if args.track and mode not in modes:
        fail(f"--track: WANDB_MODE is {mode}; expected one of {', '.join(modes)}")
    if args.track and mode == "online":
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            fail(f"--track: {str(error).splitlines()[0]} Log in, set WANDB_API_KEY, or use WANDB_MODE=offline")


# --- main -------------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Asks glibc to keep freed memory. Otherwise the kernel zeroes every large array again, which takes a sixth of the time
    of PPO on Atari on two cores. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def has_finished(args):
    """Whether the run to resume has nothing left to do."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        batch_size = args.num_envs * args.num_steps
        done = json.loads(Path(args.resume, "result.json").read_text())["global_step"]
        if done >= args.total_timesteps // batch_size * batch_size:
            say(f"{args.resume} has finished its {done:,} steps; a larger --total-timesteps continues it")
            return True
    return False


def evaluate_run(args):
    """--evaluate: plays the policy of a finished or stopped run. Writes nothing but the video."""
    folder = Path(args.evaluate).resolve()
    if not (folder / "checkpoint.pt").exists():
        fail(f"--evaluate {args.evaluate}: has no checkpoint yet")
    checkpoint = load_checkpoint(folder, "--evaluate")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    video = folder / "videos" / f"{checkpoint['global_step']}__seed{args.seed}.mp4" if args.capture_video else None
    scores = evaluate_and_film(load_agent(args, checkpoint, device), args, device, video)
    stderr = f" +- {np.std(scores, ddof=1) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else ""
    say(f"returns {', '.join(f'{score:.1f}' for score in scores)}")
    say(f"score {np.mean(scores):.1f}{stderr} at step {checkpoint['global_step']:,}{f'; {video}' if video else ''}")


def main(args):
    keep_freed_memory()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.evaluate:
        evaluate_run(args)
    elif not (args.resume and has_finished(args)):
        run = Run(args)
        try:
            with run.cleanup:
                train(args, run)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            sys.exit(f"{SCRIPT}: {error.strerror}; the run ends, {run.folder} keeps the last checkpoint, if there is one")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks does not end the run
    for number in (signal.SIGINT, signal.SIGTERM):  # until `Run` takes over; sys.exit closes environments and videos
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    arguments = parse_args(sys.argv[1:], Args())
    check_args(arguments)
    main(arguments)
