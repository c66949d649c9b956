"""DSA2C: A2C over bins of actions with the symmetric RL loss, in one file (Byun and Perrault, ICML 2025, arXiv:2405.17618).

Each of the D dimensions of a Box is cut into bins; Discrete and MultiDiscrete actions are bins already. Each dimension has a
categorical distribution. The agent takes bins i = (i_1 .. i_D) with joint probability pi_i; A is the advantage.

            L_a2c  = -A log pi_i
    Eq. 7   L_ra2c = -A Z sum_{j != i} pi_j      Z < 0, -1 in the paper
    Eq. 9   L      = alpha L_a2c + beta L_ra2c

Eq. 7 as printed has another sign for A < 0 (`--literal-signs`; docs/loss.md, fact 1).

    python dsa2c_continuous.py --env-id CartPole-v1 --total-timesteps 200_000           # a first run, half a minute
    python dsa2c_continuous.py --env-id Hopper --beta 10 --noise gaussian               # DSA2C, noisy rewards
    python dsa2c_continuous.py --env-id Hopper --alpha 1 --beta 0 --noise gaussian      # DA2C; with --num-bins 0 Gaussian A2C
    python dsa2c_continuous.py --env-id Hopper --beta 10 --mean-weight --noise gaussian # the control: samples weigh the same

The algorithm ends at the line "Operations". docs/differences.md lists what differs from the paper and its released code.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "mujoco==4.0.0", "box2d==2.3.10", "pygame-ce==2.5.8", "numpy==2.4.6",
#     "tyro==1.0.17", "pydantic==2.14.4", "filelock==4.2.12", "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1",
# ]
# ///

import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies few observations at a time: more threads are slower

import filelock
import gymnasium
import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(config={"allow_inf_nan": False, "extra": "forbid"})
class Args:
    """A2C, DA2C and DSA2C. The defaults are the paper's DSA2C without noise; `--alpha 1 --beta 0` is DA2C."""

    # symmetric loss and noise
    alpha: NonNegativeFloat = 0.5  # weight of the A2C loss (Eq. 9)
    beta: NonNegativeFloat = 0.2  # weight of the reverse loss (Eq. 9); the paper uses 0.2 to 5 without noise, 0.2 to 10 with
    Z: Annotated[float, Field(lt=0)] = -1.0  # the constant that stands for log 0 in the reverse loss (Eq. 7)
    literal_signs: bool = False  # use the sign that Eq. 7 prints for A < 0; its gradient opposes A2C's
    mean_weight: bool = False  # a control: replace each sample's weight alpha + beta |Z| pi_i by its mean over the rollout
    reverse_prob: Literal["joint", "factored"] = "joint"  # one reverse term per action (joint, as released) or per dimension
    noise: Literal["none", "gaussian"] = "none"  # gaussian: adds N(0, noise_std^2) to the learner's normalised rewards
    noise_std: NonNegativeFloat = 0.05  # standard deviation of the noise

    # environment and algorithm
    env_id: str = "Hopper"  # a task of the paper (Hopper is Hopper-v4), or a Gymnasium id (also module:Id)
    max_episode_steps: PositiveInt | None = None  # time limit of an episode; by default the environment's own
    num_bins: Literal[0] | Annotated[int, Field(ge=2)] = 11  # bins of each dimension of a Box; 0: a Gaussian policy
    total_timesteps: PositiveInt = 2_000_000  # environment steps, rounded down to whole iterations
    learning_rate: PositiveFloat = 7e-4  # learning rate of RMSprop
    rmsprop_alpha: Probability = 0.99  # smoothing constant of RMSprop
    rmsprop_eps: PositiveFloat = 1e-5  # epsilon of RMSprop, outside the root
    num_envs: PositiveInt = 4  # number of environments, stepped one after another
    num_steps: PositiveInt = 8  # steps of each environment per rollout
    anneal_lr: bool = False  # anneal the learning rate linearly to 0
    gamma: Probability = 0.99  # discount factor; the paper uses 0.9999 on Swimmer
    gae_lambda: Probability = 1.0  # lambda of GAE; 1 is the return of up to num_steps steps plus the bootstrap
    norm_adv: bool = False  # normalise the advantages of each rollout
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss (mean squared error without a factor 1/2)
    max_grad_norm: PositiveFloat = 0.5  # maximum norm of the gradient

    # evaluation, logging, machine
    eval_episodes: NonNegativeInt = 10  # episodes that score the policy: raw rewards, no noise, greedy actions
    eval_interval: NonNegativeInt = 0  # evaluate every this many steps; 0: only at the end
    capture_video: bool = False  # film the first episode of each evaluation, in videos/ of the run folder
    log_interval: PositiveInt = 100  # log the means of this many iterations
    track: bool = False  # log to Weights & Biases; WANDB_MODE=offline, WANDB_RUN_GROUP, WANDB_TAGS and WANDB_DIR work
    wandb_project_name: str | None = None  # project in W&B; by default WANDB_PROJECT
    wandb_entity: str | None = None  # user or team in W&B; by default WANDB_ENTITY
    exp_name: Annotated[str, Field(pattern=r"^[\w.+-]{1,100}$")] | None = None  # in the run folder's name; default: the arm
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # seed of everything random
    run_dir: str = "runs"  # folder in which the run folder is made
    resume: str | None = None  # continue the run in this folder with its own arguments
    evaluate: str | None = None  # play --eval-episodes episodes with the policy of the run in this folder, and exit
    checkpoint_interval: PositiveInt = 1000  # save a checkpoint every this many iterations, a multiple of log_interval
    cuda: bool = False  # use a GPU if there is one; networks this small gain nothing from it
    compile: bool = False  # torch.compile the gradient step; gains little with a network this small
    num_threads: NonNegativeInt = 1  # CPU threads of torch; 0: all cores, slower for networks this small


# Purposes of generators. Each is seeded with [seed, purpose, step], but without the step for evaluations: all start alike
EVALUATION, NOISE, ENVS, ACTIONS = 1, 2, 3, 4


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_a2c_loss(logprobs, advantages, Z=-1.0, literal_signs=False):
    """L_a2c and L_ra2c (Eq. 7), means over the batch. The inputs are [B]; the caller weights (Eq. 9).

    With Z = -1 the gradient of L_ra2c is pi_i times that of L_a2c: together they weight a sample by alpha + beta pi_i. With
    literal_signs it opposes that of L_a2c where A < 0.
    """
    policy_loss = -(advantages * logprobs).mean()

    signed = advantages.abs() if literal_signs else advantages
    # expm1 is precise where pi_i is nearly 1. The clamp is for Gaussian policies (dsa2c_continuous.py, with beta 0), whose
    # densities can exceed 1: an infinite loss times beta 0 would be NaN.
    others = -logprobs.clamp(max=0).expm1()  # sum_{j != i} pi_j = 1 - pi_i
    reverse_loss = (-signed * Z * others).mean()
    return policy_loss, reverse_loss


def factored_a2c_reverse(logprobs, advantages, Z=-1.0, literal_signs=False):
    """L_ra2c with a term for each dimension: -A Z sum_d (1 - pi_d). logprobs: [B, D], of each dimension's own bin."""
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
    if args.mean_weight:  # the control: in the gradient each sample has the mean pi_i as its weight, not its own
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


def layer_init(layer, std: float = math.sqrt(2)):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Separate actor and critic, two hidden layers of 64 with tanh. counts: the bins of each action dimension; 0: Gaussian."""

    def __init__(self, obs_dim: int, counts: list[int]):
        super().__init__()

        def mlp(outputs: int, std: float) -> nn.Sequential:
            hidden = [layer_init(nn.Linear(obs_dim, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
            return nn.Sequential(*hidden, layer_init(nn.Linear(64, outputs), std=std))

        self.num_bins = max(counts)
        self.actor = mlp(len(counts) * (self.num_bins or 1), std=0.01)
        self.critic = mlp(1, std=1)
        self.log_std = None if self.num_bins else nn.Parameter(torch.zeros(len(counts)))
        if min(counts) < self.num_bins:
            # the bins that a dimension lacks have probability 0, and with it gradient 0: they stay masked
            lacking = torch.arange(self.num_bins) >= torch.tensor(counts).unsqueeze(-1)
            self.actor[-1].bias.data[lacking.flatten()] = -1e8

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [B, obs_dim], actions [B, D] (bins; real numbers if Gaussian) -> the log-probability of each dimension's
        action [B, D], the joint entropy [B], values [B]."""
        output, values = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.num_bins:
            all_logprobs = F.log_softmax(output.unflatten(-1, (-1, self.num_bins)), dim=-1)
            logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return logprobs, -(all_logprobs.exp() * all_logprobs).sum((-2, -1)), values
        scaled = (actions - output) * (-self.log_std).exp()
        logprobs = -0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return logprobs, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(obs)), values


def numpy_actor(agent):
    """Layers, num_bins and standard deviation for `act`. In numpy one observation takes a fraction of torch's time."""
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


# --- environment ------------------------------------------------------------------------------------------------------


def resolve_env(env_id):
    """The name in the run folder and the Gymnasium id. The paper's tasks have short names: Hopper is Hopper-v4."""
    v4 = ("Ant", "HalfCheetah", "Hopper", "HumanoidStandup", "InvertedDoublePendulum", "Swimmer", "Walker2d")
    v3 = ("BipedalWalker", "LunarLanderContinuous")
    env_id += "-v4" if env_id in v4 else "-v3" if env_id in v3 else ""
    return env_id.rpartition(":")[2], env_id


class PlainEnv(gymnasium.Wrapper):
    """Observations as flat float64 arrays of their own, rewards as float, ends as bool, whatever the environment returns."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.flatten_space(env.observation_space)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.plain(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward = np.asarray(reward, dtype=np.float64).item()
        if not math.isfinite(reward):
            raise FloatingPointError(f"a reward of the environment is {reward}")
        return self.plain(obs), reward, bool(terminated), bool(truncated), info

    def plain(self, obs):
        obs = np.array(obs, dtype=np.float64).reshape(self.observation_space.shape)  # a copy: environments may share one array
        if not np.isfinite(obs).all():
            raise FloatingPointError(f"an observation of the environment is {obs}")
        return obs


def make_env(args, seed=None, **kwargs):
    """One environment with a time limit. `seed` seeds the global generators and the spaces: it may draw from them."""
    if seed is not None:
        for seed_global in (random.seed, np.random.seed, torch.manual_seed):
            seed_global(seed)
    with warnings.catch_warnings():
        # the paper's tasks are the -v4 ones; some of their models have a deprecated attribute
        warnings.filterwarnings("ignore", message=".*(out of date|settotalmass).*")
        _, env_id = resolve_env(args.env_id)
        env = gymnasium.make(env_id, disable_env_checker=True, max_episode_steps=args.max_episode_steps, **kwargs)
    for space in (env.unwrapped.action_space, env.unwrapped.observation_space):
        space.seed(seed)
    torch.set_default_dtype(torch.float32)  # the environment's module may have changed it
    return PlainEnv(env)


def make_bins(space: gymnasium.Space, num_bins: int) -> tuple[list[int], np.ndarray | None]:
    """How many bins each dimension has, [D], and the actions that they stand for, [D, bins]; 0 and None: Gaussian."""
    if isinstance(space, Box):
        bins = np.linspace(space.low.ravel(), space.high.ravel(), num_bins, axis=-1, dtype=space.dtype) if num_bins else None
        return [num_bins] * math.prod(space.shape), bins
    counts = np.ravel(space.n if isinstance(space, Discrete) else space.nvec).tolist()
    return counts, np.ravel(space.start)[:, None] + np.arange(max(counts))


def to_env(actions: np.ndarray, space: gymnasium.Space, bins: np.ndarray | None) -> np.ndarray:
    """What the environments get, [num_envs, *space.shape]: the actions of the bins; Gaussian ones clipped to the box."""
    if bins is None:
        return actions.reshape(-1, *space.shape).clip(space.low, space.high)
    return bins[np.arange(len(bins)), actions].reshape(-1, *space.shape)


def step_envs(envs: list[PlainEnv], env_actions: np.ndarray):
    """Steps each environment. One whose episode ends is reset within the same step (SAME_STEP). Returns obs [num_envs, obs_dim]
    after the resets, rewards, terminated, truncated [num_envs], and final_obs: {index of an ended episode: its last obs}.
    """
    steps, final_obs = [], {}
    for i, env in enumerate(envs):
        obs, reward, terminated, truncated, _ = env.step(env_actions[i])
        if terminated or truncated:
            final_obs[i] = obs
            obs, _ = env.reset()
        steps.append((obs, reward, terminated, truncated))
    return *(np.array(column) for column in zip(*steps, strict=True)), final_obs


class RunningMeanStd:
    """Running mean and variance of all rows so far (Welford 1962). They start at 0 and 1 with a count of 1e-4, as in SB3."""

    def __init__(self, mean, var, count: float = 1e-4):
        self.mean, self.var, self.count = np.array(mean), np.array(var), count

    def update(self, rows: np.ndarray) -> None:
        """rows: [N, *shape]."""
        for row in rows:
            self.count += 1
            delta = row - self.mean
            self.mean = self.mean + delta / self.count
            self.var = self.var + (delta * (row - self.mean) - self.var) / self.count

    def state(self) -> list:
        return [self.mean.tolist(), self.var.tolist(), self.count]


def normalise_obs(obs: np.ndarray, stats: RunningMeanStd) -> np.ndarray:
    """Observations with mean 0 and standard deviation 1, clipped to +-10; float32."""
    scaled = (obs - stats.mean) / np.sqrt(stats.var + 1e-8)
    return np.minimum(np.maximum(scaled, -10), 10).astype(np.float32)  # np.clip takes three times as long for one row


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


def update(agent, weights, optimizer, args, batch):
    """One gradient step on the whole rollout. Returns the statistics as tensors: .item() would wait for the GPU.

    weights: the agent's flat parameter. batch: the inputs of `rollout_loss` after `args`.
    """
    weights.grad.zero_()
    loss, stats = rollout_loss(agent, args, *batch)
    loss.backward()
    # clip_grad_norm_ written out: the call takes three times as long for one small tensor
    norm = weights.grad.norm()
    weights.grad.mul_((args.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
    optimizer.step()
    return stats | {"losses/grad_norm": norm, "losses/grad_clipped": (norm > args.max_grad_norm).float()}


def train(args, run):
    """Acts, learns and logs until `total_timesteps`. `run` keeps step, curves, checkpoints and scores (see Operations)."""
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    # a resumed run seeds all its generators from the step it resumes at
    action_rng, noise_rng, env_rng = (np.random.default_rng([args.seed, i, run.global_step]) for i in (ACTIONS, NOISE, ENVS))
    seeds = env_rng.integers(2**31, size=args.num_envs).tolist()
    envs = [run.cleanup.enter_context(contextlib.closing(make_env(args, seed))) for seed in seeds]
    space, (obs_dim,) = envs[0].action_space, envs[0].observation_space.shape
    counts, bins = make_bins(space, args.num_bins)
    with torch.random.fork_rng(devices=[]):  # leave torch's global generator to the environments
        torch.manual_seed(args.seed + run.global_step)
        agent = Agent(obs_dim, counts).to(run.device)
    weights = flatten_parameters(agent)  # one long parameter: the optimiser and the norm take one call each
    optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    update_fn = update
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compiles the backward pass in the same graph
        update_fn = torch.compile(update)
    obs_stats, return_stats = RunningMeanStd(np.zeros(obs_dim), np.ones(obs_dim)), RunningMeanStd(0.0, 1.0)
    recent_returns = deque(maxlen=100)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        optimizer.load_state_dict(run.checkpoint["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        obs_stats, return_stats = (RunningMeanStd(*run.checkpoint[name]) for name in ("obs_stats", "return_stats"))
        recent_returns.extend(run.checkpoint["recent_returns"])

    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((*shape, obs_dim), dtype=np.float32)
    actions = np.zeros((*shape, len(counts)), dtype=np.int64 if agent.num_bins else np.float32)
    draw = action_rng.gumbel if agent.num_bins else action_rng.standard_normal
    exploration_shape = (*actions.shape[1:], agent.num_bins) if agent.num_bins else actions.shape[1:]
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    discounted_returns, episode_returns, episode_lengths = np.zeros((3, args.num_envs))
    raw_obs = np.array([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    obs_stats.update(raw_obs)
    next_obs = normalise_obs(raw_obs, obs_stats)
    # since the last log
    finished_returns, finished_lengths, history, fits, reward_noises, seconds = [], [], [], [], [], 0.0

    for iteration in range(run.global_step // batch_size, num_iterations):
        start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        learning_rate = fraction_left * args.learning_rate
        # a tensor: for each new Python number torch.compile would compile anew
        optimizer.param_groups[0]["lr"] = torch.tensor(learning_rate) if args.compile else learning_rate

        # act, after a check: the last gradient step may have made weights infinite or NaN
        run.end_if_not_finite({"the sum of the weights": weights.sum().item()})
        actor, truncations = numpy_actor(agent), []
        reward_noise = args.noise_std * noise_rng.standard_normal(shape) if args.noise == "gaussian" else np.zeros(shape)
        for step in range(args.num_steps):
            run.global_step += args.num_envs
            obs[step] = next_obs
            if step % 64 == 0:  # in blocks: the noise of a whole rollout can take gigabytes
                exploration = draw(size=(min(64, args.num_steps - step), *exploration_shape))
            actions[step] = act(actor, next_obs, exploration[step % 64])
            raw_obs, raw_rewards, terminated, truncated, final_obs = step_envs(envs, to_env(actions[step], space, bins))
            obs_stats.update(raw_obs)
            next_obs = normalise_obs(raw_obs, obs_stats)
            discounted_returns = args.gamma * discounted_returns + raw_rewards
            return_stats.update(discounted_returns)
            scaled_rewards = raw_rewards / np.sqrt(return_stats.var + 1e-8)
            rewards[step] = np.minimum(np.maximum(scaled_rewards, -10), 10) + reward_noise[step]
            dones[step] = terminated | truncated

            episode_returns += raw_rewards
            episode_lengths += 1
            for i, last_obs in final_obs.items():
                finished_returns.append(float(episode_returns[i]))
                finished_lengths.append(int(episode_lengths[i]))
                discounted_returns[i], episode_returns[i], episode_lengths[i] = 0, 0, 0
                if not terminated[i]:  # truncated by the time limit: bootstrap from the final observation
                    truncations.append((step, i, normalise_obs(last_obs, obs_stats)))

        # learn; the weights are still those that acted, so one batch gives the values of all steps
        torch.set_grad_enabled(True)  # an environment may have switched gradients off
        batch = [torch.from_numpy(array).flatten(0, 1).to(run.device) for array in (obs, actions)]
        with torch.no_grad():
            values = agent.critic(batch[0]).view(shape)
            next_values = agent.critic(torch.from_numpy(next_obs).to(run.device)).squeeze(-1)
            if truncations:
                steps, indices, last_observations = zip(*truncations, strict=True)
                final_values = agent.critic(torch.from_numpy(np.array(last_observations)).to(run.device)).squeeze(-1)
                rewards[steps, indices] += args.gamma * final_values.cpu().numpy()
            rewards_t, dones_t = torch.as_tensor(np.stack([rewards, dones]), device=run.device)  # one transfer
            advantages, returns = compute_gae(rewards_t, values, dones_t, next_values, args.gamma, args.gae_lambda)
        batch += [advantages.flatten(), returns.flatten()]
        shares = grad_shares(agent, args, rollout_loss, batch) if (iteration + 1) % args.log_interval == 0 else {}
        history.append(update_fn(agent, weights, optimizer, args, batch))
        fits.append(torch.stack([returns, values]))
        reward_noises.append(reward_noise)
        seconds += time.perf_counter() - start

        # log, also before a stop: the statistics since the last log would be lost
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
            if all_returns.var(correction=0) > 1e-10:  # else there is nothing to explain but rounding
                unexplained = (all_returns - all_values).var(correction=0) / all_returns.var(correction=0)
                stats["losses/explained_variance"] = (1 - unexplained).item()
            stats["charts/learning_rate"] = learning_rate
            run.log(stats, seconds)
            finished_returns, finished_lengths, history, fits, reward_noises, seconds = [], [], [], [], [], 0.0
        if args.eval_interval and run.global_step % args.eval_interval < batch_size and not last:
            run.evaluate((agent, obs_stats))
        if last or stopping or (iteration + 1) % args.checkpoint_interval == 0:
            state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "recent_returns": list(recent_returns)}
            state |= {"obs_stats": obs_stats.state(), "return_stats": return_stats.state()}
            run.save(**state)  # after a signal the run ends here
    run.finish(run.evaluate((agent, obs_stats)))


# === Operations: nothing below changes what is learned ================================================================

# Parts of the loss, each with the arguments that weight it, for `grad_shares`
PARTS = {"policy": ("alpha", "beta"), "value": ("vf_coef",), "entropy": ("ent_coef",)}
PACKAGES = ("torch", "gymnasium", "mujoco", "box2d", "numpy")  # whose versions decide the numbers
FILM = {"render_mode": "rgb_array"}


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """One flat parameter. The parameters of `module` and their gradients become views of it: the norm takes one call."""
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return flat


def evaluate(policy, args, device, video=None, stop=()):
    """The raw returns of `eval_episodes` episodes, each in a fresh environment: greedy actions, frozen normaliser.

    policy: agent and observation statistics. video: the path for an mp4 of the first episode, which appears when it is whole.
    stop: a list that a signal handler fills to end the evaluation.
    """
    (agent, obs_stats), returns = policy, []
    actor = numpy_actor(agent)
    for seed in np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes).tolist():
        if stop:
            break
        filming = video is not None and not returns
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(random.setstate, random.getstate())  # the environments of the training may draw from these
            cleanup.callback(np.random.set_state, np.random.get_state())
            cleanup.callback(torch.set_rng_state, torch.get_rng_state())
            env = cleanup.enter_context(contextlib.closing(make_env(args, seed, **(FILM if filming else {}))))
            _, bins = make_bins(env.action_space, args.num_bins)
            if filming:
                video.parent.mkdir(exist_ok=True)
                unfinished, fps = video.with_name(f"unfinished_{video.name}"), env.metadata.get("render_fps", 30)
                film = cleanup.enter_context(imageio.get_writer(unfinished, fps=fps, macro_block_size=2))
            obs, _ = env.reset(seed=seed)
            episode_return, done = 0.0, False
            while not done and not stop:
                if filming:
                    film.append_data(env.render())
                actions = act(actor, normalise_obs(obs[None], obs_stats))
                obs, reward, terminated, truncated, _ = env.step(to_env(actions, env.action_space, bins)[0])
                episode_return += reward
                done = terminated or truncated
        if filming and done:
            os.replace(unfinished, video)
        returns.append(episode_return)
    return returns


def load_agent(run_folder, device="cpu"):
    """The trained policy of a run (agent, observation statistics), its arguments and the step that it was saved at."""
    args, checkpoint = load_args(run_folder), torch.load(Path(run_folder, "checkpoint.pt"), device, weights_only=True)
    with contextlib.closing(make_env(args)) as env:
        counts, _ = make_bins(env.action_space, args.num_bins)
        agent = Agent(env.observation_space.shape[0], counts)
    agent.load_state_dict(checkpoint["agent"])
    return (agent.to(device), RunningMeanStd(*checkpoint["obs_stats"])), args, checkpoint["global_step"]


def load_policy(run_folder):
    """A trained policy and an environment for it: `policy(obs)` is the greedy action for `env`."""
    (agent, obs_stats), args, _ = load_agent(run_folder)
    env, actor = make_env(args), numpy_actor(agent)
    _, bins = make_bins(env.action_space, args.num_bins)

    def policy(obs):
        obs = np.asarray(obs, dtype=np.float64).reshape(1, -1)
        return to_env(act(actor, normalise_obs(obs, obs_stats)), env.action_space, bins)[0]

    return policy, env


def name_arm(args):
    """The default --exp-name, with what differs from the arm's own settings: a2c, da2c, dsa2c_a0.5_b0.2_gaussian."""
    baseline = ("da2c" if args.num_bins else "a2c") + (f"_a{args.alpha:g}" if args.alpha != 1 else "")
    parts = {f"dsa2c_a{args.alpha:g}_b{args.beta:g}" if args.beta else baseline: True, "mean": args.mean_weight}
    parts |= {f"Z{args.Z:g}": args.Z != -1, f"{args.num_bins}bins": args.num_bins not in (0, 11)}
    parts |= {args.reverse_prob: args.reverse_prob != "joint", "literal": args.literal_signs, "norm": args.norm_adv}
    parts |= {args.noise: args.noise != "none"}
    return "_".join(part for part, shown in parts.items() if shown)


def check(args):
    """Refuses what this script cannot learn, before anything is created. Plays one step of the environment."""
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    sys.path.append(os.getcwd())  # for module:Id
    batch_size = args.num_envs * args.num_steps
    with contextlib.closing(make_env(args, args.seed % 2**31, **(FILM if args.capture_video else {}))) as env:
        space, observed = env.action_space, env.env.observation_space
        floats = isinstance(space, Box) and space.dtype.kind == "f"
        joint = args.beta > 0 and args.reverse_prob == "joint" and not args.literal_signs
        spaces = f"--env-id {args.env_id}: observations {observed}, actions {space}"
        for accepted, message in (
            (args.checkpoint_interval % args.log_interval == 0, f"--checkpoint-interval: no multiple of {args.log_interval}"),
            (batch_size > 1 or not args.norm_adv, "--norm-adv: expected num_envs x num_steps of 2 or more with it"),
            (joint or not args.mean_weight, "--mean-weight: expected beta above 0, reverse_prob joint and no literal_signs"),
            (args.total_timesteps >= batch_size, f"--total-timesteps {args.total_timesteps}: expected {batch_size} or more"),
            (isinstance(observed, Box), f"{spaces}; expected a Box of observations"),
            (floats or isinstance(space, (Discrete, MultiDiscrete)), f"{spaces}; expected a Box of floats, or (Multi)Discrete"),
            (floats or args.num_bins, f"--num-bins 0: {spaces}; a Gaussian needs a Box of actions"),
            (args.num_bins or not args.beta, "--num-bins 0: expected --beta 0, as a density has no sum over other actions"),
            (not (floats and args.num_bins) or np.isfinite(space.high - space.low).all(), f"{spaces}; these are unbounded"),
            (env.spec.max_episode_steps or not args.eval_episodes, f"{spaces}; no time limit, set --max-episode-steps"),
        ):
            if not accepted:
                raise BadInput(message)
        env.reset(seed=0)
        env.step(to_env(np.zeros((1, math.prod(space.shape)), int), space, make_bins(space, args.num_bins)[1])[0])
        if args.capture_video and getattr(env.render(), "dtype", None) != np.uint8:
            raise BadInput(f"--capture-video: {args.env_id} renders no frames of uint8")


# --- run folder (the same in the four control scripts) ----------------------------------------------------------------

SCRIPT = Path(__file__).name


class BadInput(ValueError):
    """Arguments that do not fit. The command line ends with status 2, as with tyro's own errors."""


def grad_shares(agent, args, loss_fn, batch):
    """The share <g_i, g> / |g|^2 of each of the PARTS of the loss in its gradient g = sum g_i. The shares sum to 1.

    batch: the inputs of `loss_fn` after `args`.
    """
    parameters = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    weights = {weight for own in PARTS.values() for weight in own}
    grads = {}
    for name, own in PARTS.items():
        loss, _ = loss_fn(agent, replace(args, **dict.fromkeys(weights - set(own), 0.0)), *batch)
        grads[name] = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])
    total = sum(grads.values()).double()
    square = (total @ total).clamp(min=1e-300)
    return {f"losses/grad_share_{name}": (grad.double() @ total / square).item() for name, grad in grads.items()}


class Run:
    """A run's folder: args.json, curves, checkpoint.pt, videos, result.json."""

    def __init__(self, args):
        self.args, self.signals, self.checkpoint, self.cleanup = args, [], None, contextlib.ExitStack()
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        env_id, _ = resolve_env(args.env_id)
        describe = "git -c safe.directory='*' describe --always --dirty --abbrev=40 --exclude='*'"
        commit = subprocess.run(describe, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
        self.record = {
            "script": SCRIPT,
            "run_id": (args.track and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],  # a sweep's agent names the run
            "env_id": env_id,
            "args": asdict(args) | {"resume": None},
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
            "commit": commit.strip() or None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        name = f"{env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
        self.folder = Path(args.resume or Path(args.run_dir, name)).resolve()
        self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = filelock.FileLock(self.folder / ".lock")  # the operating system releases it if the process is killed
        try:
            self.cleanup.enter_context(lock.acquire(timeout=0))
        except filelock.Timeout as error:
            raise BadInput(f"--resume {args.resume}: another process is training this run") from error
        if args.resume:
            before = json.loads((self.folder / "args.json").read_text())
            changed = {key: before.get(key) for key in ("versions", "commit", "device") if before.get(key) != self.record[key]}
            self.record |= {"run_id": before["run_id"], "earlier": before.get("earlier", []) + [changed] * bool(changed)}
        if args.resume and (self.folder / "checkpoint.pt").exists():
            self.checkpoint = torch.load(self.folder / "checkpoint.pt", "cpu", weights_only=True)
        self.start_step = self.global_step = self.checkpoint["global_step"] if self.checkpoint else 0
        self.start_seconds = self.seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        if args.track:
            self.track()
        (self.folder / "result.json").unlink(missing_ok=True)  # a resumed run has no result until it ends again
        self.write("args.json", json.dumps(self.record, indent=2).encode())
        self.writer = SummaryWriter(self.folder, purge_step=self.start_step + 1)  # hides what came after the checkpoint
        self.cleanup.callback(self.writer.close)
        rows = "\n".join(f"|{name}|{value}|" for name, value in self.record["args"].items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        if threading.current_thread() is threading.main_thread():  # only it may set signal handlers
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self.cleanup.callback(signal.signal, number, signal.signal(number, self.on_signal))
        print(f"{env_id} on {self.record['device']}, {torch.get_num_threads()} CPU threads; {self.folder}", flush=True)
        self.progress = tqdm(total=args.total_timesteps, initial=self.start_step, unit=" steps", unit_scale=True, disable=None)
        self.cleanup.callback(self.progress.close)
        self.next_line = time.monotonic() + 60

    def track(self):
        """Starts the W&B run, or continues it. W&B logs what TensorBoard gets."""
        import wandb  # a second that only a tracked run pays

        self.wandb = wandb
        names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "name": self.folder.name}
        config = self.record["args"] | {key: value for key, value in self.record.items() if key != "args"}
        wandb.init(**names, id=self.record["run_id"], resume="allow", config=config, sync_tensorboard=True, save_code=True)
        self.cleanup.push(lambda kind, *_: wandb.finish(exit_code=int(kind not in (None, SystemExit))))
        wandb.define_metric("*", step_metric="global_step")
        wandb.define_metric("eval/episodic_return", step_metric="global_step", summary="max,last")

    def on_signal(self, number, frame):
        """The first signal ends the run after this iteration, the second one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            sys.exit(128 + number)
        with contextlib.suppress(OSError):  # the terminal may be gone; not print: the signal may have interrupted one
            os.write(2, b"\nfinishing this iteration, then saving; once more quits now\n")

    def write(self, name, data):
        """A kill at any moment leaves the old file or the new one, whole."""
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)

    def end_if_not_finite(self, values):
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")

    def log(self, stats, seconds):
        """Logs the iterations since the last call, which took `seconds`. Without a terminal prints one line a minute."""
        self.end_if_not_finite(stats)
        self.seconds += seconds
        stats["charts/SPS"] = speed = (self.global_step - self.start_step) / (self.seconds - self.start_seconds)
        for name, value in stats.items():
            self.writer.add_scalar(name, value, self.global_step)
        score = f"return {stats['charts/episodic_return_100']:.1f}" if "charts/episodic_return_100" in stats else ""
        self.progress.set_postfix_str(score, refresh=False)
        self.progress.update(self.global_step - self.progress.n)
        if self.progress.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + 60
            left = tqdm.format_interval((self.progress.total - self.global_step) / speed)
            print(f"step {self.global_step:,}, {speed:,.0f} steps/s, {left} left, {score}", flush=True)

    def save(self, **state):
        """Writes checkpoint.pt. After a signal the run ends here."""
        weights = sum(tensor.sum().item() for tensor in state["agent"].values())
        self.end_if_not_finite({"the sum of the weights": weights})  # the last step can break them after a finite loss
        self.writer.flush()
        buffer = io.BytesIO()
        torch.save({"global_step": self.global_step, "seconds": self.seconds, **state}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())
        self.exit_after_signal()

    def exit_after_signal(self):
        if self.signals:
            self.progress.close()
            name = signal.Signals(self.signals[0]).name
            print(f"{name} at step {self.global_step:,}, saved; continue with --resume {self.folder}", flush=True)
            sys.exit(128 + self.signals[0])

    def evaluate(self, policy):
        """Scores of the policy; [] if there is to be no evaluation or a signal ends it."""
        if not self.args.eval_episodes:
            return []
        video = self.folder / "videos" / f"{self.global_step}.mp4" if self.args.capture_video else None
        scores = evaluate(policy, self.args, self.device, video, self.signals)
        if self.signals:
            return []
        self.end_if_not_finite({"the mean return of the evaluation": float(np.mean(scores))})
        self.writer.add_scalar("eval/episodic_return", np.mean(scores), self.global_step)
        if video and self.args.track:
            self.wandb.log({"videos/eval": self.wandb.Video(str(video), format="mp4"), "global_step": self.global_step})
        return scores

    def finish(self, scores):
        """Writes result.json. After a signal in the last evaluation the run ends without it."""
        self.exit_after_signal()
        score = float(np.mean(scores)) if scores else None
        result = {"score": score, "score_stderr": stderr(scores), "returns": scores, "global_step": self.global_step}
        result |= {"seconds": self.seconds, "steps_per_second": self.global_step / self.seconds}
        self.write("result.json", json.dumps(result | self.record, indent=2, allow_nan=False).encode())
        if self.args.track:
            self.wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
        self.progress.close()
        scored = f"score {score:.1f} over {len(scores)} episodes" if scores else "not evaluated"
        print(f"{self.global_step:,} steps in {self.seconds:.0f} s, {scored}; {self.folder / 'result.json'}", flush=True)


def stderr(scores):
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None


def load_args(run_folder):
    """The arguments of a run. Warns of those that only an earlier version had, and ignores them."""
    try:
        saved = json.loads(Path(run_folder, "args.json").read_text())
    except OSError as error:
        raise BadInput(f"{run_folder} is no run folder ({error})") from error
    if saved["script"] != SCRIPT:
        raise BadInput(f"{run_folder} is a run of {saved['script']}; expected a run of {SCRIPT}")
    gone = saved["args"].keys() - {field.name for field in fields(Args)}
    if gone:
        warnings.warn(f"{run_folder}: ignored arguments of an earlier version: {', '.join(sorted(gone))}", stacklevel=1)
    return Args(**{name: value for name, value in saved["args"].items() if name not in gone})


# what may differ from the run's own arguments
EVALUABLE = ["eval_episodes", "capture_video", "cuda", "num_threads", "seed"]
RESUMABLE = ["eval_episodes", "capture_video", "cuda", "num_threads", "eval_interval", "total_timesteps", "checkpoint_interval"]
RESUMABLE += ["compile", "track", "wandb_project_name", "wandb_entity"]


def own_args(args):
    """The run's own arguments for --evaluate or --resume. --evaluate inherits no capture_video, track and compile."""
    own = replace(load_args(args.evaluate or args.resume), resume=args.resume, evaluate=args.evaluate)
    return replace(own, capture_video=False, track=False, compile=False) if args.evaluate else own


def parse_args(argv=None):
    """The command line. With --resume or --evaluate the defaults are that run's own arguments."""
    args = tyro.cli(Args, args=argv)
    return tyro.cli(Args, args=argv, default=own_args(args)) if args.resume or args.evaluate else args


def check_resumed(args):
    """With --resume or --evaluate: refuses to change an argument that must stay the run's own."""
    own, allowed = own_args(args), EVALUABLE if args.evaluate else RESUMABLE
    for name, value in asdict(own).items():
        given, shorter = getattr(args, name), name == "total_timesteps" and args.total_timesteps < own.total_timesteps
        if shorter or (given != value and name not in allowed):
            flag, more = f"--{name.replace('_', '-')} {given}", " or more" * shorter
            raise BadInput(f"{flag}: the run keeps its own, {value}{more}; these may change: {', '.join(allowed)}")


def main(args):
    """Trains, resumes or evaluates. In a notebook: `main(Args(...))`, `main(parse_args(["--resume", folder]))`."""
    check(args)
    args = replace(args, exp_name=args.exp_name or name_arm(args))
    if args.resume or args.evaluate:
        check_resumed(args)
    if args.evaluate and not args.eval_episodes:
        raise BadInput("--eval-episodes 0: expected 1 or more with --evaluate")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.evaluate:
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        policy, _, step = load_agent(args.evaluate, device)
        video = Path(args.evaluate, "videos", f"{step}__seed{args.seed}.mp4") if args.capture_video else None
        scores = evaluate(policy, args, device, video)
        mean, error = np.mean(scores), stderr(scores) if len(scores) > 1 else math.nan
        print(f"score {mean:.1f} +- {error:.1f} at step {step:,}; returns {np.round(scores, 2).tolist()} {video or ''}")
        return
    result = Path(args.resume or "", "result.json")
    if args.resume and result.exists():
        step = json.loads(result.read_text())["global_step"]
        if step + args.num_envs * args.num_steps > args.total_timesteps:
            print(f"{args.resume} has finished its {step:,} steps; a larger --total-timesteps continues it")
            return
    if args.track and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        wandb.login()  # asks for a key where one is missing, before anything is created
    run = Run(args)
    with run.cleanup:
        try:
            train(args, run)
        except FloatingPointError as error:
            kept = f"{run.folder} keeps the last checkpoint, if there is one"
            raise FloatingPointError(f"{error} at step {run.global_step:,}; the run ends, {kept}") from error


if __name__ == "__main__":
    try:
        main(parse_args())
    except (BadInput, gymnasium.error.Error, ModuleNotFoundError, FloatingPointError) as error:
        print(f"{SCRIPT}: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
