"""The pictures of a report, as SVG and PNG: curves (Figure 3), the policy's share of the gradient, KL."""

import itertools
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, MaxNLocator

from reporting.arms import SYMMETRIC, order, roles_of, what_differs
from reporting.tables import RETURNS

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
SPARE_COLOURS = ("#009E73", "#E69F00", "#CC79A7")  # of arms of your own, in order; yellow is hard to see on white
# Arms of one colour differ by their lines. Green, purple and grey are one grey to some readers, so they begin elsewhere.
LINES = ("-", (0, (1, 0.7)), "-.", (0, (4, 1, 1, 1, 1, 1)))
FIRST_LINE = {"#009E73": 2, "#E69F00": 3, "#CC79A7": 1}
CONTROL_LINES = ("--", (0, (2, 1.5)), (0, (6, 1.5)), (0, (6, 1.5, 2, 1.5)))  # dashes of several lengths


def styles(runs: pd.DataFrame) -> dict[str, dict]:
    """Arm -> color and linestyle, for all pictures of a report. runs: its arms, with `method` and `script`.

    The colour is that of an arm's kind in ARM_COLOURS, of an unknown kind a spare one. Controls are black and dashed. Arms of
    one colour, such as one loss with two betas, differ by their lines within a script, whose axes are apart from others'.
    """
    roles, scripts = roles_of(runs), dict(zip(runs.arm, runs.script, strict=True))
    kinds = {arm: roles[arm].removeprefix("baseline ") for arm in order(list(roles), roles)}
    taken = {ARM_COLOURS.get(kind) for kind in kinds.values()}
    spare = itertools.cycle([colour for colour in SPARE_COLOURS if colour not in taken] or SPARE_COLOURS)
    found, lines = {}, Counter()
    for arm, kind in kinds.items():
        control = kind.startswith("control")
        colour = CONTROL if control else ARM_COLOURS.get(kind) or next(spare)
        looks = CONTROL_LINES if control else LINES
        line = looks[(FIRST_LINE.get(colour, 0) + lines[scripts[arm], colour]) % len(looks)]
        found[arm] = {"color": colour, "linestyle": line}
        lines[scripts[arm], colour] += 1
    return found


def spread_of(runs: pd.DataFrame) -> str:
    """mean ± standard error, 5 seeds: how many runs the arms have in one environment."""
    counts = runs.groupby(["env", "noise", "arm"]).run_id.nunique()
    least, most = counts.min(), counts.max()
    if most < 3:
        return "1 seed" if most == 1 else f"mean and each seed, {'' if least == most else '1 to '}2 seeds"
    return f"mean ± standard error, {least if least == most else f'{least} to {most}'} seeds"


def write_whole(path: Path, text: str) -> None:
    """A kill at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save(figure, path: Path) -> None:
    """As SVG and as PNG; the same numbers give the same bytes."""
    figure.tight_layout()
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
        with plt.rc_context({"svg.hashsalt": "report"}):
            figure.savefig(path.with_suffix(suffix), bbox_inches="tight", **options)
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
