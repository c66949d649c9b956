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
    *.png           learning curves (Figure 3), advantage sign changes (Figure 2), performance profiles, scores by beta

Runs whose settings, lengths or versions differ where they should not are refused, unless --allow-mixed, which says so in the
report; an arm of two runs with one seed is told apart by the settings in which they differ. Commits and devices may differ, and
are named. What an earlier report left in --out is replaced. An interquartile mean is given in
units of the first baseline's (PPO's or A2C's), after each score was divided by the baseline's mean in the same environment;
where that mean is not above two standard errors, the environment is left out, which the report says. An arm with beta 0 is
called a control only where its alpha is a symmetric arm's alpha + beta |Z|; A2C's control is SA2C with --mean-weight. An arm
`reweighted...` of run.py keeps its name. On Atari the paper's PPO stands beside both PPO and PPO raw.
"""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.ticker import EngFormatter

PUBLISHED = Path(__file__).parent / "paper/scores.csv"
RETURNS = ("charts/episodic_return", "objective/scores")
CURVES = (*RETURNS, "charts/adv_sign_change")
KEPT = (*CURVES, "losses/grad_share_policy", "losses/grad_share_value", "losses/grad_share_entropy")  # in curves.csv
# Arguments that runs of one row may differ in: what makes an arm, what names a run, and what is no other experiment
ARM = ("alpha", "beta", "Z", "num_bins", "reverse_prob", "norm_adv", "literal_signs", "mean_weight")
DIVIDED = {"vf_coef", "ent_coef", "max_grad_norm", "adam_eps"}  # in which run.py's reweighted arms differ from PPO
FREE = (
    *("seed", "env_id", "noise", "exp_name", "run_dir", "resume", "track", "wandb_project_name", "wandb_entity"),
    *("capture_video", "save_model", "checkpoint_interval", "log_interval", "eval_interval", "eval_every", "num_threads"),
    *("total_timesteps", "iterations"),  # compared apart
)
BASELINES = ("PPO", "A2C", "DPPO", "DA2C")


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


def arguments() -> set[str]:
    """The names of all scripts' arguments: columns of settings, among all that W&B exports."""
    trees = (ast.parse(path.read_text()) for path in Path(__file__).parents[1].glob("*.py"))
    classes = (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {field.target.id for found in classes for field in found.body if isinstance(field, ast.AnnAssign)}


def flatten(result: dict) -> dict:
    """A result.json as a line of W&B's table of runs: arguments by their own names, versions as versions.NAME."""
    row = {key: value for key, value in result.items() if isinstance(value, str | int | float)}
    row |= {key: value for key, value in result["args"].items() if key != "env_id"}
    row["returns"] = " ".join(f"{value:.6g}" for value in result.get("returns") or [])
    for when in ("before", "after"):  # what RLHF scripts measure beside the score
        row |= {f"{when}.{name}": value for name, value in (result.get(when) or {}).items()}
    return row | {f"versions.{name}": value for name, value in result["versions"].items()}


def load_runs(sources: tuple[Path, ...]) -> pd.DataFrame:
    """One line a run; those of local folders have their folder in the column `folder`.

    What is left out, of which arm and how many, is in attrs["left out"] as lines of text.
    """
    tables, left_out = [], Counter()
    for source in sources:
        if source.is_dir():
            rows = []
            for folder in sorted({path.parent for name in ("args.json", "result.json") for path in source.rglob(name)}):
                finished = (folder / "result.json").exists()
                path = folder / ("result.json" if finished else "args.json")
                try:
                    row = flatten(json.loads(path.read_text()))
                    arm = label(row)
                except (ValueError, KeyError, AttributeError) as error:
                    fail(f"{path}: expected a {path.name} of one of the scripts ({error!r:.80})")
                if finished:
                    rows.append({**row, "Name": folder.name, "folder": str(folder)})
                else:
                    left_out["not finished", arm] += 1
            tables.append(pd.DataFrame(rows))
        elif source.is_file():
            try:
                table = pd.read_csv(source, float_precision="round_trip")
            except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
                fail(f"{source}: expected a csv with a line a run ({str(error).splitlines()[0]})")
            own = table["ID"] if "ID" in table else pd.Series([f"{source}:{i}" for i in table.index], dtype=str)
            table["run_id"] = table["run_id"].fillna(own) if "run_id" in table else own
            tables.append(table)
        else:
            fail(f"{source}: expected a folder with finished runs, or a csv with a line a run")
    runs = pd.concat(tables, ignore_index=True)
    if runs.empty:
        fail(
            f"{' '.join(map(str, sources))}: no finished run there; expected some result.json below (or name a runs.csv itself)"
        )
    needed = ["script", "env_id", "seed", "alpha", "beta", "score"]
    missing = set(needed) - set(runs.columns)
    if missing:
        fail(f"{sources[0]}: no column {', '.join(sorted(missing))}; expected what the scripts log to W&B")
    for name in needed[2:]:
        runs[name] = pd.to_numeric(runs[name], errors="coerce")
    known = runs[needed[:-1]].notna().all(axis=1)
    others = int((~known).sum())
    runs = runs[known]
    runs = runs.assign(noise=runs.noise.fillna("none") if "noise" in runs else "none")
    runs = runs.assign(Z=pd.to_numeric(runs.Z, errors="coerce").fillna(-1.0) if "Z" in runs else -1.0)
    runs = runs.assign(arm=[label(run) for run in runs.to_dict("records")])
    scored = np.isfinite(runs.score)
    left_out.update(("without a score", arm) for arm in runs[~scored].arm)
    runs = runs[scored]
    if runs.empty:
        fail(f"{' '.join(map(str, sources))}: no run there has a score; expected some finished ones")
    twice = int(runs.duplicated("run_id").sum())
    runs = runs.drop_duplicates("run_id").reset_index(drop=True)  # a folder and the export of the same runs
    runs["env"] = [env_id.removeprefix("ALE/") for env_id in runs.env_id]
    for i in [i for i in runs.index if runs.arm[i].startswith("control") and not is_control(runs, runs.loc[i])]:
        runs.loc[i, "arm"] = f"{runs.arm[i].removeprefix('control ')} α {runs.alpha[i]:g}"
    # one beta (of controls: one alpha) an arm and row is the arm itself; if any row has several, they are told apart in all
    for name, sign in (("beta", "β"), ("alpha", "α")):
        several = runs.groupby(["script", "env", "noise", "arm"])[name].transform("nunique") > 1
        several = several.groupby([runs.script, runs.noise, runs.arm]).transform("any")
        runs.loc[several, "arm"] += runs[several][name].map((f" {sign} " + "{:g}").format)
    telling = {}  # so too the settings by which runs with one seed are told apart
    for (script, _, noise, arm), group in runs.groupby(["script", "env", "noise", "arm"]):
        if group.seed.duplicated().any():
            telling.setdefault((script, noise, arm), set()).update(differences(group, arguments() - {*ARM, *FREE}))
    for (script, noise, arm), names in telling.items():
        group = runs[(runs.script == script) & (runs.noise == noise) & (runs.arm == arm)]
        for name in sorted(names):
            runs.loc[group.index, "arm"] += group[name].map(shown).map(f" {name} {{}}".format)
    runs["steps"] = runs.get("total_timesteps", np.nan)
    if "iterations" in runs:
        runs["steps"] = runs.steps.fillna(runs.iterations)
    for name in [name for name in runs if name.startswith(("eval/", "test/"))]:  # W&B's summary has the last values
        of = runs.script.eq("sppo_rlhf_imdb.py" if name.startswith("eval/") else "sppo_rlhf_tldr.py")
        after = f"after.{name.split('/', 1)[1]}"
        runs[after] = runs.get(after, pd.Series(np.nan, runs.index)).fillna(runs[name].where(of))
    lines = [f"{why}: {arm} ({count})" for (why, arm), count in sorted(left_out.items())]
    runs.attrs = {"left out": lines, "others": others, "twice": twice, "telling": set().union(*telling.values())}
    return runs


def label(run: dict) -> str:
    """The arm of a run, by its arguments."""
    algorithm = "A2C" if "a2c" in run["script"] else "PPO"
    continuous = "continuous" in run["script"]
    discrete = "D" if continuous and run.get("num_bins", 11) else ""
    if run.get("mean_weight") in (True, "True", 1):
        name = f"control {discrete}{algorithm}"
    elif run["beta"]:
        name = f"{discrete}S{algorithm}"
        name += " factored" if run.get("reverse_prob") == "factored" else ""
        name += " literal" if run.get("literal_signs") in (True, "True") else ""
    else:
        name = discrete + algorithm if run["alpha"] == 1 else f"control {discrete}{algorithm}"
    default = algorithm == "PPO"
    raw = run.get("norm_adv") in (False, "False", 0) if default else run.get("norm_adv") in (True, "True", 1)
    name += " raw" if raw and default else " normalised" if raw else ""
    name += f" Z {run['Z']:g}" if run.get("Z", -1) != -1 and run["beta"] else ""
    name += f" {run['num_bins']:g} bins" if discrete and run.get("num_bins", 11) != 11 else ""
    exp_name = str(run.get("exp_name"))
    return name + (f" {exp_name}" if exp_name.startswith("reweighted") else "")


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
    """What differs among runs that a table would compare: versions and settings anywhere, lengths within a row."""
    found = []
    for (script, env, noise), row in runs.groupby(["script", "env", "noise"]):
        steps = sorted(row.steps.dropna().unique())
        if len(steps) > 1:
            found.append(f"{env}, noise {noise}: lengths {', '.join(f'{step:,.0f}' for step in steps)}")
        for (arm, seed), count in row.groupby(["arm", "seed"]).size().items():
            if count > 1:
                found.append(f"{env}, noise {noise}, {script}: {count} runs of {arm} with seed {seed}")
        names, plain = arguments() - {*ARM, *FREE} - runs.attrs["telling"], row[~row.arm.str.contains("reweighted")]
        for name, values in (differences(row, names - DIVIDED) | differences(plain, names & DIVIDED)).items():
            if noise != "none" or not name.startswith("noise_"):
                found.append(f"{env}, noise {noise}, {script}: {name} {', '.join(values)}")
        for arm, same in row.groupby("arm"):
            for name, values in differences(same, runs.attrs["telling"] | (DIVIDED if "reweighted" in arm else set())).items():
                found.append(f"{env}, noise {noise}, {script}, {arm}: {name} {', '.join(values)}")
    for script, same in runs.groupby("script"):
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
    """A setting as text: None of a result.json and the empty field that it is in a csv alike."""
    return "none" if pd.isna(value) else str(value)


# --- statistics -------------------------------------------------------------------------------------------------------


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error and number of seeds of each script, environment, noise and arm, and the paper's numbers."""
    grouped = runs.groupby(["script", "env", "noise", "arm"]).score
    table = pd.DataFrame({"mean": grouped.mean(), "stderr": grouped.sem(), "seeds": grouped.count()}).reset_index()
    table["task"] = [re.sub(r"-v\d+$", "", env) for env in table.env]
    published = pd.read_csv(PUBLISHED).rename(
        columns={"algo": "arm", "env": "task", "mean": "paper_mean", "stderr": "paper_stderr"}
    )
    atari_ppo = published[(published.family == "atari") & (published.arm == "PPO")]
    published = pd.concat([published, atari_ppo.assign(arm="PPO raw")])
    return table.merge(
        published[["task", "noise", "arm", "paper_mean", "paper_stderr"]], how="left", on=["task", "noise", "arm"]
    )


def order(arms: list[str]) -> list[str]:
    """Baselines first, then what is compared with them, then controls; β 2 before β 10."""
    first = {arm: i for i, arm in enumerate(BASELINES)}

    def key(arm: str) -> tuple:
        parts = re.split(r"(\d+\.?\d*)", arm)  # texts and numbers by turns
        return arm.startswith("control"), first.get(arm, 9), [float(part) if i % 2 else part for i, part in enumerate(parts)]

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

    def estimate(statistic, a: str, b: str, common: list[str]) -> tuple[float, float, float]:
        pair = {"pair": (matrix(runs, a, common), matrix(runs, b, common))}
        point, interval = library.get_interval_estimates(pair, lambda x, y: np.array([statistic(x, y)]), reps=reps)
        return point["pair"][0], *interval["pair"][:, 0]

    arms = order(list(runs.arm.unique()))
    envs = runs.groupby("arm").env.agg(set)
    rows, usable = [], set(clear(runs, baseline))
    for arm in arms:
        common = sorted(envs[arm] & usable)
        if arm != baseline and common:
            rows.append(("IQM", arm, baseline, *estimate(relative_iqm, arm, baseline, common), len(common)))
    for a, b in itertools.combinations(arms, 2):
        common = sorted(envs[a] & envs[b])
        if common and (len(arms) <= 6 or is_reference(a) or is_reference(b)):
            value, low, high = estimate(metrics.probability_of_improvement, a, b, common)
            rows.append(("P(arm > other)", a, b, value, low, high, len(common)))
            rows.append(("P(arm > other)", b, a, 1 - value, 1 - high, 1 - low, len(common)))
    return pd.DataFrame(rows, columns=["what", "arm", "other", "value", "low", "high", "environments"])


def is_reference(arm: str) -> bool:
    """What others are compared with: baselines and controls, raw or normalised ones too; not a baseline with an odd alpha."""
    return arm.startswith("control") or (arm.split()[0] in BASELINES and " α " not in arm)


def load_curves(runs: pd.DataFrame, sources: tuple[Path, ...]) -> pd.DataFrame:
    """Points of KEPT of the local runs, and of those from a csv that has this script's curves.csv beside it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    for run in runs.to_dict("records"):
        if not isinstance(run.get("folder"), str):
            continue
        events = EventAccumulator(run["folder"], size_guidance={"scalars": 0}).Reload()
        for tag in sorted(set(KEPT) & set(events.Tags()["scalars"])):
            rows += [(run["run_id"], tag, event.step, event.value) for event in events.Scalars(tag)]
    tables = [pd.DataFrame(rows, columns=["run_id", "tag", "step", "value"])]
    known = set(tables[0].run_id)
    for path in [source.with_name("curves.csv") for source in sources if source.is_file()]:
        if path.exists():
            found = read_curves(path)
            tables.append(found[found.run_id.isin(set(runs.run_id) - known)])
            known |= set(found.run_id)
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> list[str]:
    """The rows of one script and noise: ours by arm, the paper's in brackets; the best of ours in bold; wins below."""
    arms = order(list(table.arm.unique()))
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
    for other in filter(is_reference, arms):
        texts = []
        for arm in arms:
            text = "{} of {}".format(*ours[arm, other]) if (arm, other) in ours else ""
            text += " [{} of {}]".format(*papers[arm, other]) if (arm, other) in papers else ""
            texts.append(text)
        lines.append(f"| above {other} | {' | '.join(texts)} |")
    return lines


def equal_curves(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs with PPO: the last step up to which a symmetric run logs, to six digits, what its control does,
    which has its gradient (README, fact 2), and what the baseline does, which has not; each alike in all else."""
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
    symmetric = runs[(runs.beta > 0) & ~runs.arm.str.contains("literal|factored|raw")].sort_values("seed")
    for env, arm in itertools.product(sorted(symmetric.env.unique()), order(list(symmetric.arm.unique()))):
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
    arms = order(list(runs.arm.unique()))
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
    arms = order(list(merged.arm.unique()))
    lines = ["While training, mean over the last tenth of it:", "", f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for env in sorted(merged.env.unique()):
        columns = [values[env].get(arm, pd.Series(dtype=float)) for arm in arms]
        texts = [f"{with_error(x.mean(), x.sem())} ({len(x)})" if len(x) else "" for x in columns]
        lines.append(f"| {env} | {' | '.join(texts)} |")
    return [*lines, ""]


def aggregates(runs: pd.DataFrame, several: pd.DataFrame, baseline: str, found: pd.DataFrame) -> list[str]:
    """What `found` says, as a table; `several` are those of the runs whose cell has two seeds or more."""
    arms = order(list(several.arm.unique()))
    others = [arm for arm in arms if len(arms) <= 6 or is_reference(arm)]
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


def colours(arms: list[str]) -> dict[str, str]:
    """Controls, which are dashed or hatched, have the colours of the symmetric arms, in their order."""
    controls = [arm for arm in order(arms) if arm.startswith("control")]
    others = [arm for arm in order(arms) if arm not in controls]
    colour = {arm: f"C{i % 10}" for i, arm in enumerate(others)}
    partners = [arm for arm in others if not is_reference(arm)] or others
    return colour | {arm: colour[partners[i % len(partners)]] if partners else f"C{i % 10}" for i, arm in enumerate(controls)}


def grid_of_axes(count: int):
    columns = min(4, count)
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(4 * columns, 3 * -(-count // columns)), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat


def curve_table(points: pd.DataFrame) -> pd.DataFrame:
    """Values by step and run. Steps of episodes differ between seeds: a hundred bins, with straight lines over empty ones; of
    runs with as many points, means of five bins (5 % of training)."""
    ends = np.linspace(0, points.step.max(), 101)[1:]
    bins = ends[np.searchsorted(ends, points.step).clip(max=99)]
    table = points.assign(bin=bins).pivot_table(index="bin", columns="run_id", values="value")
    table = table.reindex(ends).interpolate(method="index", limit_area="inside")
    dense = points.groupby("run_id").size().min() >= 50
    return table.rolling(5, center=True, min_periods=1).mean().where(table.notna()) if dense else table


def draw_curves(runs: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """Figure 3: return while training by environment and noise, mean and standard error of the seeds."""
    merged = curves[curves.tag.isin(RETURNS)].merge(runs, on="run_id")
    groups = list(merged.groupby(["script", "env", "noise"]))
    if not groups:
        return
    figure, axes = grid_of_axes(len(groups))
    colour = colours(list(merged.arm.unique()))
    for axis, ((script, env, noise), group) in zip(axes, groups, strict=False):
        for arm in order(list(group.arm.unique())):
            mine = group[group.arm == arm]
            table = curve_table(mine)
            mean, error = table.mean(axis=1), table.sem(axis=1).fillna(0)
            axis.plot(table.index, mean, "--" if arm.startswith("control") else "-", color=colour[arm], label=arm)
            axis.fill_between(table.index, mean - error, mean + error, color=colour[arm], alpha=0.2, linewidth=0)
        title = f"{env}{'' if noise == 'none' else f', noise {noise}'}\n{script}"
        rlhf = script.startswith("sppo_rlhf")
        axis.set(title=title, xlabel="episodes" if rlhf else "steps", ylabel="score" if rlhf else "return")
        axis.title.set_fontsize(9)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sign_changes(runs: pd.DataFrame, curves: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Figure 2: share of advantages whose sign normalisation changes; mean over training, range of the seeds."""
    merged = curves[curves.tag == "charts/adv_sign_change"].merge(runs, on="run_id")
    shares = merged.groupby(["script", "env", "noise", "arm", "seed"]).value.mean().reset_index()
    shares = shares[shares.value > 0]  # without normalisation there is none
    groups = list(shares.groupby(["env", "noise"]))
    if not groups:
        return shares
    figure, axis = plt.subplots(figsize=(max(6, 1.2 * len(groups)), 4))
    colour, handles = colours(list(shares.arm.unique())), {}
    for i, (_, group) in enumerate(groups):
        arms = order(list(group.arm.unique()))
        for j, arm in enumerate(arms):
            values = group[group.arm == arm].value * 100
            x = i + (j + 0.5) / len(arms) * 0.8 - 0.4
            hatch = "///" if arm.startswith("control") else None
            bar = axis.bar(x, values.mean(), 0.7 / len(arms), color=colour[arm], hatch=hatch, edgecolor="white")
            handles.setdefault(arm, bar)
            axis.plot([x, x], [values.min(), values.max()], color="black", linewidth=1)
    names = [f"{env}{'' if noise == 'none' else f', {noise}'}" for (env, noise), _ in groups]
    slant = {"rotation": 20, "ha": "right"} if len(groups) > 2 else {}
    axis.set_xticks(range(len(groups)), names, fontsize=7, **slant)
    axis.set_ylabel("advantages with another sign, %")
    axis.legend(handles.values(), handles, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return shares


def draw_profiles(runs: pd.DataFrame, baseline: str, reps: int, title: str, path: Path) -> pd.DataFrame:
    """Share of runs above a normalised score, with 95 % intervals (rliable), over the environments that all arms have."""
    from rliable import library

    scale = clear(runs, baseline)
    envs = sorted(set.intersection(set(scale), *runs.groupby("arm").env.agg(set)))
    if not envs:
        return pd.DataFrame()
    divisors = [scale[env] for env in envs]
    scores = {arm: matrix(runs, arm, envs) / divisors for arm in order(list(runs.arm.unique()))}

    low, high = np.quantile(np.concatenate([x.flatten() for x in scores.values()]), [0.0, 0.95])
    taus = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 81)
    np.random.seed(0)
    profiles, intervals = library.create_performance_profile(scores, taus, reps=max(100, reps // 4))
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for arm, colour in colours(list(scores)).items():
        axis.plot(taus, profiles[arm], "--" if arm.startswith("control") else "-", color=colour, label=arm)
        axis.fill_between(taus, *intervals[arm], color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=f"score / {baseline}'s mean", ylabel="share of runs above it")
    axis.set_title(f"{title}; {', '.join(envs) if len(envs) <= 3 else f'{len(envs)} environments'}", fontsize=9)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    tables = [
        pd.DataFrame({"arm": arm, "score": taus, "share": profiles[arm], "low": low, "high": high})
        for arm, (low, high) in intervals.items()
    ]
    return pd.concat(tables)


def sweep(plain: pd.DataFrame) -> pd.DataFrame:
    """Symmetric and control runs with the beta that each stands for: a control's alpha less the symmetric ones' only alpha."""
    swept = plain[plain.arm.str.contains("S(?:PPO|A2C)|control")].copy()
    alphas = swept[swept.beta > 0].alpha
    if alphas.nunique() != 1:
        return swept.iloc[:0].assign(weight=[], kind=[])
    swept["weight"] = swept.beta.where(swept.beta > 0, swept.alpha - alphas.iloc[0])
    swept["kind"] = np.where(swept.arm.str.startswith("control"), "control", "symmetric")
    return swept


def draw_betas(runs: pd.DataFrame, path: Path) -> None:
    """Scores by beta, or by the beta that a control stands for, where there are three or more; beta 0 as a line."""
    plain = runs[~runs.arm.str.contains("raw|factored|literal|normalised|bins|reweighted")]
    swept = sweep(plain)
    groups = [group for group in swept.groupby(["script", "env", "noise"]) if group[1].weight.nunique() >= 3]
    if not groups:
        return
    figure, axes = grid_of_axes(len(groups))
    for axis, ((script, env, noise), group) in zip(axes, groups, strict=False):
        for kind, style in (("symmetric", "C3o-"), ("control", "C1s--")):
            by_beta = group[group.kind == kind].groupby("weight").score
            if len(by_beta):
                axis.errorbar(by_beta.mean().index, by_beta.mean(), by_beta.sem().fillna(0), fmt=style, label=kind, capsize=3)
        same = plain[(plain.script == script) & (plain.env == env) & (plain.noise == noise)]
        base = same[same.arm.isin(("DPPO", "DA2C") if "continuous" in script else ("PPO", "A2C"))].score
        if len(base):
            axis.axhline(base.mean(), color="C0", linewidth=1, label="α 1, β 0")
        ticks = sorted(group.weight.unique())
        title = f"{env}{'' if noise == 'none' else f', noise {noise}'}"
        axis.set(title=title, xlabel="β (control: α less the symmetric arms' α)", ylabel="score", xscale="log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- curves.csv -------------------------------------------------------------------------------------------------------


def write_curves(curves: pd.DataFrame, path: Path) -> None:
    """A line a tag and step, a column a run: a fifth of the size of a line a point."""
    points = curves.drop_duplicates(["run_id", "tag", "step"], keep="last")
    points.pivot(index=["tag", "step"], columns="run_id", values="value").to_csv(path, float_format="%.6g")


def read_curves(path: Path) -> pd.DataFrame:
    """run_id, tag, step, value; also of an older file, which has a line a point."""
    table = pd.read_csv(path, dtype={"run_id": str})
    if "run_id" not in table:
        table = table.melt(["tag", "step"], var_name="run_id", value_name="value").dropna(subset="value")
    return table[["run_id", "tag", "step", "value"]]


# --- report -----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> Args:
    """The command line as Args; what tyro says in a box of several lines as one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(Args, args=argv, prog=Path(__file__).name, description=__doc__)
    except SystemExit as stopped:
        if stopped.code:
            text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{3,}|[|+]", " ", captured.getvalue()).split())
            titles = "Value error|Parsing error|Missing argument|Invalid choice|Unrecognized options|Required options"
            text = re.sub(rf"^({titles}) (?=[A-Z]|invalid)", "", text)
            fail(re.split(r" (For full|Argument) helptext", text)[0] + "; see --help")
        raise


def main(args: Args) -> None:
    if not args.sources:
        fail("expected folders with finished runs, or csv files with a line a run; see --help")
    if args.reps < 1:
        fail(f"--reps {args.reps}: expected 1 or more")
    runs = load_runs(args.sources)
    mixture = find_mixture(runs)
    if mixture and not args.allow_mixed:
        rest = f"; and {len(mixture) - 1} more differences" if len(mixture) > 1 else ""
        fail(f"the runs differ: {mixture[0]}{rest}; expected alike ones, or --allow-mixed, which reports them and says so")
    table, curves = cells(runs), load_curves(runs, args.sources)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: expected a folder to write in ({error.strerror})")
    for name in ("aggregates.csv", "profiles.csv", "curves.png", "sign_changes.png", "betas.png", "profiles_*.png"):
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
    without_curves = len(runs) - curves.run_id.nunique()
    if without_curves:
        lines += [f"{without_curves} runs have no curves here.", ""]
    if mixture:
        lines += ["**Mixed on request:**", "", *(f"* {text}" for text in mixture), ""]
    collected, profiles = [], []
    for (script, noise), part in table.groupby(["script", "noise"]):
        steps = sorted(runs[(runs.script == script) & (runs.noise == noise)].steps.dropna().unique())
        lengths = ", ".join(f"{step:,.0f}" for step in steps)
        unit = "iterations" if script.startswith("sppo_rlhf") else "steps"
        lines += [f"### {script}, {'without noise' if noise == 'none' else f'noise {noise}'}; {lengths} {unit}", ""]
        lines += [*markdown(part), ""]
        if script == "sppo_atari.py" and part.arm.isin(["PPO", "PPO raw"]).any() and part.paper_mean.notna().any():
            lines += [
                "The paper's PPO stands beside PPO and PPO raw: its released script does not normalise its advantages; "
                "whether its table was made so is not known (README, fact 7).",
                "",
            ]
        mine = runs[(runs.script == script) & (runs.noise == noise)]
        lines += training(mine, curves)
        lines += measures(mine)
        if "ppo" in script:
            lines += equal_curves(mine, curves)
            symmetric = mine[mine.beta > 0].groupby("env").size().index
            without = sorted(set(symmetric) - set(mine[mine.arm.str.startswith("control")].env))
            if without:
                lines += [f"**No control (α + β|Z|, β 0) beside the symmetric loss on {', '.join(without)}.**", ""]
        several = mine[mine.groupby(["arm", "env"]).seed.transform("size") > 1]
        if several.groupby("env").arm.nunique().max() < 2 or several.empty:
            lines += ["No aggregates: they need two arms with two seeds in one environment.", ""]
            continue
        baseline = next((arm for arm in BASELINES if arm in set(several.arm)), several.arm.iloc[0])
        found = aggregate(several, baseline, args.reps)
        collected.append(found.assign(script=script, noise=noise))
        lines += aggregates(mine, several, baseline, found)
        title = "without noise" if noise == "none" else f"noise {noise}"
        path = args.out / f"profiles_{script.removesuffix('.py')}_{noise}.png"
        profiles.append(draw_profiles(several, baseline, args.reps, title, path).assign(script=script, noise=noise))
    draw_curves(runs, curves, args.out / "curves.png")
    shares = draw_sign_changes(runs, curves, args.out / "sign_changes.png")
    draw_betas(runs, args.out / "betas.png")
    if len(shares):
        lines += ["### Advantages whose sign normalisation changes", "", "| | share (range of the runs) |", "|---|---|"]
        for (env, noise), group in shares.groupby(["env", "noise"]):
            values = group.value * 100
            lines.append(f"| {env}, noise {noise} | {values.mean():.1f} % ({values.min():.1f} to {values.max():.1f}) |")
    pictures = [("curves.png", "learning curves"), ("betas.png", "scores by beta"), ("sign_changes.png", "sign changes")]
    pictures += [(path.name, "performance profile") for path in sorted(args.out.glob("profiles_*.png"))]
    lines += ["", *(f"![{text}]({name})" for name, text in pictures if (args.out / name).exists())]
    here = ["folder", "run_dir", "resume"]  # paths of this machine
    runs.drop(columns=[*here, "env", "arm", "steps"], errors="ignore").to_csv(args.out / "runs.csv", index=False)
    table.to_csv(args.out / "cells.csv", index=False, float_format="%.8g")
    write_curves(curves, args.out / "curves.csv")
    if collected:
        pd.concat(collected).to_csv(args.out / "aggregates.csv", index=False, float_format="%.6g")
        pd.concat(profiles).to_csv(args.out / "profiles.csv", index=False, float_format="%.6g")
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
