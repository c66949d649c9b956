"""Speed of the scripts beside Stable-Baselines3: whole training loops, side by side, in the order A B A B.

    python benchmark/speed.py                  # the README's tables, about 10 minutes on two cores
    python benchmark/speed.py --iterations 4 --rounds 1

Each arm is a process of its own (so that peak memory is its own) that trains for a few iterations; the first two of each
process are warm-up and do not count. The figure is the median of environment steps per second over all others, and
the ratio of these medians, on the CPU. Writes benchmark/results/speed_atari_ppo.md and .json. Nothing else should run.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import sppo_atari

WARM_UP = 2  # iterations
BATCH = 1024  # 8 games x 128 steps
ARMS = {  # label: arguments of sppo_atari.py (None: Stable-Baselines3)
    "SB3 PPO": None,
    "PPO (α 1, β 0)": ["--alpha", "1", "--beta", "0"],
    "SPPO (α 0.5, β 10)": ["--alpha", "0.5", "--beta", "10"],
    "SPPO with --bf16": ["--alpha", "0.5", "--beta", "10", "--bf16"],
}


@dataclass
class Args:
    env_id: str = "Alien"
    """the game, without a suffix"""
    iterations: int = 10
    """counted iterations of each process"""
    rounds: int = 2
    """times that the arms take turns"""
    pairs: int = 10
    """pairs of updates that measure what the reverse term costs"""
    num_threads: int = os.cpu_count()
    """CPU threads of each arm"""


def measure(args: Args, arm: list[str] | None) -> tuple[list[float], float]:
    """Environment steps per second of each counted iteration, and the peak resident memory in MiB, of a fresh process."""
    total = str(BATCH * (WARM_UP + args.iterations))
    with tempfile.TemporaryDirectory() as folder:
        common = ["--env-id", args.env_id, "--total-timesteps", total, "--num-threads", str(args.num_threads)]
        common += ["--eval-episodes", "0"]
        if arm is None:
            command = ["benchmark/sb3_peer.py", *common, "--csv", f"{folder}/sb3.csv", "--times", f"{folder}/times.json"]
        else:
            command = ["sppo_atari.py", *common, *arm, "--no-cuda", "--run-dir", folder]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        if arm is None:  # the time at which each rollout began
            times = json.loads(Path(folder, "times.json").read_text())
        else:  # the time at which each iteration was logged
            (path,) = Path(folder).glob("*/events.out.tfevents.*")
            events = EventFileLoader(str(path)).Load()
            times = [e.wall_time for e in events for v in e.summary.value if v.tag == "charts/SPS"]
    return (BATCH / np.diff(times)[-args.iterations :]).tolist(), usage.ru_maxrss / 1024


def phases(args: Args) -> dict[str, float]:
    """Seconds of one iteration by phase, the matrix-multiply rate of this machine, and SPPO against PPO, paired."""
    torch.set_num_threads(args.num_threads)
    sppo_atari.keep_freed_memory()
    _, rom = sppo_atari.resolve_game(args.env_id)
    envs = sppo_atari.make_envs(rom, 8, sppo_atari.Args(num_threads=args.num_threads))
    frames, _ = envs.reset(seed=1)
    agent = sppo_atari.Agent(int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)

    def timed(function, count=1):
        begin = time.perf_counter()
        for _ in range(count):
            function()
        return time.perf_counter() - begin

    obs = torch.zeros((BATCH, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    actions, rng = torch.zeros(BATCH, dtype=torch.int64), np.random.default_rng(0)

    def play():
        nonlocal frames
        frames, *_ = envs.step(rng.integers(envs.single_action_space.n, size=8))

    def think():
        with torch.no_grad():
            actions[:8], _, _ = sppo_atari.act(agent, obs[:8])

    for i in range(BATCH // 8):
        obs[8 * i : 8 * i + 8] = torch.as_tensor(frames)
        play()
    with torch.no_grad():
        actions, logprobs, values = sppo_atari.act(agent, obs)
    batch = (obs, actions, logprobs, torch.randn(BATCH), values)
    symmetric_ppo_loss = sppo_atari.symmetric_ppo_loss

    def ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z, literal_signs):
        """symmetric_ppo_loss without the reverse term: what a PPO script computes."""
        logratio = logprobs - old_logprobs
        ratio = logratio.exp()
        policy_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
        with torch.no_grad():
            stats = {"old_approx_kl": -logratio.mean(), "approx_kl": (ratio - 1 - logratio).mean()}
            stats["clipfrac"] = ((ratio - 1).abs() > clip_coef).float().mean()
        return policy_loss, torch.zeros(()), stats

    def learn(loss, **settings):
        sppo_atari.symmetric_ppo_loss = loss
        settings = sppo_atari.Args(**settings)
        sppo_atari.update(agent, optimizer, sppo_atari.minibatch_loss, settings, torch.tensor(0.1), batch)

    left, right = torch.randn(2, 2048, 2048)
    found = defaultdict(list)
    for _ in range(1 + args.pairs):
        found["environments"].append(timed(play, 128))
        found["acting"].append(timed(think, 128))
        found["update, PPO"].append(timed(lambda: learn(ppo_loss, alpha=1.0, beta=0.0)))
        found["update, SPPO"].append(timed(lambda: learn(symmetric_ppo_loss, alpha=0.5, beta=10.0)))
        found["matmul"].append(timed(lambda: left @ right, 10) / 10)
    medians = {name: float(np.median(seconds[1:])) for name, seconds in found.items()}
    pairs = np.array(found["update, SPPO"][1:]) / np.array(found["update, PPO"][1:])
    # NatureCNN: 18.7 MFLOP forward, twice that backward less the first layer's input gradient (6.6)
    update_flop = 4 * BATCH * (3 * 18.7e6 - 6.6e6)
    return {
        **medians,
        "update, SPPO / PPO": float(np.median(pairs)),
        "quartiles": np.percentile(pairs, (25, 75)).tolist(),
        "matmul GFLOP/s": 2 * 2048**3 / medians["matmul"] / 1e9,
        "update GFLOP/s": update_flop / medians["update, SPPO"] / 1e9,
    }


def main(args: Args) -> None:
    os.chdir(Path(__file__).parents[1])
    speeds, memory = defaultdict(list), defaultdict(float)
    # without bf16 instructions a CPU emulates them, at a tenth of the speed: nothing to compare
    arms = {label: arm for label, arm in ARMS.items() if "--bf16" not in (arm or []) or sppo_atari.cpu_has_bf16()}
    for turn in range(args.rounds):
        for label, arm in arms.items():
            rates, peak = measure(args, arm)
            speeds[label] += rates
            memory[label] = max(memory[label], peak)
            print(f"round {turn + 1}, {label}: {np.median(rates):.0f} steps/s, {peak:.0f} MiB", flush=True)
    parts = phases(args)

    medians = {label: float(np.median(rates)) for label, rates in speeds.items()}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    bf16 = "has" if sppo_atari.cpu_has_bf16() else "has no"
    names = ("torch", "stable-baselines3", "gymnasium", "ale-py", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    lines = [
        f"{args.env_id}, 8 games x 128 steps, {args.num_threads} threads of {cpu}, which {bf16} bf16 instructions; "
        f"{args.rounds} rounds of {args.iterations} iterations after {WARM_UP} of warm-up.",
        "",
        "| | steps/s, median (quartiles) | against SB3 | peak memory |",
        "|---|---|---|---|",
    ]
    for label, rates in speeds.items():
        low, high = np.percentile(rates, (25, 75))
        ratio = medians[label] / medians["SB3 PPO"]
        lines.append(f"| {label} | {medians[label]:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} x | {memory[label]:.0f} MiB |")
    low, high = parts["quartiles"]
    whole = parts["environments"] + parts["acting"] + parts["update, SPPO"]
    lines += [
        "",
        f"An update of SPPO (α 0.5, β 10) beside one of a PPO without the reverse term in its code, in turns: "
        f"{parts['update, SPPO / PPO']:.3f} x the time (quartiles {low:.3f} to {high:.3f} of {args.pairs} pairs).",
        "",
        "| phase of an iteration | seconds | share |",
        "|---|---|---|",
        *(
            f"| {label} | {parts[name]:.2f} | {parts[name] / whole:.0%} |"
            for label, name in (("environments", "environments"), ("acting", "acting"), ("update", "update, SPPO"))
        ),
        "",
        f"The update runs at {parts['update GFLOP/s']:.0f} GFLOP/s; a 2048 x 2048 float32 matrix product on this machine at "
        f"{parts['matmul GFLOP/s']:.0f} ({parts['update GFLOP/s'] / parts['matmul GFLOP/s']:.0%} of it).",
    ]
    stem = Path("benchmark/results/speed_atari_ppo")
    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    about = {"commit": sppo_atari.git_commit(), "versions": versions, "cpu": cpu}
    content = {**about, "steps_per_second": speeds, "peak_mib": memory, "phases": parts}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
