"""Learning curves of PPO, SPPO and SPPO's control beside Stable-Baselines3's PPO, on one Atari game.

    python benchmark/learning.py                              # the README's picture: 12 runs, hours on two cores
    python benchmark/learning.py --env-id UpNDown --seeds 1 2 --arms ppo sb3 --total-timesteps 100000

Runs every arm with every seed as a process of one thread, `--jobs` at a time, in runs/learning/ (a run that was killed
goes on from its checkpoint; one that is in the csv or has finished is not run again), then writes to benchmark/results/:

    learning_{env}.csv       arm, seed, kind (train, eval), global_step, episodic_return (raw score of whole games)
    learning_{env}.json      of each run of ours: command, versions, commit, seconds
    learning_{env}.md, .png  the table and the picture
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ARMS = {  # name: label, colour, arguments of sppo_atari.py (None: Stable-Baselines3)
    "ppo": ("PPO (α 1, β 0)", "tab:blue", ["--alpha", "1", "--beta", "0"]),
    "sb3": ("PPO, Stable-Baselines3", "tab:gray", None),
    "sppo": ("SPPO (α 0.5, β 10)", "tab:red", ["--alpha", "0.5", "--beta", "10"]),
    "control": ("control (α 10.5, β 0)", "tab:orange", ["--alpha", "10.5", "--beta", "0"]),
}


@dataclass
class Args:
    env_id: str = "RoadRunner"
    """the game, without a suffix"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each arm"""
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(ARMS))
    """which of ppo, sb3, sppo, control"""
    total_timesteps: int = 200_000
    """environment steps of each run"""
    jobs: int = os.cpu_count()
    """processes at a time"""
    plot_only: bool = False
    """make the table and the picture from the csv that is there"""


def run(args: Args, arm: str, seed: int) -> Path:
    """One training run; returns the csv (SB3) or the run folder (ours)."""
    folder = Path("runs") / "learning" / f"{args.env_id}_{args.total_timesteps}" / f"{arm}_{seed}"
    common = ["--env-id", args.env_id, "--seed", str(seed), "--total-timesteps", str(args.total_timesteps)]
    if ARMS[arm][2] is None:
        output = folder / "curve.csv"
        command = [sys.executable, "benchmark/sb3_peer.py", *common, "--csv", str(output)]
        finished = output.exists()
    else:
        output = next(folder.glob("*/args.json"), folder / "none").parent
        command = [sys.executable, "sppo_atari.py", *common, *ARMS[arm][2], "--num-threads", "1", "--run-dir", str(folder)]
        if output != folder:
            command = [sys.executable, "sppo_atari.py", "--resume", str(output)]
        finished = (output / "result.json").exists()
    if not finished:
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return output if ARMS[arm][2] is None else next(folder.glob("*/args.json")).parent


def curve(output: Path) -> pd.DataFrame:
    """kind, global_step, episodic_return of a run, from its csv or from its TensorBoard file and result.json."""
    if output.suffix == ".csv":
        return pd.read_csv(output)[["kind", "global_step", "episodic_return"]]
    events = EventAccumulator(str(output), size_guidance={"scalars": 0})
    events.Reload()
    rows = [("train", event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    result = json.loads((output / "result.json").read_text())
    rows += [("eval", result["global_step"], score) for score in result["returns"]]
    return pd.DataFrame(rows, columns=["kind", "global_step", "episodic_return"])


def summarise(args: Args, data: pd.DataFrame, stem: Path) -> None:
    """The picture (mean over seeds, band from lowest to highest seed, window of a tenth) and the table."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    grid = np.linspace(0, args.total_timesteps, 101)[5:]
    width = args.total_timesteps / 10
    table = ["| | training, last tenth | final score | seeds |", "|---|---|---|---|"]
    for arm in args.arms:
        label, colour, _ = ARMS[arm]
        curves, last, final = [], [], []
        for _, rows in data[data.arm == arm].groupby("seed"):
            train = rows[rows.kind == "train"]
            windows = [train[(train.global_step > x - width) & (train.global_step <= x)].episodic_return.mean() for x in grid]
            curves.append(windows)
            last.append(windows[-1])
            final.append(rows[rows.kind == "eval"].episodic_return.mean())
        if not curves:
            continue
        curves = np.array(curves)
        axes.plot(grid, curves.mean(axis=0), color=colour, label=label)
        axes.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        spread = [f"{np.mean(v):,.0f} ({', '.join(f'{x:,.0f}' for x in v)})" for v in (last, final)]
        table.append(f"| {label} | {spread[0]} | {spread[1]} | {len(last)} |")
    axes.set(xlabel="environment steps", ylabel="score of whole games", title=f"{args.env_id}: mean and range over seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    stem.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def main(args: Args) -> None:
    os.chdir(Path(__file__).parents[1])
    stem = Path("benchmark") / "results" / f"learning_{args.env_id}"
    stem.parent.mkdir(exist_ok=True)
    data, about = pd.DataFrame(columns=["arm", "seed", "kind", "global_step", "episodic_return"]), {}
    if stem.with_suffix(".csv").exists():
        data, about = pd.read_csv(stem.with_suffix(".csv")), json.loads(stem.with_suffix(".json").read_text())
    known = set(zip(data.arm, data.seed, strict=True))
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms if (arm, seed) not in known and not args.plot_only]
    with ThreadPoolExecutor(args.jobs) as pool:
        outputs = list(pool.map(lambda job: run(args, *job), jobs))
    for (arm, seed), output in zip(jobs, outputs, strict=True):
        rows = curve(output).assign(arm=arm, seed=seed)[data.columns]
        data = pd.concat([data, rows]) if len(data) else rows
        if output.suffix != ".csv":
            result = json.loads((output / "result.json").read_text())
            changed = f"--env-id {args.env_id} --seed {seed} --total-timesteps {args.total_timesteps} --num-threads 1"
            command = f"python sppo_atari.py {changed} {' '.join(ARMS[arm][2])}"
            kept = {key: result[key] for key in ("versions", "commit", "device", "seconds")}
            about[f"{arm}_{seed}"] = {"command": command, **kept}
    data.to_csv(stem.with_suffix(".csv"), index=False)
    stem.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    summarise(args, data, stem)


if __name__ == "__main__":
    main(tyro.cli(Args))
