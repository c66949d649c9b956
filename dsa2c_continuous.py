"""A2C, DA2C and DSA2C on MuJoCo and Box2D: A2C over discretised actions with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). DA2C is A2C whose D action dimensions are cut into bins, one categorical each; DSA2C adds the
reverse loss. The agent takes the bins i = (i_1 .. i_D) with probability pi_i; A is its advantage:

            L_a2c  = -A log pi_i
    Eq. 7   L_ra2c = -A Z sum_{j != i} pi_j = -A Z (1 - pi_i)
    Eq. 9   L      = alpha L_a2c + beta L_ra2c                      Z < 0, -1 in the paper

Examples:

    python dsa2c_continuous.py --env-id Hopper --beta 10 --noise gaussian      # DSA2C, noisy rewards
    python dsa2c_continuous.py --env-id Hopper --alpha 1 --beta 0              # DA2C; with --num-bins 0 Gaussian A2C
    python dsa2c_continuous.py --resume runs/Hopper-v4__dsa2c_continuous__1__1700000000

What differs from the paper and its released code:

* Eq. 7 as printed flips the sign of L_ra2c where A < 0, and its gradient then points against A2C's. The default is the
  form that the paper's analysis and its released code use, one sign for both; `--literal-signs` is the printed one.
* For Z = -1 the gradient of L_ra2c is pi_i times that of L_a2c: DSA2C weights each sample by alpha + beta pi_i.
* pi_i is the joint probability of the D bins, as in the released code: about 11^-D at the start, so that the reverse
  loss has a gradient that all but vanishes where D is large. `--reverse-prob factored` sums it over the dimensions, each
  with its own pi_d.
* The released code runs on Stable-Baselines3; the update and the running normalisation here are SB3's to rounding.
  Acting happens in numpy, where one observation costs a fraction of what it does in torch.
* LunarLanderContinuous-v2 was withdrawn; -v3 is its successor. The -v4 MuJoCo tasks run on today's mujoco.
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
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1",
# ]
# ///

import contextlib
import difflib
import gc
import importlib.metadata
import io
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """A2C, DA2C and DSA2C on continuous control. `--alpha 1 --beta 0` is DA2C, with `--num-bins 0` Gaussian A2C."""

    exp_name: str = "dsa2c_continuous"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the weights, the actions, the environments and (a separate generator) the noise"""
    cuda: bool = False
    """learn on a GPU; networks as small as these gain nothing from one"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project_name: str = "symmetric-rl"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B user or team"""
    capture_video: bool = False
    """write an mp4 of the first episode of each evaluation to videos/ in the run folder"""

    env_id: str = "Hopper"
    """a task of the paper by its short name (Hopper is Hopper-v4), or a Gymnasium id (also module:Id) with Box spaces"""
    total_timesteps: int = 2_000_000
    """environment steps, rounded down to whole iterations"""
    learning_rate: float = 7e-4
    """RMSprop's step size"""
    rmsprop_alpha: float = 0.99
    """RMSprop's smoothing of the squared gradient, 0 to 1"""
    rmsprop_eps: float = 1e-5
    """RMSprop's epsilon, outside the root"""
    num_envs: int = 4
    """environments stepped by turns"""
    num_steps: int = 8
    """steps of each environment between two updates"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount factor, 0 to 1; the paper takes 0.9999 for Swimmer"""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation, 0 to 1; 1 is the plain return of up to num_steps steps"""
    norm_adv: bool = False
    """normalise the advantages of each update"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss, a mean square (without a factor 1/2)"""
    max_grad_norm: float = 0.5
    """norm to which the gradient is clipped"""

    num_bins: int = 11
    """bins of each action dimension; 0 for a Gaussian policy with a state-independent standard deviation"""
    alpha: float = 0.5
    """weight of the A2C loss (Eq. 9)"""
    beta: float = 0.2
    """weight of the reverse loss (Eq. 9); the paper takes 0.2 to 5 without noise and 0.2 to 10 with; 0 if num_bins is 0"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 7), below 0"""
    literal_signs: bool = False
    """the reverse loss with the signs that Eq. 7 prints for A < 0, for study"""
    reverse_prob: Literal["joint", "factored"] = "joint"
    """probability in the reverse loss: of all bins together, as released, or summed over dimensions, each its own"""
    noise: Literal["none", "gaussian"] = "none"
    """gaussian: adds N(0, noise_std^2) to the learner's normalised rewards"""
    noise_std: float = 0.05
    """standard deviation of that noise"""

    eval_episodes: int = 10
    """episodes that score the trained policy: no noise, raw rewards, greedy actions; 0 for none"""
    eval_interval: int = 0
    """also evaluate every so many steps; 0 for the end only"""
    log_interval: int = 100
    """iterations between two log entries, which hold means over them"""
    checkpoint_interval: int = 1000
    """iterations between two checkpoints, a multiple of log_interval"""
    resume: str | None = None
    """run folder to continue, with its own arguments; only a larger --total-timesteps and tracking flags may be added"""
    compile: bool = False
    """torch.compile the loss (on a GPU into CUDA graphs): faster updates after a slower first minute"""
    num_threads: int = 1
    """CPU threads of torch; 0 for all cores, slower for networks as small as these"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""


# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
EVALUATION, NOISE, ENVS, ACTIONS = 1, 2, 3, 4
LENGTH = "total_timesteps"  # the argument that a resumed run may raise
# What else decides a run's numbers; args.json and result.json hold their versions
PACKAGES = ("torch", "gymnasium", "mujoco", "box2d", "numpy")
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


# --- environments -----------------------------------------------------------------------------------------------------


def resolve_env(env_id: str) -> str:
    """The Gymnasium id for a task's short name or id: Hopper -> Hopper-v4, Hopper-v5 -> Hopper-v5, module:Id -> Id.

    Raises ValueError with the close matches if Gymnasium, with that module imported, knows no such environment.
    """
    env_id = TASKS.get(env_id, env_id)
    if ":" in env_id:
        module, _, env_id = env_id.partition(":")
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever that module may raise
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--env-id {module}:{env_id}: {reason}; expected a module that can be imported") from error
    if env_id not in gymnasium.registry:
        close = difflib.get_close_matches(env_id, [*TASKS, *gymnasium.registry], n=3, cutoff=0.6)
        expected = " or ".join(close) or f"one of {', '.join(TASKS)}, or a Gymnasium id"
        raise ValueError(f"--env-id {env_id}: no such environment; expected {expected}")
    return env_id


def make_env(env_id: str, **kwargs) -> gymnasium.Env:
    """One environment with its time limit; observations flat."""
    with warnings.catch_warnings():
        # the paper's tasks are the -v4 ones; some of their models use a word that mujoco would do without
        warnings.filterwarnings("ignore", message=".*(out of date|settotalmass).*")
        if "mujoco" in str(gymnasium.spec(env_id).entry_point):
            import mujoco

            mujoco.set_mju_user_warning(warnings.warn)  # it would write MUJOCO_LOG.TXT into the working folder
        env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    flat = not isinstance(env.observation_space, Box) or len(env.observation_space.shape) == 1
    return env if flat else gymnasium.wrappers.FlattenObservation(env)


def make_bins(space: Box, num_bins: int) -> np.ndarray:
    """[D, num_bins]: the actions that the bins of each dimension stand for, evenly from low to high, both included."""
    return np.linspace(space.low, space.high, num_bins, axis=-1, dtype=space.dtype)


def to_env(actions: np.ndarray, space: Box, bins: np.ndarray | None) -> np.ndarray:
    """What the environments get, [num_envs, D]: the values of the chosen bins; Gaussian actions cut to the box."""
    if bins is None:
        return actions.clip(space.low, space.high)
    return bins[np.arange(len(bins)), actions]


def step_envs(envs: list[gymnasium.Env], env_actions: np.ndarray):
    """One step of each environment; an episode that ends is reset in the same step (SAME_STEP).

    Returns obs [num_envs, obs_dim] (of the next episode where one ended), rewards [num_envs], terminated, truncated
    [num_envs] bool, and the last observations of the episodes that ended, as {environment: obs}.
    """
    obs, rewards, terminated, truncated, final_obs = [], [], [], [], {}
    for i, env in enumerate(envs):
        next_obs, reward, is_terminated, is_truncated, _ = env.step(env_actions[i])
        if is_terminated or is_truncated:
            final_obs[i] = next_obs
            next_obs, _ = env.reset()
        obs.append(next_obs)
        rewards.append(reward)
        terminated.append(is_terminated)
        truncated.append(is_truncated)
    return np.array(obs), np.array(rewards, dtype=np.float64), np.array(terminated), np.array(truncated), final_obs


class RunningMeanStd:
    """Mean and variance of all rows seen so far (Welford 1962); count starts at 1e-4, with mean 0 and variance 1, as in SB3."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, rows: np.ndarray) -> None:
        """rows: [N, *shape]."""
        for row in rows:
            self.count += 1
            delta = row - self.mean
            self.mean = self.mean + delta / self.count
            self.var = self.var + (delta * (row - self.mean) - self.var) / self.count


def normalise_obs(obs: np.ndarray, stats: RunningMeanStd) -> np.ndarray:
    """Observations to mean 0 and standard deviation 1, cut to +-10; float32."""
    scaled = (obs - stats.mean) / np.sqrt(stats.var + 1e-8)
    return np.minimum(np.maximum(scaled, -10), 10).astype(np.float32)  # np.clip takes three times as long for one row


def normalise_rewards(rewards: np.ndarray, stats: RunningMeanStd) -> np.ndarray:
    """Rewards over the running standard deviation of the discounted return, cut to +-10."""
    return np.minimum(np.maximum(rewards / np.sqrt(stats.var + 1e-8), -10), 10)


# --- agent ------------------------------------------------------------------------------------------------------------


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights with gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Separate actor and critic, two hidden layers of 64 with tanh. num_bins 0: Gaussian, else num_bins a dimension."""

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
        """obs [B, obs_dim], actions [B, D] (bins, or real numbers if num_bins is 0) -> the log-probability of each
        dimension's action [B, D], the entropy of all dimensions together [B], values [B]."""
        output, values = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.num_bins:
            all_logprobs = F.log_softmax(output.unflatten(-1, (-1, self.num_bins)), dim=-1)
            logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return logprobs, -(all_logprobs.exp() * all_logprobs).sum((-2, -1)), values
        scaled = (actions - output) * (-self.log_std).exp()
        logprobs = -0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return logprobs, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(obs)), values


def numpy_actor(agent: Agent) -> tuple[list[tuple[np.ndarray, np.ndarray]], int, np.ndarray | None]:
    """The actor for `act`: weights and biases layer by layer, num_bins, and the standard deviation (None with bins)."""
    array = lambda tensor: tensor.detach().cpu().numpy()  # noqa: E731
    layers = [(array(layer.weight).T, array(layer.bias)) for layer in agent.actor if isinstance(layer, nn.Linear)]
    return layers, agent.num_bins, None if agent.num_bins else np.exp(array(agent.log_std))


def act(actor, obs: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """Actions [B, D] for obs [B, obs_dim]: bins, or real numbers from a Gaussian actor; greedy without `noise`.

    noise: Gumbel [B, D, num_bins] (argmax of log-probability and Gumbel noise is a sample), for a Gaussian normal [B, D].
    """
    layers, num_bins, std = actor
    for weight, bias in layers[:-1]:
        obs = np.tanh(obs @ weight + bias)
    output = obs @ layers[-1][0] + layers[-1][1]
    if num_bins:
        logits = output.reshape(len(obs), -1, num_bins)
        return (logits if noise is None else logits + noise).argmax(axis=-1)
    return output if noise is None else output + std * noise


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Makes all parameters and gradients of `module` views of one flat parameter, and returns it: the optimiser and the
    norm then do their work in one call for all layers, half of an update's time for networks as small as these."""
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return flat


def exploration_noise(rng: np.random.Generator, shape: tuple[int, ...], num_bins: int) -> np.ndarray:
    """The noise of `act` for actions of this shape: Gumbel, num_bins each, or normal for a Gaussian actor."""
    return rng.gumbel(size=(*shape, num_bins)) if num_bins else rng.standard_normal(shape)


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_a2c_loss(
    logprobs: torch.Tensor, advantages: torch.Tensor, Z: float = -1.0, literal_signs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The A2C loss and the reverse A2C loss of the actions that were taken; the caller adds alpha and beta (Eq. 9).

                L_a2c  = -A log pi_i
        Eq. 7   L_ra2c = -A Z (1 - pi_i)

    The sum over the other actions in Eq. 7 is 1 - pi_i, so L_ra2c needs nothing that L_a2c has not computed. With
    Z = -1 its gradient is pi_i times that of L_a2c: together they weight each sample by alpha + beta pi_i.

    Args:
        logprobs: [B], log pi_i.
        advantages: [B], A.
        Z: stands for log 0, below 0.
        literal_signs: L_ra2c as Eq. 7 prints it, with the opposite sign where A < 0.

    Returns:
        policy_loss, reverse_loss: scalars, means over all B samples; finite for any finite input.
    """
    signed = advantages.abs() if literal_signs else advantages
    # sum_{j != i} pi_j = 1 - pi_i, precise also where pi_i is nearly 1; a density above 1 (beta is 0 there) counts as 1
    others = -logprobs.clamp(max=0).expm1()
    return -(advantages * logprobs).mean(), (-signed * Z * others).mean()


def factored_a2c_reverse(
    logprobs: torch.Tensor, advantages: torch.Tensor, Z: float = -1.0, literal_signs: bool = False
) -> torch.Tensor:
    """The reverse A2C loss summed over action dimensions (`--reverse-prob factored`), in place of the joint one:

        L = -A Z sum_d (1 - pi_d)

    logprobs: [B, D], of each dimension's own bin; advantages: [B]. Returns a scalar, the mean over B; for D = 1 it is
    the joint one.
    """
    signed = advantages.abs() if literal_signs else advantages
    return (signed * Z * logprobs.clamp(max=0).expm1().sum(-1)).mean()


def rollout_loss(agent, args, obs, actions, advantages, returns):
    """The whole loss of a rollout: alpha L_a2c + beta L_ra2c + vf_coef L_value - ent_coef H, and its parts by name.

    Shapes: obs [B, obs_dim], actions [B, D], advantages and returns [B].
    """
    logprobs, entropies, values = agent(obs, actions)
    raw_advantages = advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs.sum(-1), advantages, args.Z, args.literal_signs)
    if args.reverse_prob == "factored":
        reverse_loss = factored_a2c_reverse(logprobs, advantages, args.Z, args.literal_signs)
    value_loss = F.mse_loss(values, returns)
    entropy = entropies.mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss
    if args.ent_coef:  # 0 in the paper: spares the gradient of the entropy
        loss = loss - args.ent_coef * entropy
    stats = {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "charts/adv_sign_change": (raw_advantages.sign() != advantages.sign()).float().mean(),  # Figure 2
    }
    return loss, {name: value.detach() for name, value in stats.items()}


# --- learning ---------------------------------------------------------------------------------------------------------


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    dones: torch.Tensor,
    next_values: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), backwards through the rollout:

        delta_t = r_t + gamma (1 - done_t) V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

    rewards, values, dones: [num_steps, num_envs]; done_t = 1 if step t ended its episode. next_values: [num_envs], V
    of the observation after the last step. Returns advantages and returns A_t + V(s_t), [num_steps, num_envs].
    """
    alive = 1.0 - dones
    deltas = rewards + gamma * alive * torch.cat([values[1:], next_values.unsqueeze(0)]) - values
    decays = gamma * gae_lambda * alive
    advantages = [torch.zeros_like(next_values)]
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        advantages.append(delta + decay * advantages[-1])
    advantages = torch.stack(advantages[:0:-1])  # in the order of time, without the zeros that began it
    return advantages, advantages + values


def update(agent, weights, optimizer, loss_fn, args, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """One gradient step on the whole rollout; returns the statistics as tensors, so that a GPU need not be waited for.

    weights: the agent's flat parameter. batch: what `rollout_loss` takes behind `args`, each tensor
    [num_steps * num_envs, ...].
    """
    weights.grad.zero_()
    loss, stats = loss_fn(agent, args, *batch)
    loss.backward()
    # clip_grad_norm_'s arithmetic without its bookkeeping, which takes three times as long for one small tensor
    weights.grad.mul_((args.max_grad_norm / (weights.grad.norm() + 1e-6)).clamp_(max=1.0))
    optimizer.step()
    return {name: value.clone() for name, value in stats.items()}  # a CUDA graph writes the next ones to the same place


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(actor, env_id, bins, obs_stats, args, video_path=None, stop=()) -> list[float]:
    """The raw returns of `eval_episodes` episodes, each in a fresh environment: greedy actions, frozen normaliser.

    It draws from no generator of the training. `video_path`: an mp4 of the first episode. `stop`: filled by a signal
    handler; ends the evaluation, returning [].
    """
    returns = []
    for seed in np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes):
        with contextlib.ExitStack() as cleanup:
            record = video_path is not None and not returns
            env = make_env(env_id, render_mode="rgb_array") if record else make_env(env_id)
            cleanup.callback(env.close)
            if record:
                video_path.parent.mkdir(exist_ok=True)
                fps = env.metadata.get("render_fps", 30)
                video = cleanup.enter_context(imageio.get_writer(video_path, fps=fps, macro_block_size=2))
            obs, _ = env.reset(seed=int(seed))
            episode_return, done = 0.0, False
            while not done and not stop:
                if record:
                    video.append_data(env.render())
                actions = act(actor, normalise_obs(obs[None], obs_stats))
                obs, reward, terminated, truncated, _ = env.step(to_env(actions, env.action_space, bins)[0])
                episode_return += float(reward)
                done = terminated or truncated
        returns.append(episode_return)
    return [] if stop else returns


# --- command line -----------------------------------------------------------------------------------------------------


def fail(message: str):
    """Bad input: one line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv: list[str], defaults: Args) -> Args:
    """The command line as Args; with --resume, the run's own arguments, changed where that is allowed."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            args = tyro.cli(Args, args=argv, default=defaults)
    except SystemExit as stopped:
        if stopped.code:  # tyro's box of several lines, as one line
            text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{3,}|[|+]", " ", captured.getvalue()).split())
            titles = "Value error|Parsing error|Missing argument|Invalid choice|Unrecognized options"
            text = re.sub(rf"^({titles}) (?=[A-Z]|invalid)", "", text)
            fail(re.split(r" (For full|Argument) helptext", text)[0] + "; see --help")
        raise
    if args.resume is None:
        return args

    allowed = ("resume", LENGTH.replace("_", "-"), "track", "no-track", "wandb-project-name", "wandb-entity")
    given = [word[2:].split("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    refused = [name for name in given if name not in allowed]
    if refused:
        fail(f"--{refused[0]}: not accepted beside --resume; only --{', --'.join(allowed[1:])} are")
    try:
        saved = json.loads((Path(args.resume) / "args.json").read_text())
        if saved["script"] != Path(__file__).name:
            fail(f"--resume {args.resume}: a run of {saved['script']}; expected a run of {Path(__file__).name}")
        resumed = Args(**{**saved["args"], "resume": args.resume})
        saved["run_id"]  # KeyError for a folder without one
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--resume {args.resume}: not the folder of a run of this script; expected one with its args.json ({error})")
    for name in {name.removeprefix("no-").replace("-", "_") for name in given} - {"resume"}:
        if name == LENGTH and getattr(args, name) < getattr(resumed, name):
            require(args, name, False, f"{getattr(resumed, name)}, the run's own, or more")
        setattr(resumed, name, getattr(args, name))
    return resumed


def require(args: Args, name: str, accepted: object, expected: str) -> None:
    """Unless `accepted`: one line that names the argument, its value and what is expected, exit status 2."""
    if not accepted:
        fail(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


def check_common(args: Args) -> None:
    """Refuses values that no run of any of the scripts can have."""
    for name in ("num_envs", "num_steps", "checkpoint_interval"):
        require(args, name, getattr(args, name) >= 1, "a whole number of 1 or more")
    for name in ("eval_episodes", "eval_interval", "num_threads"):
        require(args, name, getattr(args, name) >= 0, "a whole number of 0 or more")
    require(args, "num_threads", args.num_threads <= 1024, "1,024 or less")
    require(args, "seed", 0 <= args.seed < 2**63, "a whole number from 0 to 2^63 - 1")
    for name in ("gamma", "gae_lambda"):
        require(args, name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    for name in ("learning_rate", "max_grad_norm"):
        require(args, name, math.isfinite(getattr(args, name)) and getattr(args, name) > 0, "a finite number above 0")
    for name in ("alpha", "beta", "ent_coef", "vf_coef"):
        require(args, name, math.isfinite(getattr(args, name)) and getattr(args, name) >= 0, "a finite number of 0 or more")
    require(args, "Z", math.isfinite(args.Z) and args.Z < 0, "a finite number below 0")
    batch_size = args.num_envs * args.num_steps
    require(args, "total_timesteps", args.total_timesteps >= batch_size, f"num_envs x num_steps = {batch_size} or more")
    require(args, "capture_video", args.eval_episodes > 0 or not args.capture_video, "eval_episodes of 1 or more with it")
    require(args, "exp_name", re.fullmatch(r"[\w.-]{1,100}", args.exp_name), "1 to 100 letters, digits, '_', '.' or '-'")
    project = re.fullmatch(r"[^/\\#?%:]{1,128}", args.wandb_project_name)
    require(args, "wandb_project_name", project, "1 to 128 characters but /\\#?%:")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    require(args, "compile", compiler or not args.compile, "a C++ compiler on the PATH with it")


def check_tracking(args: Args) -> None:
    """Refuses to track in a mode that there is not, or online without a key; last, as W&B may ask for one."""
    modes = ("online", "offline", "shared", "disabled", "dryrun", "run")
    if args.track and os.environ.get("WANDB_MODE", "online") not in modes:
        fail(f"--track: WANDB_MODE is {os.environ['WANDB_MODE']}; expected one of {', '.join(modes)}")
    if args.track and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            fail(f"--track: {str(error).splitlines()[0]} Expected that, a WANDB_API_KEY or WANDB_MODE=offline")


def check_env(args: Args) -> None:
    """Refuses environments that the script cannot learn, and videos that this machine cannot render."""
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen; mujoco reads it when it is imported
    try:
        env_id = resolve_env(args.env_id)
    except ValueError as error:
        fail(str(error))
    try:
        env = make_env(env_id)
    except Exception as error:  # each family of environments has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(f"--env-id {args.env_id}: Gymnasium cannot make it ({reason}); expected one that it can")
    action_space = env.action_space
    boxes = isinstance(env.observation_space, Box) and isinstance(action_space, Box)
    if not boxes or len(action_space.shape) != 1 or not action_space.shape[0] or action_space.dtype.kind != "f":
        spaces = f"{type(env.observation_space).__name__} observations and {type(action_space).__name__} actions"
        found = f"{spaces} ({action_space.dtype}, shape {action_space.shape})"
        fail(f"--env-id {args.env_id}: has {found}; expected Box observations and a one-dimensional Box of float actions")
    with np.errstate(over="ignore"):  # bounds near the largest float leave no room for bins either
        bounded = action_space.is_bounded() and np.isfinite(action_space.high - action_space.low).all()
    if args.num_bins and not bounded:
        fail(f"--env-id {args.env_id}: its actions are unbounded; expected bounded ones with bins, or --num-bins 0")
    if args.capture_video:
        try:
            env = make_env(env_id, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()
        except Exception as error:  # and so has each renderer
            sys.unraisablehook = lambda unraisable: None  # the half-made renderer complains when it is deleted
            reason = " ".join(str(error).split()) or type(error).__name__
            fail(f"--capture-video: cannot render ({reason}); expected a screen, or MUJOCO_GL=egl or osmesa with its library")


def check_args(args: Args) -> None:
    """Refuses values that no run can have, before anything is made."""
    check_common(args)
    require(args, "log_interval", args.log_interval >= 1, "a whole number of 1 or more")
    multiple = args.checkpoint_interval % args.log_interval == 0
    require(args, "checkpoint_interval", multiple, f"a multiple of log_interval = {args.log_interval}")
    require(args, "rmsprop_alpha", 0 <= args.rmsprop_alpha <= 1, "a number from 0 to 1")
    require(args, "rmsprop_eps", math.isfinite(args.rmsprop_eps) and args.rmsprop_eps > 0, "a finite number above 0")
    enough = args.num_envs * args.num_steps > 1 or not args.norm_adv
    require(args, "norm_adv", enough, "num_envs x num_steps of 2 or more with it")
    require(args, "noise_std", math.isfinite(args.noise_std) and args.noise_std >= 0, "a finite number of 0 or more")
    require(args, "num_bins", args.num_bins == 0 or args.num_bins >= 2, "0 (Gaussian) or 2 or more")
    require(args, "beta", args.num_bins or args.beta == 0, "0 with num_bins 0: a density has no sum over other actions")
    require(args, "cuda", args.resume or torch.cuda.is_available() or not args.cuda, "a GPU that torch can use")
    check_env(args)
    check_tracking(args)


# --- run folder -------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    """`content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def git_commit() -> str | None:
    """The commit of this script's checkout, with "-dirty" behind it if files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def name_both(before: str | None, now: str | None) -> str | None:
    """What a resumed run was made with, "2.12.1 then 2.13.0", or the one name if nothing has changed."""
    return before if str(before).split(" then ")[-1] == str(now) else f"{before} then {now}"


def open_run(args: Args, env_id: str, device: torch.device) -> tuple[Path, dict | None, dict]:
    """Makes the run folder, or opens the one to resume.

    Returns the folder, the checkpoint to go on from (None for a new run) and what identifies the run.
    """
    identity = {
        "script": Path(__file__).name,
        "run_id": uuid.uuid4().hex[:8],
        "env_id": env_id,
        "args": {**asdict(args), "resume": None},
        "versions": {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    checkpoint = None
    if args.resume:
        run_folder = Path(args.resume).resolve()
        before = json.loads((run_folder / "args.json").read_text())
        identity["run_id"] = before["run_id"]
        if (run_folder / "checkpoint.pt").exists():
            try:
                checkpoint = torch.load(run_folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            except Exception as error:  # torch names no common type for a file that is no checkpoint
                fail(f"--resume {args.resume}: cannot load its checkpoint.pt ({type(error).__name__})")
            for key in ("commit", "device"):
                identity[key] = name_both(before.get(key), identity[key])
            for name, version in identity["versions"].items():
                identity["versions"][name] = name_both(before["versions"].get(name), version)
    while not args.resume:
        run_folder = Path(args.run_dir) / f"{env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            run_folder.mkdir(parents=True)
            break
        except FileExistsError:  # a run of the same name began in the same second
            time.sleep(1)
        except OSError as error:
            fail(f"--run-dir {args.run_dir}: cannot make {run_folder} ({error.strerror}); expected a folder to write in")
    # Take back what the TensorBoard files hold beyond the checkpoint, so that no step is logged twice
    sizes = checkpoint["event_files"] if checkpoint else {}
    for path in run_folder.glob("events.out.tfevents.*"):
        if path.name in sizes:
            os.truncate(path, min(sizes[path.name], path.stat().st_size))
        else:
            path.unlink()
    return run_folder, checkpoint, identity


def track_run(args: Args, run_folder: Path, identity: dict) -> None:
    """Starts the W&B run, or continues the one with this `run_id`. It logs what TensorBoard gets."""
    import wandb

    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        id=identity["run_id"],
        name=run_folder.name,
        resume="allow",
        dir=run_folder.parent,  # in the run folder W&B would find its own copies of the event files and log them again
        config={**identity["args"], **{key: value for key, value in identity.items() if key != "args"}},
        sync_tensorboard=True,  # with global_step as the x axis
    )


# --- machine ----------------------------------------------------------------------------------------------------------


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile; on a GPU recorded as CUDA graphs, whose outputs are valid until the next call of such a function."""
    if device.type != "cuda":
        return torch.compile(function)
    graphed = torch.compile(function, mode="reduce-overhead")

    def call(*args):
        torch.compiler.cudagraph_mark_step_begin()
        return graphed(*args)

    return call


def catch_signals() -> list[int]:
    """SIGINT and SIGTERM ask for an orderly end: they fill the returned list. The second one ends at once."""
    caught = []

    def on_signal(signum, frame):
        caught.append(signum)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    return caught


# --- training ---------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    stop = catch_signals()
    env_id = resolve_env(args.env_id)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    run_folder, checkpoint, identity = open_run(args, env_id, device)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    global_step = start_step = checkpoint["global_step"] if checkpoint else 0
    if (run_folder / "result.json").exists():
        if start_step >= num_iterations * batch_size:
            print(f"{run_folder} has finished its {start_step:,} steps; a larger --total-timesteps continues it")
            return
        (run_folder / "result.json").unlink()
    write_json(run_folder / "args.json", identity)
    if args.track:
        import wandb  # a second and 20 MB that only a tracked run pays

        track_run(args, run_folder, identity)
    writer = SummaryWriter(run_folder)
    policy = f"{args.num_bins} bins a dimension" if args.num_bins else "Gaussian"
    print(
        f"{Path(__file__).name}: --env-id {args.env_id} is {env_id} ({policy}); {device.type}, "
        f"{torch.get_num_threads()} threads; {run_folder}"
    )

    torch.manual_seed(args.seed)
    action_rng, noise_rng = (np.random.default_rng([args.seed, number]) for number in (ACTIONS, NOISE))
    env_seeds = np.random.default_rng([args.seed, ENVS, start_step]).integers(2**31, size=args.num_envs)
    envs = [make_env(env_id) for _ in range(args.num_envs)]
    (obs_dim,), space = envs[0].observation_space.shape, envs[0].action_space
    (action_dim,) = space.shape
    bins = make_bins(space, args.num_bins) if args.num_bins else None
    agent = Agent(obs_dim, action_dim, args.num_bins).to(device)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.RMSprop([weights], lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    loss_fn = compiled(rollout_loss, device) if args.compile else rollout_loss
    obs_stats, return_stats = RunningMeanStd((obs_dim,)), RunningMeanStd()
    seconds, recent_returns, scores, saved = 0.0, deque(maxlen=100), [], checkpoint is not None
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for stats, (mean, var, count) in ((obs_stats, checkpoint["obs_stats"]), (return_stats, checkpoint["return_stats"])):
            stats.mean, stats.var, stats.count = np.array(mean), np.array(var), count
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        action_rng.bit_generator.state, noise_rng.bit_generator.state = checkpoint["action_rng"], checkpoint["noise_rng"]
        seconds, recent_returns = checkpoint["seconds"], deque(checkpoint["recent_returns"], maxlen=100)
        scores = checkpoint["scores"] if start_step >= num_iterations * batch_size else []

    def end_if_broken(values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"{run_folder / 'checkpoint.pt'} is from before" if saved else "there is no checkpoint yet"
                sys.exit(f"{Path(__file__).name}: {name} is {value} at step {global_step:,}; the run ends, {kept}")

    def save_checkpoint() -> None:
        nonlocal saved
        # the last step of an update can break the policy after its losses were finite
        end_if_broken({"the sum of the weights": weights.sum().item()})
        writer.flush()
        state = {
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "obs_stats": [obs_stats.mean.tolist(), obs_stats.var.tolist(), obs_stats.count],
            "return_stats": [return_stats.mean.tolist(), return_stats.var.tolist(), return_stats.count],
            "global_step": global_step,
            "seconds": seconds,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            "action_rng": action_rng.bit_generator.state,
            "noise_rng": noise_rng.bit_generator.state,
            "recent_returns": list(recent_returns),
            "scores": scores,
            "event_files": {path.name: path.stat().st_size for path in run_folder.glob("events.out.tfevents.*")},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(run_folder / "checkpoint.pt", buffer.getvalue())
        saved = True

    def evaluate_and_log() -> list[float]:
        video_path = run_folder / "videos" / f"{global_step}.mp4" if args.capture_video else None
        returns = evaluate(numpy_actor(agent), env_id, bins, obs_stats, args, video_path, stop)
        if returns:
            writer.add_scalar("eval/episodic_return", np.mean(returns), global_step)
            if video_path and args.track:
                wandb.log({"videos/eval": wandb.Video(str(video_path), format="mp4"), "global_step": global_step})
        elif video_path:  # interrupted: half an episode
            video_path.unlink(missing_ok=True)
        return returns

    # the rollout
    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((*shape, obs_dim), dtype=np.float32)
    actions = np.zeros((*shape, action_dim), dtype=np.int64 if args.num_bins else np.float32)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    raw_obs = np.array([env.reset(seed=int(seed))[0] for env, seed in zip(envs, env_seeds, strict=True)])
    obs_stats.update(raw_obs)
    next_obs = normalise_obs(raw_obs, obs_stats)
    discounted_returns = np.zeros(args.num_envs)
    episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)
    gc.freeze()  # the collector need not search torch's own objects again and again: a tenth of the run's time
    start_seconds = seconds
    # since the last log entry
    finished_returns, finished_lengths, collected, fits, noise_seen = [], [], [], [], []
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, disable=None)
    for iteration in range(start_step // batch_size, num_iterations):
        iteration_start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = fraction_left * args.learning_rate

        # act for num_steps steps, unless the last update broke the policy
        end_if_broken({"the sum of the weights": weights.sum().item()})
        cut_steps, cut_obs = [], []
        actor = numpy_actor(agent)
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
                if not terminated[i]:  # cut off, it could have gone on: bootstrap from its last observation
                    cut_steps.append((step, i))
                    cut_obs.append(normalise_obs(last_obs, obs_stats))

        # learn from them; the values are of the weights that acted
        batch = [torch.from_numpy(array).flatten(0, 1).to(device) for array in (obs, actions)]
        with torch.no_grad():
            values = agent.critic(batch[0]).view(shape)
            next_values = agent.critic(torch.from_numpy(next_obs).to(device)).squeeze(-1)
            if cut_obs:
                final_values = agent.critic(torch.from_numpy(np.array(cut_obs)).to(device)).squeeze(-1)
                rewards[tuple(np.transpose(cut_steps))] += args.gamma * final_values.cpu().numpy()
            seen = torch.from_numpy(np.stack([rewards, dones])).to(device)
            advantages, returns = compute_gae(seen[0], values, seen[1], next_values, args.gamma, args.gae_lambda)
        batch += [advantages.flatten(), returns.flatten()]
        collected.append(update(agent, weights, optimizer, loss_fn, args, tuple(batch)))
        fits.append(torch.stack([returns, values]))
        noise_seen.append(reward_noise)
        seconds += time.perf_counter() - iteration_start
        progress.update(batch_size)

        # log
        stopping = bool(stop)  # asked once, so that what a signal leaves is logged up to its checkpoint
        if (iteration + 1) % args.log_interval == 0 or iteration + 1 == num_iterations or stopping:
            stats = {name: torch.stack([each[name] for each in collected]).mean().item() for name in collected[0]}
            end_if_broken(stats)
            recent_returns.extend(finished_returns)
            if finished_returns:
                stats["charts/episodic_return"] = np.mean(finished_returns)
                stats["charts/episodic_return_100"] = np.mean(recent_returns)
                stats["charts/episodic_length"] = np.mean(finished_lengths)
            if args.noise == "gaussian":
                stats["charts/noise_std"] = np.std(noise_seen)
            all_returns, all_values = torch.stack(fits).unbind(1)
            stats["losses/explained_variance"] = (1 - (all_returns - all_values).var() / all_returns.var()).item()
            stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            stats["charts/SPS"] = (global_step - start_step) / (seconds - start_seconds)
            for name, value in stats.items():
                writer.add_scalar(name, value, global_step)
            finished_returns, finished_lengths, collected, fits, noise_seen = [], [], [], [], []
            if recent_returns:
                progress.set_postfix_str(f"return {np.mean(recent_returns):.1f}", refresh=False)
        eval_due = args.eval_interval and global_step % args.eval_interval < batch_size
        if eval_due and args.eval_episodes and iteration + 1 < num_iterations:
            evaluate_and_log()
        if (iteration + 1) % args.checkpoint_interval == 0:
            save_checkpoint()
        if stopping:
            break
    progress.close()
    save_checkpoint()

    # score the trained policy
    if args.eval_episodes and not scores and not stop:
        scores = evaluate_and_log()
    if stop:
        writer.close()
        if args.track:
            wandb.finish()
        name = signal.Signals(stop[0]).name
        print(f"{Path(__file__).name}: {name} at step {global_step:,}, saved; continue with --resume {run_folder}")
        sys.exit(128 + stop[0])
    save_checkpoint()  # with the scores, and the event files that hold them
    result = {
        "score": np.mean(scores) if scores else None,
        "score_stderr": np.std(scores, ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "returns": scores,
        "global_step": global_step,
        "seconds": seconds,
        "steps_per_second": global_step / seconds,
        **identity,
    }
    write_json(run_folder / "result.json", result)
    writer.close()
    if args.track:
        wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
        wandb.finish()
    score = f"score {result['score']:.1f} over {len(scores)} episodes" if scores else "not evaluated"
    print(f"{Path(__file__).name}: {global_step:,} steps in {seconds:.0f} s, {score}; {run_folder / 'result.json'}")


if __name__ == "__main__":
    arguments = parse_args(sys.argv[1:], Args())
    check_args(arguments)
    main(arguments)
