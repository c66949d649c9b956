"""The tables of a report: cells, wins, interquartile means and chances (rliable), training, gradients, RLHF."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reporting.arms import BENCHMARK, is_reference, order, roles_of, shown, what_differs

RETURNS = ("charts/episodic_return", "objective/scores")
SIGNS = "charts/adv_sign_change"
GRADIENT = {
    "policy": "losses/grad_share_policy",
    "value": "losses/grad_share_value",
    "entropy": "losses/grad_share_entropy",
    "reference text": "losses/grad_share_reference",
    "steps that the clip cuts": "losses/grad_clipped",
}
KEPT = (*RETURNS, SIGNS, "objective/kl", *GRADIENT.values())  # in curves.csv


def table_of(head: list, rows: list[list]) -> list[str]:
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return [lines[0].replace("|  |", "| |").replace("|  |", "| |"), "|---" * len(head) + "|", *lines[1:]]


def number(value: float) -> str:
    places = {100: ",.0f", 10: ".1f", 0.1: ".2f"}
    return format(value, next((form for least, form in places.items() if abs(value) >= least), ".2g" if value else ".2f"))


def with_error(mean: float, error: float) -> str:
    """The mean to the place of the error's second digit; alone, if there is no error to tell."""
    if not error > 0:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}"


def mean_of(values: pd.Series) -> str:
    """Mean ± standard error of the seeds (their number)."""
    return f"{with_error(values.mean(), values.sem())} ({len(values)})" if len(values) else ""


# --- curves -----------------------------------------------------------------------------------------------------------


def shortfall(points: pd.DataFrame, end: float) -> str | None:
    """What a run's curve lacks, as text; None if it is whole. points: tag, step of one run, which ended at the step `end`.

    Every iteration that is logged logs the share of changed signs: these steps are evenly spaced and the last is the run's.
    RLHF logs none: its returns may miss twice their longest gap at the end and a quarter of the run in between.
    """
    even = points.tag.eq(SIGNS).any()
    steps = np.unique(points[points.tag.eq(SIGNS) if even else points.tag.isin(RETURNS)].step)
    if not len(steps):
        return "has no returns"
    gaps = np.diff([0, *steps])
    if end - steps[-1] > (0 if even else 2 * gaps.max()):  # False if the end is not known
        return f"ends at {steps[-1]:,.0f} of {end:,.0f} steps"
    usual = np.quantile(gaps, 0.5, method="higher")  # of two gaps, the second may be the run's short end
    if gaps.max() > (1.5 * usual if even else max(0.25 * steps[-1], 5 * np.median(gaps))):
        return f"has a hole before step {steps[gaps.argmax()]:,.0f}"
    return None


def load_curves(runs: pd.DataFrame, sources: tuple[Path, ...]) -> tuple[pd.DataFrame, list[str]]:
    """Points of KEPT of the runs in folders and in W&B, and of those from a csv that has curves.csv beside it. A damaged event
    file ends the curve there without a word, so that curves which lack something are left out; the second value says which."""
    columns, tables = ["run_id", "tag", "step", "value"], []
    for run in runs.reindex(columns=["run_id", "folder", "wandb"]).itertuples():
        points = []
        if isinstance(run.folder, str):
            events = EventAccumulator(run.folder, size_guidance={"scalars": 0}).Reload()
            points = [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
        elif not pd.isna(run.wandb):
            history = run.wandb.scan_history()
            points = [(tag, row.get("global_step"), value) for row in history for tag, value in row.items()]
        rows = [(run.run_id, *point) for point in points if point[0] in KEPT]
        tables.append(pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:3], keep="last"))  # of a resumed run
    for path in sorted(source.with_name("curves.csv") for source in sources if source.is_file()):
        if path.exists():
            found = read_curves(path)
            tables += [own for _, own in found[found.run_id.isin(runs.run_id)].groupby("run_id")]
    about = runs.assign(end=runs.global_step.fillna(runs.steps)).set_index("run_id")
    whole, lacks = {}, {}
    for table in filter(len, tables):
        run = about.loc[table.run_id.iloc[0]]
        if lack := shortfall(table, run.end):
            lacks.setdefault(run.name, f"{run.arm}, {run.env}, noise {run.noise}, seed {shown(run.seed)}, {lack}")
        else:
            whole.setdefault(run.name, table)
    curves = pd.concat(whole.values(), ignore_index=True) if whole else pd.DataFrame(columns=columns)
    return curves.astype({"step": int, "value": float}), [text for run_id, text in lacks.items() if run_id not in whole]


def curves_csv(curves: pd.DataFrame) -> str:
    """A line a tag and step, a column a run: a fifth of the size of a line a point."""
    return curves.pivot(index=["tag", "step"], columns="run_id", values="value").to_csv(float_format="%.6g")


def read_curves(path: Path) -> pd.DataFrame:
    """run_id, tag, step, value."""
    return pd.read_csv(path).melt(["tag", "step"], var_name="run_id").dropna()[["run_id", "tag", "step", "value"]]


# --- statistics -------------------------------------------------------------------------------------------------------


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error and number of seeds of each script, environment, noise and arm, and the paper's numbers."""
    grouped = runs.groupby(["script", "env", "noise", "arm"])
    table = grouped.score.agg(mean="mean", stderr="sem", seeds="count")
    # the paper's name, if all runs of the cell have it
    table["algo"] = grouped.paper.agg(lambda names: names.iloc[0] if names.notna().all() and names.nunique() == 1 else None)
    table = table.reset_index()
    table["task"] = table.env.str.replace(r"-v\d+$", "", regex=True)
    published = pd.read_csv(BENCHMARK / "paper/scores.csv")
    published = published.rename(columns={"env": "task", "mean": "paper_mean", "stderr": "paper_stderr"})
    published = published[["task", "noise", "algo", "paper_mean", "paper_stderr"]]
    return table.merge(published, how="left", on=["task", "noise", "algo"]).drop(columns="algo")


def wins(table: pd.DataFrame, arm: str, other: str, column: str = "mean") -> str:
    """3 of 5: in how many environments the arm's mean is the higher one, and of how many that have both."""
    one, two = table.pivot(index="env", columns="arm", values=column)[[arm, other]].dropna().T.values
    same = arm == other or (column == "paper_mean" and (one == two).all())  # the paper has one PPO on Atari
    return "" if same or not len(one) else f"{(one > two).sum()} of {len(one)}"


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
    scale = base.mean(axis=0)
    return metrics.aggregate_iqm(scores / scale) / metrics.aggregate_iqm(base / scale)


def aggregate(runs: pd.DataFrame, baseline: str, reps: int) -> pd.DataFrame:
    """Interquartile mean of each arm relative to the baseline's, over the environments of `clear` that both have, and of each
    pair of arms P(arm > other) over all that both have, with 95 % stratified bootstrap intervals over the seeds of both, by
    rliable. Of many arms, P only beside baselines and controls."""
    np.random.seed(0)  # rliable draws from numpy's own generator
    roles = roles_of(runs)
    arms = order(list(roles), roles)

    def estimate(statistic, a: str, b: str, common: list[str]) -> tuple[float, float, float]:
        pair = {"pair": (matrix(runs, a, common), matrix(runs, b, common))}
        point, interval = library.get_interval_estimates(pair, lambda x, y: np.array([statistic(x, y)]), reps=reps)
        return point["pair"][0], *interval["pair"][:, 0]

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


# --- tables -----------------------------------------------------------------------------------------------------------


def describe_arms(runs: pd.DataFrame) -> str:
    """Of one script's runs: what each arm is, and the settings in which it differs."""
    texts = []
    for arm, text in what_differs(runs).items():
        mine = runs[runs.arm == arm]
        parts = [] if arm.startswith(mine.method.iloc[0]) else [mine.method.iloc[0]]
        parts += [script for script in mine.run_script.unique() if script != mine.script.iloc[0]]
        parts += [text[2:-1]] if text else []
        texts.append(f"{arm} ({', '.join(parts)})" if parts else arm)
    return f"Arms: {'; '.join(texts)}."


def scores(table: pd.DataFrame, roles: dict[str, str]) -> list[str]:
    """The rows of one script and noise: ours by arm, the paper's in brackets; the best of ours in bold; wins below two rows."""
    arms = order(list(table.arm.unique()), roles)
    rows = []
    for env, row in table.groupby("env"):
        texts = dict.fromkeys(arms, "")
        for cell in row.itertuples():
            text = with_error(cell.mean, cell.stderr)
            text = f"**{text}**" if cell.mean == row["mean"].max() and len(row) > 1 else text
            papers = "" if np.isnan(cell.paper_mean) else f" [{number(cell.paper_mean)} ± {number(cell.paper_stderr)}]"
            texts[cell.arm] = f"{text} ({cell.seeds}){papers}"
        rows.append([env, *texts.values()])
    for other in [arm for arm in arms if is_reference(roles[arm]) and len(rows) > 1]:
        texts = [(wins(table, arm, other), wins(table, arm, other, "paper_mean")) for arm in arms]
        rows.append([f"above {other}", *(f"{ours} [{papers}]" if papers else ours for ours, papers in texts)])
    return table_of(["", *arms], rows)


def measures(runs: pd.DataFrame) -> list[str]:
    """Of one script's runs that tell more than a score (RLHF): each measure before training, all runs, and after it by arm."""
    names = [name.removeprefix("after.") for name in runs if name.startswith("after.") and not name.endswith("_stderr")]
    arms, rows = order(list(runs.arm.unique()), roles_of(runs)), []
    for name in [name for name in names if runs[f"after.{name}"].notna().any()]:
        before = runs.get(f"before.{name}", pd.Series(dtype=float)).groupby(runs.seed).mean()  # the arms of a seed start as one
        columns = [before, *(runs[runs.arm == arm][f"after.{name}"] for arm in arms)]
        rows.append([name, *(with_error(x.mean(), x.sem()) if x.count() else "" for x in columns)])
    return ["Measured after training, by arm:", "", *table_of(["", "before", *arms], rows), ""] if rows else []


def training(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs: what they reached while they learned, a steadier number than one evaluation at the end."""
    merged = curves[curves.tag.isin(RETURNS)].merge(runs[["run_id", "env", "arm"]], on="run_id")
    late = merged[merged.step > 0.9 * merged.groupby("run_id").step.transform("max")]
    values = late.groupby(["env", "arm", "run_id"]).value.mean().groupby(["env", "arm"]).agg(mean_of).unstack(fill_value="")
    arms = order(list(values), roles_of(runs))
    rows = [[env, *texts] for env, *texts in values[arms].itertuples()]
    return ["While training, mean over the last tenth of it:", "", *table_of(["", *arms], rows), ""] if rows else []


def gradient(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Of one script's runs: each part's share of the gradient's squared norm, and of the steps that the clip cuts."""
    merged = curves[curves.tag.isin(GRADIENT.values())].merge(runs[["run_id", "env", "arm"]], on="run_id")
    values = merged.groupby(["env", "arm", "tag", "run_id"]).value.mean().groupby(["env", "arm", "tag"]).agg(mean_of)
    values = values.unstack(fill_value="").rename(columns={tag: name for name, tag in GRADIENT.items()})
    told, rows = [name for name in GRADIENT if name in values], []
    for env in values.index.unique("env"):
        for arm in order(list(values.loc[env].index), roles_of(runs)):
            rows.append([env, arm, *values.loc[(env, arm), told]])
    head = "Shares of the gradient's squared norm before the clip, mean over training, and of how many runs:"
    return [head, "", *table_of(["", "", *told], rows), ""] if rows else []


def signs(runs: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Figure 2: share of advantages whose sign normalisation changes, by run the mean over training."""
    merged = curves[curves.tag == SIGNS].merge(runs, on="run_id")
    shares = 100 * merged.groupby(["env", "noise", "run_id"]).value.mean()
    shares, rows = shares[shares > 0], []  # without normalisation there is none
    for (env, noise), x in shares.groupby(["env", "noise"]):
        rows.append([f"{env}, noise {noise}", f"{x.mean():.1f} % ({x.min():.1f} to {x.max():.1f})"])
    head = "### Advantages whose sign normalisation changes"
    return [head, "", *table_of(["", "share (range of the runs)"], rows)] if rows else []


def aggregates(runs: pd.DataFrame, several: pd.DataFrame, baseline: str, found: pd.DataFrame) -> list[str]:
    """What `found` says, as a table; `several` are those of the runs whose cell has two seeds or more."""
    roles, counts = roles_of(several), several.groupby(["arm", "env"]).size()
    arms = order(list(roles), roles)
    few = f", from {counts.min()} seeds and thus too narrow, as the bootstrap sees no others" if counts.min() < 10 else ""
    text = (
        f"Interquartile mean in units of {baseline}'s (each score divided by {baseline}'s mean in its environment), and chance "
        f"that a run is better than one of another arm, each over the environments that both arms have; 95 % intervals{few}."
    )
    if unclear := sorted(set(several[several.arm == baseline].env) - set(clear(several, baseline))):
        text += f" No interquartile mean over {', '.join(unclear)}, where {baseline}'s is not clearly above 0."
    if counts.groupby(level="arm").sum().min() < 4:
        text += " Of fewer than four scores it is their mean."
    if counts.min() < counts.max():
        text += " Where environments have different numbers of seeds, the first ones of each arm, as many as in its poorest."
    if single := [f"{run.arm} on {run.env}" for run in runs[~runs.index.isin(several.index)].itertuples()]:
        text += f" With one seed and left out: {', '.join(single)}."
    texts = found.apply(lambda x: f"{x.value:.2f} ({x.low:.2f} to {x.high:.2f})", axis=1)
    values = dict(zip(found[["what", "arm", "other"]].itertuples(index=False, name=None), texts, strict=True))
    values["IQM", baseline, baseline] = "1" if clear(several, baseline) else ""
    others = [arm for arm in arms if len(arms) <= 6 or is_reference(roles[arm])]
    rows = []
    for arm in arms:
        seeds = " to ".join(map(str, sorted({counts[arm].min(), counts[arm].max()})))
        chances = [values.get(("P(arm > other)", arm, other), "") for other in others]
        rows.append([arm, values.get(("IQM", arm, baseline), ""), seeds, *chances])
    head = ["", f"interquartile mean / {baseline}'s", "seeds", *(f"P(better than {arm})" for arm in others)]
    return [text, "", *table_of(head, rows), ""]
