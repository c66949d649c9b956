"""benchmark/run.py: cells against the paper's data and the scripts' own parsers, bad grids, and Ray, whose second node dies."""

import fcntl
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, unchanged_process, wait_for
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import run as grid

PAPER = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())
COUNTS = {
    "atari-ppo": 22 * 5 * 2 * 5, "atari-a2c": 22 * 5 * 2 * 4, "continuous-ppo": 9 * 30 * 2 * 4,
    "continuous-a2c": 9 * 30 * 2 * 5,
    "imdb": 4 * 6, "tldr": 4 * 6, "sensitivity": 22 * 5 * 2 * (2 + 2 * 5), "adv-norm": 22 * 5 * 2 * 3 * 2,
    "which-setting": 22 * 5 * 2 * 8, "factored": 2 * 5 * 4, "crazyclimber": 5 * 3, "krull": 5 * 3, "swimmer": 15 * 3,
    "sb3": 2 * 5 * 4, "sb3_atari": 3 * 4, "bf16": 3 * 2,
}  # fmt: skip
cells = functools.cache(grid.cells)


# --- cells ------------------------------------------------------------------------------------------------------------


def test_every_cell_is_there_once():
    for name, count in COUNTS.items():
        runs = cells(name)
        assert len({run.seed for run in runs}) == max(run.seed for run in runs) - min(run.seed for run in runs) + 1
        assert min(run.seed for run in runs) == {"crazyclimber": 4, "krull": 4, "swimmer": 6}.get(name, 1)
        assert len(runs) == count == len({run.folder for run in runs}), name
        assert len({(run.env, run.noise, run.script, run.options, run.seed) for run in runs}) == count  # no two arms are one
    assert COUNTS.keys() == {path.stem for path in grid.GRIDS.glob("*.toml")}


def test_every_cell_of_the_papers_tables_is_in_a_grid():
    """The published scores' cells, each with the paper's number of seeds."""
    ours = Counter()
    for table in ("atari-ppo", "atari-a2c", "continuous-ppo", "continuous-a2c"):
        ours.update((table.split("-")[0], run.env.rsplit("-v", 1)[0], run.noise, run.arm) for run in cells(table))
    for line in (ROOT / "benchmark/paper/scores.csv").read_text().splitlines()[1:]:
        _, family, env, noise, algorithm, *_ = line.split(",")
        assert ours[family, env, noise, algorithm.lower()] == {"atari": 5, "continuous": 30}[family], line


def words(run):
    """The options as a dictionary: --alpha 1 -> alpha: 1."""
    found = {}
    for word in shlex.split(run.options):
        if word.startswith("--"):
            name = word[2:]
            found[name] = True
        else:
            found[name] = float(word)
    return found


@pytest.mark.parametrize("name", ["atari-ppo", "atari-a2c", "continuous-ppo", "continuous-a2c"])
def test_every_cell_has_the_papers_alpha_beta_and_steps(name):
    """Looked up in the data cell by cell; baselines weigh the policy loss 1, controls alpha + beta |Z|."""
    family, algorithm = name.split("-")
    settings = PAPER[family]
    seen = set()
    for run in cells(name):
        betas = settings[algorithm]["beta"][run.noise]
        beta = betas if isinstance(betas, float) else betas[run.env] if run.env in betas else betas["default"]
        steps = settings[algorithm].get("total_timesteps", settings.get("total_timesteps"))
        assert run.length == (steps if isinstance(steps, int) else steps[run.env])
        options = words(run)
        pair = (options["alpha"], options["beta"])
        if run.arm in ("sppo", "sa2c", "dsppo", "dsa2c") or (run.arm == "control" and algorithm == "a2c"):
            assert pair == (settings["alpha"], beta)
        elif run.arm == "control":
            assert pair == (pytest.approx(settings["alpha"] + beta * abs(settings["Z"])), 0)
        elif run.arm in ("a2c_half", "da2c_half"):
            assert pair == (settings["alpha"], 0)
        else:
            assert pair == (1, 0) and run.arm in ("ppo", "a2c", "dppo", "da2c", "ppo_raw", "reweighted")
        assert (options.get("num-bins") == 0) == (family == "continuous" and run.arm == algorithm)
        assert options.get("gamma") == (0.9999 if (name, run.env) == ("continuous-a2c", "Swimmer-v4") else None)
        assert ("no-norm-adv" in options) == (run.arm == "ppo_raw")
        assert ("mean-weight" in options) == (run.arm == "control" and algorithm == "a2c")
        divided = {"vf-coef": 0.5, "ent-coef": 0.01, "max-grad-norm": 0.5, "adam-eps": 1e-5}
        for option, value in divided.items():
            w = settings["alpha"] + beta
            assert options.get(option) == (pytest.approx(value / w) if run.arm == "reweighted" else None)
        assert set(options) <= {"alpha", "beta", "num-bins", "gamma", "no-norm-adv", "mean-weight", *divided}
        seen.add((run.env, run.noise, run.arm))
    assert {env for env, *_ in seen} == set(settings.get("games") or settings["tasks"])
    assert {noise for _, noise, _ in seen} == {"none", settings["noise"]["kind"]}


@pytest.mark.parametrize(
    ("name", "env", "noise", "arm", "expected"),
    [
        ("atari-ppo", "Alien", "bsc", "sppo",
         "sppo_atari.py --env-id Alien --noise bsc --alpha 0.5 --beta 10 --total-timesteps 5000000"),
        ("imdb", "imdb", "none", "control", "sppo_rlhf_imdb.py --alpha 0.9 --beta 0 --iterations 60"),
        ("tldr", "tldr", "none", "sppo_raw", "sppo_rlhf_tldr.py --alpha 0.5 --beta 0.2 --no-norm-adv --iterations 100"),
        ("atari-ppo", "Alien", "bsc", "reweighted",  # 0.5 / 10.5, 0.01 / 10.5, 0.5 / 10.5, 1e-5 / 10.5
         "sppo_atari.py --env-id Alien --noise bsc --alpha 1 --beta 0 --vf-coef 0.0476190476 --ent-coef 0.000952380952 "
         "--max-grad-norm 0.0476190476 --adam-eps 9.52380952e-07 --total-timesteps 5000000"),
        ("sb3_atari", "RoadRunner", "none", "sb3",
         "benchmark/studies/sb3_peer.py --env-id RoadRunner --peer-of sppo_atari.py --total-timesteps 200000"),
    ],
)  # fmt: skip
def test_commands_are_the_papers(name, env, noise, arm, expected):
    (run,) = (run for run in cells(name) if (run.env, run.noise, run.arm, run.seed) == (env, noise, arm, 2))
    command = run.command(grid.Args(name))
    length = command[command.index("--seed") - 1]
    folder = f"runs/grid/{name}/{length}/{env}__{noise}__{arm}__2"
    assert shlex.join(command) == f"{expected} --seed 2 --exp-name {arm} --num-threads 1 --run-dir {folder}"


@pytest.mark.parametrize("name", [name for name in COUNTS if "sb3" not in name])
def test_the_scripts_understand_each_command(name, monkeypatch):
    """Parsed by the script itself; each comparison with PPO has the control of its weight."""
    arms = {}
    for run in cells(name):
        arms.setdefault((run.env, run.noise), {})[run.arm] = run
    for found in list(arms.values())[:2]:
        weights = {}
        for arm, run in found.items():
            script = importlib.import_module(run.script.removesuffix(".py"))
            monkeypatch.setattr(sys, "argv", [run.script])
            defaults = [script.Args()][: len(inspect.signature(script.parse_args).parameters) - 1]
            args = script.parse_args(run.command(grid.Args(name))[1:], *defaults)
            length = "iterations" if "rlhf" in run.script else "total_timesteps"
            assert args.seed == run.seed and getattr(args, length) == run.length
            assert args.run_dir.endswith(str(run.folder)) and args.num_threads == 1 and args.exp_name == arm
            weights[arm] = (args.alpha + args.beta * abs(args.Z), args.beta > 0, getattr(args, "norm_adv", None))
        for weight, symmetric, norm_adv in weights.values():
            if symmetric and "a2c" not in run.script:
                assert (weight, False, norm_adv) in weights.values()


def test_filter_and_length(capsys):
    args = grid.Args("continuous-ppo", filter="env=Hopper-v4,env=Ant-v4,seed=3,arm=ppo", total_timesteps=1000, dry_run=True)
    args.args = "--track"
    grid.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("python dsppo_continuous.py --env-id ") for line in lines)
    assert all("--total-timesteps 1000 --seed 3 --exp-name ppo --num-threads 1 --track" in line for line in lines)
    assert all("/continuous-ppo/1000/" in line for line in lines)


def test_a_dry_run_into_head_is_quiet():
    command = f"{shlex.quote(sys.executable)} benchmark/run.py sensitivity --dry-run | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("python sppo_atari.py --env-id Alien ") == 1 and done.stderr == ""


@pytest.mark.parametrize("name", ["crazyclimber", "krull", "swimmer", "factored"])
def test_our_own_grids_have_the_papers_settings(name):
    """Each arm is one of the table's for the same task and noise; factored's is dsa2c with another probability."""
    for run in cells(name):
        table = {"sppo_atari.py": "atari-ppo", "dsppo_continuous.py": "continuous-ppo", "dsa2c_continuous.py": "continuous-a2c"}
        alike = (each for each in cells(table[run.script]) if (each.env, each.noise) == (run.env, run.noise))
        if (run.noise, run.arm[:5]) != ("none", "dsa2c"):  # its beta of 10 is the noisy one on purpose
            assert run.options.removesuffix(" --reverse-prob factored") in {each.options for each in alike}, run


GOOD = """
script = "sppo_atari.py"
envs = ["Alien"]
seeds = [1, 2]
total_timesteps = 2000
[arms]
ppo = "--alpha 1 --beta 0"
"""


def test_a_grid_of_ones_own_with_the_papers_betas(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'script = "dsppo_continuous.py"\npaper = "continuous.ppo"\nenvs = ["Ant-v4", "Hopper-v4"]\nseeds = [7]\n'
        '[env_options]\nAnt-v4 = "--gamma 0.9"\n[arms]\nx = "--alpha {w} --beta {beta} --vf-coef {vf_coef / w}"\n'
    )
    found = [(run.env, run.noise, run.seed, run.length, run.options) for run in grid.cells(str(tmp_path / "mine.toml"))]
    assert found == [
        ("Ant-v4", "none", 7, 2_000_000, "--alpha 20.5 --beta 20 --vf-coef 0.0243902439 --gamma 0.9"),
        ("Ant-v4", "gaussian", 7, 2_000_000, "--alpha 20.5 --beta 20 --vf-coef 0.0243902439 --gamma 0.9"),
        ("Hopper-v4", "none", 7, 2_000_000, "--alpha 20.5 --beta 20 --vf-coef 0.0243902439"),
        ("Hopper-v4", "gaussian", 7, 2_000_000, "--alpha 50.5 --beta 50 --vf-coef 0.0099009901"),
    ]


MINE = """
class Args:
    my_coef: float = 0.0
    env_id: str = "Alien"
    total_timesteps: int = 1
    exp_name: str = "mine"
    seed: int = 1
    run_dir: str = "runs"
    resume: str | None = None
    num_threads: int = 1
"""


def test_a_script_of_ones_own(tmp_path, monkeypatch):
    """Beside the TOML file, else in the current folder, else in the checkout; an arm may have another script."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for path in ("here/mine.py", "there/mine.py", "here/other.py"):
        (tmp_path / path).write_text(MINE)
    text = GOOD.replace("sppo_atari.py", "mine.py").replace("[arms]", 'baseline = "ppo"\n[arms]')
    text += 'new = "--my-coef 0.5"\nother = "other.py --my-coef 0.1"\nours = "sppo_atari.py --beta 0"\n'
    (tmp_path / "there/mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    args = grid.Args(str(tmp_path / "there/mine.toml"), folder=tmp_path / "runs")
    runs = {run.arm: run for run in grid.cells(args.grid) if run.seed == 1}
    scripts = {arm: run.command(args)[0] for arm, run in runs.items()}
    here, there = tmp_path / "here/other.py", tmp_path / "there/mine.py"
    assert scripts == {"ppo": str(there), "new": str(there), "other": str(here), "ours": "sppo_atari.py"}
    expected = "--env-id Alien --my-coef 0.5 --total-timesteps 2000 --seed 1 --exp-name new --num-threads 1 --run-dir"
    assert shlex.join(runs["new"].command(args)[1:-1]) == expected
    grid.write_grid(list(runs.values()), args)
    assert json.loads((tmp_path / "runs/mine/grid.json").read_text()) == {"script": "mine.py", "baseline": "ppo"}


def refused(capsys, function, *args):
    """What a call that ends with status 2 says, in one line."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and err.startswith("run.py: error: "), err
    return err


BAD = [  # (what of GOOD is replaced, by what), what is said
    (("[arms]", 'baseline = "dqn"\n[arms]'), "baseline = 'dqn'; expected one of the arms, ppo"),
    (("[arms]", '[arms]\nlm = "sppo_rlhf_imdb.py"'), "expected a script of sppo_atari.py's kind, with its total_timesteps"),
    ((GOOD, "script = "), "mine.toml: expected TOML (Invalid value"),
    (("sppo_atari", "ppo"), "script = 'ppo.py'; expected a file beside mine.toml, in the current folder or in "),
    (("seeds", "#"), "missing: seeds; expected arms, envs, script, seeds, total_timesteps"),
    (("seeds", "nosie = 1\nseeds"), "unknown: nosie; expected"),
    (("[1, 2]", "[1, 1]"), "seeds = [1, 1]; expected each once"),
    (('"sppo_atari.py"', '["sppo_atari.py"]'), "expected the path of a script that ends with .py"),
    (("[1, 2]", "[-1, 1]"), "seeds = [-1, 1]; expected whole numbers of 0 or more"),
    (("[1, 2]", '["1"]'), "seeds = ['1']; expected a list of whole numbers"),
    (("2000", "0"), "total_timesteps = 0; expected a whole number of 1 or more"),
    (('"--alpha 1 --beta 0"', "1"), "expected a table of texts"),
    (("ppo =", '"a/b" ='), "arm 'a/b'; expected a name of up to 100 letters"),
    (("--beta 0", "--beta '0"), "expected options as a shell would take them (No closing quotation)"),
    (("--beta 0", "--beta 0 --seed=3"), "expected options other than --seed, which the grid sets"),
    (("seeds", 'paper = "atari.dqn"\nseeds'), "paper = 'atari.dqn'; expected a table of "),
    (("[arms]", '[env_options]\nPong = "--gamma 0"\n[arms]'), "options of no other environments than Alien"),
    (("sppo_atari", "half"), "script = 'half.py'; expected a class Args there with resume, too"),
    (("sppo_atari", "broken"), "broken.py: expected a Python script ("),
    (("", ""), "expected another file name, as sppo_atari.py is a script of this project"),
]


def test_bad_grids_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for (old, new), expected in BAD:
        if "another file name" in expected:
            (tmp_path / "sppo_atari.py").write_text(MINE)
        (tmp_path / "half.py").write_text(MINE.replace("resume", "go_on"))
        (tmp_path / "broken.py").write_text("class Args(:")
        (tmp_path / "mine.toml").write_text(GOOD.replace(old, new) if old else GOOD)
        assert expected in refused(capsys, grid.main, grid.Args("mine.toml", folder=tmp_path / "runs"))
    text = GOOD.replace("--beta 0", "--beta {games}").replace("seeds", 'paper = "atari.ppo"\nseeds')
    (tmp_path / "mine.toml").write_text(text.replace("sppo_atari.py", str(ROOT / "sppo_atari.py")))
    assert "{games}; expected the name of a number in its table of" in refused(capsys, grid.cells, "mine.toml")
    assert "no such grid: expected one of adv-norm, atari-a2c, " in refused(capsys, grid.cells, "no such grid")
    assert not (tmp_path / "runs").exists()


def test_bad_arguments_are_one_line(capsys):
    for changed, expected in (
        ({"filter": "env=Pong"}, "--filter env=Pong: expected env= one of Alien"),
        ({"filter": "game=Alien"}, "--filter game=Alien: expected env=, noise=, arm= or seed="),
        ({"args": "--exp-name 'a"}, "expected options as a shell would take them (No closing quotation)"),
        ({"args": "--total_timesteps 5"}, "expected options other than --total-timesteps, which the grid sets"),
        ({"args": "--track --beta=0"}, "expected options other than --beta, which the grid sets"),
        ({"grid": "adv-norm", "args": "--norm-adv"}, "expected options other than --norm-adv, which the grid sets"),
        ({"args": "--Z -2"}, "expected options other than --Z, which the grid sets"),
    ):
        assert expected in refused(capsys, grid.main, grid.Args(**{"grid": "atari-ppo", "dry_run": True, **changed}))


# --- runs -------------------------------------------------------------------------------------------------------------

SMALL = """
script = "{script}"
envs = ["Pendulum-v1"]
seeds = {seeds}
total_timesteps = {steps}
[arms]
dppo = "--alpha 1 --beta 0"
"""
COUNTS_STEPS = f"""{MINE}
import json, os, signal, sys, time
from pathlib import Path

def main():
    options, signals = dict(zip(sys.argv[1::2], sys.argv[2::2])), []
    if options.get("--env-id") == "Broken-v0":
        raise RuntimeError("the wheel came off")
    folder = Path(options.get("--resume") or options["--run-dir"] + "/a_run")
    checkpoint = folder / "checkpoint.pt"
    if "--resume" not in options:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(options))
    end = int(json.loads((folder / "args.json").read_text())["--total-timesteps"])
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    for step in range(int(checkpoint.read_text()) if checkpoint.exists() else 0, end):
        time.sleep(0.01)
        (folder / "new").write_text(str(step + 1))
        os.replace(folder / "new", checkpoint)
        if signals:
            print("SIGTERM at step", step + 1)
            sys.exit(128 + signals[0])
        if (Path(__file__).parent / "enough").exists():
            break
    (folder / "result.json").write_text("{{}}")
    print(folder / "result.json")

if __name__ == "__main__":
    main()
"""  # what run.py sees of a training script, without the seconds that torch takes to start

ENV = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}


def write_grid(tmp_path, seeds, steps, script="counts_steps.py"):
    (tmp_path / "counts_steps.py").write_text(COUNTS_STEPS)
    (tmp_path / "small.toml").write_text(SMALL.format(script=script, seeds=seeds, steps=steps))
    return tmp_path / "small.toml", tmp_path / "runs" / "small" / str(steps)


def test_a_folder_belongs_to_one_command(tmp_path, capsys):
    path, _ = write_grid(tmp_path, [1], 1024)
    (run,) = grid.cells(str(path))
    args = grid.Args(str(path), folder=tmp_path / "runs")
    (args.folder / run.folder).mkdir(parents=True)
    (args.folder / run.folder / "command.json").write_text(json.dumps(run.command(args)))
    grid.check_commands([run], grid.Args(str(path), folder=args.folder, cpus=4, args="--track"))
    for options, more in ((run.options, "--gamma 0.9"), (run.options + " --learning-rate 1", "")):
        other = grid.Run(**{**vars(run), "options": options})
        err = refused(capsys, grid.check_commands, [other], grid.Args(str(path), folder=args.folder, args=more))
        assert f"begun as {tmp_path / 'counts_steps.py'}" in err and "expected that command, or another --folder" in err


def test_half_a_file_is_none(tmp_path):
    """What a kill or a full disk left of command.json, if the run has gone on its log still has the command; of a result."""
    path, _ = write_grid(tmp_path, [1], 1024)
    (run,) = grid.cells(str(path))
    args = grid.Args(str(path), folder=tmp_path / "runs")
    folder = args.folder / run.folder
    folder.mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    halves = ("", '["dsppo_contin', "{}", "[1]")
    for left in halves:
        (folder / "command.json").write_text(left)
        grid.check_commands([run], args)
    assert grid.execute([str(script)], folder, sys.executable, 1, 0) == (0, f"$ python {script}\nran")
    assert json.loads((folder / "command.json").read_text()) == [str(script)] and not list(folder.glob("*.tmp"))
    for left in halves:
        (folder / "command.json").write_text(left)
        assert grid.read_command(folder) == [str(script)]
        with pytest.raises(SystemExit):
            grid.check_commands([run], args)

    (tmp_path / "a").mkdir()
    (tmp_path / "a/checkpoint.pt").write_text("")
    for text, state in (('{"score": 1', "begun"), ('{"score": 1}', "finished")):
        (tmp_path / "a/result.json").write_text(text)
        assert grid.find_state(tmp_path) == (state, tmp_path / "a")


@pytest.mark.parametrize(("name", "logged", "shown"), [("imdb", [112, 224, 560], 5), ("continuous-ppo", [2048, 4096], 4096)])
def test_progress_shows_steps_or_iterations(name, logged, shown, tmp_path):
    run = cells(name)[0]
    progress = grid.Progress(1, tmp_path)
    assert progress.last_step(run) is None
    folder = tmp_path / run.folder / "a_run"
    with SummaryWriter(folder) as writer:
        for step in logged:
            writer.add_scalar("charts/SPS", 1.0, step)
    (folder / "args.json").write_text(json.dumps({"args": {"trajectories_per_update": 112}}))
    assert progress.last_step(run) == shown and progress.last_step(run) == shown  # the second time nothing is new


def test_a_ray_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    def init(address, **options):
        raise (Exception if address == "local" else ConnectionError)("It timed out.\nMore lines.")

    path, _ = write_grid(tmp_path, [1], 1024)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    err = refused(capsys, grid.run_all, grid.cells(str(path)), grid.Args(str(path), address="auto"))
    assert "--address auto: no cluster there (It timed out.); expected auto, or HOST:PORT" in err
    line = "run.py: Ray did not start (It timed out.); nothing was run, start the command again"
    with pytest.raises(SystemExit, match=f"^{re.escape(line)}$"):
        grid.run_all(grid.cells(str(path)), grid.Args(str(path)))


def test_without_a_terminal_a_line_tells_the_steps_every_ten_minutes(tmp_path, capsys, monkeypatch):
    """Files that go while they are read stop nothing."""
    run, other = grid.cells("continuous-ppo")[:2]
    with SummaryWriter(tmp_path / run.folder / "a_run") as writer:
        writer.add_scalar("charts/SPS", 1.0, 4096)
    gone = tmp_path / other.folder / "a_run/events.out.tfevents.1.vm"
    gone.parent.mkdir(parents=True)
    gone.symlink_to("gone")
    progress = grid.Progress(1, tmp_path)
    progress.show([run, other])
    assert capsys.readouterr().err == ""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    progress.show([run, other])
    progress.show([run, other])
    assert capsys.readouterr().err == f"running: {run.folder.name} 4,096, {other.folder.name} 0\n"


def test_a_run_has_its_threads_and_no_gpu_and_dies_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import ctypes, os\nname = ctypes.c_int()\nctypes.CDLL(None).prctl(2, ctypes.byref(name))\n"  # PR_GET_PDEATHSIG
        "print(os.environ['OMP_NUM_THREADS'], repr(os.environ['CUDA_VISIBLE_DEVICES']), name.value)"
    )
    status, tail = grid.execute([str(script)], tmp_path / "cell", sys.executable, 3, 0)
    assert status == 0 and tail.splitlines()[-1] == f"3 '' {9 if sys.platform == 'linux' else 0}"


def test_a_run_in_other_hands_is_left_to_them(tmp_path, monkeypatch):
    """Running is who holds the lock, not who left a file of it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert not grid.is_running(tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        assert not grid.is_running(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert grid.is_running(tmp_path) and grid.execute(["missing.py"], tmp_path, sys.executable, 1, 0) == (grid.HELD, "")
    assert not grid.is_running(tmp_path) and not (tmp_path / "log.txt").exists()


def start_grid(path, tmp_path, *more):
    command = [sys.executable, str(ROOT / "benchmark/run.py"), str(path), "--folder", str(tmp_path / "runs"), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)


def commands(folder):
    return [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("$ python")]


def test_what_a_script_refuses_is_refused_before_any_run(tmp_path, monkeypatch, capsys):
    """In the script's own words."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # check_with_scripts sets it
    for old, new, more, expected in (
        ("--alpha 1", "--alhpa 1", "", "alhpa"),
        ("--alpha 1", "--num-bins 1", "", "num-bins"),
        ("[arms]", 'noises = ["bsc"]\n[arms]', "", "noise"),
        ("Pendulum-v1", "Pendulum-v9", "", "Pendulum"),
        ("", "", "--gamma 2", "gamma"),
    ):
        path, folder = write_grid(tmp_path, [1, 2], 1024, "dsppo_continuous.py")
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(SystemExit) as stopped:
            grid.main(grid.Args(str(path), folder=tmp_path / "runs", args=more))
        said = capsys.readouterr().err.replace("_", "-")
        assert stopped.value.code == 2 and expected in said and not folder.exists(), said
    (tmp_path / "file").write_text("")
    args = grid.Args(str(write_grid(tmp_path, [1], 1024)[0]), folder=tmp_path / "file/runs")
    assert f"--folder {args.folder}: expected a folder to write in" in refused(capsys, grid.main, args)


def run_here(monkeypatch, call):
    """run_all without Ray's seconds: `call` is what a worker would do, done at once."""
    results = []

    def submit(*args):
        results.append(call(*args))
        return len(results) - 1

    ray = SimpleNamespace(
        init=lambda **options: None,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}],
        remote=lambda function: SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=submit)),
        wait=lambda references, **options: (references[:1], references[1:]),
        get=results.__getitem__,
        exceptions=SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(sys, "argv", sys.argv)  # check_with_scripts sets it


def test_a_run_that_fails_is_tried_again_twice_and_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    path, folder = write_grid(tmp_path, [1], 5)
    path.write_text(path.read_text().replace('["Pendulum-v1"]', '["Broken-v0", "Pendulum-v1"]'))
    monkeypatch.setattr(grid.importlib.util, "find_spec", lambda name: name)
    run_here(monkeypatch, grid.execute)
    with unchanged_process(), pytest.raises(SystemExit) as stopped:
        grid.main(grid.Args(str(path), folder=tmp_path / "runs"))
    err = capsys.readouterr().err
    assert stopped.value.code == 1, err
    broken, good = (folder / f"{env}__none__dppo__1" for env in ("Broken-v0", "Pendulum-v1"))
    assert len(commands(broken)) == 3 and len(commands(good)) == 1
    assert f"run.py: failed: {broken / 'log.txt'}" in err and "the wheel came off" in err
    assert (good / "a_run/checkpoint.pt").read_text() == "5" and (good / "a_run/result.json").exists()


def test_seeds_take_turns_and_who_is_tried_again(tmp_path, monkeypatch):
    """Finished before: not run. Refused: never again. Crashed: twice. In other hands: until done, here the fifth time."""
    path, folder = write_grid(tmp_path, [1, 2], 1024)
    path.write_text(path.read_text() + 'refused = "--alpha 2"\ncrashes = "--alpha 3"\nheld = "--alpha 4"\nwas = "--alpha 5"\n')
    for seed in (1, 2):
        finished = folder / f"Pendulum-v1__none__was__{seed}/a_run"
        finished.mkdir(parents=True)
        (finished / "result.json").write_text("{}")
    submitted = []

    def call(command, folder, *rest):
        arm, seed = folder.name.split("__")[2:]
        submitted.append((arm, seed))
        held = arm == "held" and sum(name == "held" for name, _ in submitted) <= 2 * 4
        return grid.HELD if held else {"refused": 2, "crashes": 1}.get(arm, 0), "last line"

    run_here(monkeypatch, call)
    with unchanged_process():
        failed = grid.run_all(grid.cells(str(path)), grid.Args(str(path), folder=tmp_path / "runs"))
    arms = ("dppo", "refused", "crashes", "held")
    assert submitted[:8] == [(arm, seed) for seed in "12" for arm in arms]
    assert [run for run in submitted[8:] if run[0] != "held"] == [("crashes", seed) for seed in "1212"]  # twice more each
    assert sorted((run.arm, run.seed) for run in failed) == [(arm, seed) for arm in ("crashes", "refused") for seed in (1, 2)]


def test_a_signal_saves_and_the_next_start_goes_on(tmp_path):
    """Ctrl-C in a terminal; kill for a background job, which a shell starts with SIGINT ignored."""
    path, folder = write_grid(tmp_path, [1], 6_000)
    cell, steps = folder / "Pendulum-v1__none__dppo__1", [0]
    checkpoint = cell / "a_run/checkpoint.pt"
    for signum, ignored in ((signal.SIGINT, False), (signal.SIGTERM, True)):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
        process = start_grid(path, tmp_path)
        signal.signal(signal.SIGINT, before)
        wait_for(lambda: checkpoint.exists() and int(checkpoint.read_text()) > steps[-1], 180)
        process.send_signal(signum)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 130 and "stopping; the runs save their checkpoints" in err, err
        steps.append(int(re.findall(r"SIGTERM at step (\d+)", (cell / "log.txt").read_text())[-1]))
    assert 0 < steps[1] < steps[2] and ["--resume" in command for command in commands(cell)] == [False, True]


def test_a_signal_before_the_first_run_leaves_nothing(tmp_path):
    path, folder = write_grid(tmp_path, [1], 1024, "dsppo_continuous.py")
    process = start_grid(path, tmp_path)

    def handled():  # the mask of the signals that the process catches
        status = Path(f"/proc/{process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("SigCgt")]
        return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1

    wait_for(handled, 180)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (130, "", "") and not folder.exists()


def test_a_cluster_that_loses_a_machine_finishes_every_run_once(tmp_path):
    """Two nodes of one core; the second is killed when its run has a checkpoint."""
    from ray.cluster_utils import Cluster

    path, folder = write_grid(tmp_path, [1, 2, 3], 100_000)
    folders = [folder / f"Pendulum-v1__none__dppo__{seed}" for seed in (1, 2, 3)]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = start_grid(path, tmp_path, "--address", cluster.address)
        at_work = [lambda cell=cell: grid.is_running(cell) and (cell / "a_run/checkpoint.pt").exists() for cell in folders]
        wait_for(lambda: sum(each() for each in at_work) == 2, 180)
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: sum(each() for each in at_work) == 1, 180)
        (tmp_path / "enough").touch()
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    finally:
        cluster.shutdown()
    resumed = 0
    for cell in folders:
        first, *rest = commands(cell)
        assert "--resume" not in first and all("--resume" in command for command in rest) and len(rest) <= 1
        resumed += len(rest)
        assert len(list(cell.glob("*/args.json"))) == len(list(cell.glob("*/result.json"))) == 1
        assert (cell / "log.txt").read_text().count("result.json") == 1  # the last line of a run that ends
    assert resumed == 1 and "all 3 runs have finished" in out
