"""One task at the paper's length: each seed a thin line, the mean a thick one, the paper's two numbers at the end.

    python benchmark/studies/full_length.py benchmark/results/atari-ppo-stargunner

The folder is one of benchmark/report.py, with runs.csv and curves.csv of one Atari game and PPO. Lines are returns while
training, smoothed as in report.py's curves, dots the final scores of ten episodes. Writes full_length.svg and full_length.png
there.
"""

import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))
try:
    import pandas as pd
    from matplotlib.ticker import EngFormatter, StrMethodFormatter
    from reporting.arms import order, roles_of
    from reporting.figures import curve_table, plt, save, styles
    from reporting.runs import load_runs
    from reporting.tables import RETURNS, load_curves
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    needs = f"needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs"
    print(f"{Path(__file__).name}: error: {needs}", file=sys.stderr)
    sys.exit(2)


def papers(env: str, noise: str) -> pd.DataFrame:
    """The paper's PPO and SPPO, a line each: mean, stderr."""
    scores = pd.read_csv(BENCHMARK / "paper/scores.csv").query("env == @env and noise == @noise")
    return scores[scores.algo.isin(["PPO", "SPPO"])].set_index("algo")[["mean", "stderr"]]


def main(folder: Path) -> None:
    runs = load_runs((folder / "runs.csv",))
    curves, _ = load_curves(runs, (folder / "runs.csv",))
    table = curve_table(curves[curves.tag.isin(RETURNS)])
    looks, roles, end = styles(runs), roles_of(runs), runs.steps.max()
    figure, axis = plt.subplots(figsize=(8, 4.2))
    for arm in order(list(roles), roles):
        own, colour = runs[runs.arm == arm], looks[arm]["color"]
        axis.plot(table.index, table[own.run_id], color=colour, linewidth=0.7, alpha=0.7)
        what = f"{arm}: {own.score.mean():,.0f} at the end, {len(own)} seed{'s' * (len(own) > 1)}"
        mean = table[own.run_id].dropna().mean(axis=1)  # where each seed has a value
        axis.plot(mean.index, mean, color=colour, linewidth=2.4, label=what)
        axis.plot([end] * len(own), own.score, "o", color=colour, markersize=4)
    for (algorithm, row), marker in zip(papers(runs.env.iloc[0], runs.noise.iloc[0]).iterrows(), "sD", strict=True):
        label = f"the paper's {algorithm}: {row['mean']:,.0f} ± {row['stderr']:,.0f}"
        axis.errorbar(1.03 * end, row["mean"], row["stderr"], fmt=marker, color="#555555", capsize=3, label=label)
    axis.set(xlabel="environment steps", ylabel="return: lines while training, dots at the end", yscale="log")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set_title(f"{runs.env.iloc[0]}, noise {runs.noise.iloc[0]}, {runs.script.iloc[0]}", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, folder / "full_length.svg")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    main(Path(sys.argv[1]))
