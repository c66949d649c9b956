"""Hyperparameter sweeps: what W&B's agent makes of sweep.yaml, ids inside a sweep, and two tiny trials of Optuna."""

import json
import os

import pytest
import yaml
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, unchanged_process  # noqa: F401
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import sppo_atari

SMALL = [
    "--env-id",
    "Breakout",
    "--total-timesteps",
    "128",
    "--num-envs",
    "2",
    "--num-steps",
    "32",
    "--minibatch-size",
    "32",
    "--eval-episodes",
    "1",
]
SWEEP = yaml.safe_load((ROOT / "benchmark/sweep.yaml").read_text())


def words(switch):
    """The command line that W&B's own agent makes, with the lowest of each range."""
    own = SWEEP["parameters"] | {"no-anneal-lr": {"value": switch}}
    values = {name: {"value": about.get("value", about.get("min"))} for name, about in own.items()}
    made = create_sweep_command_args({"args": values})
    return made[SWEEP["command"][-1][2:-1]], made["args"]


@pytest.mark.parametrize("switch", [True, False])
def test_the_script_understands_what_wandbs_agent_writes(switch, capsys):
    ours, usual = words(switch)
    args = sppo_atari.parse_args(ours, sppo_atari.Args())
    assert args.anneal_lr is not switch and args.track and args.env_id == "Breakout"
    assert (args.alpha, args.beta, args.learning_rate) == (0.1, 0.1, 1e-5)
    with pytest.raises(SystemExit):  # why args_no_boolean_flags
        sppo_atari.parse_args(usual, sppo_atari.Args())
    assert (ROOT / SWEEP["program"]).exists() and SWEEP["command"][:3] == ["${env}", "${interpreter}", "${program}"]


def test_a_run_in_a_sweep_has_the_agents_id_and_keeps_it(tmp_path):
    """As the agent starts it: W&B ignores an id that the script gives, so that the script must take W&B's."""
    env = ENV | {"WANDB_MODE": "offline", "WANDB_RUN_ID": "agents1d", "WANDB_SWEEP_ID": "sweep1"}
    run("sppo_atari.py", *SMALL, "--eval-episodes", 0, "--track", "--run-dir", tmp_path, env=env)
    folder = only(tmp_path, "Breakout__*")
    ids = [json.loads((folder / name).read_text())["run_id"] for name in ("args.json", "result.json")]
    assert ids == ["agents1d"] * 2
    later = ENV | {"WANDB_MODE": "offline"}  # resumed by hand
    run("sppo_atari.py", "--resume", folder, "--total-timesteps", 192, env=later)
    assert json.loads((folder / "result.json").read_text())["run_id"] == "agents1d"
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == ["run-agents1d.wandb"] * 2


def test_a_run_that_is_not_tracked_has_an_id_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agents1d")
    with unchanged_process():
        held = sppo_atari.Run(sppo_atari.Args(env_id="Breakout", run_dir=str(tmp_path)))
        held.cleanup.close()
    assert held.record["run_id"] != "agents1d"


def test_two_trials_of_optuna(tmp_path):
    """A study of two trials, which a second start finds finished, and a third one continues by one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    args = [
        "sppo_atari.py",
        "--seeds",
        "1",
        "2",
        "--beta",
        "1",
        "9",
        f"--args={' '.join(SMALL)}",
        "--folder",
        tmp_path / "study",
    ]
    out, _ = run("benchmark/optuna_sweep.py", *args, "--trials", 2, cwd=ROOT, env=env)
    results = {path: json.loads(path.read_text()) for path in (tmp_path / "study/sppo_atari").glob("*/*/*/result.json")}
    assert len(results) == 4
    means = {}
    for path, result in results.items():
        trial, seed = path.relative_to(tmp_path / "study/sppo_atari").parts[:2]
        assert result["args"]["seed"] == int(seed) and 1 <= result["args"]["beta"] <= 9
        means.setdefault(trial, []).append(result["score"])
    best = max(sum(scores) / 2 for scores in means.values())
    assert len(out.splitlines()) == 2 and out.startswith(f"{best:.1f} --alpha ")
    again, _ = run("benchmark/optuna_sweep.py", *args, "--trials", 2, cwd=ROOT, env=env)
    assert again == out and len(list((tmp_path / "study/sppo_atari").glob("*/*/*/result.json"))) == 4
    args[args.index("2")] = "3"
    _, err = run("benchmark/optuna_sweep.py", *args, "--trials", 2, cwd=ROOT, env=env, code=2)
    assert "--seeds [1, 3]: the study in" in err and "has [1, 2]; expected that, or another --folder" in err


def test_optuna_tunes_the_arguments_that_it_is_told(tmp_path):
    common = ["sppo_atari.py", f"--args={' '.join(SMALL)} --alpha 1 --beta 0", "--trials", 1, "--folder", tmp_path / "study"]
    tune = ["--tune", "clip-coef", "0.3", "0.4", "--tune", "gamma", "0.5", "0.6"]
    out, _ = run("benchmark/optuna_sweep.py", *common, *tune, cwd=ROOT)
    (path,) = (tmp_path / "study/sppo_atari/0/1").glob("*/result.json")
    used = json.loads(path.read_text())["args"]
    assert 0.3 <= used["clip_coef"] <= 0.4 and 0.5 <= used["gamma"] <= 0.6
    assert (used["alpha"], used["beta"], used["learning_rate"]) == (1, 0, 2.5e-4)
    assert [word for word in out.split() if word.startswith("--")] == ["--clip-coef", "--gamma"]
    _, err = run("benchmark/optuna_sweep.py", *common, cwd=ROOT, code=2)
    assert "--tune []: the study in" in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["missing.py"], "missing.py: expected a script"),
        (["sppo_atari.py", "--beta", "9", "1"], "--beta 9 1: expected two numbers above 0, the lower one first"),
        (["sppo_atari.py", "--tune", "Z", "-1", "1"], "--tune Z -1 1: expected two numbers above 0, the lower one first"),
        (["sppo_atari.py", "--tune", "clip", "1", "2", "--trials", "1"], "--clip: unknown argument"),
        (["sppo_atari.py", "--args=--seed '5"], "--args --seed '5: expected a command line (No closing quotation)"),
        (["sppo_atari.py", "--args=--gamma 2"], "--gamma 2.0: must be less than or equal to 1"),
    ],
)
def test_bad_input_is_one_line(argv, expected, tmp_path):
    _, err = run("benchmark/optuna_sweep.py", *argv, "--folder", tmp_path / "study", code=2, cwd=ROOT)
    last = err.splitlines()[-1]  # Optuna says first that it began a study
    assert last.startswith("optuna_sweep.py: error: ") and expected in last and "Traceback" not in err
