"""Draws the pictures of benchmark/results/learning-*/ again, from their runs.json and curves.csv, by report.py's draw_curves.

    python benchmark/studies/learning_pictures.py

These runs are older than run.py, and their files have columns of their own, which report.py does not read.
"""

import json
import re
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))
try:
    import pandas as pd
    from reporting import figures
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)

NAMES = {"ppo": "PPO", "a2c": "A2C", "sppo": "SPPO", "dppo": "DPPO", "dsppo": "DSPPO"}


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs (a row each, with the columns that draw_curves wants) and curves (run_id, tag, step, value)."""
    curves = pd.read_csv(folder / "curves.csv").rename(columns={"global_step": "step", "episodic_return": "value"})
    if "kind" in curves:
        curves["tag"] = curves.kind.map({"train": "charts/episodic_return", "eval": "eval/episodic_return"})
    curves["run_id"] = curves.arm + "_" + curves.seed.astype(str)

    saved = json.loads((folder / "runs.json").read_text())
    if isinstance(saved, list):
        saved = {f"{run['arm']}_{run['seed']}": run for run in saved}
    rows = []
    for run_id, arm in dict(zip(curves.run_id, curves.arm, strict=True)).items():
        theirs = arm.startswith(
            "sb3"
        )  # Stable-Baselines3's runs are in curves.csv alone; ours of the same kind are beside them
        kind = arm.removeprefix("sb3_").replace("sb3", "ppo")
        command = saved[f"{kind}_1" if theirs else run_id]["command"]
        script, options = command.split()[1], dict(re.findall(r"--(\S+) ([^-\s]\S*)", command))
        name = NAMES.get(kind, "control DPPO" if "continuous" in script else "control PPO")
        row = {"run_id": run_id, "script": script, "arm": arm}
        row |= {"method": "sb3" if theirs else name, "env": options.get("env-id") or script[10:14]}  # imdb, tldr
        row |= {name: float("nan") if theirs else float(options[name]) for name in ("alpha", "beta")}
        rows.append(row | {"noise": options.get("noise", "none"), "iterations": 1 if "rlhf" in script else None})
    return pd.DataFrame(rows), curves[["run_id", "tag", "step", "value"]]


def main() -> None:
    for folder in sorted((BENCHMARK / "results").glob("learning-*")):
        runs, curves = read(folder)
        figures.draw_curves(runs, curves, folder / "curves.svg")
        if runs.iterations.notna().any():
            what = "KL to the reference, nats"
            figures.draw_curves(runs, curves, folder / "kl.svg", tags=("objective/kl",), what=what)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    main()
