"""PPO and SPPO on Atari: Proximal Policy Optimization with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The agent takes action i with probability pi_i; r = pi_i / pi_old_i; A is its advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i = -A Z (1 - pi_i) / pi_old_i     where the clip does not cut
    Eq. 9   L      = alpha L_ppo + beta L_rppo                                          Z < 0, -1 in the paper

Examples:

    python sppo_atari.py --env-id Alien --beta 10 --noise bsc       # SPPO, rewards through a noisy channel
    python sppo_atari.py --env-id Alien --alpha 1 --beta 0          # PPO, the baseline
    python sppo_atari.py --resume runs/Alien__sppo_atari__1__1700000000

What differs from the paper and its released code:

* Eq. 8 as printed flips the sign of L_rppo where A < 0, and its gradient then points against PPO's. The default is the
  form that the paper's analysis and its released code use, one sign for both; `--literal-signs` is the printed one.
* For Z = -1 the gradient of L_rppo equals that of L_ppo, sample by sample: SPPO is PPO whose policy loss weighs
  alpha + beta against the value loss, the entropy bonus and the gradient-norm clip. `--alpha 10.5 --beta 0` is thus
  the control of `--alpha 0.5 --beta 10` and must learn alike.
* The released code runs on Stable-Baselines3. Here `ale_py.vector_env.AtariVectorEnv` steps the games in C++ threads. It
  presses FIRE once when a game starts, not after each lost life, and takes the maximum of two frames after they
  are grey, not before. The learning rate and the clip range fall as in CleanRL, one iteration behind SB3's. The update
  itself is SB3's to rounding.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "ale-py==0.12.1",
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
import ctypes
import difflib
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
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO and SPPO on Atari. `--alpha 1 --beta 0` is PPO; the defaults are the paper's SPPO."""

    exp_name: str = "sppo_atari"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the weights, the actions, the minibatches, the games and (a separate generator) the noise"""
    torch_deterministic: bool = True
    """make cuDNN choose deterministic kernels"""
    cuda: bool = True
    """use a GPU if there is one"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project_name: str = "symmetric-rl"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B user or team"""
    capture_video: bool = False
    """write an mp4 of the first game of each evaluation to videos/ in the run folder"""

    env_id: str = "Alien"
    """the game: Alien, AlienNoFrameskip-v4 and ALE/Alien-v5 all name the same one"""
    repeat_action_probability: float = 0.0
    """chance that a frame repeats the last action instead of the new one (sticky actions), 0 to 1"""
    total_timesteps: int = 5_000_000
    """environment steps (agent decisions; a step is 4 frames), rounded down to whole iterations"""
    learning_rate: float = 2.5e-4
    """Adam's step size"""
    num_envs: int = 8
    """games played side by side"""
    num_steps: int = 128
    """steps of each game between two updates"""
    anneal_lr: bool = True
    """lower the learning rate and the clip range linearly to 0"""
    gamma: float = 0.99
    """discount factor, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, 0 to 1"""
    update_epochs: int = 4
    """passes over each rollout"""
    minibatch_size: int = 256
    """samples per gradient step; divides num_envs x num_steps"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.1
    """PPO's eps: the ratio's clip range is [1 - eps, 1 + eps]"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss, a mean square (without a factor 1/2), unclipped"""
    max_grad_norm: float = 0.5
    """norm to which the gradient is clipped"""
    target_kl: float | None = None
    """end the update after an epoch whose last minibatch has a larger approx_kl, in nats"""

    alpha: float = 0.5
    """weight of the PPO loss (Eq. 9)"""
    beta: float = 1.0
    """weight of the reverse loss (Eq. 9); the paper takes 1 without noise and 10 with"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 8), below 0"""
    literal_signs: bool = False
    """the reverse loss with the signs that Eq. 8 prints for A < 0, for study"""
    noise: Literal["none", "bsc"] = "none"
    """bsc: a binary symmetric channel flips the learner's clipped rewards 0 and 1"""
    noise_prob: float = 0.1
    """probability of a flip, 0 to 1"""

    eval_episodes: int = 10
    """whole games that score the trained policy: no noise, raw rewards, sampled actions; 0 for none"""
    eval_interval: int = 0
    """also evaluate every so many steps; 0 for the end only"""
    checkpoint_interval: int = 50
    """iterations between two checkpoints"""
    resume: str | None = None
    """run folder to continue, with its own arguments; only a larger --total-timesteps and tracking flags may be added"""
    bf16: bool = False
    """run the network in bfloat16: faster only on hardware that has bf16 instructions"""
    compile: bool = False
    """torch.compile the acting, the advantages and the loss (on a GPU into CUDA graphs); the first minute is slower"""
    num_threads: int = 0
    """CPU threads of torch and of the games; 0 lets each take all cores"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""


# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
EVALUATION, NOISE, GAMES = 1, 2, 3
LENGTH = "total_timesteps"  # the argument that a resumed run may raise
# What else decides a run's numbers; args.json and result.json hold their versions
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")


# --- environments -----------------------------------------------------------------------------------------------------


def resolve_game(env_id: str) -> tuple[str, str]:
    """The game's name and its ROM for any usual spelling: Alien, AlienNoFrameskip-v4, ALE/Alien-v5 -> Alien, alien.

    Raises ValueError with the close matches if there is no such game for one player.
    """
    games = {
        spec.id.removeprefix("ALE/").removesuffix("-v5"): spec.kwargs["game"]
        for spec in gymnasium.registry.values()
        if re.fullmatch(r"ALE/\w+-v5", spec.id)
    }
    plain = {name.lower(): name for name in games}
    wanted = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d+)?$", "", env_id).replace("_", "").lower()
    if wanted not in plain:
        close = [plain[name] for name in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)]
        expected = " or ".join(close) or "the name of an Atari game, such as Alien"
        raise ValueError(f"--env-id {env_id}: no such Atari game; expected {expected}")
    return plain[wanted], games[plain[wanted]]


def make_envs(rom: str, num_envs: int, args: Args, **preprocessing) -> AtariVectorEnv:
    """`num_envs` games, stepped in C++ threads: frame skip 4, maximum of 2 frames, grey 84x84, 4 frames stacked.

    `terminated` marks a lost life, but the game goes on (SB3's and CleanRL's episodic life); whole games reset themselves
    within the step that ends them. Rewards stay raw: the loop clips them, the logs do not. 108,000 frames truncate a game.
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

    A reward of -1 is no symbol of this channel and passes. rewards: [num_envs] in {-1, 0, 1}. Returns what the learner
    sees and the bool mask of flips.
    """
    flips = (rng.random(rewards.shape) < noise_prob) & (rewards >= 0)
    return np.where(flips, 1 - rewards, rewards), flips


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


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_ppo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_coef: float | torch.Tensor,
    Z: float = -1.0,
    literal_signs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The PPO loss and the reverse PPO loss of the actions that were taken; the caller adds alpha and beta (Eq. 9).

        Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps)),   r = pi_i / pi_old_i
        Eq. 8   L_rppo = -A Z (1 - pi_i) / pi_old_i                where A r <= A clip(r), else 0

    The sum over the other actions in Eq. 8 is 1 - pi_i, so L_rppo needs nothing that L_ppo has not computed. As r is
    pi_i / pi_old_i, (1 - pi_i) / pi_old_i = 1 / pi_old_i - r: with Z = -1 the two losses differ by a constant, sample by
    sample, and have the same gradient.

    Args:
        logprobs, old_logprobs: [B], log pi_i of the policy now and of the one that acted.
        advantages: [B], A.
        clip_coef: eps.
        Z: stands for log 0, below 0.
        literal_signs: L_rppo as Eq. 8 prints it, with the opposite sign where A < 0.

    Returns:
        policy_loss, reverse_loss: scalars, means over all B samples; finite for any finite input.
        stats: scalars without gradient: old_approx_kl (k1), approx_kl (k3, http://joschu.net/blog/kl-approx.html), clipfrac.
    """
    logratio = logprobs - old_logprobs
    ratio = logratio.clamp(-20, 20).exp()  # keeps r finite; cuts a gradient that Eq. 3 keeps only for A < 0 and r > e^20
    surrogate = advantages * ratio
    with torch.no_grad():
        clipped = advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
        kept = surrogate <= clipped  # the minimum is the surrogate; where it is not, the clip has cut the gradient
        signed = advantages.abs() if literal_signs else advantages
        weights = torch.where(kept, -signed * Z, 0.0)
    policy_loss = -torch.where(kept, surrogate, clipped).mean()
    # 1 / pi_old_i is a constant: no gradient hangs on its clamp, which keeps it from overflowing float32
    others = (-old_logprobs).clamp(max=60).exp() - ratio  # sum_{j != i} pi_j / pi_old_i
    reverse_loss = (weights * others).mean()

    with torch.no_grad():
        stats = {
            "old_approx_kl": -logratio.mean(),
            "approx_kl": (logratio.clamp(-20, 20).expm1() - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return policy_loss, reverse_loss, stats


def minibatch_loss(agent, args, clip_coef, obs, actions, old_logprobs, advantages, returns):
    """The whole loss of one minibatch: alpha L_ppo + beta L_rppo + vf_coef L_value - ent_coef H, and its parts by name.

    Shapes: obs [B, 4, 84, 84] uint8, the others [B]; clip_coef a 0-d tensor, so that a compiled graph sees it change.
    """
    all_logprobs, values = agent(obs)
    logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    raw_advantages = advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss, reverse_loss, stats = symmetric_ppo_loss(
        logprobs, old_logprobs, advantages, clip_coef, args.Z, args.literal_signs
    )
    value_loss = F.mse_loss(values, returns)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    stats = {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        **{f"losses/{name}": value for name, value in stats.items()},
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


def update(agent, optimizer, loss_fn, args, clip_coef, batch: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """`update_epochs` passes over the rollout in shuffled minibatches; returns the mean of each statistic.

    batch: what `minibatch_loss` takes behind `clip_coef`, each tensor [num_steps * num_envs, ...]. Nothing in the
    loop waits for the device (without target_kl), so a GPU stays busy.
    """
    collected = []
    for _ in range(args.update_epochs):
        for indices in torch.randperm(len(batch[0]), device=batch[0].device).split(args.minibatch_size):
            optimizer.zero_grad()
            loss, stats = loss_fn(agent, args, clip_coef, *(tensor[indices] for tensor in batch))
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            collected.append(torch.stack(list(stats.values())))
        if args.target_kl is not None and stats["losses/approx_kl"] > args.target_kl:
            break
    return dict(zip(stats, torch.stack(collected).mean(dim=0).tolist(), strict=True))


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(agent, rom, args, device, video_path=None, stop=()) -> list[float]:
    """The raw returns of `eval_episodes` whole games, the first game of as many fresh environments.

    Actions are sampled, from a generator of their own: an evaluation does not change the training that goes on after
    it. `video_path`: an mp4 of the first game. `stop`: filled by a signal handler; ends the evaluation, returning [].
    """
    envs = make_envs(rom, args.eval_episodes, args)
    seeds = np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes)
    generator = torch.Generator(device).manual_seed(int(seeds[0]))
    returns, playing = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    obs, info = envs.reset(seed=seeds)
    with contextlib.ExitStack() as cleanup:
        if video_path:
            # ALE is deterministic: a second emulator with the same seed and actions plays the same game, in colour
            camera = make_envs(rom, 1, args, grayscale=False, img_height=210, img_width=160, stack_num=1)
            video_path.parent.mkdir(exist_ok=True)
            video = cleanup.enter_context(imageio.get_writer(video_path, fps=15, macro_block_size=2))
            video.append_data(camera.reset(seed=seeds[:1])[0][0, 0])
        while playing.any() and not stop:
            with torch.no_grad():
                actions, _, _ = act(agent, torch.as_tensor(obs[playing], device=device), generator)
            all_actions = np.zeros(args.eval_episodes, dtype=np.int64)
            all_actions[playing] = actions.cpu().numpy()
            last_info = info
            obs, rewards, terminated, truncated, info = envs.step(all_actions)
            returns += rewards * playing
            ended = games_over(terminated | truncated, info, last_info)
            if video_path and playing[0] and not ended[0]:
                video.append_data(camera.step(all_actions[:1])[0][0, 0])
            playing &= ~ended
    return [] if stop else returns.tolist()


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


def check_args(args: Args) -> None:
    """Refuses values that no run can have, before anything is made."""
    check_common(args)
    for name in ("update_epochs", "minibatch_size"):
        require(args, name, getattr(args, name) >= 1, "a whole number of 1 or more")
    for name in ("clip_coef", "target_kl"):
        value = getattr(args, name)
        require(args, name, value is None or (math.isfinite(value) and value > 0), "a finite number above 0")
    batch_size = args.num_envs * args.num_steps
    divides = batch_size % args.minibatch_size == 0
    require(args, "minibatch_size", divides, f"a divisor of num_envs x num_steps = {batch_size}")
    require(args, "minibatch_size", args.minibatch_size > 1 or not args.norm_adv, "2 or more with norm_adv")
    for name in ("repeat_action_probability", "noise_prob"):
        require(args, name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    try:
        resolve_game(args.env_id)
    except ValueError as error:
        fail(str(error))
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


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory (no mmap for large blocks, no trimming): the kernel would otherwise zero every
    large array anew, a tenth of a CPU update. Elsewhere than on Linux with glibc it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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
    keep_freed_memory()
    game, rom = resolve_game(args.env_id)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    run_folder, checkpoint, identity = open_run(args, game, device)
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
    print(
        f"{Path(__file__).name}: --env-id {args.env_id} is {game} (ROM {rom}, frame skip 4, sticky actions "
        f"{args.repeat_action_probability}); {device.type}, {torch.get_num_threads()} threads; {run_folder}"
    )
    if args.bf16 and device.type == "cpu" and not cpu_has_bf16():
        print("--bf16: this CPU has no bf16 instructions and emulates them, slower than float32", file=sys.stderr)

    torch.manual_seed(args.seed)
    noise_rng = np.random.default_rng([args.seed, NOISE])
    game_seeds = np.random.default_rng([args.seed, GAMES, start_step]).integers(2**31, size=args.num_envs)
    envs = make_envs(rom, args.num_envs, args)
    agent = Agent(int(envs.single_action_space.n), args.bf16).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    act_fn, gae_fn, loss_fn = act, compute_gae, minibatch_loss
    if args.compile:
        act_fn, loss_fn = compiled(act, device), compiled(minibatch_loss, device)
        if device.type == "cuda":  # no graph, which would overwrite what it returned; on a CPU there is nothing to gain
            gae_fn = torch.compile(compute_gae)
    seconds, recent_returns, scores, saved = 0.0, deque(maxlen=100), [], checkpoint is not None
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        noise_rng.bit_generator.state = checkpoint["noise_rng"]
        seconds, recent_returns = checkpoint["seconds"], deque(checkpoint["recent_returns"], maxlen=100)
        scores = checkpoint["scores"] if start_step >= num_iterations * batch_size else []

    def end_if_broken(values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"{run_folder / 'checkpoint.pt'} is from before" if saved else "there is no checkpoint yet"
                sys.exit(f"{Path(__file__).name}: {name} is {value} at step {global_step:,}; the run ends, {kept}")

    def save_checkpoint() -> None:
        nonlocal saved
        with torch.no_grad():  # the last step of an update can break the policy after its losses were finite
            _, next_values = agent(torch.as_tensor(next_obs, device=device))
        end_if_broken({"the value of the next observation": next_values.sum().item()})
        writer.flush()
        state = {
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "global_step": global_step,
            "seconds": seconds,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
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
        returns = evaluate(agent, rom, args, device, video_path, stop)
        if returns:
            writer.add_scalar("eval/episodic_return", np.mean(returns), global_step)
            if video_path and args.track:
                wandb.log({"videos/eval": wandb.Video(str(video_path), format="mp4"), "global_step": global_step})
        elif video_path:  # interrupted: half a game
            video_path.unlink(missing_ok=True)
        return returns

    # the rollout; frames are stored as uint8 in NHWC order behind an NCHW view, the layout that the network wants
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    clip_coef = torch.tensor(args.clip_coef, device=device)

    next_obs, info = envs.reset(seed=game_seeds)
    game_returns, game_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)
    start_seconds = seconds
    progress = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, disable=None)
    for iteration in range(start_step // batch_size, num_iterations):
        iteration_start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = fraction_left * args.learning_rate
        clip_coef.fill_(fraction_left * args.clip_coef)

        # act for num_steps steps
        finished_returns, finished_lengths, flips, symbols = [], [], 0, 0
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = torch.as_tensor(next_obs)
            with torch.no_grad():
                actions[step], logprobs[step], values[step] = act_fn(agent, obs[step])
            last_info = info
            next_obs, raw_rewards, terminated, truncated, info = envs.step(actions[step].cpu().numpy())

            rewards[step] = np.sign(raw_rewards)
            if args.noise == "bsc":
                symbols += (rewards[step] >= 0).sum()
                rewards[step], flipped = bsc_noise(rewards[step], args.noise_prob, noise_rng)
                flips += flipped.sum()
            done = terminated | truncated
            dones[step] = done
            cut_off = truncated & ~terminated  # the game went on: bootstrap from its last observation
            if cut_off.any():
                with torch.no_grad():
                    _, final_values = agent(torch.as_tensor(info["final_obs"][cut_off], device=device))
                rewards[step, cut_off] += args.gamma * final_values.cpu().numpy()

            game_returns += raw_rewards
            game_lengths += 1
            over = games_over(done, info, last_info)
            finished_returns += game_returns[over].tolist()
            finished_lengths += game_lengths[over].tolist()
            game_returns[over], game_lengths[over] = 0, 0

        # learn from them
        with torch.no_grad():
            _, next_values = agent(torch.as_tensor(next_obs, device=device))
            seen = torch.as_tensor(np.stack([rewards, dones]), device=device)  # one transfer
            advantages, returns = gae_fn(seen[0], values, seen[1], next_values, args.gamma, args.gae_lambda)
        batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))
        stats = update(agent, optimizer, loss_fn, args, clip_coef, batch)
        end_if_broken(stats)
        seconds += time.perf_counter() - iteration_start

        # log
        recent_returns.extend(finished_returns)
        if finished_returns:
            stats["charts/episodic_return"] = np.mean(finished_returns)
            stats["charts/episodic_return_100"] = np.mean(recent_returns)
            stats["charts/episodic_length"] = np.mean(finished_lengths)
        if symbols:
            stats["charts/noise_rate"] = flips / symbols
        stats["losses/explained_variance"] = (1 - (returns - values).var() / returns.var()).item()
        stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        stats["charts/SPS"] = (global_step - start_step) / (seconds - start_seconds)
        for name, value in stats.items():
            writer.add_scalar(name, value, global_step)
        progress.update(batch_size)
        if recent_returns:
            progress.set_postfix_str(f"return {np.mean(recent_returns):.1f}", refresh=False)
        eval_due = args.eval_interval and global_step % args.eval_interval < batch_size
        if eval_due and args.eval_episodes and iteration + 1 < num_iterations:
            evaluate_and_log()
        if (iteration + 1) % args.checkpoint_interval == 0:
            save_checkpoint()
        if stop:
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
    score = f"score {result['score']:.1f} over {len(scores)} games" if scores else "not evaluated"
    print(f"{Path(__file__).name}: {global_step:,} steps in {seconds:.0f} s, {score}; {run_folder / 'result.json'}")


if __name__ == "__main__":
    arguments = parse_args(sys.argv[1:], Args())
    check_args(arguments)
    main(arguments)
