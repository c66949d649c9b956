"""Whole runs of sppo_rlhf_imdb.py on tiny models: what they leave, resume, signals, two processes, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rlhf_assets
import torch
import transformers
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, scalars, start, wait_for, wandb_run  # noqa: F401
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import sppo_rlhf_imdb as imdb

SCRIPT = "sppo_rlhf_imdb.py"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return rlhf_assets.write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def call(assets, monkeypatch):
    """Runs main() in this process: what a command line does, without starting Python and torch again."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [SCRIPT])

    def call(*changed):
        line = list(map(str, changed))
        parsed = imdb.parse_args(
            line if {"--resume", "--evaluate"} & {*line} else [*rlhf_assets.arguments(assets), *line], imdb.Args()
        )
        imdb.check_args(parsed)
        imdb.main(parsed)

    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_leaves_what_the_readme_says(assets, tmp_path):
    """As a process, whose output is no terminal; with W&B, evaluation on the way, and the model saved."""
    args = [
        *rlhf_assets.arguments(assets),
        "--iterations",
        4,
        "--eval-interval",
        2,
        "--save-model",
        "--track",
        "--run-dir",
        tmp_path,
    ]
    out, err = run(SCRIPT, *args, env={**ENV, "WANDB_MODE": "offline"})
    folder = only(tmp_path, "imdb__*")
    assert re.fullmatch(r"imdb__sppo_rlhf_imdb__1__\d+", folder.name)
    own = [line for line in out.splitlines() if line.startswith(SCRIPT)]
    assert len(own) == 2 and "64 reviews; 1 x cpu, 1 threads" in own[0] and "before" in own[1] and "it/s" not in err
    saved = json.loads((folder / "args.json").read_text())
    assert {"python", "torch", "transformers", "tokenizers", "peft"} <= saved["versions"].keys() and saved["commit"]
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 32 and result["run_id"] == saved["run_id"] and result["seconds"] > 0
    wanted = {"score", "score_stderr", "perplexity", "kl", "kl_k3", "empty_share", "unfinished_share", "judge_score", "entropy"}
    assert wanted <= result["before"].keys() and wanted <= result["after"].keys()
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-5) != result["after"]["kl"]
    assert result["score"] == result["after"]["score"] and 0 < result["after"]["judge_score"] < 1

    logged = scalars(folder)
    for tag in ("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "losses/policy_loss",
                "losses/reverse_loss", "losses/value_loss", "losses/approx_kl", "losses/reference_nll", "charts/SPS",
                "charts/adv_sign_change", "time/generate", "time/score", "time/forward", "time/update"):  # fmt: skip
        assert [step for step, _ in logged[tag]] == [8, 16, 24, 32], tag
        assert np.isfinite([value for _, value in logged[tag]]).all()
    assert [step for step, _ in logged["eval/score"]] == [0, 16, 32]
    assert logged["eval/score"][0][1] == pytest.approx(result["before"]["score"])
    assert logged["eval/score"][-1][1] == pytest.approx(result["score"])

    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 8
    assert np.mean([sample["score"] for sample in samples]) == pytest.approx(result["score"])
    assert np.mean([sample["score_before"] for sample in samples]) == pytest.approx(result["before"]["score"])
    assert any(sample["response"] != sample["response_before"] for sample in samples)
    events = [event for path in folder.glob("events*") for event in EventFileLoader(str(path)).Load()]
    texts = [value for event in events for value in event.summary.value if value.tag.startswith("samples")]
    assert samples[0]["prompt"].encode() in texts[0].tensor.string_val[0]
    evaluated = [event for event in events for value in event.summary.value if value.tag.startswith("eval/samples")]
    assert [event.step for event in evaluated] == [0, 16, 32]
    texts = [event.summary.value[0].tensor.string_val[0].decode() for event in evaluated]
    assert samples[0]["response_before"] in texts[0] and samples[0]["response"] in texts[2]

    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 4
    torch.testing.assert_close(lm.transformer.wte.weight, checkpoint["agent"]["lm.transformer.wte.weight"])
    assert only(folder / "model", "*.safetensors")
    assert transformers.AutoTokenizer.from_pretrained(folder / "model").eos_token == "<|endoftext|>"

    config, history = wandb_run(only(tmp_path, "wandb/offline-run-*/run-*.wandb"))
    assert config["beta"] == 0.4 and config["versions"] == saved["versions"]
    points = [(row["global_step"], row["objective/scores"]) for row in history if "objective/scores" in row]
    assert points == [(step, pytest.approx(value)) for step, value in logged["objective/scores"]]
    media = only(tmp_path, "wandb/offline-run-*/files/media/table")
    (table,) = media.glob("samples_*.json")
    assert json.loads(table.read_text())["data"][0][0] == samples[0]["prompt"]
    tables = [json.loads(path.read_text()) for path in media.glob("eval/samples_*.json")]
    assert [row["global_step"] for row in history if any(key.startswith("eval/samples") for key in row)] == [0, 16, 32]
    written = [dict(zip(table["columns"], table["data"][0], strict=True))["response"] for table in tables]
    assert len(tables) == 3 and {samples[0]["response_before"], samples[0]["response"]} <= {*written}


def test_a_resumed_run_goes_on_to_the_bit(call, tmp_path):
    """Every random number follows from the seed and the iteration: 2 + 2 iterations are 4."""
    common = ["--eval-episodes", 8, "--learning-rate", "1e-3"]
    call("--iterations", 4, *common, "--run-dir", tmp_path / "whole")
    call("--iterations", 2, *common, "--run-dir", tmp_path / "halves")
    whole, halves = only(tmp_path / "whole"), only(tmp_path / "halves")
    call("--resume", halves, "--iterations", 4)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    for name, weights in one["agent"].items():
        assert torch.equal(weights, other["agent"][name]), name
    for tag in ("losses/policy_loss", "objective/kl"):
        assert scalars(whole)[tag] == scalars(halves)[tag]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, halves)]
    assert results[0]["before"] == results[1]["before"] and results[0]["after"] == results[1]["after"]
    assert results[0]["run_id"] != results[1]["run_id"]


def test_a_finished_run_is_left_alone(call, tmp_path, capsys):
    call("--iterations", 1, "--run-dir", tmp_path)
    files = {path: path.read_bytes() for path in only(tmp_path).iterdir()}
    call("--resume", only(tmp_path))
    assert "has finished its 1 iterations; a larger --iterations continues it" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in only(tmp_path).iterdir()} == files


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_and_logs_no_step_twice(signum, assets, call, tmp_path):
    args = [*rlhf_assets.arguments(assets), "--iterations", 400, "--checkpoint-interval", 3, "--eval-episodes", 0]
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


def test_two_processes_learn_what_one_does(assets, tmp_path):
    args = [*rlhf_assets.arguments(assets), "--iterations", 2]
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
        torch.testing.assert_close(weights[name], other[name], atol=2e-5, rtol=1e-3)
    for tag in ("losses/policy_loss", "losses/reverse_loss", "losses/reference_nll", "objective/kl", "eval/perplexity"):
        values = [[value for _, value in scalars(folder)[tag]] for folder in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag


def test_lora_resumes_and_saves_a_merged_model(call, tmp_path):
    args = ["--lora-r", 4, "--iterations", 2, "--save-model", "--learning-rate", "1e-2", "--run-dir", tmp_path]
    call(*args)
    folder = only(tmp_path)
    assert (folder / "checkpoint.pt").stat().st_size < 300_000  # adapters and head, no language model
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert all("lora_" in name or "value_head" in name for name in weights)
    call("--resume", folder, "--iterations", 3)
    assert scalars(folder)["objective/kl"][-1][1] != 0
    saved = json.loads((folder / "args.json").read_text())["args"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    agent = imdb.Agent(transformers.AutoModelForCausalLM.from_pretrained(saved["policy"]), 4)
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"], strict=False)
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(lm(ids).logits, agent.lm(ids).logits, atol=1e-4, rtol=1e-4)
    assert (lm(ids).logits - agent.lm.get_base_model()(ids).logits).abs().max() < 1e-3
    with agent.lm.disable_adapter():
        assert (lm(ids).logits - agent.lm(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("loss", ["--alpha 1 --beta 0", "--alpha 0 --beta 1"], ids=["ppo", "reverse ppo"])
def test_the_policy_learns_what_is_scored(loss, call, tmp_path, monkeypatch):
    """Share of the letter e in the text; the reverse loss alone, whose gradient is PPO's, learns it too."""
    monkeypatch.setattr(imdb, "score", lambda texts, *_: torch.tensor([text.count("e") / max(1, len(text)) for text in texts]))
    call(
        *("--iterations", 30, "--trajectories-per-update", 32, "--minibatch-size", 16, "--reference-nll-coef", 0),
        *("--checkpoint-interval", 40, "--kl-coef", 0, "--run-dir", tmp_path, *loss.split()),
        *("--min-response-length", 6, "--top-k", 50),
    )
    scores = [value for _, value in scalars(only(tmp_path))["objective/scores"]]
    assert np.mean(scores[-3:]) > 1.5 * np.mean(scores[:3])


def test_a_checkpoint_of_other_weights_is_refused(call, tmp_path, capsys):
    call("--iterations", 1, "--run-dir", tmp_path)
    checkpoint = torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["renamed"] = checkpoint["agent"].pop("lm.transformer.wte.weight")
    torch.save(checkpoint, only(tmp_path) / "checkpoint.pt")
    with pytest.raises(SystemExit):
        call("--resume", only(tmp_path), "--iterations", 2)
    assert "its checkpoint.pt has other weights than" in capsys.readouterr().err


def test_a_broken_run_ends_and_keeps_the_checkpoint_from_before(call, tmp_path):
    call("--iterations", 1, "--run-dir", tmp_path)
    folder = only(tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["value_head.bias"].fill_(1e30)  # its squared error is not finite
    torch.save(checkpoint, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(
        SystemExit, match=r"losses/\w+ is (inf|nan) in iteration 2; the run ends, .*checkpoint.pt is from before"
    ):
        call("--resume", folder, "--iterations", 2)
    assert (folder / "checkpoint.pt").read_bytes() == before


BAD = [
    ("--minibatch-size 3", "--minibatch-size 3: expected a divisor of trajectories_per_update = 8"),
    ("--gradient-accumulation 3", "--minibatch-size 4: expected a multiple of processes x gradient_accumulation = 1 x 3"),
    ("--beta -1", "--beta -1.0: must be greater than or equal to 0"),
    ("--Z 0", "--Z 0.0: must be less than 0"),
    ("--temperature 0", "--temperature 0.0: must be greater than 0"),
    ("--min-response-length 7", "--min-response-length 7: expected response_length = 6 or less"),
    ("--iterations 0", "--iterations 0: must be greater than 0"),
    ("--num-threads 100000", "--num-threads 100000: must be less than or equal to 1024"),
    ("--bta 1", "error: --bta: unknown argument; did you mean --beta?"),
    ("--top-k x", "error: Error parsing --top-k: invalid literal for int() with base 10: 'x'; see --help"),
    ("--resume /no/such/run", "--resume /no/such/run: not the folder of a run"),
    ("--max-prompt-length 60", "--max-prompt-length 60: expected 58 or less, the policy's context - response_length"),
    ("--reward-label neutral", "--reward-label neutral: expected one of the reward model's 0, 1, negative, positive"),
    ("--dataset {tmp}/no_text.jsonl", "no_text.jsonl: expected a column named text; its columns are review"),
    ("--dataset {tmp}/null.jsonl", "null.jsonl: expected a column text that holds texts alone"),
    ("--dataset {tmp}/missing.jsonl", "missing.jsonl: expected a Hub id, a folder or a file of JSON lines that can be loaded"),
    ("--dataset {tmp}/short.jsonl", "expected 8 training and 8 validation reviews or more; it has 8 and 2"),
    ("--policy {tmp}/nothing", "--policy {tmp}/nothing: expected a Hub id or a folder that can be loaded"),
    ("--policy {tmp}/cut", "--policy {tmp}/cut: expected a Hub id or a folder that can be loaded"),
    ("--policy {tmp}/gemma", "expected a causal model that takes padding, positions and a cache (its logits are not its head "),
    ("--tokenizer {tmp}/cut", "--tokenizer {tmp}/cut: expected"),
    ("--reward-model {tmp}/nothing", "--reward-model {tmp}/nothing: expected a Hub id or a folder that can be loaded"),
    ("--reward-model {tmp}/headless", "expected a model with all its weights; classifier.bias, classifier.weight are missing"),
    ("--reward-model {tmp}/one_label --reward-label 0", "expected a classifier with two labels or more"),
    ("--reward-model {tmp}/no_pad", "--reward-model {tmp}/no_pad: expected a classifier with a tokenizer that pads"),
    ("--judge {tmp}/no_text.jsonl", "--judge {tmp}/no_text.jsonl: expected"),
    ("--judge {tmp}/odd.json", "--judge {tmp}/odd.json: expected"),
    ("--top-k 100000", "--top-k 100000: expected the policy's vocabulary, "),
    ("--eval-episodes 1", "--eval-episodes 1: expected 0, or 2 or more for a standard error"),
]


def write_broken(folder):
    """Files and models that no run can use."""
    (folder / "no_text.jsonl").write_text('{"review": "good"}\n')
    (folder / "null.jsonl").write_text('{"text": "good film"}\n{"text": null}\n')
    (folder / "short.jsonl").write_text('{"text": "good film"}\n' * 10)
    (folder / "odd.json").write_text('{"intercept": 0, "terms": {"great": 3}}')
    tokenizer = rlhf_assets.make_tokenizer()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    rlhf_assets.make_lm(len(tokenizer)).save_pretrained(folder / "cut")  # and no tokenizer beside it
    weights = (folder / "cut/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    gemma = transformers.Gemma2Config(**size, **heads, final_logit_softcapping=0.01, initializer_range=1.0)
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(folder / "gemma")
    classifier = rlhf_assets.make_classifier(len(tokenizer))
    classifier.bert.save_pretrained(folder / "headless")
    classifier.save_pretrained(folder / "no_pad")
    classifier.config.num_labels = 1
    transformers.BertForSequenceClassification(classifier.config).save_pretrained(folder / "one_label")
    for name in ("headless", "one_label"):
        tokenizer.save_pretrained(folder / name)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "no_pad")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    write_broken(folder)
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
    assert err.count("\n") == 1 and "assets/imdb/" in err and "python benchmark/assets/make_rlhf_assets.py imdb" in err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_argument_and_the_defaults_of_offline(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    for defaults, size in ((imdb.Args(), "112"), (imdb.OFFLINE, str(imdb.OFFLINE.trajectories_per_update))):
        with pytest.raises(SystemExit) as stopped:
            imdb.parse_args(["--help"], defaults)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        for name in imdb.Args.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in out
        assert re.search(rf"\(default: {size}\)", out)


def test_model_folder_replaces_an_old_one_whole(call, tmp_path):
    call("--iterations", 1, "--save-model", "--run-dir", tmp_path)
    folder = only(tmp_path)
    shutil.copy(folder / "args.json", folder / "model" / "stale.json")
    (folder / "model.tmp").mkdir()  # of a run that was killed while it saved
    shutil.copy(folder / "args.json", folder / "model.tmp" / "stale.json")
    call("--resume", folder, "--iterations", 2)
    assert not (folder / "model" / "stale.json").exists() and not (folder / "model.tmp").exists()


def test_each_rollout_has_new_chance_and_the_logged_sign_change_and_optimiser_are_right(call, tmp_path, monkeypatch):
    uniforms, advantages, settings = [], [], []
    rollout, gae, adamw = imdb.rollout, imdb.advantages_and_returns, torch.optim.AdamW
    monkeypatch.setattr(imdb, "rollout", lambda *a: (uniforms.append(a[5]), rollout(*a))[1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **given: (settings.append(given), adamw(*a, **given))[1])

    def recorded(batch, args):
        found = gae(batch, args)
        advantages.append(found[0][batch["tokens"][:, -args.response_length :] != imdb.PAD].numpy())
        return found

    monkeypatch.setattr(imdb, "advantages_and_returns", recorded)
    call("--iterations", 3, "--eval-episodes", 0, "--run-dir", tmp_path)
    assert len({tuple(x.flatten().tolist()) for x in uniforms}) == 3
    assert settings == [{"lr": 1e-3, "eps": 1e-5, "weight_decay": 1e-6, "fused": True}]
    expected = [np.mean(np.sign(x) != np.sign(x - x.mean())) for x in advantages]
    assert [value for _, value in scalars(only(tmp_path))["charts/adv_sign_change"]] == pytest.approx(expected, abs=1e-6)


def test_each_epoch_has_an_order_of_its_own(call, tmp_path, monkeypatch):
    seen, encode = [], imdb.encode
    monkeypatch.setattr(imdb, "encode", lambda texts, *rest: (seen.append(list(texts)), encode(texts, *rest))[1])
    none = ["--eval-episodes", 0, "--update-epochs", 1, "--checkpoint-interval", 99]
    call("--iterations", 16, *none, "--run-dir", tmp_path)
    first, second = ([text for texts in part for text in texts] for part in (seen[:8], seen[8:]))
    assert len(seen) == 16 and sorted(first) == sorted(second) and first != second
