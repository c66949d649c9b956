"""Tables and figures from finished runs, in the paper's layout, with its published numbers beside ours.

    python benchmark/report.py runs/grid/continuous-ppo                    # every finished run below a folder
    python benchmark/report.py runs/grid/atari-ppo wandb_export.csv        # or a table of runs exported from W&B
    python benchmark/report.py runs/a runs/b --out reports/mine --allow-mixed

A run's score is the mean over the episodes of its last evaluation (`--eval-episodes`, 10; result.json, W&B's summary), a cell
the mean over seeds ± its standard error. Writes into --out

    report.md       tables by noise (best in bold, wins; returns while training; how long a control stays equal), aggregates
    runs.csv        one line a run, as a table exported from W&B; may be given back to this script, with curves.csv beside it
    cells.csv       one line a cell: mean, standard error, seeds; the paper's
    aggregates.csv  interquartile mean and probability of improvement with 95 % stratified bootstrap intervals (rliable)
    curves.csv      learning curves, advantage sign changes and shares of the gradient of local runs: tag, step, a column a run
    profiles.csv    performance profiles: share of an arm's runs above a relative score, with 95 % intervals (rliable)
    samples.json    RLHF: ten prompts of each run with what followed before and after training, and the changes of the measures
    *.svg, *.png    learning curves (Figure 3), advantage sign changes (Figure 2), the policy's share of the gradient, profiles,
                    scores by beta, RLHF: KL

An arm is called by its runs' --exp-name, which run.py takes from the TOML file; runs of our scripts without one are called by
what their settings make of them (PPO, SPPO, control PPO). The baseline is the TOML file's `baseline`, else PPO or A2C. The
paper's numbers stand beside an arm only if it is of one of our scripts with the paper's settings; the length may differ.

Runs whose settings, lengths or versions differ where they should not are refused, unless --allow-mixed, which says so in the
report: within an arm all must be alike, and arms without a name may differ only in what makes an arm. Two runs of an arm with
one seed are told apart by the settings in which they differ. Commits and devices may differ, and are named. An exported table
must have the settings that tell arms apart. A curve that ends before its run, or has a hole, is left out; the report says so.
What an earlier report left in --out is replaced. An interquartile mean is given in
units of the baseline's, after each score was divided by the baseline's mean in the same environment;
where that mean is not above two standard errors, the environment is left out, which the report says. An arm with beta 0 is
called a control only where its alpha is a symmetric arm's alpha + beta |Z|; A2C's control is SA2C with --mean-weight. On Atari
the paper's PPO stands beside PPO with normalised advantages and beside PPO without.
"""

from __future__ import annotations  # pandas' types, which --help does without

import ast
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import tyro
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)
MISSING = None
try:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import rliable  # noqa: F401
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ModuleNotFoundError as error:
    MISSING = error.name

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(__file__).parent / "paper/scores.csv"
PAPER = Path(__file__).parent / "paper/hyperparameters.toml"
RETURNS = ("charts/episodic_return", "objective/scores")
CURVES = (*RETURNS, "charts/adv_sign_change")
GRADIENT = {
    "policy": "losses/grad_share_policy",
    "value": "losses/grad_share_value",
    "entropy": "losses/grad_share_entropy",
    "reference text": "losses/grad_share_reference",
    "steps that the clip cuts": "losses/grad_clipped",
}
KEPT = (*CURVES, "objective/kl", *GRADIENT.values())  # in curves.csv
# Arguments that runs of one row may differ in: what makes an arm, what names a run, and what is no other experiment
ARM = ("alpha", "beta", "Z", "num_bins", "reverse_prob", "norm_adv", "literal_signs", "mean_weight")
DIVIDED = ("vf_coef", "ent_coef", "max_grad_norm", "adam_eps")  # in which run.py's reweighted arms differ from PPO
TELLING = (*ARM, *DIVIDED, "noise", "exp_name")  # without which a table of runs cannot be told apart
LENGTHS = ("total_timesteps", "iterations")  # one of them is a script's; compared apart
FREE = (
    *("seed", "env_id", "noise", "exp_name", "run_dir", "resume", "track", "wandb_project_name", "wandb_entity"),
    *("wandb_group", "wandb_tags", "evaluate", "prompts"),
    *("capture_video", "save_model", "checkpoint_interval", "log_interval", "eval_interval", "eval_every", "num_threads"),
    *LENGTHS,
)
MACHINE = ("cuda", "torch_deterministic", "bf16", "compile", "eval_episodes", "max_episode_steps")  # not the paper's to set
RECORD = (  # columns that are no argument of a script
    *("score", "score_stderr", "returns", "global_step", "seconds", "steps_per_second", "script", "run_id", "commit", "device"),
    *("folder", "env", "arm", "given", "method", "named", "paper", "steps", "run_script"),
    *("furthest", "scored", "local", "env_id", "seed"),
)
FAMILIES = {  # our scripts: family and algorithm in paper/hyperparameters.toml
    "sppo_atari.py": ("atari", "ppo"),
    "sa2c_atari.py": ("atari", "a2c"),
    "dsppo_continuous.py": ("continuous", "ppo"),
    "dsa2c_continuous.py": ("continuous", "a2c"),
    "sppo_rlhf_imdb.py": ("rlhf", "imdb"),
    "sppo_rlhf_tldr.py": ("rlhf", "tldr"),
}
BASELINES = ("PPO", "A2C", "DPPO", "DA2C")
SYMMETRIC = ("SPPO", "SA2C", "DSPPO", "DSA2C")
# names of arms in run.py's own grids
GRID_ARMS = ("ppo", "ppo_raw", "sppo", "a2c", "a2c_half", "sa2c", "dppo", "dsppo", "da2c", "da2c_half", "dsa2c", "control")
# Okabe and Ito's colours, which colour-blind readers tell apart, by what an arm is
ARM_COLOURS = {
    **dict.fromkeys(("PPO", "A2C"), "#0072B2"),  # blue
    **dict.fromkeys(("DPPO", "DA2C"), "#56B4E9"),  # sky blue
    **dict.fromkeys(SYMMETRIC, "#D55E00"),  # vermilion
    **dict.fromkeys(("PPO raw", "DSPPO factored", "DSA2C factored"), "#CC79A7"),  # reddish purple
    **dict.fromkeys(("PPO reweighted", "A2C α 0.5", "DA2C α 0.5"), "#009E73"),  # bluish green
    **dict.fromkeys(("sb3", "sb3_ppo", "sb3_a2c"), "#999999"),  # grey: Stable-Baselines3
}
CONTROL = "#000000"
SPARE_COLOURS = ("#009E73", "#E69F00", "#CC79A7", "#999999", "#F0E442")  # of arms of your own, in order
# Arms of one colour differ by their lines. Green, purple and grey are one grey to some readers, so they begin elsewhere.
LINES = ("-", (0, (1, 0.7)), "-.", (0, (4, 1, 1, 1, 1, 1)))
FIRST_LINE = {"#009E73": 2, "#E69F00": 3, "#CC79A7": 1}
CONTROL_LINES = ("--", (0, (2, 1.5)), (0, (6, 1.5)), (0, (6, 1.5, 2, 1.5)))  # dashes of several lengths
HATCHES = ("", "///", "...", "xxx")  # the same for bars


@dataclass
class Args:
    sources: tyro.conf.Positional[tuple[Path, ...]]
    """folders, searched for finished runs, and csv files of runs"""
    out: Path = Path("report")
    """folder to write into"""
    allow_mixed: bool = False
    """report although settings, lengths or versions differ, and say so"""
    reps: int = 2000
    """bootstrap samples"""


def fail(message: str):
    print(f"report.py: error: {message}", file=sys.stderr)
    sys.exit(2)


# --- runs -------------------------------------------------------------------------------------------------------------


@functools.cache
def defaults(script: str) -> dict:
    """The arguments of one of our scripts with their defaults; {} for any other script."""
    if script not in FAMILIES:
        return {}
    classes = (
        node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    fields = (field for found in classes for field in found.body if isinstance(field, ast.AnnAssign))
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


@functools.cache
def arguments() -> frozenset[str]:
    """The names of all our scripts' arguments: columns of settings, among all that W&B exports."""
    return frozenset(name for script in FAMILIES for name in defaults(script))


def settings(runs: pd.DataFrame) -> set[str]:
    """The columns that are arguments of a script: those of ours, and all that are neither measured nor W&B's own."""
    known = runs.dropna(axis=1, how="all")
    theirs = {name for name in known if re.fullmatch(r"[a-z]\w*", name) and name not in RECORD}
    return (arguments() & set(runs)) | theirs


def flatten(result: dict) -> dict:
    """A result.json as a line of W&B's table of runs: arguments by their own names, versions as versions.NAME.

    An argument that our script did not have when it made the run has its default, which is what the script did then.
    """
    row = {key: value for key, value in result.items() if isinstance(value, str | int | float)}
    for key, value in (defaults(result["script"]) | result["args"]).items():
        if key != "env_id":
            row[key] = value if value is None or isinstance(value, str | int | float) else json.dumps(value)
    row["returns"] = " ".join(f"{value:.6g}" for value in result.get("returns") or [])
    for when in ("before", "after"):  # what RLHF scripts measure beside the score
        row |= {f"{when}.{name}": value for name, value in (result.get(when) or {}).items()}
    return row | {f"versions.{name}": value for name, value in (result.get("versions") or {}).items()}


@functools.cache
def grid_of(folder: Path) -> dict:
    """What run.py wrote of the grid above this run's folder: grid.script and grid.baseline; {} if there is none."""
    for parent in list(folder.resolve().parents)[:4]:
        with contextlib.suppress(OSError, ValueError):
            grid = json.loads((parent / "grid.json").read_text())
            return {f"grid.{key}": grid[key] for key in ("script", "baseline") if grid.get(key)}
    return {}


def unreadable(row: dict) -> list[str]:
    """Names of what every report needs and the result of a run does not have, or has as something else."""
    numbers = {name for name, value in defaults(row["script"]).items() if isinstance(value, int | float)}
    numbers |= {"seed"} | {name for name in ("seconds", "score", "global_step", "alpha", "beta") if row.get(name) is not None}
    texts = {"script", "run_id", "env_id"} | ({"noise"} & set(row))
    wrong = [name for name in sorted(texts) if not isinstance(row.get(name), str)]
    return wrong + [name for name in sorted(numbers) if not isinstance(row.get(name), int | float)]


def read_folder(source: Path, left_out: Counter) -> pd.DataFrame:
    """The finished runs below a folder, one line a run; counts the others in `left_out`."""
    rows = []
    for folder in sorted({path.parent for name in ("args.json", "result.json") for path in source.rglob(name)}):
        finished = (folder / "result.json").exists()
        path = folder / ("result.json" if finished else "args.json")
        try:
            saved = json.loads(path.read_text())
            row = flatten(saved)
            arm = name_of(row) or label(row)
            wrong = [f"{name} = {row.get(name)!r}" for name in unreadable(row)] + ["no args.seed"] * (
                "seed" not in saved["args"]
            )
            if finished and wrong:
                raise ValueError(", ".join(wrong))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            fail(f"{path}: expected a {path.name} of one of the scripts ({error!r:.80})")
        if finished:
            rows.append({**row, "Name": folder.name, "folder": str(folder), **grid_of(folder)})
        else:
            left_out["not finished", arm] += 1
    return pd.DataFrame(rows)


def read_csv(source: Path) -> pd.DataFrame:
    """A table of runs, as this script writes it or W&B exports it; `attrs["lacks"]`: the settings that it does not have."""
    try:
        texts = dict.fromkeys(("run_id", "ID", "exp_name", "grid.script", "grid.baseline"), str)  # an arm may be called 10
        table = pd.read_csv(source, float_precision="round_trip", dtype=texts)
    except (OSError, ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        fail(f"{source}: expected a csv with a line a run ({str(error).splitlines()[0]})")
    own = table["ID"] if "ID" in table else pd.Series([f"{source}:{i}" for i in table.index], dtype=str)
    table["run_id"] = table["run_id"].fillna(own) if "run_id" in table else own
    missing = {"script", "env_id", "seed"} - set(table)
    scripts = {} if "script" in missing else dict(list(table.groupby("script")))
    missing |= {"alpha", "beta", "score"} - set(table) if missing else set()
    for script in FAMILIES.keys() & scripts:
        missing |= ({*TELLING, *LENGTHS} & set(defaults(script))) - set(table)
    missing |= {"exp_name"} - set(table) if scripts.keys() - FAMILIES.keys() else set()
    if missing:
        fail(
            f"{source}: no column {', '.join(sorted(missing))}; expected what the scripts log to W&B, with all settings that "
            "tell arms apart"
        )
    lacks = set()
    for script, rows in scripts.items():
        known = defaults(script)
        lacks |= set(known) - {*table, *FREE}
        for name in ("env_id", "seed", *known) if script in FAMILIES else ("env_id", "seed", "exp_name"):
            if name not in table:
                continue
            values, default = rows[name], known.get(name, 1 if name == "seed" else "")
            empty = values.isna() & (name in ("env_id", "seed", "exp_name") or (name in (*TELLING, *LENGTHS) and name in known))
            if isinstance(default, bool):
                read = values.map(lambda value: {"true": True, "false": False}.get(str(value).lower()))
            elif isinstance(default, int | float):
                read = pd.to_numeric(values, errors="coerce")
            else:
                read = values
            for i in rows.index[empty | (values.notna() & read.isna())]:
                value = "" if pd.isna(values[i]) else values[i]
                fail(f"{source}: line {i + 2}: {name} is {value!r}; expected the setting of this run of {script}")
            if isinstance(default, bool | int | float):
                table[name] = table[name].astype(object)
                table.loc[rows.index, name] = read.astype(object)
    table = table.infer_objects()
    table.attrs["lacks"] = sorted(lacks)
    return table


def name_of(run: dict) -> str | None:
    """The arm's name, which run.py gives as --exp-name; None where it is the default, a script's own name."""
    name, stems = run.get("exp_name"), {Path(script).stem for script in (*FAMILIES, run["script"])}
    return name if isinstance(name, str) and name not in stems else None


def load_runs(sources: tuple[Path, ...]) -> pd.DataFrame:
    """One line a run; those of local folders have their folder in the column `folder`. The order of the sources is nothing.

    Of a run that is there twice the line with a folder counts, else the one that has got further. Columns made here: `script`
    is the grid's, under which runs are compared (`run_script`: the one that ran), `method` what the settings make of a run,
    `arm` what it is called, `paper` the paper's name for it. attrs: lines of text on what is left out or unknown.
    """
    tables, left_out, lacks = [], Counter(), []
    for source in sorted(sources, key=lambda source: (not source.is_dir(), str(source))):
        if source.is_dir():
            tables.append(read_folder(source, left_out))
        elif source.is_file():
            tables.append(read_csv(source))
            lacks += [f"{source.name} lacks {', '.join(tables[-1].attrs['lacks'])}"] if tables[-1].attrs["lacks"] else []
        else:
            fail(f"{source}: expected a folder with finished runs, or a csv with a line a run")
    for table in tables:
        table.attrs = {}
    runs = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    where = " ".join(map(str, sources))
    if runs.empty:
        fail(f"{where}: no finished run there; expected some result.json below (or name a runs.csv itself)")
    for name in ("seed", "alpha", "beta", "Z", "score", "global_step"):
        runs[name] = pd.to_numeric(runs[name], errors="coerce") if name in runs else np.nan
    known = runs[["script", "env_id", "seed"]].notna().all(axis=1) & runs.script.map(lambda script: str(script).endswith(".py"))
    others = int((~known).sum())
    runs = runs[known]
    runs = runs.assign(furthest=runs.global_step.fillna(-1), scored=np.isfinite(runs.score))
    runs = runs.assign(local=runs.folder.notna() if "folder" in runs else False)
    runs = runs.sort_values(["local", "scored", "furthest"], ascending=False, kind="stable")
    twice = int(runs.duplicated("run_id").sum())
    runs = runs.drop_duplicates("run_id").sort_index(ignore_index=True)
    runs = runs.assign(noise=runs.noise.fillna("none") if "noise" in runs else "none", Z=runs.Z.fillna(-1.0))
    rows = runs.to_dict("records")
    runs = runs.assign(method=[label(run) for run in rows], paper=[paper_name(run) for run in rows])
    new = sorted(settings(runs) - arguments())  # an argument that somebody gave one of our scripts: not the paper's run
    runs.loc[runs[new].notna().any(axis=1), "paper"] = None
    runs = runs.assign(named=[name_of(run) is not None for run in rows], run_script=runs.script)
    # beside runs without a name, an arm of run.py's own grids is called by its method, as they are
    of_ours = runs.script.isin(FAMILIES) & runs.get("grid.script", pd.Series(np.nan, runs.index)).isna()
    if not runs.named[of_ours].all():
        runs.loc[of_ours & runs.exp_name.isin(GRID_ARMS), "named"] = False
    runs = runs.assign(arm=[name_of(run) or label(run) for run in rows], given=[name_of(run) for run in rows])
    left_out.update(("without a score", arm) for arm in runs[~runs.scored].arm)
    runs = runs[runs.scored].drop(columns=["scored", "furthest", "local"]).reset_index(drop=True)
    if runs.empty:
        fail(f"{where}: no run there has a score; expected some finished ones")
    runs["env"] = [env_id.removeprefix("ALE/") for env_id in runs.env_id]
    for i in [i for i in runs.index if runs.method[i].startswith("control ") and not is_control(runs, runs.loc[i])]:
        runs.loc[i, "method"] = f"{runs.method[i].removeprefix('control ')} α {runs.alpha[i]:g}"
    of_several = runs.groupby(["script", "env", "noise", "arm"]).method.transform("nunique") > 1  # one name, several methods
    of_several = of_several.groupby([runs.script, runs.noise, runs.arm]).transform("any")
    runs.loc[of_several, "arm"] += " " + runs[of_several].method
    runs.loc[~runs.named, "arm"] = runs[~runs.named].method
    if "grid.script" in runs:
        runs["script"] = runs["grid.script"].fillna(runs.script)
    # one beta (of controls: one alpha) an arm and row is the arm itself; if any row has several, they are told apart in all
    for name, sign in (("beta", "β"), ("alpha", "α")):
        several = runs.groupby(["script", "env", "noise", "arm"])[name].transform("nunique") > 1
        several = several.groupby([runs.script, runs.arm]).transform("any")
        runs.loc[several, "arm"] += runs[several][name].map((f" {sign} " + "{:g}").format)
    telling = {}  # so too the settings by which runs with one seed are told apart
    for (script, _, noise, arm), group in runs.groupby(["script", "env", "noise", "arm"]):
        if group.seed.duplicated().any():
            telling.setdefault((script, noise, arm), set()).update(differences(group, settings(runs) - {*ARM, *FREE}))
    for (script, noise, arm), names in telling.items():
        group = runs[(runs.script == script) & (runs.noise == noise) & (runs.arm == arm)]
        for name in sorted(names):
            runs.loc[group.index, "arm"] += group[name].map(shown).map(f" {name} {{}}".format)
    runs["steps"] = pd.to_numeric(runs.get("total_timesteps", pd.Series(np.nan, runs.index)))
    if "iterations" in runs:
        runs["steps"] = runs.steps.fillna(runs.iterations)
    for name in [name for name in runs if name.startswith(("eval/", "test/"))]:  # W&B's summary has the last values
        of = runs.script.eq("sppo_rlhf_imdb.py" if name.startswith("eval/") else "sppo_rlhf_tldr.py")
        after = f"after.{name.split('/', 1)[1]}"
        runs[after] = runs.get(after, pd.Series(np.nan, runs.index)).fillna(runs[name].where(of))
    lines = [f"{why}: {arm} ({count})" for (why, arm), count in sorted(left_out.items())]
    about = {"left out": lines, "others": others, "twice": twice, "lacks": sorted(set(lacks))}
    runs.attrs = {**about, "telling": set().union(*telling.values())}
    return runs


def label(run: dict) -> str:
    """What a run's settings make of it; of a script that is not ours, whose loss nobody knows here, what its arm is called."""
    if run["script"] not in FAMILIES:
        weights = [f"{sign} {run[key]:g}" for key, sign in (("alpha", "α"), ("beta", "β")) if not pd.isna(run.get(key))]
        name = name_of(run) or " ".join([Path(run["script"]).stem, *weights])
        return name.upper() if name.upper() in (*BASELINES, *SYMMETRIC) else name
    algorithm = "A2C" if "a2c" in run["script"] else "PPO"
    continuous = "continuous" in run["script"]
    discrete = "D" if continuous and run["num_bins"] else ""
    if run.get("mean_weight") is True:
        name = f"control {discrete}{algorithm}"
    elif run["beta"]:
        name = f"{discrete}S{algorithm}"
        name += " factored" if run.get("reverse_prob") == "factored" else ""
        name += " literal" if run.get("literal_signs") is True else ""
    else:
        name = discrete + algorithm if run["alpha"] == 1 else f"control {discrete}{algorithm}"
    default = algorithm == "PPO"
    raw = bool(run.get("norm_adv", default)) != default
    name += " raw" if raw and default else " normalised" if raw else ""
    name += f" Z {run['Z']:g}" if run.get("Z", -1) != -1 and run["beta"] else ""
    name += f" {run['num_bins']:g} bins" if discrete and run["num_bins"] != 11 else ""
    exp_name = str(run.get("exp_name"))
    return name + (f" {exp_name}" if exp_name.startswith("reweighted") else "")


@functools.cache
def hyperparameters() -> dict:
    return tomllib.loads(PAPER.read_text())


def paper_name(run: dict) -> str | None:
    """The paper's name for a run of one of our scripts with the paper's settings, of any length; None for any other run."""
    family, algorithm = FAMILIES.get(run["script"], (None, None))
    if family not in ("atari", "continuous"):
        return None
    paper, expected = hyperparameters()[family], defaults(run["script"])
    env, noise = re.sub(r"^ALE/(.*)-v5$", r"\1", run["env_id"]), run["noise"]
    if env not in paper.get("games", paper.get("tasks")) or noise not in ("none", paper["noise"]["kind"]):
        return None
    if (algorithm, env) == ("a2c", "Swimmer-v4"):
        expected = expected | {"gamma": 0.9999}
    betas = paper[algorithm]["beta"][noise]
    beta = betas if isinstance(betas, float) else betas.get(env, betas.get("default"))
    weights, own = (run["alpha"], run["beta"]), {"alpha", "beta", "num_bins", "norm_adv"}
    changed = {
        name
        for name in expected.keys() - {*FREE, *MACHINE} - own
        if (noise != "none" or not name.startswith("noise_")) and shown(run.get(name)) != shown(expected[name])
    }
    raw = bool(run["norm_adv"]) != expected["norm_adv"]
    discrete = "" if family == "atari" else {11: "D", 0: ""}.get(run["num_bins"])
    if changed or discrete is None or (raw and (run["script"], weights) != ("sppo_atari.py", (1, 0))):
        return None
    if weights == (1, 0):  # on Atari normalised or not: which of them the paper's table has is not known
        return discrete + algorithm.upper()
    symmetric = weights == (paper["alpha"], beta) and (discrete or family == "atari")
    return f"{discrete}S{algorithm.upper()}" if symmetric else None


def is_control(runs: pd.DataFrame, run: pd.Series) -> bool:
    """Whether the run's alpha is alpha + beta |Z| of symmetric runs in its environment, or if none is there, in another.

    A2C's is the one with --mean-weight, whose beta is above 0: no alpha alone has SA2C's gradient (fact 3).
    """
    if "a2c" in run.script:
        return bool(run.beta > 0)
    alike = runs[(runs.script == run.script) & (runs.noise == run.noise) & (runs.beta > 0)]
    here = alike[alike.env == run.env]
    alike = here if len(here) else alike
    return bool(np.isclose(alike.alpha + alike.beta * abs(alike.Z), run.alpha).any())


def find_mixture(runs: pd.DataFrame) -> list[str]:
    """What differs among runs that a table would compare: versions anywhere, lengths within a row, settings within an arm.

    Arms without a name must be alike in all but what makes an arm; those of a grid differ in what its author wrote.
    """
    found = []
    for (script, env, noise), row in runs.groupby(["script", "env", "noise"]):
        steps = sorted(row.steps.dropna().unique())
        if len(steps) > 1:
            found.append(f"{env}, noise {noise}: lengths {', '.join(f'{step:,.0f}' for step in steps)}")
        for (arm, seed), count in row.groupby(["arm", "seed"]).size().items():
            if count > 1:
                found.append(f"{env}, noise {noise}, {script}: {count} runs of {arm} with seed {seed}")
        names = settings(runs) - {*ARM, *FREE} - ({"noise_prob", "noise_std"} if noise == "none" else set())
        unnamed = differences(row[~row.named], names - runs.attrs["telling"])
        found += [f"{env}, noise {noise}, {script}: {name} {', '.join(values)}" for name, values in unnamed.items()]
        for arm, same in row.groupby("arm"):
            own = same.run_script.isin(FAMILIES).all()
            for name, values in differences(same, names - set(unnamed) | (set() if own else {*ARM} & set(runs))).items():
                found.append(f"{env}, noise {noise}, {script}, {arm}: {name} {', '.join(values)}")
    for script, same in runs.groupby("run_script"):
        versions = {name for name in runs.columns if name.startswith("versions.")}
        for name, values in differences(same, versions).items():
            found.append(f"{script}: {name} {', '.join(values)}")
    return found


def differences(runs: pd.DataFrame, names: set[str]) -> dict[str, list[str]]:
    """Those of the columns `names` with more than one value, and these; no value is one, too."""
    found = {}
    for name in sorted(names & set(runs.columns)):
        values = runs[name].map(shown).unique()
        if len(values) > 1:
            found[name] = sorted(values)
    return found


def shown(value) -> str:
    """A setting as text: None of a result.json and the empty field that it is in a csv alike, 1 and 1.0, too."""
    if pd.isna(value):
        return "none"
    return f"{value:.9g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def describe_arms(runs: pd.DataFrame) -> str:
    """Of one script's runs: what each arm is, with its weights, and with the settings in which the arms differ."""
    roles = roles_of(runs)
    telling = set().union(*(differences(row, settings(runs) - {*ARM, *FREE}) for _, row in runs.groupby("env")))
    texts = []
    for arm in order(list(roles), roles):
        mine = runs[runs.arm == arm]
        parts = [mine.method.iloc[0]] if mine.method.iloc[0] != arm and not arm.startswith(mine.method.iloc[0]) else []
        parts += [script for script in mine.run_script.unique() if script != mine.script.iloc[0]]
        for name, sign in (("alpha", "α"), ("beta", "β"), *((name, name) for name in sorted(telling))):
            values = sorted(mine[name].dropna().unique()) if name in mine else []
            parts += [f"{sign} {', '.join(map(shown, values))}"] if values else []
        texts.append(f"{arm} ({', '.join(parts)})" if parts else arm)
    return f"Arms: {'; '.join(texts)}."


# --- statistics -------------------------------------------------------------------------------------------------------


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error and number of seeds of each script, environment, noise and arm, and the paper's numbers."""
    grouped = runs.groupby(["script", "env", "noise", "arm"])
    scores = grouped.score
    # the paper's name, if all runs of the cell have it
    paper = grouped.paper.agg(lambda names: names.iloc[0] if names.notna().all() and names.nunique() == 1 else None)
    table = pd.DataFrame({"mean": scores.mean(), "stderr": scores.sem(), "seeds": scores.count(), "algo": paper}).reset_index()
    table["task"] = [re.sub(r"-v\d+$", "", env) for env in table.env]
    published = pd.read_csv(PUBLISHED).rename(columns={"env": "task", "mean": "paper_mean", "stderr": "paper_stderr"})
    published = published[["task", "noise", "algo", "paper_mean", "paper_stderr"]]
    return table.merge(published, how="left", on=["task", "noise", "algo"]).drop(columns="algo")


def roles_of(runs: pd.DataFrame) -> dict[str, str]:
    """Arm -> what its settings make of it, with "baseline" before it if the grid names it as that."""
    roles = dict(zip(runs.arm, runs.method, strict=True))
    if "grid.baseline" in runs:  # by the name in the grid, to which the arm's own may have added a setting
        for arm in runs[runs["grid.baseline"].notna() & (runs["grid.baseline"] == runs.given)].arm.unique():
            roles[arm] = f"baseline {roles[arm]}"
    return roles


def order(arms: list[str], roles: dict[str, str] | None = None) -> list[str]:
    """Baselines first, then what is compared with them, then controls; β 2 before β 10."""
    first = {arm: i for i, arm in enumerate(BASELINES)}

    def key(arm: str) -> tuple:
        role = (roles or {}).get(arm, arm)
        parts = re.split(r"(\d+\.?\d*)", arm)  # texts and numbers by turns
        place = -1 if role.startswith("baseline ") else first.get(role, 9)
        return role.startswith("control"), place, [float(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(arms, key=key)


def wins(table: pd.DataFrame, column: str = "mean") -> dict[tuple[str, str], tuple[int, int]]:
    """(arm, other): in how many rows the arm's mean is the higher one, and of how many rows that have both."""
    wide = table.pivot_table(index=["env", "noise"], columns="arm", values=column)
    found = {}
    for arm in wide.columns:
        for other in wide.columns:
            both = wide[[arm, other]].dropna() if arm != other else wide.iloc[:0]
            one = column == "paper_mean" and (both[arm] == both[other]).all()  # the paper has one PPO on Atari
            if len(both) and not one:
                found[arm, other] = (int((both[arm] > both[other]).sum()), len(both))
    return found


def matrix(runs: pd.DataFrame, arm: str, envs: list[str]) -> np.ndarray:
    """An arm's scores as [seeds, environments]: as many seeds as the poorest of these environments has."""
    columns = [runs[(runs.arm == arm) & (runs.env == env)].sort_values("seed").score.to_numpy() for env in envs]
    seeds = min(len(column) for column in columns)
    return np.stack([column[:seeds] for column in columns], axis=1)


def clear(runs: pd.DataFrame, baseline: str) -> dict[str, float]:
    """The baseline's mean in each environment where it is above two standard errors: what scores can be divided by."""
    scores = runs[runs.arm == baseline].groupby("env").score
    return {env: mean for env, mean in scores.mean().items() if mean > 2 * scores.sem().fillna(0)[env]}


def relative_iqm(scores: np.ndarray, base: np.ndarray) -> float:
    """Interquartile mean of scores [seeds, environments] over the baseline's, each divided by the baseline's means."""
    from rliable import metrics

    scale = base.mean(axis=0)
    return metrics.aggregate_iqm(scores / scale) / metrics.aggregate_iqm(base / scale)


def aggregate(runs: pd.DataFrame, baseline: str, reps: int) -> pd.DataFrame:
    """Interquartile mean of each arm relative to the baseline's, over the environments of `clear` that both have, and of each
    pair of arms P(arm > other) over all that both have, with 95 % stratified bootstrap intervals over the seeds of both, by
    rliable. Of many arms, P only beside baselines and controls."""
    from rliable import library, metrics

    np.random.seed(0)  # rliable draws from numpy's own generator
    roles = roles_of(runs)

    def estimate(statistic, a: str, b: str, common: list[str]) -> tuple[float, float, float]:
        pair = {"pair": (matrix(runs, a, common), matrix(runs, b, common))}
        point, interval = library.get_interval_estimates(pair, lambda x, y: np.array([statistic(x, y)]), reps=reps)
        return point["pair"][0], *interval["pair"][:, 0]

    arms = order(list(roles), roles)
    envs = runs.groupby("arm").env.agg(set)
    rows, usable = [], set(clear(runs, baseline))
    for arm in arms:
        common = sorted(envs[arm] & usable)
        if arm != baseline and common:
            rows.append(("IQM", arm, baseline, *estimate(relative_iqm, arm, baseline, common), len(common)))
    for a, b in itertools.combinations(arms, 2):
        common = sorted(envs[a] & envs[b])
        if common and (len(arms) <= 6 or is_reference(roles[a]) or is_reference(roles[b])):
            value, low, high = estimate(metrics.probability_of_improvement, a, b, common)
            rows.append(("P(arm > other)", a, b, value, low, high, len(common)))
            rows.append(("P(arm > other)", b, a, 1 - value, 1 - high, 1 - low, len(common)))
    return pd.DataFrame(rows, columns=["what", "arm", "other", "value", "low", "high", "environments"])


def is_reference(role: str) -> bool:
    """What others are compared with: baselines and controls, raw or normalised ones too; not a baseline with an odd alpha."""
    return role.startswith(("baseline ", "control")) or (role.split()[0] in BASELINES and " α " not in role)


def shortfall(points: pd.DataFrame, end: float) -> str | None:
    """What a run's curve lacks, as text; None if it is whole. points: tag, step of one run, which ended at the step `end`.

    Every iteration that is logged logs the share of changed signs: these steps are evenly spaced and the last is the run's.
    Returns are logged when episodes end. They may miss twice their longest gap at the end and, of a script that logs nothing
    else, a quarter of the run in between.
    """
    even, returns = (np.unique(points[points.tag.isin(tags)].step) for tags in (CURVES[2:], RETURNS))
    for steps, is_even in ((even, True), (returns, False)):
        if not len(steps):
            continue
        gaps = np.diff([0, *steps])
        if end - steps[-1] > (0 if is_even else 2 * gaps.max()):  # False if the end is not known
            return f"ends at {steps[-1]:,.0f} of {end:,.0f} steps"
        hole = gaps.argmax()
        interval = np.quantile(gaps, 0.5, method="higher")  # of two gaps, the second may be the run's short end
        of_returns = math.inf if len(even) else max(0.25 * steps[-1], 5 * np.median(gaps))
        if gaps[hole] > (1.5 * interval if is_even else of_returns):
            return f"has a hole before step {steps[hole]:,.0f}"
    return None if len(even) or len(returns) else "has no returns"


def load_curves(runs: pd.DataFrame, sources: tuple[Path, ...]) -> tuple[pd.DataFrame, list[str]]:
    """Points of KEPT of the local runs, and of those from a csv that has this script's curves.csv beside it.

    A damaged event file ends the curve there without a word, so that curves which lack something are left out; the second
    value says which.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    columns = ["run_id", "tag", "step", "value"]
    tables = []
    for run in runs.to_dict("records"):
        if not isinstance(run.get("folder"), str):
            continue
        events = EventAccumulator(run["folder"], size_guidance={"scalars": 0}).Reload()
        tags = sorted(set(KEPT) & set(events.Tags()["scalars"]))
        rows = [(run["run_id"], tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]
        tables.append(pd.DataFrame(rows, columns=columns))
    for path in sorted(source.with_name("curves.csv") for source in sources if source.is_file()):
        if path.exists():
            found = read_curves(path)
            tables += [own for _, own in found[found.run_id.isin(set(runs.run_id))].groupby("run_id")]
    ends = dict(zip(runs.run_id, runs.global_step.fillna(runs.get("total_timesteps", np.nan)), strict=True))
    names = dict(
        zip(runs.run_id, runs.arm + ", " + runs.env + ", noise " + runs.noise + ", seed " + runs.seed.map(shown), strict=True)
    )
    whole, lacks = {}, {}
    for table in filter(len, tables):
        run_id = table.run_id.iloc[0]
        lack = shortfall(table, ends[run_id])
        if lack:
            lacks.setdefault(run_id, f"{names[run_id]}, {lack}")
        elif run_id not in whole:
            whole[run_id] = table
    curves = pd.concat(whole.values(), ignore_index=True) if whole else pd.DataFrame(columns=columns)
    return curves.astype({"step": int, "value": float}), [text for run_id, text in lacks.items() if run_id not in whole]


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame, roles: dict[str, str]) -> list[str]:
    """The rows of one script and noise: ours by arm, the paper's in brackets; the best of ours in bold; wins below."""
    arms = order(list(table.arm.unique()), roles)
    lines = ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for env, row in table.groupby("env"):
        best, texts = row["mean"].max(), []
        for arm in arms:
            cell = row[row.arm == arm]
            if cell.empty:
                texts.append("")
                continue
            (cell,) = cell.to_dict("records")
            text = with_error(cell["mean"], cell["stderr"])
            text = f"**{text}**" if cell["mean"] == best and len(row) > 1 else text
            text += f" ({cell['seeds']})"
            if not np.isnan(cell["paper_mean"]):
                text += f" [{number(cell['paper_mean'])} ± {number(cell['paper_stderr'])}]"
            texts.append(text)
        lines.append(f"| {env} | {' | '.join(texts)} |")
    ours, papers = wins(table), wins(table, "paper_mean")
    for other in [arm for arm in arms if is_reference(roles[arm])]:
        texts = []
        for arm in arms:
            text = "{} of {}".format(*ours[arm, other]) if (arm, other) in ours else ""
            text += " [{} of {}]".format(*papers[arm, other]) if (arm, other) in papers else ""
            texts.append(text)
        lines.append(f"| above {other} | {' | '.join(texts)} |")
    return lines


def equal_curves(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs with PPO: the last step up to which a symmetric run logs, to six digits, what its control does,
    which has its gradient (docs/loss.md, fact 2), and what the baseline does, which has not; each alike in all else."""
    points = {run_id: {} for run_id in runs.run_id}
    for point in curves[curves.run_id.isin(set(runs.run_id)) & curves.tag.isin(CURVES)].itertuples():
        points[point.run_id][point.step, point.tag] = f"{point.value:.6g}"
    runs = runs[[len(points[run_id]) > 0 for run_id in runs.run_id]]
    free = {"alpha", "beta", "Z", "literal_signs", "reverse_prob", *FREE} - {"total_timesteps", "iterations"}
    names = ["env", "seed", *sorted((arguments() - free) & set(runs))]
    alike = runs[names].map(shown).agg(" ".join, axis=1)

    def last_equal(run: pd.Series, alpha: float) -> str:
        others = runs[(alike == alike[run.name]) & (runs.beta == 0) & np.isclose(runs.alpha, alpha)]
        if others.empty:
            return f"{run.seed:g}: ?"
        one, two = points[run.run_id], points[others.run_id.iloc[0]]
        parted = min((point[0] for point in one.keys() | two.keys() if one.get(point) != two.get(point)), default=None)
        last = max((step for step, _ in one if parted is None or step < parted), default=0)
        return f"{run.seed:g}: {last:,}{' (end)' if parted is None else ''}"

    rows = []
    # other gradients, and raw advantages, which change no signs: without returns nothing would tell two runs apart
    symmetric = runs[(runs.beta > 0) & ~runs.method.str.contains("literal|factored|raw|control")].sort_values("seed")
    for env, arm in itertools.product(sorted(symmetric.env.unique()), order(list(symmetric.arm.unique()), roles_of(symmetric))):
        same = [run for _, run in symmetric[(symmetric.env == env) & (symmetric.arm == arm)].iterrows()]
        control = [last_equal(run, run.alpha + run.beta * abs(run.Z)) for run in same]
        if not all(text.endswith("?") for text in control):
            rows.append(f"| {arm} on {env} | {'; '.join(control)} | {'; '.join(last_equal(run, 1) for run in same)} |")
    head = (
        "Last step (RLHF: episode) up to which two runs log one return and one share of changed signs, to six digits, by seed "
        "(?: no such run). Rounding ends it where the gradient is one, sooner where a run was resumed in new environments."
    )
    return [head, "", "| | with the control, of one gradient | with the baseline |", "|---|---|---|", *rows, ""] if rows else []


def measures(runs: pd.DataFrame) -> list[str]:
    """Of one script's runs that tell more than a score (RLHF): each measure before training, all runs, and after it by arm."""
    names = [name.removeprefix("after.") for name in runs if name.startswith("after.") and not name.endswith("_stderr")]
    names = [name for name in names if runs[f"after.{name}"].notna().any()]
    if not names:
        return []
    roles = roles_of(runs)
    arms = order(list(roles), roles)
    lines = ["Measured after training, by arm:", "", f"| | before | {' | '.join(arms)} |", "|---" * (len(arms) + 2) + "|"]
    for name in names:
        before = runs.get(f"before.{name}", pd.Series(dtype=float)).groupby(runs.seed).mean()  # the arms of a seed start as one
        columns = [before, *(runs[runs.arm == arm][f"after.{name}"] for arm in arms)]
        texts = [with_error(x.mean(), x.sem()) if x.count() else "" for x in columns]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return [*lines, ""]


def training(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs: what they reached while they learned, a steadier number than one evaluation at the end."""
    merged = curves[curves.tag.isin(RETURNS)].merge(runs[["run_id", "env", "arm"]], on="run_id")
    if merged.empty:
        return []
    late = merged[merged.step > 0.9 * merged.groupby("run_id").step.transform("max")]
    values = late.groupby(["env", "arm", "run_id"]).value.mean()
    arms = order(list(merged.arm.unique()), roles_of(runs))
    lines = ["While training, mean over the last tenth of it:", "", f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for env in sorted(merged.env.unique()):
        columns = [values[env].get(arm, pd.Series(dtype=float)) for arm in arms]
        texts = [f"{with_error(x.mean(), x.sem())} ({len(x)})" if len(x) else "" for x in columns]
        lines.append(f"| {env} | {' | '.join(texts)} |")
    return [*lines, ""]


def gradient(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs: each part's share of the gradient's squared norm, and of the steps that the clip cuts."""
    merged = curves[curves.tag.isin(GRADIENT.values())].merge(runs[["run_id", "env", "arm"]], on="run_id")
    if not merged.tag.isin([GRADIENT["policy"]]).any():
        return []
    values = merged.groupby(["env", "arm", "run_id", "tag"]).value.mean().unstack()
    shown, roles = {name: tag for name, tag in GRADIENT.items() if tag in values}, roles_of(runs)
    lines = [
        "Shares of the gradient's squared norm before the clip, mean over training, and of how many runs:",
        "",
        f"| | | {' | '.join(shown)} |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for env in sorted(merged.env.unique()):
        for arm in order(list(values.loc[env].index.unique("arm")), roles):
            columns = [values.loc[env, arm][tag].dropna() for tag in shown.values()]
            means = [with_error(x.mean(), x.sem()) if len(x) > 1 else f"{x.mean():.2g}" for x in columns]
            texts = [f"{mean} ({len(x)})" if len(x) else "" for mean, x in zip(means, columns, strict=True)]
            lines.append(f"| {env} | {arm} | {' | '.join(texts)} |")
    return [*lines, ""]


def aggregates(runs: pd.DataFrame, several: pd.DataFrame, baseline: str, found: pd.DataFrame) -> list[str]:
    """What `found` says, as a table; `several` are those of the runs whose cell has two seeds or more."""
    roles = roles_of(several)
    arms = order(list(roles), roles)
    others = [arm for arm in arms if len(arms) <= 6 or is_reference(roles[arm])]
    counts = several.groupby(["arm", "env"]).size()
    few = f", from {counts.min()} seeds and thus too narrow, as the bootstrap sees no others" if counts.min() < 10 else ""
    lines = [
        f"Interquartile mean in units of {baseline}'s (each score divided by {baseline}'s mean in its environment), and chance "
        f"that a run is better than one of another arm, each over the environments that both arms have; 95 % intervals{few}."
    ]
    unclear = sorted(set(several[several.arm == baseline].env) - set(clear(several, baseline)))
    if unclear:
        lines[0] += f" No interquartile mean over {', '.join(unclear)}, where {baseline}'s is not clearly above 0."
    if counts.groupby(level="arm").sum().min() < 4:
        lines[0] += " Of fewer than four scores it is their mean."
    if counts.min() < counts.max():
        lines[0] += (
            " Where environments have different numbers of seeds, the first ones of each arm, as many as in its poorest."
        )
    single = runs[~runs.index.isin(several.index)]
    if len(single):
        names = [f"{run.arm} on {run.env}" for run in single.itertuples()]
        lines[0] += f" With one seed and left out: {', '.join(names)}."
    header = f"| | interquartile mean / {baseline}'s | seeds | " + " | ".join(f"P(better than {arm})" for arm in others) + " |"
    lines += ["", header, "|---" * (len(others) + 3) + "|"]
    values = {
        (row.what, row.arm, row.other): f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})" for row in found.itertuples()
    }
    if clear(several, baseline):
        values["IQM", baseline, baseline] = "1"
    for arm in arms:
        least, most = counts[arm].min(), counts[arm].max()
        iqm = values.get(("IQM", arm, baseline), "")
        chances = [values.get(("P(arm > other)", arm, other), "") for other in others]
        lines.append(f"| {arm} | {iqm} | {least if least == most else f'{least} to {most}'} | {' | '.join(chances)} |")
    return [*lines, ""]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def with_error(mean: float, error: float) -> str:
    """The mean to the place of the error's second digit; alone, if there is no error to tell."""
    if not error > 0:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}"


# --- figures ----------------------------------------------------------------------------------------------------------


def styles(runs: pd.DataFrame) -> dict[str, dict]:
    """Arm -> color, linestyle, hatch, for all pictures of a report. runs: its arms, with `method` and `script`.

    The colour is that of an arm's kind in ARM_COLOURS, of an unknown kind a spare one. Controls are black and dashed. Arms of
    one colour, such as one loss with two betas, differ by their lines within a script, whose axes are apart from others'.
    """
    roles, scripts = roles_of(runs), dict(zip(runs.arm, runs.script, strict=True))
    kinds = {arm: roles[arm].removeprefix("baseline ") for arm in order(list(roles), roles)}
    taken = {ARM_COLOURS.get(kind) for kind in kinds.values()}
    spare = itertools.cycle([colour for colour in SPARE_COLOURS if colour not in taken] or SPARE_COLOURS)
    found, lines, hatches = {}, Counter(), Counter()
    for arm, kind in kinds.items():
        control = is_control_role(kind)
        colour = CONTROL if control else ARM_COLOURS.get(kind) or next(spare)
        looks = CONTROL_LINES if control else LINES
        line = looks[(FIRST_LINE.get(colour, 0) + lines[scripts[arm], colour]) % len(looks)]
        found[arm] = {"color": colour, "linestyle": line, "hatch": HATCHES[hatches[colour] % len(HATCHES)]}
        lines[scripts[arm], colour] += 1
        hatches[colour] += 1
    return found


def is_control_role(role: str) -> bool:
    return role.removeprefix("baseline ").startswith("control")


def weights_of(runs: pd.DataFrame, arm: str) -> str:
    """(α 0.5, β 10) of one arm's runs, unless its name tells them; of several values all, up to three."""
    values = [(sign, sorted(runs[name].dropna().unique())) for name, sign in (("alpha", "α"), ("beta", "β")) if name in runs]
    texts = [
        f"{sign} {' or '.join(f'{value:g}' for value in found)}"
        for sign, found in values
        if 0 < len(found) <= 3 and f"{sign} " not in arm
    ]
    return f" ({', '.join(texts)})" if texts else ""


def spread_of(runs: pd.DataFrame) -> str:
    """mean ± standard error, 5 seeds: how many runs the arms have in one environment."""
    counts = runs.groupby(["env", "noise", "arm"]).run_id.nunique()
    least, most = counts.min(), counts.max()
    if most == 1:
        return "1 seed"
    return f"mean ± standard error, {least if least == most else f'{least} to {most}'} seeds"


def save(figure, path: Path) -> None:
    """As SVG and as PNG, atomically; the same numbers give the same bytes."""
    figure.tight_layout()
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
        buffer = io.BytesIO()
        with plt.rc_context({"svg.hashsalt": "report"}):
            figure.savefig(buffer, format=suffix[1:], **options)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())
    plt.close(figure)


def grid_of_axes(count: int, width: float = 4.8):
    columns = min(3, count) if count != 4 else 2
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat


def curve_table(points: pd.DataFrame) -> pd.DataFrame:
    """Values by step and run. Runs that were measured at the same few steps have these. Steps of episodes differ between seeds:
    a hundred bins, with straight lines over empty ones, and means of five bins (5 % of training) if each run has 40 points."""
    table = points.pivot_table(index="step", columns="run_id", values="value")
    if len(table) < 40 and table.notna().all(axis=None):
        return table
    ends = np.linspace(0, points.step.max(), 101)[1:]
    bins = ends[np.searchsorted(ends, points.step).clip(max=99)]
    table = points.assign(bin=bins).pivot_table(index="bin", columns="run_id", values="value")
    table = table.reindex(ends).interpolate(method="index", limit_area="inside")
    dense = points.groupby("run_id").size().min() >= 40
    return table.rolling(5, center=True, min_periods=1).mean().where(table.notna()) if dense else table


def draw_curves(runs: pd.DataFrame, curves: pd.DataFrame, path: Path, tags: tuple = RETURNS, what: str | None = None) -> None:
    """Figure 3: return while training by environment and noise, mean and standard error of the seeds; or other tags, and what
    they are."""
    merged = curves[curves.tag.isin(tags)].merge(runs, on="run_id")
    groups = list(merged.groupby(["script", "env", "noise"]))
    if not groups:
        return
    many = merged.arm.nunique() > 5  # a legend so long would hide curves: it stands beside them
    figure, axes = grid_of_axes(len(groups), 7 if many else 4.8)
    roles, style = roles_of(runs), styles(runs)
    for axis, ((script, env, noise), group) in zip(axes, groups, strict=False):
        values = curve_table(group)  # of all arms, so that they are smoothed alike
        for arm in order(list(group.arm.unique()), roles):
            mine = group[group.arm == arm]
            table = values[mine.run_id.unique()].dropna()  # where each seed has a value
            mean, error = table.mean(axis=1), table.sem(axis=1).fillna(0)
            color, line = style[arm]["color"], style[arm]["linestyle"]
            # thin and on top, so that what lies under a control can be seen
            over = {"linewidth": 1.3, "zorder": 3} if is_control_role(roles[arm]) else {"linewidth": 2.2}
            over |= {"marker": "o", "markersize": 4} if len(values) < 40 else {}
            axis.plot(table.index, mean, color=color, linestyle=line, label=arm + weights_of(mine, arm), **over)
            axis.fill_between(table.index, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        rlhf = group.iterations.notna().any() if "iterations" in group else False
        axis.set_xlabel("episodes" if rlhf else "environment steps")
        axis.set_ylabel(what or ("score" if rlhf else "return while training"))
        noisy = "" if noise == "none" else f", noise {noise}"
        axis.set_title(f"{env}{noisy}\n{script}; {spread_of(group)}", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.legend(fontsize=7, **({"bbox_to_anchor": (1, 1), "loc": "upper left"} if many else {}))
    save(figure, path)


def draw_sign_changes(runs: pd.DataFrame, curves: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Figure 2: share of advantages whose sign normalisation changes, by run the mean over training."""
    merged = curves[curves.tag == "charts/adv_sign_change"].merge(runs, on="run_id")
    shares = merged.groupby(["script", "env", "noise", "arm", "seed"]).value.mean().reset_index()
    shares = shares[shares.value > 0]  # without normalisation there is none
    groups = list(shares.groupby(["env", "noise"]))
    if not groups:
        return shares
    figure, axis = plt.subplots(figsize=(max(6, 1.4 * len(groups) + 2.5), 4))
    roles = roles_of(runs)
    style, handles = styles(runs), {}
    for i, (_, group) in enumerate(groups):
        arms = order(list(group.arm.unique()), roles)
        for j, arm in enumerate(arms):
            mine = group[group.arm == arm]
            values = mine.value * 100
            x = i + (j + 0.5) / len(arms) * 0.8 - 0.4
            color, hatch = style[arm]["color"], style[arm]["hatch"]
            look = {"color": color} if not hatch else {"fill": False, "edgecolor": color, "hatch": hatch}
            if is_control_role(roles[arm]):
                look = {"fill": False, "edgecolor": color, "hatch": hatch, "linestyle": "--", "linewidth": 1.3}
            bar = axis.bar(x, values.mean(), 0.7 / len(arms), **look)
            handles.setdefault(arm, bar)
            if len(values) > 1:
                axis.errorbar(x, values.mean(), values.sem(), color="#555555", linewidth=1, capsize=2)
    names = [env if noise == "none" else f"{env}\nnoise {noise}" for (env, noise), _ in groups]
    slant = {"rotation": 20, "ha": "right"} if len(groups) > 2 else {}
    axis.set_xticks(range(len(groups)), names, fontsize=7, **slant)
    axis.set_ylabel("advantages with another sign, %")
    axis.set_title(f"Advantages whose sign normalisation changes\n{spread_of(merged)}", fontsize=9)
    labels = [arm + weights_of(runs[runs.arm == arm], arm) for arm in handles]
    axis.legend(handles.values(), labels, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    save(figure, path)
    return shares


def draw_profiles(runs: pd.DataFrame, baseline: str, style: dict[str, dict], reps: int, title: str, path: Path) -> pd.DataFrame:
    """Share of runs above a normalised score, with 95 % intervals (rliable), over the environments that all arms have.

    None of arms with fewer than ten runs: a staircase of few steps says no more than the table does.
    """
    from rliable import library

    scale = clear(runs, baseline)
    envs = sorted(set.intersection(set(scale), *runs.groupby("arm").env.agg(set)))
    if not envs:
        return pd.DataFrame()
    divisors = [scale[env] for env in envs]
    roles = roles_of(runs)
    scores = {arm: matrix(runs, arm, envs) / divisors for arm in order(list(roles), roles)}
    if min(x.size for x in scores.values()) < 10:
        return pd.DataFrame()

    low, high = np.quantile(np.concatenate([x.flatten() for x in scores.values()]), [0.0, 0.95])
    taus = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 81)
    np.random.seed(0)
    profiles, intervals = library.create_performance_profile(scores, taus, reps=max(100, reps // 4))
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for arm in scores:
        label = arm + weights_of(runs[runs.arm == arm], arm)
        axis.plot(taus, profiles[arm], linestyle=style[arm]["linestyle"], color=style[arm]["color"], label=label)
        axis.fill_between(taus, *intervals[arm], color=style[arm]["color"], alpha=0.15, linewidth=0)
    axis.set(xlabel=f"score / {baseline}'s mean", ylabel="share of runs above it")
    where = ", ".join(envs) if len(envs) <= 3 else f"{len(envs)} environments"
    axis.set_title(f"{title}; {where}\n95 % intervals, {spread_of(runs).split(', ')[-1]}", fontsize=9)
    axis.legend(fontsize=7)
    save(figure, path)
    tables = [
        pd.DataFrame({"arm": arm, "score": taus, "share": profiles[arm], "low": low, "high": high})
        for arm, (low, high) in intervals.items()
    ]
    return pd.concat(tables)


def sweep(plain: pd.DataFrame) -> pd.DataFrame:
    """Symmetric and control runs with the beta that each stands for: a control's alpha less the symmetric ones' only alpha."""
    swept = plain[plain.method.str.contains("S(?:PPO|A2C)|control")].copy()
    alphas = swept[swept.beta > 0].alpha
    if alphas.nunique() != 1:
        return swept.iloc[:0].assign(weight=[], kind=[])
    swept["weight"] = swept.beta.where(swept.beta > 0, swept.alpha - alphas.iloc[0])
    swept["kind"] = np.where(swept.method.str.startswith("control"), "control", "symmetric")
    return swept


def draw_betas(runs: pd.DataFrame, path: Path) -> None:
    """Scores by beta, or by the beta that a control stands for, where there are three or more; beta 0 as a line."""
    plain = runs[runs.run_script.isin(FAMILIES)]
    plain = plain[~plain.method.str.contains("raw|factored|literal|normalised|bins|reweighted")]
    swept = sweep(plain)
    groups = [group for group in swept.groupby(["script", "env", "noise"]) if group[1].weight.nunique() >= 3]
    if not groups:
        return
    figure, axes = grid_of_axes(len(groups))
    for axis, ((script, env, noise), group) in zip(axes, groups, strict=False):
        for kind, style in (("symmetric", "o-"), ("control", "s--")):
            by_beta = group[group.kind == kind].groupby("weight").score
            if len(by_beta):
                colour = CONTROL if kind == "control" else ARM_COLOURS["SPPO"]
                x, mean, error = by_beta.mean().index, by_beta.mean(), by_beta.sem().fillna(0)
                axis.errorbar(x, mean, error, fmt=style, color=colour, label=kind, capsize=3)
        same = plain[(plain.script == script) & (plain.env == env) & (plain.noise == noise)]
        plainest = ("DPPO", "DA2C") if "continuous" in script else ("PPO", "A2C")
        base = same[same.method.isin(plainest)].score
        if len(base):
            axis.axhline(base.mean(), color=ARM_COLOURS[plainest[0]], linewidth=1, label="α 1, β 0")
        ticks = sorted(group.weight.unique())
        title = f"{env}{'' if noise == 'none' else f', noise {noise}'}"
        axis.set(xlabel="β (control: α less the symmetric arms' α)", ylabel="score", xscale="log")
        axis.set_title(f"{title} ({script})\n{spread_of(group)}", fontsize=9)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    save(figure, path)


# --- RLHF: prompt by prompt -------------------------------------------------------------------------------------------


def load_samples(runs: pd.DataFrame, sources: tuple[Path, ...]) -> list[dict]:
    """Of each RLHF run with a samples.json in its folder, or in the one beside a csv: the first ten prompts with what followed
    before and after training, and the changes over all prompts."""
    kept = {}
    for path in [source.with_name("samples.json") for source in sources if source.is_file()]:
        if path.exists():
            kept |= {run["run_id"]: run for run in read_samples(path, "run_id")}
    for run in runs.to_dict("records"):
        path = Path(str(run.get("folder")), "samples.json")
        if path.exists():
            samples = read_samples(path, "response")
            kept[run["run_id"]] = {"prompts": len(samples), "changes": changes(samples), "samples": samples[:10]}
    names = ("run_id", "arm", "seed")
    rows = runs.sort_values(["arm", "seed"]).to_dict("records")
    return [kept[run["run_id"]] | {name: run[name] for name in names} for run in rows if run["run_id"] in kept]


def read_samples(path: Path, name: str) -> list[dict]:
    """A samples.json, of whose entries each has `name`."""
    try:
        samples = json.loads(path.read_text())
        [sample[name] for sample in samples][0]  # noqa: RUF015  IndexError without any
        return samples
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path}: expected samples of RLHF runs ({error!r:.80})")


def changes(samples: list[dict]) -> dict:
    """By measure, its mean change over the prompts and the standard error of that. Of summaries, too, what share of their
    pairs of words is in the post: before, after, and of the references."""
    found = {}
    for name in samples[0]:
        if isinstance(samples[0].get(f"{name}_before"), float):
            change = np.array([sample[name] - sample[f"{name}_before"] for sample in samples])
            found[name] = [float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)]

    def pairs(text: str) -> list[tuple[str, str]]:
        return list(itertools.pairwise(re.findall(r"[\w'-]+", text.lower())))

    for name in ("response_before", "response", "reference") if "post" in samples[0] else ():
        shares = [
            np.mean([pair in set(pairs(sample["post"])) for pair in pairs(sample[name])])
            for sample in samples
            if pairs(sample[name])
        ]
        found[f"copied, {name}"] = float(np.mean(shares)) if shares else 0.0
    return found


def prompt_by_prompt(kept: list[dict]) -> list[str]:
    """The changes as a table, a line a run."""
    lines = [
        "",
        "### Before and after training, prompt by prompt",
        "",
        "Mean change ± its standard error over a run's prompts; copied: what share of a summary's pairs of words is in the "
        "post, before → after (of the references). [Ten prompts of each run with what followed](samples.json).",
        "",
    ]
    names = list(dict.fromkeys(name for run in kept for name in run["changes"] if not name.startswith("copied")))
    copied = any("copied, response" in run["changes"] for run in kept)
    heads = ["", "prompts", *names, *(["copied"] if copied else [])]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in kept:
        found = run["changes"]
        cells = [f"{run['arm']}, seed {run['seed']}", str(run["prompts"])]
        cells += ["{:+.3g} ± {:.2g}".format(*found[name]) if name in found else "" for name in names]
        shares = [found.get(f"copied, {name}") for name in ("response_before", "response", "reference")]
        cells += (["{:.2f} → {:.2f} ({:.2f})".format(*shares) if None not in shares else ""]) if copied else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# --- curves.csv -------------------------------------------------------------------------------------------------------


def write_curves(curves: pd.DataFrame, path: Path) -> None:
    """A line a tag and step, a column a run: a fifth of the size of a line a point."""
    points = curves.drop_duplicates(["run_id", "tag", "step"], keep="last")
    table = points.pivot(index=["tag", "step"], columns="run_id", values="value")
    write_atomically(path, table.to_csv(float_format="%.6g").encode())


def read_curves(path: Path) -> pd.DataFrame:
    """run_id, tag, step, value; also of an older file, which has a line a point. A last line that was cut off is left out."""
    try:
        text = path.read_text()
        table = pd.read_csv(io.StringIO(text[: text.rindex("\n") + 1]), dtype={"run_id": str, "tag": str})
        if "run_id" not in table:
            table = table.melt(["tag", "step"], var_name="run_id", value_name="value")
        table = table[["run_id", "tag", "step", "value"]].dropna()
        return table.astype({"run_id": str, "step": int, "value": float})
    except (OSError, ValueError, KeyError) as error:
        fail(f"{path}: expected the curves.csv of a report ({str(error).splitlines()[0]})")


# --- report -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_csv(table: pd.DataFrame, path: Path, digits: int | None = None) -> None:
    write_atomically(path, table.to_csv(index=False, float_format=f"%.{digits}g" if digits else None).encode())


def parse_args(argv: list[str]) -> Args:
    """The command line as Args; what tyro says in a box of several lines as one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(Args, args=argv, prog=Path(__file__).name, description=__doc__)
    except SystemExit as stopped:
        if MISSING:
            fail(f"needs {MISSING}; expected what `{INSTALL}` installs")
        if stopped.code:
            text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{3,}|[|+]", " ", captured.getvalue()).split())
            titles = "Value error|Parsing error|Missing argument|Invalid choice|Unrecognized options|Required options"
            text = re.sub(rf"^({titles}) (?=[A-Z]|invalid)", "", text)
            fail(re.split(r" (For full|Argument) helptext", text)[0] + "; see --help")
        raise


def main(args: Args) -> None:
    if MISSING:
        fail(f"needs {MISSING}; expected what `{INSTALL}` installs")
    if not args.sources:
        fail("expected folders with finished runs, or csv files with a line a run; see --help")
    if args.reps < 1:
        fail(f"--reps {args.reps}: expected 1 or more")
    runs = load_runs(args.sources)
    mixture = find_mixture(runs)
    if mixture and not args.allow_mixed:
        rest = f"; and {len(mixture) - 1} more differences" if len(mixture) > 1 else ""
        fail(f"the runs differ: {mixture[0]}{rest}; expected alike ones, or --allow-mixed, which reports them and says so")
    table, (curves, lacking), samples = cells(runs), load_curves(runs, args.sources), load_samples(runs, args.sources)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: expected a folder to write in ({error.strerror})")
    pictures = [
        f"{name}.{kind}"
        for name in ("curves", "kl", "grad_shares", "sign_changes", "betas", "profiles_*")
        for kind in ("svg", "png")
    ]
    for name in ("aggregates.csv", "profiles.csv", "samples.json", *pictures):
        for path in args.out.glob(name):  # of an earlier report, which this one may not replace
            path.unlink()
    seconds = runs.get("seconds", pd.Series(np.nan, runs.index))
    hours = f"{seconds.sum() / 3600:.1f} hours of training" if seconds.notna().all() else "hours of training unknown"
    made = []
    for name in ("commit", "device"):
        values = (
            sorted({re.sub("([0-9a-f]{12})[0-9a-f]{28}", r"\1", str(value)) for value in runs[name].fillna("unknown")})
            if name in runs
            else ["?"]
        )
        made.append(f"{name} {values[0]}" if len(values) == 1 else f"**{len(values)} {name}s: {', '.join(values)}**")
    lines = [
        f"{len(runs)} runs, {hours}; {'; '.join(made)}. A score is the mean over the episodes of a run's last evaluation, of "
        "the trained policy without noise; actions are sampled on Atari and IMDB, greedy elsewhere. Mean ± standard error of "
        "the seeds (their number) [the paper's, at its own length and settings, of the last 10 episodes]; our best in bold.",
        "",
    ]
    if runs.attrs["left out"]:
        lines += [f"**Left out: {'; '.join(runs.attrs['left out'])}. What is left may flatter these arms.**", ""]
    if runs.attrs["others"]:
        lines += [f"{runs.attrs['others']} lines were of something else than these scripts' runs.", ""]
    if runs.attrs["twice"]:
        lines += [f"{runs.attrs['twice']} lines were of runs that had been read already.", ""]
    for text in runs.attrs["lacks"]:
        lines += [f"**{text}: runs that differ in these settings are taken as alike.**", ""]
    if lacking:
        lines += [f"**Curves left out, as their files are damaged or not whole: {'; '.join(lacking)}.**", ""]
    without_curves = len(runs) - curves.run_id.nunique() - len(lacking)
    if without_curves:
        lines += [f"{without_curves} runs have no curves here.", ""]
    if mixture:
        lines += ["**Mixed on request:**", "", *(f"* {text}" for text in mixture), ""]
    collected, profiles = [], []
    for (script, noise), part in table.groupby(["script", "noise"]):
        steps = sorted(runs[(runs.script == script) & (runs.noise == noise)].steps.dropna().unique())
        lengths = ", ".join(f"{step:,.0f}" for step in steps)
        mine = runs[(runs.script == script) & (runs.noise == noise)]
        unit = "iterations" if "iterations" in mine and mine.iterations.notna().any() else "steps"
        lines += [f"### {script}, {'without noise' if noise == 'none' else f'noise {noise}'}; {lengths} {unit}", ""]
        roles = roles_of(mine)
        lines += [describe_arms(mine), "", *markdown(part, roles), ""]
        beside = order(list(mine[(mine.script == "sppo_atari.py") & (mine.paper == "PPO")].arm.unique()), roles)
        if beside and part.paper_mean.notna().any():
            lines += [
                f"The paper's PPO stands beside {' and '.join(beside)}: its released script does not normalise its advantages; "
                "whether its table was made so is not known (docs/loss.md, fact 7).",
                "",
            ]
        lines += training(mine, curves)
        lines += gradient(mine, curves)
        lines += measures(mine)
        if script in FAMILIES and "ppo" in script:
            lines += equal_curves(mine, curves)
            symmetric = mine[mine.beta > 0].groupby("env").size().index
            without = sorted(set(symmetric) - set(mine[mine.method.str.startswith("control")].env))
            if without:
                lines += [f"**No control (α + β|Z|, β 0) beside the symmetric loss on {', '.join(without)}.**", ""]
        several = mine[mine.groupby(["arm", "env"]).seed.transform("size") > 1]
        if several.groupby("env").arm.nunique().max() < 2 or several.empty:
            lines += ["No aggregates: they need two arms with two seeds in one environment.", ""]
            continue
        baseline = order(list(several.arm.unique()), roles)[0]
        found = aggregate(several, baseline, args.reps)
        collected.append(found.assign(script=script, noise=noise))
        lines += aggregates(mine, several, baseline, found)
        title = "without noise" if noise == "none" else f"noise {noise}"
        path = args.out / f"profiles_{script.removesuffix('.py')}_{noise}.svg"
        profiles.append(
            draw_profiles(several, baseline, styles(runs), args.reps, title, path).assign(script=script, noise=noise)
        )
    draw_curves(runs, curves, args.out / "curves.svg")
    draw_curves(runs, curves, args.out / "kl.svg", ("objective/kl",), "KL to the reference, nats")
    draw_curves(runs, curves, args.out / "grad_shares.svg", (GRADIENT["policy"],), "policy's share of the gradient")
    shares = draw_sign_changes(runs, curves, args.out / "sign_changes.svg")
    draw_betas(runs, args.out / "betas.svg")
    if len(shares):
        lines += ["### Advantages whose sign normalisation changes", "", "| | share (range of the runs) |", "|---|---|"]
        for (env, noise), group in shares.groupby(["env", "noise"]):
            values = group.value * 100
            lines.append(f"| {env}, noise {noise} | {values.mean():.1f} % ({values.min():.1f} to {values.max():.1f}) |")
    if samples:
        lines += prompt_by_prompt(samples)
        write_atomically(args.out / "samples.json", (json.dumps(samples, indent=1) + "\n").encode())
    pictures = [
        ("curves.svg", "learning curves"),
        ("kl.svg", "KL while training"),
        ("grad_shares.svg", "the policy's share of the gradient"),
        ("betas.svg", "scores by beta"),
        ("sign_changes.svg", "sign changes"),
    ]
    pictures += [(path.name, "performance profile") for path in sorted(args.out.glob("profiles_*.svg"))]
    lines += ["", *(f"![{text}]({name})" for name, text in pictures if (args.out / name).exists())]
    made_here = ["env", "arm", "given", "method", "named", "paper", "steps", "run_script"]
    paths = ["folder", "run_dir", "resume"]  # of this machine
    table_of_runs = runs.assign(script=runs.run_script).drop(columns=[*made_here, *paths], errors="ignore")
    write_csv(table_of_runs, args.out / "runs.csv")
    write_csv(table, args.out / "cells.csv", 8)
    write_curves(curves, args.out / "curves.csv")
    if collected:
        write_csv(pd.concat(collected), args.out / "aggregates.csv", 6)
    if any(map(len, profiles)):
        write_csv(pd.concat(profiles), args.out / "profiles.csv", 6)
    write_atomically(args.out / "report.md", ("\n".join(lines) + "\n").encode())
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
