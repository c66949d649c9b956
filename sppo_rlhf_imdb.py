"""PPO and SPPO that teach a language model to write positive movie reviews: RLHF with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The policy is a causal language model, an action is a token, and the k actions are the whole
vocabulary. Token i has probability pi_i, r = pi_i / pi_old_i, and A is its advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i = -A Z (1 - pi_i) / pi_old_i     where the clip does not cut
    Eq. 9   L      = alpha L_ppo + beta L_rppo                                          Z < 0, -1 in the paper

A prompt is the first half of a review, and the policy continues it. A classifier's probability that the whole text is
positive is the score, and the last token gets it as its reward. Every token costs kl_coef (log pi - log pi_ref); pi_ref is
the policy before training. The algorithm ends at the line "Operations".

Examples:

    python sppo_rlhf_imdb.py --offline                              # SPPO on small models from benchmark/assets
    python sppo_rlhf_imdb.py --offline --alpha 1 --beta 0           # PPO, the baseline
    python sppo_rlhf_imdb.py                                        # the paper's models and data, from the Hub
    accelerate launch --num_processes 4 sppo_rlhf_imdb.py           # the same on four GPUs
    python sppo_rlhf_imdb.py --evaluate RUN_FOLDER --prompts FILE   # continuations of a finished run, as JSON lines

How this compares with the paper and its released code:

* The signs of Eq. 8 for A < 0: docs/loss.md, fact 1. `--alpha 0.9 --beta 0` is the control of `--alpha 0.5 --beta 0.4`: both
  have one gradient, fact 2.
* Tokens are sampled from the `top_k` likeliest (without EOS before `min_response_length`), as there, but log pi is that of
  the whole vocabulary. So r is not an exact importance weight: the mean of grad log pi under the sampling is grad log m,
  where m is the probability of these k tokens. An advantage that all tokens share moves probability to them or away.
  Whitened advantages have mean 0, which removes most of this. `--top-k 0 --min-response-length 0` samples from the whole
  vocabulary and is exact.
* The value is a linear head on the policy's last hidden states. One forward pass serves both, and the head begins at 0. The
  released critic is a language model of its own with a random head. So the value loss trains the policy's layers here, and
  does not there.
* `reference_nll_coef` trains on how the review really goes on after the prompt. The released target is the whole review: the
  first half of a review is followed by the same review from its beginning.
* Advantages are whitened over all real tokens of the rollout. The released code whitens each part of a minibatch, padding
  included.
* Dropout is off. Every token counts the same in every mean, EOS included.
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
#     "pydantic==2.14.4",
#     "safetensors==0.8.0",
#     "filelock==4.2.12",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
# ]
# ///

import contextlib
import copy
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
from collections import Counter
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Annotated
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import datasets
import huggingface_hub
import numpy as np
import pydantic
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils.peft_utils import find_adapter_config_file

Probability, Name = Annotated[float, Field(ge=0, le=1)], Annotated[str, Field(min_length=1)]


@pydantic.with_config(allow_inf_nan=False, use_attribute_docstrings=True)
@dataclass
class Args:
    """PPO and SPPO on positive movie reviews. The defaults are the paper's SPPO; `--alpha 1 --beta 0` is PPO."""

    # symmetric loss
    alpha: NonNegativeFloat = 0.5
    """weight of the PPO loss (Eq. 9)"""
    beta: NonNegativeFloat = 0.4
    """weight of the reverse loss (Eq. 9)"""
    Z: Annotated[float, Field(lt=0)] = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 8)"""
    literal_signs: bool = False
    """use the sign that Eq. 8 prints for A < 0; its gradient opposes PPO's"""

    # models and data
    offline: bool = False
    """small models and reviews from assets/, made by benchmark/assets/make_rlhf_assets.py, with defaults for a CPU"""
    policy: str = "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"
    """causal language model to train, and the reference: Hub id or folder"""
    tokenizer: str = "lvwerra/gpt2-imdb"
    """the policy's tokenizer: Hub id or folder; no BOS is put before a prompt"""
    reward_model: str = "lvwerra/distilbert-imdb"
    """text classifier, with its tokenizer: Hub id or folder; its probability of `reward_label` is the score"""
    reward_label: str = "1"
    """label of the classifier, by name or number"""
    dataset: str = "stanfordnlp/imdb"
    """reviews, in a column `text`: Hub id (its train split), folder, or file of JSON lines"""
    judge: str | None = None
    """a second classifier, for evaluation only: JSON file of a TF-IDF logistic regression"""
    allow_pickle: bool = False
    """load pickled weights (.bin) where a repository has no safetensors, by torch.load with weights_only"""

    # algorithm
    iterations: PositiveInt = 60
    """rollouts, each followed by one update"""
    trajectories_per_update: PositiveInt = 112
    """prompts of a rollout, one continuation each, over all processes"""
    max_prompt_length: PositiveInt = 64
    """maximum number of prompt tokens; a prompt is the first half of a review's words, and its last tokens are kept"""
    response_length: PositiveInt = 48
    """maximum number of new tokens"""
    min_response_length: NonNegativeInt = 48
    """EOS is not sampled before this many new tokens; if it equals response_length, EOS is never sampled"""
    temperature: PositiveFloat = 1.0
    """temperature of sampling, and of log pi everywhere"""
    top_k: NonNegativeInt = 50
    """sample from this many of the likeliest tokens; 0: from all"""
    gamma: Probability = 0.99
    """discount factor per token"""
    gae_lambda: Probability = 0.95
    """lambda of generalised advantage estimation"""
    kl_coef: NonNegativeFloat = 0.001
    """weight of log pi - log pi_ref in a token's reward"""
    learning_rate: PositiveFloat = 5e-6
    """learning rate of AdamW, constant"""
    weight_decay: NonNegativeFloat = 1e-6
    """weight decay of AdamW"""
    update_epochs: PositiveInt = 5
    """passes over each rollout"""
    minibatch_size: PositiveInt = 28
    """trajectories per gradient step, over all processes; divides trajectories_per_update"""
    gradient_accumulation: PositiveInt = 1
    """number of micro-batches into which a process splits its minibatch, to save memory"""
    norm_adv: bool = True
    """whiten the advantages over all tokens of a rollout"""
    clip_coef: PositiveFloat = 0.2
    """eps of PPO: the ratio's clip range is [1 - eps, 1 + eps]"""
    clip_coef_value: PositiveFloat = 0.2
    """clip range of the value: a value that has moved further towards its return has no gradient"""
    vf_coef: NonNegativeFloat = 0.5
    """weight of the value loss (half a mean squared error); it trains the policy's layers, too"""
    ent_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus, over the whole vocabulary"""
    max_grad_norm: PositiveFloat = 1.0
    """maximum norm of the gradient"""
    reference_nll_coef: NonNegativeFloat = 0.1
    """weight of the next-token loss on the review's own second half; 0 switches it off, which halves the time of an update"""
    lora_r: NonNegativeInt = 0
    """rank of LoRA adapters, trained in place of the weights; 0: train the weights"""
    lora_target_modules: str | None = None
    """layers that get adapters, names separated by commas; default: all linear layers"""

    # evaluation
    eval_episodes: NonNegativeInt = 256
    """held-out prompts that are continued and scored in an evaluation; 0: no evaluation"""
    eval_interval: NonNegativeInt = 10
    """evaluate every this many iterations; 0: only before and after training"""
    perplexity_tokens: PositiveInt = 65_536
    """tokens of the held-out reviews on which perplexity is measured"""

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

    # run and machine
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")] = "sppo_rlhf_imdb"
    """name of the experiment, part of the run folder's name"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """seed of everything random, the split of the reviews included"""
    run_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: Name | None = None
    """continue the run in this folder with its own arguments"""
    evaluate: Name | None = None
    """print what the policy of the run in this folder writes, as JSON lines, and exit"""
    prompts: Name | None = None
    """with --evaluate: continue these prompts, one a line (.jsonl: the column `prompt`); default: the held-out ones"""
    checkpoint_interval: PositiveInt = 10
    """save a checkpoint every this many iterations"""
    save_model: bool = False
    """write the policy to model/ of the run folder, for from_pretrained, LoRA merged in; with --evaluate: the checkpoint's"""
    cuda: bool = True
    """use a GPU if there is one"""
    bf16: bool = True
    """run the layers in bfloat16 on a GPU that has it; weights, logits and log-probabilities stay float32"""
    reward_batch_size: PositiveInt = 64
    """texts that the classifier scores at a time"""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch; 0: all cores"""


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
    eval_interval=0,
    perplexity_tokens=2048,
)
TASK = "imdb"  # in the names of assets and run folders
EPISODES = "eval_episodes"  # the argument for the number of texts that are scored before and after training
# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
EVALUATION, SPLIT, ORDER, SAMPLES, MINIBATCHES = 1, 2, 3, 4, 5
PAD = -1  # fills batches of token ids: no vocabulary has it, so it is never taken for EOS, nor sampled
STRIDE = 512  # tokens by which the window of the perplexity moves


# --- loss -------------------------------------------------------------------------------------------------------------


def symmetric_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z=-1.0, literal_signs=False):
    """L_ppo and L_rppo of the actions taken (Eq. 3 and 8): means over the batch. The caller weights them (Eq. 9).

    Inputs are [B]. sum_{j != i} pi_j / pi_old_i = 1 / pi_old_i - r in Eq. 8. The first term is left out: it has no
    gradient and overflows float32. With Z = -1 both losses have the same gradient, sample by sample; with literal_signs
    they have opposite ones where A < 0. Returns policy_loss, reverse_loss and statistics, all scalars.
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
    """This part's contribution to the loss of a minibatch, and to its statistics by name.

    The loss is alpha L_ppo + beta L_rppo + vf_coef L_value - ent_coef H + reference_nll_coef NLL, each a mean over all real
    tokens of the minibatch. Shapes: tokens [B, P + R]; old_logprobs, old_values, advantages, returns [B, R], 0 where a token
    is PAD; references [B, R]. share, reference_share: this part's real tokens divided by the minibatch's, in responses and
    in references.
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
    """The policy, a causal language model, with a value head on its last hidden states."""

    def __init__(self, lm: transformers.PreTrainedModel, lora_r: int = 0, bf16: bool = False, lora_targets="all-linear"):
        super().__init__()
        self.bf16 = bf16
        if lora_r:
            transposed = lm.config.model_type == "gpt2"  # its layers hold their weights so
            config = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=lora_targets, fan_in_fan_out=transposed)
            lm = get_peft_model(lm, config)
        self.lm = lm
        self.value_head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)  # before the head has learned, it sends no gradient into the policy
        self.eval()  # always: with dropout the ratio of the first minibatch would not be 1

    def backbone(self, tokens: torch.Tensor, real: torch.Tensor, **cache):
        """The model without its vocabulary head. tokens: [B, T]; real: [B, C + T] bool, with C tokens in the cache."""
        lm = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        # positions count real tokens, so that padding on the left shifts nothing; PAD becomes token 0, which the mask hides
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens.clamp(min=0), "attention_mask": real.long(), "position_ids": positions}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return lm.base_model(**inputs, use_cache=bool(cache), **cache)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """[..., d] -> [..., V], in float32 also with bf16, which rounds a logit of -100 to a multiple of a half."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.lm.get_output_embeddings()(hidden.float()).div_(temperature)

    def forward(self, tokens: torch.Tensor, prompt_length: int, temperature: float, with_entropy: bool = False):
        """Log-probabilities, values and entropies (or None), [N] each, of the N response tokens that are not PAD, row by row.

        tokens: [B, prompt_length + R]. Log-probabilities are those of the whole vocabulary at that temperature, values those
        of the states before the tokens. To save memory, logits are computed for these N tokens alone, and the log-softmax of
        cross_entropy is the only array [N, V] that is kept.
        """
        responses = tokens[:, prompt_length:]
        real = responses != PAD
        hidden = self.backbone(tokens, tokens != PAD).last_hidden_state[:, prompt_length - 1 : -1][real]
        logits = self.logits(hidden, temperature)
        logprobs = -F.cross_entropy(logits, responses[real], reduction="none")
        entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None
        return logprobs, self.value_head(hidden.float()).squeeze(-1), entropies


def trained_parameters(agent):
    """What is trained, by name: all weights, or the adapters and the value head."""
    return {name: parameter for name, parameter in agent.named_parameters() if parameter.requires_grad}


def sample(logits: torch.Tensor, uniforms: torch.Tensor, top_k: int) -> torch.Tensor:
    """[B] tokens from the top_k likeliest of logits [B, V] (0: of all), by inverting their distribution at uniforms [B].

    The random numbers are given, so that a trajectory does not depend on how many processes share the batch.
    """
    top, tokens = logits.topk(top_k or logits.shape[-1])
    cumulative = top.double().softmax(-1).cumsum(-1)
    choice = (cumulative < uniforms.unsqueeze(-1) * cumulative[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def generate(agent: Agent, prompts: torch.Tensor, uniforms: torch.Tensor, eos: int, args: Args) -> torch.Tensor:
    """Continuations [B, response_length] of prompts [B, P], each with its EOS, then PAD.

    uniforms: [B, response_length], one number in [0, 1) for each token. Each step reads the newest token alone: the cache
    holds the keys and values of the others.
    """
    responses = torch.full((len(prompts), args.response_length), PAD, device=prompts.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    may_end = args.min_response_length < args.response_length  # if not, no step needs to ask the GPU whether all have ended
    tokens, real, cache = prompts, prompts != PAD, transformers.DynamicCache(config=agent.lm.config)
    for t in range(args.response_length):
        hidden = agent.backbone(tokens, real, past_key_values=cache).last_hidden_state[:, -1]
        logits = agent.logits(hidden, args.temperature)
        if t < args.min_response_length:
            logits[:, eos] = -torch.inf
        chosen = sample(logits, uniforms[:, t], args.top_k)
        responses[:, t] = torch.where(running, chosen, PAD)
        running &= chosen != eos
        if may_end and not running.any():
            break
        tokens = chosen.unsqueeze(-1)
        real = torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    return responses


# --- environment ------------------------------------------------------------------------------------------------------


def tokenize_after(tokenizer, before: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of `before`, and of `text` after it. Together they are the tokens of the joint text.

    Llama's tokenizer and its like would put a space before `text` alone.
    """
    joint, alone = tokenizer([before + text, before], add_special_tokens=False).input_ids
    shared = sum(itertools.takewhile(bool, (a == b for a, b in zip(joint, alone, strict=False))))
    return joint[:shared], joint[shared:]


def pad_left(ids: list[int], length: int) -> torch.Tensor:
    """[length]: the ids, PAD before them."""
    return F.pad(torch.tensor(ids, dtype=torch.long), (length - len(ids), 0), value=PAD)


def encode(texts: list[str], tokenizer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, max_prompt_length], PAD on the left, and how the reviews go on [B, response_length], PAD on the right.

    A prompt is the first half of a review's words, cut to its last tokens. The review goes on with the other half.
    """
    prompts, references = [], torch.full((len(texts), args.response_length), PAD)
    for row, text in enumerate(texts):
        words = text.split()
        half = len(words) // 2
        ids, rest = tokenize_after(tokenizer, " ".join(words[:half]), " " + " ".join(words[half:]))
        ids = ids[-args.max_prompt_length :] or [tokenizer.eos_token_id]  # a review of one word
        prompts.append(pad_left(ids, args.max_prompt_length))
        ids = [*rest, tokenizer.eos_token_id][: args.response_length]
        references[row, : len(ids)] = torch.tensor(ids)
    return torch.stack(prompts), references


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


def whiten(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """x with mean 0 and variance 1 over its entries where `real`; 0 elsewhere."""
    variance, mean = torch.var_mean(x[real], correction=0)
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
        for start in range(0, share, part_size):
            rows = slice(start, start + part_size)
            into = real[rows]
            logprobs[rows][into], values[rows][into], _ = agent(tokens[rows], prompts.shape[1], args.temperature)
            with agent.lm.disable_adapter() if reference is agent else contextlib.nullcontext():
                ref_logprobs[rows][into] = reference(tokens[rows], prompts.shape[1], args.temperature)[0]
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


def update(agent, optimizer, accelerator, args, batch: tuple[torch.Tensor, ...], iteration: int) -> dict[str, float]:
    """`update_epochs` passes over the rollout in shuffled minibatches of trajectories; the mean of each statistic.

    batch: the inputs of `minibatch_loss` after the shares; every process has the whole rollout. Each process computes its
    rows of every minibatch, in `gradient_accumulation` parts. The gradients are summed over parts and processes. Each part
    is weighted by its real tokens, so that the sum does not depend on how the minibatch was split.
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
                for tensor in (sums, *(parameter.grad for parameter in parameters)):
                    torch.distributed.all_reduce(tensor)  # in place
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            collected.append(torch.cat([sums, torch.stack([norm, (norm > args.max_grad_norm).float()])]))
    names += ["losses/grad_norm", "losses/grad_clipped"]
    return shares | dict(zip(names, torch.stack(collected).mean(dim=0).tolist(), strict=True))


def train(args, run, texts, tokenizer, agent, reference, reward):
    """Writes, scores and learns `iterations` times. `run` keeps the curves, checkpoints and scores (see Operations)."""
    reviews, eval_reviews, judge = texts
    accelerator = run.accelerator
    trained = trained_parameters(agent)
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
        stats["charts/adv_sign_change"] = (raw_advantages.sign() != advantages.sign())[real].float().mean().item()
        stats["charts/learning_rate"] = args.learning_rate
        stats["charts/SPS"] = real.sum().item() / seconds  # a step is a token
        run.log(iteration, stats, seconds)
        done, stopping = iteration + 1, run.stopping()
        if args.eval_interval and done % args.eval_interval == 0 and done < args.iterations and not stopping:
            run.evaluate("eval", done, args.eval_episodes, evaluation)
        if done % args.checkpoint_interval == 0 or stopping or done == args.iterations:
            run.save(done, trained, optimizer)
        if stopping:
            run.exit_stopped(done)
    after = run.evaluate("eval", args.iterations, args.eval_episodes, evaluation)
    run.finish(after, agent, tokenizer)


# === Operations: loading of models and texts, evaluation, run folder, command line ====================================

# Specific to this task: packages that decide the numbers, sources, the gradient's shares, evaluation, loading, saving, checks
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "numpy")
SOURCES = ("policy", "tokenizer", "reward_model", "dataset", "judge")
# Parts of the loss, each with the arguments that weight it
PARTS = {"policy": ("alpha", "beta"), "value": ("vf_coef",), "entropy": ("ent_coef",), "reference": ("reference_nll_coef",)}


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


def judge_score(text: str, judge: dict) -> float:
    """Probability of a positive review by logistic regression on TF-IDF of words and pairs of words.

    judge: {"intercept": b, "terms": {term: [idf, weight]}}. The judge is trained apart from the policy and the reward model.
    Where the score rises and the judge's does not, the policy exploits the reward model.
    """
    words = re.findall(r"\b\w\w+\b", text.lower())
    terms = Counter(itertools.chain(words, (f"{a} {b}" for a, b in itertools.pairwise(words))))
    known = [(count, *judge["terms"][term]) for term, count in terms.items() if term in judge["terms"]]
    norm = math.sqrt(sum((count * idf) ** 2 for count, idf, _ in known)) or 1.0
    logit = judge["intercept"] + sum(count * idf * weight for count, idf, weight in known) / norm
    return 1 / (1 + math.exp(-logit))


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
    return torch.tensor(total / (ids.shape[1] - 1), dtype=torch.float64).exp().item()  # inf where math.exp would raise


def continue_prompts(agent, reference, reward, tokenizer, prompts, args, accelerator):
    """Continues prompts [N, P], with the same random numbers each time.

    Returns `rollout`'s batch of them all, and of each its texts and score.
    """
    rng = np.random.default_rng([args.seed, EVALUATION])
    uniforms = torch.from_numpy(rng.random((len(prompts), args.response_length)))
    parts = []
    size = args.trajectories_per_update
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        parts.append(rollout(agent, reference, reward, tokenizer, prompts[rows], uniforms[rows], args, accelerator)[0])
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    texts = decode(batch["tokens"], tokenizer)
    responses = decode(batch["tokens"][:, -args.response_length :], tokenizer)
    samples = [
        {"prompt": text.removesuffix(response), "response": response, "score": value}
        for text, response, value in zip(texts, responses, batch["scores"].tolist(), strict=True)
    ]
    return batch, samples


def evaluate(agent, reference, reward, tokenizer, reviews, judge, args, accelerator) -> tuple[dict[str, float], list[dict]]:
    """Scores the continuations of the first `eval_episodes` held-out prompts.

    Returns the score, its standard error, KL, shares, perplexity on the reviews and the judge's score; and every sample.
    """
    prompts, _ = encode(reviews[: args.eval_episodes], tokenizer, args)
    batch, samples = continue_prompts(agent, reference, reward, tokenizer, prompts, args, accelerator)
    stats, scores = describe(batch, tokenizer.eos_token_id, args), batch["scores"]
    result = {"score": stats.pop("scores"), "score_stderr": scores.std().item() / math.sqrt(len(scores)), **stats}
    result["perplexity"] = perplexity(agent, reviews, tokenizer, args.perplexity_tokens)
    if judge:
        for row in samples:
            row["judge_score"] = judge_score(row["prompt"] + row["response"], judge)
        result["judge_score"] = float(np.mean([row["judge_score"] for row in samples]))
    return result, samples


def evaluate_texts(prompts, texts, models, args, accelerator):
    """--evaluate: `evaluate` on the held-out reviews, or the mean score and the samples of the user's prompts."""
    tokenizer, agent, reference, reward = models
    if prompts is None:
        _, reviews, judge = texts
        return evaluate(agent, reference, reward, tokenizer, reviews, judge, args, accelerator)
    rows = [ids or [tokenizer.eos_token_id] for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    ids = torch.stack([pad_left(row[-args.max_prompt_length :], args.max_prompt_length) for row in rows])
    batch, samples = continue_prompts(agent, reference, reward, tokenizer, ids, args, accelerator)
    for sample, prompt in zip(samples, prompts, strict=True):
        sample["prompt"] = prompt
    too_long = sum(len(row) > args.max_prompt_length for row in rows)  # of these the policy has read the end
    return {"score": batch["scores"].mean().item(), "too_long": too_long}, samples


def from_pretrained(args: Args, name: str, loader):
    """Loads the argument `name`, a Hub id or a folder, with `loader`: safetensors with all weights, without remote code."""
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
        cannot_load(args, name, error, "a Hub id or a folder that can be loaded", loader)
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
    check_targets(args, lm)
    targets = args.lora_target_modules.split(",") if args.lora_target_modules else "all-linear"
    try:
        agent = Agent(lm, args.lora_r, bf16, targets).to(device)
    except ValueError as error:  # peft's
        require(args, "lora_target_modules", False, f"layers of the policy ({one_line(error)})")
    reference = agent if args.lora_r else copy.deepcopy(agent).requires_grad_(False)

    reward_model = from_pretrained(args, "reward_model", transformers.AutoModelForSequenceClassification).to(device)
    config = reward_model.config
    labels = {str(number): number for number in range(config.num_labels)}
    labels |= {str(label): int(number) for number, label in (config.id2label or {}).items()}
    labels |= {str(label): int(number) for label, number in (config.label2id or {}).items()}
    require(args, "reward_model", not config.is_encoder_decoder, "an encoder or a causal model, not both in one")
    require(args, "reward_model", len(set(labels.values())) > 1, "a classifier with two labels or more")
    require(args, "reward_label", args.reward_label in labels, f"one of the reward model's {', '.join(labels)}")
    reward_tokenizer = from_pretrained(args, "reward_model", transformers.AutoTokenizer)
    # without its files transformers makes a tokenizer to which every word is the unknown one
    tells = len({tuple(reward_tokenizer(text).input_ids) for text in ("a film", "b film", "the one", "2 10")}) > 1
    require(args, "reward_model", tells, "a classifier with its tokenizer's files; this tokenizer tells no words apart")
    reward_tokenizer.truncation_side = "left"  # of a text that is too long the response stays
    # classifiers on causal models look for the last token before the padding, and count positions from the left
    reward_tokenizer.padding_side, reward_model.config.pad_token_id = "right", reward_tokenizer.pad_token_id
    reward = (reward_model, reward_tokenizer, labels[args.reward_label])
    texts = ["a film", "a film that is longer than the other one", "a film " * reward_positions(reward_model)]
    try:
        together, alone = score(texts, *reward, args), torch.cat([score([text], *reward, args) for text in texts])
    except Exception as error:  # no token to pad with, not a classifier of texts, ...
        cannot_load(args, "reward_model", error, "a classifier with a tokenizer that pads")
    same = torch.allclose(together, alone, atol=1e-2, rtol=0)
    require(args, "reward_model", same, "a classifier whose scores do not depend on what else is in the batch")
    return tokenizer, agent, reference, reward


def load_texts(args):
    """Training and held-out reviews, 80 % and 20 % of the train split, shuffled by the seed; and the judge, or None."""
    try:
        if Path(args.dataset).is_file():
            reviews = read_json_lines(args.dataset)
        else:
            reviews = datasets.load_dataset(args.dataset, split="train")
        columns = reviews.column_names
        texts = reviews["text"][:] if "text" in columns else []
    except Exception as error:  # datasets names no common type
        error = unreadable_file(args.dataset) or error.__cause__ or error  # what it was while "generating the dataset"
        cannot_load(args, "dataset", error, "a Hub id, a folder or a file of JSON lines that can be loaded")
    require(args, "dataset", "text" in columns, f"a column named text; its columns are {', '.join(columns)}")
    require(args, "dataset", all(isinstance(text, str) for text in texts), "a column text that holds texts alone")
    order = np.random.default_rng([args.seed, SPLIT]).permutation(len(texts))
    texts = [texts[i] for i in order.tolist()]
    split = len(texts) * 4 // 5
    enough = split >= args.trajectories_per_update and len(texts) - split >= args.eval_episodes
    wanted = f"{args.trajectories_per_update} training and {args.eval_episodes} validation reviews or more"
    require(args, "dataset", enough, f"{wanted}; it has {split} and {len(texts) - split}")
    return texts[:split], texts[split:], load_judge(args)


def load_judge(args: Args) -> dict | None:
    """The judge for `judge_score`, or None."""
    if args.judge is None:
        return None
    try:
        judge = json.loads(Path(args.judge).read_text())
        terms = {term: (float(idf), float(weight)) for term, (idf, weight) in judge["terms"].items()}
        return {"intercept": float(judge["intercept"]), "terms": terms}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        require(args, "judge", False, 'a JSON file {"intercept": b, "terms": {term: [idf, weight]}}')


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
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    lm = agent.lm.merge_and_unload() if isinstance(agent.lm, PeftModel) else agent.lm
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_policy(run_folder, agent, tokenizer, args):
    save_model(run_folder / "model", agent, tokenizer)


def describe_models(args, run, agent, trained, reward, count):
    """A run's first line."""
    millions = [sum(p.numel() for p in parameters) / 1e6 for parameters in (agent.parameters(), trained.values())]
    return (
        f"{args.policy}, {millions[0]:.1f}M parameters, {millions[1]:.1f}M trained; {count:,} reviews; "
        f"{run.accelerator.num_processes} x {run.device.type}, {torch.get_num_threads()} threads; {run.folder}"
    )


def check_task(args):
    """Refuses combinations of arguments that this script cannot learn with."""
    require(args, "lora_target_modules", args.lora_r or args.lora_target_modules is None, "--lora-r 1 or more with it")


# --- run: one text in the RLHF scripts from here on -------------------------------------------------------------------

SCRIPT = Path(__file__).name
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Run:
    """A run's folder: arguments, curves, checkpoint, samples and result. Resumes a run. Saves and exits on a signal.

    It differs from the control scripts' Run where accelerate asks for it: every process calls it, and one, the leader,
    writes and talks. And it counts iterations of whole texts; the curves' x axis is the number of texts.
    """

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self.checkpoint, self.signals = args, accelerator, None, []
        self.device, self.leads, self.cleanup = accelerator.device, accelerator.is_main_process, contextlib.ExitStack()
        self.folder = None
        self.record = {
            "script": SCRIPT,
            "run_id": (args.track and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],  # a sweep's agent names the run
            "env_id": TASK,
            "args": asdict(args) | {"resume": None},
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
            "commit": git_commit(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        if self.leads:
            self.open_folder()
        (self.folder,) = broadcast_object_list([self.folder])
        if not self.leads and args.resume and (self.folder / "checkpoint.pt").exists():
            self.checkpoint = load_checkpoint(self.folder, "--resume")
        known = self.checkpoint or {"iteration": 0, "seconds": 0.0, "before": None, "samples_before": []}
        self.start, self.saved = known["iteration"], self.checkpoint is not None
        self.seconds = self.start_seconds = known["seconds"]
        self.before = (known["before"], known["samples_before"]) if self.checkpoint else None
        if self.leads:
            # purge_step hides what was logged after the checkpoint, so that no step shows twice
            self.writer = SummaryWriter(self.folder, purge_step=self.texts(self.start) + 1 if self.saved else 0)
            self.cleanup.callback(self.writer.close)
            rows = "\n".join(f"|{name}|{value}|" for name, value in self.record["args"].items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            self.last_line = time.monotonic()
            self.progress = tqdm(total=args.iterations, initial=self.start, unit="iteration", disable=None)
            self.cleanup.callback(self.progress.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def open_folder(self):
        """Makes the run's folder, or opens the one to resume, and writes args.json."""
        args = self.args
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

    def make_folder(self):
        """runs/{task}__{exp_name}__{seed}__{unix time}/"""
        while True:
            self.folder = Path(self.args.run_dir) / f"{TASK}__{self.args.exp_name}__{self.args.seed}__{int(time.time())}"
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
        self.cleanup.callback(lock_run(self.folder, f"--resume {self.args.resume}").release)

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
        if self.leads:
            with contextlib.suppress(OSError):  # not print, which may be what the signal has interrupted
                os.write(2, b"\nfinishing this iteration, then saving; Ctrl-C again quits now\n")

    def say(self, line):
        if self.leads:
            say(line)

    def texts(self, iterations):
        """The x axis: texts written in training."""
        return iterations * self.args.trajectories_per_update

    def load(self, trained, optimizer, agent):
        """Puts the checkpoint's weights and optimiser in place, and frees it: as much memory as these take."""
        if self.checkpoint:
            load_weights(agent, trained, self.checkpoint, self.args, "--resume")
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        self.checkpoint = None

    def exit_if_not_finite(self, iteration, values):
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"{self.folder / 'checkpoint.pt'} is from before" if self.saved else "there is no checkpoint yet"
                sys.exit(f"{SCRIPT}: {name} is {value} in iteration {iteration + 1}; the run ends, {kept}")

    def log(self, iteration, stats, seconds):
        """The curves of one iteration, which took `seconds`."""
        self.seconds += seconds
        if not self.leads:
            return
        for name, value in stats.items():
            self.writer.add_scalar(name, value, self.texts(iteration + 1))
        status = f"score {stats['objective/scores']:.3f}, {stats['charts/SPS']:,.0f} tokens/s"
        self.progress.set_postfix_str(status, refresh=False)
        self.progress.update()
        now = time.monotonic()
        if self.progress.disable and now > self.last_line + 60:  # no terminal: one line a minute
            self.last_line = now
            speed = (iteration + 1 - self.start) / (self.seconds - self.start_seconds)
            left = tqdm.format_interval((self.args.iterations - iteration - 1) / speed)
            say(f"iteration {iteration + 1} of {self.args.iterations}, {status}, {left} left")

    def stopping(self):
        """Whether any process has got a signal."""
        return bool(self.accelerator.reduce(torch.tensor(float(bool(self.signals)), device=self.device)).item())

    def save(self, iterations, trained, optimizer):
        # the last gradient step can break the policy after its losses were finite
        weights = sum(parameter.detach().sum() for parameter in trained.values()).item()
        self.exit_if_not_finite(iterations - 1, {"the sum of the weights": weights})
        if self.leads:
            self.writer.flush()
            state = {
                "agent": {name: parameter.detach() for name, parameter in trained.items()},
                "optimizer": optimizer.state_dict(),
                "iteration": iterations,
                "seconds": self.seconds,
                "before": self.before[0],
                "samples_before": self.before[1],
            }
            save_checkpoint_atomically(self.folder / "checkpoint.pt", state)
        self.saved = True
        self.accelerator.wait_for_everyone()  # a process that exits before it is written would end the others

    def evaluate(self, name, iterations, episodes, inputs):
        """What `evaluate` measures of `episodes` texts, logged as name/..., and its samples; (None, []) of none."""
        if not episodes:
            return None, []
        result, samples = evaluate(*inputs, self.args, self.accelerator)
        self.exit_if_not_finite(iterations - 1, {"the mean score of the evaluation": result["score"]})
        if self.leads:
            for key, value in result.items():
                self.writer.add_scalar(f"{name}/{key}", value, self.texts(iterations))
            self.show(f"{name}/samples", [list(samples[0]), *(list(sample.values()) for sample in samples[:20])], iterations)
        # JSON has no infinity, which a perplexity can be
        return {key: value if math.isfinite(value) else None for key, value in result.items()}, samples

    def show(self, name, table, iterations):
        """A table, its header first, as a text in TensorBoard and as a table in W&B."""
        rows = ["| " + " | ".join(re.sub(r"[\n|]", " ", str(cell)) for cell in row) + " |" for row in table]
        text = "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])
        self.writer.add_text(name, text, self.texts(iterations))
        if self.args.track:
            self.wandb.log({name: self.wandb.Table(columns=table[0], data=table[1:]), "global_step": self.texts(iterations)})

    def exit_stopped(self, iterations):
        """After a signal: prints how to resume."""
        number = self.signals[0] if self.signals else signal.SIGTERM  # another process may have got it
        if self.leads:
            self.close()
        self.say(f"{signal.Signals(number).name} after iteration {iterations}, saved; continue with --resume {self.folder}")
        sys.exit(128 + number)

    def finish(self, after, agent, tokenizer):
        """Writes samples, models and result.json. after: what `evaluate` has returned for the trained policy."""
        if not self.leads:
            return
        (before, samples_before), (after, samples) = self.before, after
        if samples:
            self.show("samples", save_samples(self.folder, samples_before, samples), self.args.iterations)
        if self.args.save_model:
            save_policy(self.folder, agent, tokenizer, self.args)
        result = {
            "score": after["score"] if after else None,
            "score_stderr": after["score_stderr"] if after else None,
            "before": before,
            "after": after,
            "global_step": self.texts(self.args.iterations),
            "seconds": self.seconds,
            **self.record,
        }
        write_json(self.folder / "result.json", result)
        if self.args.track:
            self.wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
        self.close()
        score = f"score {before['score']:.3f} before, {after['score']:.3f} after" if after else "not evaluated"
        self.say(f"{self.args.iterations} iterations in {self.seconds:.0f} s, {score}; {self.folder / 'result.json'}")
        if self.signals:  # one during the last evaluation
            sys.exit(128 + self.signals[0])

    def close(self):
        self.progress.close()
        self.writer.close()
        if self.args.track:
            self.wandb.finish()


# --- loading ----------------------------------------------------------------------------------------------------------


def prepare_hub(args: Args, *names: str) -> None:
    """Asks the Hub for an answer. Without one within five seconds, and with --offline, only the local cache is used.

    names: the arguments that may be Hub ids, or paths.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # between peft and transformers
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks a conversion service to open a pull request
    offline = args.offline or huggingface_hub.constants.HF_HUB_OFFLINE
    sources = [getattr(args, name) for name in names if getattr(args, name) is not None]
    if not offline and not all(Path(source).exists() for source in sources):
        try:
            urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=5).close()
        except HTTPError:
            pass  # an answer
        except (OSError, ValueError, HTTPException):  # ValueError: an HF_ENDPOINT without https://
            offline = True
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def check_targets(args: Args, lm) -> None:
    """Refuses LoRA on the embedding and on the vocabulary head: they may share one weight, and the head is called by itself."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    names = [f".{name}" for name, module in lm.named_modules() if module in ends]
    for target in (args.lora_target_modules or "").split(","):
        ours = not target or not any(name.endswith(f".{target}") for name in names)
        require(args, "lora_target_modules", ours, f"layers between the embedding and the head, which {target} is not")


def cannot_load(args, name, error, expected, loader=None):
    """Fails in one line: the argument `name`, its value, why it could not be loaded, and what to do.

    loader: the class of transformers that could save the model as safetensors.
    """
    source, reason, hint = getattr(args, name), one_line(error), ""
    if re.search(r"file named model\.safetensors|no adapter_model\.safetensors", str(error)) and not args.allow_pickle:
        reason, hint = "it has no safetensors", "; --allow-pickle takes its pickled weights"
        if loader:
            # a tokenizer that is missing would come up as one that knows no word; the variable keeps transformers from asking
            # a conversion service to open a pull request
            hint += "; or, with DISABLE_SAFETENSORS_CONVERSION=1 in the environment: from transformers import "
            hint += f"AutoTokenizer, {loader.__name__} as Auto; "
            hint += f"[kind.from_pretrained({source!r}).save_pretrained('FOLDER') for kind in (Auto, AutoTokenizer)]"
    elif args.offline:
        hint = f"; python benchmark/assets/make_rlhf_assets.py {TASK} builds what --offline takes"
    elif huggingface_hub.constants.HF_HUB_OFFLINE and not Path(source).exists():
        reason = f"not in the cache, and {huggingface_hub.constants.ENDPOINT} does not answer or HF_HUB_OFFLINE is set"
    require(args, name, False, f"{expected} ({reason}){hint}")


def check_weights(args: Args, name: str, info: dict) -> None:
    """Refuses a model whose files lack some of its weights, or have them in another shape."""
    missing = ", ".join(sorted(info["missing_keys"]))
    require(args, name, not missing, f"a model with all its weights; {missing} are missing")
    wrong = ", ".join(f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(info["mismatched_keys"]))
    require(args, name, not wrong, f"weights of its configuration's shapes; {wrong}")


def is_adapter(args: Args, name: str) -> bool:
    """Whether the argument names an adapter. transformers would load it onto its base without a word, and freeze it."""
    return find_adapter_config_file(getattr(args, name), local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE) is not None


def check_lm(args: Args, name: str, lm: transformers.PreTrainedModel, backbone) -> None:
    """Refuses a model that would compute wrong numbers in this script.

    Two texts of different length go through `backbone` and the model's head: padded on the left, and token by token with
    the cache. The logits must be those of the plain model, which reads each text alone and in one pass. backbone:
    `Agent.backbone` without adapters.
    """
    short, long = (torch.arange(length, device=lm.device) * 7919 % lm.config.vocab_size for length in (5, 9))
    batch = torch.stack([F.pad(short, (4, 0), value=PAD), long])
    real = batch != PAD
    head, reason = lm.get_output_embeddings(), ""
    with torch.no_grad():
        plain = [lm(ids[None]).logits[0].float() for ids in (short, long)]
        # Room for rounding: TF32, in which GPUs multiply float32, keeps 11 bits, bfloat16 8. In bfloat16 a right model of 30
        # layers is off by 0.2 of the logits' spread, one with its positions off by one by 0.8.
        tolerance = plain[1].std() * (0.02 if lm.dtype == torch.float32 else 0.4)

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
                (cached[0, 4:], plain[0], "a cache after left padding changes its numbers"),
            ):
                if not reason and differs(hidden, wanted):
                    reason = what
        except Exception as error:  # arguments or a cache that it does not take, shapes, ...
            reason = one_line(error)
    require(args, name, not reason, f"a causal model that takes padding, positions and a cache ({reason})")


def unreadable_file(folder: str) -> str | None:
    """The first text file of a folder that is not UTF-8, with the reason: `datasets` says neither its name nor its line."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".csv", ".txt", ".json", ".jsonl"):
            try:
                path.read_bytes().decode()
            except (OSError, UnicodeDecodeError) as error:
                return f"{path.name}: {error}"
    return None


def read_json_lines(path: str) -> datasets.Dataset:
    """Reads a file of JSON objects, one a line, in UTF-8. An error names the line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line.decode("utf-8-sig"))] if line.strip() else []
                if rows and not isinstance(rows[-1], dict):
                    raise ValueError("expected an object in braces")
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


def save_checkpoint_atomically(path, state):
    """As `write_atomically`, for a state too large to be in memory twice."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
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


def lock_run(folder, argument):
    """Only one job may write to a run. The operating system releases the lock of a process that is killed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"{argument}: another process is training this run")
    return lock


def load_checkpoint(folder, argument):
    """Loads a run's checkpoint, or fails in one line."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        checkpoint["seconds"], checkpoint["agent"]  # KeyError if it is of something else
        return checkpoint
    except Exception as error:  # torch has no common type for them
        fail(f"{argument} {folder}: cannot load its checkpoint.pt ({type(error).__name__})")


def load_weights(agent, trained, checkpoint, args, argument):
    """Puts the trained weights of a checkpoint into the agent; all others are as they were loaded."""
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (checkpoint["agent"], trained)]
    if shapes[0] != shapes[1]:
        folder = args.resume or args.evaluate
        fail(f"{argument} {folder}: its checkpoint.pt has other weights than {args.policy} has with these versions")
    agent.load_state_dict(checkpoint["agent"], strict=False)


def read_prompts(args):
    """The texts of --prompts: the column `prompt` of a file of JSON lines, or the lines of another file."""
    try:
        if args.prompts.endswith(".jsonl"):
            prompts = read_json_lines(args.prompts)["prompt"][:]
        else:
            prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        require(args, "prompts", False, f"a file of lines, or of JSON lines with a column prompt ({one_line(error)})")
    texts = all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    require(args, "prompts", prompts and texts, "a file of prompts, all of them texts")
    return prompts


# --- command line -----------------------------------------------------------------------------------------------------

# the groups of --help, by their first argument
GROUPS = {
    "alpha": "symmetric loss",
    "offline": "models and data",
    "iterations": "algorithm",
    "eval_episodes": "evaluation",
    "track": "logging",
    "exp_name": "run and machine",
}
# names of other libraries
HINTS = {
    "batch-size": "trajectories-per-update",
    "rollout-batch-size": "trajectories-per-update",
    "mini-batch-size": "minibatch-size",
    "num-ppo-epochs": "update-epochs",
    "num-train-epochs": "update-epochs",
    "total-episodes": "iterations",
    "cliprange": "clip-coef",
    "cliprange-value": "clip-coef-value",
    "init-kl-coef": "kl-coef",
    "lam": "gae-lambda",
    "lr": "learning-rate",
    "max-new-tokens": "response-length",
    "model-name-or-path": "policy",
    "sft-model-path": "policy",
    "base-model": "policy",
    "reward-model-path": "reward-model",
    "eval-every": "eval-interval",
    "eval-steps": "eval-interval",
}
LENGTH = "iterations"  # the argument for the length of a run
TRAINING_ONLY = ("track", "save_model")  # switches of a run that --evaluate does not take over
# what may change with --resume, and with --evaluate
RESUMABLE = "iterations track wandb_project_name wandb_entity wandb_group wandb_tags eval_interval checkpoint_interval"
RESUMABLE = [*RESUMABLE.split(), "save_model", "reward_batch_size", "num_threads", "cuda", *SOURCES]  # files may have moved
EVALUABLE = ["prompts", EPISODES, "save_model", "reward_batch_size", "num_threads", "cuda", *SOURCES]


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
    """Rejects invalid arguments before any file is written or model loaded."""
    try:
        pydantic.TypeAdapter(Args).validate_python(asdict(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        fail(f"{flag(first['loc'][0])} {first['input']}: {re.sub('^(Input|String|Value) should', 'must', first['msg'])}")
    shorter = args.min_response_length <= args.response_length
    require(args, "min_response_length", shorter, f"response_length = {args.response_length} or less")
    divides = args.trajectories_per_update % args.minibatch_size == 0
    require(args, "minibatch_size", divides, f"a divisor of trajectories_per_update = {args.trajectories_per_update}")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by `accelerate launch`
    parts = processes * args.gradient_accumulation
    wanted = f"a multiple of processes x gradient_accumulation = {processes} x {args.gradient_accumulation}"
    require(args, "minibatch_size", args.minibatch_size % parts == 0, wanted)
    for name in dict.fromkeys(("eval_episodes", EPISODES)):
        require(args, name, getattr(args, name) % processes == 0, f"a multiple of the {processes} processes")
        require(args, name, getattr(args, name) != 1, "0, or 2 or more for a standard error")
    require(args, "evaluate", processes == 1 or not args.evaluate, "a single process, without accelerate launch")
    require(
        args,
        "evaluate",
        args.prompts or getattr(args, EPISODES) or not args.evaluate,
        f"--prompts or {flag(EPISODES)} 2 or more with it",
    )
    require(args, "prompts", args.evaluate or args.prompts is None, "--evaluate with it")
    check_task(args)
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
        result = json.loads(Path(args.resume, "result.json").read_text())
        # a folder model/ alone may be an earlier checkpoint's, written by --evaluate
        saved = result["args"]["save_model"] and (Path(args.resume, "model").exists() or Path(args.resume, "adapters").exists())
        return result["global_step"] // args.trajectories_per_update >= args.iterations and (saved or not args.save_model)
    return False


def evaluate_run(args, accelerator):
    """--evaluate: prints what the policy of a finished or stopped run writes, as JSON lines. --save-model: saves it, too."""
    folder = Path(args.evaluate).resolve()
    if not (folder / "checkpoint.pt").exists():
        fail(f"--evaluate {args.evaluate}: has no checkpoint yet")
    checkpoint = load_checkpoint(folder, "--evaluate")
    if args.save_model:
        try:
            lock = lock_run(folder, f"--evaluate {args.evaluate}")
        except OSError as error:  # a folder that this user cannot write to
            fail(f"--evaluate {args.evaluate}: {error.strerror}; expected a folder that --save-model can write to")
    prompts = read_prompts(args) if args.prompts else None
    texts = None if prompts else load_texts(args)
    models = load_models(args, accelerator.device)
    load_weights(models[1], trained_parameters(models[1]), checkpoint, args, "--evaluate")
    result, samples = evaluate_texts(prompts, texts, models, args, accelerator)
    try:
        print("\n".join(map(json.dumps, samples)), flush=True)
    except BrokenPipeError:  # the reader, such as head, has had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    print(f"{SCRIPT}: {numbers}; {len(samples)} texts, iteration {checkpoint['iteration']}", file=sys.stderr)
    if args.save_model:
        try:
            save_policy(folder, models[1], models[0], args)
        except (OSError, SafetensorError) as error:
            fail(f"--evaluate {args.evaluate}: the model could not be saved ({one_line(error)})")
        lock.release()
        print(f"{SCRIPT}: saved the model of iteration {checkpoint['iteration']} in {folder}", file=sys.stderr)


def main(args):
    keep_freed_memory()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.cuda and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32: 11-bit factors and float32 sums, also in the logits
    accelerator = Accelerator(cpu=not (args.cuda and torch.cuda.is_available()))
    finished = args.resume and has_finished(args)
    accelerator.wait_for_everyone()  # until every process has looked for result.json
    if finished:
        if accelerator.is_main_process:
            say(f"{args.resume} has finished its {args.iterations:,} iterations; a larger --iterations continues it")
        return
    prepare_hub(args, *SOURCES)
    if args.evaluate:
        evaluate_run(args, accelerator)
        return
    texts, models = load_texts(args), load_models(args, accelerator.device)
    run = Run(args, accelerator)
    try:
        with run.cleanup:
            train(args, run, texts, *models)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        sys.exit(f"{SCRIPT}: {reason}; the run ends, {run.folder} keeps the last checkpoint, if there is one")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks does not end the run
    for number in (signal.SIGINT, signal.SIGTERM):  # until there is a run to save; models may still be loading
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    arguments = parse_args(sys.argv[1:], OFFLINE if "--offline" in sys.argv else Args())
    check_args(arguments)
    main(arguments)
