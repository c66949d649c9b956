"""PPO and SPPO that make a language model summarise: RLHF on LoRA adapters with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The policy is a causal language model, an action is a token, and the k actions are the whole
vocabulary; token i has probability pi_i, r = pi_i / pi_old_i, and A is its advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i = -A Z (1 - pi_i) / pi_old_i     where the clip does not cut
    Eq. 9   L      = alpha L_ppo + beta L_rppo                                          Z < 0, -1 in the paper

A prompt is a post and "TL;DR:"; the policy writes a summary; a reward model scores the two, which the last token gets; every
token costs kl_coef (log pi - log pi_ref). One frozen base model serves all: with the adapter `policy` it writes, with the
adapter `value` and a head it tells the value of a state, with none it is pi_ref, and, if the reward model has the same base,
with the adapter `reward` and a head it scores. Adapters and heads alone are trained.

Examples:

    python sppo_rlhf_tldr.py --offline                              # SPPO on assets of benchmark/assets/make_rlhf_assets.py
    python sppo_rlhf_tldr.py --offline --alpha 1 --beta 0           # PPO, the baseline
    python sppo_rlhf_tldr.py                                        # the paper's models and data, from the Hub; one 80 GB GPU
    accelerate launch --num_processes 4 sppo_rlhf_tldr.py           # the same on four GPUs

What differs from the paper and its released code:

* The signs of Eq. 8 where A < 0, and that `--alpha 0.7 --beta 0` is the control of `--alpha 0.5 --beta 0.2` and must learn
  alike: see README, "The loss, and seven facts about it". Here policy and value share no trained weight, and AdamW divides a
  constant factor of the gradient out again: the weight alpha + beta |Z| acts through the norm clip and Adam's eps, and against
  what else trains the policy, `reference_nll_coef` and `ent_coef`.
* The base is in bfloat16, or in 4 bits, as the paper has it, with `--load-in-4bit`; adapters, heads and logits are float32.
* Of a text too long for the reward model the end is read, not the beginning, so that the summary is.
* Adapters sit where peft puts them unasked: on the projections to queries and values.
* Dropout is off, as there: it calls eval() before each forward pass, so that the configuration's 0.1 is never in force.
  `--lora-dropout 0.1` switches LoRA's on in updates; the ratio of an update's first step is then not quite 1.
* EOS is an action like any other. There the padding token is EOS, so that EOS is masked out and never trained, and a summary
  that begins with EOS gets no score.
* Advantages are whitened over the whole rollout's real tokens; there over each part of a minibatch, padding included. Each
  token counts the same in every mean.
* Tokens are sampled from the 50 likeliest, as there (it sets no top_k, and 50 was its library's default), while log pi is that
  of the whole vocabulary: see the docstring of sppo_rlhf_imdb.py.
* 100 iterations, from the paper's Table 7, which is a picture; the released configuration has 200.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "peft==0.21.2",
#     "rouge-score==0.1.2",
#     "safetensors==0.8.0",
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
import importlib.util
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
from typing import Literal
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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file


@dataclass
class Args:
    """PPO and SPPO for summaries. `--alpha 1 --beta 0` is PPO; the defaults are the paper's SPPO."""

    # symmetric loss
    alpha: float = 0.5
    """weight of the PPO loss (Eq. 9)"""
    beta: float = 0.2
    """weight of the reverse loss (Eq. 9)"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 8), below 0"""
    literal_signs: bool = False
    """the reverse loss with the signs that Eq. 8 prints for A < 0, for study"""

    # models and data
    offline: bool = False
    """other defaults: the models and posts that benchmark/assets/make_rlhf_assets.py builds, at a size for CPUs"""
    policy: str = "CarperAI/openai_summarize_tldr_sft"
    """causal language model: base of the policy and of the values, and the reference; Hub id or folder"""
    tokenizer: str = "EleutherAI/gpt-j-6B"
    """the policy's tokenizer, and the reward model's: Hub id or folder; no BOS is put before a prompt"""
    reward_base: str = "EleutherAI/gpt-j-6B"
    """causal language model that the reward adapter belongs to: Hub id or folder; if it is the policy, that one is used"""
    reward_adapter: str = "jdchang/tldr_rm_adapter"
    """LoRA adapter with a head `score` that makes reward_base score texts: Hub id or folder, in peft's format"""
    reward_text: str = "<|startoftext|>{text}<|endoftext|>"
    """what the reward model reads, {text} being prompt and summary"""
    reward_max_length: int = 550
    """tokens of that at most; of longer texts the end"""
    dataset: str = "CarperAI/openai_summarize_tldr"
    """posts with columns `prompt` and `label`, the summary: Hub id or folder with the splits train, valid(ation) and test, or
    one file of JSON lines, which is split 80 : 10 : 10"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of the base models' weights (float16 would round the value adapter's small gradients to 0)"""
    load_in_4bit: bool = False
    """quantise the base models to 4 bits (NF4); needs a CUDA GPU and the package bitsandbytes"""

    allow_pickle: bool = False
    """load pickled weights (.bin) where a repository has no safetensors, by torch.load with weights_only"""

    # algorithm
    iterations: int = 100
    """rollouts, each followed by one update; the paper's table has 100, its released configuration 200"""
    trajectories_per_update: int = 64
    """prompts of a rollout, one summary each, over all processes"""
    max_prompt_length: int = 500
    """tokens of a prompt at most: the beginning of the post, and "\\nTL;DR:" """
    response_length: int = 50
    """new tokens at most"""
    min_response_length: int = 0
    """new tokens before which EOS is not sampled; EOS itself is trained, which the released code takes for padding"""
    temperature: float = 1.0
    """of sampling, and of log pi everywhere; evaluations are greedy"""
    top_k: int = 50
    """tokens are sampled from the so many likeliest; 0 for all. The released code sets none, so its library's 50 held"""
    gamma: float = 1.0
    """discount factor for each token, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, 0 to 1"""
    kl_coef: float = 0.002
    """what log pi - log pi_ref of a token costs in its reward"""
    learning_rate: float = 5e-6
    """AdamW's step size, constant"""
    weight_decay: float = 0.01
    """AdamW's"""
    update_epochs: int = 4
    """passes over each rollout"""
    minibatch_size: int = 16
    """trajectories per gradient step, over all processes; divides trajectories_per_update"""
    gradient_accumulation: int = 4
    """parts in which a process computes its share of a minibatch, one after another: updates need less memory"""
    gradient_checkpointing: bool = True
    """keep only each layer's input for the backward pass and compute the rest again: less memory, half more time"""
    norm_adv: bool = True
    """whiten the advantages over all tokens of a rollout; the released code: over each part of a minibatch, with its padding"""
    clip_coef: float = 0.2
    """PPO's eps: the ratio's clip range is [1 - eps, 1 + eps]"""
    clip_coef_value: float = 0.2
    """how far from its old value a value may go before its loss stops falling"""
    vf_coef: float = 0.1
    """weight of the value loss, half a mean square"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, over the whole vocabulary"""
    max_grad_norm: float = 1.0
    """norm to which the gradient of both adapters and the value head is clipped"""
    reference_nll_coef: float = 0.1
    """weight of the next-token loss on the reference summary, from the paper's released code; 0 saves a third of an update"""
    lora_r: int = 8
    """rank of the policy's and the value's adapter"""
    lora_alpha: float = 64.0
    """what these adapters add is multiplied by lora_alpha / lora_r"""
    lora_target_modules: str | None = None
    """layers that get adapters, as names with commas between them; default: peft's for the family, or else all linear layers"""
    lora_dropout: float = 0.0
    """share of these adapters' inputs that is dropped in updates, 0 to below 1. The paper's configuration says 0.1, but its
    code switches dropout off before each forward pass"""

    # evaluation, checkpoints, machine
    eval_episodes: int = 100
    """validation posts that are summarised and scored every `eval_every` iterations; 0 for none"""
    eval_every: int = 10
    """iterations between two of these evaluations; 0 for none"""
    test_episodes: int = 500
    """test posts that are summarised and scored before and after training; 0 for none"""
    reward_batch_size: int = 16
    """texts that the reward model scores at a time"""
    checkpoint_interval: int = 10
    """iterations between two checkpoints"""
    save_model: bool = False
    """write adapters/ for peft, and, unless in 4 bits, model/ for from_pretrained: the policy merged, rounded to `dtype`"""
    resume: str | None = None
    """run folder to continue, with its own arguments; only a larger --iterations and tracking flags may be added"""
    num_threads: int = 0
    """CPU threads of torch; 0 lets it take all cores"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""

    # run
    exp_name: str = "sppo_rlhf_tldr"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the adapters' first weights, the posts' order, the sampled tokens and the minibatches"""
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
    policy="assets/tldr/policy",
    tokenizer="assets/tldr/policy",
    reward_base="assets/tldr/policy",
    reward_adapter="assets/tldr/reward",
    reward_text="{text}<|endoftext|>",
    reward_max_length=96,
    dataset="assets/tldr/posts",
    top_k=0,
    dtype="float32",
    iterations=20,
    trajectories_per_update=16,
    max_prompt_length=40,
    response_length=20,
    learning_rate=1e-3,
    update_epochs=2,
    minibatch_size=8,
    gradient_accumulation=1,
    gradient_checkpointing=False,
    eval_episodes=32,
    eval_every=0,
    test_episodes=64,
)
TASK = "tldr"  # in the names of assets and run folders
LENGTH = "iterations"  # the argument that a resumed run may raise
# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
SPLIT, ORDER, SAMPLES, MINIBATCHES, DROPOUT = 1, 2, 3, 4, 5
PAD = -1  # fills batches of token ids: no vocabulary has it, so it is never taken for EOS, nor sampled
ENDING = "TL;DR:"  # of every prompt


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


def policy_loss(agent, args, share, tokens, old_logprobs, advantages):
    """What this part of a minibatch adds to the policy's loss, and to the statistics by name: alpha L_ppo + beta L_rppo
    - ent_coef H, each a mean over all real tokens of the minibatch.

    Shapes: tokens [B, P + R]; old_logprobs, advantages [B, R], 0 where a token is PAD. share: this part's real tokens over
    the minibatch's.
    """
    prompt_length = tokens.shape[1] - old_logprobs.shape[1]
    logprobs, entropies = agent(tokens, prompt_length, args.temperature, args.ent_coef > 0)
    real = tokens[:, prompt_length:] != PAD
    ppo_loss, reverse_loss, stats = symmetric_ppo_loss(
        logprobs, old_logprobs[real], advantages[real], args.clip_coef, args.Z, args.literal_signs
    )
    loss = args.alpha * ppo_loss + args.beta * reverse_loss
    stats = {"policy_loss": ppo_loss, "reverse_loss": reverse_loss, **stats}
    if args.ent_coef:
        stats["entropy"] = entropies.mean()
        loss = loss - args.ent_coef * stats["entropy"]
    return share * loss, {f"losses/{name}": share * value.detach() for name, value in stats.items()}


def reference_loss(agent, args, share, tokens, references):
    """As `policy_loss`: reference_nll_coef times the policy's next-token loss on the reference summaries [B, R]."""
    prompt_length = tokens.shape[1] - references.shape[1]
    tokens = torch.cat([tokens[:, :prompt_length], references], dim=1)
    nll = -share * agent(tokens, prompt_length, 1.0)[0].mean()
    return args.reference_nll_coef * nll, {"losses/reference_nll": nll.detach()}


def value_loss(agent, args, share, tokens, old_values, returns):
    """As `policy_loss`: vf_coef L_value, half a mean square; old_values and returns are [B, R]."""
    prompt_length = tokens.shape[1] - old_values.shape[1]
    values = agent.values(tokens, prompt_length)
    real = tokens[:, prompt_length:] != PAD
    old_values, returns = old_values[real], returns[real]
    clipped_values = old_values + (values - old_values).clamp(-args.clip_coef_value, args.clip_coef_value)
    loss = share * 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2).mean()
    return args.vf_coef * loss, {"losses/value_loss": loss.detach()}


# --- agent ------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """A causal language model, frozen, and LoRA adapters that take turns on it, some with a head of one number.

    `policy` writes, `value` tells the value of states, `reward` scores; without an adapter the model is the reference.
    """

    def __init__(self, lm: transformers.PreTrainedModel, writes: bool = True):
        super().__init__()
        self.lm = lm  # a PeftModel as soon as it has an adapter
        if writes:
            head = lm.get_output_embeddings()
            # logits in float32 also where the layers are not: bfloat16 would round a logit of 100 to a multiple of a half
            self.vocabulary_head = head if head.weight.dtype == torch.float32 else copy.deepcopy(head).float()
        self.heads = nn.ModuleDict()
        self.active = None

    def add(self, name: str, config: LoraConfig, head: bool) -> None:
        """A new adapter, whose head is 0: no value before it has learned one."""
        if isinstance(self.lm, PeftModel):
            self.lm.add_adapter(name, config)
        else:
            self.lm = get_peft_model(self.lm, config, adapter_name=name)
        self.active = ""  # peft's choice, which the next use puts right
        if head:
            width = self.lm.get_output_embeddings().weight.shape[1]
            self.heads[name] = nn.Linear(width, 1, bias=False)  # without bias, as transformers' classifiers have it
            nn.init.zeros_(self.heads[name].weight)

    def activate(self, name: str | None) -> None:
        """From here on the adapter `name` alone takes part, or none. Checkpointed layers are computed again in the backward
        pass, with the adapter that is active then: call backward before the next change."""
        if name == self.active:
            return
        if name is None:
            self.lm.base_model.disable_adapter_layers()
        else:
            self.lm.base_model.enable_adapter_layers()
            self.lm.set_adapter(name, inference_mode=name == "reward")  # which also says whose gradients are wanted
        self.active = name

    def backbone(self, tokens: torch.Tensor, real: torch.Tensor, adapter: str | None = "policy", **cache):
        """The model without its vocabulary head. tokens: [B, T]; real: [B, <= T, cached tokens before them] bool."""
        self.activate(adapter)
        lm = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        # positions count real tokens, so that padding on the left moves nothing; what PAD is replaced by is never attended to
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens.clamp(min=0), "attention_mask": real.long(), "position_ids": positions}
        return lm.base_model(**inputs, use_cache=bool(cache), **cache)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """[..., d] -> [..., V], in float32."""
        return self.vocabulary_head(hidden.float()).div_(temperature)

    def forward(self, tokens, prompt_length: int, temperature: float, with_entropy: bool = False, adapter="policy"):
        """For tokens [B, prompt_length + R] and the N of their R columns' entries that are not PAD, row by row:

        log-probabilities [N] under the whole vocabulary at that temperature, and entropies [N], or None. Neither logits of
        prompts and padding are computed, nor any copy of [N, V] kept but cross_entropy's log-softmax.
        """
        responses = tokens[:, prompt_length:]
        real = responses != PAD
        hidden = self.backbone(tokens, tokens != PAD, adapter).last_hidden_state[:, prompt_length - 1 : -1][real]
        logits = self.logits(hidden, temperature)
        logprobs = -F.cross_entropy(logits, responses[real], reduction="none")
        entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None
        return logprobs, entropies

    def values(self, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """[N]: the values of the states before the same tokens."""
        real = tokens[:, prompt_length:] != PAD
        hidden = self.backbone(tokens, tokens != PAD, "value").last_hidden_state[:, prompt_length - 1 : -1][real]
        return self.heads["value"](hidden.float()).squeeze(-1)


def trained_parameters(agent: Agent) -> dict[str, nn.Parameter]:
    """The adapters `policy` and `value` and the value head, by name."""
    parts = ("lora_A.policy.", "lora_B.policy.", "lora_A.value.", "lora_B.value.", "heads.value.")
    return {name: parameter for name, parameter in agent.named_parameters() if any(part in name for part in parts)}


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


def encode(posts: list[tuple[str, str]], tokenizer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, max_prompt_length], PAD on the left, and the summaries [B, response_length], PAD on the right.

    A prompt is the first tokens of the post, up to its own TL;DR: if it has one, and "\\nTL;DR:".
    """
    prompts = torch.full((len(posts), args.max_prompt_length), PAD)
    references = torch.full((len(posts), args.response_length), PAD)
    for row, (post, summary) in enumerate(posts):
        post = post.split(ENDING)[0].strip()
        ids, ending = tokenize_behind(tokenizer, post, "\n" + ENDING)
        ids = ids[: args.max_prompt_length - len(ending)] + ending
        prompts[row, args.max_prompt_length - len(ids) :] = torch.tensor(ids)
        _, ids = tokenize_behind(tokenizer, f"{post}\n{ENDING}", " " + summary.strip())
        ids = [*ids, tokenizer.eos_token_id][: args.response_length]
        references[row, : len(ids)] = torch.tensor(ids)
    return prompts, references


def decode(tokens: torch.Tensor, tokenizer) -> list[str]:
    """tokens: [B, T], PAD anywhere. The texts, without special tokens."""
    return tokenizer.batch_decode([row[row != PAD].tolist() for row in tokens], skip_special_tokens=True)


def score(texts: list[str], reward: "Agent", tokenizer, args: Args) -> torch.Tensor:
    """[B]: the reward head's number at the last token of each text, which padding on the left puts in the last column."""
    scores = []
    for start in range(0, len(texts), args.reward_batch_size):
        batch = [args.reward_text.replace("{text}", text) for text in texts[start : start + args.reward_batch_size]]
        ids = [ids[-args.reward_max_length :] for ids in tokenizer(batch, add_special_tokens=False).input_ids]
        longest = max(len(row) for row in ids)
        tokens = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids], device=reward.heads["reward"].weight.device)
        hidden = reward.backbone(tokens, tokens != PAD, "reward").last_hidden_state[:, -1]
        scores.append(reward.heads["reward"](hidden.float()).squeeze(-1))
    return torch.cat(scores)


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


def rollout(agent, reward, tokenizer, prompts, uniforms, args, accelerator) -> tuple[dict, dict[str, float]]:
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
    with torch.no_grad():
        scores = score(decode(tokens, tokenizer), reward, tokenizer, args)
    lap("score")
    real = responses != PAD
    logprobs, ref_logprobs, values = (torch.zeros(responses.shape, device=tokens.device) for _ in range(3))
    part_size = max(1, args.minibatch_size // accelerator.num_processes // args.gradient_accumulation)
    prompt_length = prompts.shape[1]
    passes = (
        (logprobs, lambda rows: agent(rows, prompt_length, args.temperature)[0]),
        (ref_logprobs, lambda rows: agent(rows, prompt_length, args.temperature, adapter=None)[0]),
        (values, lambda rows: agent.values(rows, prompt_length)),
    )
    with torch.no_grad():
        for result, compute in passes:
            for rows in torch.arange(share, device=tokens.device).split(part_size):
                result[torch.zeros_like(real).index_fill_(0, rows, True) & real] = compute(tokens[rows])
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


def update(agent, optimizer, accelerator, args, batch: dict[str, torch.Tensor], iteration: int) -> dict[str, float]:
    """`update_epochs` passes over the rollout in shuffled minibatches of trajectories; the mean of each statistic.

    batch: what the three losses take behind the shares, by name, the whole rollout in every process. Each process computes
    its rows of every minibatch in `gradient_accumulation` parts; gradients are summed over parts and processes, and as every
    part is weighted by its real tokens, the sum does not depend on how the minibatch was cut.
    """
    rng = torch.Generator().manual_seed(int(np.random.default_rng([args.seed, MINIBATCHES, iteration]).integers(2**63)))
    seeds = np.random.default_rng([args.seed, DROPOUT, iteration]).integers(2**63, size=accelerator.num_processes)
    torch.manual_seed(int(seeds[accelerator.process_index]))  # LoRA's dropout
    real = (batch["tokens"][:, -args.response_length :] != PAD).sum(-1)
    reference_real = (batch["references"] != PAD).sum(-1)
    trained = trained_parameters(agent)
    parameters = list(trained.values())
    of_policy = [parameter for name, parameter in trained.items() if re.search(r"lora_[AB]\.policy\.", name)]
    names, collected = [], []
    agent.train()  # LoRA's dropout and gradient checkpointing
    for _ in range(args.update_epochs):
        for minibatch in torch.randperm(len(real), generator=rng).to(real.device).split(args.minibatch_size):
            optimizer.zero_grad()
            sums = Counter()
            mine = minibatch[accelerator.process_index :: accelerator.num_processes]
            for rows in mine.split(len(mine) // args.gradient_accumulation):
                share = real[rows].sum() / real[minibatch].sum()
                reference_share = reference_real[rows].sum() / reference_real[minibatch].sum()
                # each loss is sent back before the next one: another adapter takes its turn, and memory is free again
                of = {name: tensor[rows] for name, tensor in batch.items()}
                loss, stats = policy_loss(agent, args, share, of["tokens"], of["logprobs"], of["advantages"])
                loss.backward()
                if args.reference_nll_coef:
                    loss, more = reference_loss(agent, args, reference_share, of["tokens"], of["references"])
                    loss.backward()
                    stats |= more
                loss, more = value_loss(agent, args, share, of["tokens"], of["values"], of["returns"])
                loss.backward()
                for name, value in (stats | more).items():
                    sums[name] += value
            names, totals = list(sums), torch.stack(list(sums.values()))
            if accelerator.num_processes > 1:
                sum_over_processes(accelerator, [totals, *(parameter.grad for parameter in parameters)])
            policy_norm = torch.stack([parameter.grad.norm() for parameter in of_policy]).norm()
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            share = (policy_norm / norm.clamp(min=1e-30)) ** 2  # policy and value train different weights: squares add up
            collected.append(torch.cat([totals, torch.stack([share, 1 - share, norm, (norm > args.max_grad_norm).float()])]))
    agent.eval()
    names += [f"losses/{name}" for name in ("grad_share_policy", "grad_share_value", "grad_norm", "grad_clipped")]
    return dict(zip(names, torch.stack(collected).mean(dim=0).tolist(), strict=True))


def train(args, run, posts, tokenizer, agent, reward):
    """Writes, scores and learns `iterations` times. `run` keeps the curves, checkpoints and scores (see Operations)."""
    accelerator = run.accelerator
    trained = trained_parameters(agent)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    run.load(trained, optimizer, agent)
    run.say(describe_models(args, run, agent, trained, reward, len(posts["train"])))
    validation = (agent, reward, tokenizer, posts["validation"][: args.eval_episodes])
    test = (agent, reward, tokenizer, posts["test"][: args.test_episodes])
    if run.before is None:
        run.before = run.evaluate("test", 0, args.test_episodes, test)
    per_epoch = len(posts["train"]) // args.trajectories_per_update  # iterations until all posts have been prompts

    for iteration in range(run.start, args.iterations):
        start = time.perf_counter()
        # every random number follows from the seed and the iteration: a resumed run goes on as if it had not stopped
        epoch, place = divmod(iteration, per_epoch)
        order = np.random.default_rng([args.seed, ORDER, epoch]).permutation(len(posts["train"]))
        chosen = order[place * args.trajectories_per_update : (place + 1) * args.trajectories_per_update]
        rng = np.random.default_rng([args.seed, SAMPLES, iteration])
        uniforms = torch.from_numpy(rng.random((args.trajectories_per_update, args.response_length)))

        # write
        prompts, references = encode([posts["train"][i] for i in chosen], tokenizer, args)
        batch, stats = rollout(agent, reward, tokenizer, prompts, uniforms, args, accelerator)

        # learn
        learning = time.perf_counter()
        real = batch["tokens"][:, -args.response_length :] != PAD
        raw_advantages, returns = advantages_and_returns(batch, args)
        advantages = whiten(raw_advantages, real) if args.norm_adv else raw_advantages
        batch |= {"advantages": advantages, "returns": returns, "references": references.to(run.device)}
        stats |= update(agent, optimizer, accelerator, args, batch, iteration)
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
        if args.eval_every and done % args.eval_every == 0:
            run.evaluate("eval", done, args.eval_episodes, validation)
        if done % args.checkpoint_interval == 0 or stopping or done == args.iterations:
            run.save(done, trained, optimizer)
        if stopping and done < args.iterations:
            run.exit_stopped(done)
    after = run.evaluate("test", args.iterations, args.test_episodes, test)
    run.finish(after, trained, optimizer, agent, tokenizer)


# === Operations: nothing below changes what is learned ================================================================

# Specific to this task: what decides a run's numbers, what may be Hub ids, evaluation, loading, saving, checks
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "rouge-score", "numpy")
SOURCES = ("policy", "tokenizer", "reward_base", "reward_adapter", "dataset")


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


@torch.no_grad()
def reference_perplexity(agent: Agent, prompts: torch.Tensor, references: torch.Tensor, args: Args) -> float:
    """exp of the policy's mean next-token loss on the tokens of the reference summaries, after their prompts."""
    tokens = torch.cat([prompts, references], dim=1).to(agent.heads["value"].weight.device)
    parts = [agent(part, prompts.shape[1], 1.0)[0] for part in tokens.split(args.reward_batch_size)]
    return math.exp(-torch.cat(parts).mean().item())


def evaluate(agent, reward, tokenizer, posts, args, accelerator) -> tuple[dict[str, float], list[dict]]:
    """Summarises the posts greedily and scores the summaries.

    Returns score, its standard error, KL, lengths and shares, the policy's perplexity on the reference summaries, ROUGE
    F-measures against them (stemmed, means); and every sample, with the whole post.
    """
    prompts, references = encode(posts, tokenizer, args)
    greedy, size = replace(args, top_k=1), args.trajectories_per_update
    parts = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        uniforms = torch.zeros(len(rows), args.response_length, dtype=torch.float64)  # whatever: one token has all the mass
        parts.append(rollout(agent, reward, tokenizer, rows, uniforms, greedy, accelerator)[0])
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stats = describe(batch, tokenizer.eos_token_id, args)
    scores = batch["scores"]
    result = {"score": stats.pop("scores"), "score_stderr": scores.std().item() / math.sqrt(len(scores)), **stats}
    result["perplexity"] = reference_perplexity(agent, prompts, references, args)
    responses = [text.strip() for text in decode(batch["tokens"][:, -args.response_length :], tokenizer)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    samples = []
    for prompt, response, post, value in zip(decode(prompts, tokenizer), responses, posts, scores.tolist(), strict=True):
        whole, reference = post[0].split(ENDING)[0].strip(), post[1].strip()
        rouge = {name: found.fmeasure for name, found in scorer.score(reference, response).items()}
        texts = {"post": whole, "prompt": prompt, "reference": reference, "response": response}
        samples.append({**texts, "score": value, **rouge})
    result |= {name: float(np.mean([sample[name] for sample in samples])) for name in rouge}
    result["words"] = float(np.mean([len(response.split()) for response in responses]))
    return result, samples


def load_lm(args: Args, name: str, device: torch.device) -> transformers.PreTrainedModel:
    """The causal language model that the argument `name` names, frozen: safetensors, all weights there, no code of its own."""
    source, options = getattr(args, name), {"local_files_only": args.offline, "trust_remote_code": False}
    dtype = getattr(torch, args.dtype)
    try:
        if is_adapter(args, name):
            raise ValueError("an adapter; merge it into its base first, with peft's merge_and_unload")
        config = transformers.AutoConfig.from_pretrained(source, **options)
        for setting, value in config.to_dict().items():
            if "drop" in setting and isinstance(value, float):
                setattr(config, setting, 0.0)  # dropout of the base, also where updates switch LoRA's on
        options |= {"config": config, "dtype": dtype, "use_safetensors": None if args.allow_pickle else True}
        if args.load_in_4bit:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            options["device_map"] = {"": device}
        loader = transformers.AutoModelForCausalLM
        lm, info = loader.from_pretrained(source, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...
        cannot_load(args, name, error, "a Hub id or a folder that can be loaded")
    check_weights(args, name, info)
    lm = lm if args.load_in_4bit else lm.to(device)
    return lm.requires_grad_(False).eval()


def load_reward(args: Args, agent: "Agent", tokenizer, device: torch.device) -> "Agent":
    """The model whose adapter `reward` and head score texts: the agent itself, if both have one base, or another one."""
    same = args.reward_base == args.policy or Path(args.reward_base).resolve() == Path(args.policy).resolve()
    if same:
        model = agent
    else:
        lm = load_lm(args, "reward_base", device)
        wanted = f"a model with {args.reward_max_length} positions or more (--reward-max-length) and {len(tokenizer)} tokens"
        fits = getattr(lm.config, "max_position_embeddings", 0) >= args.reward_max_length
        require(args, "reward_base", fits and lm.config.vocab_size >= len(tokenizer), wanted)
        model = Agent(lm, writes=False).to(device)
        check_lm(args, "reward_base", lm, lambda *tokens, **cache: model.backbone(*tokens, None, **cache))
    try:
        config = LoraConfig.from_pretrained(args.reward_adapter, local_files_only=args.offline)
        options = {"local_files_only": args.offline, "_raise_exceptions_for_missing_entries": False}
        if not args.allow_pickle and not cached_file(args.reward_adapter, "adapter_model.safetensors", **options):
            raise ValueError("no adapter_model.safetensors")
        weights = load_peft_weights(args.reward_adapter, device="cpu")
        head = {name.rsplit(".", 1)[1]: weights.pop(name) for name in list(weights) if "score." in name}
        # peft would look for the head in a model that has none; here it is one of the agent's
        config.modules_to_save = config.task_type = config.base_model_name_or_path = None
        model.add("reward", config, head=True)
        if "bias" in head:
            model.heads["reward"].bias = nn.Parameter(torch.zeros(1))
        model.heads["reward"].load_state_dict(head)
        unexpected = set_peft_model_state_dict(model.lm, weights, adapter_name="reward").unexpected_keys
        own = get_peft_model_state_dict(model.lm, adapter_name="reward").keys()
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError, SafetensorError, ...
        cannot_load(args, "reward_adapter", error, "a LoRA adapter in peft's format with weights of a head `score`")
    fits = not unexpected and own == weights.keys()
    require(args, "reward_adapter", fits, f"an adapter of --reward-base {args.reward_base}; their layers differ")
    return model


def load_models(args: Args, device: torch.device):
    """The tokenizer, the agent with new adapters `policy` and `value`, and the agent that scores, which may be the same."""
    try:
        options = {"local_files_only": args.offline, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer, **options)
    except Exception as error:
        cannot_load(args, "tokenizer", error, "a Hub id or a folder that can be loaded")
    lm = load_lm(args, "policy", device)
    context = getattr(lm.config, "max_position_embeddings", None)
    require(args, "policy", context, "a model with a number of positions")
    fits = args.max_prompt_length + args.response_length <= context
    require(
        args, "max_prompt_length", fits, f"{context - args.response_length} or less, the policy's context - response_length"
    )
    require(args, "reward_max_length", args.reward_max_length <= context, f"{context}, the policy's context, or less")
    vocabulary = lm.config.vocab_size
    matches = tokenizer.eos_token_id is not None and len(tokenizer) <= vocabulary and tokenizer(ENDING).input_ids
    require(args, "tokenizer", matches, f"one with an EOS token, and tokens at all, at most the policy's {vocabulary}")
    ending = len(tokenize_behind(tokenizer, "a post", "\n" + ENDING)[1])
    require(args, "max_prompt_length", args.max_prompt_length > ending, f"more than the {ending} tokens of the ending {ENDING}")
    require(args, "top_k", args.top_k <= vocabulary, f"the policy's vocabulary, {vocabulary}, or less")
    agent = Agent(lm)
    check_lm(args, "policy", lm, lambda *tokens, **cache: agent.backbone(*tokens, None, **cache))
    torch.manual_seed(args.seed)  # the adapters' first weights
    transposed = lm.config.model_type == "gpt2"  # its layers hold their weights so
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(lm.config.model_type, "all-linear")
    targets = args.lora_target_modules.split(",") if args.lora_target_modules else known
    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "target_modules": targets}
    try:
        for name in ("policy", "value"):
            agent.add(name, LoraConfig(**lora, fan_in_fan_out=transposed), head=name == "value")
    except ValueError as error:  # peft's
        require(args, "lora_target_modules", False, f"layers of the policy ({str(error).splitlines()[0][:160]})")
    if args.gradient_checkpointing:
        agent.lm.activation_checkpointing_enable({"use_reentrant": False})
    reward = load_reward(args, agent, tokenizer, device)
    return tokenizer, agent.to(device).eval(), reward.to(device).eval()


def load_texts(args: Args) -> dict[str, list[tuple[str, str]]]:
    """Pairs of prompt and reference summary by split: train, validation and test."""
    try:
        if Path(args.dataset).is_file():
            whole = read_json_lines(args.dataset)
            order = np.random.default_rng([args.seed, SPLIT]).permutation(len(whole))
            cuts = np.split(order, [len(whole) * 8 // 10, len(whole) * 9 // 10])
            splits = {name: whole.select(rows) for name, rows in zip(("train", "validation", "test"), cuts, strict=True)}
        else:
            splits = dict(datasets.load_dataset(args.dataset))
        if "valid" in splits:
            splits["validation"] = splits.pop("valid")
        columns = {name: split.column_names for name, split in splits.items()}
        whole = {
            name: {column: split[column][:] for column in ("prompt", "label") if column in columns[name]}
            for name, split in splits.items()
        }
    except Exception as error:  # datasets names no common type
        error = error.__cause__ or error  # what it was while "generating the dataset"
        cannot_load(args, "dataset", error, "a Hub id, a folder or a file of JSON lines that can be loaded")
    posts = {}
    wanted = {"train": args.trajectories_per_update, "validation": args.eval_episodes, "test": args.test_episodes}
    for name, count in wanted.items():
        require(args, "dataset", name in splits, f"the splits train, valid(ation) and test; it has {', '.join(splits)}")
        named = whole[name].keys() == {"prompt", "label"}
        require(args, "dataset", named, f"columns named prompt and label; its columns are {', '.join(columns[name])}")
        posts[name] = list(zip(whole[name]["prompt"], whole[name]["label"], strict=True))
        texts = all(isinstance(text, str) for post in posts[name] for text in post)
        require(args, "dataset", texts, "columns prompt and label that hold texts alone")
        require(args, "dataset", len(posts[name]) >= count, f"{count} posts to {name} or more; it has {len(posts[name])}")
    return posts


def save_samples(run_folder: Path, before: list[dict], after: list[dict]) -> list[list]:
    """samples.json, what followed each prompt before and after training; returns the first 20 as a table with its header."""
    given = ("post", "prompt", "reference")
    samples = [
        {**new, **{f"{name}_before": value for name, value in old.items() if name not in given}}
        for old, new in zip(before, after, strict=True)
    ]
    write_json(run_folder / "samples.json", samples)
    return [list(samples[0]), *(list(sample.values()) for sample in samples[:20])]


def save_adapter(folder: Path, agent: Agent, name: str, base: str, tokenizer) -> None:
    """The adapter `name` as a folder in peft's format; one with a head as what turns `base` into a sequence classifier of one
    label, whose head peft calls `score`."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = copy.deepcopy(agent.lm.peft_config[name])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = "SEQ_CLS" if name in agent.heads else "CAUSAL_LM"
    config.modules_to_save = ["score"] if name in agent.heads else None
    weights = get_peft_model_state_dict(agent.lm, adapter_name=name)
    if name in agent.heads:
        weights |= {f"base_model.model.score.{part}": tensor for part, tensor in agent.heads[name].state_dict().items()}
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}, temporary / "adapter_model.safetensors"
    )
    config.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_model(folder: Path, agent: Agent, tokenizer) -> None:
    """The policy as a folder for from_pretrained, its adapter merged into the base; ends the agent's training."""
    temporary = folder.with_name(folder.name + ".tmp")
    agent.activate("policy")
    agent.lm.merge_and_unload(adapter_names=["policy"]).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_policy(run_folder, agent, tokenizer, args):
    """adapters/ for peft and, unless the base is in 4 bits, model/ for from_pretrained."""
    for name in ("policy", "value"):
        save_adapter(run_folder / "adapters" / name, agent, name, args.policy, tokenizer)
    if not args.load_in_4bit:  # what is in 4 bits has lost what a merged model should have
        save_model(run_folder / "model", agent, tokenizer)


def describe_models(args, run, agent, trained, reward, count):
    """The first line of a run."""
    millions = [sum(p.numel() for p in parameters) / 1e6 for parameters in (agent.parameters(), trained.values())]
    return (
        f"{args.policy}, {millions[0]:.1f}M parameters, {millions[1]:.1f}M trained; "
        f"the reward model {'shares them' if reward is agent else 'has a base of its own'}; {count:,} posts; "
        f"{run.accelerator.num_processes} x {run.device.type}, {torch.get_num_threads()} threads; {run.folder}"
    )


def check_args(args: Args) -> None:
    """Refuses values that no run can have, before anything is made or loaded."""
    check_rlhf(args)
    require(args, "test_episodes", args.test_episodes >= 0, "a whole number of 0 or more")
    for name in ("eval_episodes", "test_episodes"):
        check_episodes(args, name)
    for name in ("lora_r", "reward_max_length"):
        require(args, name, getattr(args, name) >= 1, "a whole number of 1 or more")
    require(args, "lora_dropout", 0 <= args.lora_dropout < 1, "a number from 0 to below 1")
    require(args, "lora_alpha", math.isfinite(args.lora_alpha) and args.lora_alpha > 0, "a finite number above 0")
    require(args, "reward_text", "{text}" in args.reward_text, "a text with {text} in it")
    quantisable = args.cuda and torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    require(args, "load_in_4bit", quantisable or not args.load_in_4bit, "a CUDA GPU and the package bitsandbytes for it")
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
    hint = f"python benchmark/assets/make_rlhf_assets.py {TASK} builds what --offline takes"
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
