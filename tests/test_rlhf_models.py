"""Models, tokenizers and data that the RLHF scripts accept give right numbers; all others are refused with the reason."""

import json
import shutil
from functools import partial

import numpy as np
import peft
import pytest
import rlhf_assets
import tldr_assets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sppo_rlhf_imdb as imdb
import sppo_rlhf_tldr as tldr

TOKENIZER = rlhf_assets.make_tokenizer()
V, CPU = len(TOKENIZER), torch.device("cpu")
SIZE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 0}
each_script = pytest.mark.parametrize("script", [imdb, tldr], ids=["imdb", "tldr"])


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tldr_assets.write_assets(tmp_path_factory.mktemp("assets"))
    save(rlhf_assets.make_classifier(V), folder / "classifier")
    return folder


def make_args(script, assets, **changed):
    paths = {"policy": "policy", "tokenizer": "policy"}
    paths |= {"reward_model": "classifier", "dataset": "reviews.jsonl"} if script is imdb else {}
    paths |= {"reward_base": "policy", "reward_adapter": "reward", "dataset": "posts"} if script is tldr else {}
    own = {"max_prompt_length": 10, "min_response_length": 0, "reward_label": "1"}
    if script is tldr:
        own = {"max_prompt_length": 20, "reward_max_length": 40, "dtype": "float32", "lora_r": 2, "test_episodes": 8}
    own |= {"response_length": 6, "top_k": 0, "eval_episodes": 8, "trajectories_per_update": 8, "minibatch_size": 4}
    return script.Args(**{name: str(assets / path) for name, path in paths.items()} | own | changed)


def load(script, assets, **changed):
    return script.load_models(make_args(script, assets, **changed), CPU)


def refused(call, *args, **kwargs):
    """What it says."""
    with pytest.raises((imdb.BadInput, tldr.BadInput)) as error:
        call(*args, **kwargs)
    return str(error.value)


def save(model, folder, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def change_config(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changed).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def llama(**changed):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changed)).eval()


def backbone(script, lm):
    return partial(script.Agent(lm).backbone, **({"adapter": None} if script is tldr else {}))


# --- policies ---------------------------------------------------------------------------------------------------------


@each_script
def test_an_adapter_is_no_model(script, assets, tmp_path):
    """transformers would load its base with the adapter frozen on it, and nothing would learn."""
    base = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy")
    save(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)), tmp_path / "adapter")
    for name in ("policy", "reward_model"):
        err = refused(load, script, assets, **{name: str(tmp_path / "adapter")})
        assert err.startswith(f"--{name.replace('_', '-')} {tmp_path}/adapter: an adapter; merge it into its base first")


@each_script
def test_heads_are_as_wide_as_the_hidden_states(script, assets, tmp_path):
    """OPT-350m projects its last hidden states to another width than hidden_size."""
    config = transformers.OPTConfig(
        vocab_size=V, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, do_layer_norm_before=False, init_std=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    agent = load(script, assets, policy=save(transformers.OPTForCausalLM(config), tmp_path / "opt"))[0]
    assert (agent.value_head if script is imdb else agent.heads["value"]).weight.shape == (1, 16)


def no_cache():
    config = transformers.OpenAIGPTConfig(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return transformers.OpenAIGPTLMHeadModel(config)


def no_mask():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.max_position_embeddings = 64
    return transformers.MambaForCausalLM(config)


@each_script
@pytest.mark.parametrize("make", [no_cache, no_mask])
def test_models_without_cache_or_mask_are_refused(script, make, assets, tmp_path):
    assert "--policy" in refused(load, script, assets, policy=save(make(), tmp_path / "model"))


class IgnoresMask(transformers.LlamaForCausalLM):
    """What a model does that takes the arguments and ignores them."""

    ignored = ("attention_mask", "position_ids")

    def __init__(self, config):
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k not in self.ignored})


class IgnoresCache(IgnoresMask):
    ignored = ("past_key_values", "use_cache")


class DoublesCached(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        forward = self.model.forward

        def wrong(**inputs):
            out = forward(**inputs)
            if inputs.get("past_key_values") is not None and inputs["input_ids"].shape[1] == 1:
                out.last_hidden_state = out.last_hidden_state * 1.5
            return out

        self.model.forward = wrong


@each_script
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (IgnoresMask, "padding on the left changes its numbers"),
        (DoublesCached, "a cache of keys and values changes its numbers"),
        (IgnoresCache, "a cache of keys and values changes its numbers"),
    ],
)
def test_models_that_ignore_what_they_are_told_are_refused(script, kind, reason):
    for dtype in (torch.float32, torch.bfloat16):
        lm = kind(transformers.LlamaConfig(**LLAMA)).eval().to(dtype)
        assert f"({reason})" in refused(script.check_lm, script.Args(), "policy", lm, backbone(script, lm), 20)


@each_script
@pytest.mark.parametrize("length", [20, 60])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_switch_with_the_length_are_refused_where_it_is_reached(script, kind, length):
    """Behind 32 tokens a row's positions are those of the longest row in its batch."""
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    else:
        scaling |= {"original_max_position_embeddings": 32}
    lm = llama(rope_parameters=scaling, max_position_embeddings=32 if kind == "dynamic" else 128)
    check = partial(script.check_lm, script.Args(), "policy", lm, backbone(script, lm), length)
    if length == 20:
        check()
    else:
        assert "padding on the left changes its numbers" in refused(check)


@each_script
def test_a_right_model_passes_where_a_gpu_multiplies_in_tf32(script, monkeypatch):
    """TF32 keeps 10 bits behind the point, and which products use it depends on their size: here, on five rows or more."""
    linear, rounded = F.linear, []

    def tf32(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    def rounding(x, weight, bias=None):
        if x.shape[-2] < 5:
            return linear(x, weight, bias)
        rounded.append(x)
        return linear(tf32(x), tf32(weight), bias)

    lm = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, initializer_range=0.1)
    monkeypatch.setattr(F, "linear", rounding)
    script.check_lm(script.Args(), "policy", lm, backbone(script, lm), 60)
    assert rounded


@each_script
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt", "neox", "phi3"])
def test_right_models_pass_in_both_precisions(script, family):
    spread = {"initializer_range": 0.3}
    small = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2}
    opt = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = {
        "gpt2": lambda: rlhf_assets.make_lm(V),
        "llama": lambda: llama(num_hidden_layers=12, hidden_size=64),
        "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**small, rotary_dim=8, n_positions=64, **spread)),
        "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=V, hidden_size=32, **opt, init_std=0.3)),
        "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE, **spread)),
        "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, pad_token_id=1)),
    }[family]()
    for dtype in (torch.float32, torch.bfloat16):
        lm = lm.eval().to(dtype)
        script.check_lm(script.Args(), "policy", lm, backbone(script, lm), 50)


# --- adapters ---------------------------------------------------------------------------------------------------------


@each_script
def test_layers_of_adapters(script, assets, tmp_path):
    """Families that peft has no table for; names that a model lacks; the embedding and the head, which may be one weight."""
    phi3 = save(transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, pad_token_id=1)), tmp_path / "phi3")
    own = {"policy": phi3, "lora_r": 2}
    agent = load(script, assets, **own)[0]
    names = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in agent.named_parameters() if "lora_A" in name}
    assert {"qkv_proj", "o_proj"} <= names
    agent = load(script, assets, **own, lora_target_modules="o_proj,down_proj")[0]
    names = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in script.trained_parameters(agent) if "lora_A" in name}
    assert names == {"o_proj", "down_proj"}
    assert refused(load, script, assets, **own, lora_target_modules="nothing").startswith("--lora-target-modules nothing: ")
    for target, named in (("wte", "transformer.wte"), ("c_attn,lm_head", "lm_head")):
        err = refused(load, script, assets, lora_r=2, lora_target_modules=target)
        assert f"--lora-target-modules {target}: expected layers that adapters can train, unlike " in err and named in err


class Read(torch.nn.Linear):
    """Jamba's dt_proj: the model multiplies by its weight and never calls it."""


class Tuple(torch.nn.Linear):
    """A router that returns more than one thing."""

    def forward(self, x):
        return super().forward(x), x


@each_script
@pytest.mark.parametrize("kind", [Read, Tuple])
@pytest.mark.parametrize("targets", ["all-linear", ["gate"]])
def test_layers_that_no_gradient_comes_to_are_named(script, kind, targets):
    lm = llama()
    mlp = lm.model.layers[0].mlp
    mlp.gate = kind(32, 32, bias=False)
    forward = mlp.forward
    mlp.forward = lambda x: forward(F.linear(x, mlp.gate.weight) if kind is Read else mlp.gate(x)[0])
    if script is imdb:
        agent = imdb.Agent(lm, 2, lora_targets=targets)
        losses = [lambda: agent(torch.arange(8).view(2, 4), 2, 1.0)[0].sum()]
    else:
        agent = tldr.Agent(lm)
        for name in ("policy", "value"):
            agent.add(name, peft.LoraConfig(r=2, target_modules=targets), head=name == "value")
        tokens = torch.arange(8).view(2, 4)
        losses = [lambda: agent(tokens, 2, 1.0)[0].sum(), lambda: agent.values(tokens, 2).sum()]
    args = script.Args(lora_r=2)
    err = refused(script.check_gradients, args, agent, lm, *losses)
    assert "layers.0.mlp.gate" in err and err.count("mlp") == 1, err


def test_a_shared_base_is_checked_at_the_lengths_of_both(assets, monkeypatch):
    lengths = []
    monkeypatch.setattr(tldr, "check_lm", lambda *given: lengths.append(given[-1]))
    args = make_args(tldr, assets)
    tldr.load_models(args, CPU)
    assert set(lengths) == {args.max_prompt_length + args.response_length, args.reward_max_length} and len(set(lengths)) == 2


@pytest.mark.parametrize("kind", ["pissa", "lora_only", "all"])
def test_a_reward_adapter_that_changes_its_base_is_refused_on_the_policys(kind, assets, tmp_path):
    """On a base of its own it is taken."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(assets / "policy", num_labels=1, pad_token_id=1)
    own = {"init_lora_weights": "pissa"} if kind == "pissa" else {"bias": kind}
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True, **own)
    adapter = peft.get_peft_model(base, config)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name or "c_attn.base_layer.bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(tmp_path / "reward")
    err = refused(load, tldr, assets, reward_adapter=str(tmp_path / "reward"))
    assert "it changes its base, which is the policy's" in err
    shutil.copytree(assets / "policy", tmp_path / "copy")
    args = make_args(tldr, assets, reward_adapter=str(tmp_path / "reward"), reward_base=str(tmp_path / "copy"))
    agent, reward, tokenizer = tldr.load_models(args, CPU)
    known = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy")
    ids = torch.arange(20, 40)[None]
    agent.activate(None)
    torch.testing.assert_close(agent.lm.get_base_model()(ids).logits, known(ids).logits)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(assets / "policy", num_labels=1, pad_token_id=1)
    whole = peft.PeftModel.from_pretrained(whole, tmp_path / "reward").eval()
    with torch.no_grad():
        scores = tldr.score(["a great film", "an awful movie"], reward, tokenizer, args)
        ids = [
            TOKENIZER(f"<|startoftext|>{text}<|endoftext|>", return_tensors="pt").input_ids
            for text in ("a great film", "an awful movie")
        ]
        torch.testing.assert_close(scores, torch.cat([whole(row).logits[0] for row in ids]), atol=1e-4, rtol=1e-4)


def test_lora_of_imdb_has_alpha_twice_its_rank():
    agent = imdb.Agent(rlhf_assets.make_lm(V), 4)
    scalings = {m.scaling["default"] for m in agent.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scalings == {2.0}


# --- tokenizers -------------------------------------------------------------------------------------------------------


def other_tokenizer():
    """The same tokens, with other ids."""
    data = json.loads(TOKENIZER.backend_tokenizer.to_str())
    names = {name: (number - 50) % (V - 2) + 2 if number > 1 else number for name, number in data["model"]["vocab"].items()}
    data["model"]["vocab"] = names
    backend = Tokenizer.from_str(json.dumps(data))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="[PAD]")


@each_script
def test_a_tokenizer_that_is_not_the_models_is_refused(script, assets, tmp_path):
    """As many tokens, and other ids; or one id beyond the vocabulary. A model without a tokenizer takes what is given."""
    other_tokenizer().save_pretrained(tmp_path / "other")
    assert "its own one gives words other ids" in refused(load, script, assets, tokenizer=str(tmp_path / "other"))
    shutil.copytree(assets / "policy", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    load(script, assets, policy=str(tmp_path / "bare"), **({"reward_base": str(tmp_path / "bare")} if script is tldr else {}))
    data = json.loads(TOKENIZER.backend_tokenizer.to_str())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = 5000
    beyond = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>", pad_token="[PAD]"
    )
    assert len(beyond) == V
    beyond.save_pretrained(tmp_path / "beyond")
    assert f"it has {V} tokens, and the largest id is 5000" in refused(load, script, assets, tokenizer=str(tmp_path / "beyond"))
    if script is imdb:
        folder = save(rlhf_assets.make_classifier(V), tmp_path / "classifier", beyond)
        assert f"--reward-model {folder}: " in refused(load, script, assets, reward_model=folder)
    else:
        model = reward_models()["gpt2"]()
        folder = save(model, tmp_path / "reward", other_tokenizer())
        assert (
            f"--reward-model {folder}: " in (err := refused(load, script, assets, reward_model=folder)) and "other ids" in err
        )
    shutil.copytree(assets / "policy", tmp_path / "no_eos")
    path = tmp_path / "no_eos/tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}))
    assert "an EOS token" in refused(load, script, assets, tokenizer=str(tmp_path / "no_eos"))


@each_script
def test_every_end_token_of_the_generation_configuration_ends_a_text(script):
    lm = rlhf_assets.make_lm(V, dropout=0.0)
    assert script.end_tokens(lm, TOKENIZER) == [0]
    lm.generation_config.eos_token_id = [7, 9, 5000]
    ends = script.end_tokens(lm, TOKENIZER)
    assert ends == [0, 7, 9]
    agent = script.Agent(lm)
    if script is tldr:
        agent.add("policy", peft.LoraConfig(r=2, fan_in_fan_out=True), head=False)
        assert script.end_tokens(agent.lm, TOKENIZER) == ends
    with torch.no_grad():
        lm.transformer.ln_f.weight.zero_()  # the same logits everywhere: 9 is the likeliest
        lm.transformer.ln_f.bias.copy_(lm.lm_head.weight[9] * 100)
    args = script.Args(response_length=6, min_response_length=2, top_k=1)
    got = script.generate(agent, torch.full((3, 4), 20), torch.zeros(3, 6, dtype=torch.float64), ends, args)
    assert (got[:, 2] == 9).all() and (got[:, 3:] == script.PAD).all() and not torch.isin(got[:, :2], torch.tensor(ends)).any()


def metaspace_tokenizer():
    """Llama's kind: a text of its own begins with a space, which a text behind another does not get."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    characters = list("abcdefghijklmnopqrstuvwxyz.\nTLDR;: ▁<>|/")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["</s>", "<unk>"], initial_alphabet=characters)
    tokenizer.train_from_iterator([*rlhf_assets.reviews(), "\nTL;DR:"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("make", [rlhf_assets.make_tokenizer, metaspace_tokenizer], ids=["gpt2", "llama"])
def test_prompt_and_reference_have_the_tokens_of_the_joint_text(make):
    tokenizer = make()
    post, summary = "a great film with a wonderful cast", "a great cast"
    args = tldr.Args(max_prompt_length=200, response_length=40)
    prompts, references = tldr.encode([(f"{post}\nTL;DR: something", f" {summary} ")], tokenizer, args)
    joint = tokenizer(f"{post}\nTL;DR: {summary}", add_special_tokens=False).input_ids
    found = [token for token in [*prompts[0].tolist(), *references[0].tolist()] if token != tldr.PAD]
    assert found == [*joint, tokenizer.eos_token_id]
    text = "a great film with a wonderful cast and the best story."
    prompts, references = imdb.encode([text], tokenizer, imdb.Args(max_prompt_length=200, response_length=60))
    found = [token for token in [*prompts[0].tolist(), *references[0].tolist()] if token != imdb.PAD]
    assert found == [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if make is metaspace_tokenizer:  # apart, this one gives other tokens
        assert [*tokenizer("a film").input_ids, *tokenizer("\nTL;DR:").input_ids] != tokenizer("a film\nTL;DR:").input_ids


@pytest.mark.parametrize("make", [rlhf_assets.make_tokenizer, metaspace_tokenizer], ids=["gpt2", "llama"])
def test_special_tokens_in_texts_are_text(make, assets):
    tokenizer = make()
    eos, end = tokenizer.eos_token, tokenizer.eos_token_id
    text = f"a great {eos} film"
    prompts, references = tldr.encode([(text, f"a {eos} film")], tokenizer, tldr.Args(max_prompt_length=80, response_length=40))
    assert end not in prompts and (references == end).sum() == 1
    assert tldr.decode(prompts, tokenizer)[0].strip() == f"{text}\nTL;DR:"
    prompts, references = imdb.encode([text * 2], tokenizer, imdb.Args(max_prompt_length=80, response_length=60))
    assert end not in prompts and (references == end).sum() == 1
    args = tldr.Args(reward_text=f"{{text}}{eos}", reward_max_length=90)
    one, other = tldr.reward_tokens([text, "a great film"], tokenizer, args)
    assert (
        one[-1] == end and end not in one[:-1] and other == tokenizer(f"a great film{eos}", add_special_tokens=False).input_ids
    )
    assert tokenizer.decode(one[:-1]) == text
    if make is rlhf_assets.make_tokenizer:  # the classifier reads it as text, too
        *_, reward, _ = load(imdb, assets)
        ids = torch.tensor([tokenizer(text, split_special_tokens=True).input_ids])
        assert end not in ids
        found = imdb.score([text], *reward, imdb.Args()).item()
        assert found == pytest.approx(reward[0](ids).logits.softmax(-1)[0, 1].item(), abs=1e-5)


def test_a_post_may_begin_with_the_heading():
    for post, expected in (
        ("TL;DR: I lost my job.\nWhat now?\nTL;DR:", "TL;DR: I lost my job.\nWhat now?"),
        ("  TL;DR: I lost my job. ", "TL;DR: I lost my job."),
        ("a post TL;DR: its end TL;DR: twice", "a post"),
        ("", ""),
    ):
        assert tldr.without_heading(post) == expected


# --- classifiers ------------------------------------------------------------------------------------------------------


def score_alone(folder, text, label=1):
    """By transformers' own pipeline."""
    pipe = transformers.pipeline("text-classification", model=str(folder), tokenizer=str(folder), top_k=None)
    names = pipe.model.config.id2label
    return {row["label"]: row["score"] for row in pipe([text])[0]}[names[label]]


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_scores_are_the_classifiers_own_alone_and_in_a_batch(family, side, problem, assets, tmp_path):
    """Another pad_token_id in the classifier's configuration than its tokenizer's, or padding on the left; two kinds."""
    torch.manual_seed(2)
    if family == "gpt2":
        size = {"vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(**size, num_labels=2, pad_token_id=7, initializer_range=0.5)
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        model = rlhf_assets.make_classifier(V)
        model.config.pad_token_id = 7
    model.config.problem_type = problem
    tokenizer = rlhf_assets.make_tokenizer()
    tokenizer.padding_side = side
    save(model, tmp_path / "reward", tokenizer)
    args = make_args(imdb, assets, reward_model=str(tmp_path / "reward"))
    *_, reward, _ = imdb.load_models(args, CPU)
    texts = ["a great film", "an awful movie with a terrible plot and i have seen many this year", "film"]
    scores = imdb.score(texts, *reward, args).tolist()
    assert scores == pytest.approx([score_alone(tmp_path / "reward", text) for text in texts], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_imdb_learns_and_scores_in_float32_however_the_weights_are_stored(dtype, assets, tmp_path):
    policy = save(rlhf_assets.make_lm(V).to(dtype), tmp_path / "policy")
    classifier = save(rlhf_assets.make_classifier(V).to(dtype), tmp_path / "classifier")
    assert {weight.dtype for weight in load_file(tmp_path / "policy/model.safetensors").values()} == {dtype}
    agent, reference, (reward_model, *_), _ = load(imdb, assets, policy=policy, reward_model=classifier)
    weights = [*agent.parameters(), *reference.parameters(), *reward_model.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_long_texts_fit_a_classifier_of_robertas_kind(assets, tmp_path):
    """Its positions begin behind the padding token's number; its tokenizer names no limit."""
    config = transformers.RobertaConfig(
        **{**SIZE, "num_hidden_layers": 1}, max_position_embeddings=34, pad_token_id=1, num_labels=2, initializer_range=0.5
    )
    tokenizer = rlhf_assets.make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    folder = save(transformers.RobertaForSequenceClassification(config), tmp_path / "reward", tokenizer)
    args = make_args(imdb, assets, reward_model=folder)
    *_, reward, _ = imdb.load_models(args, CPU)
    assert reward[1].model_max_length == 32
    text = " ".join(["a great film"] * 100)
    end = TOKENIZER.decode(TOKENIZER(text).input_ids[-32:])
    assert len(TOKENIZER(end).input_ids) == 32
    assert imdb.score([text], *reward, args).item() == pytest.approx(score_alone(folder, end), abs=1e-5)


def test_id2label_decides(assets, tmp_path):
    folder = tmp_path / "reward"
    save(rlhf_assets.make_classifier(V), folder)
    for own in (..., None, {"bad": "0", "good": "1"}, {"bad": 1, "good": 0}):  # the last contradicts it
        change_config(folder, id2label={"0": "bad", "1": "good"}, label2id=own)
        for label, number in (("good", 1), ("bad", 0), ("1", 1)):
            *_, (_, _, found), _ = load(imdb, assets, reward_model=str(folder), reward_label=label)
            assert found == number, own


def test_classifiers_that_would_score_wrongly_are_refused(assets, tmp_path):
    """Missing tokenizer files (every word would be [UNK]), another head, an encoder-decoder, a regression."""
    config = transformers.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bare")
    assert "this tokenizer tells no words apart" in refused(load, imdb, assets, reward_model=str(tmp_path / "bare"))
    folder = tmp_path / "reward"
    save(rlhf_assets.make_classifier(V), folder)
    change_config(folder, problem_type="regression")
    assert "expected a classifier with two labels or more" in refused(load, imdb, assets, reward_model=str(folder))
    change_config(folder, id2label={str(i): f"label {i}" for i in range(3)}, label2id={f"label {i}": i for i in range(3)})
    assert f"--reward-model {folder}: RuntimeError" in refused(load, imdb, assets, reward_model=str(folder))
    t5 = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, num_labels=2, decoder_start_token_id=1,
        pad_token_id=1, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    t5 = save(transformers.T5ForSequenceClassification(t5), tmp_path / "t5")
    assert "an encoder or a causal model, not both in one" in refused(load, imdb, assets, reward_model=t5)


# --- whole reward models of TL;DR -------------------------------------------------------------------------------------


def reward_models(pad_token_id=None):
    """Sequence classifiers of one label. TRL's RewardTrainer saves such, with EOS as pad_token_id if there is no other."""
    own, kinds = {"initializer_range": 0.3, "num_labels": 1, "pad_token_id": pad_token_id}, transformers
    spread, small = {"max_position_embeddings": 64, **own}, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, **own}
    return {
        "gpt2": lambda: kinds.GPT2ForSequenceClassification(kinds.GPT2Config(vocab_size=V, **small)),
        "gptj": lambda: kinds.GPTJForSequenceClassification(kinds.GPTJConfig(vocab_size=V, rotary_dim=8, **small)),
        "llama": lambda: kinds.LlamaForSequenceClassification(kinds.LlamaConfig(**SIZE, **spread)),
        "neox": lambda: kinds.GPTNeoXForSequenceClassification(kinds.GPTNeoXConfig(**SIZE, **spread)),
    }


@pytest.mark.parametrize(("pad_token_id", "ending"), [(None, "<|endoftext|>"), (0, "")])  # 0 is EOS
@pytest.mark.parametrize("family", reward_models())
def test_a_whole_reward_model_scores_as_by_itself(family, pad_token_id, ending, assets, tmp_path):
    """Texts of several lengths in one batch against transformers' own classifier, which reads each alone, EOS included."""
    folder = save(reward_models(pad_token_id)[family](), tmp_path / family)
    texts = ["a great film", "an awful movie with a terrible plot and a worse end", "good"]
    with torch.no_grad():
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        alone = [whole(TOKENIZER(text + "<|endoftext|>", return_tensors="pt").input_ids).logits.item() for text in texts]
    assert np.std(alone) > 0.05
    for dtype, room in (("float32", 1e-4), ("bfloat16", 0.5 * np.std(alone))):
        args = make_args(tldr, assets, reward_model=folder, dtype=dtype, reward_text="{text}" + ending)
        agent, reward, _ = tldr.load_models(args, CPU)
        assert reward is not agent and not any(parameter.requires_grad for parameter in reward.parameters())
        with torch.no_grad():
            assert tldr.score(texts, reward, TOKENIZER, args).tolist() == pytest.approx(alone, abs=room)
    if not ending:  # here the classifier skips an EOS, which is its padding; the script would read it
        err = refused(tldr.load_models, tldr.replace(args, reward_text="{text}<|endoftext|>"), CPU)
        assert "--reward-text {text}<|endoftext|>: expected one that does not end in the reward model's padding token" in err


def test_reward_models_that_would_score_wrongly_are_refused(assets, tmp_path):
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": V}
    two = save(transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**config, num_labels=2)), tmp_path / "two")
    bert = transformers.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    bert = save(transformers.BertForSequenceClassification(bert), tmp_path / "bert")
    for folder in (two, bert):
        err = refused(load, tldr, assets, reward_model=folder)
        assert f"--reward-model {folder}: expected a causal model with a head `score` of one label, which is its reward" in err
    err = refused(load, tldr, assets, reward_model=str(assets / "policy"))
    assert "expected a model with all its weights; score.weight are missing" in err
    config = transformers.GPT2Config(**{**config, "n_positions": 39}, num_labels=1)
    short = save(transformers.GPT2ForSequenceClassification(config), tmp_path / "short")
    err = refused(load, tldr, assets, reward_model=short)
    assert f"--reward-max-length 40: expected 39 or less, the context of {short}" in err
    llama = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"film": 0}, unk_token="film")))
    err = refused(tldr.load_reward, make_args(tldr, assets), None, llama, CPU)  # it would split <|endoftext|> and score a part
    assert "expected the special tokens of --tokenizer, which has no <|endoftext|>" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [("position_ids",), ("position_ids", "attention_mask")], ids=["positions", "mask"])
def test_a_whole_reward_model_that_padding_changes_is_refused(dropped, dtype, assets, tmp_path, monkeypatch):
    """As a model would that counts positions from the padding, or reads it."""
    args = make_args(tldr, assets, reward_model=save(reward_models()["gpt2"](), tmp_path / "gpt2"), dtype=dtype)
    lm = tldr.load_lm(args, "reward_model", CPU)
    tldr.use_own_head(args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
    forward = lm.transformer.forward
    monkeypatch.setattr(lm.transformer, "forward", lambda *own, **rest: forward(*own, **rest | dict.fromkeys(dropped)))
    lm.score.to(lm.dtype)
    err = refused(tldr.use_own_head, args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
    assert "padding on the left changes its numbers" in err


def test_the_length_of_scored_texts_is_the_reward_models(assets, tmp_path):
    """A policy with fewer positions than the reward model on a base of its own."""
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    short = save(transformers.GPT2LMHeadModel(config), tmp_path / "short")
    load(tldr, assets, policy=short, reward_base=str(assets / "policy"), reward_max_length=40)


# --- weights and files ------------------------------------------------------------------------------------------------


@each_script
def test_weights_in_another_order_are_refused(script, monkeypatch):
    """The optimiser's state has numbers, not names: its moments would land on other weights."""
    model = torch.nn.Linear(2, 1)
    monkeypatch.setattr(script, "trained_parameters", lambda agent: dict(agent.named_parameters()))
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    script.load_weights(model, {"agent": weights})
    with pytest.raises(script.BadInput, match=r"checkpoint.pt has other weights"):
        script.load_weights(model, {"agent": dict(reversed(weights.items()))})


@each_script
def test_pickled_weights_are_taken_only_when_allowed(script, assets, tmp_path):
    folder = tmp_path / "bin"
    lm = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy")
    save(lm, folder)
    torch.save({k: v.clone() for k, v in lm.state_dict().items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "--allow-pickle takes pickled weights" in refused(load, script, assets, policy=str(folder))
    agent = load(script, assets, policy=str(folder), allow_pickle=True)[0]
    base = agent.lm.get_base_model() if script is tldr else agent.lm
    torch.testing.assert_close(base.transformer.wte.weight, lm.transformer.wte.weight)
    if script is tldr:
        adapter = tmp_path / "reward"
        peft.LoraConfig.from_pretrained(assets / "reward").save_pretrained(adapter)
        torch.save(load_file(assets / "reward/adapter_model.safetensors"), adapter / "adapter_model.bin")
        err = refused(load, tldr, assets, reward_adapter=str(adapter))
        assert "adapter_model.safetensors" in err and "--allow-pickle takes pickled weights" in err
        load(tldr, assets, reward_adapter=str(adapter), allow_pickle=True)


@each_script
def test_files_of_json_lines_are_read_or_the_true_reason_is_given(script, assets, tmp_path):
    """A broken line is named by its number; columns that are not used may hold anything, and may lack."""
    good, path = json.dumps({"text": "a film", "prompt": "a film", "label": "film"}), tmp_path / "texts.jsonl"
    args = make_args(script, assets, dataset=str(path), eval_episodes=2, **({"test_episodes": 2} if script is tldr else {}))
    for data, reason in (
        ('{"text": "caf\xe9"}\n'.encode("latin-1"), "line 1: 'utf-8' codec can't decode"),
        (f'{good}\n{{"text": \n'.encode(), "line 2: Expecting value"),
        (b"text,label\na film,1\n", "line 1: Expecting value"),
        (f'{good}\n"text"\n'.encode(), "line 2: "),
        (f'{{"id": 1}}\n{good}\n'.encode(), "its columns are id"),
    ):
        path.write_bytes(data)
        err = refused(script.load_texts, args)
        assert f"--dataset {path}: ValueError: " in err and reason in err, err
    mixed = [json.dumps(json.loads(good) | extra) for extra in ({"id": 1}, {"id": "one"}, {"id": [2]}, {})]
    path.write_text("\n".join(mixed * 10))
    assert [len(texts) for texts in script.load_texts(args).values()] == ([32, 8] if script is imdb else [32, 2, 2])


def test_checkpointing_where_a_gpu_has_not_the_memory(monkeypatch):
    """GPT-J at the paper's sizes: 24 vectors of 4,096 in bfloat16 and 16 heads' weights a token and layer."""
    lm = rlhf_assets.make_lm(V).to(torch.bfloat16)
    lm.config.n_embd, lm.config.n_layer, lm.config.n_head = 4096, 28, 16
    needed = 28 * 4 * 600 * (24 * 4096 * 2 + 4 * 16 * 600)  # 500 tokens of a prompt, 50 of a response, 50 of a reference
    for free, kept in ((needed / 0.8 * 1.01, True), (needed / 0.8 * 0.99, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 0))
        assert tldr.keeps_activations(tldr.Args(), lm, torch.device("cuda")) == kept
    assert not tldr.keeps_activations(tldr.Args(), lm, CPU)


# --- order and coefficients -------------------------------------------------------------------------------------------


@each_script
def test_minibatches_are_shuffled_anew_in_each_iteration(script, monkeypatch):
    orders, real = [], torch._C._VariableFunctions.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, generator: (orders.append(real(n, generator=generator)), orders[-1])[1])
    rng = np.random.default_rng(0)
    tokens, references = torch.from_numpy(rng.integers(5, V, (8, 13))), torch.from_numpy(rng.integers(5, V, (8, 6)))
    rest = {name: torch.randn(8, 6) for name in ("logprobs", "values", "advantages", "returns")}
    sizes = {"trajectories_per_update": 8, "minibatch_size": 8, "update_epochs": 1, "response_length": 6}
    agent = script.Agent(rlhf_assets.make_lm(V))
    if script is tldr:
        for name in ("policy", "value"):
            agent.add(name, peft.LoraConfig(r=2, fan_in_fan_out=True), head=name == "value")
    batch = (tokens, *rest.values(), references) if script is imdb else {"tokens": tokens, **rest, "references": references}
    optimizer = torch.optim.SGD(script.trained_parameters(agent).values(), lr=0.0)
    for iteration in (0, 1, 1):
        script.update(agent, optimizer, Accelerator(cpu=True), script.Args(**sizes), batch, iteration)
    first, second, third = (order.tolist() for order in orders)
    assert first != second == third and sorted(first) == list(range(8))


@each_script
def test_the_value_has_a_clip_of_its_own_and_the_reference_no_temperature(script):
    """Values outside clip_coef and within clip_coef_value learn; log pi of the reference text is that at temperature 1."""
    lm = rlhf_assets.make_lm(V, dropout=0.0)
    agent = script.Agent(lm)
    tokens, zeros, references = torch.arange(5, 18)[None], torch.zeros(1, 6), torch.arange(30, 36)[None]
    whole = lm(torch.cat([tokens[:, :7], references], dim=1)).logits.log_softmax(-1)[0, 6:-1].detach()
    if script is imdb:
        agent.value_head.bias.data.fill_(0.5)  # old value 0, target 1
    else:
        for name in ("policy", "value"):
            agent.add(name, peft.LoraConfig(r=2, fan_in_fan_out=True), head=name == "value")
        agent.values = lambda tokens, prompt_length: torch.full((6,), 0.5)
    for own, expected in ((0.9, 0.5 * 0.5**2), (0.1, 0.5 * 0.9**2)):  # max with the value moved by 0.1 alone
        args = script.Args(clip_coef=0.7, clip_coef_value=own, temperature=0.5, response_length=6)
        if script is imdb:
            batch = (tokens, zeros, zeros, zeros, zeros + 1.0, references)
            stats = imdb.minibatch_loss(agent, args, 1.0, 1.0, *batch)[1]
        else:
            stats = tldr.value_loss(agent, args, 1.0, tokens, zeros, zeros + 1.0)[1]
            stats |= tldr.policy_loss(agent, args, 1.0, 1.0, tokens, zeros, zeros, references)[1]
        assert stats["losses/value_loss"].item() == pytest.approx(expected)
        nll = -whole.gather(-1, references[0][:, None]).mean()
        assert stats["losses/reference_nll"].item() == pytest.approx(nll.item(), rel=1e-5)


@each_script
def test_literal_signs_reach_the_loss(script):
    """Where A < 0 the reverse loss then has the other sign."""
    agent = script.Agent(rlhf_assets.make_lm(V, dropout=0.0))
    if script is tldr:
        agent.add("policy", peft.LoraConfig(r=2, fan_in_fan_out=True), head=False)
    tokens, zeros, found = torch.arange(5, 18)[None], torch.zeros(1, 6), []
    with torch.no_grad():
        old = agent(tokens, 7, 1.0)[0][None]
        for literal in (False, True):
            args = script.Args(literal_signs=literal, Z=-2.0, response_length=6, reference_nll_coef=0.0)
            if script is imdb:
                stats = imdb.minibatch_loss(agent, args, 1.0, 1.0, tokens, old, zeros, zeros - 1.0, zeros, tokens[:, :6])[1]
            else:
                stats = tldr.policy_loss(agent, args, 1.0, 1.0, tokens, old, zeros - 1.0, tokens[:, :6])[1]
            found.append(stats["losses/reverse_loss"].item())
    assert found == pytest.approx([2.0, -2.0])


# --- what makes it faster ---------------------------------------------------------------------------------------------


@each_script
def test_passes_have_no_column_of_padding_alone(script):
    """Rows of like length share a part of a minibatch, and each part is as wide as its longest row."""
    lm = rlhf_assets.make_lm(V, dropout=0.0)
    agent, widths, areas = script.Agent(lm), [], []
    if script is tldr:
        for name in ("policy", "value"):
            agent.add(name, peft.LoraConfig(r=2, fan_in_fan_out=True), head=name == "value")
    tokens = torch.full((8, 40), script.PAD)
    for row, prompt in enumerate((30, 3, 28, 2, 29, 4, 30, 5)):
        tokens[row, 30 - prompt : 32 + row % 3] = 20
    forward = lm.transformer.forward

    def noted(**inputs):
        real = inputs["attention_mask"].bool()
        widths.append(bool(real.any(dim=0).all()))
        areas.append(real.numel())
        return forward(**inputs)

    lm.transformer.forward = noted
    zeros = {name: torch.zeros(8, 10) for name in ("logprobs", "values", "advantages", "returns")}
    batch = (tokens, *zeros.values(), tokens[:, 30:])
    if script is tldr:
        batch = {"tokens": tokens, **zeros, "references": tokens[:, 30:]}
    sizes = {"trajectories_per_update": 8, "minibatch_size": 8, "update_epochs": 1, "response_length": 10}
    args = script.Args(**sizes, gradient_accumulation=2, reference_nll_coef=0.0)
    optimizer = torch.optim.SGD(script.trained_parameters(agent).values(), lr=0.0)
    script.update(agent, optimizer, Accelerator(cpu=True), args, batch, 1)
    script.generate(agent, tokens[:, :30], torch.zeros(8, 10, dtype=torch.float64), [0], args)
    assert all(widths) and max(areas[:2]) <= 4 * 34 and min(areas[:2]) <= 4 * 9


@each_script
def test_gelu_in_one_operation_is_the_architectures_own_to_rounding(script, assets):
    agent = load(script, assets)[0]
    lm = agent.lm.get_base_model() if script is tldr else agent.lm
    plain = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy").eval()
    assert "NewGELU" in str(plain) and "NewGELU" not in str(lm)
    ids = torch.arange(20, 40)[None]
    if script is tldr:
        agent.activate(None)
    torch.testing.assert_close(lm(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
