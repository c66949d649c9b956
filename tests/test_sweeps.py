"""Hyperparameter sweeps: what W&B's agent makes of sweep.yaml, ids inside a sweep, and two tiny trials of Optuna."""

import json

import pytest
import yaml
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, start, unchanged_process  # noqa: F401
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import sppo_atari

OPTIONS = "--env-id Breakout --total-timesteps 128 --num-envs 2 --num-steps 32 --minibatch-size 32 --eval-episodes 1"
SMALL = OPTIONS.split()
SWEEP = yaml.safe_load((ROOT / "benchmark/tuning/sweep.yaml").read_text())


def words(switch):
    """The command line that W&B's own agent makes, with the lowest of each range."""
    own = SWEEP["parameters"] | {"no-anneal-lr": {"value": switch}}
    values = {name: {"value": about.get("value", about.get("min"))} for name, about in own.items()}
    made = create_sweep_command_args({"args": values})
    return made[SWEEP["command"][-1][2:-1]], made["args"]


@pytest.mark.parametrize("switch", [True, False])
def test_the_script_understands_what_wandbs_agent_writes(switch, capsys):
    ours, usual = words(switch)
    args = sppo_atari.parse_args(ours)
    assert args.anneal_lr is not switch and args.track and args.env_id == "Breakout"
    assert (args.alpha, args.beta, args.learning_rate) == (0.1, 0.1, 1e-5)
    with pytest.raises(SystemExit):  # why args_no_boolean_flags
        sppo_atari.parse_args(usual)
    assert (ROOT / SWEEP["program"]).exists() and SWEEP["command"][:3] == ["${env}", "${interpreter}", "${program}"]


def test_a_run_in_a_sweep_has_the_agents_id_and_keeps_it(tmp_path):
    """As the agent starts it: W&B ignores an id that the script gives, so that the script must take W&B's."""
    offline = ENV | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    env = offline | {"WANDB_RUN_ID": "agents1d", "WANDB_SWEEP_ID": "sweep1"}
    run("sppo_atari.py", *SMALL, "--eval-episodes", 0, "--track", "--run-dir", tmp_path, env=env)
    folder = only(tmp_path, "Breakout__*")
    ids = [json.loads((folder / name).read_text())["run_id"] for name in ("args.json", "result.json")]
    assert ids == ["agents1d"] * 2
    run("sppo_atari.py", "--resume", folder, "--total-timesteps", 192, env=offline)  # resumed by hand
    assert json.loads((folder / "result.json").read_text())["run_id"] == "agents1d"
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == ["run-agents1d.wandb"] * 2


def test_a_run_that_is_not_tracked_has_an_id_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agents1d")
    with unchanged_process():
        held = sppo_atari.Run(sppo_atari.Args(env_id="Breakout", run_dir=str(tmp_path)))
        held.cleanup.close()
    assert held.record["run_id"] != "agents1d"


def optuna(*argv, code=0):
    return run("benchmark/tuning/optuna_sweep.py", *argv, code=code, cwd=ROOT)


def test_optuna_tunes_the_arguments_that_it_is_told(tmp_path):
    common = ["sppo_atari.py", f"--args={OPTIONS} --alpha 1 --beta 0", "--trials", 1, "--folder", tmp_path / "study"]
    tune = ["--tune", "clip-coef", "0.3", "0.4", "--tune", "gamma", "0.5", "0.6"]
    out, _ = optuna(*common, *tune)
    (path,) = (tmp_path / "study/sppo_atari/0/1").glob("*/result.json")
    used = json.loads(path.read_text())["args"]
    assert 0.3 <= used["clip_coef"] <= 0.4 and 0.5 <= used["gamma"] <= 0.6
    assert (used["alpha"], used["beta"], used["learning_rate"]) == (1, 0, 2.5e-4)
    assert [word for word in out.split() if word.startswith("--")] == ["--clip-coef", "--gamma"]
    _, err = optuna(*common, code=2)
    assert "--tune []: the study in" in err


SCRIPT = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(words["--run-dir"], "run")
folder.mkdir()
score = {score}
(folder / "result.json").write_text(json.dumps({{"score": score, "words": words}}))
"""


def write_script(folder, score):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(SCRIPT.format(score=score))
    return folder / "mine.py"


def test_a_study_goes_on_and_prints_small_scores(tmp_path):
    """Two trials of two seeds, which a second start finds finished; the value is the mean of the seeds."""
    script = write_script(tmp_path / "a", "1e-4 * float(words['--beta']) * int(words['--seed'])")
    args = [script, "--seeds", "1", "2", "--beta", "1", "9", "--folder", tmp_path / "study", "--trials", 2]
    out, _ = optuna(*args)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("study/*/*/*/run/result.json")]
    values = sorted({f"{1.5e-4 * float(one['words']['--beta']):.6g}" for one in results}, key=float)
    assert [float(line.split()[0]) for line in out.splitlines()] == pytest.approx([*map(float, values[::-1])], rel=1e-5)
    assert len(results) == 4 and optuna(*args)[0] == out and len(list(tmp_path.glob("study/*/*/*/run"))) == 4
    args[args.index("2")] = "3"
    _, err = optuna(*args, code=2)
    assert "--seeds [1, 3]: the study in" in err and "has [1, 2]; expected that, or another --folder" in err


def test_two_scripts_of_one_name_are_two_studies_and_two_starts_at_once_are_one(tmp_path):
    one, other = write_script(tmp_path / "a", 1.0), write_script(tmp_path / "b", 2.0)
    common = ["--trials", 3, "--folder", tmp_path / "study"]
    scripts = (one, one, other)
    processes = [start("benchmark/tuning/optuna_sweep.py", script, *common, cwd=ROOT) for script in scripts]
    for script, process in zip(scripts, processes, strict=True):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert {line.split()[0] for line in out.splitlines()} == {"1" if script == one else "2"}
    counts = {path.name: len(list(path.glob("*/1/run"))) for path in (tmp_path / "study").iterdir() if path.is_dir()}
    assert [name.rsplit("__", 2)[1:] for name in sorted(counts)] == [["a", "mine"], ["b", "mine"]]
    assert counts[max(counts)] == 3 and 3 <= counts[min(counts)] <= 4  # each of two may have begun one when the other ends


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["missing.py"], "missing.py: expected a script"),
        (["sppo_atari.py", "--beta", "9", "1"], "--beta 9 1: expected two numbers above 0, the lower one first"),
        (["sppo_atari.py", "--tune", "Z", "-1", "1"], "--tune Z -1 1: expected two numbers above 0, the lower one first"),
        (["sppo_atari.py", "--args=--seed '5"], "--args --seed '5: expected a command line (No closing quotation)"),
        (["sppo_atari.py", "--args=--gamma 2"], "a trial was refused: "),
        (["{none}"], "result.json has no score; expected --args with --eval-episodes above 0"),
    ],
)
def test_bad_input_is_one_line(argv, expected, tmp_path):
    none = write_script(tmp_path / "none", None)
    _, err = optuna(*(word.format(none=none) for word in argv), "--folder", tmp_path / "study", code=2)
    last = err.splitlines()[-1]  # Optuna says first that it began a study
    assert last.startswith("optuna_sweep.py: error: ") and expected in last and "Traceback" not in err
