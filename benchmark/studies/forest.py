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

HEADS = {"SPPO": "SPPO, Atari", "SA2C": "SA2C, Atari", "DSPPO": "DSPPO, MuJoCo and Box2D", "DSA2C": "DSA2C, MuJoCo and Box2D"}


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
    """A line a symmetric arm, noise and folder (of a task or several): name, seeds, per cent of the paper's length, chances."""
    rows = []
    for path in sorted((BENCHMARK / "results").glob("*/aggregates.csv")):
        runs = load_runs((path.with_name("runs.csv"),))
        chances = pd.read_csv(path).query("what == 'P(arm > other)'").set_index(["script", "noise", "arm", "other"])
        for (script, noise), group in runs.groupby(["script", "noise"]):
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
                tasks = [env.split("-v")[0].removesuffix("Continuous") for env in group.env.unique()]
                task = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"  # the report's chance is their mean
                name = f"{own.method}, {task}, {'no noise' if noise == 'none' else 'noise'}"
                several = runs[runs.script == script].groupby(["env", "noise", "method"]).arm.nunique().max() > 1
                name += f", β {own.beta:g}" if several and "factored" not in own.method else ""
                name += ", fresh seeds" if group.seed.min() > 1 else ""
                row = {
                    "name": name,
                    "family": own.method.split()[0],
                    "percent": min(percent_of_papers(run) for _, run in group[group.arm == arm].iterrows()),
                    "seeds": int(group[group.arm == arm].groupby("env").size().min()),
                    "folder": path.parent.name,
                }
                row["raw"] = arms.method[bases[0]] == "PPO raw"
                for what, others in (("baseline", bases), ("control", controls.index[alike])):
                    if len(others):
                        found = chances.loc[(script, noise, arm, others[0])]
                        row |= {f"{what}_{key}": found[key] for key in ("value", "low", "high")}
                rows.append(row)
    table = pd.DataFrame(rows)
    table["place"] = table.family.map(list(HEADS).index) + 0.5 * table.name.str.contains("factored")
    return table.sort_values(["place", "percent", "name"], ascending=[True, False, True], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8.5, 0.34 * (len(table) + table.family.nunique()) + 1.4))
    looks = {"baseline": (-0.15, "o", ARM_COLOURS["SPPO"], ARM_COLOURS["SPPO"]), "control": (0.15, "s", CONTROL, "white")}
    places, labels, y = [], [], 0
    for family, rows in table.groupby("family", sort=False):
        axis.text(-0.04, y, HEADS[family], fontsize=8.5, fontweight="bold", va="center", ha="right")
        for row in rows.itertuples():
            y += 1
            places.append(y)
            labels.append(row.name.removeprefix(family).removeprefix(", ").strip() + (" *" if row.raw else ""))
            for what, (shift, marker, colour, face) in looks.items():
                value, low, high = (getattr(row, f"{what}_{key}") for key in ("value", "low", "high"))
                width = 0.7 if row.seeds <= 3 else 2.2
                axis.plot([low, high], [y + shift] * 2, color=colour, linewidth=width, solid_capstyle="butt")
                axis.plot(value, y + shift, marker, color=colour, markersize=4.5, markerfacecolor=face)
            axis.text(1.04, y, f"{row.percent:.0f} %, {row.seeds} seeds", fontsize=8, va="center")
        y += 1
    for what, (_, marker, colour, face) in looks.items():
        axis.plot([], [], marker, color=colour, markerfacecolor=face, linestyle="-", label=f"against its {what}")
    axis.text(1.04, 0, "length, seeds", fontsize=8.5, fontweight="bold", va="center")
    axis.axvline(0.5, color="#555555", linewidth=1, zorder=0)
    axis.set_yticks(places, labels, fontsize=8)
    axis.set(xlim=(-0.02, 1.02), ylim=(y - 0.2, -0.8))
    axis.set_xlabel("chance that a run of the symmetric loss scores higher; 0.5: no difference", fontsize=9)
    title = "Does the symmetric loss score higher than the plain loss, and than the plain loss with the same weight?"
    note = (
        "Baseline: plain loss (* with raw advantages). Control: plain loss with the symmetric loss's weight. Bars: bootstrap\n"
        "intervals over the seeds, thin where there are two or three, too few to trust them. Length: per cent of the paper's."
    )
    figure.suptitle(title, fontsize=9.5, fontweight="bold", y=0.98)
    axis.set_title(note, fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -2 / y), ncols=2)
    save(figure, path)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    draw(cells(), BENCHMARK.parent / "docs/forest.svg")
    print({seeds: f"{100 * misses(seeds):.1f} %" for seeds in (3, 5, 11)})
