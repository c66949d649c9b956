"""One picture of fact 2: in a real run the symmetric PPO lies on its control until rounding changes an action. PPO does not.

    python benchmark/studies/one_gradient.py benchmark/results/continuous-ppo-lunarlander

The folder is one of benchmark/report.py, with runs.csv and curves.csv. One seed of one environment: the symmetric loss, its
control (alpha + beta |Z|, beta 0) and the baseline (alpha 1, beta 0). Prints the last step up to which two runs log the same
return to six digits, and writes the picture.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
try:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import tyro
    from reporting.figures import ARM_COLOURS, CONTROL, save
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """a report's folder"""
    seed: int = 1
    """seed of the three runs"""
    noise: str = "gaussian"
    """noise of the three runs"""
    steps: int = 26_000
    """steps to draw"""
    out: Path = ROOT / "benchmark/results/one-gradient/one_gradient.png"
    """the picture, as .svg and as .png"""


def last_equal(one: pd.Series, other: pd.Series) -> int:
    """The last step up to which two curves, indexed by step, are equal to six digits; 0 if they never are."""
    same = one.map("{:.6g}".format) == other.reindex(one.index).map("{:.6g}".format)
    return int(one.index[same.cumprod().astype(bool)].max()) if len(same) and same.iloc[0] else 0


def load(args: Args) -> tuple[dict[str, pd.Series], dict]:
    """The three returns by step, and the symmetric run's row of runs.csv."""
    runs = pd.read_csv(args.folder / "runs.csv")
    runs = runs[(runs.seed == args.seed) & (runs.noise == args.noise) & (runs.get("num_bins", 11) != 0)]
    symmetric = runs[runs.beta > 0].iloc[0]
    plain = runs[runs.beta == 0].set_index("alpha").run_id
    ids = {"symmetric": symmetric.run_id, "control": plain[symmetric.alpha + symmetric.beta], "baseline": plain[1.0]}
    curves = pd.read_csv(args.folder / "curves.csv")
    curves = curves[curves.tag.isin(["charts/episodic_return", "objective/scores"])].set_index("step")
    return {name: curves[run_id].dropna() for name, run_id in ids.items()}, symmetric.to_dict()


def main(args: Args) -> None:
    curves, run = load(args)
    parted = {name: last_equal(curves["symmetric"], curves[name]) for name in ("control", "baseline")}
    print(f"equal to the control up to step {parted['control']:,}, to the baseline up to {parted['baseline']:,}")
    weight = run["alpha"] + run["beta"]
    figure, axis = plt.subplots(figsize=(8, 3.6))
    ppo = "DPPO" if "continuous" in run["script"] else "PPO"
    sppo = ppo.replace("PPO", "SPPO")
    for name, colour, style, width, label in (
        ("baseline", ARM_COLOURS[ppo], "-", 1.5, f"{ppo}: α 1, β 0"),
        ("symmetric", ARM_COLOURS[sppo], "-", 4.0, f"{sppo}: α {run['alpha']:g}, β {run['beta']:g}"),
        ("control", CONTROL, "--", 1.5, f"control, {ppo} with the same gradient: α {weight:g}, β 0"),
    ):
        curve = curves[name][curves[name].index <= args.steps]
        axis.plot(curve.index, curve, style, color=colour, linewidth=width, label=label)
    axis.axvline(parted["control"], color="#999999", linewidth=1)
    text = (
        f"{sppo} and control: equal to six digits\nup to here ({parted['control']:,} steps),\nthen rounding changes an action"
    )
    axis.annotate(text, (parted["control"], axis.get_ylim()[0]), (-6, 6), textcoords="offset points", fontsize=8, ha="right")
    axis.set(xlabel="environment steps", ylabel="return while training")
    noise = "without noise" if run["noise"] == "none" else "with reward noise"
    axis.set_title(f"{run['env_id']} {noise}, {run['script']}, seed {args.seed}: one run each", fontsize=9)
    axis.legend(fontsize=8)
    save(figure, args.out)
    command = f"python {os.path.relpath(__file__, ROOT)} {os.path.relpath(args.folder, ROOT)}"
    what = f"seed {args.seed} of {run['env_id']} {noise}, {run['script']}"
    args.out.with_name("report.md").write_text(
        f"`{command}`: {what}; torch {run['versions.torch']}; commit {run['commit']}.\n\n"
        f"{sppo} (α {run['alpha']:g}, β {run['beta']:g}) logs the same returns as its control (α {weight:g}, β 0)\n"
        f"to six digits up to step {parted['control']:,}, and as {ppo} (α 1, β 0) up to step {parted['baseline']:,}.\n\n"
        f"![one gradient]({args.out.with_suffix('.svg').name})\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
