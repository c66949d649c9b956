"""The pictures of a report, as SVG and PNG: curves (Figure 3), sign changes (Figure 2), shares of the gradient, profiles."""

import io
import itertools
import os
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library

from reporting.arms import SYMMETRIC, order, roles_of, what_differs
from reporting.tables import RETURNS, SIGNS, clear, matrix

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
        control = kind.startswith("control")
        colour = CONTROL if control else ARM_COLOURS.get(kind) or next(spare)
        looks = CONTROL_LINES if control else LINES
        line = looks[(FIRST_LINE.get(colour, 0) + lines[scripts[arm], colour]) % len(looks)]
        found[arm] = {"color": colour, "linestyle": line, "hatch": HATCHES[hatches[colour] % len(HATCHES)]}
        lines[scripts[arm], colour] += 1
        hatches[colour] += 1
    return found


def spread_of(runs: pd.DataFrame) -> str:
    """mean ± standard error, 5 seeds: how many runs the arms have in one environment."""
    counts = runs.groupby(["env", "noise", "arm"]).run_id.nunique()
    least, most = counts.min(), counts.max()
    if most < 3:
        return "1 seed" if most == 1 else f"mean and each seed, {'' if least == most else '1 to '}2 seeds"
    return f"mean ± standard error, {least if least == most else f'{least} to {most}'} seeds"


def write_atomically(path: Path, data: bytes) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(figure, path: Path) -> None:
    """As SVG and as PNG; the same numbers give the same bytes."""
    figure.tight_layout()
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
        buffer = io.BytesIO()
        with plt.rc_context({"svg.hashsalt": "report"}):
            figure.savefig(buffer, format=suffix[1:], bbox_inches="tight", **options)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())
    plt.close(figure)


def legend(axis) -> None:
    """Below the axis, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if len(labels) > 2 and max(map(len, labels)) <= 40 else 1
    labels = [textwrap.fill(label, 56) for label in labels]
    axis.legend(handles, labels, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns)


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
    """Figure 3: return while training by environment and noise, mean and standard error of the seeds, of two seeds both
    values; or other tags, and what they are. More than five arms: an axis for each, beside the first."""
    merged = curves[curves.tag.isin(tags)].merge(runs, on="run_id")
    if merged.empty:
        return
    roles, style, panels = roles_of(runs), styles(runs), []
    for (script, env, noise), group in merged.groupby(["script", "env", "noise"]):
        arms = order(list(group.arm.unique()), roles)
        parts = [arms] if len(arms) <= 5 else [[arms[0], arm] for arm in arms[1:]]
        title = f"{env}{'' if noise == 'none' else f', noise {noise}'}\n{script}; {spread_of(group)}"
        panels += [(title, group, part) for part in parts]
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    shape = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(4.8 * shape[1], 4 * shape[0]), squeeze=False)
    heights = {}
    for axis, (title, group, arms) in zip(axes.flat, panels, strict=False):
        values, labels = curve_table(group), what_differs(group)  # of all arms, so that they are smoothed alike
        for arm in arms:
            table = values[group[group.arm == arm].run_id.unique()].dropna()  # where each seed has a value
            mean, error, color = table.mean(axis=1), table.sem(axis=1).fillna(0), style[arm]["color"]
            # thin and on top, so that what lies under a control can be seen
            control = roles[arm].removeprefix("baseline ").startswith("control")
            look = {"linewidth": 1.3, "zorder": 3} if control else {"linewidth": 2.2}
            look |= {"marker": "o", "markersize": 4} if len(values) < 40 else {}
            axis.plot(table.index, mean, color=color, linestyle=style[arm]["linestyle"], label=arm + labels[arm], **look)
            if table.shape[1] == 2:
                axis.plot(table.index, table, ".", color=color, markersize=3, alpha=0.6)
            else:
                axis.fill_between(table.index, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        rlhf = group.iterations.notna().any() if "iterations" in group else False
        axis.set(xlabel="episodes" if rlhf else "environment steps", ylabel=what or ("score" if rlhf else "return in training"))
        axis.set_title(title, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(EngFormatter())
        legend(axis)
        heights.setdefault(id(group), []).append(axis)
    for same in heights.values():
        low, high = zip(*(axis.get_ylim() for axis in same), strict=True)
        [axis.set_ylim(min(low), max(high)) for axis in same]
    [axis.set_axis_off() for axis in axes.flat[len(panels) :]]
    save(figure, path)


def sign_changes(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Figure 2: share of advantages whose sign normalisation changes, by run the mean over training."""
    merged = curves[curves.tag == SIGNS].merge(runs, on="run_id")
    shares = merged.groupby(["script", "env", "noise", "arm", "seed", "run_id"]).value.mean().reset_index()
    return shares[shares.value > 0]  # without normalisation there is none


def draw_sign_changes(runs: pd.DataFrame, shares: pd.DataFrame, path: Path) -> None:
    """As bars, where there is more than one environment or noise; of two seeds both values as points."""
    groups = list(shares.groupby(["env", "noise"]))
    if len(groups) < 2:
        return
    figure, axis = plt.subplots(figsize=(max(6, 1.4 * len(groups) + 2.5), 4))
    roles, style, labels, handles = roles_of(runs), styles(runs), what_differs(runs), {}
    for i, (_, group) in enumerate(groups):
        arms = order(list(group.arm.unique()), roles)
        for j, arm in enumerate(arms):
            values, x = group[group.arm == arm].value * 100, i + (j + 0.5) / len(arms) * 0.8 - 0.4
            color, hatch = style[arm]["color"], style[arm]["hatch"]
            control = color == CONTROL
            look = {"color": color} if not (hatch or control) else {"fill": False, "edgecolor": color, "hatch": hatch}
            look |= {"linestyle": "--", "linewidth": 1.3} if control else {}
            handles.setdefault(arm + labels[arm], axis.bar(x, values.mean(), 0.7 / len(arms), **look))
            if len(values) == 2:
                axis.plot([x, x], values, ".", color="#555555")
            elif len(values) > 2:
                axis.errorbar(x, values.mean(), values.sem(), color="#555555", linewidth=1, capsize=2)
    names = [env if noise == "none" else f"{env}\nnoise {noise}" for (env, noise), _ in groups]
    axis.set_xticks(range(len(groups)), names, fontsize=7, **({"rotation": 20, "ha": "right"} if len(groups) > 2 else {}))
    axis.set_ylabel("advantages with another sign, %")
    axis.set_title(f"Advantages whose sign normalisation changes\n{spread_of(shares)}", fontsize=9)
    axis.legend(handles.values(), handles, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    save(figure, path)


def draw_profiles(runs: pd.DataFrame, baseline: str, style: dict[str, dict], reps: int, title: str, path: Path) -> pd.DataFrame:
    """Share of runs above a normalised score, with 95 % intervals (rliable), over the environments that all arms have.

    None of arms with fewer than ten runs: a staircase of few steps says no more than the table does.
    """
    scale = clear(runs, baseline)
    envs = sorted(set.intersection(set(scale), *runs.groupby("arm").env.agg(set)))
    arms = order(list(roles_of(runs)), roles_of(runs)) if envs else []
    scores = {arm: matrix(runs, arm, envs) / [scale[env] for env in envs] for arm in arms}
    if min((x.size for x in scores.values()), default=0) < 10:
        return pd.DataFrame()
    low, high = np.quantile(np.concatenate([x.flatten() for x in scores.values()]), [0.0, 0.95])
    taus = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 81)
    np.random.seed(0)  # rliable draws from numpy's own generator
    profiles, intervals = library.create_performance_profile(scores, taus, reps=max(100, reps // 4))
    figure, axis = plt.subplots(figsize=(5, 4))
    labels, tables = what_differs(runs), []
    for arm, (low, high) in intervals.items():
        color = style[arm]["color"]
        axis.plot(taus, profiles[arm], linestyle=style[arm]["linestyle"], color=color, label=arm + labels[arm])
        axis.fill_between(taus, low, high, color=color, alpha=0.15, linewidth=0)
        tables.append(pd.DataFrame({"arm": arm, "score": taus, "share": profiles[arm], "low": low, "high": high}))
    axis.set(xlabel=f"score / {baseline}'s mean", ylabel="share of runs above it")
    where = ", ".join(envs) if len(envs) <= 3 else f"{len(envs)} environments"
    axis.set_title(f"{title}; {where}\n95 % intervals, {spread_of(runs).split(', ')[-1]}", fontsize=9)
    legend(axis)
    save(figure, path)
    return pd.concat(tables)
