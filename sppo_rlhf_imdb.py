"""PPO and SPPO that make a language model write positive movie reviews: RLHF with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The policy is a causal language model, an action is a token, and the k actions are the whole
vocabulary; token i has probability pi_i, r = pi_i / pi_old_i, and A is its advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i = -A Z (1 - pi_i) / pi_old_i     where the clip does not cut
    Eq. 9   L      = alpha L_ppo + beta L_rppo                                          Z < 0, -1 in the paper

A prompt is the first half of a review; the policy continues it; a classifier's probability that the whole is positive is the
score, given at the last token; every token costs kl_coef (log pi - log pi_ref), pi_ref being the policy before training.

Examples:

    python sppo_rlhf_imdb.py --offline                              # SPPO on assets of benchmark/make_rlhf_assets.py
    python sppo_rlhf_imdb.py --offline --alpha 1 --beta 0           # PPO, the baseline
    python sppo_rlhf_imdb.py                                        # the paper's models and data, from the Hub
    accelerate launch --num_processes 4 sppo_rlhf_imdb.py           # the same on four GPUs

What differs from the paper and its released code:

* The signs of Eq. 8 where A < 0, and that `--alpha 0.9 --beta 0` is the control of `--alpha 0.5 --beta 0.4` and must learn
  alike: see README, "The loss, and seven facts about it".
* Tokens are sampled from the `top_k` likeliest, as there, while log pi is that of the whole vocabulary. So r is no importance
  weight of what was sampled, and the mean of grad log pi is not 0 but grad log m, with m the probability of the top k: an
  advantage common to all tokens moves probability into or out of the top k. Whitened advantages have mean 0, which takes
  most of this away; `--top-k 0 --min-response-length 0` samples from the whole vocabulary and is exact.
* The value is a linear head on the policy's last hidden states: one forward pass for both. It begins at 0. There the critic is
  a language model of its own with a random head. So here the value loss trains the policy's layers, too; there it does not.
* `reference_nll_coef` trains on how the review really goes on behind the prompt. There the target is the whole review, so that
  behind the first half of a review stands the beginning of the same review.
* Advantages are whitened over the whole rollout's real tokens; there over each part of a minibatch, padding included. Dropout
  is off. Each token, EOS included, counts the same in every mean.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "peft==0.21.2",
#     "huggingface_hub==2.4.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
# ]
# ///

import contextlib
import copy
import ctypes
import importlib.metadata
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
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils.peft_utils import find_adapter_config_file


@dataclass
class Args:
    """PPO and SPPO on positive movie reviews. `--alpha 1 --beta 0` is PPO; the defaults are the paper's SPPO."""

    # symmetric loss
    alpha: float = 0.5
    """weight of the PPO loss (Eq. 9)"""
    beta: float = 0.4
    """weight of the reverse loss (Eq. 9)"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 8), below 0"""
    literal_signs: bool = False
    """the reverse loss with the signs that Eq. 8 prints for A < 0, for study"""

    # models and data
    offline: bool = False
    """other defaults: the models and reviews that benchmark/make_rlhf_assets.py builds, at a size for CPUs"""
    policy: str = "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"
    """causal language model to train, and the reference: Hub id or folder"""
    tokenizer: str = "lvwerra/gpt2-imdb"
    """the policy's tokenizer: Hub id or folder; no BOS is put before a prompt"""
    reward_model: str = "lvwerra/distilbert-imdb"
    """text classifier whose probability of `reward_label` is the score: Hub id or folder, with its tokenizer"""
    reward_label: str = "1"
    """label of the classifier, by name or number"""
    dataset: str = "stanfordnlp/imdb"
    """reviews: Hub id (its train split), folder, or file of JSON lines; with a column `text`"""
    judge: str | None = None
    """a second classifier, for evaluation only: JSON file of a TF-IDF logistic regression (benchmark/make_rlhf_assets.py)"""

    allow_pickle: bool = False
    """load pickled weights (.bin) where a repository has no safetensors, by torch.load with weights_only"""

    # algorithm
    iterations: int = 60
    """rollouts, each followed by one update"""
    trajectories_per_update: int = 112
    """prompts of a rollout, one continuation each, over all processes"""
    max_prompt_length: int = 64
    """tokens kept at the end of a prompt, which is the first half of the words of a review"""
    response_length: int = 48
    """new tokens at most"""
    min_response_length: int = 48
    """new tokens before which EOS is not sampled; as many as response_length: never"""
    temperature: float = 1.0
    """of sampling, and of log pi everywhere"""
    top_k: int = 50
    """tokens are sampled from the so many likeliest; 0 for all"""
    gamma: float = 0.99
    """discount factor for each token, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, 0 to 1"""
    kl_coef: float = 0.001
    """what log pi - log pi_ref of a token costs in its reward"""
    learning_rate: float = 5e-6
    """AdamW's step size, constant"""
    weight_decay: float = 1e-6
    """AdamW's"""
    update_epochs: int = 5
    """passes over each rollout"""
    minibatch_size: int = 28
    """trajectories per gradient step, over all processes; divides trajectories_per_update"""
    gradient_accumulation: int = 1
    """parts in which a process computes its share of a minibatch, one after another, to need less memory"""
    norm_adv: bool = True
    """whiten the advantages over all tokens of a rollout; the released code: over each part of a minibatch, with its padding"""
    clip_coef: float = 0.2
    """PPO's eps: the ratio's clip range is [1 - eps, 1 + eps]"""
    clip_coef_value: float = 0.2
    """how far from its old value a value may go before its loss stops falling"""
    vf_coef: float = 0.5
    """weight of the value loss, half a mean square; it trains the policy's layers, too (the released critic has its own)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, over the whole vocabulary"""
    max_grad_norm: float = 1.0
    """norm to which the gradient is clipped"""
    reference_nll_coef: float = 0.1
    """weight of the next-token loss on how the review really goes on (in the released code: on the review's beginning); 0 saves
    half an update"""
    lora_r: int = 0
    """rank of LoRA adapters, trained in place of the weights; 0 trains the weights"""
    lora_target_modules: str | None = None
    """layers that get adapters, as names with commas between them; default: all linear layers"""

    # evaluation, checkpoints, machine
    eval_episodes: int = 256
    """validation prompts that are continued and scored in an evaluation; 0 for none"""
    eval_every: int = 10
    """iterations between two evaluations, beside those before and after training; 0 for these alone"""
    perplexity_tokens: int = 65_536
    """tokens of the validation reviews on which perplexity is measured"""
    reward_batch_size: int = 64
    """texts that the classifier scores at a time"""
    checkpoint_interval: int = 10
    """iterations between two checkpoints"""
    save_model: bool = False
    """write the trained policy to model/ in the run folder, for from_pretrained, with LoRA merged in"""
    resume: str | None = None
    """run folder to continue, with its own arguments; only a larger --iterations and tracking flags may be added"""
    bf16: bool = True
    """run the layers in bfloat16 on a GPU that has it; weights, logits and log-probabilities stay float32"""
    num_threads: int = 0
    """CPU threads of torch; 0 lets it take all cores"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""

    # run
    exp_name: str = "sppo_rlhf_imdb"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the split of the reviews, the prompts' order, the sampled tokens and the minibatches"""
    cuda: bool = True
    """use a GPU if there is one"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project_name: str = "symmetric-rl"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B user or team"""


OFFLINE = Args(
    offline=True,
    policy="assets/imdb/policy",
    tokenizer="assets/imdb/policy",
    reward_model="assets/imdb/reward",
    reward_label="positive",
    dataset="assets/imdb/reviews.jsonl",
    judge="assets/imdb/judge.json",
    iterations=24,
    trajectories_per_update=32,
    minibatch_size=8,
    update_epochs=2,
    max_prompt_length=12,
    response_length=20,
    min_response_length=20,
    learning_rate=2e-5,
    reference_nll_coef=0.0,
    eval_episodes=64,
    eval_every=0,
    perplexity_tokens=2048,
)
TASK = "imdb"  # in the names of assets and run folders
LENGTH = "iterations"  # the argument that a resumed run may raise
# Parts of the loss, each with the arguments that weight it
PARTS = {"policy": ("alpha", "beta"), "value": ("vf_coef",), "entropy": ("ent_coef",), "reference": ("reference_nll_coef",)}
# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
EVALUATION, SPLIT, ORDER, SAMPLES, MINIBATCHES = 1, 2, 3, 4, 5
PAD = -1  # fills batches of token ids: no vocabulary has it, so it is never taken for EOS, nor sampled
STRIDE = 512  # tokens by which the window of the perplexity moves


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z=-1.0, literal_signs=False):
    """L_ppo and L_rppo of the actions taken (Eq. 3 and 8): means over the batch. The caller weights them (Eq. 9).

    Inputs are [B]. sum_{j != i} pi_j / pi_old_i = 1 / pi_old_i - r in Eq. 8. The first term is left out: it has no
    gradient and overflows float32. With Z = -1 both losses have the same gradient, sample by sample. Returns
    policy_loss, reverse_loss and statistics, all scalars.
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


def minibatch_loss(agent, args, share, reference_share, tokens, old_logprobs, old_values, advantages, returns, references):
    """What this part of a minibatch adds to its loss, and to the statistics by name: alpha L_ppo + beta L_rppo
    + vf_coef L_value - ent_coef H + reference_nll_coef NLL, each a mean over all real tokens of the minibatch.

    Shapes: tokens [B, P + R]; old_logprobs, old_values, advantages, returns [B, R], 0 where a token is PAD; references
    [B, R]. share, reference_share: this part's real tokens over the minibatch's, in responses and in references.
    """
    prompt_length = tokens.shape[1] - old_logprobs.shape[1]
    logprobs, values, entropies = agent(tokens, prompt_length, args.temperature, args.ent_coef > 0)
    real = tokens[:, prompt_length:] != PAD
    old_logprobs, old_values, advantages, returns = (x[real] for x in (old_logprobs, old_values, advantages, returns))
    policy_loss, reverse_loss, stats = symmetric_ppo_loss(
        logprobs, old_logprobs, advantages, args.clip_coef, args.Z, args.literal_signs
    )
    clipped_values = old_values + (values - old_values).clamp(-args.clip_coef_value, args.clip_coef_value)
    value_loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2).mean()
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss
    stats = {"policy_loss": policy_loss, "reverse_loss": reverse_loss, "value_loss": value_loss, **stats}
    if args.ent_coef:
        stats["entropy"] = entropies.mean()
        loss = loss - args.ent_coef * stats["entropy"]
    stats = {f"losses/{name}": share * value.detach() for name, value in stats.items()}
    loss = share * loss
    if args.reference_nll_coef:
        nll = -agent(torch.cat([tokens[:, :prompt_length], references], dim=1), prompt_length, 1.0)[0].mean()
        loss = loss + reference_share * args.reference_nll_coef * nll
        stats["losses/reference_nll"] = reference_share * nll.detach()
    return loss, stats


# --- agent ------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """A causal language model, the policy, with a value head on its last hidden states."""

    def __init__(self, lm: transformers.PreTrainedModel, lora_r: int = 0, bf16: bool = False, lora_targets="all-linear"):
        super().__init__()
        self.bf16 = bf16
        if lora_r:
            transposed = lm.config.model_type == "gpt2"  # its layers hold their weights so
            config = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=lora_targets, fan_in_fan_out=transposed)
            lm = get_peft_model(lm, config)
        self.lm = lm
        self.value_head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.value_head.weight)  # no value, and no gradient into the policy, before it has learned one
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # for good: dropout would make the ratio of the first minibatch other than 1

    def backbone(self, tokens: torch.Tensor, real: torch.Tensor, **cache):
        """The model without its vocabulary head. tokens: [B, T]; real: [B, <= T, cached tokens before them] bool."""
        lm = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        # positions count real tokens, so that padding on the left moves nothing; what PAD is replaced by is never attended to
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens.clamp(min=0), "attention_mask": real.long(), "position_ids": positions}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return lm.base_model(**inputs, use_cache=bool(cache), **cache)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """[..., d] -> [..., V], in float32 also with bf16, which rounds a logit of -100 to a multiple of a half."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.lm.get_output_embeddings()(hidden.float()).div_(temperature)

    def forward(self, tokens: torch.Tensor, prompt_length: int, temperature: float, with_entropy: bool = False):
        """For tokens [B, prompt_length + R] and the N of their R columns' entries that are not PAD, row by row:

        log-probabilities [N] under the whole vocabulary at that temperature, values [N] of the states before the tokens, and
        entropies [N], or None. Neither logits of prompts and padding are computed, nor any copy of [N, V] kept but
        cross_entropy's log-softmax.
        """
        responses = tokens[:, prompt_length:]
        real = responses != PAD
        hidden = self.backbone(tokens, tokens != PAD).last_hidden_state[:, prompt_length - 1 : -1][real]
        logits = self.logits(hidden, temperature)
        logprobs = -F.cross_entropy(logits, responses[real], reduction="none")
        entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None
        return logprobs, self.value_head(hidden.float()).squeeze(-1), entropies


def sample(logits: torch.Tensor, uniforms: torch.Tensor, top_k: int) -> torch.Tensor:
    """[B] tokens from the top_k likeliest of logits [B, V] (0: of all), by inverting their distribution at uniforms [B].

    Random numbers that come from outside belong to a trajectory, however many processes share the batch.
    """
    top, tokens = logits.topk(top_k or logits.shape[-1])
    cumulative = top.double().softmax(-1).cumsum(-1)
    choice = (cumulative < uniforms.unsqueeze(-1) * cumulative[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def generate(agent: Agent, prompts: torch.Tensor, uniforms: torch.Tensor, eos: int, args: Args) -> torch.Tensor:
    """Continuations [B, response_length] of prompts [B, P], EOS included and PAD behind it.

    uniforms: [B, response_length], one number in [0, 1) for each token. Each step feeds the newest token alone: keys and
    values of the others are kept (the KV cache).
    """
    responses = torch.full((len(prompts), args.response_length), PAD, device=prompts.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    may_end = args.min_response_length < args.response_length  # else no step waits for the GPU to say whether all have ended
    tokens, real, cache = prompts, prompts != PAD, transformers.DynamicCache(config=agent.lm.config)
    for t in range(args.response_length):
        hidden = agent.backbone(tokens, real, past_key_values=cache).last_hidden_state[:, -1]
        logits = agent.logits(hidden, args.temperature)
        if t < args.min_response_length:
            logits[:, eos] = -torch.inf
        chosen = sample(logits, uniforms[:, t], args.top_k)
        responses[running, t] = chosen[running]
        running &= chosen != eos
        if may_end and not running.any():
            break
        tokens = chosen.unsqueeze(-1)
        real = torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    return responses


# --- environment ------------------------------------------------------------------------------------------------------


def tokenize_behind(tokenizer, before: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of `before`, and those of `text` behind it: together the tokens of the joint text.

    Tokenizers of Llama's kind put a space before a text of its own.
    """
    joint, alone = tokenizer([before + text, before], add_special_tokens=False).input_ids
    shared = sum(itertools.takewhile(bool, (a == b for a, b in zip(joint, alone, strict=False))))
    return joint[:shared], joint[shared:]


def encode(texts: list[str], tokenizer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, max_prompt_length], PAD on the left, and how the reviews go on [B, response_length], PAD on the right.

    The prompt is the first half of the words, its last tokens; what follows are the tokens of the other half.
    """
    prompts = torch.full((len(texts), args.max_prompt_length), PAD)
    references = torch.full((len(texts), args.response_length), PAD)
    for row, text in enumerate(texts):
        words = text.split()
        half = len(words) // 2
        ids, rest = tokenize_behind(tokenizer, " ".join(words[:half]), " " + " ".join(words[half:]))
        ids = ids[-args.max_prompt_length :] or [tokenizer.eos_token_id]  # a review of one word
        prompts[row, args.max_prompt_length - len(ids) :] = torch.tensor(ids)
        ids = [*rest, tokenizer.eos_token_id][: args.response_length]
        references[row, : len(ids)] = torch.tensor(ids)
    return prompts, references


def decode(tokens: torch.Tensor, tokenizer) -> list[str]:
    """tokens: [B, T], PAD anywhere. The texts, without special tokens."""
    return tokenizer.batch_decode([row[row != PAD].tolist() for row in tokens], skip_special_tokens=True)


@torch.no_grad()
def score(texts: list[str], reward_model, reward_tokenizer, label: int, args: Args) -> torch.Tensor:
    """[B]: the classifier's softmax probability of `label` for each text."""
    scores = []
    for start in range(0, len(texts), args.reward_batch_size):
        batch = texts[start : start + args.reward_batch_size]
        length = min(reward_tokenizer.model_max_length, reward_positions(reward_model))
        inputs = reward_tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        logits = reward_model(**inputs.to(reward_model.device)).logits
        scores.append(logits.float().softmax(-1)[:, label])
    return torch.cat(scores)


def reward_positions(reward_model: transformers.PreTrainedModel) -> int:
    """Tokens of the longest text that the classifier can read, 1,024 if it has no limit.

    RoBERTa's kind counts positions from the number of its padding token on.
    """
    positions = getattr(reward_model.config, "max_position_embeddings", None) or 1024
    for name, module in reward_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    return positions


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


def masked_mean(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of x where `real`, both of one shape."""
    return (x * real).sum() / real.sum()


def whiten(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """x with mean 0 and variance 1 over its entries where `real`; 0 elsewhere."""
    mean = masked_mean(x, real)
    variance = masked_mean((x - mean) ** 2, real)
    return (x - mean) * (variance + 1e-8).rsqrt() * real


def rollout(agent, reference, reward, tokenizer, prompts, uniforms, args, accelerator) -> tuple[dict, dict[str, float]]:
    """Continues the prompts, scores the texts, and takes log-probabilities, values and the reference's log-probabilities.

    prompts: [B, P]; uniforms: [B, R]. Every process works on its share of the rows and gets all of them back: tokens
    [B, P + R]; logprobs, ref_logprobs, values [B, R], 0 where a token is PAD; scores, empty (0 or 1) [B]. Also returns the
    seconds that each phase took.
    """
    clock, marks = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal marks
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        clock[f"time/{name}"], marks = time.perf_counter() - marks, time.perf_counter()

    share = len(prompts) // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    prompts, uniforms = prompts[mine].to(accelerator.device), uniforms[mine].to(accelerator.device)
    responses = generate(agent, prompts, uniforms, tokenizer.eos_token_id, args)
    tokens = torch.cat([prompts, responses], dim=1)
    lap("generate")
    scores = score(decode(tokens, tokenizer), *reward, args)
    lap("score")
    real = responses != PAD
    logprobs, ref_logprobs, values = (torch.zeros(responses.shape, device=tokens.device) for _ in range(3))
    part_size = max(1, args.minibatch_size // accelerator.num_processes // args.gradient_accumulation)
    with torch.no_grad():
        for rows in torch.arange(share, device=tokens.device).split(part_size):
            into = torch.zeros_like(real).index_fill_(0, rows, True) & real
            logprobs[into], values[into], _ = agent(tokens[rows], prompts.shape[1], args.temperature)
            with agent.lm.disable_adapter() if reference is agent else contextlib.nullcontext():
                ref_logprobs[into] = reference(tokens[rows], prompts.shape[1], args.temperature)[0]
    batch = {"tokens": tokens, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores}
    batch["empty"] = torch.tensor([float(not text.strip()) for text in decode(responses, tokenizer)], device=tokens.device)
    batch = {name: accelerator.gather(tensor) for name, tensor in batch.items()}
    lap("forward")
    return batch, clock


def advantages_and_returns(batch: dict, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE of the per-token rewards -kl_coef (log pi - log pi_ref), plus the score at the last real token; [B, R] each."""
    real = batch["tokens"][:, -args.response_length :] != PAD
    rewards = -args.kl_coef * (batch["logprobs"] - batch["ref_logprobs"])
    last = F.one_hot(real.sum(-1) - 1, args.response_length)
    rewards = rewards + last * batch["scores"].unsqueeze(-1)
    # compute_gae has time first; whatever follows an episode's last token is 0 and stays apart from it
    zeros = torch.zeros_like(batch["scores"])
    advantages, returns = compute_gae(rewards.T, batch["values"].T, last.T.float(), zeros, args.gamma, args.gae_lambda)
    return advantages.T * real, returns.T * real


def grad_shares(agent, args, loss_fn, batch):
    """How the squared norm of the gradient g divides among its PARTS.

    g = sum_i g_i, so |g|^2 = sum_i <g_i, g>. The shares <g_i, g> / |g|^2 sum to 1; a part that opposes the sum has a
    negative one. batch: the inputs of `loss_fn` after `args`.
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

    square = dot_total(total).clamp(min=1e-300)
    return {f"losses/grad_share_{name}": (dot_total(grads[name]) / square).item() if name in grads else 0.0 for name in PARTS}


def sum_over_processes(accelerator: Accelerator, tensors: list[torch.Tensor]) -> None:
    """Sums each tensor over all processes, in place, in buckets of up to 16 million numbers: a call for each bucket."""
    while tensors:
        bucket = [tensors[0]]
        for tensor in tensors[1:]:
            if sum(other.numel() for other in bucket) + tensor.numel() > 2**24:
                break
            bucket.append(tensor)
        total = accelerator.reduce(torch.cat([tensor.flatten() for tensor in bucket]), "sum")
        for tensor, part in zip(bucket, total.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        tensors = tensors[len(bucket) :]


def update(agent, optimizer, accelerator, args, batch: tuple[torch.Tensor, ...], iteration: int) -> dict[str, float]:
    """`update_epochs` passes over the rollout in shuffled minibatches of trajectories; the mean of each statistic.

    batch: what `minibatch_loss` takes behind the shares, the whole rollout in every process. Each process computes its
    rows of every minibatch in `gradient_accumulation` parts; gradients are summed over parts and processes, and as every
    part is weighted by its real tokens, the sum does not depend on how the minibatch was cut.
    """
    rng = torch.Generator().manual_seed(int(np.random.default_rng([args.seed, MINIBATCHES, iteration]).integers(2**63)))
    real = (batch[0][:, -args.response_length :] != PAD).sum(-1)
    reference_real = (batch[-1] != PAD).sum(-1)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names, collected, shares = [], [], {}
    for _ in range(args.update_epochs):
        for minibatch in torch.randperm(len(real), generator=rng).to(real.device).split(args.minibatch_size):
            optimizer.zero_grad()
            sums = Counter()
            mine = minibatch[accelerator.process_index :: accelerator.num_processes]
            for rows in mine.split(len(mine) // args.gradient_accumulation):
                share = real[rows].sum() / real[minibatch].sum()
                reference_share = reference_real[rows].sum() / reference_real[minibatch].sum()
                part = (share, reference_share, *(x[rows] for x in batch))
                if iteration % 10 == 0 and not shares:  # of this process's first part; in all under 1 % of the time
                    shares = grad_shares(agent, args, minibatch_loss, part)
                loss, stats = minibatch_loss(agent, args, *part)
                loss.backward()
                for name, value in stats.items():
                    sums[name] += value
            names, sums = list(sums), torch.stack(list(sums.values()))
            if accelerator.num_processes > 1:
                sum_over_processes(accelerator, [sums, *(parameter.grad for parameter in parameters)])
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            collected.append(torch.cat([sums, torch.stack([norm, (norm > args.max_grad_norm).float()])]))
    names += ["losses/grad_norm", "losses/grad_clipped"]
    return shares | dict(zip(names, torch.stack(collected).mean(dim=0).tolist(), strict=True))


def train(args, run, texts, tokenizer, agent, reference, reward):
    """Writes, scores and learns `iterations` times. `run` keeps the curves, checkpoints and scores (see Operations)."""
    reviews, eval_reviews, judge = texts
    accelerator = run.accelerator
    trained = {name: parameter for name, parameter in agent.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    run.load(trained, optimizer, agent)
    run.say(describe_models(args, run, agent, trained, reward, len(reviews)))
    evaluation = (agent, reference, reward, tokenizer, eval_reviews, judge)
    if run.before is None:
        run.before = run.evaluate("eval", 0, args.eval_episodes, evaluation)
    per_epoch = len(reviews) // args.trajectories_per_update  # iterations until all reviews have been prompts

    for iteration in range(run.start, args.iterations):
        start = time.perf_counter()
        # every random number follows from the seed and the iteration: a resumed run goes on as if it had not stopped
        epoch, place = divmod(iteration, per_epoch)
        order = np.random.default_rng([args.seed, ORDER, epoch]).permutation(len(reviews))
        chosen = order[place * args.trajectories_per_update : (place + 1) * args.trajectories_per_update]
        rng = np.random.default_rng([args.seed, SAMPLES, iteration])
        uniforms = torch.from_numpy(rng.random((args.trajectories_per_update, args.response_length)))

        # write
        prompts, references = encode([reviews[i] for i in chosen], tokenizer, args)
        batch, stats = rollout(agent, reference, reward, tokenizer, prompts, uniforms, args, accelerator)

        # learn
        learning = time.perf_counter()
        real = batch["tokens"][:, -args.response_length :] != PAD
        raw_advantages, returns = advantages_and_returns(batch, args)
        advantages = whiten(raw_advantages, real) if args.norm_adv else raw_advantages
        data = (batch["tokens"], batch["logprobs"], batch["values"], advantages, returns, references.to(run.device))
        stats |= update(agent, optimizer, accelerator, args, data, iteration)
        run.exit_if_not_finite(iteration, stats)
        seconds = time.perf_counter() - start

        # log
        stats["time/update"] = time.perf_counter() - learning
        stats |= {f"objective/{name}": value for name, value in describe(batch, tokenizer.eos_token_id, args).items()}
        stats["losses/explained_variance"] = (1 - (returns - batch["values"])[real].var() / returns[real].var()).item()
        stats["charts/adv_sign_change"] = masked_mean((raw_advantages.sign() != advantages.sign()).float(), real).item()
        stats["charts/learning_rate"] = args.learning_rate
        stats["charts/SPS"] = real.sum().item() / seconds  # a step is a token
        run.log(iteration, stats, seconds)
        done, stopping = iteration + 1, run.stopping()
        if args.eval_every and done % args.eval_every == 0 and done < args.iterations:
            run.evaluate("eval", done, args.eval_episodes, evaluation)
        if done % args.checkpoint_interval == 0 or stopping or done == args.iterations:
            run.save(done, trained, optimizer)
        if stopping and done < args.iterations:
            run.exit_stopped(done)
    after = run.evaluate("eval", args.iterations, args.eval_episodes, evaluation)
    run.finish(after, trained, optimizer, agent, tokenizer)


# === Operations: nothing below changes what is learned ================================================================

# Specific to this task: what decides a run's numbers, what may be Hub ids, evaluation, loading, saving, checks
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "numpy")
SOURCES = ("policy", "tokenizer", "reward_model", "dataset")


def describe(batch: dict, eos: int, args: Args) -> dict[str, float]:
    """What a rollout was like. KL and entropy are sums over a response, then means, as TRL logs them."""
    responses = batch["tokens"][:, -args.response_length :]
    real = responses != PAD
    logratio = batch["logprobs"] - batch["ref_logprobs"]
    kl = logratio.sum(-1).mean()
    empty = batch["empty"] > 0
    unfinished = ~(responses == eos).any(-1)
    stats = {
        "scores": batch["scores"].mean(),
        "kl": kl,  # k1
        "kl_k3": (((-logratio).clamp(-20, 20).expm1() + logratio) * real).sum(-1).mean(),
        "entropy": -batch["logprobs"].sum(-1).mean(),
        "rlhf_reward": batch["scores"].mean() - args.kl_coef * kl,
        "response_length": real.sum(-1).float().mean(),
        "empty_share": empty.float().mean(),
        "unfinished_share": unfinished.float().mean(),
    }
    for name, rows in (("empty", empty), ("unfinished", unfinished)):
        if rows.any():
            stats[f"{name}_score"] = batch["scores"][rows].mean()
    return {name: value.item() for name, value in stats.items()}


def judge_scores(texts: list[str], judge: dict) -> list[float]:
    """Probability of a positive review by logistic regression on TF-IDF of words and pairs of words.

    judge: {"intercept": b, "terms": {term: [idf, weight]}}. It has seen neither the policy nor the reward model: a score that
    rises while the judge's does not is the reward model being fooled.
    """
    scores = []
    for text in texts:
        words = re.findall(r"\b\w\w+\b", text.lower())
        terms = Counter(itertools.chain(words, (f"{a} {b}" for a, b in itertools.pairwise(words))))
        known = [(count, *judge["terms"][term]) for term, count in terms.items() if term in judge["terms"]]
        norm = math.sqrt(sum((count * idf) ** 2 for count, idf, _ in known)) or 1.0
        logit = judge["intercept"] + sum(count * idf * weight for count, idf, weight in known) / norm
        scores.append(1 / (1 + math.exp(-logit)))
    return scores


@torch.no_grad()
def perplexity(agent: Agent, texts: list[str], tokenizer, num_tokens: int) -> float:
    """exp of the mean next-token loss on the first `num_tokens` tokens of the texts, one after another, EOS between them.

    Windows of 1,024 tokens (or the model's context) move by STRIDE = 512: all but the first STRIDE tokens have that many
    or more before them.
    """
    ids = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(ids) > num_tokens:
            break
    ids = torch.tensor([ids[: num_tokens + 1]], device=agent.value_head.weight.device)
    window = min(2 * STRIDE, agent.lm.config.max_position_embeddings)
    stride = min(STRIDE, window // 2)
    total, done = 0.0, 1
    while done < ids.shape[1]:
        new = min(stride, ids.shape[1] - done)
        start = max(0, done + new - window)
        tokens = ids[:, start : done + new]
        total -= agent(tokens, tokens.shape[1] - new, 1.0)[0].sum().item()
        done += new
    return math.exp(total / (ids.shape[1] - 1))


def evaluate(agent, reference, reward, tokenizer, reviews, judge, args, accelerator) -> tuple[dict[str, float], list[dict]]:
    """Scores the continuations of the first `eval_episodes` validation prompts, with the same random numbers each time.

    Returns score, its standard error, KL, shares, perplexity on the reviews, the judge's score; and every sample.
    """
    prompts, _ = encode(reviews[: args.eval_episodes], tokenizer, args)
    rng = np.random.default_rng([args.seed, EVALUATION])
    uniforms = torch.from_numpy(rng.random((len(prompts), args.response_length)))
    parts = []
    size = args.trajectories_per_update
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        parts.append(rollout(agent, reference, reward, tokenizer, prompts[rows], uniforms[rows], args, accelerator)[0])
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stats = describe(batch, tokenizer.eos_token_id, args)
    scores = batch["scores"]
    result = {"score": stats.pop("scores"), "score_stderr": scores.std().item() / math.sqrt(len(scores)), **stats}
    result["perplexity"] = perplexity(agent, reviews, tokenizer, args.perplexity_tokens)
    texts = decode(batch["tokens"], tokenizer)
    responses = decode(batch["tokens"][:, -args.response_length :], tokenizer)
    samples = [
        {"prompt": text.removesuffix(response), "response": response, "score": value}
        for text, response, value in zip(texts, responses, scores.tolist(), strict=True)
    ]
    if judge:
        judged = judge_scores(texts, judge)
        result["judge_score"] = float(np.mean(judged))
        for sample_, value in zip(samples, judged, strict=True):
            sample_["judge_score"] = value
    return result, samples


def from_pretrained(args: Args, name: str, loader):
    """What `loader` makes of the argument `name`, a Hub id or a folder: safetensors, all weights there, no code of its own."""
    source = getattr(args, name)
    options = {"local_files_only": args.offline, "trust_remote_code": False}
    try:
        if loader is transformers.AutoTokenizer:
            return loader.from_pretrained(source, **options)
        if is_adapter(args, name):
            raise ValueError("an adapter; merge it into its base first, with peft's merge_and_unload")
        options |= {"dtype": torch.float32, "use_safetensors": None if args.allow_pickle else True}
        model, info = loader.from_pretrained(source, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...
        cannot_load(args, name, error, "a Hub id or a folder that can be loaded")
    check_weights(args, name, info)
    return model.eval()


def load_models(args: Args, device: torch.device):
    """The policy's tokenizer, the agent, the frozen reference and (reward model, its tokenizer, label number).

    With LoRA the reference is the agent itself, whose adapters are switched off for it; without, a copy.
    """
    tokenizer = from_pretrained(args, "tokenizer", transformers.AutoTokenizer)
    lm = from_pretrained(args, "policy", transformers.AutoModelForCausalLM)
    context = getattr(lm.config, "max_position_embeddings", None)
    require(args, "policy", context, "a model with a number of positions")
    fits = args.max_prompt_length + args.response_length <= context
    require(
        args, "max_prompt_length", fits, f"{context - args.response_length} or less, the policy's context - response_length"
    )
    vocabulary = lm.config.vocab_size
    matches = tokenizer.eos_token_id is not None and len(tokenizer) <= vocabulary and tokenizer("a film").input_ids
    require(args, "tokenizer", matches, f"one with an EOS token, and tokens at all, at most the policy's {vocabulary}")
    require(args, "top_k", args.top_k <= vocabulary, f"the policy's vocabulary, {vocabulary}, or less")
    check_lm(args, "policy", lm, Agent(lm).backbone)
    torch.manual_seed(args.seed)  # LoRA's first weights
    bf16 = args.bf16 and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    targets = args.lora_target_modules.split(",") if args.lora_target_modules else "all-linear"
    try:
        agent = Agent(lm, args.lora_r, bf16, targets).to(device)
    except ValueError as error:  # peft's
        require(args, "lora_target_modules", False, f"layers of the policy ({str(error).splitlines()[0][:160]})")
    reference = agent if args.lora_r else copy.deepcopy(agent).requires_grad_(False)

    reward_model = from_pretrained(args, "reward_model", transformers.AutoModelForSequenceClassification).to(device)
    config = reward_model.config
    labels = {str(number): number for number in range(config.num_labels)}
    labels |= {str(label): int(number) for number, label in (config.id2label or {}).items()} | (config.label2id or {})
    require(args, "reward_model", len(set(labels.values())) > 1, "a classifier with two labels or more")
    require(args, "reward_label", args.reward_label in labels, f"one of the reward model's {', '.join(labels)}")
    reward_tokenizer = from_pretrained(args, "reward_model", transformers.AutoTokenizer)
    reward_tokenizer.truncation_side = "left"  # of a text that is too long the response stays
    # classifiers on causal models look for the last token before the padding, and count positions from the left
    reward_tokenizer.padding_side, reward_model.config.pad_token_id = "right", reward_tokenizer.pad_token_id
    reward = (reward_model, reward_tokenizer, labels[args.reward_label])
    texts = ["a film", "a film that is longer than the other one", "a film " * reward_positions(reward_model)]
    try:
        together, alone = score(texts, *reward, args), torch.cat([score([text], *reward, args) for text in texts])
    except Exception as error:  # no token to pad with, not a classifier of texts, ...
        cannot_load(args, "reward_model", error, "a classifier with a tokenizer that pads")
    same = torch.allclose(together, alone, atol=1e-3, rtol=0)
    require(args, "reward_model", same, "a classifier whose scores do not depend on what else is in the batch")
    return tokenizer, agent, reference, reward


def load_reviews(args: Args) -> tuple[list[str], list[str]]:
    """Training and validation reviews, 80 % and 20 % of the train split, shuffled by the seed."""
    try:
        if Path(args.dataset).is_file():
            reviews = read_json_lines(args.dataset)
        else:
            reviews = datasets.load_dataset(args.dataset, split="train")
        columns = reviews.column_names
        texts = reviews["text"][:] if "text" in columns else []
    except Exception as error:  # datasets names no common type
        error = error.__cause__ or error  # what it was while "generating the dataset"
        cannot_load(args, "dataset", error, "a Hub id, a folder or a file of JSON lines that can be loaded")
    require(args, "dataset", "text" in columns, f"a column named text; its columns are {', '.join(columns)}")
    require(args, "dataset", all(isinstance(text, str) for text in texts), "a column text that holds texts alone")
    order = np.random.default_rng([args.seed, SPLIT]).permutation(len(texts))
    texts = [texts[i] for i in order.tolist()]
    split = len(texts) * 4 // 5
    enough = split >= args.trajectories_per_update and len(texts) - split >= args.eval_episodes
    wanted = f"{args.trajectories_per_update} training and {args.eval_episodes} validation reviews or more"
    require(args, "dataset", enough, f"{wanted}; it has {split} and {len(texts) - split}")
    return texts[:split], texts[split:]


def load_judge(args: Args) -> dict | None:
    """What `judge_scores` takes, if there is one."""
    if args.judge is None:
        return None
    try:
        judge = json.loads(Path(args.judge).read_text())
        terms = {term: (float(idf), float(weight)) for term, (idf, weight) in judge["terms"].items()}
        return {"intercept": float(judge["intercept"]), "terms": terms}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        require(args, "judge", False, 'a JSON file {"intercept": b, "terms": {term: [idf, weight]}}')


def load_texts(args):
    """Training and validation reviews, and the judge or None."""
    return *load_reviews(args), load_judge(args)


def save_samples(run_folder: Path, before: list[dict], after: list[dict]) -> list[list]:
    """samples.json, what followed each prompt before and after training; returns the first 20 as a table with its header."""
    given = ("post", "prompt", "reference")
    samples = [
        {**new, **{f"{name}_before": value for name, value in old.items() if name not in given}}
        for old, new in zip(before, after, strict=True)
    ]
    write_json(run_folder / "samples.json", samples)
    return [list(samples[0]), *(list(sample.values()) for sample in samples[:20])]


def save_model(folder: Path, agent: Agent, tokenizer) -> None:
    """The language model as a folder for from_pretrained, with LoRA merged into it; ends the agent's training."""
    temporary = folder.with_name(folder.name + ".tmp")
    lm = agent.lm.merge_and_unload() if isinstance(agent.lm, PeftModel) else agent.lm
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_policy(run_folder, agent, tokenizer, args):
    save_model(run_folder / "model", agent, tokenizer)


def describe_models(args, run, agent, trained, reward, count):
    """The first line of a run."""
    millions = [sum(p.numel() for p in parameters) / 1e6 for parameters in (agent.parameters(), trained.values())]
    return (
        f"{args.policy}, {millions[0]:.1f}M parameters, {millions[1]:.1f}M trained; {count:,} reviews; "
        f"{run.accelerator.num_processes} x {run.device.type}, {torch.get_num_threads()} threads; {run.folder}"
    )


def check_args(args: Args) -> None:
    """Refuses values that no run can have, before anything is made or loaded."""
    check_rlhf(args)
    check_episodes(args, "eval_episodes")
    require(args, "perplexity_tokens", args.perplexity_tokens >= 1, "a whole number of 1 or more")
    check_tracking(args)


# --- run: one text in the RLHF scripts from here on -------------------------------------------------------------------

SCRIPT = Path(__file__).name


class Run:
    """A run's folder: arguments, curves, checkpoint, samples and result. Resumes a run, and ends it in order on a signal.

    Every process calls it alike; one of them, the leader, writes and talks.
    """

    def __init__(self, args, accelerator, signals):
        self.args, self.accelerator, self.signals = args, accelerator, signals
        self.device, self.leads = accelerator.device, accelerator.is_main_process
        self.folder, self.checkpoint, self.record = open_run(args, TASK, self.device) if self.leads else (None, None, None)
        (self.folder,) = broadcast_object_list([self.folder])
        if not self.leads and args.resume and (self.folder / "checkpoint.pt").exists():
            self.checkpoint = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        known = self.checkpoint or {"iteration": 0, "seconds": 0.0, "before": None, "samples_before": []}
        self.start, self.seconds, self.saved = known["iteration"], known["seconds"], self.checkpoint is not None
        self.before = (known["before"], known["samples_before"]) if self.checkpoint else None
        self.finished = self.start >= args.iterations and (self.folder / "result.json").exists()
        accelerator.wait_for_everyone()  # until all have looked for result.json
        if self.finished or not self.leads:
            self.progress = None
            return
        (self.folder / "result.json").unlink(missing_ok=True)
        write_json(self.folder / "args.json", self.record)
        if args.track:
            self.wandb = track_run(args, self.folder, self.record)
        self.writer = SummaryWriter(self.folder)
        rows = "\n".join(f"|{name}|{value}|" for name, value in self.record["args"].items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.progress = tqdm(total=args.iterations, initial=self.start, unit="iteration", disable=None)

    def say(self, line):
        if self.leads:
            print(f"{SCRIPT}: {line}", flush=True)

    def load(self, trained, optimizer, agent):
        """Puts the checkpoint's weights and optimiser in place, and frees it: as much memory as these take."""
        if self.checkpoint:
            if self.checkpoint["agent"].keys() != trained.keys():
                wrong = f"its checkpoint.pt has other weights than {self.args.policy} has with these versions"
                fail(f"--resume {self.args.resume}: {wrong}")
            agent.load_state_dict(self.checkpoint["agent"], strict=False)  # what is trained; the rest is as it was loaded
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        self.checkpoint = None

    def exit_if_not_finite(self, iteration, values):
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"{self.folder / 'checkpoint.pt'} is from before" if self.saved else "there is no checkpoint yet"
                sys.exit(f"{SCRIPT}: {name} is {value} in iteration {iteration + 1}; the run ends, {kept}")

    def log(self, iteration, stats, seconds):
        """The curves of one iteration, which took `seconds`. The x axis counts trajectories."""
        self.seconds += seconds
        if not self.leads:
            return
        for name, value in stats.items():
            self.writer.add_scalar(name, value, (iteration + 1) * self.args.trajectories_per_update)
        status = f"score {stats['objective/scores']:.3f}, {stats['charts/SPS']:.0f} tokens/s"
        self.progress.set_postfix_str(status, refresh=False)
        self.progress.update()

    def stopping(self):
        """Whether any process has got a signal."""
        return bool(self.accelerator.reduce(torch.tensor(float(bool(self.signals)), device=self.device)).item())

    def save(self, iterations, trained, optimizer):
        # the last step of an update can break the policy after its losses were finite
        weights = sum(parameter.detach().sum() for parameter in trained.values()).item()
        self.exit_if_not_finite(iterations - 1, {"a weight": weights})
        if self.leads:
            self.writer.flush()
            state = {
                "agent": {name: parameter.detach() for name, parameter in trained.items()},
                "optimizer": optimizer.state_dict(),
                "iteration": iterations,
                "seconds": self.seconds,
                "before": self.before[0],
                "samples_before": self.before[1],
                "event_files": {path.name: path.stat().st_size for path in self.folder.glob("events.out.tfevents.*")},
            }
            save_checkpoint_atomically(self.folder / "checkpoint.pt", state)
        self.saved = True

    def evaluate(self, name, iterations, episodes, inputs):
        """What `evaluate` measures of `episodes` texts, as name/..., and its samples; (None, []) of none."""
        if not episodes:
            return None, []
        result, samples = evaluate(*inputs, self.args, self.accelerator)
        if self.leads:
            for key, value in result.items():
                self.writer.add_scalar(f"{name}/{key}", value, iterations * self.args.trajectories_per_update)
        return result, samples

    def exit_stopped(self, iterations):
        """After a signal: prints how to resume."""
        if self.leads:
            self.progress.close()
            self.writer.close()
            if self.args.track:
                self.wandb.finish()
        name = signal.Signals(self.signals[0]).name if self.signals else "a signal"
        self.say(f"{name} after iteration {iterations}, saved; continue with --resume {self.folder}")
        sys.exit(128 + (self.signals[0] if self.signals else signal.SIGTERM))

    def finish(self, after, trained, optimizer, agent, tokenizer):
        """Writes samples, models and result.json. after: what `evaluate` has returned for the trained policy."""
        if not self.leads:
            return
        self.progress.close()
        (before, samples_before), (after, samples) = self.before, after
        table = save_samples(self.folder, samples_before, samples) if samples else None
        if table:
            rows = ["| " + " | ".join(re.sub(r"[\n|]", " ", str(cell)) for cell in row) + " |" for row in table]
            text = "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])
            self.writer.add_text("samples", text, self.args.iterations)
        self.save(self.args.iterations, trained, optimizer)  # with the event files that hold the scores
        if self.args.save_model:
            save_policy(self.folder, agent, tokenizer, self.args)
        result = {
            "score": after["score"] if after else None,
            "score_stderr": after["score_stderr"] if after else None,
            "before": before,
            "after": after,
            "global_step": self.args.iterations * self.args.trajectories_per_update,
            "seconds": self.seconds,
            **self.record,
        }
        write_json(self.folder / "result.json", result)
        self.writer.close()
        if self.args.track:
            if table:
                self.wandb.log({"samples": self.wandb.Table(columns=table[0], data=table[1:])})
            self.wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
            self.wandb.finish()
        score = f"score {before['score']:.3f} before, {after['score']:.3f} after" if after else "not evaluated"
        self.say(f"{self.args.iterations} iterations in {self.seconds:.0f} s, {score}; {self.folder / 'result.json'}")


# --- loading ----------------------------------------------------------------------------------------------------------


def prepare_hub(args: Args, *names: str) -> None:
    """With --offline nothing leaves this machine. If the Hub does not answer within five seconds, only its cache is used.

    names: the arguments that may be Hub ids.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # between peft and transformers
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else an outside service is asked for a pull request with safetensors
    offline = args.offline or huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and not all(Path(getattr(args, name)).exists() for name in names):
        try:
            urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=5).close()
        except HTTPError:
            pass  # an answer
        except OSError:
            offline = True
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def cannot_load(args: Args, name: str, error: Exception, expected: str) -> None:
    """Ends in one line: what of the argument `name` could not be loaded, why, and what there is instead."""
    source = getattr(args, name)
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    hint = f"python benchmark/make_rlhf_assets.py {TASK} builds what --offline takes"
    if huggingface_hub.constants.HF_HUB_OFFLINE and not args.offline and not Path(source).exists():
        reason = f"not in the cache, and {huggingface_hub.constants.ENDPOINT} does not answer or HF_HUB_OFFLINE is set"
    elif "safetensors" in str(error) and not args.allow_pickle:
        reason = "it has no safetensors"
        hint = f"--allow-pickle takes its pickled weights, or: model = AutoModel....from_pretrained({source!r}); "
        hint += "model.save_pretrained(FOLDER)"
    require(args, name, False, f"{expected} ({reason}); {hint}")


def check_weights(args: Args, name: str, info: dict) -> None:
    """Refuses a model some of whose weights were not in its files, or had another shape there."""
    missing = ", ".join(sorted(info["missing_keys"]))
    require(args, name, not missing, f"a model with all its weights; {missing} are missing")
    wrong = ", ".join(f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(info["mismatched_keys"]))
    require(args, name, not wrong, f"weights of its configuration's shapes; {wrong}")


def is_adapter(args: Args, name: str) -> bool:
    """Whether the argument names an adapter, which transformers would load, frozen, onto its base."""
    return find_adapter_config_file(getattr(args, name), local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE) is not None


def check_lm(args: Args, name: str, lm: transformers.PreTrainedModel, backbone) -> None:
    """Refuses a model that would compute wrong numbers here: two texts of different length through `backbone` and the model's
    head, padded on the left and cached token by token, against the plain model, each text alone and in one pass.

    backbone: `Agent.backbone` without adapters.
    """
    short, long = (torch.arange(length, device=lm.device) * 7919 % lm.config.vocab_size for length in (5, 9))
    batch = torch.stack([F.pad(short, (4, 0), value=PAD), long])
    real = batch != PAD
    head, reason = lm.get_output_embeddings(), ""
    with torch.no_grad():
        plain = [lm(ids[None]).logits[0].float() for ids in (short, long)]
        # rounding: float32 has 24 bits, bfloat16 8; a model that is wrong here is off by about its logits' spread
        tolerance = plain[1].std() * (1e-3 if lm.dtype == torch.float32 else 0.1)

        def differs(found: torch.Tensor, wanted: torch.Tensor) -> bool:
            return not bool(((head(found).float() - wanted).abs() <= tolerance).all())

        try:
            alone = backbone(long[None], real[1:]).last_hidden_state[0]
            padded = backbone(batch, real).last_hidden_state
            cache = transformers.DynamicCache(config=lm.config)
            first = backbone(batch[:, :6], real[:, :6], past_key_values=cache).last_hidden_state
            rest = [backbone(batch[:, t : t + 1], real[:, : t + 1], past_key_values=cache).last_hidden_state for t in (6, 7, 8)]
            cached = torch.cat([first, *rest], dim=1)
            for hidden, wanted, what in (
                (alone, plain[1], "its logits are not its head applied to its last hidden states"),
                (padded[0, 4:], plain[0], "padding on the left changes its numbers"),
                (cached[1], plain[1], "a cache of keys and values changes its numbers"),
                (cached[0, 4:], plain[0], "a cache behind padding changes its numbers"),
            ):
                if not reason and differs(hidden, wanted):
                    reason = what
        except Exception as error:  # arguments or a cache that it does not take, shapes, ...
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    require(args, name, not reason, f"a causal model that takes padding, positions and a cache ({reason})")


def read_json_lines(path: str) -> datasets.Dataset:
    """A file of JSON lines in UTF-8; errors name the line."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return datasets.Dataset.from_list(rows)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint_atomically(path: Path, state: dict) -> None:
    """As `write_atomically`, for more than should be in memory twice."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
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


def track_run(args: Args, run_folder: Path, identity: dict) -> object:
    """Starts the W&B run, or continues the one with this `run_id`; returns W&B. It logs what TensorBoard gets."""
    import wandb  # a second and 20 MB that only a tracked run pays

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
    return wandb


# --- command line -----------------------------------------------------------------------------------------------------


def fail(message):
    """Bad input: one line on stderr, exit status 2."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
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


def check_rlhf(args: Args) -> None:
    """Refuses values that no run of either RLHF script can have."""
    whole = ("iterations", "trajectories_per_update", "max_prompt_length", "response_length", "update_epochs", "minibatch_size")
    for name in (*whole, "gradient_accumulation", "reward_batch_size", "checkpoint_interval"):
        require(args, name, getattr(args, name) >= 1, "a whole number of 1 or more")
    for name in ("min_response_length", "top_k", "lora_r", "eval_episodes", "eval_every", "num_threads"):
        require(args, name, getattr(args, name) >= 0, "a whole number of 0 or more")
    require(args, "num_threads", args.num_threads <= 1024, "1,024 or less")
    require(args, "seed", 0 <= args.seed < 2**63, "a whole number from 0 to 2^63 - 1")
    for name in ("gamma", "gae_lambda"):
        require(args, name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    for name in ("temperature", "learning_rate", "clip_coef", "clip_coef_value", "max_grad_norm"):
        require(args, name, math.isfinite(getattr(args, name)) and getattr(args, name) > 0, "a finite number above 0")
    for name in ("alpha", "beta", "kl_coef", "weight_decay", "vf_coef", "ent_coef", "reference_nll_coef"):
        require(args, name, math.isfinite(getattr(args, name)) and getattr(args, name) >= 0, "a finite number of 0 or more")
    require(args, "Z", math.isfinite(args.Z) and args.Z < 0, "a finite number below 0")
    shorter = args.min_response_length <= args.response_length
    require(args, "min_response_length", shorter, f"response_length = {args.response_length} or less")
    divides = args.trajectories_per_update % args.minibatch_size == 0
    require(args, "minibatch_size", divides, f"a divisor of trajectories_per_update = {args.trajectories_per_update}")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # what `accelerate launch` sets
    parts = processes * args.gradient_accumulation
    wanted = f"a multiple of processes x gradient_accumulation = {processes} x {args.gradient_accumulation}"
    require(args, "minibatch_size", args.minibatch_size % parts == 0, wanted)
    require(args, "exp_name", re.fullmatch(r"[\w.-]{1,100}", args.exp_name), "1 to 100 letters, digits, '_', '.' or '-'")
    project = re.fullmatch(r"[^/\\#?%:]{1,128}", args.wandb_project_name)
    require(args, "wandb_project_name", project, "1 to 128 characters but /\\#?%:")


def check_episodes(args: Args, name: str) -> None:
    """Refuses numbers of episodes that the processes cannot share, or that have no standard error."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    require(args, name, getattr(args, name) % processes == 0, f"a multiple of the {processes} processes")
    require(args, name, getattr(args, name) != 1, "0, or 2 or more for a standard error")


# --- main -------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory (no mmap for large blocks, no trimming): the kernel would otherwise zero every
    large array anew, a tenth of a CPU update. Elsewhere than on Linux with glibc it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)


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


def main(args):
    signals = catch_signals()
    keep_freed_memory()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.cuda and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(cpu=not (args.cuda and torch.cuda.is_available()))
    prepare_hub(args, *SOURCES)
    texts, models = load_texts(args), load_models(args, accelerator.device)  # refused, if at all, before a folder is made
    run = Run(args, accelerator, signals)
    if run.finished:
        if run.leads:
            print(f"{run.folder} has finished its {run.start:,} iterations; a larger --iterations continues it", flush=True)
    else:
        train(args, run, texts, *models)


if __name__ == "__main__":
    arguments = parse_args(sys.argv[1:], OFFLINE if "--offline" in sys.argv else Args())
    check_args(arguments)
    main(arguments)
