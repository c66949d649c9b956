"""SPPO, PPO with the symmetric RL loss, teaches a language model to summarise: RLHF on LoRA adapters.

Paper: https://arxiv.org/abs/2405.17618, Byun and Perrault, ICML 2025. The policy is a causal language model; an action is a
token. Token i has probability pi_i; r = pi_i / pi_old_i; A is the advantage:

    Eq. 3   L_ppo  = -min(A r, A clip(r, 1 - eps, 1 + eps))
    Eq. 8   L_rppo = -A Z sum_{j != i} pi_j / pi_old_i      where A r <= A clip(r), else 0; Z < 0, -1 in the paper
    Eq. 9   L      = alpha L_ppo + beta L_rppo

    python sppo_rlhf_tldr.py --offline                              # SPPO on small models from benchmark/assets
    python sppo_rlhf_tldr.py --offline --alpha 1 --beta 0           # PPO; --alpha 0.7 --beta 0 is the control, SPPO's gradient
    accelerate launch --num_processes 4 sppo_rlhf_tldr.py           # the paper's models and data; plain python on one 80 GB GPU
    python sppo_rlhf_tldr.py --evaluate RUN_FOLDER --prompts FILE   # summaries of a finished run, as JSON lines

The policy reads a post and "TL;DR:" and writes a summary. A reward model scores both; the last token gets the score, and every
token costs kl_coef (log pi - log pi_ref). docs/differences.md: what differs from the released code. The algorithm ends at the
line "Operations".
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "accelerate==1.15.0", "peft==0.21.2", "rouge-score==0.1.2",
#     "safetensors==0.8.0", "huggingface_hub==2.4.0", "numpy==2.4.6", "tyro==1.0.17", "pydantic==2.14.4",
#     "filelock==4.2.12", "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///

import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

try:
    import datasets
    import filelock
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
    from peft.tuners.lora import LoraLayer
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
    from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
    from pydantic.dataclasses import dataclass
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
    from safetensors.torch import save_file
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
    from transformers.utils.peft_utils import find_adapter_config_file
except ModuleNotFoundError as error:
    sys.exit(f"{error}; the RLHF scripts need what `pip install -r requirements.txt` installs")

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(config={"allow_inf_nan": False})
class Args:
    """PPO and SPPO on summaries. The defaults are the paper's SPPO; `--alpha 1 --beta 0` is PPO."""

    # symmetric loss
    alpha: NonNegativeFloat = 0.5  # weight of the PPO loss (Eq. 9)
    beta: NonNegativeFloat = 0.2  # weight of the reverse loss (Eq. 9)
    Z: Annotated[float, Field(lt=0)] = -1.0  # the constant that stands for log 0 in the reverse loss (Eq. 8)
    literal_signs: bool = False  # use the sign that Eq. 8 prints for A < 0; its gradient opposes PPO's

    # models and data: each is a Hub id or a folder
    offline: bool = False  # small models and posts from assets/, made by make_rlhf_assets.py, with defaults for a CPU
    policy: str = "CarperAI/openai_summarize_tldr_sft"  # causal language model; without adapters it is the reference
    tokenizer: str = "EleutherAI/gpt-j-6B"  # tokenizer of the policy and of the reward model; no BOS is put before a prompt
    reward_base: str = "EleutherAI/gpt-j-6B"  # causal language model of the reward adapter; loaded once if it is the policy
    reward_adapter: str = "jdchang/tldr_rm_adapter"  # LoRA adapter of reward_base in peft's format, with a head `score`
    reward_model: str | None = None  # in place of base and adapter: a whole sequence classifier of one label
    reward_text: Annotated[str, Field(pattern=r"\{text\}")] = "<|startoftext|>{text}<|endoftext|>"  # its input for one text
    reward_max_length: PositiveInt = 550  # maximum number of tokens of reward_text; the end of longer texts is kept
    dataset: str = "CarperAI/openai_summarize_tldr"  # with columns prompt, label; or a JSON lines file, split 80 : 10 : 10
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the base models (float16 rounds the value's small gradients to 0)
    load_in_4bit: bool = False  # quantise the base models, but not reward_model, to 4 bits (NF4): bitsandbytes and a GPU
    allow_pickle: bool = False  # load pickled weights (.bin) where there are no safetensors, by torch.load with weights_only

    # algorithm
    iterations: PositiveInt = 100  # rollouts, each with one update; the paper's table has 100, its configuration 200
    trajectories_per_update: PositiveInt = 64  # prompts of a rollout, one summary each, over all processes
    max_prompt_length: PositiveInt = 500  # maximum number of tokens of a prompt: the beginning of the post, then "\nTL;DR:"
    response_length: PositiveInt = 50  # maximum number of new tokens
    min_response_length: NonNegativeInt = 0  # EOS may come after this many tokens of a response; response_length: never
    temperature: PositiveFloat = 1.0  # temperature of sampling, log pi and log pi_ref; evaluations are greedy
    top_k: NonNegativeInt = 50  # sample from this many of the likeliest tokens, the released code's default; 0: from all
    gamma: Probability = 1.0  # discount factor per token
    gae_lambda: Probability = 0.95  # lambda of generalised advantage estimation
    kl_coef: NonNegativeFloat = 0.002  # a token's reward has -kl_coef (log pi - log pi_ref)
    learning_rate: PositiveFloat = 5e-6  # learning rate of AdamW, constant
    weight_decay: NonNegativeFloat = 0.01  # weight decay of AdamW
    update_epochs: PositiveInt = 4  # passes over each rollout
    minibatch_size: PositiveInt = 4  # trajectories per gradient step, over all processes; divides trajectories_per_update
    gradient_accumulation: PositiveInt = 1  # parts into which a process splits its minibatch, to save memory
    gradient_checkpointing: bool = True  # recompute activations in the backward pass, unless a GPU has the memory to keep them
    norm_adv: bool = True  # whiten the advantages over all tokens of a rollout
    clip_coef: PositiveFloat = 0.2  # eps of PPO: the ratio's clip range is [1 - eps, 1 + eps]
    clip_coef_value: PositiveFloat = 0.2  # a value that has moved further than this towards its return has no gradient
    vf_coef: NonNegativeFloat = 0.1  # weight of the value loss (half a mean squared error)
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus, over the whole vocabulary
    max_grad_norm: PositiveFloat = 1.0  # maximum norm of the gradient of both adapters and the value head
    reference_nll_coef: NonNegativeFloat = 0.1  # weight of the reference's next-token loss
    lora_r: PositiveInt = 8  # rank of the policy's and the value's adapter
    lora_alpha: PositiveFloat = 64.0  # the adapters' output is multiplied by lora_alpha / lora_r
    lora_target_modules: str | None = None  # layers with adapters, separated by commas; default: peft's, or all linear ones
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the adapters in updates; the released code switches it off

    # evaluation, logging, machine
    eval_episodes: NonNegativeInt = 100  # validation posts that an evaluation summarises and scores
    eval_interval: NonNegativeInt = 10  # evaluate on validation posts every this many iterations; 0: never
    test_episodes: NonNegativeInt = 500  # test posts that are summarised and scored before and after training; 0: none
    track: bool = False  # log to Weights & Biases; WANDB_MODE=offline, WANDB_RUN_GROUP, WANDB_TAGS and WANDB_DIR work
    wandb_project_name: str | None = None  # project in W&B; by default WANDB_PROJECT
    wandb_entity: str | None = None  # user or team in W&B; by default WANDB_ENTITY
    exp_name: Annotated[str, Field(pattern=r"^[\w.+-]{1,100}$")] | None = None  # name in the run folder's; by default the arm
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # seed of everything random, the split of a single file included
    run_dir: str = "runs"  # folder in which the run folder is made
    resume: str | None = None  # continue the run in this folder with its own arguments
    evaluate: str | None = None  # print what the policy of the run in this folder writes, as JSON lines, and exit
    prompts: str | None = None  # with --evaluate: posts, one a line (.jsonl: the column `prompt`); default: the test posts
    checkpoint_interval: PositiveInt = 10  # save a checkpoint every this many iterations
    save_model: bool = False  # write adapters/ for peft and, unless in 4 bits, model/, the policy merged; also with --evaluate
    cuda: bool = True  # use a GPU if there is one
    reward_batch_size: PositiveInt = 16  # texts that the reward model scores at a time
    num_threads: NonNegativeInt = 0  # CPU threads of torch; 0: all cores


OFFLINE = Args(
    offline=True, policy="assets/tldr/policy", tokenizer="assets/tldr/policy", reward_base="assets/tldr/policy",
    reward_adapter="assets/tldr/reward", reward_text="{text}<|endoftext|>", reward_max_length=96, dataset="assets/tldr/posts",
    top_k=0, dtype="float32", iterations=20, trajectories_per_update=16, max_prompt_length=40, response_length=20,
    learning_rate=1e-3, update_epochs=2, minibatch_size=8, gradient_checkpointing=False, eval_episodes=32, eval_interval=0,
    test_episodes=64,
)  # fmt: skip
# One generator a purpose, seeded with [seed, purpose, ...]
SPLIT, ORDER, SAMPLES, MINIBATCHES, DROPOUT = 1, 2, 3, 4, 5
PAD = -1  # fills batches of token ids: no vocabulary has it, so it is never taken for EOS, nor sampled
ENDING = "TL;DR:"  # of every prompt


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


def policy_loss(agent, args, share, reference_share, tokens, old_logprobs, advantages, references):
    """This part's contribution to the policy's loss in a minibatch, and to its statistics by name.

    The loss is alpha L_ppo + beta L_rppo - ent_coef H + reference_nll_coef NLL, each a mean over all real tokens of the
    minibatch. Shapes: tokens [B, P + R]; old_logprobs, advantages [B, R], 0 at PAD; references [B, R]. share,
    reference_share: this part's real tokens divided by the minibatch's, in responses and in references.
    """
    prompt_length = tokens.shape[1] - old_logprobs.shape[1]
    real, rows = tokens[:, prompt_length:] != PAD, [tokens]
    if args.reference_nll_coef:
        rows.append(torch.cat([tokens[:, :prompt_length], references], dim=1))
    hidden, chosen = agent.states(torch.cat(rows), prompt_length, "policy", len(rows))
    n = int(real.sum())
    logprobs, entropies = agent.logprobs(hidden[:n], chosen[:n], args.temperature, args.ent_coef > 0)
    ppo_loss, reverse_loss, stats = symmetric_ppo_loss(
        logprobs, old_logprobs[real], advantages[real], args.clip_coef, args.Z, args.literal_signs
    )
    loss = args.alpha * ppo_loss + args.beta * reverse_loss
    stats = {"policy_loss": ppo_loss, "reverse_loss": reverse_loss, **stats}
    if args.ent_coef:
        stats["entropy"] = entropies.mean()
        loss = loss - args.ent_coef * stats["entropy"]
    stats, loss = {f"losses/{name}": share * value.detach() for name, value in stats.items()}, share * loss
    if args.reference_nll_coef:
        nll = -reference_share * agent.logprobs(hidden[n:], chosen[n:], 1.0)[0].mean()
        stats["losses/reference_nll"], loss = nll.detach(), loss + args.reference_nll_coef * nll
    return loss, stats


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


def trim(tokens: torch.Tensor, prompt_length: int) -> tuple[torch.Tensor, int]:
    """Tokens [B, T] without the columns that are PAD in all rows, and the prompts' length among the rest."""
    kept = (tokens != PAD).any(dim=0)
    return tokens[:, kept], int(kept[:prompt_length].sum())


class Agent(nn.Module):
    """A frozen causal language model with LoRA adapters, one of which is active at a time.

    `policy` writes, `value` with its head is the critic, `reward` with its head scores. With none the model is the reference.
    """

    def __init__(self, lm: transformers.PreTrainedModel, with_lm_head: bool = True):
        super().__init__()
        self.lm = lm  # a PeftModel as soon as it has an adapter
        if with_lm_head:
            head = lm.get_output_embeddings()
            # logits in float32 also where the layers are not: bfloat16 would round a logit of 100 to a multiple of a half
            self.lm_head = head if head.weight.dtype == torch.float32 else copy.deepcopy(head).float()
        self.heads = nn.ModuleDict()
        self.active, self.shares_prompts = None, False

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

    def set_updating(self, updating: bool) -> None:
        """Switches the adapters' dropout, and checkpointing, which transformers ties to train mode. The base has no dropout."""
        for name, module in self.lm.named_modules():
            if "lora_dropout" in name or getattr(module, "gradient_checkpointing", False):
                module.training = updating

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

    def states(self, tokens: torch.Tensor, prompt_length: int, adapter: str | None, copies: int = 1):
        """The last hidden states [N, d] before the N response tokens that are not PAD, row by row; and these tokens [N].

        tokens: [B, prompt_length + R]. With copies = 2 the second half has the prompts of the first: each passes once.
        """
        tokens, prompt_length = trim(tokens, prompt_length)
        responses, real = tokens[:, prompt_length:], tokens != PAD
        if copies == 1 or not self.shares_prompts:
            hidden = self.backbone(tokens, real, adapter).last_hidden_state[:, prompt_length - 1 : -1]
        else:
            cache, prompts = transformers.DynamicCache(config=self.lm.config), tokens[: len(tokens) // copies, :prompt_length]
            last = self.backbone(prompts, prompts != PAD, adapter, past_key_values=cache).last_hidden_state[:, -1:]
            cache.reorder_cache(torch.arange(len(prompts), device=tokens.device).repeat(copies))
            rest = self.backbone(responses, real, adapter, past_key_values=cache).last_hidden_state[:, :-1]
            hidden = torch.cat([last.repeat(copies, 1, 1), rest], dim=1)
        return hidden[responses != PAD], responses[responses != PAD]

    def logprobs(self, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float, with_entropy: bool = False):
        """Log-probabilities of the tokens [N] at that temperature, among the whole vocabulary; entropies, or None."""
        logits = self.logits(hidden, temperature)
        entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None
        return -F.cross_entropy(logits, tokens, reduction="none"), entropies  # keeps one array [N, V] for backward

    def forward(self, tokens, prompt_length: int, temperature: float, with_entropy: bool = False, adapter="policy"):
        """Log-probabilities and entropies (or None), [N] each, of the N response tokens that are not PAD, row by row."""
        return self.logprobs(*self.states(tokens, prompt_length, adapter), temperature, with_entropy)

    def values(self, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """[N]: the values of the states before these tokens."""
        return self.heads["value"](self.states(tokens, prompt_length, "value")[0].float()).squeeze(-1)


def trained_parameters(agent: Agent) -> dict[str, nn.Parameter]:
    """The adapters `policy` and `value` and the value head, by name."""
    parts = ("lora_A.policy.", "lora_B.policy.", "lora_A.value.", "lora_B.value.", "heads.value.")
    return {name: parameter for name, parameter in agent.named_parameters() if any(part in name for part in parts)}


def sample(logits: torch.Tensor, uniforms: torch.Tensor, top_k: int) -> torch.Tensor:
    """[B] tokens from the top_k likeliest of logits [B, V] (0: of all), by inverting their distribution at uniforms [B].

    The random numbers are given, so that a trajectory does not depend on how many processes share the batch.
    """
    top, tokens = logits.topk(top_k) if top_k else (logits, None)  # no sorting where all may be drawn
    cumulative = top.double().softmax(-1).cumsum(-1)
    choice = (cumulative < uniforms.unsqueeze(-1) * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)


def end_tokens(lm: transformers.PreTrainedModel, tokenizer) -> list[int]:
    """The ids that end a text: the tokenizer's EOS, and what the model's generation configuration names."""
    named = getattr(lm.generation_config, "eos_token_id", None)
    named = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(token for token in named if token < lm.get_input_embeddings().num_embeddings)


@torch.no_grad()
def generate(agent: Agent, prompts: torch.Tensor, uniforms: torch.Tensor, ends: list[int], args: Args) -> torch.Tensor:
    """Continuations [B, response_length] of prompts [B, P], each with the token that ends it, then PAD.

    uniforms: [B, response_length], one number in [0, 1) for each token. Each step reads the newest token alone: the cache
    holds the keys and values of the others.
    """
    prompts = prompts[:, (prompts != PAD).any(dim=0)]
    responses = torch.full((len(prompts), args.response_length), PAD, device=prompts.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    tokens, real, cache = prompts, prompts != PAD, transformers.DynamicCache(config=agent.lm.config)
    for t in range(args.response_length):
        hidden = agent.backbone(tokens, real, past_key_values=cache).last_hidden_state[:, -1]
        logits = agent.logits(hidden, args.temperature)
        if t < args.min_response_length:
            logits[:, ends] = -torch.inf
        chosen = sample(logits, uniforms[:, t], args.top_k)
        responses[:, t] = torch.where(running, chosen, PAD)
        for end in ends:
            running &= chosen != end
        if t >= args.min_response_length and not running.any():  # asks the GPU, so only where a text may have ended
            break
        tokens = chosen.unsqueeze(-1)
        real = torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    return responses


# --- environment ------------------------------------------------------------------------------------------------------


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. What looks like a special token in it is text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids


def tokenize_after(tokenizer, before: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of `before`, and of `text` after it. Together they are the tokens of the joint text.

    Llama's tokenizer and its like would put a space before `text` alone.
    """
    joint, alone = tokenize(tokenizer, [before + text, before])
    shared = sum(itertools.takewhile(bool, (a == b for a, b in zip(joint, alone, strict=False))))
    return joint[:shared], joint[shared:]


def without_heading(post: str) -> str:
    """The post up to its first TL;DR:, which is the ending. One that the post begins with is kept."""
    post = post.strip()
    return (post[:1] + post[1:].split(ENDING)[0]).strip()


def encode(posts: list[tuple[str, str]], tokenizer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, max_prompt_length], a post's first tokens and its ending, PAD on the left; summaries [B, response_length]."""
    prompts = torch.full((len(posts), args.max_prompt_length), PAD)
    references = torch.full((len(posts), args.response_length), PAD)
    for row, (post, summary) in enumerate(posts):
        post = without_heading(post)
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


def reward_tokens(texts: list[str], tokenizer, args: Args) -> list[list[int]]:
    """Tokens of reward_text with each text in it, the last reward_max_length. Special tokens of reward_text are special."""
    rows = tokenizer([args.reward_text.replace("{text}", text) for text in texts], add_special_tokens=False).input_ids
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for row, text in enumerate(texts):
        if any(token in text for token in special):  # there it is text
            before, after = tokenizer(args.reward_text.split("{text}", 1), add_special_tokens=False).input_ids
            rows[row] = before + tokenize(tokenizer, [text])[0] + after
    return [ids[-args.reward_max_length :] for ids in rows]


def score(texts: list[str], reward: Agent, tokenizer, args: Args) -> torch.Tensor:
    """[B]: the reward head's number at the last token of each text, which padding on the left puts in the last column."""
    scores = []
    for start in range(0, len(texts), args.reward_batch_size):
        ids = reward_tokens(texts[start : start + args.reward_batch_size], tokenizer, args)
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

    prompts: [B, P]; uniforms: [B, R]. Every process works on its share of the rows and gets all back: tokens [B, P + R];
    logprobs, ref_logprobs, values [B, R], 0 at PAD; scores, empty, unfinished (0 or 1) [B]; and the seconds of each phase.
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
    ends = end_tokens(agent.lm, tokenizer)
    responses = generate(agent, prompts, uniforms, ends, args)
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
    order = (tokens != PAD).sum(-1).argsort(stable=True)  # rows of like length together: less padding
    with torch.no_grad():
        for result, compute in passes:
            for rows in order.split(part_size):
                result[rows] = result[rows].masked_scatter(real[rows], compute(tokens[rows]))
    batch = {"tokens": tokens, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores}
    batch["empty"] = torch.tensor([float(not text.strip()) for text in decode(responses, tokenizer)], device=tokens.device)
    batch["unfinished"] = 1.0 - torch.isin(responses, torch.tensor(ends, device=tokens.device)).any(-1).float()
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

    batch: the inputs of the three losses, by name; every process has the whole rollout. Each computes its rows of every
    minibatch, in `gradient_accumulation` parts, weighted by their real tokens, and the gradients are summed: the sum does not
    depend on how the minibatch was split.
    """
    rng = torch.Generator().manual_seed(int(np.random.default_rng([args.seed, MINIBATCHES, iteration]).integers(2**63)))
    seeds = np.random.default_rng([args.seed, DROPOUT, iteration]).integers(2**63, size=accelerator.num_processes)
    torch.manual_seed(int(seeds[accelerator.process_index]))  # LoRA's dropout
    real, lengths = (batch["tokens"][:, -args.response_length :] != PAD).sum(-1), (batch["tokens"] != PAD).sum(-1)
    reference_real = (batch["references"] != PAD).sum(-1)
    trained = trained_parameters(agent)
    parameters = list(trained.values())
    policy_parameters = [parameter for name, parameter in trained.items() if re.search(r"lora_[AB]\.policy\.", name)]
    names, collected = [], []
    agent.set_updating(True)
    for _ in range(args.update_epochs):
        for minibatch in torch.randperm(len(real), generator=rng).to(real.device).split(args.minibatch_size):
            optimizer.zero_grad()
            sums = Counter()
            minibatch = minibatch[lengths[minibatch].argsort(stable=True)]  # parts of rows of like length have less padding
            mine = minibatch[accelerator.process_index :: accelerator.num_processes]
            for rows in mine.split(len(mine) // args.gradient_accumulation):
                share = real[rows].sum() / real[minibatch].sum()
                reference_share = reference_real[rows].sum() / reference_real[minibatch].sum()
                part = {name: tensor[rows] for name, tensor in batch.items()}
                inputs = (part[name] for name in ("tokens", "logprobs", "advantages", "references"))
                loss, stats = policy_loss(agent, args, share, reference_share, *inputs)
                loss.backward()  # before the next loss, which needs another adapter
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
    agent.set_updating(False)
    names += [f"losses/{name}" for name in ("grad_share_policy", "grad_share_value", "grad_norm", "grad_clipped")]
    return dict(zip(names, torch.stack(collected).mean(dim=0).tolist(), strict=True))


def train(args, run, posts, models):
    """Writes, scores and learns `iterations` times. `run` keeps the curves, checkpoints and scores (see Operations)."""
    accelerator, (agent, _, tokenizer) = run.accelerator, models
    trained = trained_parameters(agent)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    if run.checkpoint:
        load_weights(agent, run.checkpoint)
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        run.checkpoint = None  # it takes as much memory as weights and optimiser
    if run.before is None:
        run.before = run.evaluate("test", models, posts["test"])
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
        batch, stats = rollout(*models, prompts, uniforms, args, accelerator)

        # learn
        learning = time.perf_counter()
        real = batch["tokens"][:, -args.response_length :] != PAD
        raw_advantages, returns = advantages_and_returns(batch, args)
        advantages = whiten(raw_advantages, real) if args.norm_adv else raw_advantages
        batch |= {"advantages": advantages, "returns": returns, "references": references.to(run.device)}
        stats |= update(agent, optimizer, accelerator, args, batch, iteration)
        seconds = time.perf_counter() - start

        # log
        stats["time/update"] = time.perf_counter() - learning
        stats |= {f"objective/{name}": value for name, value in describe(batch, args).items()}
        stats["losses/explained_variance"] = (1 - (returns - batch["values"])[real].var() / returns[real].var()).item()
        stats["charts/adv_sign_change"] = (raw_advantages.sign() != advantages.sign())[real].float().mean().item()
        stats["charts/learning_rate"] = args.learning_rate
        stats["charts/SPS"] = real.sum().item() / seconds  # a step is a token
        done = iteration + 1
        run.log(done, stats, seconds)
        stopping = run.stopping()
        if done % args.checkpoint_interval == 0 or stopping or done == args.iterations:
            run.save(trained, optimizer, stopping)  # after a signal the run ends here
        if args.eval_interval and done % args.eval_interval == 0:
            run.evaluate("eval", models, posts["validation"])
    run.finish(run.evaluate("test", models, posts["test"]), agent, tokenizer)


# === Operations: nothing below changes what is learned ================================================================

TASK = "tldr"  # in the names of assets and run folders
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "rouge-score", "numpy")  # decide numbers
SOURCES = ("policy", "tokenizer", "reward_base", "reward_adapter", "reward_model", "dataset")  # Hub ids or paths


class RougeWords(DefaultTokenizer):
    """Words of any alphabet. rouge-score's own tokenizer, which stems them, knows a to z. A Chinese character is a word."""

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.lower())
        return [token for word in words for token in (super(RougeWords, self).tokenize(word) if word.isascii() else [word])]


@torch.no_grad()
def evaluate(agent, reward, tokenizer, posts, args, accelerator) -> tuple[dict[str, float], list[dict]]:
    """Summarises the posts greedily. Returns means (`describe`; without --prompts also ROUGE's F-measures) and the samples."""
    greedy, parts = replace(args, top_k=1), []
    prompts, references = encode(posts, tokenizer, args)
    for rows in prompts.split(args.trajectories_per_update):
        uniforms = torch.zeros(len(rows), args.response_length, dtype=torch.float64)  # any number: one token has all the mass
        parts.append(rollout(agent, reward, tokenizer, rows, uniforms, greedy, accelerator)[0])
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    texts, responses = decode(prompts, tokenizer), decode(batch["tokens"][:, -args.response_length :], tokenizer)
    samples = []
    for (post, reference), prompt, response, value in zip(posts, texts, responses, batch["scores"].tolist(), strict=True):
        sample = {"post": without_heading(post), "prompt": prompt, "reference": reference.strip()}
        samples.append({**sample, "response": response.strip(), "score": value})
    stats, scores = describe(batch, args), batch["scores"]
    result = {"score": stats.pop("scores"), "score_stderr": scores.std().item() / math.sqrt(len(scores)), **stats}
    result["words"] = float(np.mean([len(row["response"].split()) for row in samples]))
    if args.prompts:
        return result, [{name: value for name, value in row.items() if name != "reference"} for row in samples]
    # the policy's perplexity on the reference summaries, after their prompts; and joined, as in the paper's Table 3
    tokens = torch.cat([prompts, references], dim=1).to(accelerator.device)
    logprobs = torch.cat([agent(part, prompts.shape[1], 1.0)[0] for part in tokens.split(args.reward_batch_size)])
    result["perplexity"] = (-logprobs.mean()).double().exp().item()  # inf where math.exp would raise
    joined = "\n\n".join(row["reference"] for row in samples)
    result["perplexity_released"] = perplexity(agent, tokenize(tokenizer, [joined])[0])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeWords(use_stemmer=True))
    for row in samples:
        row |= {name: found.fmeasure for name, found in scorer.score(row["reference"], row["response"]).items()}
    result |= {name: float(np.mean([row[name] for row in samples])) for name in ("rouge1", "rouge2", "rougeL")}
    return result, samples


def load_lm(args: Args, name: str, device: torch.device) -> transformers.PreTrainedModel:
    """Loads and freezes what the argument `name` gives: a causal language model, or the whole reward model."""
    dtype, whole_reward = getattr(torch, args.dtype), name == "reward_model"
    options = {"dtype": dtype}
    if args.load_in_4bit and not whole_reward:
        quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        options |= {"quantization_config": transformers.BitsAndBytesConfig(**quantised), "device_map": {"": device}}
    kind = transformers.AutoModelForSequenceClassification if whole_reward else transformers.AutoModelForCausalLM
    lm = from_pretrained(args, name, kind, **options)
    for part in (lm.config, *lm.modules()):
        for setting in [key for key, value in vars(part).items() if "drop" in key and isinstance(value, float)]:
            setattr(part, setting, 0.0)  # layers with checkpointing are in train mode in updates
    return (lm if "device_map" in options else lm.to(device)).requires_grad_(False).eval()


@torch.no_grad()
def use_own_head(args: Args, model: Agent, tokenizer) -> None:
    """Makes the head of a whole reward model the head `reward`. Refuses a model that padding on the left would change."""
    lm, name, head = model.lm, "reward_model", getattr(model.lm, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise bad(args, name, "expected a causal model with a head `score` of one label, which is its reward")
    if reward_tokens([ENDING], tokenizer, args)[0][-1] == lm.config.get_text_config().pad_token_id:
        # transformers' classifiers score the last token that is not padding
        raise bad(args, "reward_text", "expected one that does not end in the reward model's padding token")
    model.heads["reward"], model.active = head.float(), "reward"
    texts = [torch.arange(n, device=lm.device) * 7919 % lm.config.vocab_size for n in (5, max(9, args.reward_max_length))]
    batch = torch.stack([F.pad(ids, (len(texts[1]) - len(ids), 0), value=PAD) for ids in texts])
    alone = torch.cat([lm.base_model(ids[None]).last_hidden_state[:, -1] for ids in texts]).float()
    padded = model.backbone(batch, batch != PAD, "reward").last_hidden_state[:, -1].float()
    if not (padded - alone).norm() <= alone.norm() * (0.02 if lm.dtype == torch.float32 else 0.05):  # room for rounding
        raise bad(args, name, "padding on the left changes its numbers")


def checksums(lm: nn.Module) -> list[float]:
    return [float(parameter.sum(dtype=torch.float64)) for name, parameter in lm.named_parameters() if "lora_" not in name]


def load_reward(args: Args, agent: Agent, tokenizer, device: torch.device) -> Agent:
    """The model whose head `reward` scores texts: the agent itself with an adapter, if both have one base, or another one."""
    name = "reward_base" if args.reward_model is None else "reward_model"
    source = getattr(args, name)
    if "<|endoftext|>" in args.reward_text and "<|endoftext|>" not in tokenizer.get_vocab():
        raise bad(args, "reward_text", "expected the special tokens of --tokenizer, which has no <|endoftext|>")
    shared = name == "reward_base" and (source == args.policy or Path(source).resolve() == Path(args.policy).resolve())
    model = agent if shared else Agent(load_lm(args, name, device), with_lm_head=False).to(device)
    positions = getattr(model.lm.config, "max_position_embeddings", 0)
    if positions < args.reward_max_length:
        raise bad(args, "reward_max_length", f"expected {positions} or less, the context of {source}")
    if not shared:
        check_tokenizer(args, name, model.lm, tokenizer)
    if name == "reward_model":
        with refusing(args, name):
            use_own_head(args, model, tokenizer)
        return model
    check_lm(args, name, model.lm, partial(model.backbone, adapter=None), args.reward_max_length)
    before = checksums(model.lm)
    with refusing(args, "reward_adapter"):
        config = LoraConfig.from_pretrained(args.reward_adapter)
        safe = transformers.utils.cached_file(
            args.reward_adapter, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=not args.allow_pickle
        )
        # the cached folder: for an id peft would ask the Hub, also where there is none
        weights = load_peft_weights(str(Path(safe).parent) if safe else args.reward_adapter, device="cpu")
        head = {key.rsplit(".", 1)[1]: weights.pop(key) for key in list(weights) if "score." in key}
        # peft would look for the head in a model that has none; here it is one of the agent's
        config.modules_to_save = config.task_type = config.base_model_name_or_path = None
        model.add("reward", config, head=True)
        if "bias" in head:
            model.heads["reward"].bias = nn.Parameter(torch.zeros(1))
        model.heads["reward"].load_state_dict(head)
        unexpected = set_peft_model_state_dict(model.lm, weights, adapter_name="reward").unexpected_keys
        if unexpected or get_peft_model_state_dict(model.lm, adapter_name="reward").keys() != weights.keys():
            raise ValueError(f"its layers are not those of --reward-base {source}")
        if shared and checksums(model.lm) != before:  # as PiSSA does, and an adapter with biases
            raise ValueError("it changes its base, which is the policy's; copy the base to another folder for --reward-base")
    return model


def keeps_activations(args: Args, lm: transformers.PreTrainedModel, device: torch.device) -> bool:
    """Whether a GPU can keep an update's activations: about 24 hidden vectors and the attention weights, a token and layer."""
    config, length = lm.config.get_text_config(), args.max_prompt_length + 2 * args.response_length  # and the reference
    rows = args.minibatch_size // int(os.environ.get("WORLD_SIZE", 1)) // args.gradient_accumulation
    token = 24 * config.hidden_size * lm.dtype.itemsize + 4 * config.num_attention_heads * length
    return device.type == "cuda" and rows * length * config.num_hidden_layers * token < 0.8 * torch.cuda.mem_get_info(device)[0]


def load_models(args: Args, device: torch.device):
    """The agent with new adapters `policy` and `value`, the agent that scores, which may be the same, and the tokenizer."""
    tokenizer = from_pretrained(args, "tokenizer", transformers.AutoTokenizer)
    lm = load_lm(args, "policy", device)
    check_policy(args, lm, tokenizer)
    agent = Agent(lm)
    check_lm(args, "policy", lm, partial(agent.backbone, adapter=None), args.max_prompt_length + args.response_length)
    torch.manual_seed(args.seed)  # the adapters' first weights
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(lm.config.model_type, "all-linear")
    targets = args.lora_target_modules.split(",") if args.lora_target_modules else known
    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "target_modules": targets}
    with refusing(args, "lora_target_modules"):
        for name in ("policy", "value"):
            agent.add(name, LoraConfig(**lora, fan_in_fan_out=lm.config.model_type == "gpt2"), head=name == "value")
    agent.to(device).eval()
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]], device=device)
    check_gradients(args, agent, lm, lambda: agent(tokens, 2, 1.0)[0].sum(), lambda: agent.values(tokens, 2).sum())
    reward = load_reward(args, agent, tokenizer, device)
    if args.gradient_checkpointing and not keeps_activations(args, lm, device):
        lm.activation_checkpointing_enable({"use_reentrant": False})
    else:  # checkpointed layers keep no cache; Jamba's cannot continue one by several tokens: try it
        agent.shares_prompts = True
        with torch.no_grad():
            plain, shared = (agent.states(tokens, 2, None, copies)[0].float() for copies in (1, 2))
        agent.shares_prompts = bool((shared - plain).norm() <= 0.05 * plain.norm())
    return agent.to(device).eval(), reward.to(device).eval(), tokenizer


def load_texts(args: Args) -> dict[str, list[tuple[str, str]]]:
    """Pairs of prompt and reference summary by split, train, validation and test; of the last two as many as are scored."""
    if args.prompts:
        return {"test": [(prompt, "") for prompt in read_prompts(args)]}
    wanted = {"train": args.trajectories_per_update, "validation": args.eval_episodes, "test": args.test_episodes}

    def pairs(rows):
        label = "completion" if any("completion" in row for row in rows[:1]) else "label"  # as trl-lib/tldr names it
        return list(zip(column(rows, "prompt"), column(rows, label), strict=True))

    with refusing(args, "dataset"):
        if Path(args.dataset).is_file():
            posts = pairs(read_json_lines(args.dataset))
            order = np.random.default_rng([args.seed, SPLIT]).permutation(len(posts))
            cuts = np.split(order, [len(posts) * 8 // 10, len(posts) * 9 // 10])
            splits = {name: [posts[i] for i in cut] for name, cut in zip(wanted, cuts, strict=True)}
        else:
            splits = dict(datasets.load_dataset(args.dataset))
            splits["validation"] = splits.pop("valid", splits.get("validation", []))
            splits = {name: pairs(list(split)) for name, split in splits.items() if name in wanted}
        sizes = {name: len(posts) for name, posts in splits.items()}
        if any(sizes.get(name, 0) < count for name, count in wanted.items()):
            raise ValueError(f"expected splits train, valid(ation) and test of {wanted} posts or more; it has {sizes}")
    return {name: posts[: None if name == "train" else wanted[name]] for name, posts in splits.items()}


def save_adapter(folder: Path, agent: Agent, name: str, base: str, tokenizer) -> None:
    """The adapter `name` as a folder in peft's format; one with a head turns `base` into a sequence classifier of one label."""
    config = copy.deepcopy(agent.lm.peft_config[name])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = "SEQ_CLS" if name in agent.heads else "CAUSAL_LM"
    config.modules_to_save = ["score"] if name in agent.heads else None
    weights = get_peft_model_state_dict(agent.lm, adapter_name=name)
    if name in agent.heads:
        weights |= {f"base_model.model.score.{part}": tensor for part, tensor in agent.heads[name].state_dict().items()}
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    with atomically(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "adapter_model.safetensors")
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_policy(run_folder: Path, agent: Agent, tokenizer, args: Args) -> None:
    """adapters/ for peft; model/, the policy merged and rounded to --dtype, for from_pretrained. Ends the agent's training."""
    for name in ("policy", "value"):
        save_adapter(run_folder / "adapters" / name, agent, name, args.policy, tokenizer)
    if not args.load_in_4bit:  # 4-bit weights are too coarse to merge into
        agent.activate("policy")
        with atomically(run_folder / "model") as temporary:
            agent.lm.merge_and_unload(adapter_names=["policy"]).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)


# what may differ from the run's own arguments; files may have moved
EVALUABLE = [*SOURCES, "prompts", "test_episodes", "save_model", "reward_batch_size", "num_threads", "cuda"]


def check_task(args, processes):
    """What only this script can refuse."""
    for name in ("eval_episodes", "test_episodes"):
        if getattr(args, name) % processes:
            raise bad(args, name, f"expected a multiple of the {processes} processes")
    if args.evaluate and not (args.prompts or args.test_episodes):
        raise bad(args, "test_episodes", "expected 1 or more, or --prompts")


# --- run folder (the same in both RLHF scripts) -----------------------------------------------------------------------

SCRIPT = Path(__file__).name

if sys.platform == "linux":  # glibc keeps freed memory for reuse: a sixth less time for PPO on Atari
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class BadInput(ValueError):
    """Arguments that do not fit. The command line ends with status 2, as with tyro's own errors."""


def bad(args, name, message):
    return BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: {message}")


def describe(batch: dict, args: Args) -> dict[str, float]:
    """What a rollout was like. KL and entropy are sums over a response, then means, as TRL logs them."""
    real = batch["tokens"][:, -args.response_length :] != PAD
    logratio = batch["logprobs"] - batch["ref_logprobs"]
    kl = logratio.sum(-1).mean()
    stats = {
        "scores": batch["scores"].mean(),
        "kl": kl,  # k1
        "kl_k3": (((-logratio).clamp(-20, 20).expm1() + logratio) * real).sum(-1).mean(),
        "entropy": -batch["logprobs"].sum(-1).mean(),
        "rlhf_reward": batch["scores"].mean() - args.kl_coef * kl,
        "response_length": real.sum(-1).float().mean(),
    }
    for name in ("empty", "unfinished"):
        stats[f"{name}_share"] = batch[name].mean()
        if batch[name].any():
            stats[f"{name}_score"] = batch["scores"][batch[name] > 0].mean()
    return {name: value.item() for name, value in stats.items()}


@torch.no_grad()
def perplexity(agent: Agent, ids: list[int]) -> float:
    """exp of the mean next-token loss on `ids`. Windows of 1,024 tokens, or the model's context, move by half of that."""
    window = min(1024, agent.lm.config.max_position_embeddings)
    ids, total, done = torch.tensor([ids], device=next(agent.parameters()).device), 0.0, 1
    while done < ids.shape[1]:
        new = min(window // 2, ids.shape[1] - done)
        tokens = ids[:, max(0, done + new - window) : done + new]
        total -= agent(tokens, tokens.shape[1] - new, 1.0)[0].sum().item()
        done += new
    return torch.tensor(total / max(1, done - 1), dtype=torch.float64).exp().item()  # inf where math.exp would raise


@contextlib.contextmanager
def atomically(path):
    """A path to write to, which then takes the place of `path`. A kill leaves whole files; a folder to be replaced may go."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    yield temporary
    if temporary.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, content):
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


class Run:
    """A run's folder: args.json, curves, checkpoint.pt, samples.json, result.json. One process, the leader, writes and talks.

    The curves' x axis counts the texts that were written in training.
    """

    def __init__(self, args, accelerator, about):
        self.args, self.accelerator, self.signals, self.cleanup = args, accelerator, [], contextlib.ExitStack()
        self.device, self.leads, self.say = accelerator.device, accelerator.is_main_process, accelerator.print
        commit = "git -c safe.directory='*' describe --always --dirty --abbrev=40 --exclude='*' 2>&-"
        self.record = {
            "script": SCRIPT,
            "run_id": (args.track and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],  # a sweep's agent names the run
            "env_id": TASK,
            "args": asdict(args) | {"resume": None},
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
            "commit": subprocess.getoutput(f"cd '{Path(__file__).parent}' && {commit}") or None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        name = f"{TASK}__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
        self.folder = Path(args.resume or Path(args.run_dir, name)).resolve()
        if self.leads:
            self.open_folder()
        (self.folder,) = broadcast_object_list([self.folder])
        path = self.folder / "checkpoint.pt"
        self.checkpoint = torch.load(path, "cpu", weights_only=True) if path.exists() else None
        known = self.checkpoint or {"iteration": 0, "seconds": 0.0}
        self.iteration = self.start = known["iteration"]
        self.seconds = self.start_seconds = known["seconds"]
        self.before = (known["before"], known["samples_before"]) if self.checkpoint else None
        if threading.current_thread() is threading.main_thread():  # only it may set signal handlers
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self.cleanup.callback(signal.signal, number, signal.signal(number, self.on_signal))
        self.say(f"{about}; {accelerator.num_processes} x {self.record['device']}; run folder {self.folder}", flush=True)
        if self.leads:
            # purge_step hides what was logged after the checkpoint, so that no step shows twice
            purge = self.start * args.trajectories_per_update + 1 if self.checkpoint else 0
            self.writer = self.cleanup.enter_context(SummaryWriter(self.folder, purge_step=purge))
            rows = "\n".join(f"|{name}|{value}|" for name, value in self.record["args"].items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            progress = tqdm(total=args.iterations, initial=self.start, unit="iteration", disable=None)
            self.progress, self.next_line = self.cleanup.enter_context(progress), time.monotonic() + 60

    def open_folder(self):
        """Makes the run's folder, or opens the one to resume. Starts the W&B run, or continues it."""
        args = self.args
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
        if args.track:
            import wandb  # a second that only a tracked run pays

            self.wandb = wandb
            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.folder.name}
            config = self.record["args"] | {key: value for key, value in self.record.items() if key != "args"}
            wandb.init(**names, id=self.record["run_id"], resume="allow", config=config, sync_tensorboard=True, save_code=True)
            self.cleanup.push(lambda kind, *_: wandb.finish(exit_code=int(kind not in (None, SystemExit))))
            wandb.define_metric("*", step_metric="global_step")
            for name in ("eval/score", "test/score"):
                wandb.define_metric(name, step_metric="global_step", summary="max,last")
        (self.folder / "result.json").unlink(missing_ok=True)  # a resumed run has no result until it ends again
        write_json(self.folder / "args.json", self.record)

    def on_signal(self, number, frame):
        """The first signal ends the run after this iteration, the second one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            sys.exit(128 + number)
        with contextlib.suppress(OSError):  # the terminal may be gone; not print: the signal may have interrupted one
            os.write(2, b"\nfinishing this iteration, then saving; once more quits now\n" * self.leads)

    def stopping(self):
        """Whether any process has got a signal."""
        return bool(self.accelerator.reduce(torch.tensor(float(bool(self.signals)), device=self.device)).item())

    def end_if_not_finite(self, values):
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"{self.folder} keeps the last checkpoint, if there is one"
                raise FloatingPointError(f"{name} is {value} in iteration {self.iteration}; the run ends, {kept}")

    def log(self, iteration, stats, seconds):
        """The curves of an iteration, which took `seconds`. Without a terminal prints one line a minute."""
        self.iteration, self.seconds = iteration, self.seconds + seconds
        self.end_if_not_finite(stats)
        if not self.leads:
            return
        for name, value in stats.items():
            self.writer.add_scalar(name, value, iteration * self.args.trajectories_per_update)
        status = f"score {stats['objective/scores']:.3f}, {stats['charts/SPS']:,.0f} tokens/s"
        self.progress.set_postfix_str(status, refresh=False)
        self.progress.update()
        if self.progress.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + 60
            pace = (self.seconds - self.start_seconds) / (iteration - self.start)
            left = tqdm.format_interval((self.args.iterations - iteration) * pace)
            self.say(f"iteration {iteration} of {self.args.iterations}, {status}, {left} left", flush=True)

    def save(self, trained, optimizer, stopping):
        """Writes checkpoint.pt. After a signal the run ends here."""
        weights = sum(parameter.detach().sum() for parameter in trained.values()).item()
        self.end_if_not_finite({"the sum of the weights": weights})  # the last step can break them after a finite loss
        if self.leads:
            self.writer.flush()
            state = {"agent": {name: parameter.detach() for name, parameter in trained.items()}}
            state |= {"optimizer": optimizer.state_dict(), "iteration": self.iteration, "seconds": self.seconds}
            with atomically(self.folder / "checkpoint.pt") as temporary:
                torch.save({**state, "before": self.before[0], "samples_before": self.before[1]}, temporary)
        self.accelerator.wait_for_everyone()  # a process that exits before it is written would end the others
        if stopping:
            number = self.signals[0] if self.signals else signal.SIGTERM  # another process may have got it
            what = f"{signal.Signals(number).name} after iteration {self.iteration}, saved"
            self.say(f"{what}; continue with --resume {self.folder}", flush=True)
            sys.exit(128 + number)

    def evaluate(self, name, models, texts):
        """Measures the texts by `evaluate` and logs name/.... Returns means and samples; (None, []) without texts."""
        if not texts:
            return None, []
        result, samples = evaluate(*models, texts, self.args, self.accelerator)
        self.end_if_not_finite({"the mean score of the evaluation": result["score"]})
        if self.leads:
            for key, value in result.items():
                self.writer.add_scalar(f"{name}/{key}", value, self.iteration * self.args.trajectories_per_update)
            self.show(f"{name}/samples", samples[:20])
        # JSON has no infinity, which a perplexity can be
        return {key: value if math.isfinite(value) else None for key, value in result.items()}, samples

    def show(self, name, samples):
        """Samples as a table, in TensorBoard and in W&B."""
        step, rows = self.iteration * self.args.trajectories_per_update, [list(row.values()) for row in samples]
        table = [list(samples[0]), ["---"] * len(samples[0]), *rows]
        lines = ["| " + " | ".join(re.sub(r"[\n|]", " ", str(cell)) for cell in row) + " |" for row in table]
        self.writer.add_text(name, "\n".join(lines), step)
        if self.args.track:
            self.wandb.log({name: self.wandb.Table(columns=table[0], data=rows), "global_step": step})

    def finish(self, after, agent, tokenizer):
        """Writes samples, models and result.json. after: what `evaluate` has returned for the trained policy."""
        if not self.leads:
            return
        (before, samples_before), (after, samples) = self.before, after
        if samples:
            for new, old in zip(samples, samples_before, strict=True):
                new |= {f"{key}_before": old[key] for key in old if key not in ("post", "prompt", "reference")}
            write_json(self.folder / "samples.json", samples)
            self.show("samples", samples[:20])
        if self.args.save_model:
            save_policy(self.folder, agent, tokenizer, self.args)
        result = {name: after[name] if after else None for name in ("score", "score_stderr")}
        result |= {"before": before, "after": after, "seconds": self.seconds}
        result["global_step"] = self.args.iterations * self.args.trajectories_per_update
        write_json(self.folder / "result.json", result | self.record)
        if self.args.track:
            self.wandb.summary.update({name: result[name] for name in ("score", "score_stderr", "seconds")})
        self.progress.close()
        score = f"score {before['score']:.3f} before, {after['score']:.3f} after" if after else "not evaluated"
        ended = f"{self.args.iterations} iterations in {self.seconds:.0f} s"
        self.say(f"{ended}, {score}; {self.folder / 'result.json'}", flush=True)


# --- loading: refuses what would give wrong numbers without a word; elsewhere the libraries' own errors speak -----------


@contextlib.contextmanager
def refusing(args, name):
    """An error of the libraries, which have no type in common, becomes BadInput that names the argument."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        hint = "; --allow-pickle takes pickled weights" if "safetensors" in str(error) and not args.allow_pickle else ""
        hint += f"; python benchmark/assets/make_rlhf_assets.py {TASK} builds what --offline takes" if args.offline else ""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise bad(args, name, f"{type(error).__name__}: {error}{cause}{hint}") from error


def prepare_hub(args):
    """Uses the local cache alone with --offline, and where the Hub does not answer: each request would be tried for 23 s."""
    offline = args.offline or huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and not all(Path(getattr(args, name) or ".").exists() for name in SOURCES):
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:  # of the HTTP library that huggingface_hub chooses
            offline = True
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks a conversion service to open a pull request
    transformers.utils.logging.set_verbosity_error()  # it warns of texts beyond the tokenizer's limit, which we cut


def from_pretrained(args, name, loader, **options):
    """Loads the argument `name`, a Hub id or a folder: safetensors with all weights, without remote code."""
    source, offline = getattr(args, name), huggingface_hub.constants.HF_HUB_OFFLINE
    with refusing(args, name):
        if loader is transformers.AutoTokenizer:
            return loader.from_pretrained(source, trust_remote_code=False)
        if find_adapter_config_file(source, local_files_only=offline):  # transformers would load and freeze it on its base
            raise bad(args, name, "an adapter; merge it into its base first, with peft's merge_and_unload")
        options = {"dtype": torch.float32, "use_safetensors": None if args.allow_pickle else True} | options
        model, info = loader.from_pretrained(source, trust_remote_code=False, **options, output_loading_info=True)
    if info["missing_keys"]:  # transformers has put random numbers there
        raise bad(args, name, f"expected a model with all its weights; {', '.join(sorted(info['missing_keys']))} are missing")
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, transformers.activations.NewGELUActivation):  # GPT-2's and GPT-J's, eight operations
                setattr(module, child, nn.GELU(approximate="tanh"))
    return model


def check_tokenizer(args, name, model, tokenizer):
    """Refuses a tokenizer with ids that the model lacks, or with other ids than the model's own tokenizer, if it has one."""
    largest, tokens = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    texts = ["I loved it: 10/10!", "I hated it: 10/10!", "\nTL;DR: a film, naïve at best"]
    ids, own = tokenize(tokenizer, texts), None
    with contextlib.suppress(Exception):  # of a model that comes without one
        own = tokenize(transformers.AutoTokenizer.from_pretrained(getattr(args, name), trust_remote_code=False), texts)
    if largest >= tokens:
        raise bad(args, name, f"expected a model of the tokenizer's; it has {tokens} tokens, and the largest id is {largest}")
    if ids[0] == ids[1]:  # transformers makes such a one where its files are missing
        raise bad(args, name, "expected a model with its tokenizer's files; this tokenizer tells no words apart")
    if own and own[0] != own[1] and own != ids:
        raise bad(args, name, "expected a model of the tokenizer's; its own one gives words other ids")


def check_policy(args, lm, tokenizer):
    """Refuses a tokenizer or lengths that do not fit the policy."""
    check_tokenizer(args, "policy", lm, tokenizer)
    if tokenizer.eos_token_id is None:
        raise bad(args, "tokenizer", "expected one with an EOS token")
    context = getattr(lm.config, "max_position_embeddings", 0)
    if args.max_prompt_length + args.response_length > context:
        raise bad(args, "max_prompt_length", f"expected {context}, the policy's context, less response_length, or less")
    if args.top_k > lm.config.vocab_size:
        raise bad(args, "top_k", f"expected the policy's vocabulary, {lm.config.vocab_size}, or less")


@torch.no_grad()
def check_lm(args, name, lm, backbone, length):
    """Refuses a model whose logits for a text change with padding on the left, or token by token with a cache.

    `length` is that of the longest text in use: some models switch their positions with it. backbone: `Agent.backbone`.
    """
    texts = [torch.arange(n, device=lm.device) * 7919 % lm.config.vocab_size for n in (5, max(9, length))]
    batch = torch.stack([F.pad(ids, (len(texts[1]) - len(ids), 0), value=PAD) for ids in texts])
    real, cache, head = batch != PAD, transformers.DynamicCache(config=lm.config), lm.get_output_embeddings()
    with refusing(args, name):
        plain = torch.stack([lm(ids[None]).logits[0, -5:].float() for ids in texts])
        padded = backbone(batch, real).last_hidden_state[:, -5:]
        steps = [0, *range(len(texts[1]) - 3, len(texts[1]) + 1)]
        pieces = [backbone(batch[:, a:b], real[:, :b], past_key_values=cache) for a, b in itertools.pairwise(steps)]
        cached = torch.cat([piece.last_hidden_state for piece in pieces], dim=1)[:, -5:]
    # Room for rounding: TF32, in which GPUs multiply float32, keeps 11 bits, bfloat16 8. In bfloat16 a right model of 30
    # layers is off by 0.2 of the logits' spread, one with its positions off by one by 0.8.
    tolerance = plain.std() * (0.02 if lm.dtype == torch.float32 else 0.4)
    for hidden, reason in (
        (padded[1:], "its logits are not its head applied to its last hidden states"),
        (padded, "padding on the left changes its numbers"),
        (cached, "a cache of keys and values changes its numbers"),
    ):
        if not (head(hidden).float() - plain[-len(hidden) :]).abs().max() <= tolerance:  # also if it is not a number
            raise bad(args, name, f"expected a causal model that takes padding, positions and a cache ({reason})")


def check_gradients(args, agent, lm, *losses):
    """Refuses adapters on the embedding and the head, which may share a weight, and names layers that no gradient comes to."""
    layers = {name: layer for name, layer in agent.named_modules() if isinstance(layer, LoraLayer)}
    ends, kinds = (lm.get_input_embeddings(), lm.get_output_embeddings()), {}
    hook = nn.modules.module.register_module_forward_hook(lambda module, _, output: kinds.update({module: type(output)}))
    with hook, contextlib.suppress(TypeError, AttributeError, ValueError, RuntimeError):  # of the layers named below
        for loss in losses:
            loss().backward()
    wrong = [name for name, layer in layers.items() if layer in ends or kinds.get(layer.get_base_layer()) is tuple]
    wrong = wrong or [name for name, layer in layers.items() if layer.get_base_layer() not in kinds]  # read, but not called
    wrong = wrong or [name for name, parameter in trained_parameters(agent).items() if parameter.grad is None]
    if wrong:
        raise bad(args, "lora_target_modules", f"expected layers that adapters can train, unlike {', '.join(wrong)}")
    agent.zero_grad()


def read_json_lines(path):
    """The objects of a file of JSON lines in UTF-8. An error names the line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            rows += [dict(json.loads(line.decode("utf-8-sig")))] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def column(rows, name):
    """The texts of a column. Other columns may hold anything."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(name), str):
            raise ValueError(f"row {number} has no text in a column {name}; its columns are {', '.join(row)}")
    return [row[name] for row in rows]


def load_weights(agent, checkpoint):
    """Puts the trained weights of a checkpoint into the agent; all others are as they were loaded."""
    if list(checkpoint["agent"]) != list(trained_parameters(agent)):  # strict=False passes over missing ones
        raise BadInput("checkpoint.pt has other weights than --policy has with these versions")
    agent.load_state_dict(checkpoint["agent"], strict=False)


# --- command line -----------------------------------------------------------------------------------------------------


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


RESUMABLE = [*SOURCES, "iterations", "track", "wandb_project_name", "wandb_entity", "eval_interval", "checkpoint_interval"]
RESUMABLE += ["save_model", "reward_batch_size", "num_threads", "cuda"]


def own_args(args):
    """The run's own arguments, with --resume or --evaluate. An evaluation is neither tracked nor saved as the run was."""
    own = replace(load_args(args.resume or args.evaluate), resume=args.resume, evaluate=args.evaluate)
    return replace(own, track=False, save_model=False) if args.evaluate else own


def parse_args(argv=None):
    """The command line. With --resume or --evaluate it starts from that run's own arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=argv, default=OFFLINE if "--offline" in argv else Args())
    return tyro.cli(Args, args=argv, default=own_args(args)) if args.resume or args.evaluate else args


def name_arm(args):
    """The default --exp-name, with what differs from the arm's own settings: ppo, ppo_raw, sppo_a0.5_b0.2."""
    baseline = "ppo" if args.alpha == 1 else f"ppo_a{args.alpha:g}"
    parts = {f"sppo_a{args.alpha:g}_b{args.beta:g}" if args.beta else baseline: True}
    parts |= {f"Z{args.Z:g}": args.Z != -1, "literal": args.literal_signs, "raw": not args.norm_adv}
    return "_".join(part for part, shown in parts.items() if shown)


def check(args):
    """Refuses arguments that do not fit, before anything is created. Raises BadInput."""
    if args.resume or args.evaluate:
        own, allowed = own_args(args), RESUMABLE if args.resume else EVALUABLE
        for name, value in asdict(own).items():
            if getattr(args, name) != value and name not in allowed:
                raise bad(args, name, f"the run keeps its own, {value}; these may change: {', '.join(allowed)}")
        if args.iterations < own.iterations:
            raise bad(args, "iterations", f"expected {own.iterations}, the run's own, or more")
    processes, total = int(os.environ.get("WORLD_SIZE", 1)), args.trajectories_per_update  # set by `accelerate launch`
    if total % args.minibatch_size:
        raise bad(args, "minibatch_size", f"expected a divisor of trajectories_per_update = {total}")
    if args.minibatch_size % (processes * args.gradient_accumulation):
        parts = f"{processes} processes x gradient_accumulation = {args.gradient_accumulation}"
        raise bad(args, "minibatch_size", f"expected a multiple of {parts}")
    if args.prompts and not args.evaluate:
        raise bad(args, "prompts", "expected --evaluate with it")
    if args.evaluate and processes > 1:
        raise bad(args, "evaluate", f"expected one process, not {processes}")
    check_task(args, processes)
    if args.track and os.environ.get("WANDB_MODE", "online") == "online" and os.environ.get("RANK", "0") == "0":
        import wandb

        wandb.login()  # asks for a key where one is missing


def read_prompts(args):
    """The texts of --prompts: the column `prompt` of a file of JSON lines, or the lines of another file."""
    with refusing(args, "prompts"):
        if args.prompts.endswith(".jsonl"):
            return column(read_json_lines(args.prompts), "prompt")
        return [line for line in Path(args.prompts).read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def evaluate_run(args, accelerator):
    """--evaluate: prints what the policy of a finished or stopped run writes, as JSON lines. --save-model: saves it, too."""
    folder = Path(args.evaluate)
    checkpoint = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)
    texts, (agent, *models) = load_texts(args)["test"], load_models(args, accelerator.device)
    load_weights(agent, checkpoint)
    result, samples = evaluate(agent, *models, texts, args, accelerator)
    print("\n".join(map(json.dumps, samples)), flush=True)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.items() if math.isfinite(value))
    print(f"{numbers}; {len(samples)} texts, iteration {checkpoint['iteration']}", file=sys.stderr)
    if args.save_model:
        save_policy(folder, agent, models[-1], args)
        print(f"saved the model of iteration {checkpoint['iteration']} in {folder}", file=sys.stderr)


def main(args):
    """Trains, resumes or evaluates. In a notebook: `main(Args(...))`; arguments that do not fit raise BadInput."""
    check(args)
    args = replace(args, exp_name=args.exp_name or name_arm(args))
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    cuda = args.cuda and torch.cuda.is_available()
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32: 11-bit factors and float32 sums, also in the logits
    prepare_hub(args)
    accelerator = Accelerator(cpu=not cuda)
    if args.evaluate:
        evaluate_run(args, accelerator)
        return
    if args.resume and Path(args.resume, "result.json").exists():
        done = json.loads(Path(args.resume, "result.json").read_text())
        finished = done["global_step"] >= args.iterations * args.trajectories_per_update
        if finished and (done["args"]["save_model"] or not args.save_model):
            ended = f"{args.resume} has finished its {args.iterations} iterations"
            accelerator.print(f"{ended}; a larger --iterations continues it")
            return
    texts, models = load_texts(args), load_models(args, accelerator.device)
    accelerator.wait_for_everyone()  # until every process has looked for result.json
    agent, checkpointing = models[0], any(getattr(module, "gradient_checkpointing", False) for module in models[0].modules())
    whole, trained = (sum(p.numel() for p in of) / 1e6 for of in (agent.parameters(), trained_parameters(agent).values()))
    about = f"{args.policy}, {whole:.1f}M parameters, {trained:.1f}M trained, checkpointing {'on' if checkpointing else 'off'}"
    run = Run(args, accelerator, f"{about}; {torch.get_num_threads()} threads")
    with run.cleanup:
        train(args, run, texts, models)
    if run.signals:  # one during the last evaluation
        sys.exit(128 + run.signals[0])


if __name__ == "__main__":
    try:
        main(parse_args())
    except (BadInput, FloatingPointError, OSError) as error:
        print(f"{SCRIPT}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except KeyboardInterrupt:  # before there is a run to save
        sys.exit(130)
