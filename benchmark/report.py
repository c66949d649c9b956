"""Tables and figures from finished runs, in the paper's layout, with its published numbers beside ours.

    python benchmark/report.py runs/grid/continuous-ppo             # every finished run below a folder
    python benchmark/report.py --wandb ENTITY/PROJECT               # every finished run of a W&B project, with its curves
    python benchmark/report.py runs/a runs/b/runs.csv --out reports/mine --allow-mixed

A run's score is the mean over the episodes of its last evaluation (`--eval-episodes`, 10), a cell the mean over seeds ± its
standard error. Writes into --out

    report.md       tables by noise: best in bold, wins, returns while training, aggregates, sign changes (Figure 2)
    runs.csv        one line a run; may be given back to this script, with curves.csv beside it
    cells.csv       one line a cell: mean, standard error, seeds; the paper's
    aggregates.csv  interquartile mean and probability of improvement with 95 % stratified bootstrap intervals (rliable)
    curves.csv      learning curves, advantage sign changes and shares of the gradient: tag, step, a column a run
    *.svg, *.png    learning curves (Figure 3), the policy's share of the gradient, KL (RLHF)

An arm is called by its runs' --exp-name, which run.py takes from the TOML file; runs of our scripts without one as our grids
call an arm with such settings (ppo, sppo, control). A control has alpha = a symmetric arm's alpha + beta |Z| (A2C:
--mean-weight). The baseline is the TOML file's `baseline`, which W&B does not know, else PPO or A2C. The paper's numbers stand
beside an arm only if it is of one of our scripts with the paper's settings; the length may differ.

Runs of an arm whose settings, lengths or versions differ are refused, unless --allow-mixed, which says so in the report. Runs
that have not finished, and curves that end early or have a hole, are left out, and named.
"""

import re
import sys
from pathlib import Path

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import pandas as pd
    import tyro
    from pydantic import PositiveInt
    from pydantic.dataclasses import dataclass
    from reporting import figures, runs, tables
    from reporting.arms import fail, order, roles_of
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)


@dataclass
class Args:
    sources: tyro.conf.Positional[tuple[Path, ...]]
    """folders, searched for finished runs, and runs.csv of other reports"""
    out: Path = Path("report")
    """folder to write into"""
    wandb: str | None = None
    """ENTITY/PROJECT, whose finished runs and curves are read from W&B"""
    allow_mixed: bool = False
    """report although settings, lengths or versions differ, and say so"""
    reps: PositiveInt = 2000
    """bootstrap samples"""


def first_lines(found: pd.DataFrame, mixture: list[str], curves: pd.DataFrame, lacking: list[str]) -> list[str]:
    """What was made where, what a score is, and all that was left out."""
    made = []
    for name, column in found.reindex(columns=["commit", "device"]).fillna("unknown").items():
        values = sorted({re.sub("([0-9a-f]{12})[0-9a-f]{28}", r"\1", value) for value in column})
        made.append(f"{name} {values[0]}" if len(values) == 1 else f"**{len(values)} {name}s: {', '.join(values)}**")
    lines = [
        f"{len(found)} runs, {found.seconds.sum() / 3600:.1f} hours of training; {'; '.join(made)}. A score is the mean over "
        "the episodes of a run's last evaluation, of the trained policy without noise; actions are sampled on Atari and IMDB, "
        "greedy elsewhere. Mean ± standard error of the seeds (their number) [the paper's, at its own length and settings, of "
        "the last 10 episodes]; our best in bold."
    ]
    left_out, without = found.attrs["left out"], len(found) - curves.run_id.nunique() - len(lacking)
    if left_out:
        lines.append(f"**Left out: {'; '.join(left_out)}. What is left may flatter these arms.**")
    if lacking:
        lines.append(f"**Curves left out, as their files are damaged or not whole: {'; '.join(lacking)}.**")
    if without:
        lines.append(f"{without} runs have no curves here.")
    elif not curves.tag.isin(tables.RETURNS).any():
        lines.append("No learning curves: no episode ended in these runs.")
    lines = [part for line in lines for part in (line, "")]
    return lines + (["**Mixed on request:**", "", *(f"* {text}" for text in mixture), ""] if mixture else [])


def section(mine: pd.DataFrame, cells: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """The tables of one script and noise, without its aggregates."""
    script, noise, roles = mine.script.iloc[0], mine.noise.iloc[0], roles_of(mine)
    lengths = ", ".join(f"{step:,.0f}" for step in sorted(mine.steps.dropna().unique()))
    unit = "iterations" if "iterations" in mine and mine.iterations.notna().any() else "steps"
    lines = [f"### {script}, {'without noise' if noise == 'none' else f'noise {noise}'}; {lengths} {unit}", ""]
    lines += [tables.describe_arms(mine), "", *tables.scores(cells, roles), ""]
    beside = order(list(mine[(mine.script == "sppo_atari.py") & (mine.paper == "PPO")].arm.unique()), roles)
    if beside and cells.paper_mean.notna().any():
        text = f"The paper's PPO stands beside {' and '.join(beside)}: its released script does not normalise its advantages; "
        lines += [f"{text}whether its table was made so is not known (docs/loss.md, fact 7).", ""]
    lines += tables.training(mine, curves) + tables.gradient(mine, curves) + tables.measures(mine)
    symmetric = mine[(mine.beta > 0) & mine.method.str.contains("SPPO")]
    if without := sorted(set(symmetric.env) - set(mine[mine.method.str.startswith("control")].env)):
        lines += [f"**No control (α + β|Z|, β 0) beside the symmetric loss on {', '.join(without)}.**", ""]
    return lines


def main(args: Args) -> None:
    if not args.sources and not args.wandb:
        fail("expected folders with finished runs, runs.csv of a report, or --wandb; see --help")
    found = runs.load_runs(args.sources, args.wandb)
    mixture = runs.find_mixture(found)
    if mixture and not args.allow_mixed:
        rest = f"; and {len(mixture) - 1} more differences" if len(mixture) > 1 else ""
        fail(f"the runs differ: {mixture[0]}{rest}; expected alike ones, or --allow-mixed, which reports them and says so")
    cells = tables.cells(found)
    curves, lacking = tables.load_curves(found, args.sources)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: expected a folder to write in ({error.strerror})")
    pictures = {"curves": "learning curves", "kl": "KL while training", "grad_shares": "the policy's share of the gradient"}
    for name in ("aggregates.csv", *(f"{name}{suffix}" for name in pictures for suffix in (".svg", ".png"))):
        (args.out / name).unlink(missing_ok=True)  # of an earlier report, which this one may not replace
    lines, aggregates = first_lines(found, mixture, curves, lacking), []
    for (script, noise), mine in found.groupby(["script", "noise"]):
        lines += section(mine, cells[(cells.script == script) & (cells.noise == noise)], curves)
        several = mine[mine.groupby(["arm", "env"]).seed.transform("size") > 1]
        if several.empty or several.groupby("env").arm.nunique().max() < 2:
            lines += ["No aggregates: they need two arms with two seeds in one environment.", ""]
            continue
        roles = roles_of(mine)
        baseline = order(list(several.arm.unique()), roles)[0]
        table = tables.aggregate(several, baseline, args.reps)
        aggregates.append(table.assign(script=script, noise=noise))
        lines += tables.aggregates(mine, several, baseline, table)
    figures.draw_curves(found, curves, args.out / "curves.svg")
    figures.draw_curves(found, curves, args.out / "kl.svg", ("objective/kl",), "KL to the reference, nats")
    share = tables.GRADIENT["policy"]
    figures.draw_curves(found, curves, args.out / "grad_shares.svg", (share,), "policy's share of the gradient")
    lines += tables.signs(found, curves)
    lines += ["", *(f"![{text}]({name}.svg)" for name, text in pictures.items() if (args.out / f"{name}.svg").exists())]
    made_here = ["env", "arm", "given", "method", "paper", "steps", "run_script"]
    paths = ["folder", "wandb", "run_dir", "resume"]  # of this machine
    table = found.assign(script=found.run_script).drop(columns=[*made_here, *paths], errors="ignore")
    files = {"runs.csv": table.to_csv(index=False), "cells.csv": cells.to_csv(index=False, float_format="%.8g")}
    files |= {"curves.csv": tables.curves_csv(curves), "report.md": "\n".join(lines) + "\n"}
    if aggregates:
        files["aggregates.csv"] = pd.concat(aggregates).to_csv(index=False, float_format="%.6g")
    for name, text in files.items():
        figures.write_whole(args.out / name, text)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
