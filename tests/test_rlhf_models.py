"""Models, tokenizers and data that the RLHF scripts accept give right numbers; all others are refused in one line."""

import json

import datasets
import numpy as np
import peft
import pytest
import rlhf_assets
import tldr_assets
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sppo_rlhf_imdb as imdb
import sppo_rlhf_tldr as tldr

TOKENIZER = rlhf_assets.make_tokenizer()
V, CPU = len(TOKENIZER), torch.device("cpu")
SIZE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SCRIPTS = [imdb, tldr]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=["imdb", "tldr"])


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tldr_assets.write_assets(tmp_path_factory.mktemp("assets"))


def imdb_args(assets, **changed):
    paths = {"policy": "policy", "tokenizer": "policy", "dataset": "reviews.jsonl"}
    classifier = assets.parent / "classifier"
    if not classifier.exists():
        rlhf_assets.make_classifier(V).save_pretrained(classifier)
        TOKENIZER.save_pretrained(classifier)
    own = {name: str(assets / path) for name, path in paths.items()} | {"reward_model": str(classifier)}
    sizes = {"max_prompt_length": 10, "response_length": 6, "min_response_length": 0, "top_k": 0, "eval_episodes": 8}
    return imdb.Args(**{**own, **sizes, "reward_label": "1", "trajectories_per_update": 8, "minibatch_size": 4, **changed})


def tldr_args(assets, **changed):
    paths = {"policy": "policy", "tokenizer": "policy", "reward_base": "policy", "reward_adapter": "reward", "dataset": "posts"}
    sizes = {"max_prompt_length": 20, "response_length": 6, "reward_max_length": 40, "top_k": 0, "eval_episodes": 8}
    own = {name: str(assets / path) for name, path in paths.items()}
    return tldr.Args(**{**own, **sizes, "dtype": "float32", "gradient_checkpointing": False, "lora_r": 2, **changed})


def load(script, assets, **changed):
    args = (imdb_args if script is imdb else tldr_args)(assets, **changed)
    return script.load_models(args, CPU)


def refused(capsys, call, *args, **kwargs):
    """The one line with which a call ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*args, **kwargs)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1, err
    return err


def save(model, folder):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


# --- policies ---------------------------------------------------------------------------------------------------------


@each_script
def test_an_adapter_is_no_policy(script, assets, tmp_path, capsys):
    """transformers would load its base with the adapter frozen on it, and nothing would learn."""
    base = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy")
    peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    err = refused(capsys, load, script, assets, policy=str(tmp_path / "adapter"))
    assert "--policy" in err and "(an adapter; merge it into its base first, with peft's merge_and_unload)" in err


def test_an_adapter_is_no_whole_reward_model(assets, capsys):
    err = refused(capsys, load, tldr, assets, reward_model=str(assets / "reward"))
    assert "--reward-model" in err and "(an adapter; give it as --reward-adapter)" in err


@each_script
def test_heads_are_as_wide_as_the_hidden_states(script, assets, tmp_path):
    """OPT-350m projects its last hidden states to another width than hidden_size."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=V, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, do_layer_norm_before=False, init_std=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = save(transformers.OPTForCausalLM(config), tmp_path / "opt")
    agent = load(script, assets, policy=folder, **({"reward_base": str(assets / "policy")} if script is tldr else {}))[1]
    head = agent.value_head if script is imdb else agent.heads["value"]
    assert head.weight.shape == (1, 16)
    tokens = torch.tensor([[imdb.PAD, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]])
    whole = agent.lm.get_base_model() if script is tldr else agent.lm
    logits = whole(tokens[:1, 1:]).logits.log_softmax(-1)
    expected = logits[0, 2:4].gather(-1, tokens[0, 4:, None]).squeeze(-1)
    torch.testing.assert_close(agent(tokens, 4, 1.0)[0][:2], expected, atol=1e-5, rtol=1e-5)


def no_cache():
    return transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    )


def no_mask():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.max_position_embeddings = 64
    return transformers.MambaForCausalLM(config)


@each_script
@pytest.mark.parametrize("make", [no_cache, no_mask])
def test_models_without_cache_or_mask_are_refused(script, make, assets, tmp_path, capsys):
    torch.manual_seed(0)
    folder = save(make(), tmp_path / "model")
    err = refused(capsys, load, script, assets, policy=folder)
    assert "expected a causal model that takes padding, positions and a cache (" in err


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
def test_models_that_ignore_what_they_are_told_are_refused(script, kind, reason, capsys):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3)
    args = script.Args(policy="mine")
    for dtype in (torch.float32, torch.bfloat16):
        lm = kind(config).eval().to(dtype)
        agent = script.Agent(lm)
        backbone = agent.backbone if script is imdb else lambda *x, agent=agent, **y: agent.backbone(*x, None, **y)
        assert f"({reason})" in refused(capsys, script.check_lm, args, "policy", lm, backbone)


@each_script
def test_a_right_model_passes_where_a_gpu_multiplies_in_tf32(script, monkeypatch):
    """TF32 keeps 10 bits behind the point, and which products use it depends on their size: here, on five rows or more."""
    torch.manual_seed(0)
    linear, rounded = F.linear, []

    def tf32(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    def rounding(x, weight, bias=None):
        if x.shape[-2] < 5:
            return linear(x, weight, bias)
        rounded.append(x)
        return linear(tf32(x), tf32(weight), bias)

    size = {"vocab_size": V, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, initializer_range=0.1)).eval()
    agent = script.Agent(lm)
    monkeypatch.setattr(F, "linear", rounding)
    backbone = agent.backbone if script is imdb else lambda *x, **y: agent.backbone(*x, None, **y)
    script.check_lm(script.Args(), "policy", lm, backbone)
    assert rounded


@each_script
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt", "neox", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_right_models_pass_in_both_precisions(script, family, dtype):
    torch.manual_seed(0)
    spread = {"initializer_range": 0.3}
    make = {
        "gpt2": lambda: rlhf_assets.make_lm(V),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, **spread)),
        "gptj": lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64, **spread)
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=V, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, init_std=0.3
            )
        ),
        "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE, **spread)),
        "phi3": lambda: transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**SIZE, **spread, num_key_value_heads=1, pad_token_id=1)
        ),
    }[family]
    lm = make().eval().to(dtype)
    agent = script.Agent(lm)
    script.check_lm(
        script.Args(), "policy", lm, agent.backbone if script is imdb else lambda *x, **y: agent.backbone(*x, None, **y)
    )


@each_script
def test_families_that_peft_has_no_table_for(script, assets, tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZE, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=1)
    folder = save(transformers.Phi3ForCausalLM(config), tmp_path / "phi3")
    own = {"policy": folder, "lora_r": 2}
    agent = load(script, assets, **own)[1]
    names = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in agent.named_parameters() if "lora_A" in name}
    assert {"qkv_proj", "o_proj"} <= names
    agent = load(script, assets, **own, lora_target_modules="o_proj,down_proj")[1]
    policy = [name for name, p in agent.named_parameters() if "lora_A" in name and "reward" not in name and "value" not in name]
    assert {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in policy} == {"o_proj", "down_proj"}
    err = refused(capsys, load, script, assets, **own, lora_target_modules="nothing")
    assert "--lora-target-modules nothing: expected layers of the policy (" in err


# --- classifiers ------------------------------------------------------------------------------------------------------


def score_alone(folder, text, label=1):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**TOKENIZER(text, return_tensors="pt")).logits
    return logits.softmax(-1)[0, label].item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_scores_do_not_depend_on_the_batch(family, side, assets, tmp_path):
    """Another pad_token_id in the classifier's configuration than its tokenizer's, or padding on the left."""
    torch.manual_seed(2)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=64, n_embd=32, n_layer=1, n_head=2, num_labels=2, pad_token_id=7, initializer_range=0.5
        )
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        model = rlhf_assets.make_classifier(V)
        model.config.pad_token_id = 7
    model.save_pretrained(tmp_path / "reward")
    tokenizer = rlhf_assets.make_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path / "reward")
    args = imdb_args(assets, reward_model=str(tmp_path / "reward"))
    *_, reward = imdb.load_models(args, CPU)
    texts = ["a great film", "an awful movie with a terrible plot and i have seen many this year", "film"]
    scores = imdb.score(texts, *reward, args).tolist()
    assert scores == pytest.approx([score_alone(tmp_path / "reward", text) for text in texts], abs=1e-4)


def test_long_texts_fit_a_classifier_of_robertas_kind(assets, tmp_path):
    """Its positions begin behind the padding token's number; its tokenizer names no limit."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **{**SIZE, "num_hidden_layers": 1}, max_position_embeddings=34, pad_token_id=1, num_labels=2, initializer_range=0.5
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer = rlhf_assets.make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "reward")
    args = imdb_args(assets, reward_model=str(tmp_path / "reward"))
    *_, reward = imdb.load_models(args, CPU)
    assert imdb.reward_positions(reward[0]) == 32
    text = " ".join(["a great film"] * 100)
    end = TOKENIZER.decode(TOKENIZER(text).input_ids[-32:])
    assert len(TOKENIZER(end).input_ids) == 32
    assert imdb.score([text], *reward, args).item() == pytest.approx(score_alone(tmp_path / "reward", end), abs=1e-5)


def test_labels_from_id2label_alone(assets, tmp_path):
    folder = tmp_path / "reward"
    save(rlhf_assets.make_classifier(V), folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    config.pop("label2id")
    (folder / "config.json").write_text(json.dumps(config))
    args = imdb_args(assets, reward_model=str(folder), reward_label="good")
    *_, (_, _, label) = imdb.load_models(args, CPU)
    assert label == 1
    for own in (None, {"bad": "0", "good": "1"}):
        config["label2id"] = own
        (folder / "config.json").write_text(json.dumps(config))
        *_, (_, _, label) = imdb.load_models(args, CPU)
        assert label == 1


def test_heads_of_another_size_are_named(assets, tmp_path, capsys):
    folder = tmp_path / "reward"
    save(rlhf_assets.make_classifier(V), folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"label {i}" for i in range(3)}
    config["label2id"] = {f"label {i}": i for i in range(3)}
    (folder / "config.json").write_text(json.dumps(config))
    err = refused(capsys, load, imdb, assets, reward_model=str(folder))
    assert "expected weights of its configuration's shapes; classifier.bias (2,), not (3,)" in err


def test_t5_is_scored_or_refused_with_its_reason(assets, tmp_path, capsys):
    """A classifier without padding, or an encoder-decoder: never a traceback."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, num_labels=2, decoder_start_token_id=1,
        pad_token_id=1, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    folder = save(transformers.T5ForSequenceClassification(config), tmp_path / "t5")
    err = refused(capsys, load, imdb, assets, reward_model=folder)
    assert f"--reward-model {folder}: expected an encoder or a causal model, not both in one" in err


def test_a_classifier_without_its_tokenizers_files_is_refused(assets, tmp_path, capsys):
    """transformers makes a tokenizer of five tokens for it; every word would be [UNK], and a score would count words."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bare")
    err = refused(capsys, load, imdb, assets, reward_model=str(tmp_path / "bare"))
    assert "this tokenizer tells no words apart" in err


# --- whole reward models of TL;DR -------------------------------------------------------------------------------------


def reward_models(pad_token_id=None):
    """Sequence classifiers of one label. TRL's RewardTrainer saves such, with EOS as pad_token_id if there is no other."""
    own, causal = {"initializer_range": 0.3, "num_labels": 1, "pad_token_id": pad_token_id}, transformers
    spread, small = {"max_position_embeddings": 64, **own}, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, **own}
    return {
        "gpt2": lambda: causal.GPT2ForSequenceClassification(causal.GPT2Config(vocab_size=V, **small)),
        "gptj": lambda: causal.GPTJForSequenceClassification(causal.GPTJConfig(vocab_size=V, rotary_dim=8, **small)),
        "llama": lambda: causal.LlamaForSequenceClassification(causal.LlamaConfig(**SIZE, **spread)),
        "neox": lambda: causal.GPTNeoXForSequenceClassification(causal.GPTNeoXConfig(**SIZE, **spread)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("pad_token_id", "ending"), [(None, "<|endoftext|>"), (0, "")])  # 0 is EOS
@pytest.mark.parametrize("family", reward_models())
def test_a_whole_reward_model_scores_as_by_itself(family, pad_token_id, ending, dtype, assets, tmp_path, capsys):
    """Texts of several lengths in one batch against transformers' own classifier, which reads each alone, EOS included."""
    torch.manual_seed(0)
    folder = save(reward_models(pad_token_id)[family](), tmp_path / family)
    args = tldr_args(assets, reward_model=folder, dtype=dtype, reward_text="{text}" + ending)
    _, agent, reward = tldr.load_models(args, CPU)
    assert reward is not agent and not any(parameter.requires_grad for parameter in reward.parameters())
    texts = ["a great film", "an awful movie with a terrible plot and a worse end", "good"]
    with torch.no_grad():
        scores = tldr.score(texts, reward, TOKENIZER, args)
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        alone = [whole(TOKENIZER(text + "<|endoftext|>", return_tensors="pt").input_ids).logits.item() for text in texts]
    assert np.std(alone) > 0.05
    assert scores.tolist() == pytest.approx(alone, abs=1e-4 if dtype == "float32" else 0.5 * np.std(alone))
    if not ending:  # here the classifier skips an EOS, which is its padding; the script would read it
        err = refused(capsys, tldr.load_models, tldr.replace(args, reward_text="{text}<|endoftext|>"), CPU)
        assert "--reward-text {text}<|endoftext|>: expected one that does not end in the reward model's padding token" in err


def test_reward_models_that_would_score_wrongly_are_refused(assets, tmp_path, capsys):
    torch.manual_seed(0)
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": V}
    two = save(transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**config, num_labels=2)), tmp_path / "two")
    err = refused(capsys, load, tldr, assets, reward_model=two)
    assert f"--reward-model {two}: expected a causal model with a head `score` of one label, which is its reward" in err
    bert = transformers.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    bert = save(transformers.BertForSequenceClassification(bert), tmp_path / "bert")
    assert "expected a causal model with a head `score`" in refused(capsys, load, tldr, assets, reward_model=bert)
    err = refused(capsys, load, tldr, assets, reward_model=str(assets / "policy"))
    assert "expected a model with all its weights; score.weight are missing" in err
    config = transformers.GPT2Config(**{**config, "n_positions": 39}, num_labels=1)
    short = save(transformers.GPT2ForSequenceClassification(config), tmp_path / "short")
    err = refused(capsys, load, tldr, assets, reward_model=short)
    assert f"--reward-model {short}: expected a model with 40 positions or more (--reward-max-length)" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [("position_ids",), ("position_ids", "attention_mask")], ids=["positions", "mask"])
def test_a_whole_reward_model_that_padding_changes_is_refused(dropped, dtype, assets, tmp_path, capsys, monkeypatch):
    """As a model would that counts positions from the padding, or reads it."""
    torch.manual_seed(0)
    args = tldr_args(assets, reward_model=save(reward_models()["gpt2"](), tmp_path / "gpt2"), dtype=dtype)
    lm = tldr.load_lm(args, "reward_model", CPU)
    tldr.use_own_head(args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
    forward = lm.transformer.forward
    monkeypatch.setattr(lm.transformer, "forward", lambda *own, **rest: forward(*own, **rest | dict.fromkeys(dropped)))
    lm.score.to(lm.dtype)
    err = refused(capsys, tldr.use_own_head, args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
    assert "expected a causal model that takes padding and positions (padding on the left changes its numbers)" in err


@pytest.mark.parametrize(("relative", "fits"), [(0.02, True), (0.1, False)])
def test_how_far_rounding_may_move_a_whole_reward_model(relative, fits, assets, tmp_path, capsys, monkeypatch):
    """In bfloat16 a right model of 30 layers is off by 0.012, one that reads the padding by 0.138 (SmolLM2-135M)."""
    torch.manual_seed(0)
    args = tldr_args(assets, reward_model=save(reward_models()["gpt2"](), tmp_path / "gpt2"), dtype="bfloat16")
    lm = tldr.load_lm(args, "reward_model", CPU)
    forward = lm.transformer.forward

    def moved(*own, attention_mask=None, **rest):
        out = forward(*own, attention_mask=attention_mask, **rest)
        if attention_mask is not None:  # the padded batch
            hidden = out.last_hidden_state
            noise = torch.randn_like(hidden)
            out.last_hidden_state = hidden + noise * relative * hidden.norm() / noise.norm()
        return out

    monkeypatch.setattr(lm.transformer, "forward", moved)
    if fits:
        tldr.use_own_head(args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
    else:
        err = refused(capsys, tldr.use_own_head, args, tldr.Agent(lm, with_lm_head=False), TOKENIZER)
        assert "padding on the left changes its numbers" in err


# --- weights ----------------------------------------------------------------------------------------------------------


@each_script
def test_pickled_weights_are_taken_only_when_allowed(script, assets, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bin"
    lm = transformers.AutoModelForCausalLM.from_pretrained(assets / "policy")
    save(lm, folder)
    torch.save({k: v.clone() for k, v in lm.state_dict().items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    err = refused(capsys, load, script, assets, policy=str(folder))
    assert "(it has no safetensors); --allow-pickle takes its pickled weights" in err and "save_pretrained('FOLDER')" in err
    if script is imdb:  # the advice, followed: a folder that is whole
        monkeypatch.chdir(tmp_path)
        exec(err.split("in the environment: ")[1])
        load(script, assets, policy=str(tmp_path / "FOLDER"), tokenizer=str(tmp_path / "FOLDER"))
    agent = load(script, assets, policy=str(folder), allow_pickle=True)[1]
    base = agent.lm.get_base_model() if script is tldr else agent.lm
    torch.testing.assert_close(base.transformer.wte.weight, lm.transformer.wte.weight)


def test_pickled_adapters_too(assets, tmp_path, capsys):
    folder = tmp_path / "reward"
    folder.mkdir()
    peft.LoraConfig.from_pretrained(assets / "reward").save_pretrained(folder)
    from safetensors.torch import load_file

    torch.save(load_file(assets / "reward/adapter_model.safetensors"), folder / "adapter_model.bin")
    err = refused(capsys, load, tldr, assets, reward_adapter=str(folder))
    assert "(it has no safetensors); --allow-pickle takes its pickled weights" in err
    load(tldr, assets, reward_adapter=str(folder), allow_pickle=True)


# --- texts ------------------------------------------------------------------------------------------------------------


def metaspace_tokenizer():
    """Llama's kind: a text of its own begins with a space, which a text behind another does not get."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    characters = list("abcdefghijklmnopqrstuvwxyz.\nTLDR;: ▁")
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


def test_llamas_kind_would_get_a_space_of_its_own():
    """The test above can fail: apart, this tokenizer gives other tokens."""
    tokenizer = metaspace_tokenizer()
    apart = [*tokenizer("a film").input_ids, *tokenizer("\nTL;DR:").input_ids]
    assert apart != tokenizer("a film\nTL;DR:").input_ids


@each_script
@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("latin.jsonl", '{"text": "caf\xe9"}\n'.encode("latin-1"), "codec can't decode"),
        ("broken.jsonl", b'{"text": "a film"}\n{"text": \n', "(line 2: Expecting value"),
        ("table.csv", b"text,label\na film,1\n", "(line 1: Expecting value"),
        ("plain.txt", b"a film\n", "(line 1: Expecting value"),
    ],
)
def test_broken_files_are_named_with_the_reason(script, name, data, reason, assets, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(data * 3)
    args = (imdb_args if script is imdb else tldr_args)(assets, dataset=str(path))
    err = refused(capsys, script.load_texts, args)
    assert f"--dataset {path}: expected a Hub id, a folder or a file of JSON lines" in err and reason in err, err
    assert "generating the dataset" not in err


@each_script
def test_a_bad_file_of_a_folder_is_named(script, assets, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.csv").write_text("text,label\na film,1\n")
    (tmp_path / "data/train.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    args = (imdb_args if script is imdb else tldr_args)(assets, dataset=str(tmp_path / "data"))
    datasets.disable_progress_bars()  # as prepare_hub does
    assert "(train.csv: 'utf-8' codec can't decode byte 0xe9" in refused(capsys, script.load_texts, args)


@each_script
@pytest.mark.parametrize("target", ["wte", "c_attn,lm_head"])
def test_lora_is_refused_on_the_embedding_and_the_head(script, target, assets, capsys):
    """GPT-2's are one weight: merged, it would be another model than the one that was trained."""
    err = refused(capsys, load, script, assets, lora_r=2, lora_target_modules=target)
    assert f"--lora-target-modules {target}: expected layers between the embedding and the head, which " in err


def test_the_length_of_scored_texts_is_the_reward_models(assets, tmp_path):
    """A policy with fewer positions than the reward model on a base of its own."""
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    folder = save(transformers.GPT2LMHeadModel(config), tmp_path / "short")
    load(tldr, assets, policy=folder, reward_base=str(assets / "policy"), reward_max_length=40)


@each_script
def test_an_address_of_the_hub_that_is_none(script, assets, monkeypatch):
    for owner, name in (
        (script.huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (script.datasets.config, "HF_HUB_OFFLINE"),
        (script.datasets.config, "HF_DATASETS_OFFLINE"),
    ):
        monkeypatch.setattr(owner, name, False)
    monkeypatch.setattr(script.huggingface_hub.constants, "ENDPOINT", "hf-mirror.com")
    script.prepare_hub((imdb_args if script is imdb else tldr_args)(assets, policy="nobody/nothing"), "policy")
    assert script.huggingface_hub.constants.HF_HUB_OFFLINE is True


# --- order and coefficients -------------------------------------------------------------------------------------------


@each_script
def test_minibatches_are_shuffled_anew_in_each_iteration(script, monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "randperm", lambda count, generator: seen.setdefault("order", real(count, generator=generator)))
    real = torch._C._VariableFunctions.randperm
    orders = []
    for iteration in (0, 1, 1):
        seen.clear()
        run_update(script, iteration)
        orders.append(seen["order"].tolist())
    assert orders[0] != orders[1] == orders[2] and sorted(orders[0]) == list(range(8))


def run_update(script, iteration):
    from accelerate import Accelerator

    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(5, V, (8, 13)))
    rest = {name: torch.randn(8, 6) for name in ("logprobs", "values", "advantages", "returns")}
    references = torch.from_numpy(rng.integers(5, V, (8, 6)))
    sizes = {
        "trajectories_per_update": 8,
        "minibatch_size": 8,
        "update_epochs": 1,
        "response_length": 6,
        "gradient_accumulation": 1,
    }
    agent = script.Agent(rlhf_assets.make_lm(V))
    if script is imdb:
        batch = (tokens, *rest.values(), references)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    else:
        for name in ("policy", "value"):
            agent.add(name, peft.LoraConfig(r=2, fan_in_fan_out=True), head=name == "value")
        batch = {"tokens": tokens, **rest, "references": references}
        optimizer = torch.optim.SGD(tldr.trained_parameters(agent).values(), lr=0.0)
    script.update(agent, optimizer, Accelerator(cpu=True), script.Args(**sizes), batch, iteration)


def test_the_value_has_a_clip_of_its_own_and_the_reference_no_temperature():
    """Values outside clip_coef and within clip_coef_value learn; log pi of the reference text is that at temperature 1."""
    agent = imdb.Agent(rlhf_assets.make_lm(V, dropout=0.0))
    tokens = torch.arange(5, 18)[None]
    zeros, references = torch.zeros(1, 6), torch.arange(30, 36)[None]
    agent.value_head.bias.data.fill_(0.5)  # old value 0, target 1
    batch = (tokens, zeros, zeros, zeros, zeros + 1.0, references)
    losses = {}
    for own in (0.1, 0.9):
        args = imdb.Args(clip_coef=0.7, clip_coef_value=own, temperature=0.5, response_length=6)
        losses[own] = imdb.minibatch_loss(agent, args, 1.0, 1.0, *batch)[1]
    assert losses[0.9]["losses/value_loss"].item() == pytest.approx(0.5 * 0.5**2)
    assert losses[0.1]["losses/value_loss"].item() == pytest.approx(0.5 * 0.9**2)  # max with the value moved by 0.1 alone
    whole = agent.lm(torch.cat([tokens[:, :7], references], dim=1)).logits.log_softmax(-1)[0, 6:-1]
    nll = -whole.gather(-1, references[0][:, None]).mean()
    assert losses[0.1]["losses/reference_nll"].item() == pytest.approx(nll.item(), rel=1e-5)
