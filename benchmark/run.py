"""Runs a grid, one of the paper's tables or one of your own, on one machine or on a Ray cluster.

    python benchmark/run.py atari-ppo --dry-run                                   # 1,100 commands, as you would type them
    python benchmark/run.py continuous-ppo --filter env=Hopper-v4,seed=1,seed=2 --total-timesteps 200000
    python benchmark/run.py my_grid.toml --address auto                           # on the cluster that this machine belongs to

A grid is a TOML file; `atari-ppo` is benchmark/grids/atari-ppo.toml, which shows how the paper's tables are made:

    script = "my_loss.py"                 # relative to this file, to the current folder, or to the checkout
    envs = ["Gopher", "StarGunner"]
    noises = ["none", "bsc"]              # optional; ["none"] unless given
    seeds = [1, 2, 3]
    total_timesteps = 1_000_000           # RLHF scripts: iterations, and no envs or noises
    baseline = "ppo"                      # optional: what report.py compares the other arms with
    paper = "atari.ppo"                   # optional: what of the five above is not given is the paper's
    [arms]
    ppo = "--alpha 1 --beta 0"
    mine = "--alpha 1 --beta 0 --my-coef 0.5"
    sb3 = "sb3.py --algorithm ppo"        # an arm may name a script of its own
    control = "--alpha {w} --beta 0"      # with `paper`: {beta} is its beta for this task and noise, {w} alpha + beta |Z|,
                                          # {vf_coef / w} its vf_coef divided by that
    [env_options]                         # optional
    Gopher = "--gamma 0.999"              # added to all arms' options there

An arm's name is its runs' --exp-name: it stands in their args.json and result.json, and in report.py's tables and curves. A
script has a class Args with our names (exp_name, seed, run_dir, resume, num_threads, total_timesteps or iterations, and env_id
and noise if it has them), goes on with --resume, and writes our args.json, checkpoint.pt and result.json: copy one of ours.

Each run has a folder FOLDER/{grid}/{length}/{env}__{noise}__{arm}__{seed}/ with its own run folder and log.txt. A finished run
is not run again, a killed one goes on from its checkpoint, one that fails is tried again twice and then reported (at once if
the script refuses its arguments). There is one process a core, unless --cpus or --gpus say otherwise; without --gpus the runs
see no GPU. Ctrl-C lets the runs save and leaves. On a cluster this checkout, its Python and --folder must have the same path on
all machines (a shared file system); a machine that dies costs its runs only the time since their checkpoints.
"""

import ast
import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import pydantic.dataclasses
    import tyro
    from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
GRIDS = Path(__file__).parent / "grids"
PAPER = Path(__file__).parent / "paper/hyperparameters.toml"
OWN = {  # the scripts of this project
    *("sppo_atari.py", "sa2c_atari.py", "dsppo_continuous.py", "dsa2c_continuous.py"),
    *("sppo_rlhf_imdb.py", "sppo_rlhf_tldr.py"),
}
NEEDED = {"exp_name", "seed", "run_dir", "resume", "num_threads"}  # of a script's arguments, beside its length
LOST = 10  # times that a run may lose its machine
HELD = 75  # exit status of a run that someone else is running (sysexits' EX_TEMPFAIL)
OURS = {"--env-id", "--noise", "--seed", "--total-timesteps", "--iterations", "--num-threads", "--run-dir", "--resume"}
OURS |= {"--exp-name"}


@pydantic.dataclasses.dataclass
class Args:
    grid: tyro.conf.Positional[str]
    """name of a grid in benchmark/grids, or a TOML file"""
    filter: str = ""
    """only these runs, as key=value,...: env, noise, arm or seed; values of one key are alternatives"""
    total_timesteps: PositiveInt | None = None
    """length of every run in environment steps (RLHF: iterations) in place of the grid's; what is annealed over a run (PPO's
    learning rate, on Atari the clip range, too) is then annealed over the shorter one"""
    args: str = ""
    """what to add to every command, with an equals sign: --args=--track, --args="--track --gamma 0.9" """
    folder: Path = Path("runs/grid")
    """where the runs' folders go"""
    dry_run: bool = False
    """print the commands and run nothing"""
    address: str | None = None
    """a Ray cluster's address, or auto; unless given, this machine alone"""
    cpus: PositiveInt = 1
    """cores, and threads, of a run"""
    gpus: NonNegativeFloat = 0.0
    """GPUs of a run; parts of one, such as 0.25, share it"""
    retries: NonNegativeInt = 2
    """times that a failed run is tried again"""


@dataclass(frozen=True)
class Run:
    grid: str
    env: str
    noise: str
    arm: str
    seed: int
    length: int
    script: str
    """relative to the checkout, or absolute"""
    options: str
    """the arm's part of the command line"""

    @property
    def folder(self) -> Path:
        env = self.env.replace("/", "_").replace(":", "_")
        return Path(self.grid) / str(self.length) / f"{env}__{self.noise}__{self.arm}__{self.seed}"

    def command(self, args: Args) -> list[str]:
        """As a user would type it, in the checkout's folder."""
        task = ["--env-id", self.env] if "env_id" in arguments(self.script) else []
        noise = [] if self.noise == "none" else ["--noise", self.noise]
        length = [f"--{length_of(self.script).replace('_', '-')}", str(self.length)]
        rest = ["--seed", str(self.seed), "--exp-name", self.arm, "--num-threads", str(args.cpus), *shlex.split(args.args)]
        return [
            self.script,
            *task,
            *noise,
            *shlex.split(self.options),
            *length,
            *rest,
            "--run-dir",
            str(args.folder / self.folder),
        ]


@functools.cache
def arguments(script: str) -> set[str]:
    """The names of a script's arguments: the fields of its class Args, read without running it."""
    try:
        tree = ast.parse((ROOT / script).read_text())
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"{script}: expected a Python script ({error})")
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {field.target.id for found in classes for field in found.body if isinstance(field, ast.AnnAssign)}


def length_of(script: str) -> str:
    """The argument for the length of a run."""
    return "total_timesteps" if "total_timesteps" in arguments(script) else "iterations"


def find_script(name: object, toml: Path) -> str:
    """The script that a TOML file names: relative to that file, to the current folder, or to the checkout, in this order."""
    if not (isinstance(name, str) and name.endswith(".py")):
        fail(f"{toml}: script = {name!r}; expected the path of a script that ends with .py")
    found = next((path.resolve() for folder in (toml.parent, Path(), ROOT) if (path := folder / name).is_file()), None)
    if not found:
        fail(f"{toml}: script = {name!r}; expected a file beside {toml.name}, in the current folder or in {ROOT}")
    if found.name in OWN and found.parent != ROOT:
        fail(f"{toml}: script = {name!r}; expected another file name, as {found.name} is a script of this project")
    script = str(found.relative_to(ROOT)) if found.is_relative_to(ROOT) else str(found)
    length = set() if "iterations" in arguments(script) else {"total_timesteps"}
    missing = (NEEDED | length) - arguments(script)
    if missing:
        fail(f"{toml}: script = {name!r}; expected a class Args there with {', '.join(sorted(missing))}, too")
    return script


def check_options(name: str, text: str, taken: set[str]) -> None:
    """Refuses options among those `taken`: the last one on a command line counts, so they would make another run."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        fail(f"{name} = {text!r}: expected options as a shell would take them ({error})")
    for option in [option_name(word) for word in words]:
        if option in taken:
            fail(f"{name} = {text!r}: expected options other than {option}, which the grid sets")


def option_name(word: str) -> str:
    """--no-norm-adv and --norm_adv=True set --norm-adv."""
    return re.sub("^--no-", "--", word.split("=")[0].replace("_", "-"))


def fail(message: str):
    print(f"run.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- grids ------------------------------------------------------------------------------------------------------------


def read_grid(name: str) -> tuple[Path, dict]:
    """The TOML file of a grid and what is in it, with what it takes from the paper."""
    known = sorted(path.stem for path in GRIDS.glob("*.toml"))
    path = GRIDS / f"{name}.toml" if name in known else Path(name)
    try:
        grid = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name}: expected one of {', '.join(known)}, or a TOML file ({error})")
    except tomllib.TOMLDecodeError as error:
        fail(f"{path}: expected TOML ({error})")
    settings = {}
    if "paper" in grid:
        found = tomllib.loads(PAPER.read_text())
        for part in str(grid["paper"]).split("."):
            if part not in found:
                fail(f"{path}: paper = {grid['paper']!r}; expected a table of {PAPER}, such as 'atari.ppo'")
            found = found[part]
            settings |= found
        if "noise" in settings:
            settings["envs"] = settings.get("games") or settings["tasks"]
            settings["noises"] = ["none", settings["noise"]["kind"]]
        if "seeds" in settings:
            settings["seeds"] = list(range(1, settings["seeds"] + 1))
        taken = {
            name: settings[name] for name in ("envs", "noises", "seeds", "total_timesteps", "iterations") if name in settings
        }
        grid = taken | grid
    return path, grid | {"settings": settings}


def cells(name: str) -> list[Run]:
    """The runs of a grid, in its order: environments, noises, arms, seeds."""
    path, grid = read_grid(name)
    settings = grid.pop("settings")
    script = find_script(grid.get("script"), path)
    has_envs, length_name = "env_id" in arguments(script), length_of(script)
    required = {"script", "seeds", length_name, "arms"} | ({"envs"} if has_envs else set())
    optional = {"baseline", "paper"} | ({"noises", "env_options"} if has_envs else set())
    unknown = grid.keys() - required - optional
    if unknown or required - grid.keys():
        wrong = f"unknown: {', '.join(sorted(unknown))}" if unknown else f"missing: {', '.join(sorted(required - grid.keys()))}"
        fail(f"{path}: {wrong}; expected {', '.join(sorted(required))} and, if wanted, {', '.join(sorted(optional))}")
    stem = Path(script).stem.split("_")[-1]
    envs, noises = (grid["envs"], grid.get("noises", ["none"])) if has_envs else ([stem], ["none"])
    lengths, arms, more = grid[length_name], grid["arms"], grid.get("env_options", {})
    for key, values, kind in (("envs", envs, str), ("noises", noises, str), ("seeds", grid["seeds"], int)):
        if not (isinstance(values, list) and values and all(type(value) is kind for value in values)):
            fail(f"{path}: {key} = {values!r}; expected a list of {'whole numbers' if kind is int else 'texts'}")
        if len(set(values)) < len(values):
            fail(f"{path}: {key} = {values!r}; expected each once")
    if min(grid["seeds"]) < 0:
        fail(f"{path}: seeds = {grid['seeds']!r}; expected whole numbers of 0 or more")
    lengths = lengths if isinstance(lengths, dict) else dict.fromkeys(envs, lengths)
    for env in envs:
        if type(lengths.get(env)) is not int or lengths[env] < 1:
            fail(f"{path}: {length_name} = {lengths.get(env)!r}; expected a whole number of 1 or more")
    for key, table in (("arms", arms), ("env_options", more)):
        if not (isinstance(table, dict) and all(isinstance(options, str) for options in table.values())):
            fail(f"{path}: {key} = {table!r}; expected a table of texts")
    if not arms or not more.keys() <= set(envs):
        fail(f"{path}: expected arms, and options of no other environments than {', '.join(envs)}")
    if grid.get("baseline", next(iter(arms))) not in arms:
        fail(f"{path}: baseline = {grid['baseline']!r}; expected one of the arms, {', '.join(arms)}")
    for arm in arms:
        if not re.fullmatch(r"[\w.-]{1,100}", arm):
            fail(f"{path}: arm {arm!r}; expected a name of up to 100 letters, digits, '_', '.' or '-'")
    runs = []
    for env, noise, arm in itertools.product(envs, noises, arms):
        options = " ".join(filter(None, (fill(arms[arm], settings, env, noise, path), more.get(env))))
        check_options(f"{path}: arm {arm}", options, OURS)
        own, (first, *rest) = script, shlex.split(options) or [""]
        if first.endswith(".py"):
            own, options = find_script(first, path), shlex.join(rest)
        if (length_of(own), "env_id" in arguments(own)) != (length_name, has_envs):
            fail(f"{path}: arm {arm}: {own}; expected a script of {script}'s kind, with its {length_name}")
        runs += [Run(path.stem, env, noise, arm, seed, lengths[env], own, options) for seed in grid["seeds"]]
    return runs


def fill(options: str, settings: dict, env: str, noise: str, path: Path) -> str:
    """An arm's options with the paper's settings for this environment and noise in the place of {name} and {name / w}."""
    if not settings:
        return options
    beta = settings["beta"]
    while isinstance(beta, dict):
        beta = beta[noise] if noise in beta else beta.get(env, beta.get("default"))
    w = settings["alpha"] + beta * abs(settings.get("Z", -1))
    values = settings | {"beta": beta, "w": w}

    def value(match: re.Match) -> str:
        if not isinstance(values.get(match[1]), int | float):
            fail(f"{path}: {match[0]}; expected the name of a number in its table of {PAPER.name}, or w")
        return f"{values[match[1]] / (w if match[2] else 1):.9g}"

    return re.sub(r"\{(\w+)( / w)?\}", value, options)


def select(runs: list[Run], text: str) -> list[Run]:
    """Those that --filter names."""
    wanted: dict[str, set[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        known = sorted({str(getattr(run, key)) for run in runs}) if key in ("env", "noise", "arm", "seed") else []
        if value not in known:
            expected = f"{key}= one of {', '.join(known)}" if known else "env=, noise=, arm= or seed="
            fail(f"--filter {part}: expected {expected}")
        wanted.setdefault(key, set()).add(value)
    return [run for run in runs if all(str(getattr(run, key)) in values for key, values in wanted.items())]


# --- one run ----------------------------------------------------------------------------------------------------------


def check_with_scripts(runs: list[Run], args: Args) -> None:
    """Lets the scripts refuse one run of each environment, noise and arm before any starts; they name the argument and leave.

    For a cluster they only parse: it may have GPUs, folders or keys that this machine has not.
    """
    for run in {(run.env, run.noise, run.arm): run for run in runs}.values():
        command = run.command(args)
        sys.argv = command  # whose name the script's message has
        script = load_script(run.script)
        if not (hasattr(script, "parse_args") and hasattr(script, "check")):
            continue  # it refuses its arguments when it starts
        try:
            own = script.parse_args(command[1:])
            if not args.address:
                script.check(own)
        except Exception as error:  # the script's own refusals, and Gymnasium's of an environment
            fail(f"{run.script}: {first_line(error)}")


@functools.cache
def load_script(script: str):
    """The script as a module, with its folder on the path as Python has it."""
    path = ROOT / script
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look up their types
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        fail(f"{script} needs {error.name}; expected what `pip install -r requirements.txt` installs")
    return module


def check_commands(runs: list[Run], args: Args) -> None:
    """A folder belongs to one command: another arm of the same name, or other --args, would take its result for their own."""
    for run in runs:
        old, new = read_command(args.folder / run.folder), run.command(args)
        if old and essence(old) != essence(new):
            fail(f"{args.folder / run.folder}: begun as {shlex.join(old)}; expected that command, or another --folder")


def read_command(folder: Path) -> list[str] | None:
    """The command that a run was begun with; None if none was, or a kill or a full disk left no whole file of it."""
    with contextlib.suppress(OSError, ValueError):
        command = json.loads((folder / "command.json").read_text())
        if isinstance(command, list) and command and all(isinstance(word, str) for word in command):
            return command
    with contextlib.suppress(OSError):  # the log begins with it
        for line in (folder / "log.txt").read_text(errors="replace").splitlines():
            if line.startswith("$ python ") and " --resume " not in line:
                return shlex.split(line.removeprefix("$ python "))
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_grid(runs: list[Run], args: Args) -> None:
    """In grid.json beside the runs: the script and the baseline that the TOML file names, for report.py. Of the paper's tables
    report.py knows them."""
    path, grid = read_grid(args.grid)
    if "paper" in grid:
        return
    about = {"script": Path(find_script(grid["script"], path)).name, "baseline": grid.get("baseline")}
    folder = args.folder / runs[0].grid
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "grid.json", (json.dumps(about) + "\n").encode())


def essence(command: list[str]) -> list[str]:
    """The command without the options that make no other experiment."""
    kept, skip = [], False
    for word in command:
        ours = ("--run-dir", "--exp-name", "--num-threads", "--track", "--no-track")
        skip = word in ours or (skip and not word.startswith("--"))
        kept += [] if skip else [word]
    return kept


def find_state(folder: Path) -> tuple[str, Path | None]:
    """("finished", run folder), ("begun", run folder) if it has a checkpoint, or ("new", None)."""
    for path in sorted(folder.glob("*/result.json")):
        with contextlib.suppress(OSError, ValueError):  # half a file is no result
            json.loads(path.read_text())
            return "finished", path.parent
    for path in sorted(folder.glob("*/checkpoint.pt")):
        return "begun", path.parent
    return "new", None


def execute(command: list[str], folder: Path, python: str, cpus: int, gpus: float) -> tuple[int, str]:
    """Runs or resumes one run to its end. Returns its exit status and the last lines of its log.

    The lock belongs to whoever runs in this folder, another run.py, or a machine that was only thought dead; then HELD.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        for _ in range(60):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1)
        else:
            return HELD, ""
        state, run_folder = find_state(folder)
        if state == "finished":
            return 0, ""
        if state == "new":
            write_atomically(folder / "command.json", json.dumps(command).encode())  # what later starts compare theirs with
        if state == "begun":
            command = [command[0], "--resume", str(run_folder)]
        else:
            for leftover in folder.glob("*/args.json"):  # killed before its first checkpoint
                shutil.rmtree(leftover.parent)
        env = {**os.environ, "OMP_NUM_THREADS": str(cpus), "PYTHONUNBUFFERED": "1"}
        if not gpus:
            env["CUDA_VISIBLE_DEVICES"] = ""
        log_path = folder / "log.txt"
        with log_path.open("a") as log:
            log.write(f"$ python {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                [python, *command],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the driver, which tells each run once
                pass_fds=(lock.fileno(),),
                preexec_fn=die_with_parent,
            )
            try:
                while process.poll() is None:
                    time.sleep(0.2)
            except BaseException:  # ray.cancel
                process.terminate()  # it saves a checkpoint and leaves, at the latest after an iteration
                process.wait()
                raise
    return process.returncode, "\n".join(log_path.read_text(errors="replace").splitlines()[-5:])


def is_running(folder: Path) -> bool:
    """Whether someone holds the lock that `execute` takes."""
    if not (folder / "lock").exists():
        return False
    with (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def die_with_parent() -> None:
    """A run does not outlive the worker that watches it (Linux; elsewhere the lock alone protects its folder)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# --- all runs ---------------------------------------------------------------------------------------------------------


class Progress:
    """A table of the runs under way, in a terminal; elsewhere a line for each run that ends, and one every ten minutes."""

    def __init__(self, total: int, folder: Path):
        from rich.console import Console
        from rich.live import Live

        self.total, self.folder, self.counts, self.start, self.loaders = total, folder, Counter(), time.time(), {}
        self.told = self.start
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=1) if self.console.is_terminal else None
        if self.live:
            self.live.start()

    def last_step(self, run: Run) -> int | None:
        """Of what TensorBoard has got so far, in units of the run's length."""
        with contextlib.suppress(Exception):  # files that go while they are read, as a run starts over: no reason to stop all
            return self.read_step(run)

    def read_step(self, run: Run) -> int | None:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        step = self.loaders.get(run, (None, None))[1]
        for path in sorted((self.folder / run.folder).glob("*/events.out.tfevents.*"))[-1:]:
            loader = self.loaders.get(run, (None, None))[0]
            if loader is None or loader[0] != path:
                loader = (path, EventFileLoader(str(path)))
            step = max((event.step for event in loader[1].Load()), default=step)
            self.loaders[run] = (loader, step)
            if length_of(run.script) == "iterations":  # the RLHF scripts log episodes
                own = json.loads((path.parent / "args.json").read_text())["args"]
                return step and step // own["trajectories_per_update"]
        return step

    def show(self, running: list[Run]) -> None:
        if not self.live:
            if time.time() > self.told + 600:
                self.told = time.time()
                steps = ", ".join(f"{run.folder.name} {self.last_step(run) or 0:,}" for run in running[:30])
                print(f"running: {steps}", file=sys.stderr, flush=True)
            return
        from rich.table import Table

        done = self.counts["finished"] + self.counts["failed"]
        hours = (time.time() - self.start) / 3600
        left = f", {hours / done * (self.total - done):.1f} h left" if done else ""
        title = f"{self.counts['finished']} of {self.total} finished, {self.counts['failed']} failed, {hours:.1f} h{left}"
        table = Table("env", "noise", "arm", "seed", "step", "of", title=title)
        for run in running[:30]:
            step = self.last_step(run)
            table.add_row(run.env, run.noise, run.arm, str(run.seed), f"{step:,}" if step else "", f"{run.length:,}")
        self.live.update(table)

    def ended(self, run: Run, what: str, detail: str = "") -> None:
        self.counts[what] += what in ("finished", "failed")
        self.loaders.pop(run, None)
        self.console.print(f"{what}: {run.folder}{detail}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.live:
            self.live.stop()


def run_all(runs: list[Run], args: Args) -> list[Run]:
    """Runs what has not finished; returns what failed for good."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address:
        try:
            ray.init(address=args.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            fail(f"--address {args.address}: no cluster there ({first_line(error)}); expected auto, or HOST:PORT of one")
        print(f"run.py: on the cluster at {ray.get_runtime_context().gcs_address}", flush=True)
    else:  # "local", as None would join any cluster that it finds
        try:
            ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as error:  # Ray has no narrower one for a node that does not come up, as on an overloaded machine
            sys.exit(f"run.py: Ray did not start ({first_line(error)}); nothing was run, start the command again")
    for what, wanted in (("CPU", args.cpus), ("GPU", args.gpus)):
        most = max(node["Resources"].get(what, 0) for node in ray.nodes() if node["Alive"])
        if wanted > most:
            fail(f"--{what.lower()}s {wanted:g}: expected {most:g} at most, as no machine here has more")
    remote = ray.remote(execute).options(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)
    folder = args.folder.resolve()
    todo = [run for run in runs if find_state(folder / run.folder)[0] != "finished"]
    todo.sort(key=lambda run: run.seed)  # wherever it ends, the arms have about as many seeds
    progress = Progress(len(todo), folder)
    print(f"run.py: {len(runs)} runs, {len(runs) - len(todo)} of them finished before; {folder}", flush=True)
    failures, lost, failed = Counter(), Counter(), []

    def submit(run: Run):
        return remote.remote(run.command(args), folder / run.folder, sys.executable, args.cpus, args.gpus)

    pending = {submit(run): run for run in todo}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs save; Ray has set a handler of its own
    try:
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=2.0)
            for reference in ready:
                run = pending.pop(reference)
                try:
                    status, tail = ray.get(reference)
                    ended_by = (signal.SIGTERM, signal.SIGINT)  # a machine that shuts down; SIGKILL may be its own memory
                    signalled = -status in ended_by or status - 128 in ended_by
                except ray.exceptions.RayTaskError as error:  # no log to write to, no Python there, ...
                    status, tail, signalled = None, str(error.cause), False
                except ray.exceptions.RayError as error:  # its worker or machine died
                    status, tail, signalled = None, type(error).__name__, True
                if status == 0:
                    progress.ended(run, "finished")
                    continue
                if status == HELD:  # it ends there, or is taken over
                    pending[submit(run)] = run
                    continue
                (lost if signalled else failures)[run] += 1
                if status == 2 or lost[run] > LOST or failures[run] > args.retries:  # 2: its arguments, which stay wrong
                    failed.append(run)
                    said = [line for line in tail.splitlines() if re.search(r"\w", line)]
                    progress.ended(run, "failed", f" (status {status}): {said[-1] if said else ''}")
                else:
                    progress.ended(run, "again", f" (status {status})")
                    pending[submit(run)] = run
            progress.show([run for run in pending.values() if is_running(folder / run.folder)])
    except KeyboardInterrupt:
        progress.close()
        print("run.py: stopping; the runs save their checkpoints (once more: at once)", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for reference in reversed(list(pending)):  # those that wait first, or they would start now
                ray.cancel(reference)
            ray.wait(list(pending), num_returns=len(pending))
        sys.exit(130)
    finally:
        progress.close()
    return failed


def main(args: Args) -> None:
    runs = select(cells(args.grid), args.filter)
    arms = {option_name(word) for run in runs for word in shlex.split(run.options) if word.startswith("--")}
    weights = {"--Z"} if "paper" in read_grid(args.grid)[1] else set()  # the controls' alphas are for Z = -1
    check_options("--args", args.args, OURS | arms | weights)
    if args.total_timesteps is not None:
        runs = [replace(run, length=args.total_timesteps) for run in runs]
    if args.dry_run:
        try:
            print("\n".join("python " + shlex.join(run.command(args)) for run in runs), flush=True)
        except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not importlib.util.find_spec("ray"):
        fail(f"needs ray; expected what `{INSTALL}` installs")
    args.folder = args.folder.absolute()
    check_commands(runs, args)
    check_with_scripts(runs, args)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        write_grid(runs, args)
    except OSError as error:
        fail(f"--folder {args.folder}: expected a folder to write in ({error.strerror})")
    failed = run_all(runs, args)
    if failed:
        for run in failed:
            print(f"run.py: failed: {args.folder / run.folder / 'log.txt'}", file=sys.stderr)
        sys.exit(1)
    print(f"run.py: all {len(runs)} runs have finished", flush=True)


if __name__ == "__main__":
    # a shell starts background jobs with SIGINT ignored; Ray's workers would inherit that and be deaf to ray.cancel
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:  # before the runs
        sys.exit(130)
