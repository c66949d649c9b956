"""A summariser, a reward adapter on it and posts, all tiny and made here: the tests need no network."""

import json

import rlhf_assets
import torch
from peft import LoraConfig

import sppo_rlhf_tldr as tldr


def posts(count, seed):
    """Reviews stand for posts, their last words for summaries."""
    texts = rlhf_assets.reviews(count + seed)[seed:]
    return [(f"{text}\nTL;DR:", " ".join(text.split()[-4:])) for text in texts]


def add_reward(agent, seed=3):
    """An adapter `reward` with weights and a head that are not near 0."""
    agent.add("reward", LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=agent.lm.config.model_type == "gpt2"), head=True)
    torch.manual_seed(seed)
    for name, parameter in agent.named_parameters():
        if ".reward." in name:
            torch.nn.init.normal_(parameter, std=0.3)


def write_assets(folder):
    """policy/, which ends some summaries early, reward/ on it, and posts/."""
    rlhf_assets.write_assets(folder)
    tokenizer = rlhf_assets.make_tokenizer()
    agent = tldr.Agent(tldr.load_lm(tldr.Args(policy=str(folder / "policy"), dtype="float32"), "policy", torch.device("cpu")))
    add_reward(agent)
    tldr.save_adapter(folder / "reward", agent, "reward", str(folder / "policy"), tokenizer)
    (folder / "posts").mkdir()
    for name, count, seed in (("train", 40, 0), ("validation", 8, 100), ("test", 8, 200)):
        lines = [json.dumps({"prompt": prompt, "label": label}) + "\n" for prompt, label in posts(count, seed)]
        (folder / "posts" / f"{name}.jsonl").write_text("".join(lines))
    return folder


def arguments(folder):
    """The command line that uses them, at a tiny size."""
    line = f"""--policy {folder / "policy"} --tokenizer {folder / "policy"} --reward-base {folder / "policy"}
        --reward-adapter {folder / "reward"} --reward-text {{text}}<|endoftext|> --reward-max-length 40 --dtype float32
        --dataset {folder / "posts"} --iterations 3 --trajectories-per-update 8 --minibatch-size 4 --gradient-accumulation 1
        --update-epochs 2 --max-prompt-length 20 --response-length 6 --learning-rate 1e-2 --lora-r 2 --lora-alpha 4
        --eval-episodes 8 --eval-interval 0 --test-episodes 8 --checkpoint-interval 1 --num-threads 1 --no-cuda"""
    return line.split()
