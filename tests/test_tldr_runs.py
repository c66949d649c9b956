"""Whole runs of sppo_rlhf_tldr.py on tiny models: what they leave, resume, signals, two processes, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import peft
import pytest
import rlhf_assets
import tldr_assets
import torch
import transformers
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, scalars, start, wait_for, wandb_run  # noqa: F401

import sppo_rlhf_tldr as tldr

SCRIPT = "sppo_rlhf_tldr.py"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tldr_assets.write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def call(assets, monkeypatch):
    """Runs main() in this process: what a command line does, without starting Python and torch again."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [SCRIPT])

    def call(*changed):
        line = list(map(str, changed))
        parsed = tldr.parse_args(
            line if {"--resume", "--evaluate"} & {*line} else [*tldr_assets.arguments(assets), *line], tldr.Args()
        )
        tldr.check_args(parsed)
        tldr.main(parsed)

    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_leaves_what_the_readme_says(assets, tmp_path):
    """As a process, whose output is no terminal; with W&B, evaluation on the way, and the models saved."""
    args = [*tldr_assets.arguments(assets), "--iterations", 4, "--eval-interval", 2, "--save-model", "--track"]
    out, err = run(SCRIPT, *args, "--run-dir", tmp_path, env={**ENV, "WANDB_MODE": "offline"})
    folder = only(tmp_path, "tldr__*")
    assert re.fullmatch(r"tldr__sppo_rlhf_tldr__1__\d+", folder.name)
    own = [line for line in out.splitlines() if line.startswith(SCRIPT)]
    assert len(own) == 2 and "the reward model shares them; 40 posts; 1 x cpu, 1 threads" in own[0] and "it/s" not in err
    saved = json.loads((folder / "args.json").read_text())
    assert {"python", "torch", "transformers", "peft", "rouge-score"} <= saved["versions"].keys() and saved["commit"]
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 32 and result["run_id"] == saved["run_id"] and result["seconds"] > 0
    wanted = {
        "score",
        "score_stderr",
        "perplexity",
        "kl",
        "empty_share",
        "unfinished_share",
        "rouge1",
        "rouge2",
        "rougeL",
        "words",
    }
    assert wanted <= result["before"].keys() and wanted <= result["after"].keys()
    assert result["before"]["kl"] == 0 != result["after"]["kl"]
    assert result["score"] == result["after"]["score"]

    logged = scalars(folder)
    for tag in ("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "objective/empty_share",
                "losses/policy_loss", "losses/reverse_loss", "losses/value_loss", "losses/approx_kl", "losses/reference_nll",
                "charts/SPS", "charts/adv_sign_change", "time/generate", "time/update"):  # fmt: skip
        assert [step for step, _ in logged[tag]] == [8, 16, 24, 32], tag
        assert np.isfinite([value for _, value in logged[tag]]).all()
    assert [step for step, _ in logged["test/rougeL"]] == [0, 32] and [step for step, _ in logged["eval/rougeL"]] == [16, 32]
    assert logged["test/score"][-1][1] == pytest.approx(result["score"])

    samples = json.loads((folder / "samples.json").read_text())
    new = ["post", "prompt", "reference", "response", "score", "rouge1", "rouge2", "rougeL"]
    assert len(samples) == 8 and list(samples[0]) == new + [f"{name}_before" for name in new[3:]]
    assert [sample["reference"] for sample in samples] == [label for _, label in tldr_assets.posts(8, 200)]
    assert np.mean([sample["score"] for sample in samples]) == pytest.approx(result["score"])
    assert np.mean([sample["score_before"] for sample in samples]) == pytest.approx(result["before"]["score"])
    assert any(sample["response"] != sample["response_before"] for sample in samples)

    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapters/policy").eval()
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(lm(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert (lm(ids).logits - adapted(ids).logits).abs().max() > 1e-2
    assert json.loads((folder / "adapters/value/adapter_config.json").read_text())["modules_to_save"] == ["score"]

    config, history = wandb_run(only(tmp_path, "wandb/offline-run-*/run-*.wandb"))
    assert config["beta"] == 0.2 and config["versions"] == saved["versions"]
    points = [(row["global_step"], row["objective/scores"]) for row in history if "objective/scores" in row]
    assert points == [(step, pytest.approx(value)) for step, value in logged["objective/scores"]]


def test_a_resumed_run_goes_on_to_the_bit(call, tmp_path):
    """Dropout included: 2 + 2 iterations are 4."""
    common = ["--lora-dropout", 0.3, "--gradient-checkpointing"]
    call("--iterations", 4, *common, "--run-dir", tmp_path / "whole")
    call("--iterations", 2, *common, "--run-dir", tmp_path / "halves")
    whole, halves = only(tmp_path / "whole"), only(tmp_path / "halves")
    call("--resume", halves, "--iterations", 4)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    assert (whole / "checkpoint.pt").stat().st_size < 100_000  # adapters and head, no language model
    for name, weights in one["agent"].items():
        assert torch.equal(weights, other["agent"][name]), name
    for tag in ("losses/policy_loss", "objective/kl"):
        assert scalars(whole)[tag] == scalars(halves)[tag]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, halves)]
    assert results[0]["before"] == results[1]["before"] and results[0]["after"] == results[1]["after"]


def test_a_finished_run_is_left_alone(call, tmp_path, capsys):
    call("--iterations", 1, "--run-dir", tmp_path)
    files = {path: path.read_bytes() for path in only(tmp_path).iterdir()}
    call("--resume", only(tmp_path))
    assert "has finished its 1 iterations; a larger --iterations continues it" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in only(tmp_path).iterdir()} == files


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_and_logs_no_step_twice(signum, assets, call, tmp_path):
    args = [*tldr_assets.arguments(assets), "--iterations", 400, "--checkpoint-interval", 3, "--test-episodes", 0]
    process = start(SCRIPT, *args, "--run-dir", tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signum)
    out, err = process.communicate()
    folder = only(tmp_path)
    done = torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"]
    if signum == signal.SIGTERM:
        assert process.returncode == 143, err
        assert f"SIGTERM after iteration {done}, saved; continue with --resume {folder}" in out
    assert 0 < done < 390
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["iterations"] = done + 2  # so that the test ends soon
    (folder / "args.json").write_text(json.dumps(saved))
    time.sleep(1.1)  # TensorBoard orders files by the second of their start; a process of its own takes longer to start
    call("--resume", folder)
    steps = [step for step, _ in scalars(folder)["objective/scores"]]
    assert sorted(steps) == [8 * (i + 1) for i in range(done + 2)]
    assert (folder / "result.json").exists()


def test_a_whole_reward_model_scores_a_run(call, assets, tmp_path, capsys):
    """The reward adapter merged into its base, with its head: the run is the adapter's own, also resumed and evaluated."""
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(assets / "policy", num_labels=1, pad_token_id=1)
    merged = peft.PeftModel.from_pretrained(classifier, assets / "reward").merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    call("--iterations", 2, "--run-dir", tmp_path / "adapter")
    call("--iterations", 1, "--run-dir", tmp_path / "run", "--reward-model", tmp_path / "whole", "--reward-base", "nothing")
    adapter, whole = only(tmp_path / "adapter"), only(tmp_path / "run")
    call("--resume", whole, "--iterations", 2)
    expected, found = (json.loads((folder / "result.json").read_text()) for folder in (adapter, whole))
    for name in ("before", "after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3)
    capsys.readouterr()
    call("--evaluate", whole)
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert np.mean(scores) == pytest.approx(found["score"])


def test_two_processes_learn_what_one_does(assets, tmp_path):
    args = [*tldr_assets.arguments(assets), "--iterations", 2, "--lora-dropout", 0]
    run(SCRIPT, *args, "--run-dir", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / SCRIPT), *map(str, args), "--run-dir", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    shares = [value for _, value in scalars(only(tmp_path / "one"))["objective/unfinished_share"]]
    assert all(0 < share < 1 for share in shares)  # rows of different length, as tokens and not rows are to be weighted
    assert "2 x cpu" in done.stdout and done.stdout.count(SCRIPT + ":") == 2  # one of them talks
    one, two = (only(tmp_path / name) for name in ("one", "two"))
    weights, other = (torch.load(folder / "checkpoint.pt", weights_only=True)["agent"] for folder in (one, two))
    for name in weights:
        torch.testing.assert_close(weights[name], other[name], atol=1e-4, rtol=1e-2)
    for tag in ("losses/policy_loss", "losses/value_loss", "losses/reference_nll", "objective/kl", "test/perplexity"):
        values = [[value for _, value in scalars(folder)[tag]] for folder in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag


@pytest.mark.parametrize("loss", ["--alpha 1 --beta 0", "--alpha 0 --beta 1"], ids=["ppo", "reverse ppo"])
def test_the_policy_learns_what_is_scored(loss, call, tmp_path, monkeypatch):
    """Share of the letter e in the summary; the reverse loss alone, whose gradient is PPO's, learns it too."""
    summaries = lambda texts: [text.split(tldr.ENDING)[-1] for text in texts]  # noqa: E731
    share = lambda texts: torch.tensor([text.count("e") / max(1, len(text)) for text in summaries(texts)])  # noqa: E731
    monkeypatch.setattr(tldr, "score", lambda texts, *_: share(texts))
    call(
        *("--iterations", 30, "--trajectories-per-update", 32, "--minibatch-size", 16, "--reference-nll-coef", 0),
        *("--checkpoint-interval", 40, "--kl-coef", 0, "--lora-dropout", 0, "--run-dir", tmp_path, *loss.split()),
        *("--min-response-length", 6, "--test-episodes", 0, "--lora-r", 8, "--lora-alpha", 16, "--learning-rate", "2e-2"),
    )
    scores = [value for _, value in scalars(only(tmp_path))["objective/scores"]]
    assert np.mean(scores[-3:]) > 1.5 * np.mean(scores[:3])


def test_a_broken_run_ends_and_keeps_the_checkpoint_from_before(call, tmp_path):
    call("--iterations", 1, "--run-dir", tmp_path)
    folder = only(tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["heads.value.weight"].fill_(1e30)  # its squared error is not finite
    torch.save(checkpoint, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    broken = r"losses/\w+ is (inf|nan) in iteration 2; the run ends, .*checkpoint.pt is from before"
    with pytest.raises(SystemExit, match=broken):
        call("--resume", folder, "--iterations", 2)
    assert (folder / "checkpoint.pt").read_bytes() == before


BAD = [
    ("--minibatch-size 3", "--minibatch-size 3: expected a divisor of trajectories_per_update = 8"),
    ("--gradient-accumulation 3", "--minibatch-size 4: expected a multiple of processes x gradient_accumulation = 1 x 3"),
    ("--lora-r 0", "--lora-r 0: must be greater than 0"),
    ("--lora-dropout 1", "--lora-dropout 1.0: must be less than 1"),
    ("--Z 0", "--Z 0.0: must be less than 0"),
    ("--reward-text text", "--reward-text text: expected a text with {text} in it"),
    ("--load-in-4bit", "--load-in-4bit True: expected a CUDA GPU and the package bitsandbytes for it"),
    ("--dtype int8", "error: invalid choice 'int8' for argument '--dtype'"),
    ("--resume /no/such/run", "--resume /no/such/run: not the folder of a run"),
    ("--max-prompt-length 60", "--max-prompt-length 60: expected 58 or less, the policy's context - response_length"),
    ("--max-prompt-length 3", "--max-prompt-length 3: expected more than the "),
    ("--reward-max-length 65", "--reward-max-length 65: expected 64, the policy's context, or less"),
    ("--top-k 100000", "--top-k 100000: expected the policy's vocabulary, "),
    ("--test-episodes 1", "--test-episodes 1: expected 0, or 2 or more for a standard error"),
    ("--test-episodes 9", "posts: expected at least 9 posts in the split test; it has 8"),
    (
        "--dataset {tmp}/no_label.jsonl",
        "no_label.jsonl: expected columns prompt and label (or completion); its columns are prompt",
    ),
    ("--dataset {tmp}/null.jsonl", "null.jsonl: expected columns prompt and label that hold texts alone"),
    ("--dataset {tmp}/missing.jsonl", "missing.jsonl: expected a Hub id, a folder or a file of JSON lines that can be loaded"),
    ("--dataset {tmp}/no_test", "expected the splits train, valid(ation) and test; it has train"),
    ("--policy {tmp}/nothing", "--policy {tmp}/nothing: expected a Hub id or a folder that can be loaded"),
    ("--policy {tmp}/gemma", "expected a causal model that takes padding, positions and a cache (its logits are not its head "),
    ("--tokenizer {tmp}/nothing", "--tokenizer {tmp}/nothing: expected"),
    ("--reward-base {tmp}/nothing", "--reward-base {tmp}/nothing: expected a Hub id or a folder that can be loaded"),
    ("--reward-adapter {tmp}/nothing", "--reward-adapter {tmp}/nothing: expected a LoRA adapter in peft's format"),
    ("--reward-adapter {tmp}/headless", "--reward-adapter {tmp}/headless: expected a LoRA adapter in peft's format"),
    ("--reward-adapter {tmp}/foreign", "--reward-adapter {tmp}/foreign: expected a LoRA adapter in peft's format with weights"),
    ("--reward-adapter {tmp}/deeper", "--reward-adapter {tmp}/deeper: expected an adapter of --reward-base "),
    (
        "--reward-base {tmp}/small",
        "--reward-base {tmp}/small: expected a model with 40 positions or more (--reward-max-length)",
    ),
    (
        "--policy {tmp}/capped --dtype bfloat16",
        "expected a causal model that takes padding, positions and a cache (its logits are not its head ",
    ),
]


@pytest.fixture(scope="module")
def broken(assets, tmp_path_factory):
    """Files and models that no run can use."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "no_label.jsonl").write_text('{"prompt": "a film"}\n' * 100)
    (folder / "null.jsonl").write_text(
        '{"prompt": "a film", "label": "film"}\n' * 100 + '{"prompt": "a film", "label": null}\n'
    )
    (folder / "no_test").mkdir()
    (folder / "no_test/train.jsonl").write_text((assets / "posts/train.jsonl").read_text())
    tokenizer = rlhf_assets.make_tokenizer()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    gemma = transformers.Gemma2Config(**size, **heads, final_logit_softcapping=0.01, initializer_range=1.0)
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(folder / "gemma")
    gemma.final_logit_softcapping = 3.0
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(folder / "capped")
    small = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(small).save_pretrained(folder / "small")
    deep = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=2)
    agent = tldr.Agent(transformers.GPT2LMHeadModel(deep))
    tldr_assets.add_reward(agent)
    tldr.save_adapter(folder / "deeper", agent, "reward", "base", tokenizer)
    agent = tldr.Agent(tldr.load_lm(tldr.Args(policy=str(assets / "policy"), dtype="float32"), "policy", torch.device("cpu")))
    agent.add("policy", peft.LoraConfig(r=2, fan_in_fan_out=True), head=False)
    tldr.save_adapter(folder / "headless", agent, "policy", "base", tokenizer)
    llama = transformers.LlamaConfig(**size, **heads)
    agent = tldr.Agent(transformers.LlamaForCausalLM(llama))
    tldr_assets.add_reward(agent)
    tldr.save_adapter(folder / "foreign", agent, "reward", "base", tokenizer)
    return folder


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_with_exit_status_2(line, expected, call, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line, expected = (text.replace("{tmp}", str(broken)) for text in (line, expected))
    if "--resume" not in line:
        line += f" --run-dir {tmp_path / 'runs'}"
    with pytest.raises(SystemExit) as stopped:
        call(*line.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith(f"{SCRIPT}: error: ") and expected in err
    assert not (tmp_path / "runs").exists()


def test_offline_without_assets_says_how_to_build_them(tmp_path):
    _, err = run(SCRIPT, "--offline", code=2, cwd=tmp_path)
    assert err.count("\n") == 1 and "assets/tldr/p" in err and "python benchmark/assets/make_rlhf_assets.py tldr" in err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_argument_and_the_defaults_of_offline(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    for defaults, size in ((tldr.Args(), "500"), (tldr.OFFLINE, str(tldr.OFFLINE.max_prompt_length))):
        with pytest.raises(SystemExit) as stopped:
            tldr.parse_args(["--help"], defaults)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        for name in tldr.Args.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in out
        assert re.search(rf"\(default: {size}\)", out)


def test_each_rollout_has_new_chance_and_the_optimiser_is_right(call, tmp_path, monkeypatch):
    uniforms, settings, rollout, adamw = [], [], tldr.rollout, torch.optim.AdamW
    monkeypatch.setattr(tldr, "rollout", lambda *a: (uniforms.append(a[4]), rollout(*a))[1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **given: (settings.append(given), adamw(*a, **given))[1])
    advantages, gae = [], tldr.advantages_and_returns

    def recorded(batch, args):
        found = gae(batch, args)
        advantages.append(found[0][batch["tokens"][:, -args.response_length :] != tldr.PAD].numpy())
        return found

    monkeypatch.setattr(tldr, "advantages_and_returns", recorded)
    call("--iterations", 3, "--test-episodes", 0, "--run-dir", tmp_path)
    expected = [np.mean(np.sign(x) != np.sign(x - x.mean())) for x in advantages]
    assert [value for _, value in scalars(only(tmp_path))["charts/adv_sign_change"]] == pytest.approx(expected, abs=1e-6)
    assert len({tuple(x.flatten().tolist()) for x in uniforms}) == 3
    assert settings == [{"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01, "fused": True}]


def test_each_epoch_has_an_order_of_its_own(call, tmp_path, monkeypatch):
    seen, encode = [], tldr.encode
    monkeypatch.setattr(tldr, "encode", lambda texts, *rest: (seen.append(list(texts)), encode(texts, *rest))[1])
    none = ["--eval-episodes", 0, "--test-episodes", 0, "--update-epochs", 1, "--checkpoint-interval", 99]
    call("--iterations", 10, *none, "--run-dir", tmp_path)
    first, second = ([text for texts in part for text in texts] for part in (seen[:5], seen[5:]))
    assert len(seen) == 10 and sorted(first) == sorted(second) and first != second


def test_bfloat16_rounding_is_no_reason_to_refuse_a_model_but_a_lost_mask_is(capsys):
    torch.manual_seed(0)
    size = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12}
    config = transformers.LlamaConfig(**size, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3)
    lm = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    agent = tldr.Agent(lm)
    tldr.check_lm(tldr.Args(), "policy", lm, lambda tokens, real, **cache: agent.backbone(tokens, real, None, **cache))
    with pytest.raises(SystemExit):
        seen = lambda tokens, real, **cache: agent.backbone(tokens, torch.ones_like(real), None, **cache)  # noqa: E731
        tldr.check_lm(tldr.Args(), "policy", lm, seen)
    assert "padding on the left changes its numbers" in capsys.readouterr().err
