"""SA2C on Atari: A2C with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The agent takes action i with probability pi_i; A is the advantage:

            L_a2c  = -A log pi_i
    Eq. 7   L_ra2c = -A Z sum_{j != i} pi_j      Z < 0, -1 in the paper
    Eq. 9   L      = alpha L_a2c + beta L_ra2c

Eq. 7 as printed has another sign for A < 0 (`--literal-signs`; docs/loss.md, fact 1).

    python sa2c_atari.py --env-id Alien --beta 1 --noise bsc                    # SA2C, rewards through a noisy channel
    python sa2c_atari.py --env-id Alien --alpha 1 --beta 0 --noise bsc          # A2C, the baseline
    python sa2c_atari.py --env-id Alien --beta 1 --mean-weight --noise bsc      # the control: all samples with the mean weight
    python sa2c_atari.py --resume runs/Alien__sa2c_atari__1__1700000000

The algorithm ends at the line "Operations". docs/differences.md lists what differs from the paper and its released code.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "ale-py==0.12.1",
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
from collections import deque
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

# Torch's idle threads spin on cores that the games need. With this small number they sleep soon. Linux; read at torch's import.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import gymnasium
import imageio
import numpy as np
import pydantic
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from gymnasium.vector import AutoresetMode
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Probability, Name = Annotated[float, Field(ge=0, le=1)], Annotated[str, Field(min_length=1)]


@pydantic.with_config(allow_inf_nan=False, use_attribute_docstrings=True)
@dataclass
class Args:
    """A2C and SA2C on Atari. The defaults are the paper's SA2C without noise; `--alpha 1 --beta 0` is A2C."""

    # symmetric loss
    alpha: NonNegativeFloat = 0.5
    """weight of the A2C loss (Eq. 9)"""
    beta: NonNegativeFloat = 5.0
    """weight of the reverse loss (Eq. 9); the paper uses 5 without noise and 1 with"""
    Z: Annotated[float, Field(lt=0)] = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 7)"""
    literal_signs: bool = False
    """use the sign that Eq. 7 prints for A < 0; its gradient opposes A2C's"""
    mean_weight: bool = False
    """a control: replace each sample's weight alpha + beta |Z| pi_i by its mean over the rollout"""

    # noise
    noise: Literal["none", "bsc"] = "none"
    """bsc: a binary symmetric channel flips clipped rewards 0 <-> 1"""
    noise_prob: Probability = 0.1
    """probability of a flip"""

    # environment
    env_id: str = "Alien"
    """the game: Alien, AlienNoFrameskip-v4 and ALE/Alien-v5 are the same"""
    repeat_action_probability: Probability = 0.0
    """sticky actions: probability that a frame repeats the last action"""

    # algorithm
    total_timesteps: PositiveInt = 5_000_000
    """environment steps (of 4 frames), rounded down to whole iterations"""
    learning_rate: PositiveFloat = 7e-4
    """learning rate of RMSprop"""
    rmsprop_alpha: Probability = 0.99
    """smoothing constant of RMSprop"""
    rmsprop_eps: PositiveFloat = 1e-5
    """epsilon of RMSprop, inside the root"""
    num_envs: PositiveInt = 16
    """number of parallel games"""
    num_steps: PositiveInt = 5
    """steps of each game per rollout"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0"""
    gamma: Probability = 0.99
    """discount factor"""
    gae_lambda: Probability = 1.0
    """lambda of generalised advantage estimation; 1 is the return of up to num_steps steps plus the bootstrap"""
    norm_adv: bool = False
    """normalise the advantages of each rollout"""
    ent_coef: NonNegativeFloat = 0.01
    """weight of the entropy bonus"""
    vf_coef: NonNegativeFloat = 0.25
    """weight of the value loss (mean squared error without a factor 1/2)"""
    max_grad_norm: PositiveFloat = 0.5
    """maximum norm of the gradient"""

    # evaluation
    eval_episodes: NonNegativeInt = 10
    """games that score the policy: raw rewards, no noise, sampled actions"""
    eval_interval: NonNegativeInt = 0
    """evaluate every this many steps; 0: only at the end"""
    capture_video: bool = False
    """film the first game of each evaluation, in videos/ of the run folder"""

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
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")] = "sa2c_atari"
    """name of the experiment, part of the run folder's name"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """seed of everything random"""
    run_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: Name | None = None
    """continue the run in this folder with its own arguments"""
    evaluate: Name | None = None
    """play --eval-episodes games with the policy of the run in this folder, and exit"""
    checkpoint_interval: PositiveInt = 1000
    """save a checkpoint every this many iterations, a multiple of log_interval"""
    cuda: bool = True
    """use a GPU if there is one"""
    torch_deterministic: bool = True
    """use deterministic cuDNN kernels"""
    bf16: bool = False
    """run the network in bfloat16; faster only on hardware with bf16 instructions"""
    compile: bool = False
    """torch.compile acting and the loss, with CUDA graphs on a GPU; the first minute is slower"""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch and of the games; 0: all cores"""


# Random generators beside torch's, so that none disturbs another: each is seeded with [seed, its number, step], evaluation
# without the step, so that all evaluations of a run start alike
EVALUATION, NOISE, GAMES = 1, 2, 3


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


def rollout_loss(agent, args, obs, actions, advantages, returns):
    """The loss of a rollout and its statistics. obs: [B, 4, 84, 84] uint8, the others [B]."""
    all_logprobs, values = agent(obs)
    logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    raw_advantages = advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    policy_loss, reverse_loss = symmetric_a2c_loss(logprobs, advantages, args.Z, args.literal_signs)
    if args.mean_weight:  # in place of each sample's own pi_i (its weight in the gradient) their mean
        reverse_loss = -args.Z * logprobs.detach().exp().mean() * policy_loss
    value_loss = F.mse_loss(values, returns)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss - args.ent_coef * entropy

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
    """NatureCNN (Mnih et al. 2015) with a policy head and a value head."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1)
        self.to(memory_format=torch.channels_last)  # NHWC convolutions are the fast ones, on CPUs and on GPUs

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs: [B, 4, 84, 84] uint8 -> log-probabilities of all actions [B, num_actions], values [B]; both float32."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.network(obs.float().div_(255.0))  # in place: one large array less to allocate
            logits, values = self.actor(hidden), self.critic(hidden)
        return F.log_softmax(logits.float(), dim=-1), values.float().squeeze(-1)


def act(agent: Agent, obs: torch.Tensor, generator: torch.Generator | None = None):
    """Sampled actions, their log-probabilities and the values, each [B], for obs [B, 4, 84, 84]."""
    logprobs, values = agent(obs)
    # Gumbel-max: argmax(log pi + G), G = -log E with E ~ Exp(1), is a sample of pi; unlike torch.distributions it takes
    # a generator, compiles, and never waits for a GPU
    gumbel = -torch.empty_like(logprobs).exponential_(generator=generator).log()
    actions = (logprobs + gumbel).argmax(dim=-1)
    return actions, logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), values


# --- environment ------------------------------------------------------------------------------------------------------


def resolve_game(env_id):
    """Alien, AlienNoFrameskip-v4, ALE/Alien-v5 or alien -> the game's name and its ROM: Alien, alien."""
    name = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d+)?$", "", env_id)
    if name.islower():
        name = name.title().replace("_", "")
    return name, gymnasium.spec(f"ALE/{name}-v5").kwargs["game"]


def make_envs(rom, num_envs, args, **preprocessing):
    """Games stepped in C++ threads: frame skip 4, maximum of 2 frames, grey 84x84, 4 frames stacked, raw rewards.

    `terminated` marks a lost life, and the game goes on. Unlike in SB3 and CleanRL nothing presses FIRE then, and the frame
    stack stays. A finished game restarts within the same step. 108,000 frames truncate a game.
    """
    return AtariVectorEnv(
        rom,
        num_envs,
        num_threads=min(args.num_threads, num_envs),
        repeat_action_probability=args.repeat_action_probability,
        reward_clipping=False,
        episodic_life=False,
        life_loss_info=True,
        autoreset_mode=AutoresetMode.SAME_STEP,
        **preprocessing,
    )


def games_over(dones: np.ndarray, info: dict, last_info: dict) -> np.ndarray:
    """[num_envs] bool: which games, not only lives, ended in this step and were reset.

    Only a new game has more lives after a `done`, or a frame count below the last one. (Lives alone are not enough: a
    bonus life adds one without a `done`, and games with one life always show the same number.)
    """
    more_lives = info["lives"] > last_info["lives"]
    fewer_frames = info["episode_frame_number"] < last_info["episode_frame_number"]
    return dones & (more_lives | fewer_frames)


def bsc_noise(rewards: np.ndarray, noise_prob: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Binary symmetric channel: a clipped reward r of 0 or 1 becomes 1 - r with probability `noise_prob`.

    Rewards of -1 pass through unchanged. rewards: [num_envs] in {-1, 0, 1}. Returns what the learner
    sees and the bool mask of flips.
    """
    flips = (rng.random(rewards.shape) < noise_prob) & (rewards >= 0)
    return np.where(flips, 1 - rewards, rewards), flips


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


@torch.no_grad()
def rmsprop_tf(parameters, square_avgs, learning_rate, alpha, eps):
    """One step of RMSprop in TensorFlow's form: eps inside the root, and `square_avgs` start at 1 (torch: 0).

        v <- alpha v + (1 - alpha) g^2,     w <- w - lr g / sqrt(v + eps)

    Changes parameters (w) and square_avgs (v, of the same shapes) in place.
    """
    for parameter, square_avg in zip(parameters, square_avgs, strict=True):
        square_avg.mul_(alpha).addcmul_(parameter.grad, parameter.grad, value=1 - alpha)
        parameter.addcdiv_(parameter.grad, (square_avg + eps).sqrt_(), value=-learning_rate)


def update(agent, square_avgs, learning_rate, loss_fn, args, batch):
    """One gradient step on the whole rollout. Returns the statistics as tensors: .item() would wait for the GPU.

    batch: the inputs of `rollout_loss` after `args`, each [num_steps * num_envs, ...].
    """
    agent.zero_grad()
    loss, stats = loss_fn(agent, args, *batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    rmsprop_tf(agent.parameters(), square_avgs, learning_rate, args.rmsprop_alpha, args.rmsprop_eps)
    stats |= {"losses/grad_norm": norm, "losses/grad_clipped": (norm > args.max_grad_norm).float()}
    return {name: value.clone() for name, value in stats.items()}  # the next replay of a CUDA graph overwrites its outputs


def train(args, run):
    """Acts, learns and logs until `total_timesteps`. `run` keeps the curves, checkpoints and scores (see Operations)."""
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    global_step = run.checkpoint["global_step"] if run.checkpoint else 0

    torch.manual_seed(args.seed + global_step)  # a resumed run seeds all its generators from the step it resumes at
    noise_rng = np.random.default_rng([args.seed, NOISE, global_step])
    game_seeds = np.random.default_rng([args.seed, GAMES, global_step]).integers(2**31, size=args.num_envs)
    envs = make_envs(resolve_game(args.env_id)[1], args.num_envs, args)
    run.cleanup.callback(envs.close)
    agent = Agent(int(envs.single_action_space.n), args.bf16).to(run.device)
    square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
    act_fn, loss_fn = act, rollout_loss
    if args.compile:  # "reduce-overhead" records CUDA graphs on a GPU, and changes nothing on a CPU
        act_fn, loss_fn = (torch.compile(function, mode="reduce-overhead") for function in (act, rollout_loss))
    recent_returns = deque(maxlen=100)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        for square_avg, saved in zip(square_avgs, run.checkpoint["square_avgs"], strict=True):
            square_avg.copy_(saved)
        recent_returns.extend(run.checkpoint["recent_returns"])

    shape = (args.num_steps, args.num_envs)
    # frames in NHWC memory order behind an NCHW view: the layout of the fast convolutions
    obs = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=run.device).permute(0, 1, 4, 2, 3)
    actions = torch.zeros(shape, dtype=torch.int64, device=run.device)
    values = torch.zeros(shape, device=run.device)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    game_returns, game_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)
    next_obs, info = envs.reset(seed=game_seeds)
    # since the last log
    finished_returns, finished_lengths, history, fits, flips, symbols, seconds = [], [], [], [], 0, 0, 0.0

    for iteration in range(global_step // batch_size, num_iterations):
        start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        learning_rate = fraction_left * args.learning_rate

        # act
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = torch.as_tensor(next_obs)
            with torch.no_grad():
                actions[step], _, values[step] = act_fn(agent, obs[step])
            last_info = info
            next_obs, raw_rewards, terminated, truncated, info = envs.step(actions[step].cpu().numpy())

            rewards[step] = np.sign(raw_rewards)
            if args.noise == "bsc":
                symbols += (rewards[step] >= 0).sum()
                rewards[step], flipped = bsc_noise(rewards[step], args.noise_prob, noise_rng)
                flips += flipped.sum()
            dones[step] = done = terminated | truncated
            time_limit = truncated & ~terminated  # truncated by the time limit: bootstrap from the final observation
            if time_limit.any():
                with torch.no_grad():
                    _, final_values = agent(torch.as_tensor(info["final_obs"][time_limit], device=run.device))
                rewards[step, time_limit] += args.gamma * final_values.cpu().numpy()

            game_returns += raw_rewards
            game_lengths += 1
            over = games_over(done, info, last_info)
            finished_returns += game_returns[over].tolist()
            finished_lengths += game_lengths[over].tolist()
            game_returns[over], game_lengths[over] = 0, 0

        # learn
        with torch.no_grad():
            _, next_values = agent(torch.as_tensor(next_obs, device=run.device))
            rewards_t, dones_t = torch.as_tensor(np.stack([rewards, dones]), device=run.device)  # one transfer
            advantages, returns = compute_gae(rewards_t, values, dones_t, next_values, args.gamma, args.gae_lambda)
        batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, advantages, returns))
        # at every second log: the three backward passes then take under 1 % of the time
        shares = grad_shares(agent, args, rollout_loss, batch) if (iteration + 1) % (2 * args.log_interval) == 0 else {}
        history.append(update(agent, square_avgs, learning_rate, loss_fn, args, batch))
        fits.append(torch.stack([returns, values]))
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
            if symbols:
                stats["charts/noise_rate"] = flips / symbols
            all_returns, all_values = torch.stack(fits).unbind(1)
            unexplained = (all_returns - all_values).var(correction=0) / all_returns.var(correction=0).clamp(min=1e-30)
            stats["losses/explained_variance"] = (1 - unexplained).item()
            stats["charts/learning_rate"] = learning_rate
            run.log(global_step, stats, seconds)
            finished_returns, finished_lengths, history, fits, flips, symbols, seconds = [], [], [], [], 0, 0, 0.0
        if args.eval_interval and global_step % args.eval_interval < batch_size and not last:
            run.evaluate(agent, global_step)
        if last or stopping or (iteration + 1) % args.checkpoint_interval == 0:
            state = {"agent": agent.state_dict(), "square_avgs": square_avgs, "recent_returns": list(recent_returns)}
            run.save(global_step, **state)
        if stopping:
            break
    run.finish(global_step, run.evaluate(agent, global_step))


# === Operations: nothing below changes what is learned ================================================================

# Specific to these environments: packages that decide the numbers, the gradient's shares, evaluation, loading, checks
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")
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


def evaluate(agent, args, device, video_path=None, stop=()):
    """The raw returns of `eval_episodes` whole games, each the first game of a fresh environment.

    Sampled actions come from a generator of their own, so that evaluation does not change the training. `video_path`: an
    mp4 of the first game. `stop`: a list that a signal handler fills; evaluation then returns [].
    """
    rom, returns, playing = resolve_game(args.env_id)[1], np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    seeds = np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes)
    generator = torch.Generator(device).manual_seed(int(seeds[0]))
    with contextlib.ExitStack() as cleanup:
        envs = cleanup.enter_context(contextlib.closing(make_envs(rom, args.eval_episodes, args)))
        obs, info = envs.reset(seed=seeds)
        if video_path:
            # ALE is deterministic: a second emulator with the same seed and actions plays the same game, in colour
            camera = make_envs(rom, 1, args, grayscale=False, img_height=210, img_width=160, stack_num=1)
            cleanup.callback(camera.close)
            video = cleanup.enter_context(imageio.get_writer(video_path, fps=15, macro_block_size=2))
            video.append_data(camera.reset(seed=seeds[:1])[0][0, 0])
        while playing.any() and not stop:
            actions = np.zeros(args.eval_episodes, dtype=np.int64)
            with torch.no_grad():
                actions[playing] = act(agent, torch.as_tensor(obs[playing], device=device), generator)[0].cpu().numpy()
            last_info = info
            obs, rewards, terminated, truncated, info = envs.step(actions)
            returns += rewards * playing
            ended = games_over(terminated | truncated, info, last_info)
            if video_path and playing[0] and not ended[0]:
                video.append_data(camera.step(actions[:1])[0][0, 0])
            playing &= ~ended
    return [] if stop else returns.tolist()


def load_agent(args, checkpoint, device):
    """The trained agent, from a run's checkpoint."""
    agent = Agent(len(checkpoint["agent"]["actor.bias"]), args.bf16)
    agent.load_state_dict(checkpoint["agent"])
    return agent.to(device)


def load_policy(run_folder):
    """A trained policy and a game for it: `policy(obs)` samples actions [1] for `envs`, a vector environment of one game."""
    args, checkpoint = load_run(run_folder)
    agent = load_agent(args, checkpoint, "cpu")

    @torch.no_grad()
    def policy(obs):
        return act(agent, torch.as_tensor(obs))[0].numpy()

    return policy, make_envs(resolve_game(args.env_id)[1], 1, args)


def resolve_env(env_id):
    """The environment's name in the run folder and in args.json."""
    return resolve_game(env_id)[0]


def check_env(args):
    """Refuses combinations of arguments, and environments, that this script cannot learn."""
    multiple = args.checkpoint_interval % args.log_interval == 0
    require(args, "checkpoint_interval", multiple, f"a multiple of log_interval = {args.log_interval}")
    enough = args.num_envs * args.num_steps > 1 or not args.norm_adv
    require(args, "norm_adv", enough, "num_envs x num_steps of 2 or more with it")
    plain = args.beta > 0 and not args.literal_signs
    require(args, "mean_weight", plain or not args.mean_weight, "off, or beta above 0, no literal_signs")
    try:
        resolve_game(args.env_id)
    except gymnasium.error.Error as error:
        fail(f"--env-id {args.env_id}: no such Atari game ({error})")
    if args.bf16 and not (args.cuda and torch.cuda.is_available()) and not cpu_has_bf16():
        print("--bf16: this CPU has no bf16 instructions and emulates them, slower than float32", file=sys.stderr)


def cpu_has_bf16():
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16, AMX, or the BF16 extension of Arm)."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
