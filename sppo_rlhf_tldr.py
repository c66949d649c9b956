"""PPO and SPPO that teach a language model to summarise: RLHF on LoRA adapters with the symmetric RL loss, in one file.

Byun and Perrault, "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(ICML 2025, arXiv:2405.17618). The policy is a causal language model, an action is a token, and the k actions are the whole
vocabulary. Token i has probability pi_i, r = pi_i / pi_old_i, and A is its advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i = -A Z (1 - pi_i) / pi_old_i     where the clip does not cut
    Eq. 9   L      = alpha L_ppo + beta L_rppo                                          Z < 0, -1 in the paper

A prompt is a post and "TL;DR:", and the policy writes a summary. A reward model scores the two, and the last token gets the
score as its reward. Every token costs kl_coef (log pi - log pi_ref).

One frozen base model has four roles. With the adapter `policy` it is the policy. With the adapter `value` and a head it is
the critic. With no adapter it is the reference. With the adapter `reward` and a head it is the reward model; a reward model
with another base is a model of its own. Only the adapters `policy` and `value` and the value head are trained. The algorithm
ends at the line "Operations".

Examples:

    python sppo_rlhf_tldr.py --offline                              # SPPO on small models from benchmark/assets
    python sppo_rlhf_tldr.py --offline --alpha 1 --beta 0           # PPO, the baseline
    python sppo_rlhf_tldr.py                                        # the paper's models and data, from the Hub; one 80 GB GPU
    accelerate launch --num_processes 4 sppo_rlhf_tldr.py           # the same on four GPUs
    python sppo_rlhf_tldr.py --evaluate RUN_FOLDER --prompts FILE   # summaries of a finished run, as JSON lines

How this compares with the paper and its released code:

* The signs of Eq. 8 for A < 0: docs/loss.md, fact 1. `--alpha 0.7 --beta 0` is the control of `--alpha 0.5 --beta 0.2`: both
  have one gradient, fact 2. Policy and value share no trained weight, and AdamW does not see a constant factor of the
  gradient. So the weight alpha + beta |Z| acts only through the norm clip and Adam's eps, and against the other losses of the
  policy, `reference_nll_coef` and `ent_coef`.
* The base is in bfloat16. The paper's is in 4 bits: `--load-in-4bit`. Adapters, heads and logits are float32.
* The reward model reads the end of a text that is too long, which is the summary. The released one reads the beginning.
* Adapters sit where peft puts them by default: on the projections to queries and values.
* Dropout is off, as there: its code calls eval() before each forward pass, so the configuration's 0.1 has no effect.
  `--lora-dropout 0.1` applies it in updates. The ratio of an update's first step is then not exactly 1.
* EOS is an action like any other. The released code pads with EOS and masks padding, so EOS is never trained, and a summary
  that begins with EOS gets no score.
* Advantages are whitened over all real tokens of the rollout. The released code whitens each part of a minibatch, padding
  included. Every token counts the same in every mean.
* Tokens are sampled from the 50 likeliest, as there (it sets no top_k, and its library's default was 50), but log pi is that
  of the whole vocabulary: see the docstring of sppo_rlhf_imdb.py.
* 100 iterations, from the paper's Table 7, which is a picture. The released configuration has 200.
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
#     "pydantic==2.14.4",
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
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal
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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rouge_score.rouge_scorer import RougeScorer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

Probability, Name = Annotated[float, Field(ge=0, le=1)], Annotated[str, Field(min_length=1)]


@pydantic.with_config(allow_inf_nan=False, use_attribute_docstrings=True)
@dataclass
class Args:
    """PPO and SPPO on summaries. The defaults are the paper's SPPO; `--alpha 1 --beta 0` is PPO."""

    # symmetric loss
    alpha: NonNegativeFloat = 0.5
    """weight of the PPO loss (Eq. 9)"""
    beta: NonNegativeFloat = 0.2
    """weight of the reverse loss (Eq. 9)"""
    Z: Annotated[float, Field(lt=0)] = -1.0
    """the constant that stands for log 0 in the reverse loss (Eq. 8)"""
    literal_signs: bool = False
    """use the sign that Eq. 8 prints for A < 0; its gradient opposes PPO's"""

    # models and data
    offline: bool = False
    """small models and posts from assets/, made by benchmark/assets/make_rlhf_assets.py, with defaults for a CPU"""
    policy: str = "CarperAI/openai_summarize_tldr_sft"
    """causal language model, the base of policy and values, and the reference: Hub id or folder"""
    tokenizer: str = "EleutherAI/gpt-j-6B"
    """tokenizer of the policy and of the reward model: Hub id or folder; no BOS is put before a prompt"""
    reward_base: str = "EleutherAI/gpt-j-6B"
    """causal language model to which the reward adapter belongs: Hub id or folder; not loaded twice if it is the policy"""
    reward_adapter: str = "jdchang/tldr_rm_adapter"
    """LoRA adapter in peft's format with a head `score`, for reward_base: Hub id or folder"""
    reward_model: Name | None = None
    """a whole reward model, in place of reward_base and reward_adapter: a sequence classifier of one label, Hub id or folder"""
    reward_text: str = "<|startoftext|>{text}<|endoftext|>"
    """what the reward model reads; {text} is prompt and summary"""
    reward_max_length: PositiveInt = 550
    """maximum number of tokens of reward_text; the end of longer texts is kept"""
    dataset: str = "CarperAI/openai_summarize_tldr"
    """posts, with columns `prompt` and `label` or `completion` (the summary): Hub id or folder with splits train, valid(ation)
    and test, or a file of JSON lines, which is split 80 : 10 : 10"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """type of the base models' weights (float16 would round the value adapter's small gradients to 0)"""
    load_in_4bit: bool = False
    """quantise the base models, but not reward_model, to 4 bits (NF4); needs a CUDA GPU and the package bitsandbytes"""
    allow_pickle: bool = False
    """load pickled weights (.bin) where a repository has no safetensors, by torch.load with weights_only"""

    # algorithm
    iterations: PositiveInt = 100
    """rollouts, each followed by one update; the paper's table has 100, its released configuration 200"""
    trajectories_per_update: PositiveInt = 64
    """prompts of a rollout, one summary each, over all processes"""
    max_prompt_length: PositiveInt = 500
    """maximum number of tokens of a prompt: the beginning of the post, then "\\nTL;DR:" """
    response_length: PositiveInt = 50
    """maximum number of new tokens"""
    min_response_length: NonNegativeInt = 0
    """EOS is not sampled before this many new tokens; if it equals response_length, EOS is never sampled"""
    temperature: PositiveFloat = 1.0
    """temperature of sampling, and of log pi everywhere; evaluations are greedy"""
    top_k: NonNegativeInt = 50
    """sample from this many of the likeliest tokens; 0: from all. The released code sets none; its library's default is 50"""
    gamma: Probability = 1.0
    """discount factor per token"""
    gae_lambda: Probability = 0.95
    """lambda of generalised advantage estimation"""
    kl_coef: NonNegativeFloat = 0.002
    """weight of log pi - log pi_ref in a token's reward"""
    learning_rate: PositiveFloat = 5e-6
    """learning rate of AdamW, constant"""
    weight_decay: NonNegativeFloat = 0.01
    """weight decay of AdamW"""
    update_epochs: PositiveInt = 4
    """passes over each rollout"""
    minibatch_size: PositiveInt = 16
    """trajectories per gradient step, over all processes; divides trajectories_per_update"""
    gradient_accumulation: PositiveInt = 4
    """number of micro-batches into which a process splits its minibatch, to save memory"""
    gradient_checkpointing: bool = True
    """recompute each layer's activations in the backward pass: less memory, 1.5 times the time"""
    norm_adv: bool = True
    """whiten the advantages over all tokens of a rollout"""
    clip_coef: PositiveFloat = 0.2
    """eps of PPO: the ratio's clip range is [1 - eps, 1 + eps]"""
    clip_coef_value: PositiveFloat = 0.2
    """clip range of the value: a value that has moved further towards its return has no gradient"""
    vf_coef: NonNegativeFloat = 0.1
    """weight of the value loss (half a mean squared error)"""
    ent_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus, over the whole vocabulary"""
    max_grad_norm: PositiveFloat = 1.0
    """maximum norm of the gradient of both adapters and the value head"""
    reference_nll_coef: NonNegativeFloat = 0.1
    """weight of the next-token loss on the reference summary, from the released code; 0 saves a third of an update"""
    lora_r: PositiveInt = 8
    """rank of the policy's and the value's adapter"""
    lora_alpha: PositiveFloat = 64.0
    """the adapters' output is multiplied by lora_alpha / lora_r"""
    lora_target_modules: str | None = None
    """layers that get adapters, names separated by commas; default: peft's for the family, or else all linear layers"""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout of the adapters' inputs in updates. The paper's configuration says 0.1, but its code switches dropout off"""

    # evaluation
    eval_episodes: NonNegativeInt = 100
    """validation posts that are summarised and scored every eval_interval iterations; 0: none"""
    eval_interval: NonNegativeInt = 10
    """evaluate on validation posts every this many iterations; 0: never"""
    test_episodes: NonNegativeInt = 500
    """test posts that are summarised and scored before and after training; 0: none"""

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
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")] = "sppo_rlhf_tldr"
    """name of the experiment, part of the run folder's name"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """seed of everything random, the adapters' first weights and the split of a single file included"""
    run_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: Name | None = None
    """continue the run in this folder with its own arguments"""
    evaluate: Name | None = None
    """print what the policy of the run in this folder writes, as JSON lines, and exit"""
    prompts: Name | None = None
    """with --evaluate: summarise these posts, one a line (.jsonl: the column `prompt`); default: the test posts"""
    checkpoint_interval: PositiveInt = 10
    """save a checkpoint every this many iterations"""
    save_model: bool = False
    """write adapters/ for peft, and, unless in 4 bits, model/ for from_pretrained: the policy merged, rounded to dtype; with
    --evaluate: those of the checkpoint"""
    cuda: bool = True
    """use a GPU if there is one"""
    reward_batch_size: PositiveInt = 16
    """texts that the reward model scores at a time"""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch; 0: all cores"""


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
    eval_interval=0,
    test_episodes=64,
)
TASK = "tldr"  # in the names of assets and run folders
EPISODES = "test_episodes"  # the argument for the number of texts that are scored before and after training
# Generators beside torch's own, so that none disturbs another: each is seeded with [seed, its number, ...]
SPLIT, ORDER, SAMPLES, MINIBATCHES, DROPOUT = 1, 2, 3, 4, 5
PAD = -1  # fills batches of token ids: no vocabulary has it, so it is never taken for EOS, nor sampled
ENDING = "TL;DR:"  # of every prompt


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


def policy_loss(agent, args, share, tokens, old_logprobs, advantages):
    """This part's contribution to the policy's loss in a minibatch, and to its statistics by name.

    The loss is alpha L_ppo + beta L_rppo - ent_coef H, each a mean over all real tokens of the minibatch. Shapes: tokens
    [B, P + R]; old_logprobs, advantages [B, R], 0 where a token is PAD. share: this part's real tokens divided by the
    minibatch's.
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
    """A frozen causal language model with LoRA adapters, one of which is active at a time.

    `policy` is the policy, `value` with its head the critic, `reward` with its head the reward model. Without an adapter the
    model is the reference.
    """

    def __init__(self, lm: transformers.PreTrainedModel, with_lm_head: bool = True):
        super().__init__()
        self.lm = lm  # a PeftModel as soon as it has an adapter
        if with_lm_head:
            head = lm.get_output_embeddings()
            # logits in float32 also where the layers are not: bfloat16 would round a logit of 100 to a multiple of a half
            self.lm_head = head if head.weight.dtype == torch.float32 else copy.deepcopy(head).float()
        self.heads = nn.ModuleDict()
        self.active = None

    def add(self, name: str, config: LoraConfig, head: bool) -> None:
        """Adds an adapter. Its head begins at 0."""
        if isinstance(self.lm, PeftModel):
            self.lm.add_adapter(name, config)
        else:
            self.lm = get_peft_model(self.lm, config, adapter_name=name)
        self.active = ""  # unknown: peft has chosen
        if head:
            width = self.lm.get_output_embeddings().weight.shape[1]
            self.heads[name] = nn.Linear(width, 1, bias=False)  # without bias, as transformers' classifiers have it
            nn.init.zeros_(self.heads[name].weight)

    def activate(self, name: str | None) -> None:
        """Makes the adapter `name` the only active one; None: no adapter.

        With gradient checkpointing the backward pass computes the layers again, with the adapter that is active then: call
        backward before the next change.
        """
        if name == self.active:
            return
        if name is None:
            self.lm.base_model.disable_adapter_layers()
        else:
            self.lm.base_model.enable_adapter_layers()
            self.lm.set_adapter(name, inference_mode=name == "reward")  # also sets which adapters get gradients
        self.active = name

    def backbone(self, tokens: torch.Tensor, real: torch.Tensor, adapter: str | None = "policy", **cache):
        """The model without its vocabulary head. tokens: [B, T]; real: [B, C + T] bool, with C tokens in the cache."""
        self.activate(adapter)
        lm = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        # positions count real tokens, so that padding on the left shifts nothing; PAD becomes token 0, which the mask hides
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens.clamp(min=0), "attention_mask": real.long(), "position_ids": positions}
        return lm.base_model(**inputs, use_cache=bool(cache), **cache)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """[..., d] -> [..., V], in float32."""
        return self.lm_head(hidden.float()).div_(temperature)

    def forward(self, tokens, prompt_length: int, temperature: float, with_entropy: bool = False, adapter="policy"):
        """Log-probabilities and entropies (or None), [N] each, of the N response tokens that are not PAD, row by row.

        tokens: [B, prompt_length + R]. Log-probabilities are those of the whole vocabulary at that temperature. To save
        memory, logits are computed for these N tokens alone, and the log-softmax of cross_entropy is the only array [N, V]
        that is kept.
        """
        responses = tokens[:, prompt_length:]
        real = responses != PAD
        hidden = self.backbone(tokens, tokens != PAD, adapter).last_hidden_state[:, prompt_length - 1 : -1][real]
        logits = self.logits(hidden, temperature)
        logprobs = -F.cross_entropy(logits, responses[real], reduction="none")
        entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None
        return logprobs, entropies

    def values(self, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """[N]: the values of the states before these tokens."""
        real = tokens[:, prompt_length:] != PAD
        hidden = self.backbone(tokens, tokens != PAD, "value").last_hidden_state[:, prompt_length - 1 : -1][real]
        return self.heads["value"](hidden.float()).squeeze(-1)


def trained_parameters(agent: Agent) -> dict[str, nn.Parameter]:
    """The adapters `policy` and `value` and the value head, by name."""
    parts = ("lora_A.policy.", "lora_B.policy.", "lora_A.value.", "lora_B.value.", "heads.value.")
    return {name: parameter for name, parameter in agent.named_parameters() if any(part in name for part in parts)}


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


def encode(posts: list[tuple[str, str]], tokenizer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, max_prompt_length], PAD on the left, and the summaries [B, response_length], PAD on the right.

    A prompt is the first tokens of the post, up to its own TL;DR: if it has one, and "\\nTL;DR:".
    """
    prompts = torch.full((len(posts), args.max_prompt_length), PAD)
    references = torch.full((len(posts), args.response_length), PAD)
    for row, (post, summary) in enumerate(posts):
        post = post.split(ENDING)[0].strip()
        ids, ending = tokenize_after(tokenizer, post, "\n" + ENDING)
        ids = ids[: args.max_prompt_length - len(ending)] + ending
        prompts[row, args.max_prompt_length - len(ids) :] = torch.tensor(ids)
        _, ids = tokenize_after(tokenizer, f"{post}\n{ENDING}", " " + summary.strip())
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


def whiten(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """x with mean 0 and variance 1 over its entries where `real`; 0 elsewhere."""
    variance, mean = torch.var_mean(x[real], correction=0)
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
            for start in range(0, share, part_size):
                rows = slice(start, start + part_size)
                result[rows][real[rows]] = compute(tokens[rows])
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


def update(agent, optimizer, accelerator, args, batch: dict[str, torch.Tensor], iteration: int) -> dict[str, float]:
    """`update_epochs` passes over the rollout in shuffled minibatches of trajectories; the mean of each statistic.

    batch: the inputs of the three losses after the shares, by name; every process has the whole rollout. Each process
    computes its rows of every minibatch, in `gradient_accumulation` parts. The gradients are summed over parts and
    processes. Each part is weighted by its real tokens, so that the sum does not depend on how the minibatch was split.
    """
    rng = torch.Generator().manual_seed(int(np.random.default_rng([args.seed, MINIBATCHES, iteration]).integers(2**63)))
    seeds = np.random.default_rng([args.seed, DROPOUT, iteration]).integers(2**63, size=accelerator.num_processes)
    torch.manual_seed(int(seeds[accelerator.process_index]))  # LoRA's dropout
    real = (batch["tokens"][:, -args.response_length :] != PAD).sum(-1)
    reference_real = (batch["references"] != PAD).sum(-1)
    trained = trained_parameters(agent)
    parameters = list(trained.values())
    policy_parameters = [parameter for name, parameter in trained.items() if re.search(r"lora_[AB]\.policy\.", name)]
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
                # backward after each loss: the next one needs another adapter, and memory is free again
                part = {name: tensor[rows] for name, tensor in batch.items()}
                loss, stats = policy_loss(agent, args, share, part["tokens"], part["logprobs"], part["advantages"])
                loss.backward()
                if args.reference_nll_coef:
                    loss, more = reference_loss(agent, args, reference_share, part["tokens"], part["references"])
                    loss.backward()
                    stats |= more
                loss, more = value_loss(agent, args, share, part["tokens"], part["values"], part["returns"])
                loss.backward()
                for name, value in (stats | more).items():
                    sums[name] += value
            names, totals = list(sums), torch.stack(list(sums.values()))
            if accelerator.num_processes > 1:
                for tensor in (totals, *(parameter.grad for parameter in parameters)):
                    torch.distributed.all_reduce(tensor)  # in place
            policy_norm = torch.stack([parameter.grad.norm() for parameter in policy_parameters]).norm()
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
        stats["charts/adv_sign_change"] = (raw_advantages.sign() != advantages.sign())[real].float().mean().item()
        stats["charts/learning_rate"] = args.learning_rate
        stats["charts/SPS"] = real.sum().item() / seconds  # a step is a token
        run.log(iteration, stats, seconds)
        done, stopping = iteration + 1, run.stopping()
        if args.eval_interval and done % args.eval_interval == 0 and not stopping:
            run.evaluate("eval", done, args.eval_episodes, validation)
        if done % args.checkpoint_interval == 0 or stopping or done == args.iterations:
            run.save(done, trained, optimizer)
        if stopping:
            run.exit_stopped(done)
    after = run.evaluate("test", args.iterations, args.test_episodes, test)
    run.finish(after, agent, tokenizer)


# === Operations: loading of models and texts, evaluation, run folder, command line ====================================

# Specific to this task: packages that decide the numbers, sources, evaluation, loading, saving, checks
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "rouge-score", "numpy")
SOURCES = ("policy", "tokenizer", "reward_base", "reward_adapter", "reward_model", "dataset")


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
    return (-torch.cat(parts).mean()).double().exp().item()  # inf where math.exp would raise


def summarise(agent, reward, tokenizer, posts, prompts, args, accelerator):
    """Summarises the posts greedily. Returns `rollout`'s batch of them all, and of each its texts and score.

    prompts: [N, P], of these posts.
    """
    greedy, size = replace(args, top_k=1), args.trajectories_per_update
    parts = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        uniforms = torch.zeros(len(rows), args.response_length, dtype=torch.float64)  # any number: one token has all the mass
        parts.append(rollout(agent, reward, tokenizer, rows, uniforms, greedy, accelerator)[0])
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    responses = decode(batch["tokens"][:, -args.response_length :], tokenizer)
    samples = []
    found = zip(posts, decode(prompts, tokenizer), responses, batch["scores"].tolist(), strict=True)
    for (post, reference), prompt, response, value in found:
        texts = {"post": post.split(ENDING)[0].strip(), "prompt": prompt, "reference": reference.strip()}
        samples.append({**texts, "response": response.strip(), "score": value})
    return batch, samples


def evaluate(agent, reward, tokenizer, posts, args, accelerator) -> tuple[dict[str, float], list[dict]]:
    """Summarises the posts greedily and scores the summaries.

    Returns score, its standard error, KL, lengths and shares, the policy's perplexity on the reference summaries, ROUGE
    F-measures against them (stemmed, means); and every sample, with the whole post.
    """
    prompts, references = encode(posts, tokenizer, args)
    batch, samples = summarise(agent, reward, tokenizer, posts, prompts, args, accelerator)
    stats, scores = describe(batch, tokenizer.eos_token_id, args), batch["scores"]
    result = {"score": stats.pop("scores"), "score_stderr": scores.std().item() / math.sqrt(len(scores)), **stats}
    result["perplexity"] = reference_perplexity(agent, prompts, references, args)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for row in samples:
        rouge = scorer.score(row["reference"], row["response"])
        row |= {name: found.fmeasure for name, found in rouge.items()}
    result |= {name: float(np.mean([row[name] for row in samples])) for name in ("rouge1", "rouge2", "rougeL")}
    result["words"] = float(np.mean([len(row["response"].split()) for row in samples]))
    return result, samples


def evaluate_texts(prompts, posts, models, args, accelerator):
    """--evaluate: `evaluate` on the test posts, or the mean score and the summaries of the user's posts."""
    tokenizer, agent, reward = models
    if prompts is None:
        return evaluate(agent, reward, tokenizer, posts["test"][: args.test_episodes], args, accelerator)
    posts = [(post, "") for post in prompts]
    batch, samples = summarise(agent, reward, tokenizer, posts, encode(posts, tokenizer, args)[0], args, accelerator)
    for row in samples:
        del row["reference"]
    return {"score": batch["scores"].mean().item()}, samples


def load_lm(args: Args, name: str, device: torch.device) -> transformers.PreTrainedModel:
    """Loads and freezes what the argument `name` gives: a causal language model, or the whole reward model."""
    source, options = getattr(args, name), {"local_files_only": args.offline, "trust_remote_code": False}
    dtype, whole_reward = getattr(torch, args.dtype), name == "reward_model"
    loader = transformers.AutoModelForSequenceClassification if whole_reward else transformers.AutoModelForCausalLM
    try:
        if is_adapter(args, name):
            merge = "merge it into its base first, with peft's merge_and_unload"
            raise ValueError(f"an adapter; {'give it as --reward-adapter' if whole_reward else merge}")
        config = transformers.AutoConfig.from_pretrained(source, **options)
        for setting, value in config.to_dict().items():
            if "drop" in setting and isinstance(value, float):
                setattr(config, setting, 0.0)  # dropout of the base, also where updates switch LoRA's on
        options |= {"config": config, "dtype": dtype, "use_safetensors": None if args.allow_pickle else True}
        if args.load_in_4bit and not whole_reward:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            options["device_map"] = {"": device}
        lm, info = loader.from_pretrained(source, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...
        cannot_load(args, name, error, "a Hub id or a folder that can be loaded", loader)
    check_weights(args, name, info)
    lm = lm.to(device) if "device_map" not in options else lm
    return lm.requires_grad_(False).eval()


def use_own_head(args: Args, model: "Agent", tokenizer) -> None:
    """Makes the head of a whole reward model the head `reward`. Refuses a model that padding on the left would change."""
    lm, reason = model.lm, ""
    head = getattr(lm, "score", None)
    one_label = isinstance(head, nn.Linear) and head.out_features == 1
    require(args, "reward_model", one_label, "a causal model with a head `score` of one label, which is its reward")
    # transformers' classifiers score the last token that is not padding; if EOS is the padding, that is the token before EOS
    last = tokenizer(args.reward_text.replace("{text}", ENDING), add_special_tokens=False).input_ids[-1]
    padding = lm.config.get_text_config().pad_token_id
    wanted = "one that does not end in the reward model's padding token, which it never reads"
    require(args, "reward_text", last != padding, wanted)
    model.heads["reward"], model.active = head.float(), "reward"
    short, long = (torch.arange(length, device=lm.device) * 7919 % lm.config.vocab_size for length in (5, 9))
    batch = torch.stack([F.pad(short, (4, 0), value=PAD), long])
    try:
        with torch.no_grad():
            alone = torch.cat([lm.base_model(ids[None]).last_hidden_state[:, -1] for ids in (short, long)]).float()
            padded = model.backbone(batch, batch != PAD, "reward").last_hidden_state[:, -1].float()
        if not (padded - alone).norm() <= alone.norm() * (0.02 if lm.dtype == torch.float32 else 0.05):  # room for rounding
            reason = "padding on the left changes its numbers"
    except Exception as error:  # arguments that it does not take, shapes, ...
        reason = one_line(error)
    require(args, "reward_model", not reason, f"a causal model that takes padding and positions ({reason})")


def load_reward(args: Args, agent: "Agent", tokenizer, device: torch.device) -> "Agent":
    """The model whose head `reward` scores texts: the agent itself with an adapter, if both have one base, or another one."""
    name = "reward_model" if args.reward_model else "reward_base"
    source = getattr(args, name)
    if name == "reward_base" and (source == args.policy or Path(source).resolve() == Path(args.policy).resolve()):
        context = agent.lm.config.max_position_embeddings
        require(args, "reward_max_length", args.reward_max_length <= context, f"{context}, the policy's context, or less")
        model = agent
    else:
        lm = load_lm(args, name, device)
        wanted = f"a model with {args.reward_max_length} positions or more (--reward-max-length) and {len(tokenizer)} tokens"
        fits = getattr(lm.config, "max_position_embeddings", 0) >= args.reward_max_length
        require(args, name, fits and lm.config.vocab_size >= len(tokenizer), wanted)
        model = Agent(lm, with_lm_head=False).to(device)
        if args.reward_model:
            use_own_head(args, model, tokenizer)
            return model
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
    vocabulary = lm.config.vocab_size
    matches = tokenizer.eos_token_id is not None and len(tokenizer) <= vocabulary and tokenizer(ENDING).input_ids
    require(args, "tokenizer", matches, f"one with an EOS token, and tokens at all, at most the policy's {vocabulary}")
    ending = len(tokenize_after(tokenizer, "a post", "\n" + ENDING)[1])
    require(args, "max_prompt_length", args.max_prompt_length > ending, f"more than the {ending} tokens of the ending {ENDING}")
    require(args, "top_k", args.top_k <= vocabulary, f"the policy's vocabulary, {vocabulary}, or less")
    agent = Agent(lm)
    check_lm(args, "policy", lm, lambda *tokens, **cache: agent.backbone(*tokens, None, **cache))
    torch.manual_seed(args.seed)  # the adapters' first weights
    transposed = lm.config.model_type == "gpt2"  # its layers hold their weights so
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(lm.config.model_type, "all-linear")
    check_targets(args, lm)
    targets = args.lora_target_modules.split(",") if args.lora_target_modules else known
    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "target_modules": targets}
    try:
        for name in ("policy", "value"):
            agent.add(name, LoraConfig(**lora, fan_in_fan_out=transposed), head=name == "value")
    except ValueError as error:  # peft's
        require(args, "lora_target_modules", False, f"layers of the policy ({one_line(error)})")
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
        for name, split in splits.items():
            if "completion" in split.column_names and "label" not in split.column_names:  # as trl-lib/tldr names it
                splits[name] = split.rename_column("completion", "label")
        columns = {name: split.column_names for name, split in splits.items()}
        whole = {
            name: {column: split[column][:] for column in ("prompt", "label") if column in columns[name]}
            for name, split in splits.items()
        }
    except Exception as error:  # datasets names no common type
        error = unreadable_file(args.dataset) or error.__cause__ or error  # what it was while "generating the dataset"
        cannot_load(args, "dataset", error, "a Hub id, a folder or a file of JSON lines that can be loaded")
    posts = {}
    wanted = {"train": args.trajectories_per_update, "validation": args.eval_episodes, "test": args.test_episodes}
    for name, count in wanted.items():
        require(args, "dataset", name in splits, f"the splits train, valid(ation) and test; it has {', '.join(splits)}")
        named = whole[name].keys() == {"prompt", "label"}
        require(args, "dataset", named, f"columns prompt and label (or completion); its columns are {', '.join(columns[name])}")
        posts[name] = list(zip(whole[name]["prompt"], whole[name]["label"], strict=True))
        texts = all(isinstance(text, str) for post in posts[name] for text in post)
        require(args, "dataset", texts, "columns prompt and label that hold texts alone")
        require(
            args, "dataset", len(posts[name]) >= count, f"at least {count} posts in the split {name}; it has {len(posts[name])}"
        )
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
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    agent.activate("policy")
    agent.lm.merge_and_unload(adapter_names=["policy"]).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_policy(run_folder, agent, tokenizer, args):
    """adapters/ for peft and, unless the base is in 4 bits, model/ for from_pretrained."""
    for name in ("policy", "value"):
        save_adapter(run_folder / "adapters" / name, agent, name, args.policy, tokenizer)
    if not args.load_in_4bit:  # 4-bit weights are too coarse to merge into
        save_model(run_folder / "model", agent, tokenizer)


def describe_models(args, run, agent, trained, reward, count):
    """A run's first line."""
    millions = [sum(p.numel() for p in parameters) / 1e6 for parameters in (agent.parameters(), trained.values())]
    return (
        f"{args.policy}, {millions[0]:.1f}M parameters, {millions[1]:.1f}M trained; "
        f"the reward model {'shares them' if reward is agent else 'has a base of its own'}; {count:,} posts; "
        f"{run.accelerator.num_processes} x {run.device.type}, {torch.get_num_threads()} threads; {run.folder}"
    )


def check_task(args):
    """Refuses combinations of arguments that this script cannot learn with."""
    require(args, "reward_text", "{text}" in args.reward_text, "a text with {text} in it")
    quantisable = args.cuda and torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    require(args, "load_in_4bit", quantisable or not args.load_in_4bit, "a CUDA GPU and the package bitsandbytes for it")


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
