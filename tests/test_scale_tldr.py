"""benchmark/studies/scale_tldr.py: counts and bytes by hand, and a measurement of a tiny model."""

import sys

import pytest
import torch
import transformers
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark/studies"))
import scale_tldr as scale

import sppo_rlhf_tldr as tldr


def test_gptjs_parameters_by_hand():
    d, v = 4096, 50400
    layer = 4 * d * d + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * d  # attention without biases, feed-forward, norm
    found = scale.count(28, lora_r=8)
    assert found == {"body": 28 * layer + 2 * d, "embedding": v * d, "head": v * d + v, "adapter": 28 * 2 * 2 * 8 * d}
    assert sum(found.values()) - found["adapter"] == 6_050_882_784  # GPT-J 6B


def test_the_papers_settings_by_hand():
    memory, operations = scale.predict(28, tldr.Args(), own_reward_base=True)
    n, d, tokens = scale.count(28, 8), 4096, 64 * 550
    assert memory["base"] == memory["base of the reward model"] == 2 * 6_050_882_784
    assert memory["generation: keys and values"] == 2 * 28 * 64 * 550 * 4096 * 2
    assert memory["adapters, gradients, AdamW"] == 16 * (2 * n["adapter"] + d) + 4 * n["adapter"]
    forward = tokens * (2 * n["body"] + 28 * 4 * d * 550)
    logits = 64 * 50 * 2 * n["head"]
    assert operations["generate"] == forward + logits
    assert operations["update"] == 4 * (3 * 3 * forward + 2 * 2 * logits)  # policy, references, values; forward twice, backward
    _, kept = scale.predict(28, tldr.Args(gradient_checkpointing=False), own_reward_base=True)
    once = 64 * 600 / tokens  # 500 tokens of a prompt, 50 of its response, 50 of its reference
    assert kept["update"] == pytest.approx(4 * (2 * (1 + once) * forward + 2 * 2 * logits))
    assert (
        scale.lasting(memory) + scale.activations(memory)
        == sum(memory.values()) - memory["update: layers"] - (memory["update: gradients or logits"])
    )  # generation is the worst moment
    seconds = scale.times(28, tldr.Args(), 1e14, 1e12)
    read = 2 * (n["body"] + n["head"]) + memory["generation: keys and values"]
    assert seconds["generate"] == pytest.approx(operations["generate"] / 1e14 + 50 * read / 1e12)
    assert seconds["update"] == operations["update"] / 1e14
    quantised, _ = scale.predict(28, tldr.Args(load_in_4bit=True), own_reward_base=True)
    assert quantised["base"] == n["body"] * 4.5 / 8 + 2 * (n["embedding"] + n["head"])  # NF4: 4 bits and half a bit of scale
    less, _ = scale.predict(28, tldr.Args(gradient_checkpointing=False), own_reward_base=True)
    assert less["update: layers"] > 4 * memory["update: layers"]


def test_a_measurement_of_a_tiny_model(monkeypatch):
    def tiny(layers):
        sizes = {"n_embd": 32, "n_head": 2, "rotary_dim": 8, "vocab_size": 60_000, "n_positions": 64}
        return transformers.GPTJConfig(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)

    monkeypatch.setattr(scale, "gptj", tiny)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = scale.measure(scale.Args(layers=(1,), prompt=20, response=5))
    torch.set_num_threads(threads)
    assert set(found["seconds"]) == set(scale.PHASES) and all(value > 0 for value in found["seconds"].values())
    assert found["bytes"] > 0
    assert 0 < scale.matmul_seconds(4, torch.device("cpu"), torch.float32) < 60


@pytest.mark.parametrize(
    ("layers", "prompt", "rows", "checkpointing"), [(1, 60, 6, True), (3, 100, 4, True), (3, 100, 4, False)]
)
def test_measured_peak_is_the_predicted_one(layers, prompt, rows, checkpointing, monkeypatch):
    """The profiler's count of tensors in a whole iteration, where the update is the worst moment."""
    sizes = {"n_embd": 256, "n_head": 4, "rotary_dim": 16, "vocab_size": 50_400, "n_positions": 128}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    monkeypatch.setattr(scale, "gptj", lambda n: transformers.GPTJConfig(n_layer=n, **sizes, **dropouts))
    lengths = {"prompt": prompt, "response": 4, "checkpointing": checkpointing}
    args = scale.Args(layers=(layers,), trajectories=rows, minibatch_size=rows, **lengths)
    memory, _ = scale.predict(layers, scale.settings(args), own_reward_base=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = scale.measure(args)
    torch.set_num_threads(threads)
    assert scale.activations(memory) == pytest.approx(found["bytes"], rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("layers", "width", "heads", "rows", "prompt"), [(1, 512, 2, 8, 250), (4, 256, 2, 8, 300), (8, 256, 1, 8, 250)]
)
def test_measured_peak_of_generation_is_the_predicted_one(layers, width, heads, rows, prompt, dtype, monkeypatch):
    """Of generation alone, the worst moment at GPT-J's size: many long prompts, whose layers' keys and values stay."""
    config = transformers.GPTJConfig(n_layer=layers, n_embd=width, n_head=heads, rotary_dim=16, vocab_size=500)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    monkeypatch.setattr(scale, "gptj", lambda layers: config)
    torch.set_default_dtype(getattr(torch, dtype))
    lm = transformers.GPTJForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    agent = tldr.Agent(lm)
    agent.add("policy", scale.LoraConfig(r=8), head=False)
    agent.eval()
    args = scale.settings(scale.Args(layers=(layers,), prompt=prompt, response=4, trajectories=rows, dtype=dtype))
    prompts, uniforms = torch.randint(1, 500, (rows, prompt)), torch.rand(rows, 4, dtype=torch.float64)
    found = scale.peak_of_tensors(lambda: tldr.generate(agent, prompts, uniforms, [0], args), torch.device("cpu"))
    memory, _ = scale.predict(layers, args, own_reward_base=False)
    expected = sum(size for name, size in memory.items() if name.startswith("generation"))
    assert expected == pytest.approx(found, rel=0.05)


def test_what_autograd_keeps_is_what_the_model_says(monkeypatch):
    """Bytes saved for one part of an update, without checkpointing."""
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 100, "rotary_dim": 16}
    config = transformers.GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0)
    agent = tldr.Agent(transformers.GPTJForCausalLM(config).requires_grad_(False))
    agent.add("policy", scale.LoraConfig(r=8), head=False)
    agent.eval()
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = agent(torch.randint(0, 100, (4, 110)), 100, 1.0)[0].sum()
    own = {parameter.untyped_storage().data_ptr() for parameter in agent.parameters()}
    kept = sum(size for pointer, size in seen.items() if pointer not in own)
    loss.backward()
    monkeypatch.setattr(scale, "gptj", lambda layers: config)
    args = tldr.Args(dtype="float32", max_prompt_length=100, response_length=10, minibatch_size=4, reference_nll_coef=0.0)
    memory, _ = scale.predict(4, tldr.replace(args, gradient_checkpointing=False), own_reward_base=False)
    assert memory["update: layers"] == pytest.approx(kept, rel=0.1)
