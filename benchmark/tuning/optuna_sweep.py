"""Tunes alpha, beta and the learning rate of a script, or other arguments, with Optuna, on this machine.

    python benchmark/tuning/optuna_sweep.py sppo_atari.py --trials 20 --args="--env-id Breakout --total-timesteps 200000"
    python benchmark/tuning/optuna_sweep.py sppo_atari.py --seeds 1 2 3 --args="--env-id Breakout" --beta 1 100
    python benchmark/tuning/optuna_sweep.py my_loss.py --tune spo-coef 0.1 10 --args="--env-id Breakout --alpha 0 --beta 0"

A trial runs the script as you would type it, once a seed, in FOLDER/{script}/{trial}/{seed}; its value is the mean of the
scores in their result.json. Values are drawn on a logarithmic scale by Optuna's TPE. FOLDER/study.db keeps a study a script:
started again with the same --folder, --args, --seeds and --tune it goes on until it has --trials trials; started twice at once,
two work at it. Prints the best ones; the same seeds tell nothing about other seeds.
"""

from __future__ import annotations  # optuna's types, which --help does without

import fcntl
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import tyro
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)
MISSING = None
try:
    import optuna
except ModuleNotFoundError as error:
    MISSING = error.name


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Args:
    script: tyro.conf.Positional[Path]
    """the script: one of ours, or a copy with a loss of your own"""
    trials: int = 20
    """trials of the study, those of earlier starts included"""
    seeds: tuple[int, ...] = (1,)
    """a trial is run with each of these seeds"""
    alpha: tuple[float, float] = (0.1, 2.0)
    """lowest and highest alpha"""
    beta: tuple[float, float] = (0.1, 50.0)
    """lowest and highest beta"""
    learning_rate: tuple[float, float] = (1e-5, 1e-2)
    """lowest and highest learning rate"""
    tune: tyro.conf.UseAppendAction[tuple[tuple[str, float, float], ...]] = ()
    """an argument of the script, its lowest and its highest value: tuned in place of these three; may be repeated"""
    args: str = ""
    """what to add to every command, with an equals sign: --args="--env-id Breakout --total-timesteps 200000" """
    folder: Path = Path("runs/optuna")
    """where the study and its runs are kept"""


def fail(message: str):
    print(f"optuna_sweep.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def run(command: list[str], folder: Path) -> float:
    """The score of one run. Raises CalledProcessError if it fails; arguments that the script refuses end the study."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([*command, "--run-dir", str(folder)], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode == 2:
        text = re.sub("[╭╮╰╯│─]+", " ", (folder / "log.txt").read_text())  # of tyro's box
        fail(f"a trial was refused: {' '.join(text.split())}")
    done.check_returncode()
    (path,) = folder.glob("*/result.json")
    score = json.loads(path.read_text())["score"]
    if score is None:
        fail(f"{path} has no score; expected --args with --eval-episodes above 0")
    return score


def main(args: Args) -> None:
    if not args.script.is_file():
        fail(f"{args.script}: expected a script")
    path = args.script.resolve()  # two scripts of one name are two studies
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.relative_to("/")
    name = str(path.with_suffix("")).replace("/", "__")
    ranges = {key.replace("-", "_"): bounds for key, *bounds in args.tune}
    ranges = ranges or {key: getattr(args, key) for key in ("alpha", "beta", "learning_rate")}
    for key, (low, high) in ranges.items():
        if not 0 < low < high:
            given = ("tune " if args.tune else "") + key.replace("_", "-")
            fail(f"--{given} {low:g} {high:g}: expected two numbers above 0, the lower one first")

    try:
        words = shlex.split(args.args)
    except ValueError as error:
        fail(f"--args {args.args}: expected a command line ({error})")

    def objective(trial: optuna.Trial) -> float:
        values = {key: trial.suggest_float(key, *bounds, log=True) for key, bounds in ranges.items()}
        options = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", f"{value:.6g}")]
        command = [sys.executable, str(args.script), *options, *words]
        folder = args.folder / name / str(trial.number)
        return statistics.mean(run([*command, "--seed", str(seed)], folder / str(seed)) for seed in args.seeds)

    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--folder {args.folder}: expected a folder to write in ({error.strerror})")
    storage = f"sqlite:///{args.folder / 'study.db'}"
    with (args.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that start at once would both make the tables of a new study.db
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        about = {"args": args.args, "seeds": list(args.seeds), "tune": [list(each) for each in args.tune]}
        for key, value in about.items():
            before = study.user_attrs.get(key, value)
            if before != value:
                fail(f"--{key} {value}: the study in {args.folder} has {before}; expected that, or another --folder")
            study.set_user_attr(key, value)
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    if len(study.get_trials(states=ended)) < args.trials:
        enough = optuna.study.MaxTrialsCallback(args.trials, states=ended)
        study.optimize(objective, callbacks=[enough], catch=(subprocess.CalledProcessError,))
    scored = [trial for trial in study.trials if trial.value is not None]
    for trial in sorted(scored, key=lambda trial: -trial.value)[:5]:
        print(f"{trial.value:.6g}", *(f"--{name.replace('_', '-')} {value:.6g}" for name, value in trial.params.items()))
    if not scored:
        sys.exit(f"optuna_sweep.py: no trial has a score; {args.folder / name}/*/*/log.txt say why")


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    if MISSING:
        fail(f"needs {MISSING}; expected what `{INSTALL}` installs")
    main(arguments)
