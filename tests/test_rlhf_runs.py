"""Whole runs of both RLHF scripts on tiny models: what they leave, resume, --evaluate, signals, two processes, bad input."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import peft
import pytest
import rlhf_assets
import tldr_assets
import torch
import transformers
from filelock import FileLock
from helpers import (  # noqa: F401
    ENV,
    ROOT,
    no_process_outlives_its_test,
    only,
    run,
    scalars,
    start,
    unchanged_process,
    wait_for,
    wandb_records,
    wandb_run,
)
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import sppo_rlhf_imdb as imdb
import sppo_rlhf_tldr as tldr

ASSETS = {imdb: rlhf_assets, tldr: tldr_assets}
ARM = {imdb: "sppo_a0.5_b0.4", tldr: "sppo_a0.5_b0.2"}
TEST = {imdb: "eval", tldr: "test"}  # where the scores before and after training are logged
NONE = {imdb: ["--eval-episodes", 0], tldr: ["--eval-episodes", 0, "--test-episodes", 0]}
each = pytest.mark.parametrize("task", [imdb, tldr], ids=["imdb", "tldr"], indirect=True)
one = pytest.mark.parametrize("task", [imdb], ids=["imdb"], indirect=True)  # of the text that both share
summaries = pytest.mark.parametrize("task", [tldr], ids=["tldr"], indirect=True)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return {module: own.write_assets(tmp_path_factory.mktemp("assets")) for module, own in ASSETS.items()}


@pytest.fixture(scope="module")
def finished_runs():
    return {}


@pytest.fixture
def task(request, assets):
    """The script as a module, and its arguments."""
    module = request.param
    return module, list(map(str, ASSETS[module].arguments(assets[module])))


@pytest.fixture
def call(task, monkeypatch):
    """main() in this process: what a command line does, without starting Python and torch again."""
    module, args = task
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words):
        line = list(map(str, words))
        with unchanged_process():
            module.main(module.parse_args(line if {"--resume", "--evaluate"} & {*line} else [*args, *line]))

    return call


@pytest.fixture
def finished(task, call, finished_runs, tmp_path_factory, tmp_path):
    """A copy of a finished run of two iterations."""
    if task[0] not in finished_runs:
        folder = tmp_path_factory.mktemp("finished")
        call("--iterations", 2, "--run-dir", folder)
        finished_runs[task[0]] = only(folder)
    return shutil.copytree(finished_runs[task[0]], tmp_path / "finished" / finished_runs[task[0]].name)


def refused(module, call, *words):
    with pytest.raises(module.BadInput) as error:
        call(*words)
    return str(error.value)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }


def result(folder):
    return json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


# --- what a run leaves ------------------------------------------------------------------------------------------------


@each
def test_a_run_leaves_what_the_readme_says(task, tmp_path):
    """As a process, whose output is no terminal; with W&B, evaluation on the way, and the models saved."""
    module, args = task
    script, name = f"{module.__name__}.py", TEST[module]
    wandb = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "a,b", "WANDB_PROJECT": "p"}
    env = {**ENV, **wandb, "WANDB_DIR": str(tmp_path)}
    words = ["--iterations", 4, "--eval-interval", 2, "--save-model", "--track", "--run-dir", tmp_path / "runs"]
    out, err = run(script, *args, *words, env=env)
    folder = only(tmp_path / "runs")  # nothing of W&B in TensorBoard's folder
    assert re.fullmatch(rf"{module.TASK}__{ARM[module]}__1__\d{{13}}", folder.name)
    assert "1 threads; 1 x cpu; run folder" in out and "4 iterations in" in out and "/iteration" not in err
    saved, found = json.loads((folder / "args.json").read_text()), result(folder)
    assert {"python", "torch", "transformers", "tokenizers", "peft"} <= saved["versions"].keys() and saved["commit"]
    assert saved["args"]["exp_name"] == ARM[module]
    assert found["global_step"] == 32 and found["run_id"] == saved["run_id"] and found["seconds"] > 0
    wanted = {"score", "score_stderr", "perplexity", "perplexity_released", "kl", "kl_k3", "empty_share", "unfinished_share"}
    wanted |= {"judge_score"} if module is imdb else {"rouge1", "rouge2", "rougeL", "words"}
    assert wanted <= found["before"].keys() and wanted <= found["after"].keys()
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-5) != found["after"]["kl"]
    assert found["score"] == found["after"]["score"]

    logged = scalars(folder)
    for tag in ("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "losses/policy_loss",
                "losses/reverse_loss", "losses/value_loss", "losses/approx_kl", "losses/reference_nll", "charts/SPS",
                "charts/adv_sign_change", "time/generate", "time/score", "time/forward", "time/update"):  # fmt: skip
        assert [step for step, _ in logged[tag]] == [8, 16, 24, 32], tag
        assert np.isfinite([value for _, value in logged[tag]]).all()
    assert [step for step, _ in logged["eval/score"]] == ([0, 16, 32] if module is imdb else [16, 32])
    assert logged[f"{name}/score"][0][1] == pytest.approx(found["before"]["score"])
    assert logged[f"{name}/score"][-1][1] == pytest.approx(found["score"])

    samples = json.loads((folder / "samples.json").read_text())
    scores = [sample["score"] for sample in samples]
    assert len(samples) == 8 and np.mean(scores) == pytest.approx(found["score"])
    assert found["score_stderr"] == pytest.approx(np.std(scores, ddof=1) / 8**0.5, rel=1e-5)
    assert np.mean([sample["score_before"] for sample in samples]) == pytest.approx(found["before"]["score"])
    assert any(sample["response"] != sample["response_before"] for sample in samples)
    events = [event for path in folder.glob("events*") for event in EventFileLoader(str(path)).Load()]
    tables = {value.tag.removesuffix("/text_summary"): value for event in events for value in event.summary.value}
    shown = tables["samples"].tensor.string_val[0].decode()
    assert all(re.sub(r"[\n|]", " ", sample["response"]) in shown for sample in samples) and f"{name}/samples" in tables

    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert transformers.AutoTokenizer.from_pretrained(folder / "model").eos_token == "<|endoftext|>"
    if module is imdb:
        torch.testing.assert_close(lm.transformer.wte.weight, weights(folder)["lm.transformer.wte.weight"])
    else:
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapters/policy").eval()
        ids = torch.arange(20, 40)[None]
        torch.testing.assert_close(lm(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        with adapted.disable_adapter():
            assert (lm(ids).logits - adapted(ids).logits).abs().max() > 1e-2
        assert json.loads((folder / "adapters/value/adapter_config.json").read_text())["modules_to_save"] == ["score"]

    file = only(tmp_path, "wandb/offline-run-*/run-*.wandb")
    config, history = wandb_run(file)
    assert config["beta"] == module.Args().beta and config["versions"] == saved["versions"]
    points = [(row["global_step"], row["objective/scores"]) for row in history if "objective/scores" in row]
    assert points == [(step, pytest.approx(value)) for step, value in logged["objective/scores"]]
    (about,) = (record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert (about.run_group, list(about.tags), about.project) == ("g", ["a", "b"], "p")
    metrics = [record.metric for record in wandb_records(file) if record.WhichOneof("record_type") == "metric"]
    assert {metric.name or metric.glob_name: metric.step_metric for metric in metrics}["*"] == "global_step"
    assert any(metric.name == f"{name}/score" and metric.summary.max for metric in metrics)
    media = only(tmp_path, "wandb/offline-run-*/files/media/table")
    (table,) = media.glob("samples_*.json")
    assert next(iter(samples[0].values())) == json.loads(table.read_text())["data"][0][0]
    assert len(list(media.glob("eval/samples_*.json"))) == (3 if module is imdb else 2)


@each
def test_a_resumed_run_goes_on_to_the_bit(task, call, finished, tmp_path):
    """Every random number follows from the seed and the iteration, dropout's included: 2 + 2 iterations are 4."""
    module, _ = task
    common = ["--lora-dropout", 0.3, "--gradient-checkpointing"] if module is tldr else []
    call("--iterations", 4, *common, "--run-dir", tmp_path / "whole")
    if common:
        call("--iterations", 2, *common, "--run-dir", tmp_path / "halves")
    whole, halves = only(tmp_path / "whole"), only(tmp_path / "halves") if common else finished
    time.sleep(1.1)  # TensorBoard orders files by the second of their start
    call("--resume", halves, "--iterations", 4)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(halves)[name]), name
    for tag in ("losses/policy_loss", "objective/kl"):
        assert scalars(whole)[tag] == scalars(halves)[tag]
    assert result(whole)["before"] == result(halves)["before"] and result(whole)["after"] == result(halves)["after"]
    assert result(whole)["run_id"] != result(halves)["run_id"]
    if module is tldr:
        assert (whole / "checkpoint.pt").stat().st_size < 100_000  # adapters and head, no language model


@each
def test_what_may_change_with_resume(task, call, finished, capsys):
    module, _ = task
    before = contents(finished)
    call("--resume", finished)
    assert "has finished its 2 iterations; a larger --iterations continues it" in capsys.readouterr().out
    assert "--learning-rate 1.0: the run keeps its own, " in refused(module, call, "--resume", finished, "--learning-rate", 1)
    assert "--iterations 1: expected 2, the run's own, or more" in refused(
        module, call, "--resume", finished, "--iterations", 1
    )
    assert f"{finished.parent} is no run folder" in refused(module, call, "--resume", finished.parent)
    with FileLock(finished / ".lock"):
        line = refused(module, call, "--resume", finished, "--iterations", 3)
        assert f"--resume {finished}: another process is training this run" in line
    assert contents(finished) == before
    call("--resume", finished, "--iterations", 4, "--eval-interval", 1, "--checkpoint-interval", 3)
    saved = json.loads((finished / "args.json").read_text())
    assert saved["args"]["eval_interval"] == 1 and saved["earlier"] == []
    steps = [step for step, _ in scalars(finished)["eval/score"]]
    assert steps == ([0, 16, 24, 32] if module is imdb else [24, 32])


@each
def test_a_run_folder_of_an_earlier_version(task, call, finished, capsys):
    """With arguments that have gone since, and the old form of others: it is evaluated and resumed, and they are named."""
    saved = json.loads((finished / "args.json").read_text())
    saved["args"] |= {"wandb_group": None, "wandb_tags": None, "exp_name": task[0].__name__, "wandb_project_name": "x"}
    (finished / "args.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match=r"ignored arguments of an earlier version: wandb_group, wandb_tags"):
        call("--evaluate", finished)
        call("--resume", finished, "--iterations", 3)
    assert json.loads((finished / "args.json").read_text())["args"].keys() == task[0].Args.__dataclass_fields__.keys()


def test_evaluation_refuses_what_its_processes_cannot_share():
    with pytest.raises(imdb.BadInput, match=r"--eval-episodes 7: expected a multiple of the 2 processes"):
        imdb.check_task(imdb.Args(eval_episodes=7), 2)


@each
def test_arms_have_names_of_their_own(task):
    module, _ = task
    beta = module.Args().beta
    for changed, name in (
        ({"alpha": 1.0, "beta": 0.0}, "ppo"),
        ({"alpha": 1.0, "beta": 0.0, "norm_adv": False}, "ppo_raw"),
        ({"alpha": 0.9, "beta": 0.0}, "ppo_a0.9"),
        ({"Z": -2.0, "literal_signs": True}, f"sppo_a0.5_b{beta}_Z-2_literal"),
    ):
        assert module.name_arm(module.Args(**changed)) == name


@each
def test_a_run_is_evaluated_by_one_process(task, call, finished, monkeypatch):
    """Several would print each text several times and write one model together."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(task[0].BadInput, match=r": expected one process, not 2"):
        call("--evaluate", finished)


# --- signals, kills, faults -------------------------------------------------------------------------------------------


@each
def test_an_evaluation_that_fails_loses_no_iteration(task, call, tmp_path, monkeypatch):
    """As for want of memory: the iteration before it is saved."""
    module, _ = task
    evaluate, calls = module.evaluate, []
    monkeypatch.setattr(module, "evaluate", lambda *own: (calls.append(1), evaluate(*own) if len(calls) < 3 else 1 / 0)[1])
    with pytest.raises(ZeroDivisionError):
        call("--iterations", 4, "--eval-interval", 1, "--checkpoint-interval", 1, "--run-dir", tmp_path)
    assert torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] == 2


@each
def test_a_signal_saves_and_resume_goes_on(task, call, finished, capsys, tmp_path, monkeypatch):
    """In the last iteration. In a thread, where no handler can be set, a run is possible, too."""
    module, _ = task
    update, before = module.update, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "update", lambda *a: (a[-1] == 1 and signal.raise_signal(signal.SIGTERM), update(*a))[1])
    with pytest.raises(SystemExit) as stopped:
        call("--iterations", 2, "--run-dir", tmp_path / "runs")
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    folder = only(tmp_path / "runs")
    out = capsys.readouterr().out
    assert f"SIGTERM after iteration 2, saved; continue with --resume {folder}" in out and not (folder / "result.json").exists()
    monkeypatch.setattr(module, "update", update)
    thread = threading.Thread(target=lambda: module.main(module.parse_args(["--resume", str(folder)])))
    thread.start()
    thread.join()
    assert result(folder)["after"] == result(finished)["after"]


@one
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_and_logs_no_step_twice(signum, task, call, tmp_path):
    module, args = task
    words = ["--iterations", 400, "--checkpoint-interval", 3, *NONE[module], "--run-dir", tmp_path]
    process = start(f"{module.__name__}.py", *args, *words)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signum)
    _, err = process.communicate()
    if signum == signal.SIGINT:
        assert process.returncode == 130 and "finishing this iteration, then saving; once more quits now" in err
    folder = only(tmp_path)
    done = torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"]
    assert 0 < done < 390
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["iterations"] = done + 2  # so that the test ends soon
    (folder / "args.json").write_text(json.dumps(saved))
    time.sleep(1.1)  # TensorBoard orders files by the second of their start
    call("--resume", folder)
    assert sorted(step for step, _ in scalars(folder)["objective/scores"]) == [8 * (i + 1) for i in range(done + 2)]


@one
def test_ctrl_c_before_there_is_a_run_ends_at_once_and_leaves_nothing(task, tmp_path):
    """A Hub that takes the connection and never answers holds the script while it loads."""
    module, args = task
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        env = {**ENV, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        process = start(f"{module.__name__}.py", *args, "--policy", "no/such", "--run-dir", tmp_path / "runs", env=env)
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "Traceback" not in err and not (tmp_path / "runs").exists()


@each
def test_a_broken_run_ends_and_keeps_the_checkpoint_from_before(task, call, finished):
    module, _ = task
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    name = "value_head.bias" if module is imdb else "heads.value.weight"
    checkpoint["agent"][name].fill_(1e30)  # its squared error is not finite
    torch.save(checkpoint, finished / "checkpoint.pt")
    before = (finished / "checkpoint.pt").read_bytes()
    broken = r"losses/\w+ is (inf|nan) in iteration 3; the run ends, .* keeps the last checkpoint"
    with pytest.raises(FloatingPointError, match=broken):
        call("--resume", finished, "--iterations", 3)
    assert (finished / "checkpoint.pt").read_bytes() == before
    checkpoint["agent"]["renamed"] = checkpoint["agent"].pop(name)
    torch.save(checkpoint, finished / "checkpoint.pt")
    assert "has other weights than --policy" in refused(module, call, "--resume", finished, "--iterations", 3)


@each
def test_two_processes_learn_what_one_does(task, call, tmp_path):
    module, args = task
    words = ["--iterations", "2", "--run-dir"]
    call(*words, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / f"{module.__name__}.py"), *args, *words, str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (only(tmp_path / name) for name in ("one", "two"))
    shares = [value for _, value in scalars(one)["objective/unfinished_share"]]
    assert all(0 < share < 1 for share in shares)  # rows of different length, as tokens and not rows are to be weighted
    assert done.stdout.count("2 x cpu") == 1 == done.stdout.count("2 iterations in")  # one of them talks
    other = weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=1e-2)
    for tag in (
        "losses/policy_loss",
        "losses/value_loss",
        "losses/reference_nll",
        "objective/kl",
        f"{TEST[module]}/perplexity",
    ):
        values = [[value for _, value in scalars(folder)[tag]] for folder in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag


@one
def test_without_a_terminal_one_line_a_minute(task, call, capsys, tmp_path, monkeypatch):
    module, _ = task
    log, waits = module.Run.log, []

    def logged(self, iteration, *rest):
        self.next_line = 0 if iteration % 2 == 0 else self.next_line  # as if a minute were over
        log(self, iteration, *rest)
        waits.append(self.next_line - time.monotonic())

    monkeypatch.setattr(module.Run, "log", logged)
    call("--iterations", 4, *NONE[module], "--run-dir", tmp_path)
    lines = re.findall(r"(?m)^iteration (\d) of 4, score \d\.\d+, [\d,]+ tokens/s, 00:00 left$", capsys.readouterr().out)
    assert lines == ["2", "4"] and all(30 < wait <= 60 for wait in waits)


# --- what is learned --------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("loss", ["--alpha 1 --beta 0", "--alpha 0 --beta 1"], ids=["ppo", "reverse ppo"])
def test_the_policy_learns_what_is_scored(loss, task, call, tmp_path, monkeypatch):
    """Share of the letter e in the text; the reverse loss alone, whose gradient is PPO's, learns it too."""
    module, _ = task
    share = lambda text: text.count("e") / max(1, len(text))  # noqa: E731
    monkeypatch.setattr(module, "score", lambda texts, *_: torch.tensor([share(text.split("TL;DR:")[-1]) for text in texts]))
    words = ["--iterations", 30, "--trajectories-per-update", 32, "--minibatch-size", 16, "--reference-nll-coef", 0]
    words += ["--checkpoint-interval", 40, "--kl-coef", 0, "--min-response-length", 6, "--top-k", 50, *NONE[module]]
    words += [] if module is imdb else ["--lora-r", 8, "--lora-alpha", 16, "--learning-rate", "2e-2"]
    call(*words, "--run-dir", tmp_path, *loss.split())
    scores = [value for _, value in scalars(only(tmp_path))["objective/scores"]]
    assert np.mean(scores[-3:]) > 1.5 * np.mean(scores[:3])


@each
@pytest.mark.parametrize("norm_adv", [True, False])
def test_what_an_iteration_hands_on(norm_adv, task, call, tmp_path, monkeypatch):
    """New chance in each rollout; advantages whitened or not; the logged share of changed signs; AdamW's settings."""
    module, _ = task
    uniforms, raw, learned, settings = [], [], [], []
    rollout, gae, update, adamw = module.rollout, module.advantages_and_returns, module.update, torch.optim.AdamW
    monkeypatch.setattr(module, "rollout", lambda *a: (uniforms.append(a[-3]), rollout(*a))[1])
    monkeypatch.setattr(module, "advantages_and_returns", lambda *a: (raw.append(gae(*a)[0]), gae(*a))[1])
    monkeypatch.setattr(module, "update", lambda *a: (learned.append(a[-2]), update(*a))[1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **given: (settings.append(given), adamw(*a, **given))[1])
    call("--iterations", 3, *NONE[module], "--run-dir", tmp_path, f"--{'' if norm_adv else 'no-'}norm-adv")
    assert len({tuple(x.flatten().tolist()) for x in uniforms}) == 3
    rate, decay = (1e-3, 1e-6) if module is imdb else (1e-2, 0.01)
    assert settings == [{"lr": rate, "eps": 1e-5, "weight_decay": decay, "fused": True}]
    expected = []
    for batch, before in zip(learned, raw, strict=True):
        tokens, advantages = (batch[0], batch[3]) if module is imdb else (batch["tokens"], batch["advantages"])
        real = tokens[:, -6:] != module.PAD
        after = (before - before[real].mean()) / before[real].std(correction=0) if norm_adv else before
        torch.testing.assert_close(advantages[real], after[real], atol=1e-5, rtol=1e-4)
        expected.append((before.sign() != after.sign())[real].float().mean().item())
    assert [value for _, value in scalars(only(tmp_path))["charts/adv_sign_change"]] == pytest.approx(expected, abs=1e-6)
    assert any(expected) == norm_adv


@each
def test_each_epoch_has_an_order_of_its_own(task, call, tmp_path, monkeypatch):
    module, _ = task
    seen, encode = [], module.encode
    monkeypatch.setattr(module, "encode", lambda texts, *rest: (seen.append(list(texts)), encode(texts, *rest))[1])
    parts = 8 if module is imdb else 5
    none = [*NONE[module], "--update-epochs", 1, "--checkpoint-interval", 99]
    call("--iterations", 2 * parts, *none, "--run-dir", tmp_path)
    first, second = ([text for texts in part for text in texts] for part in (seen[:parts], seen[parts:]))
    assert sorted(first) == sorted(second) and first != second


@one
def test_lora_resumes_and_saves_a_merged_model(task, call, tmp_path):
    call("--lora-r", 4, "--iterations", 2, "--save-model", "--learning-rate", "1e-2", "--run-dir", tmp_path)
    folder = only(tmp_path)
    assert (folder / "checkpoint.pt").stat().st_size < 300_000  # adapters and head, no language model
    assert all("lora_" in name or "value_head" in name for name in weights(folder))
    call("--resume", folder, "--iterations", 3)
    saved = json.loads((folder / "args.json").read_text())["args"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    agent = imdb.Agent(transformers.AutoModelForCausalLM.from_pretrained(saved["policy"]), 4)
    agent.load_state_dict(weights(folder), strict=False)
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(lm(ids).logits, agent.lm(ids).logits, atol=1e-4, rtol=1e-4)
    with agent.lm.disable_adapter():
        assert (lm(ids).logits - agent.lm(ids).logits).abs().max() > 1e-2


@summaries
def test_a_whole_reward_model_scores_a_run(task, call, assets, finished, tmp_path, capsys):
    """The reward adapter merged into its base, with its head: the run is the adapter's own, also resumed and evaluated."""
    base = assets[tldr] / "policy"
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=1)
    merged = peft.PeftModel.from_pretrained(classifier, assets[tldr] / "reward").merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    words = ["--reward-model", tmp_path / "whole", "--reward-base", "nothing"]
    call("--iterations", 1, "--run-dir", tmp_path / "run", *words)
    whole = only(tmp_path / "run")
    call("--resume", whole, "--iterations", 2)
    for name in ("before", "after"):
        assert result(whole)[name] == pytest.approx(result(finished)[name], rel=1e-3, abs=1e-3)
    capsys.readouterr()
    call("--evaluate", whole)
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert np.mean(scores) == pytest.approx(result(whole)["score"])


# --- --evaluate and --save-model --------------------------------------------------------------------------------------


@each
def test_evaluate_prints_the_samples_of_the_held_out_texts_and_writes_nothing(task, call, finished, capsys):
    before, saved = contents(finished), result(finished)
    call("--evaluate", finished)
    out, err = capsys.readouterr()
    samples = json.loads((finished / "samples.json").read_text())
    printed = [json.loads(line) for line in out.splitlines()]
    assert printed == [{key: value for key, value in row.items() if not key.endswith("_before")} for row in samples]
    assert f"score {saved['score']:.4g}, " in err and f"perplexity {saved['after']['perplexity']:.4g}" in err
    assert f"; {len(samples)} texts, iteration 2\n" in err and contents(finished) == before


@each
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_evaluate_continues_given_prompts(task, call, finished, capsys, tmp_path, ending):
    """The held-out prompts, given as a file, get the held-out responses: same tokens, same random numbers."""
    samples = json.loads((finished / "samples.json").read_text())
    prompts = [row.get("post", row["prompt"]) for row in samples]
    lines = prompts if ending == "txt" else [json.dumps({"prompt": prompt, "id": i or "x"}) for i, prompt in enumerate(prompts)]
    (tmp_path / f"prompts.{ending}").write_text("\n".join(lines) + "\n\n")
    call("--evaluate", finished, "--prompts", tmp_path / f"prompts.{ending}")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name in ("prompt", "response", "score"):
        assert [row[name] for row in printed] == pytest.approx([row[name] for row in samples]), name
    assert any(row["response"] != row["response_before"] for row in samples)  # so it is the trained policy that wrote


@each
def test_prompts_are_lines_and_are_printed_as_given(task, call, finished, capsys, tmp_path):
    """A line may hold any other separator of Unicode; a byte order mark is no part of the first."""
    module, _ = task
    prompts = ["one\u2028two", "caf\xe9 \x0b film", "good " * 40 + "film"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8-sig")
    call("--evaluate", finished, "--prompts", tmp_path / "prompts.txt")
    out, err = capsys.readouterr()
    assert out.isascii() and [json.loads(line)["prompt" if module is imdb else "post"] for line in out.splitlines()] == prompts
    assert "; 3 texts" in err
    for name, data, reason in (
        ("other.jsonl", b'{"text": "a"}\n', "row 1 has no text in a column prompt; its columns are text"),
        ("strings.jsonl", b'{"prompt": "a"}\n"b"\n', "line 2: "),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2: "),
        ("latin.txt", b"caf\xe9\n", "can't decode byte 0xe9"),
        ("none.txt", None, "No such file"),
    ):
        if data:
            (tmp_path / name).write_bytes(data)
        assert reason in refused(module, call, "--evaluate", finished, "--prompts", tmp_path / name), name
    assert "--prompts x: expected --evaluate with it" in refused(module, call, "--prompts", "x")
    assert "--beta 3.0: the run keeps its own, " in refused(module, call, "--evaluate", finished, "--beta", 3)


@each
def test_models_are_saved_by_the_run_by_resume_and_by_evaluate(task, call, finished, capsys, tmp_path):
    """The same files each time, and nothing else is touched; a later checkpoint's take the place of an earlier one's, whole."""
    own, exported = (shutil.copytree(finished, tmp_path / name) for name in ("own", "exported"))
    call("--resume", own, "--save-model")
    assert result(own)["after"] == result(finished)["after"] and result(own)["before"] == result(finished)["before"]
    before = contents(exported)
    capsys.readouterr()
    call("--evaluate", exported, "--save-model")
    assert capsys.readouterr().out.count("\n") == 8
    new = {path: data for path, data in contents(exported).items() if path not in before}
    assert contents(exported) == before | new and any(path.match("model/model.safetensors") for path in new)
    assert new == {path: contents(own)[path] for path in new}
    assert {path.parts[0] for path in new} == {path.name for path in own.iterdir() if path.name in ("model", "adapters")}
    shutil.rmtree(own / "model")
    call("--evaluate", own)  # saves only if it is told to itself
    assert not (own / "model").exists()
    (exported / "model/stale.json").write_text("{}")
    (exported / "model.tmp").mkdir()  # of a run that was killed while it saved
    call("--resume", exported, "--iterations", 3)
    call("--resume", exported, "--save-model")
    assert contents(exported)[next(p for p in new if p.match("model/*.safetensors"))] not in new.values()
    assert not (exported / "model/stale.json").exists() and not (exported / "model.tmp").exists()


@each
def test_models_may_have_moved_and_evaluation_needs_no_login(task, call, finished, capsys, monkeypatch):
    """Paths in args.json that are relative hold in one folder only. The run was tracked; its evaluation is not."""
    module, _ = task
    monkeypatch.delenv("WANDB_MODE", raising=False)
    saved = json.loads((finished / "args.json").read_text())
    names = [name for name in ("policy", "judge") if name in saved["args"]]
    anew = [word for name in names for word in (f"--{name}", saved["args"][name])]
    saved["args"] |= {name: f"assets/{name}" for name in names} | {"track": True}
    (finished / "args.json").write_text(json.dumps(saved))
    assert "--policy assets/policy: " in refused(module, call, "--evaluate", finished, *anew[2:])
    call("--evaluate", finished, *anew)
    assert capsys.readouterr().out.count("\n") == 8


@each
def test_an_infinite_perplexity_does_not_lose_the_result(task, call, tmp_path, monkeypatch):
    module, _ = task
    monkeypatch.setattr(module, "perplexity", lambda *_: float("inf"))
    call("--iterations", 1, "--run-dir", tmp_path)
    found = result(only(tmp_path))
    assert found["after"]["perplexity_released"] is None and found["after"]["score"] == found["score"]


# --- bad input --------------------------------------------------------------------------------------------------------

BOTH = [
    ("--minibatch-size 3", "--minibatch-size 3: expected a divisor of trajectories_per_update = 8"),
    ("--gradient-accumulation 3", "--minibatch-size 4: expected a multiple of 1 processes x gradient_accumulation = 3"),
    ("--resume /no/such/run", "/no/such/run is no run folder"),
    ("--max-prompt-length 60", "--max-prompt-length 60: expected 64, the policy's context, less response_length, or less"),
    ("--top-k 100000", "--top-k 100000: expected the policy's vocabulary, "),
    ("--dataset {tmp}/null.jsonl", "null.jsonl: ValueError: row 101 has no text in a column "),
    ("--dataset {tmp}/missing.jsonl", "--dataset {tmp}/missing.jsonl: "),
    ("--policy {tmp}/nothing", "--policy {tmp}/nothing: "),
    ("--policy {tmp}/gemma", "expected a causal model that takes padding, positions and a cache (its logits are not its head "),
    ("--tokenizer {tmp}/nothing", "--tokenizer {tmp}/nothing: "),
]
BAD = {
    imdb: [
        *BOTH,
        ("--reward-label neutral", "--reward-label neutral: expected one of the reward model's 0, 1, negative, positive"),
        ("--dataset {tmp}/other.jsonl", "row 1 has no text in a column text; its columns are review"),
        ("--dataset {tmp}/short.jsonl", "expected 8 training and 8 validation reviews or more; it has 8 and 2"),
        ("--policy {tmp}/cut", "--policy {tmp}/cut: "),
        (
            "--reward-model {tmp}/headless",
            "expected a model with all its weights; classifier.bias, classifier.weight are missing",
        ),
        ("--reward-model {tmp}/one_label --reward-label 0", "expected a classifier with two labels or more"),
        ("--reward-model {tmp}/no_pad", "--reward-model {tmp}/no_pad: "),
        ("--judge {tmp}/nothing", "--judge {tmp}/nothing: no such file"),
    ],
    tldr: [
        *BOTH,
        ("--reward-max-length 65", "--reward-max-length 65: expected 64 or less, the context of "),
        ("--test-episodes 9", "'test': 9} posts or more; it has {'train': 40, 'validation': 8, 'test': 8}"),
        (
            "--dataset {tmp}/other.jsonl --test-episodes 0 --eval-episodes 0",
            "row 1 has no text in a column prompt; its columns",
        ),
        ("--dataset {tmp}/no_test", "expected splits train, valid(ation) and test of "),
        ("--reward-base {tmp}/nothing", "--reward-base {tmp}/nothing: "),
        ("--reward-adapter {tmp}/nothing", "--reward-adapter {tmp}/nothing: "),
        ("--reward-adapter {tmp}/headless", "--reward-adapter {tmp}/headless: "),
        ("--reward-adapter {tmp}/foreign", "--reward-adapter {tmp}/foreign: "),
        ("--reward-adapter {tmp}/deeper", "its layers are not those of --reward-base "),
        ("--reward-base {tmp}/small", "--reward-max-length 40: expected 16 or less, the context of {tmp}/small"),
        ("--policy {tmp}/capped --dtype bfloat16", "takes padding, positions and a cache (its logits are not its head "),
    ],
}


@pytest.fixture(scope="module")
def broken(assets, tmp_path_factory):
    """Files and models that no run can use."""
    folder = tmp_path_factory.mktemp("broken")
    texts = {"text": "good film", "prompt": "a film", "label": "film"}
    (folder / "other.jsonl").write_text('{"review": "good"}\n' * 100)
    (folder / "null.jsonl").write_text((json.dumps(texts) + "\n") * 100 + json.dumps(dict.fromkeys(texts)) + "\n")
    (folder / "short.jsonl").write_text((json.dumps(texts) + "\n") * 10)
    (folder / "no_test").mkdir()
    shutil.copy(assets[tldr] / "posts/train.jsonl", folder / "no_test/train.jsonl")
    tokenizer = rlhf_assets.make_tokenizer()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    rlhf_assets.make_lm(len(tokenizer)).save_pretrained(folder / "cut")
    data = (folder / "cut/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(data[: len(data) // 2])
    gemma = transformers.Gemma2Config(**size, **heads, final_logit_softcapping=0.01, initializer_range=1.0)
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(folder / "gemma")
    gemma.final_logit_softcapping = 3.0
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(folder / "capped")
    classifier = rlhf_assets.make_classifier(len(tokenizer))
    classifier.bert.save_pretrained(folder / "headless")
    classifier.save_pretrained(folder / "no_pad")
    classifier.config.num_labels = 1
    transformers.BertForSequenceClassification(classifier.config).save_pretrained(folder / "one_label")
    for name in ("headless", "one_label"):
        tokenizer.save_pretrained(folder / name)
    gpt2 = {"vocab_size": len(tokenizer), "n_embd": 32, "n_head": 2}
    small = transformers.GPT2Config(**gpt2, n_positions=16, n_layer=2)
    transformers.GPT2LMHeadModel(small).save_pretrained(folder / "small")
    deep = transformers.GPT2Config(**gpt2, n_positions=64, n_layer=3)
    for name, lm in (
        ("deeper", transformers.GPT2LMHeadModel(deep)),
        ("headless_adapter", rlhf_assets.make_lm(len(tokenizer))),
        ("foreign", transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads))),
    ):
        agent = tldr.Agent(lm)
        if name == "headless_adapter":
            agent.add("reward", peft.LoraConfig(r=2, fan_in_fan_out=True), head=False)
        else:
            tldr_assets.add_reward(agent)
        tldr.save_adapter(folder / name, agent, "reward", "base", tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "no_pad")
    return folder


@each
def test_bad_input_is_named_before_anything_is_created(task, call, broken, tmp_path):
    module, _ = task
    for line, expected in BAD[module]:
        line, expected = (text.replace("{tmp}", str(broken)) for text in (line, expected))
        if module is tldr:
            line = line.replace("/headless", "/headless_adapter")
            expected = expected.replace("/headless", "/headless_adapter")
        words = line.split() + ([] if "--resume" in line else ["--run-dir", tmp_path / "runs"])
        found = refused(module, call, *words)
        assert expected in found, (line, found)
        assert not (tmp_path / "runs").exists()


@each
def test_tyro_and_pydantic_refuse_the_rest(task, capsys):
    module, args = task
    for line, expected in (
        ("--beta -1", "greater than or equal to 0"),
        ("--Z 0", "less than 0"),
        ("--temperature nan", "finite number"),
        ("--exp-name a/b", "match pattern"),
        ("--bta 1", "--beta"),
        ("--top-k x", "--top-k"),
        *(
            (("--lora-dropout 1", "less than 1"), ("--reward-text text", "match pattern"), ("--dtype int8", "int8"))
            * (module is tldr)
        ),
    ):
        with pytest.raises((SystemExit, ValueError)) as stopped:
            module.parse_args([*args, *line.split()])
        out = str(stopped.value) + capsys.readouterr().err
        assert expected in out and getattr(stopped.value, "code", 2) == 2, out


@each
def test_the_command_line_ends_with_status_2(task, tmp_path, monkeypatch):
    """Without the offline models, it says how to build them; nothing is left."""
    module, _ = task
    monkeypatch.chdir(tmp_path)
    for owner, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"),
                        ("datasets.config", "HF_DATASETS_OFFLINE")):  # fmt: skip
        monkeypatch.setattr(f"{owner}.{name}", True)  # as --offline sets them, and put back after
    err = refused(module, lambda: module.main(module.parse_args(["--offline"])))
    if module is imdb:
        out, err = run("sppo_rlhf_imdb.py", "--offline", code=2, cwd=tmp_path)
        assert out == "" and "Traceback" not in err
    assert f"assets/{module.TASK}/" in err and f"make_rlhf_assets.py {module.TASK}" in err and list(tmp_path.iterdir()) == []


@each
def test_help_shows_every_argument_and_the_defaults_of_offline(task, capsys):
    module, _ = task
    for words, defaults in (([], module.Args()), (["--offline"], module.OFFLINE)):
        with pytest.raises(SystemExit) as stopped:
            module.parse_args([*words, "--help"])
        out = capsys.readouterr().out
        assert stopped.value.code == 0 and re.search(rf"\(default: {defaults.max_prompt_length}\)", out)
        assert all(f"--{name.replace('_', '-')}" in out for name in module.Args.__dataclass_fields__)
        assert out.index("--alpha") < out.index("--policy") < out.index("--iterations") < out.index("--track")


def test_without_its_packages_a_script_names_requirements_txt(tmp_path):
    """As after the light install; one stands for all imports."""
    (tmp_path / "datasets.py").write_text("raise ModuleNotFoundError(\"No module named 'datasets'\", name='datasets')")
    for script in ("sppo_rlhf_imdb.py", "sppo_rlhf_tldr.py"):
        _, err = run(script, "--help", code=1, env={**ENV, "PYTHONPATH": str(tmp_path)})
        assert err.count("\n") == 1 and "datasets" in err and "pip install -r requirements.txt" in err
