"""sppo_rlhf_tldr.py piece by piece: adapters on one base, padding, losses, reward; against other code and by hand."""

import copy
import math
import shutil

import numpy as np
import peft
import pytest
import rlhf_assets
import tldr_assets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file

import sppo_rlhf_tldr as tldr
from sppo_rlhf_tldr import PAD, Agent, Args

TOKENIZER = rlhf_assets.make_tokenizer()
V, EOS = len(TOKENIZER), TOKENIZER.eos_token_id
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """All that networks this small need, and far faster than two where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tldr_assets.write_assets(tmp_path_factory.mktemp("assets"))


def make_args(**changed):
    sizes = {"max_prompt_length": 7, "response_length": 6, "cuda": False, "trajectories_per_update": 8, "minibatch_size": 4}
    return Args(**{**sizes, "gradient_accumulation": 1, "reward_text": "{text}<|endoftext|>", "dtype": "float32", **changed})


def make_lm(family="gpt2", layers=2, seed=0):
    torch.manual_seed(seed)
    if family == "gpt2":
        return rlhf_assets.make_lm(V, dropout=0.0, seed=seed)
    if family == "gptj":
        config = transformers.GPTJConfig(
            vocab_size=V, n_positions=64, n_embd=32, n_layer=layers, n_head=2, rotary_dim=8, initializer_range=0.3,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPTJForCausalLM(config)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_agent(family="gpt2", seed=0, dropout=0.0, reward=False):
    """With adapters and a value head that are not near 0."""
    agent = Agent(make_lm(family, seed=seed).requires_grad_(False))
    for name in ("policy", "value"):
        config = LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, fan_in_fan_out=family == "gpt2")
        agent.add(name, config, head=name == "value")
    torch.manual_seed(seed + 1)
    for parameter in tldr.trained_parameters(agent).values():
        torch.nn.init.normal_(parameter, std=0.3)
    if reward:
        tldr_assets.add_reward(agent)
    return agent.eval()


def make_tokens(rows=8, seed=0):
    """[rows, 13]: prompts of 3 to 7 tokens, responses of 1 to 6, of which all but the whole ones end with EOS."""
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, 13), PAD)
    for row in tokens:
        prompt, response = rng.integers(3, 8), rng.integers(1, 7)
        row[7 - prompt : 7 + response] = rng.integers(5, V, prompt + response)
        if response < 6:
            row[7 + response - 1] = EOS
    return torch.from_numpy(tokens)


def by_hand(lm, row, temperature=1.0):
    """Log-probabilities of one row's response and the last hidden states before it, from an unpadded pass of a whole model."""
    start = (row[:7] != PAD).sum()
    ids = row[row != PAD]
    out = lm(ids[None], output_hidden_states=True)
    logprobs = F.log_softmax(out.logits[0].double() / temperature, -1)[start - 1 : -1]
    return logprobs[torch.arange(len(ids) - start), ids[start:]], out.hidden_states[-1][0, start - 1 : -1], logprobs


def merged(agent, name):
    """The base with the adapter's product added to its weights by hand: what the adapter is to compute."""
    lm = copy.deepcopy(agent.lm.get_base_model())
    for path, layer in agent.lm.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            change = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
            weight = layer.base_layer.weight + (change.T if layer.fan_in_fan_out else change)
            plain = copy.deepcopy(layer.base_layer)
            plain.weight.data = weight.data
            parent, _, last = path.rpartition(".")
            setattr(lm.get_submodule(parent), last, plain)
    return lm


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_without_adapters_the_agent_is_the_base_to_the_bit(family):
    base, agent, tokens = Agent(make_lm(family)), make_agent(family, reward=True), make_tokens()
    for _ in range(2):  # whatever was active before
        assert torch.equal(agent(tokens, 7, 1.0, adapter=None)[0], base(tokens, 7, 1.0, adapter=None)[0])
        assert (agent(tokens, 7, 1.0)[0] - base(tokens, 7, 1.0, adapter=None)[0]).abs().max() > 0.01
        agent.values(tokens, 7)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_each_adapter_computes_what_it_adds_to_the_weights(family):
    """Log-probabilities and values, each with its own adapter, against whole unpadded models merged by hand."""
    agent, tokens = make_agent(family, reward=True), make_tokens()
    policy, value = merged(agent, "policy"), merged(agent, "value")
    values, (logprobs, entropies) = agent.values(tokens, 7), agent(tokens, 7, 1.0, with_entropy=True)
    hand = [by_hand(policy, row) for row in tokens]
    torch.testing.assert_close(logprobs.double(), torch.cat([h[0] for h in hand]), atol=1e-5, rtol=1e-5)
    whole = torch.cat([h[2] for h in hand])
    torch.testing.assert_close(entropies.double(), -(whole.exp() * whole).sum(-1), atol=1e-5, rtol=1e-5)
    hidden = torch.cat([by_hand(value, row)[1] for row in tokens])
    torch.testing.assert_close(values, agent.heads["value"](hidden).squeeze(-1), atol=1e-4, rtol=1e-4)


def test_the_value_adapter_never_changes_the_logits():
    agent, tokens = make_agent(), make_tokens()
    before, values = agent(tokens, 7, 1.0)[0], agent.values(tokens, 7)
    for name, parameter in agent.named_parameters():
        if ".value." in name:
            torch.nn.init.normal_(parameter)
    assert (agent.values(tokens, 7) - values).abs().max() > 0.1
    assert torch.equal(agent(tokens, 7, 1.0)[0], before)


def test_only_the_two_adapters_and_the_head_are_trained(assets):
    """Gradients of a whole update, and what its steps change; the reward's adapter shares the base and stays as it is."""
    agent = make_agent(reward=True)
    weights = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    trained = tldr.trained_parameters(agent)
    assert len(trained) == 2 * 2 * 2 + 1  # A and B of c_attn in two layers, for policy and value; the head
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    tldr.update(agent, optimizer, Accelerator(cpu=True), make_args(), make_batch(agent), 0)
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert torch.equal(parameter, weights[name]) == (name not in trained), name


def test_one_base_is_in_memory_for_all(assets):
    def parameters(*agents):
        return sum(p.numel() for p in {id(p): p for agent in agents for p in agent.parameters()}.values())

    paths = {"policy": str(assets / "policy"), "tokenizer": str(assets / "policy"), "reward_adapter": str(assets / "reward")}
    args = make_args(**paths, reward_base=str(assets / "policy"), reward_max_length=40, max_prompt_length=20, lora_r=2)
    agent, reward, _ = tldr.load_models(args, CPU)
    base = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(assets / "policy").parameters())
    adapters = 3 * 2 * 2 * (32 + 96)  # three of rank 2 on two layers of 32 x 96
    assert reward is agent and parameters(agent) == base + adapters + 2 * 32
    other = shutil.copytree(assets / "policy", assets / "other")
    agent, reward, _ = tldr.load_models(make_args(**{**vars(args), "reward_base": str(other)}), CPU)
    assert reward is not agent and parameters(agent, reward) == 2 * base + adapters + 2 * 32
    texts = ["a great film", "an awful movie with a terrible plot"]
    shared = tldr.load_models(args, CPU)[1]
    with torch.no_grad():
        one, two = (tldr.score(texts, model, TOKENIZER, args) for model in (shared, reward))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_gradients_are_the_same_with_checkpointing_and_follow_autograd(family):
    """Layers computed again in the backward pass must meet the adapter of their forward pass; one step of SGD against the
    gradient of the whole sum by autograd through the adapters' products added to the weights."""
    found = []
    for checkpointing in (False, True):
        agent = make_agent(family, reward=True)
        if checkpointing:
            agent.lm.activation_checkpointing_enable({"use_reentrant": False})
        trained = tldr.trained_parameters(agent)
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        args = make_args(gradient_accumulation=2, update_epochs=1, minibatch_size=8, max_grad_norm=1e9)
        batch = make_batch(agent)
        tldr.update(agent, optimizer, Accelerator(cpu=True), args, batch, 0)
        found.append({name: parameter.detach().clone() for name, parameter in trained.items()})
    agent = make_agent(family, reward=True)
    trained = tldr.trained_parameters(agent)
    whole = [gradient(agent, make_args(), batch)[0].norm()]
    tldr.value_loss(agent, make_args(), 1.0, batch["tokens"], batch["values"], batch["returns"])[0].backward()
    assert whole[0] > 0.01
    for name, parameter in trained.items():
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[0][name], parameter.detach() - 0.1 * parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes(checkpointing):
    """With it a layer runs twice in each of an update's passes, without once: the memory is really saved."""
    agent, calls = make_agent("llama"), []
    batch, trained = make_batch(agent), tldr.trained_parameters(agent)
    if checkpointing:
        agent.lm.activation_checkpointing_enable({"use_reentrant": False})
    agent.lm.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    args = make_args(minibatch_size=8, update_epochs=1, reference_nll_coef=0.0)
    tldr.update(agent, torch.optim.SGD(trained.values(), lr=0.1), Accelerator(cpu=True), args, batch, 0)
    assert len(calls) == 2 + 2 * checkpointing  # policy and value


def test_saved_adapters_reload_with_peft(tmp_path):
    agent = make_agent(reward=True)
    base = copy.deepcopy(merged(agent, "policy"))
    make_lm().save_pretrained(tmp_path / "base")
    for name in ("policy", "value", "reward"):
        tldr.save_adapter(tmp_path / name, agent, name, str(tmp_path / "base"), TOKENIZER)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    for name in ("value", "reward"):
        classifier = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=1)
        loaded = peft.PeftModel.from_pretrained(classifier, tmp_path / name).eval()
        with torch.no_grad():
            hidden = agent.backbone(ids, ids >= 0, name).last_hidden_state[:, -1]
            torch.testing.assert_close(loaded(ids).logits, agent.heads[name](hidden), atol=1e-4, rtol=1e-4)


def test_bfloat16_base_has_float32_adapters_heads_and_logits():
    agent = Agent(make_lm("gptj").to(torch.bfloat16).requires_grad_(False))
    for name in ("policy", "value"):
        agent.add(name, LoraConfig(r=2), head=name == "value")
    assert {parameter.dtype for parameter in tldr.trained_parameters(agent).values()} == {torch.float32}
    tokens = make_tokens()
    logprobs, _ = agent(tokens, 7, 1.0)
    assert logprobs.dtype == agent.values(tokens, 7).dtype == torch.float32
    exact = Agent(make_lm("gptj"))(tokens, 7, 1.0, adapter=None)[0]
    assert 1e-5 < (logprobs - exact).abs().max() < 0.5
    logits = agent.logits(torch.randn(50, 32), 1.0)
    assert logits.dtype == torch.float32
    assert (logits - logits.bfloat16()).abs().max() > 1e-4  # not rounded


# --- padding and generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_padding_changes_nothing(family):
    """The same prompts padded by 0 and by 17: log-probabilities, values, and what is written."""
    agent, tokens = make_agent(family), make_tokens()
    padded = torch.cat([torch.full((8, 17), PAD), tokens], dim=1)
    torch.testing.assert_close(agent(tokens, 7, 1.0)[0], agent(padded, 24, 1.0)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(agent.values(tokens, 7), agent.values(padded, 24), atol=1e-4, rtol=1e-4)
    uniforms, args = torch.rand(8, 6, dtype=torch.float64), make_args()
    one, other = (tldr.generate(agent, rows[:, :-6], uniforms, [EOS], args) for rows in (tokens, padded))
    assert torch.equal(one, other)


def test_a_reward_adapter_of_another_writer_loads(assets, tmp_path):
    """As peft writes classifiers: weights in a .bin, modules_to_save in the configuration, a head with or without a bias."""
    for bias in (False, True):
        folder = tmp_path / str(bias)
        folder.mkdir()
        config = peft.LoraConfig.from_pretrained(assets / "reward")
        config.save_pretrained(folder)
        assert config.modules_to_save == ["score"] and config.task_type == "SEQ_CLS"
        weights = load_file(assets / "reward/adapter_model.safetensors")
        if bias:
            weights["base_model.model.score.bias"] = torch.tensor([0.7])
        torch.save(weights, folder / "adapter_model.bin")
        paths = {"policy": str(assets / "policy"), "tokenizer": str(assets / "policy"), "reward_base": f"{assets}/policy/"}
        args = make_args(**paths, reward_adapter=str(folder), reward_max_length=40, max_prompt_length=20, allow_pickle=True)
        agent, reward, _ = tldr.load_models(args, CPU)
        assert reward is agent  # one folder, however it is written
        known = tldr.load_models(make_args(**{**vars(args), "reward_adapter": str(assets / "reward")}), CPU)[1]
        with torch.no_grad():
            one, two = (tldr.score(["a great film"], model, TOKENIZER, args) for model in (reward, known))
        torch.testing.assert_close(one, two + 0.7 * bias)


def test_quantisation_is_asked_for_as_transformers_wants_it(assets, monkeypatch):
    """Without a GPU what would be loaded can be seen, not run."""
    seen = {}

    def from_pretrained(source, **options):
        seen.update(options)
        raise OSError("seen")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    args = make_args(policy=str(assets / "policy"), load_in_4bit=True, dtype="bfloat16")
    with pytest.raises(tldr.BadInput, match="OSError: seen"):
        tldr.load_lm(args, "policy", torch.device("cuda:1"))
    config = seen["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert seen["device_map"] == {"": torch.device("cuda:1")} and seen["use_safetensors"] and not seen["trust_remote_code"]


def test_rewards_do_not_depend_on_the_batch():
    """Each text alone, through a whole model merged by hand, with the head at its last token."""
    agent, args = make_agent(reward=True), make_args(reward_batch_size=4, reward_max_length=24)
    texts = [*rlhf_assets.reviews(7), "film", " ".join(rlhf_assets.GOOD * 5)]
    with torch.no_grad():
        whole = tldr.score(texts, agent, TOKENIZER, args)
    lm = merged(agent, "reward")
    for text, found in zip(texts, whole.tolist(), strict=True):
        ids = torch.tensor([TOKENIZER(text + "<|endoftext|>").input_ids[-24:]])
        assert ids[0, -1] == EOS
        hidden = lm(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert found == pytest.approx(agent.heads["reward"](hidden).item(), abs=1e-4)
    assert whole.std() > 0.05


def test_greedy_is_top_k_of_one():
    agent, prompts = make_agent(), make_tokens()[:, :7]
    got = tldr.generate(agent, prompts, torch.rand(8, 6, dtype=torch.float64), [EOS], make_args(top_k=1))
    lm = merged(agent, "policy")
    for row in range(8):
        ids, response = prompts[row][prompts[row] != PAD], []
        for _ in range(6):
            response.append(int(lm(ids[None]).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor(response[-1:])])
            if response[-1] == EOS:
                break
        assert got[row].tolist() == response + [PAD] * (6 - len(response))


# --- posts and texts --------------------------------------------------------------------------------------------------


def test_encode_cuts_the_post_and_keeps_the_ending():
    args = make_args(max_prompt_length=12, response_length=7)
    ending = TOKENIZER("\nTL;DR:").input_ids
    assert len(ending) < 10
    posts = [
        ("a great film\nTL;DR: great film TL;DR:", "great"),
        ("a great film", " great "),
        (" ".join(["great"] * 40) + "\nTL;DR:", "great " * 9),
    ]
    prompts, references = tldr.encode(posts, TOKENIZER, args)
    ids = TOKENIZER("a great film").input_ids[: 12 - len(ending)] + ending
    assert prompts[0].tolist() == prompts[1].tolist() == [PAD] * (12 - len(ids)) + ids
    assert prompts[2].tolist() == TOKENIZER(" ".join(["great"] * 40)).input_ids[: 12 - len(ending)] + ending
    whole, _ = tldr.encode(posts[:2], TOKENIZER, make_args(max_prompt_length=40))  # nothing is cut but at TL;DR:
    ids = TOKENIZER("a great film").input_ids + ending
    assert whole[0].tolist() == whole[1].tolist() == [PAD] * (40 - len(ids)) + ids
    summary = [*TOKENIZER(" great").input_ids, EOS]
    assert references[0].tolist() == references[1].tolist() == summary + [PAD] * (7 - len(summary))
    assert references[2].tolist() == TOKENIZER(" " + "great " * 8 + "great").input_ids[:7]  # cut: no EOS


def test_posts_of_a_folder_and_of_a_file(assets, tmp_path):
    posts = tldr.load_texts(make_args(dataset=str(assets / "posts"), eval_episodes=8, test_episodes=8))
    assert {name: len(rows) for name, rows in posts.items()} == {"train": 40, "validation": 8, "test": 8}
    assert posts["validation"] == tldr_assets.posts(8, 100)
    lines = (assets / "posts/train.jsonl").read_text()
    (tmp_path / "posts.jsonl").write_text(lines)
    args = make_args(dataset=str(tmp_path / "posts.jsonl"), eval_episodes=4, test_episodes=4)
    split = tldr.load_texts(args)
    assert {name: len(rows) for name, rows in split.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(post for posts in split.values() for post in posts) == sorted(tldr_assets.posts(40, 0))
    assert tldr.load_texts(args) == split != tldr.load_texts(make_args(**{**vars(args), "seed": 2}))
    (tmp_path / "trl.jsonl").write_text(lines.replace('"label": ', '"completion": '))
    assert tldr.load_texts(make_args(**{**vars(args), "dataset": str(tmp_path / "trl.jsonl")})) == split


# --- losses -----------------------------------------------------------------------------------------------------------


def make_batch(agent, off=0.3, seed=0):
    """What an update takes; old log-probabilities a little off the policy's own, so that the clip cuts some."""
    torch.manual_seed(seed)
    tokens = make_tokens(seed=seed)
    real = tokens[:, 7:] != PAD
    batch = {"tokens": tokens, "references": make_tokens(seed=9)[:, 7:]}
    with torch.no_grad():
        for name, found in (("logprobs", agent(tokens, 7, 1.0)[0]), ("values", agent.values(tokens, 7))):
            batch[name] = torch.zeros(8, 6)
            batch[name][real] = found + off * torch.randn(len(found))
    return batch | {name: torch.randn(8, 6) * real for name in ("advantages", "returns")}


def gradient(agent, args, batch):
    """Of the policy's losses, alone; their sum and their statistics."""
    agent.zero_grad()
    inputs = (batch[name] for name in ("tokens", "logprobs", "advantages", "references"))
    loss, stats = tldr.policy_loss(agent, args, 1.0, 1.0, *inputs)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]).double(), loss, stats


def test_fact_2_through_the_adapter():
    """The gradient of SPPO is (alpha + beta |Z|) times PPO's."""
    agent = make_agent()
    batch = make_batch(agent)
    ppo, _, stats = gradient(agent, make_args(alpha=1.0, beta=0.0, reference_nll_coef=0.0), batch)
    sppo, _, _ = gradient(agent, make_args(alpha=0.5, beta=0.2, Z=-1.5, reference_nll_coef=0.0), batch)
    torch.testing.assert_close(sppo, (0.5 + 0.2 * 1.5) * ppo, atol=1e-6 * ppo.norm().item(), rtol=1e-4)
    assert ppo.norm() > 1e-3 and 0.1 < stats["losses/clipfrac"] < 0.9


def test_losses_by_hand():
    agent = make_agent()
    batch, args = make_batch(agent), make_args(ent_coef=0.03, vf_coef=0.1)
    _, loss, stats = gradient(agent, args, batch)
    value, value_stats = tldr.value_loss(agent, args, 1.0, batch["tokens"], batch["values"], batch["returns"])
    lm, values = merged(agent, "policy"), iter(agent.values(batch["tokens"], 7).tolist())
    ppo, rppo, squares, entropy, n = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(8):
        logprobs, _, whole = (x.detach() for x in by_hand(lm, batch["tokens"][i]))
        for t in range(len(logprobs)):
            p, old, a = (
                logprobs[t].exp().item(),
                batch["logprobs"][i, t].double().exp().item(),
                batch["advantages"][i, t].item(),
            )
            r = p / old
            cut = min(max(r, 0.8), 1.2)
            ppo -= min(a * r, a * cut)
            rppo += a * ((1 - p) / old - 1 / old) if a * r <= a * cut else 0  # without the constant, which has no gradient
            v, old_v, target = next(values), batch["values"][i, t].item(), batch["returns"][i, t].item()
            near = old_v + min(max(v - old_v, -0.2), 0.2)
            squares += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            entropy -= (whole[t].exp() * whole[t]).sum().item()
            n += 1
    rows = [torch.cat([batch["tokens"][i, :7], batch["references"][i]]) for i in range(8)]
    nll = np.mean([-x for row in rows for x in by_hand(lm, row)[0].tolist()])
    for name, expected in (
        ("policy_loss", ppo / n),
        ("reverse_loss", rppo / n),
        ("entropy", entropy / n),
        ("reference_nll", nll),
    ):
        assert stats[f"losses/{name}"].item() == pytest.approx(expected, rel=1e-4), name
    assert loss.item() == pytest.approx(0.5 * ppo / n + 0.2 * rppo / n - 0.03 * entropy / n + 0.1 * nll, rel=1e-4)
    assert value_stats["losses/value_loss"].item() == pytest.approx(squares / n, rel=1e-4)
    assert value.item() == pytest.approx(0.1 * squares / n, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_response_and_reference_behind_one_pass_of_the_prompt(family):
    """Losses and gradients are those of two passes. Rows of different length, one of them with a reference of one token."""
    agent, found = make_agent(family), []
    batch, args, widths = make_batch(agent), make_args(temperature=0.7, ent_coef=0.1), []
    batch["references"][2, 1:] = PAD
    agent.lm.get_base_model().base_model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    for shares in (False, True):
        agent.shares_prompts = shares
        found.append(gradient(agent, args, batch))
    assert widths == [13, 7, 6]
    (one, loss, stats), (other, other_loss, other_stats) = found
    torch.testing.assert_close(one, other, atol=1e-6 * one.norm().item(), rtol=1e-4)
    torch.testing.assert_close([loss, *stats.values()], [other_loss, *other_stats.values()], atol=1e-6, rtol=1e-5)


def test_which_models_share_a_pass_of_the_prompt(assets, tmp_path):
    """Not with checkpointing, which keeps no cache; not Jamba, whose state-space layers go on with single tokens alone."""
    paths = {name: str(assets / "policy") for name in ("policy", "tokenizer", "reward_base")}
    args = make_args(**paths, reward_adapter=str(assets / "reward"), reward_max_length=40, max_prompt_length=20)
    assert not tldr.load_models(args, CPU)[0].shares_prompts
    args = tldr.replace(args, gradient_checkpointing=False)
    assert tldr.load_models(args, CPU)[0].shares_prompts
    jamba = transformers.JambaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.3, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, eos_token_id=0,
    )  # fmt: skip
    transformers.JambaForCausalLM(jamba).save_pretrained(tmp_path / "jamba")
    args = tldr.replace(args, policy=str(tmp_path / "jamba"), lora_target_modules="q_proj,o_proj")
    assert not tldr.load_models(args, CPU)[0].shares_prompts


def test_shares_of_the_gradient_are_of_the_two_adapters():
    agent = make_agent()
    trained = tldr.trained_parameters(agent)
    args, batch = make_args(update_epochs=1, minibatch_size=8, max_grad_norm=1e9), make_batch(agent)
    stats = tldr.update(agent, torch.optim.SGD(trained.values(), lr=0.0), Accelerator(cpu=True), args, batch, 0)
    squares = {True: 0.0, False: 0.0}
    for name, parameter in trained.items():
        squares[".policy." in name] += parameter.grad.square().sum().item()
    total = sum(squares.values())
    assert min(squares.values()) > 1e-6 * total
    assert stats["losses/grad_share_policy"] == pytest.approx(squares[True] / total, rel=1e-4)
    assert stats["losses/grad_share_value"] == pytest.approx(squares[False] / total, rel=1e-4)
    assert stats["losses/grad_norm"] == pytest.approx(total**0.5, rel=1e-4) and stats["losses/grad_clipped"] == 0.0


@pytest.mark.parametrize("parts", [2, 4])
def test_an_update_does_not_depend_on_how_its_minibatches_are_cut(parts):
    weights = []
    for accumulation in (1, parts):
        agent = make_agent()
        trained = tldr.trained_parameters(agent)
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)  # unlike Adam it shows the gradient's size
        args = make_args(gradient_accumulation=accumulation, update_epochs=2, max_grad_norm=100.0)
        stats = tldr.update(agent, optimizer, Accelerator(cpu=True), args, make_batch(agent), 0)
        weights.append((torch.cat([parameter.detach().flatten() for parameter in trained.values()]), stats))
    (one, stats), (other, other_stats) = weights
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for name, value in stats.items():
        assert other_stats[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_dropout_is_on_in_updates_alone_and_follows_the_seed():
    """The base has its own dropout in its configuration, which loading switches off."""
    agent, tokens = make_agent(dropout=0.5), make_tokens()
    assert torch.equal(agent(tokens, 7, 1.0)[0], agent(tokens, 7, 1.0)[0])
    batch, results = make_batch(agent), []
    for iteration in (0, 0, 1):
        copied = copy.deepcopy(agent)
        trained = tldr.trained_parameters(copied)
        tldr.update(copied, torch.optim.SGD(trained.values(), lr=0.1), Accelerator(cpu=True), make_args(), batch, iteration)
        results.append(torch.cat([parameter.detach().flatten() for parameter in trained.values()]))
        assert not copied.training
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    for module in agent.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = tldr.trained_parameters(agent)
    tldr.update(agent, torch.optim.SGD(trained.values(), lr=0.1), Accelerator(cpu=True), make_args(), batch, 0)
    without = torch.cat([parameter.detach().flatten() for parameter in trained.values()])
    assert (without - results[0]).abs().max() > 1e-4  # the masks alone make the difference


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_of_the_base_is_off_in_updates(family, checkpointing, tmp_path):
    """Dropout in a configuration, or a router's noise: the first ratio of an update is 1 wherever --lora-dropout is 0."""
    torch.manual_seed(0)
    common = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    lm = {
        "gpt2": lambda: rlhf_assets.make_lm(V, dropout=0.5),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **common, intermediate_size=64, num_key_value_heads=1, num_local_experts=4, initializer_range=0.3,
                router_jitter_noise=0.5, attention_dropout=0.5,
            )
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**common, ffn_dim=64, dropout=0.5, attention_dropout=0.5, init_std=0.3)
        ),
    }[family]()  # fmt: skip
    lm.save_pretrained(tmp_path)
    lm = tldr.load_lm(make_args(policy=str(tmp_path)), "policy", CPU)
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    agent = Agent(lm)
    for name in ("policy", "value"):
        targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
        agent.add(name, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2"), head=name == "value")
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    batch, trained = make_batch(agent.eval(), off=0.0), tldr.trained_parameters(agent)
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    stats = tldr.update(agent, optimizer, Accelerator(cpu=True), make_args(update_epochs=1), batch, 0)
    assert abs(stats["losses/approx_kl"]) < 1e-9 and stats["losses/clipfrac"] == 0


def test_the_first_minibatch_has_ratio_one_and_new_adapters_kl_zero():
    agent, args = make_agent(reward=True), make_args(temperature=0.7)
    prompts, uniforms = make_tokens()[:, :7], torch.rand(8, 6, dtype=torch.float64)
    batch, clock = tldr.rollout(agent, agent, TOKENIZER, prompts, uniforms, args, Accelerator(cpu=True))
    assert set(clock) == {"time/generate", "time/score", "time/forward"}
    rows = (batch["tokens"][2:6], batch["logprobs"][2:6], torch.zeros(4, 6), make_tokens(4)[:, 7:])
    _, stats = tldr.policy_loss(agent, args, 1.0, 1.0, *rows)
    assert abs(stats["losses/old_approx_kl"]) < 1e-6 and stats["losses/clipfrac"] == 0
    policy, base, value = merged(agent, "policy"), agent.lm.get_base_model(), merged(agent, "value")
    agent.activate(None)
    for row in range(8):
        n = len(by_hand(policy, batch["tokens"][row])[0])
        for name, lm in (("logprobs", policy), ("ref_logprobs", base)):
            expected = by_hand(lm, batch["tokens"][row], 0.7)[0]
            torch.testing.assert_close(batch[name][row, :n].double(), expected, atol=1e-5, rtol=1e-5)
            assert (batch[name][row, n:] == 0).all()
        values = agent.heads["value"](by_hand(value, batch["tokens"][row])[1]).squeeze(-1)
        torch.testing.assert_close(batch["values"][row, :n], values, atol=1e-4, rtol=1e-4)
    fresh = Agent(make_lm().requires_grad_(False))
    for name in ("policy", "value"):
        fresh.add(name, LoraConfig(r=2, fan_in_fan_out=True), head=name == "value")
    tldr_assets.add_reward(fresh)
    batch, _ = tldr.rollout(fresh.eval(), fresh, TOKENIZER, prompts, uniforms, args, Accelerator(cpu=True))
    assert torch.equal(batch["logprobs"], batch["ref_logprobs"]) and (batch["values"] == 0).all()


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_by_hand():
    """Perplexity on the references and their ROUGE, the latter by counting words."""
    agent = make_agent(reward=True)
    args = make_args(max_prompt_length=20, response_length=6, trajectories_per_update=4)
    posts = tldr_assets.posts(12, 0)
    result, samples = tldr.evaluate(agent, agent, TOKENIZER, posts, args, Accelerator(cpu=True))
    prompts, references = tldr.encode(posts, TOKENIZER, args)
    lm, losses = merged(agent, "policy"), []
    for prompt, reference in zip(prompts, references, strict=True):
        ids = torch.cat([prompt[prompt != PAD], reference[reference != PAD]])
        start = (prompt != PAD).sum()
        logprobs = F.log_softmax(lm(ids[None]).logits[0], -1)
        losses += [-logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))]
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    # as in the paper's Table 3: the references alone, two newlines between them, in windows of 64 that move by 32
    ids = torch.tensor(TOKENIZER("\n\n".join(label for _, label in posts)).input_ids)
    assert len(ids) > 64
    losses = []
    for end in range(33, len(ids) + 32, 32):
        start, end = max(0, min(end, len(ids)) - 64), min(end, len(ids))
        logprobs = F.log_softmax(lm(ids[None, start:end]).logits[0], -1)
        losses += [-logprobs[t - start - 1, ids[t]].item() for t in range(1 + len(losses), end)]
    assert len(losses) == len(ids) - 1
    assert result["perplexity_released"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert [sample["reference"] for sample in samples] == [label for _, label in posts]
    assert result["score"] == pytest.approx(np.mean([sample["score"] for sample in samples]), rel=1e-5)
    assert result["words"] == np.mean([len(sample["response"].split()) for sample in samples])
    for name in ("rouge1", "rouge2", "rougeL"):
        assert result[name] == pytest.approx(np.mean([sample[name] for sample in samples]))


def test_rouge_is_the_f_measure_of_stemmed_words(monkeypatch):
    agent, args = make_agent(reward=True), make_args(max_prompt_length=20)
    monkeypatch.setattr(tldr, "decode", lambda tokens, _: ["Great films, the best!"] * len(tokens))
    posts = [("a film", "the great film"), ("a film", "an awful plot")]
    _, samples = tldr.evaluate(agent, agent, TOKENIZER, posts, args, Accelerator(cpu=True))
    # great, film, the of 4 and 3 words; "great film" of 3 and 2 pairs; the longest common subsequence is "great film"
    assert samples[0]["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))
    assert samples[0]["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert samples[0]["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert samples[1]["rouge1"] == samples[1]["rougeL"] == 0


@pytest.mark.parametrize("text", ["Хороший фильм, лучший актёр", "很好看的电影", "A café, naïve films"])
def test_rouge_knows_other_alphabets(text):
    scorer = tldr.RougeScorer(["rouge1", "rougeL"], tokenizer=tldr.RougeWords(use_stemmer=True))
    assert {name: found.fmeasure for name, found in scorer.score(text, text).items()} == {"rouge1": 1.0, "rougeL": 1.0}
    assert scorer.score(text, "word")["rouge1"].fmeasure == 0
    half = scorer.score(text, text[: len(text) // 2])["rouge1"].fmeasure
    assert 0 < half < 1
    plain = tldr.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for one, other in zip(rlhf_assets.reviews(6), rlhf_assets.reviews(12)[6:], strict=True):
        assert scorer.score(one, f"{other}_x2!") == plain.score(one, f"{other}_x2!")
