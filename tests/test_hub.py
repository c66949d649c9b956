"""The default commands of the RLHF scripts over HTTP: tiny models and data under their default ids."""

import json
import shutil
import time

import pandas as pd
import pytest
import rlhf_assets
import tldr_assets
import torch
import transformers
from helpers import ENV, only, run, scalars
from hub import serve
from peft import LoraConfig

import sppo_rlhf_imdb as imdb
import sppo_rlhf_tldr as tldr

IMDB, TLDR = imdb.Args(), tldr.Args()
SMALL = {
    "sppo_rlhf_imdb.py": "--iterations 1 --eval-episodes 4 --perplexity-tokens 200 --update-epochs 1",
    "sppo_rlhf_tldr.py": "--iterations 1 --eval-episodes 4 --test-episodes 4 --update-epochs 1",
}
FEW = ["--trajectories-per-update", "8", "--minibatch-size", "4", "--max-prompt-length", "40"]
each_script = pytest.mark.parametrize("script", list(SMALL))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """What the scripts' defaults name, as small as it goes."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = rlhf_assets.make_tokenizer()
    tokenizer.model_max_length = 512
    size = len(tokenizer)
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(vocab_size=size, n_positions=1024, n_embd=32, n_layer=1, n_head=2, eos_token_id=0)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "models" / IMDB.policy)
    tokenizer.save_pretrained(root / "models" / IMDB.tokenizer)
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "pad_token_id": 1}
    bert = transformers.DistilBertConfig(vocab_size=size, dim=32, hidden_dim=64, n_layers=1, n_heads=2, **labels)
    transformers.DistilBertForSequenceClassification(bert).save_pretrained(root / "models" / IMDB.reward_model)
    tokenizer.save_pretrained(root / "models" / IMDB.reward_model)
    sizes = {"vocab_size": size, "n_positions": 1024, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
    for name in (TLDR.policy, TLDR.reward_base):
        transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, eos_token_id=0)).save_pretrained(root / "models" / name)
    tokenizer.save_pretrained(root / "models" / TLDR.tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "models" / TLDR.reward_base).requires_grad_(False)
    agent = tldr.Agent(base, with_lm_head=False)
    agent.add("reward", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), head=True)
    torch.nn.init.normal_(agent.heads["reward"].weight)
    tldr.save_adapter(root / "models" / TLDR.reward_adapter, agent, "reward", TLDR.reward_base, tokenizer)
    reviews = root / "datasets" / IMDB.dataset / "plain_text"
    posts = root / "datasets" / TLDR.dataset / "data"
    reviews.mkdir(parents=True)
    posts.mkdir(parents=True)
    pd.DataFrame({"text": rlhf_assets.reviews(200)}).to_parquet(reviews / "train-00000-of-00001.parquet")
    for seed, (split, count) in enumerate((("train", 70), ("test", 8), ("valid", 8))):
        pairs = tldr_assets.posts(count, 300 * seed)
        pd.DataFrame(pairs, columns=["prompt", "label"]).to_parquet(posts / f"{split}-00000-of-00001.parquet")
    return root


def command(script, hub, tmp_path, *more, **kwargs):
    """The default command at one iteration, with a cache of its own."""
    env = {**ENV, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    args = [*SMALL[script].split(), "--no-cuda", "--num-threads", 1, "--run-dir", tmp_path / "runs", *more]
    return run(script, *args, env=env, **kwargs)


@each_script
def test_the_default_command_over_http_then_offline_which_asks_nothing(script, repositories, tmp_path):
    args = IMDB if "imdb" in script else TLDR
    names = ("policy", "tokenizer", "dataset", *(("reward_model",) if "imdb" in script else ("reward_base", "reward_adapter")))
    ids = [word for name in names for word in (f"--{name.replace('_', '-')}", getattr(args, name))]
    small = [*FEW, *(["--reward-label", "1", "--judge", "None"] if "imdb" in script else ["--reward-max-length", 96])]
    with serve(repositories) as hub:
        command(script, hub, tmp_path)
        assert any(".safetensors -> 200" in line for line in hub.log)
        assert not any("discussions" in line or "refs/pr" in line or "convert" in line for line in hub.log)
        folder = only(tmp_path / "runs", "*")
        result = json.loads((folder / "result.json").read_text())
        assert result["args"]["policy"] == args.policy and result["score"] is not None
        assert "objective/scores" in scalars(folder)
        hub.log.clear()
        command(script, hub, tmp_path, "--offline", *ids, *small)
        assert hub.log == []
    if "imdb" in script:
        command(script, hub, tmp_path, *FEW)  # nobody answers any more: the cache is enough


def as_pickle(repositories, tmp_path, name):
    """A copy of the repositories in which `name` has pytorch_model.bin alone."""
    root = shutil.copytree(repositories, tmp_path / "hub")
    folder = root / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save({key: value.clone() for key, value in model.state_dict().items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return root


def test_what_is_missing_is_named_without_asking_for_a_conversion(repositories, tmp_path):
    """A repository that there is not; one with pickled weights alone."""
    root = as_pickle(repositories, tmp_path, IMDB.policy)
    with serve(root) as hub:
        _, err = command("sppo_rlhf_imdb.py", hub, tmp_path, "--policy", "nobody/nothing", code=2)
        assert "--policy nobody/nothing: OSError: nobody/nothing is not a local folder" in err and "Traceback" not in err
        _, err = command("sppo_rlhf_imdb.py", hub, tmp_path, code=2)
        assert "model.safetensors" in err and "--allow-pickle takes pickled weights" in err and "Traceback" not in err
        assert not any("discussions" in line or "refs/pr" in line or "POST" in line for line in hub.log if "models" in line)
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_does_not_answer_is_named_in_seconds(repositories, tmp_path):
    with serve(repositories) as hub:
        hub.stall = True
        start = time.time()
        _, err = command("sppo_rlhf_imdb.py", hub, tmp_path, code=2)
    assert err.startswith(f"sppo_rlhf_imdb.py: error: --dataset {IMDB.dataset}: ") and "Traceback" not in err
    assert time.time() - start < 100  # without the probe two minutes; five seconds, imports, and a busy machine


def test_an_interrupted_download_resumes(repositories, tmp_path):
    """The first 20 of 40 MB are not asked for again."""
    root = shutil.copytree(repositories, tmp_path / "hub")
    config = transformers.GPT2Config(vocab_size=160_000, n_positions=1024, n_embd=64, n_layer=1, n_head=2, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "models" / IMDB.policy)
    small = "--trajectories-per-update 4 --minibatch-size 4 --response-length 4 --min-response-length 4 --perplexity-tokens 20"
    with serve(root) as hub:
        hub.cut = {"model.safetensors"}
        command("sppo_rlhf_imdb.py", hub, tmp_path, *small.split())
        assert hub.cut == set() and any(f"{IMDB.policy}/resolve" in line and "-> 206" in line for line in hub.log)
