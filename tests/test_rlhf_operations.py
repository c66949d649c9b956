"""What the RLHF scripts share below `Operations`: --evaluate, --help, what may change with --resume, signals, progress."""

import json
import re
import shutil
import signal
import socket
import sys
from unittest import mock

import accelerate
import helpers
import pytest
import rlhf_assets
import tldr_assets
import torch
from filelock import FileLock
from helpers import ENV, no_process_outlives_its_test, only, run, start, wait_for  # noqa: F401
from safetensors import SafetensorError

import sppo_rlhf_imdb
import sppo_rlhf_tldr

SCRIPTS = [(sppo_rlhf_imdb, rlhf_assets), (sppo_rlhf_tldr, tldr_assets)]


# what starts processes, and is of the text that both scripts share
imdb_alone = pytest.mark.parametrize("task", SCRIPTS[:1], ids=["imdb"], indirect=True)


@pytest.fixture(scope="module", params=SCRIPTS, ids=["imdb", "tldr"])
def task(request, tmp_path_factory):
    """(module, its file's name, arguments of a tiny run, the folder of a finished one)"""
    module, assets = request.param
    folder = tmp_path_factory.mktemp("finished")
    args = assets.arguments(assets.write_assets(tmp_path_factory.mktemp("assets")))
    with helpers.unchanged_process():
        parsed = module.parse_args([*args, "--iterations", "2", "--run-dir", str(folder)], module.Args())
        module.check_args(parsed)
        module.main(parsed)
    return module, f"{module.__name__}.py", args, only(folder)


@pytest.fixture
def call(task, monkeypatch):
    """main() in this process."""
    module, name, args, _ = task
    monkeypatch.setattr(sys, "argv", [name])

    def call(*changed):
        line = list(map(str, changed))
        parsed = module.parse_args(line if {"--resume", "--evaluate"} & {*line} else [*args, *line], module.Args())
        module.check_args(parsed)
        module.main(parsed)

    with helpers.unchanged_process():
        yield call


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(call, capsys, *words):
    """The one line of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*words)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def test_evaluate_prints_the_samples_of_the_held_out_texts_and_writes_nothing(task, call, capsys):
    _, name, _, finished = task
    before, result = contents(finished), json.loads((finished / "result.json").read_text())
    call("--evaluate", finished)
    out, err = capsys.readouterr()
    samples = json.loads((finished / "samples.json").read_text())
    printed = [json.loads(line) for line in out.splitlines()]
    assert printed == [{key: value for key, value in row.items() if not key.endswith("_before")} for row in samples]
    assert f"{name}: score {result['score']:.4g}, " in err and f"perplexity {result['after']['perplexity']:.4g}" in err
    assert f"; {len(samples)} texts, iteration 2\n" in err and contents(finished) == before


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_evaluate_continues_given_prompts(task, call, capsys, tmp_path, ending):
    """The held-out prompts, given as a file, get the held-out responses: same tokens, same random numbers."""
    *_, finished = task
    samples = json.loads((finished / "samples.json").read_text())
    prompts = [row.get("post", row["prompt"]) for row in samples]
    lines = prompts if ending == "txt" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / f"prompts.{ending}").write_text("\n".join(lines) + "\n\n")
    call("--evaluate", finished, "--prompts", tmp_path / f"prompts.{ending}")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name in ("prompt", "response", "score"):
        assert [row[name] for row in printed] == pytest.approx([row[name] for row in samples]), name
    assert any(row["response"] != row["response_before"] for row in samples)  # so it is the trained policy that wrote


def test_what_evaluate_refuses(task, call, capsys, tmp_path):
    *_, finished = task
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for file, reason in (
        ("empty.txt", "a file of prompts, all of them texts"),
        ("other.jsonl", "a column prompt"),
        ("broken.jsonl", "line 2: "),
        ("latin.txt", "can't decode byte 0xe9"),
        ("none.txt", "No such file"),
    ):
        assert reason in refused(call, capsys, "--evaluate", finished, "--prompts", tmp_path / file), file
    assert "--prompts x: expected --evaluate with it" in refused(call, capsys, "--prompts", "x")
    line = refused(call, capsys, "--evaluate", finished, "--beta", 3)
    assert "--beta 3.0: with --evaluate the run keeps its own, " in line and "; only --prompts, " in line
    assert "--resume and --evaluate: expected one of them" in refused(
        call, capsys, "--evaluate", finished, "--resume", finished
    )
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "checkpoint.pt").unlink()
    assert "has no checkpoint yet" in refused(call, capsys, "--evaluate", folder)


def test_prompts_are_lines_and_are_printed_as_given(task, call, capsys, tmp_path):
    """A line may hold any other separator of Unicode; a byte order mark is no part of the first."""
    module, _, _, finished = task
    prompts = ["one\u2028two", "caf\xe9 \x0b film", "good " * 40 + "film"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8-sig")
    call("--evaluate", finished, "--prompts", tmp_path / "prompts.txt")
    out, err = capsys.readouterr()
    assert out.isascii() and len(out.splitlines()) == 3
    key = "prompt" if module is sppo_rlhf_imdb else "post"
    assert [json.loads(line)[key] for line in out.splitlines()] == prompts
    assert ("too_long 1; 3 texts" if module is sppo_rlhf_imdb else "; 3 texts") in err
    (tmp_path / "strings.jsonl").write_text('{"prompt": "a"}\n"b"\n')
    line = refused(call, capsys, "--evaluate", finished, "--prompts", tmp_path / "strings.jsonl")
    assert "line 2: expected an object in braces" in line


def test_evaluate_saves_the_model_of_the_checkpoint(task, call, capsys, tmp_path):
    """A run that was stopped can be exported: the files are those that the run itself writes; nothing else is touched."""
    *_, finished = task
    own, exported = (shutil.copytree(finished, tmp_path / name) for name in ("own", "exported"))
    (own / "result.json").unlink()
    call("--resume", own, "--save-model")
    (exported / ".lock").touch()
    before = contents(exported)
    capsys.readouterr()
    call("--evaluate", exported, "--save-model")
    assert capsys.readouterr().out.count("\n") == 8
    new = {path.relative_to(exported): text for path, text in contents(exported).items() if path not in before}
    assert before.items() <= contents(exported).items() and any(path.match("model/model.safetensors") for path in new)
    assert new == {path: (own / path).read_bytes() for path in new}
    assert {path.parts[0] for path in new} == {path.name for path in own.iterdir() if path.name in ("model", "adapters")}
    assert json.loads((own / "args.json").read_text())["args"]["save_model"]
    shutil.rmtree(own / "model")
    call("--evaluate", own)  # saves only if it is told to itself
    assert not (own / "model").exists()


def test_the_model_of_an_earlier_checkpoint_is_replaced(task, call, tmp_path):
    """Exported, trained on without saving, then saved: model/ is the last checkpoint's, not the exported one."""
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    call("--evaluate", folder, "--save-model")
    (early,) = (path.read_bytes() for path in folder.glob("model/*.safetensors"))
    call("--resume", folder, "--iterations", 3)
    call("--resume", folder, "--save-model")
    (late,) = (path.read_bytes() for path in folder.glob("model/*.safetensors"))
    call("--evaluate", folder, "--save-model")
    assert early != late == (folder / "model/model.safetensors").read_bytes()


def test_what_saving_with_evaluate_refuses(task, call, capsys, tmp_path, monkeypatch):
    """A run that trains, before anything is evaluated, and a disk that is full."""
    module, *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    with FileLock(folder / ".lock"):
        line = refused(call, capsys, "--evaluate", folder, "--save-model")
        assert line.endswith(f": error: --evaluate {folder}: another process is training this run\n")
        call("--evaluate", folder)  # only reads

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_policy", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call("--evaluate", folder, "--save-model")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "the model could not be saved (I/O error: No space left on device" in err
    with pytest.raises(SystemExit) as stopped:
        call("--resume", folder, "--save-model")
    assert "No space left on device (os error 28); the run ends, " in str(stopped.value)


def test_evaluate_of_a_tracked_run_needs_no_login(task, call, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["track"] = True
    (folder / "args.json").write_text(json.dumps(saved))
    call("--evaluate", folder)
    assert capsys.readouterr().out.count("\n") == 8


@pytest.mark.parametrize("name", ["--resume", "--evaluate", "--prompts"])
def test_an_empty_name_is_refused(task, call, capsys, name):
    """As of an unset variable in a shell."""
    assert f"{name} : must have at least 1 character" in refused(call, capsys, name, "")


def test_a_finished_run_can_still_save_its_model(task, call, tmp_path):
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    before = json.loads((folder / "result.json").read_text())
    call("--resume", folder, "--save-model")
    assert list(folder.glob("model/*.safetensors"))
    after = json.loads((folder / "result.json").read_text())
    assert after["after"] == before["after"] and after["before"] == before["before"]


def test_models_may_have_moved(task, call, capsys, tmp_path, monkeypatch):
    """Paths in args.json that are relative hold in one folder only."""
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    saved = json.loads((folder / "args.json").read_text())
    names = [name for name in ("policy", "judge") if name in saved["args"]]
    anew = [word for name in names for word in (f"--{name}", saved["args"][name])]
    saved["args"] |= {name: f"assets/{name}" for name in names}
    (folder / "args.json").write_text(json.dumps(saved))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "--policy assets/policy: expected a Hub id or a folder" in refused(call, capsys, "--evaluate", folder, *anew[2:])
    call("--evaluate", folder, *anew)
    assert capsys.readouterr().out.count("\n") == 8


def test_a_checkpoint_of_other_shapes_is_refused(task, call, capsys, tmp_path):
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    name = next(iter(checkpoint["agent"]))
    checkpoint["agent"][name] = checkpoint["agent"][name][:1]
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert "its checkpoint.pt has other weights than" in refused(call, capsys, "--evaluate", folder)


def test_a_signal_in_the_last_iteration_saves_and_resume_evaluates(task, call, capsys, tmp_path, monkeypatch):
    module, _, _, finished = task
    update = module.update

    def interrupted(*inputs):
        if inputs[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(*inputs)

    monkeypatch.setattr(module, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        call("--iterations", 2, "--run-dir", tmp_path)
    assert stopped.value.code == 143 and not (only(tmp_path) / "result.json").exists()
    call("--resume", only(tmp_path))
    result, whole = (json.loads((folder / "result.json").read_text()) for folder in (only(tmp_path), finished))
    assert result["after"] == whole["after"]


def test_a_corrupt_checkpoint_is_one_line_and_stays(task, call, capsys, tmp_path):
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    before = contents(folder)
    for words in (["--resume", folder, "--iterations", 3], ["--evaluate", folder]):
        assert f"{words[0]} {folder}: cannot load its checkpoint.pt (" in refused(call, capsys, *words)
        assert {path: data for path, data in contents(folder).items() if path.name != ".lock"} == {
            path: data for path, data in before.items() if path.name != ".lock"
        }


def test_what_may_change_with_resume(task, call, capsys, tmp_path):
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    line = refused(call, capsys, "--resume", folder, "--learning-rate", 1)
    assert "--learning-rate 1.0: with --resume the run keeps its own, " in line
    assert "--iterations 1: expected 2, the run's own, or more" in refused(call, capsys, "--resume", folder, "--iterations", 1)
    call("--resume", folder, "--iterations", 4, "--eval-interval", 1, "--checkpoint-interval", 3)
    saved = json.loads((folder / "args.json").read_text())
    assert saved["args"]["eval_interval"] == 1 and saved["earlier"] == []
    steps = [step for step, _ in helpers.scalars(folder)["eval/score"]]
    assert steps == ([0, 16, 24, 32] if task[0] is sppo_rlhf_imdb else [24, 32])


def test_a_second_writer_is_refused(task, call, capsys, tmp_path):
    *_, finished = task
    folder = shutil.copytree(finished, tmp_path / "run")
    with FileLock(folder / ".lock"):
        line = refused(call, capsys, "--resume", folder, "--iterations", 3)
    assert line.endswith(f": error: --resume {folder}: another process is training this run\n")
    call("--resume", folder, "--iterations", 3)


@imdb_alone
def test_ctrl_c_is_answered_at_once(task, tmp_path):
    _, name, args, _ = task
    process = start(name, *args, "--iterations", 10**6, "--run-dir", tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "finishing this iteration, then saving; Ctrl-C again quits now" in err


@imdb_alone
def test_ctrl_c_before_there_is_a_run_ends_at_once_and_leaves_nothing(task, tmp_path):
    """A Hub that takes the connection and never answers holds the script while it loads."""
    _, name, args, _ = task
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        env = {**ENV, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        process = start(name, *args, "--policy", "no/such", "--run-dir", tmp_path / "runs", env=env)
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
    # without the handler: a traceback, or, once the script has given up on the Hub, exit status 2
    assert process.returncode == 130 and out == "" and "Traceback" not in err and not (tmp_path / "runs").exists()


def test_without_a_terminal_one_line_a_minute(task, call, capsys, tmp_path):
    module, name, args, _ = task
    parsed = module.parse_args([*args, "--run-dir", str(tmp_path), "--iterations", "9"], module.Args())
    held = module.Run(parsed, accelerate.Accelerator(cpu=True))
    stats = {"objective/scores": 0.25, "charts/SPS": 1234.0}
    with held.cleanup:
        capsys.readouterr()
        held.log(0, dict(stats), 30.0)
        assert capsys.readouterr().out == ""
        held.last_line -= 61
        held.log(1, dict(stats), 10.0)
        held.log(2, dict(stats), 10.0)
    # two of nine in 40 s: the other seven take 140 s
    assert capsys.readouterr().out == f"{name}: iteration 2 of 9, score 0.250, 1,234 tokens/s, 02:20 left\n"


def test_an_infinite_perplexity_does_not_lose_the_result(task, call, tmp_path, monkeypatch):
    module, *_ = task
    what = "perplexity" if module is sppo_rlhf_imdb else "reference_perplexity"
    monkeypatch.setattr(module, what, lambda *_: float("inf"))
    call("--iterations", 1, "--run-dir", tmp_path)
    result = json.loads((only(tmp_path) / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["after"]["perplexity"] is None and result["after"]["score"] == result["score"]


def test_perplexity_beyond_float_is_infinite(task):
    """A mean loss of 1,000 nats: exp of it is no float64."""
    module, head = task[0], torch.nn.Linear(1, 1)
    bad = mock.Mock(
        side_effect=lambda tokens, start, *_: (torch.full_like(tokens[:, start:], -1000.0, dtype=torch.float), None)
    )
    bad.value_head, bad.heads, bad.lm.config.max_position_embeddings = head, {"value": head}, 64
    if module is sppo_rlhf_imdb:
        found = module.perplexity(bad, ["good film"], rlhf_assets.make_tokenizer(), 10)
    else:
        found = module.reference_perplexity(bad, torch.ones(2, 3).long(), torch.ones(2, 4).long(), module.Args())
    assert found == float("inf")


def test_help_has_groups_with_the_loss_first(task, capsys):
    module, *_ = task
    with pytest.raises(SystemExit):
        module.parse_args(["--help"], module.Args())
    out = capsys.readouterr().out
    titles = re.findall(r"(?m)^\W+([a-z-]+) options\b", out)
    assert titles == ["symmetric-loss", "models-and-data", "algorithm", "evaluation", "logging", "run-and-machine"]
    assert out.index("--alpha") < out.index("--policy") < out.index("--iterations") < out.index("--track")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("--lr", "--learning-rate"), ("--num-ppo-epochs", "--update-epochs"), ("--eval-every", "--eval-interval"),
     ("--init-kl-coef", "--kl-coef"), ("--itterations", "--iterations")],
)  # fmt: skip
def test_names_of_other_libraries_get_a_hint(task, call, capsys, word, hint):
    assert refused(call, capsys, word, 1).endswith(f"error: {word}: unknown argument; did you mean {hint}?\n")


def test_a_switch_takes_no_value(task, call, capsys):
    assert "--track True: a switch takes no value; write --track or --no-track" in refused(call, capsys, "--track", "True")


@imdb_alone
def test_wandb_gets_group_and_tags(task, tmp_path):
    _, name, args, _ = task
    small = ["--iterations", 1, "--eval-episodes", 0, "--track", "--wandb-group", "g", "--wandb-tags", "a,b"]
    run(name, *args, *small, "--run-dir", tmp_path, env={**ENV, "WANDB_MODE": "offline"})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (about,) = (record.run for record in helpers.wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert about.run_group == "g" and list(about.tags) == ["a", "b"]
