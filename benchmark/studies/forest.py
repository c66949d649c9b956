"""Draws docs/forest.png: of all our cells, the chance that the symmetric loss scores above its baseline and its control.

    python benchmark/studies/forest.py

Reads benchmark/results/*/runs.csv and aggregates.csv. The intervals are the reports', bootstraps over the seeds, and hold 0.5
less often than 95 % of intervals should where there is no effect: `misses` simulates how often.
"""

import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))
try:
    import numpy as np
    import pandas as pd
    from reporting.arms import BASELINES, FAMILIES, SYMMETRIC, hyperparameters
    from reporting.figures import ARM_COLOURS, CONTROL, plt, save
    from reporting.runs import load_runs
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    needs = f"needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs"
    print(f"{Path(__file__).name}: error: {needs}", file=sys.stderr)
    sys.exit(2)

SHORT = {"InvertedDoublePendulum": "IDP", "LunarLanderContinuous": "LunarLander"}


def misses(seeds: int, trials: int = 4000, reps: int = 2000) -> float:
    """Share of 95 % bootstrap intervals of P(X > Y) that miss 0.5 where X and Y are alike: `seeds` normal scores each."""
    rng, outside = np.random.default_rng(0), 0
    for _ in range(trials):
        x, y = rng.normal(size=(2, seeds))
        wins = (x[:, None] > y).astype(float)
        i, j = rng.integers(seeds, size=(2, reps, seeds))
        low, high = np.quantile(wins[i[:, :, None], j[:, None, :]].mean((1, 2)), [0.025, 0.975])
        outside += not low <= 0.5 <= high
    return outside / trials


def percent_of_papers(run: pd.Series) -> float:
    """The run's length in per cent of the paper's."""
    family, algorithm = FAMILIES[run.script]
    paper = hyperparameters()[family]
    length = paper[algorithm].get("total_timesteps", paper.get("total_timesteps"))
    return 100 * run.steps / (length[run.env] if isinstance(length, dict) else length)


def cells() -> pd.DataFrame:
    """A line a symmetric arm, task and noise: name, seeds, per cent of the paper's length, chances with intervals."""
    rows = []
    for path in sorted((BENCHMARK / "results").glob("*/aggregates.csv")):
        runs = load_runs((path.with_name("runs.csv"),))
        chances = pd.read_csv(path).query("what == 'P(arm > other)'").set_index(["script", "noise", "arm", "other"])
        for (script, env, noise), group in runs.groupby(["script", "env", "noise"]):
            arms = group.drop_duplicates("arm").set_index("arm")
            bases = [arm for arm in arms.index if arms.method[arm] in BASELINES[:2]]  # Gaussian in continuous tasks
            bases = [arm for arm in arms.index if arms.method[arm] in BASELINES[2:]] or bases
            bases = bases or [arm for arm in arms.index if arms.method[arm] == "PPO raw"]
            for arm in arms.index[arms.method.str.split().str[0].isin(SYMMETRIC)]:
                own = arms.loc[arm]
                controls = arms[arms.method.str.startswith("control")]
                if "a2c" in script:
                    alike = (controls.beta == own.beta) & ("factored" not in own.method)
                else:
                    alike = np.isclose(controls.alpha, own.alpha + own.beta * abs(own.Z))
                task = env.split("-v")[0]
                name = f"{own.method}, {SHORT.get(task, task)}, {'no noise' if noise == 'none' else 'noise'}"
                several = runs[runs.script == script].groupby(["env", "noise", "method"]).arm.nunique().max() > 1
                name += f", β {own.beta:g}" if several and "factored" not in own.method else ""
                row = {
                    "name": name,
                    "percent": percent_of_papers(own),
                    "seeds": int((group.arm == arm).sum()),
                    "folder": path.parent.name,
                }
                row |= {"first": int(group.seed.min()), "raw": arms.method[bases[0]] == "PPO raw"}
                for what, others in (("baseline", bases), ("control", controls.index[alike])):
                    if len(others):
                        found = chances.loc[(script, noise, arm, others[0])]
                        row |= {f"{what}_{key}": found[key] for key in ("value", "low", "high")}
                rows.append(row)
    return pd.DataFrame(rows).sort_values(["name", "first", "percent"], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(table) + 1.6))
    looks = {"baseline": (-0.13, "o", ARM_COLOURS["SPPO"]), "control": (0.13, "s", CONTROL)}
    for what, (shift, marker, colour) in looks.items():
        for i, row in table.iterrows():
            value, low, high = (row.get(f"{what}_{key}") for key in ("value", "low", "high"))
            if not np.isnan(value):
                axis.plot(
                    [low, high], [i + shift] * 2, color=colour, linewidth=0.7 if row.seeds <= 3 else 2.2, solid_capstyle="butt"
                )
                axis.plot(
                    value,
                    i + shift,
                    marker,
                    color=colour,
                    markersize=4.5,
                    markerfacecolor=colour if what == "baseline" else "white",
                )
        axis.plot(
            [],
            [],
            marker,
            color=colour,
            markerfacecolor=colour if what == "baseline" else "white",
            label=f"against its {what}",
            linestyle="-",
        )
    axis.axvline(0.5, color="#555555", linewidth=1, zorder=0)
    names = [f"{row.name_}{' *' if row.raw else ''}" for row in table.rename(columns={"name": "name_"}).itertuples()]
    axis.set_yticks(range(len(table)), names, fontsize=8)
    for i, row in table.iterrows():
        seeds = f"{row.seeds} seeds" + (f" from {row['first']}" if row["first"] > 1 else "")
        axis.text(1.03, i, f"{seeds}, {row.percent:.0f} %", fontsize=8, va="center")
    axis.set(
        xlim=(-0.02, 1.02),
        ylim=(len(table) - 0.5, -0.5),
        xlabel="chance that a run of the symmetric loss scores above the other",
    )
    title = (
        "Bars: bootstrap intervals over the seeds; thin ones are of three seeds. Right: seeds, per cent of the paper's length."
    )
    axis.set_title(f"{title}\n* beside PPO with raw advantages", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -1.6 / len(table)), ncols=2)
    save(figure, path)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    draw(cells(), BENCHMARK.parent / "docs/forest.svg")
    print({seeds: f"{100 * misses(seeds):.1f} %" for seeds in (3, 5, 11)})
