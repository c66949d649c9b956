"""Learning curves of our scripts beside Stable-Baselines3 and beside their controls, on one environment.

    python benchmark/learning.py atari-ppo RoadRunner                 # 12 runs, hours on two cores
    python benchmark/learning.py gaussian Hopper-v4                   # our Gaussian PPO and A2C beside SB3's
    python benchmark/learning.py bins LunarLanderContinuous-v3        # DPPO, DSPPO, its control; with --noise: noisy rewards

Runs every arm with every seed as a process of one thread, `--jobs` at a time, in runs/learning/ (a run that was killed
goes on from its checkpoint; one that is in the csv or has finished is not run again), then writes to benchmark/results/:

    learning_{suite}_{env}.csv       arm, seed, kind (train, eval), global_step, episodic_return (raw, whole episodes)
    learning_{suite}_{env}.json      of each run of ours: command, versions, commit, seconds
    learning_{suite}_{env}.md, .png  the table and the picture
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

GAUSSIAN = "--num-bins 0 --alpha 1 --beta 0"
SUITES = {  # arm: label, colour, script and arguments
    "atari-ppo": {
        "ppo": ("PPO (α 1, β 0)", "tab:blue", "sppo_atari.py --alpha 1 --beta 0"),
        "sb3": ("PPO, Stable-Baselines3", "tab:gray", "benchmark/studies/sb3_peer.py --algorithm ppo"),
        "sppo": ("SPPO (α 0.5, β 10)", "tab:red", "sppo_atari.py --alpha 0.5 --beta 10"),
        "control": ("control (α 10.5, β 0)", "tab:orange", "sppo_atari.py --alpha 10.5 --beta 0"),
    },
    "gaussian": {
        "ppo": ("Gaussian PPO", "tab:blue", f"dsppo_continuous.py {GAUSSIAN}"),
        "sb3_ppo": ("PPO, Stable-Baselines3", "tab:gray", "benchmark/studies/sb3_peer.py --algorithm ppo"),
        "a2c": ("Gaussian A2C", "tab:green", f"dsa2c_continuous.py {GAUSSIAN}"),
        "sb3_a2c": ("A2C, Stable-Baselines3", "tab:olive", "benchmark/studies/sb3_peer.py --algorithm a2c"),
    },
    "bins": {
        "dppo": ("DPPO (α 1, β 0)", "tab:blue", "dsppo_continuous.py --alpha 1 --beta 0"),
        "dsppo": ("DSPPO (α 0.5, β 20)", "tab:red", "dsppo_continuous.py --alpha 0.5 --beta 20"),
        "control": ("control (α 20.5, β 0)", "tab:orange", "dsppo_continuous.py --alpha 20.5 --beta 0"),
    },
}
STEPS = {"atari-ppo": 200_000, "gaussian": 300_000, "bins": 500_000}


@dataclass
class Args:
    suite: tyro.conf.Positional[Literal["atari-ppo", "gaussian", "bins"]] = "atari-ppo"
    """which arms"""
    env_id: tyro.conf.Positional[str] = "RoadRunner"
    """an Atari game without a suffix, or a Gymnasium id"""
    noise: bool = False
    """noisy rewards for the learner, the paper's (bins only)"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each arm"""
    arms: tuple[str, ...] = ()
    """which of the suite's; all of them if none is named"""
    total_timesteps: int = 0
    """environment steps of each run; 0 for the suite's own number"""
    jobs: int = os.cpu_count()
    """processes at a time"""
    plot_only: bool = False
    """make the table and the picture from the csv that is there"""


def command_of(args: Args, arm: str, seed: int) -> list[str]:
    """What a reader would type for this run, without where its output goes."""
    script, *changed = SUITES[args.suite][arm][2].split()
    common = f"--env-id {args.env_id} --seed {seed} --total-timesteps {args.total_timesteps} --num-threads 1".split()
    return [script, *common, *changed, *(["--noise", "gaussian"] if args.noise else [])]


def run(args: Args, arm: str, seed: int) -> Path:
    """One training run; returns the csv (SB3) or the run folder (ours)."""
    name = f"{args.suite}_{args.env_id}_{args.total_timesteps}{'_noise' if args.noise else ''}"
    folder = Path("runs") / "learning" / name / f"{arm}_{seed}"
    command = command_of(args, arm, seed)
    if command[0] == "benchmark/studies/sb3_peer.py":
        output = folder / "curve.csv"
        command += ["--csv", str(output)]
        finished = output.exists()
    else:
        output = next(folder.glob("*/args.json"), folder / "none").parent
        command = [command[0], "--resume", str(output)] if output != folder else [*command, "--run-dir", str(folder)]
        finished = (output / "result.json").exists()
    if not finished:
        print(" ".join(command), flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return output if output.suffix == ".csv" else next(folder.glob("*/args.json")).parent


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
        label, colour, _ = SUITES[args.suite][arm]
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
    noise = ", noisy rewards" if args.noise else ""
    axes.set(xlabel="environment steps", ylabel="return of whole episodes")
    axes.set_title(f"{args.env_id}{noise}: mean and range over seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    stem.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def main(args: Args) -> None:
    os.chdir(Path(__file__).parents[1])
    if args.noise and args.suite != "bins":
        sys.exit(f"learning.py: error: --noise with {args.suite}: expected it with bins only")
    args.arms = args.arms or tuple(SUITES[args.suite])
    args.total_timesteps = args.total_timesteps or STEPS[args.suite]
    length = "" if args.total_timesteps == STEPS[args.suite] else f"_{args.total_timesteps}"  # never mixed in one csv
    stem = Path("benchmark") / "results" / f"learning_{args.suite}_{args.env_id}{'_noise' if args.noise else ''}{length}"
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
            kept = {key: result[key] for key in ("versions", "commit", "device", "seconds")}
            about[f"{arm}_{seed}"] = {"command": " ".join(["python", *command_of(args, arm, seed)]), **kept}
    data.to_csv(stem.with_suffix(".csv"), index=False)
    stem.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    summarise(args, data, stem)


if __name__ == "__main__":
    main(tyro.cli(Args))
