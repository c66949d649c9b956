"""Draws docs/dashboard.png: what dashboard.py's view shows, from the numbers of runs on this machine.

    python dsppo_continuous.py --env-id InvertedPendulum-v4 --noise gaussian --exp-name dsppo --run-dir runs/dash
    python benchmark/studies/dashboard_picture.py runs/dash

A panel of the view is an axis here, a group of runs a line: mean and standard error of an arm's seeds, in the view's colours.
"""

import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))
try:
    import pandas as pd
    from dashboard import SECTIONS
    from reporting.arms import order, roles_of
    from reporting.figures import plt, save, styles
    from reporting.runs import load_runs
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    needs = f"needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs"
    print(f"{Path(__file__).name}: error: {needs}", file=sys.stderr)
    sys.exit(2)


def read(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """metric -> values by step and run, of what the runs have logged."""
    points = []
    for run in runs.itertuples():
        events = EventAccumulator(run.folder, size_guidance={"scalars": 0}).Reload()
        points += [(tag, each.step, run.run_id, each.value) for tag in events.Tags()["scalars"] for each in events.Scalars(tag)]
    table = pd.DataFrame(points, columns=["tag", "step", "run_id", "value"])
    return {tag: group.pivot_table(index="step", columns="run_id", values="value") for tag, group in table.groupby("tag")}


def main(folder: Path) -> None:
    runs = load_runs((folder,))
    values, style, roles = read(runs), styles(runs), roles_of(runs)
    sections = {name: [each for each in panels.items() if each[1] in values] for name, panels in SECTIONS.items()}
    sections = {name: panels for name, panels in sections.items() if panels}
    columns = max(map(len, sections.values()))
    figure, axes = plt.subplots(len(sections), columns, figsize=(2.9 * columns, 2.5 * len(sections)), squeeze=False)
    for row, (name, panels) in zip(axes, sections.items(), strict=True):
        row[0].text(0, 1.25, name, transform=row[0].transAxes, fontsize=10, weight="bold")
        [axis.set_axis_off() for axis in row[len(panels) :]]
        for axis, (title, metric) in zip(row, panels, strict=False):
            for arm in order(list(roles), roles):
                table = values[metric].reindex(columns=runs[runs.arm == arm].run_id).interpolate(limit_area="inside").dropna()
                mean, error, colour = table.mean(axis=1), table.sem(axis=1), style[arm]["color"]
                look = {"marker": "o"} if len(mean) == 1 else {}
                axis.plot(mean.index, mean, color=colour, linewidth=1.2, label=f"{runs.env[0]}, {arm}", **look)
                axis.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0][-1].legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="center")
    save(figure, BENCHMARK.parent / "docs/dashboard.svg")


if __name__ == "__main__":
    if len(sys.argv) != 2 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    main(Path(sys.argv[1]))
