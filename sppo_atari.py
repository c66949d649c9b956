"""SPPO on Atari: PPO with the symmetric RL loss, in one file (Byun and Perrault, ICML 2025, https://arxiv.org/abs/2405.17618).

The agent takes action i with probability pi_i; r = pi_i / pi_old_i; A is the advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i      where A r <= A clip(r), else 0; Z < 0, -1 in the paper
    Eq. 9   L      = alpha L_ppo + beta L_rppo

Eq. 8 as printed has another sign for A < 0 (`--literal-signs`; docs/loss.md, fact 1).

    python sppo_atari.py --env-id Alien --beta 10 --noise bsc                           # SPPO, rewards through a noisy channel
    python sppo_atari.py --env-id Alien --alpha 1 --beta 0 --noise bsc                  # PPO, the baseline
    python sppo_atari.py --env-id Alien --alpha 10.5 --beta 0 --noise bsc               # the control: PPO with SPPO's gradient
    python sppo_atari.py --env-id Alien --alpha 1 --beta 0 --noise bsc --no-norm-adv    # the released code's baseline

The algorithm ends at the line "Operations". docs/differences.md lists what differs from the paper and its released code.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "pydantic==2.14.4",
#     "filelock==4.2.12", "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1",
# ]
# ///

import contextlib
import ctypes
import io
import json
import math
import os
import re
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

# Torch's idle threads spin on cores that the games need. With this small number they sleep soon. Linux; read at torch's import.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import filelock
import gymnasium
import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(config={"allow_inf_nan": False, "extra": "forbid"})
class Args:
    """PPO and SPPO on Atari. The defaults are the paper's SPPO without noise; `--alpha 1 --beta 0` is PPO."""

    # symmetric loss and noise
    alpha: NonNegativeFloat = 0.5  # weight of the PPO loss (Eq. 9)
    beta: NonNegativeFloat = 1.0  # weight of the reverse loss (Eq. 9); the paper uses 1 without noise and 10 with
    Z: Annotated[float, Field(lt=0)] = -1.0  # the constant that stands for log 0 in the reverse loss (Eq. 8)
    literal_signs: bool = False  # use the sign that Eq. 8 prints for A < 0; its gradient opposes PPO's
    noise: Literal["none", "bsc"] = "none"  # bsc: a binary symmetric channel flips clipped rewards 0 <-> 1
    noise_prob: Probability = 0.1  # probability of a flip

    # environment and algorithm
    env_id: str = "Alien"  # the game: Alien, AlienNoFrameskip-v4 and ALE/Alien-v5 are the same
    repeat_action_probability: Probability = 0.0  # sticky actions: probability that a frame repeats the last action
    total_timesteps: PositiveInt = 5_000_000  # environment steps (of 4 frames), rounded down to whole iterations
    learning_rate: PositiveFloat = 2.5e-4  # learning rate of Adam
    adam_eps: PositiveFloat = 1e-5  # epsilon of Adam
    num_envs: PositiveInt = 8  # number of parallel games
    num_steps: PositiveInt = 128  # steps of each game per rollout
    anneal_lr: bool = True  # anneal learning rate and clip range linearly to 0 (CleanRL: the rate alone)
    gamma: Probability = 0.99  # discount factor
    gae_lambda: Probability = 0.95  # lambda of generalised advantage estimation
    update_epochs: PositiveInt = 4  # passes over each rollout
    minibatch_size: Annotated[int, Field(ge=2)] = 256  # samples per gradient step; must divide num_envs x num_steps
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: PositiveFloat = 0.1  # eps of PPO: the ratio's clip range is [1 - eps, 1 + eps]
    ent_coef: NonNegativeFloat = 0.01  # weight of the entropy bonus
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss (mean squared error without a factor 1/2, unclipped)
    max_grad_norm: PositiveFloat = 0.5  # maximum norm of the gradient
    target_kl: PositiveFloat | None = None  # end the update after an epoch if approx_kl of its last minibatch exceeds this

    # evaluation, logging, machine
    eval_episodes: NonNegativeInt = 10  # games that score the policy: raw rewards, no noise, sampled actions
    eval_interval: NonNegativeInt = 0  # evaluate every this many steps; 0: only at the end
    capture_video: bool = False  # film the first game of each evaluation, in videos/ of the run folder
    track: bool = False  # log to Weights & Biases; WANDB_MODE=offline, WANDB_RUN_GROUP, WANDB_TAGS and WANDB_DIR work
    wandb_project_name: str | None = None  # project in W&B; by default WANDB_PROJECT
    wandb_entity: str | None = None  # user or team in W&B; by default WANDB_ENTITY
    exp_name: Annotated[str, Field(pattern=r"^[\w.+-]{1,100}$")] | None = None  # in the run folder's name; default: the arm
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # seed of everything random
    run_dir: str = "runs"  # folder in which the run folder is made
    resume: str | None = None  # continue the run in this folder with its own arguments
    evaluate: str | None = None  # play --eval-episodes games with the policy of the run in this folder, and exit
    checkpoint_interval: PositiveInt = 50  # save a checkpoint every this many iterations
    cuda: bool = True  # use a GPU if there is one
    torch_deterministic: bool = True  # use deterministic cuDNN kernels
    bf16: bool = False  # run the network in bfloat16; faster only on hardware with bf16 instructions
    compile: bool = False  # torch.compile acting and the gradient step, as CUDA graphs on a GPU; gains little on a CPU
    num_threads: NonNegativeInt = 0  # CPU threads of torch and of the games; 0: all cores


# Purposes of generators. Each is seeded with [seed, purpose, step], but without the step for evaluations: all start alike
EVALUATION, NOISE, GAMES = 1, 2, 3


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z=-1.0, literal_signs=False):
    """L_ppo and L_rppo (Eq. 3 and 8), means over the batch, and statistics. The inputs are [B]; the caller weights (Eq. 9).

    In Eq. 8 sum_{j != i} pi_j / pi_old_i = 1 / pi_old_i - r. 1 / pi_old_i is left out: it has no gradient and overflows
    float32. With Z = -1 both losses have the same gradient, sample by sample. With literal_signs they oppose where A < 0.
    """
    logratio = logprobs - old_logprobs
    ratio = logratio.clamp(-20, 20).exp()  # finite; changes no gradient while |log r| < 20

    surrogate = advantages * ratio
    clipped = advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(surrogate, clipped).mean()

    signed = advantages.abs() if literal_signs else advantages
    weights = torch.where(surrogate <= clipped, -signed * Z, 0.0)  # 0 where the clip cuts PPO's gradient
    reverse_loss = -(weights * ratio).mean()

    with torch.no_grad():
        stats = {
            "old_approx_kl": -logratio.mean(),
            "approx_kl": (logratio.clamp(-20, 20).expm1() - logratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return policy_loss, reverse_loss, stats


def minibatch_loss(agent, args, clip_coef, obs, actions, old_logprobs, advantages, returns):
    """The loss of a minibatch and its statistics. obs: [B, 4, 84, 84] uint8, the others [B]; clip_coef: a 0-d tensor."""
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

    stats |= {"policy_loss": policy_loss, "reverse_loss": reverse_loss, "value_loss": value_loss, "entropy": entropy}
    stats = {f"losses/{name}": value.detach() for name, value in stats.items()}
    stats["charts/adv_sign_change"] = (raw_advantages.sign() != advantages.sign()).float().mean()  # Figure 2
    return loss, stats


# --- agent ------------------------------------------------------------------------------------------------------------


def layer_init(layer, std: float = math.sqrt(2)):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """NatureCNN (Mnih et al. 2015) with a policy head and a value head."""

    def __init__(self, num_actions, bf16=False):
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

    def forward(self, obs):
        """obs: [B, 4, 84, 84] uint8 -> log-probabilities of all actions [B, num_actions], values [B]; both float32."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            if self.bf16:  # bfloat16 holds 0 .. 255 exactly: dividing the first weights is cheaper than dividing the pixels
                conv = self.network[0]
                hidden = self.network[1:](F.conv2d(obs.bfloat16(), conv.weight / 255.0, conv.bias, conv.stride))
            else:
                hidden = self.network(obs.float().div_(255.0))  # in place: one large array less to allocate
            logits, values = self.actor(hidden), self.critic(hidden)
        return F.log_softmax(logits.float(), dim=-1), values.float().squeeze(-1)


def act(agent, obs, generator=None):
    """Sampled actions, their log-probabilities and the values, each [B], for obs [B, 4, 84, 84]."""
    logprobs, values = agent(obs)
    # Gumbel-max: argmax(log pi + G) samples pi, with G = -log E and E ~ Exp(1); it takes a generator, and it compiles
    gumbel = -torch.empty_like(logprobs).exponential_(generator=generator).log()
    actions = (logprobs + gumbel).argmax(dim=-1)
    return actions, logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), values


# --- environment ------------------------------------------------------------------------------------------------------


def resolve_env(env_id):
    """Alien, AlienNoFrameskip-v4 or ALE/Alien-v5 -> the game's name and its ROM: Alien, alien. Errors are Gymnasium's."""
    name = re.sub(r"^(ALE/(\w+)-v5|(\w+?)((NoFrameskip|Deterministic)?-v[04])?)$", r"\2\3", env_id)
    return name, gymnasium.spec(f"ALE/{name}-v5").kwargs["game"]


def make_envs(rom, num_envs, args, **preprocessing):
    """Games stepped in C++ threads: frame skip 4, maximum of 2 frames, grey 84x84, 4 frames stacked, raw rewards.

    `terminated` marks a lost life, and the game goes on: nothing presses FIRE then (SB3 and CleanRL do), and the frame stack
    stays. A finished game restarts within the same step. 108,000 frames truncate a game.
    """
    settings = {"repeat_action_probability": args.repeat_action_probability, "reward_clipping": False, "episodic_life": False}
    settings |= {"life_loss_info": True, "autoreset_mode": AutoresetMode.SAME_STEP}
    return AtariVectorEnv(rom, num_envs, num_threads=min(args.num_threads, num_envs), **settings, **preprocessing)


def games_over(dones, info, last_info):
    """[num_envs] bool: where a whole game, not only a life, ended in this step and was reset.

    After a `done` only a new game has more lives or a lower frame number. Lives alone miss games that have one life.
    """
    more_lives = info["lives"] > last_info["lives"]
    fewer_frames = info["episode_frame_number"] < last_info["episode_frame_number"]
    return dones & (more_lives | fewer_frames)


def bsc_noise(rewards, noise_prob, rng):
    """Binary symmetric channel: flips clipped rewards of 0 and 1, not -1. Returns rewards and which flipped, [num_envs]."""
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


def gradient_step(agent, optimizer, args, clip_coef, indices, rows):
    """One step of Adam on the samples `indices`; rows: the `batch` of `update`, NHWC frames. Returns statistics as tensors."""
    obs, *others = (tensor.index_select(0, indices) for tensor in rows)
    loss, stats = minibatch_loss(agent, args, clip_coef, obs.permute(0, 3, 1, 2), *others)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    agent.zero_grad()  # last: then every step finds no gradients, as the first does, and one compilation serves all
    return stats | {"losses/grad_norm": norm, "losses/grad_clipped": (norm > args.max_grad_norm).float()}


def update(agent, optimizer, step_fn, args, clip_coef, batch):
    """`update_epochs` passes over the rollout in shuffled minibatches. Returns the mean of each statistic.

    step_fn: `gradient_step` or its compiled form. batch: five tensors [num_steps * num_envs, ...], as `minibatch_loss` has.
    """
    history = []
    rows = (batch[0].permute(0, 2, 3, 1), *batch[1:])  # index_select is fast on rows that are contiguous
    for _ in range(args.update_epochs):
        for indices in torch.randperm(len(batch[0]), device=batch[0].device).split(args.minibatch_size):
            stats = step_fn(agent, optimizer, args, clip_coef, indices, rows)
            history.append(torch.stack(list(stats.values())))  # no .item(), which would wait for the GPU
        if args.target_kl is not None and stats["losses/approx_kl"] > args.target_kl:
            break
    return dict(zip(stats, torch.stack(history).mean(dim=0).tolist(), strict=True))


def train(args, run):
    """Acts, learns and logs until `total_timesteps`. `run` keeps step, curves, checkpoints and scores (see Operations)."""
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_flush_denormal(True)  # a dead unit's gradient averages decay to 1e-40, where CPUs are 20 times slower
    torch.manual_seed(args.seed + run.global_step)  # a resumed run seeds all its generators from the step it resumes at
    noise_rng = np.random.default_rng([args.seed, NOISE, run.global_step])
    game_seeds = np.random.default_rng([args.seed, GAMES, run.global_step]).integers(2**31, size=args.num_envs)
    envs = make_envs(resolve_env(args.env_id)[1], args.num_envs, args)
    run.cleanup.callback(envs.close)
    agent = Agent(int(envs.single_action_space.n), args.bf16).to(run.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=not args.compile)
    act_fn, step_fn = act, gradient_step
    if args.compile:  # "reduce-overhead" records CUDA graphs on a GPU, and changes nothing on a CPU
        torch._dynamo.config.trace_autograd_ops = True  # compiles the backward pass in the same graph
        act_fn, step_fn = (torch.compile(function, mode="reduce-overhead") for function in (act, gradient_step))
    recent_returns = deque(maxlen=100)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        optimizer.load_state_dict(run.checkpoint["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        recent_returns.extend(run.checkpoint["recent_returns"])

    shape = (args.num_steps, args.num_envs)
    # frames in NHWC memory order behind an NCHW view: the layout of the fast convolutions
    obs = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=run.device).permute(0, 1, 4, 2, 3)
    actions = torch.zeros(shape, dtype=torch.int64, device=run.device)
    logprobs, values = torch.zeros(shape, device=run.device), torch.zeros(shape, device=run.device)
    rewards, dones = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    clip_coef = torch.tensor(args.clip_coef, device=run.device)  # a tensor, as the rate below: new numbers would recompile
    share_sample = torch.from_numpy(np.random.default_rng(0).permutation(batch_size)[: args.minibatch_size])  # for grad_shares
    game_returns, game_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)
    next_obs, info = envs.reset(seed=game_seeds)

    for iteration in range(run.global_step // batch_size, num_iterations):
        start = time.perf_counter()
        fraction_left = 1.0 - iteration / num_iterations if args.anneal_lr else 1.0
        learning_rate = fraction_left * args.learning_rate
        optimizer.param_groups[0]["lr"] = torch.tensor(learning_rate, device=run.device) if args.compile else learning_rate
        clip_coef.fill_(fraction_left * args.clip_coef)

        # act
        finished_returns, finished_lengths, flips, symbols = [], [], 0, 0
        for step in range(args.num_steps):
            run.global_step += args.num_envs
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
            dones[step] = done = terminated | truncated
            cut = truncated & ~terminated  # by the time limit: bootstrap from the final observation
            if cut.any():
                with torch.no_grad():
                    _, final_values = agent(torch.as_tensor(info["final_obs"][cut], device=run.device))
                rewards[step, cut] += args.gamma * final_values.cpu().numpy()

            game_returns += raw_rewards
            game_lengths += 1
            over = games_over(done, info, last_info)
            finished_returns += game_returns[over].tolist()
            finished_lengths += game_lengths[over].tolist()
            game_returns[over], game_lengths[over] = 0, 0

        # learn
        with torch.no_grad():
            _, next_values = agent(torch.as_tensor(next_obs, device=run.device))
            # on the CPU: on a GPU each of its small steps would be several launches
            arrays = torch.from_numpy(rewards), values.cpu(), torch.from_numpy(dones), next_values.cpu()
            advantages, returns = torch.stack(compute_gae(*arrays, args.gamma, args.gae_lambda)).to(run.device)
        batch = tuple(tensor.flatten(0, 1) for tensor in (obs, actions, logprobs, advantages, returns))
        shares = {}
        if iteration % 20 == 0:  # three more backward passes, in all under 1 % of the time
            shares = grad_shares(agent, args, minibatch_loss, (clip_coef, *(tensor[share_sample] for tensor in batch)))
        stats = update(agent, optimizer, step_fn, args, clip_coef, batch) | shares

        # log
        recent_returns.extend(finished_returns)
        if finished_returns:
            stats["charts/episodic_return"] = np.mean(finished_returns)
            stats["charts/episodic_return_100"] = np.mean(recent_returns)
            stats["charts/episodic_length"] = np.mean(finished_lengths)
        if symbols:
            stats["charts/noise_rate"] = flips / symbols
        if returns.var(correction=0) > 1e-10:  # else there is nothing to explain but rounding
            unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
            stats["losses/explained_variance"] = (1 - unexplained).item()
        stats["charts/learning_rate"] = learning_rate
        run.log(stats, time.perf_counter() - start)
        last = iteration + 1 == num_iterations
        if args.eval_interval and run.global_step % args.eval_interval < batch_size and not last:
            run.evaluate(agent)
        if last or run.signals or (iteration + 1) % args.checkpoint_interval == 0:
            state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "recent_returns": list(recent_returns)}
            run.save(**state)  # after a signal the run ends here
    run.finish(run.evaluate(agent))


# === Operations: nothing below changes what is learned ================================================================

# Parts of the loss, each with the arguments that weight it, for `grad_shares`
PARTS = {"policy": ("alpha", "beta"), "value": ("vf_coef",), "entropy": ("ent_coef",)}
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")  # whose versions decide the numbers

if sys.platform == "linux":  # glibc keeps freed memory for reuse: a sixth less time for PPO on Atari
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def evaluate(agent, args, device, video=None, stop=()):
    """The raw returns of `eval_episodes` whole games, each the first game of a fresh environment.

    Sampled actions come from a generator of their own, so that evaluation does not change the training. video: the path for
    an mp4 of the first game, which appears when it is whole. stop: a list that a signal handler fills to end the evaluation.
    """
    rom, returns, playing = resolve_env(args.env_id)[1], np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    seeds = np.random.default_rng([args.seed, EVALUATION]).integers(2**31, size=args.eval_episodes)
    generator = torch.Generator(device).manual_seed(int(seeds[0]))
    with contextlib.ExitStack() as cleanup:
        envs = cleanup.enter_context(contextlib.closing(make_envs(rom, args.eval_episodes, args)))
        obs, info = envs.reset(seed=seeds)
        if video:
            # ALE is deterministic: a second emulator with the same seed and actions plays the same game, in colour
            camera = make_envs(rom, 1, args, grayscale=False, img_height=210, img_width=160, stack_num=1)
            cleanup.callback(camera.close)
            video.parent.mkdir(exist_ok=True)
            unfinished = video.with_name(f"unfinished_{video.name}")
            film = cleanup.enter_context(imageio.get_writer(unfinished, fps=15, macro_block_size=2))
            film.append_data(camera.reset(seed=seeds[:1])[0][0, 0])
        while playing.any() and not stop:
            actions = np.zeros(args.eval_episodes, dtype=np.int64)
            with torch.no_grad():
                actions[playing] = act(agent, torch.as_tensor(obs[playing], device=device), generator)[0].cpu().numpy()
            last_info = info
            obs, rewards, terminated, truncated, info = envs.step(actions)
            returns += rewards * playing
            ended = games_over(terminated | truncated, info, last_info)
            if video and playing[0] and not ended[0]:
                film.append_data(camera.step(actions[:1])[0][0, 0])
            playing &= ~ended
    if video and not stop:
        os.replace(unfinished, video)
    return returns.tolist()


def load_agent(run_folder, device="cpu"):
    """The trained agent of a run, its arguments and the step that it was saved at."""
    args, checkpoint = load_args(run_folder), torch.load(Path(run_folder, "checkpoint.pt"), device, weights_only=True)
    agent = Agent(len(checkpoint["agent"]["actor.bias"]), args.bf16)
    agent.load_state_dict(checkpoint["agent"])
    return agent.to(device), args, checkpoint["global_step"]


def load_policy(run_folder):
    """A trained policy and a game for it: `policy(obs)` samples actions [1] for `envs`, a vector environment of one game."""
    agent, args, _ = load_agent(run_folder)

    @torch.no_grad()
    def policy(obs):
        return act(agent, torch.as_tensor(obs))[0].numpy()

    return policy, make_envs(resolve_env(args.env_id)[1], 1, args)


def name_arm(args):
    """The default --exp-name, with what differs from the arm's own settings: ppo, ppo_raw, sppo_a0.5_b10_bsc."""
    baseline = "ppo" if args.alpha == 1 else f"ppo_a{args.alpha:g}"
    parts = {f"sppo_a{args.alpha:g}_b{args.beta:g}" if args.beta else baseline: True}
    parts |= {f"Z{args.Z:g}": args.Z != -1, "literal": args.literal_signs, "raw": not args.norm_adv}
    parts |= {args.noise: args.noise != "none"}
    return "_".join(part for part, shown in parts.items() if shown)


def check(args):
    """Refuses arguments that do not fit, before anything is created."""
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.minibatch_size:
        raise BadInput(f"--minibatch-size {args.minibatch_size}: expected a divisor of num_envs x num_steps = {batch_size}")
    if args.total_timesteps < batch_size:
        raise BadInput(f"--total-timesteps {args.total_timesteps}: expected num_envs x num_steps = {batch_size} or more")
    resolve_env(args.env_id)  # raises Gymnasium's error for a game that does not exist


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
