"""Speed of the scripts beside Stable-Baselines3: whole training loops, side by side, in the order A B A B.

    python benchmark/studies/speed.py atari-ppo        # sppo_atari.py on Alien; the others: atari-a2c, dppo, da2c (Walker2d-v4)
    python benchmark/studies/speed.py dppo --blocks 6 --rounds 1
    python benchmark/studies/speed.py atari-ppo --cuda --blocks 10    # on a GPU: SB3, SPPO, SPPO with --compile; or atari-a2c
    python benchmark/studies/speed.py atari-ppo --phases    # where the time of our loop goes; with --cuda on a GPU
    python benchmark/studies/speed.py dppo --grow      # time and memory at 1, 2, 4, 8 times num_envs, num_steps, bins
    python benchmark/studies/speed.py imdb             # sppo_rlhf_imdb.py --offline beside rlhf_peer.py: see speed_rlhf.py
    python benchmark/studies/speed.py all              # one after another, an hour or two; report.md has all in one table

Each arm is a process of its own (so that peak memory is its own) that trains for a few blocks of iterations; the first two
of each process are warm-up and do not count. The figure is the median of environment steps per second over all others,
and the ratio of these medians. What the reverse term costs is measured on updates alone, in pairs, against a loss that has no
such term in its code. Writes {suite}.md and .json (with --cuda {suite}-gpu) to benchmark/results/speed/, and report.md, the
table of all suites that have a .json there. Nothing else should run. Two more peers are measured where they are installed
(requirements-peers.txt): SBX on Walker2d, and EnvPool's games in our PPO loop on Atari. sppo_rlhf_tldr.py, whose updates are
those of sppo_rlhf_imdb.py, is not among the suites: what it is for, a model of six billion weights, needs a GPU, and
scale_tldr.py is about that.
"""

import dataclasses
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

ENVIRONMENT = dict(os.environ)  # before sppo_atari sets GOMP_SPINCOUNT, so that peers run as their users run them
sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import numpy as np
    import torch
    import tyro
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    from benchmark.studies.git_commit import git_commit
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)

WARM_UP = 2  # blocks
GPU_PEAK = """# runs a script and writes the MiB of GPU memory that torch's allocator held at most
import atexit, os, pathlib, runpy, sys, torch
sys.argv = sys.argv[1:]
atexit.register(lambda: pathlib.Path(os.environ["GPU_PEAK"]).write_text(str(torch.cuda.max_memory_reserved() / 2**20)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SB3 = "Stable-Baselines3"
OPTIONAL = {  # of a suite, peers that are measured where their package is installed: label: package, command
    "atari-ppo": {"PPO (α 1, β 0) with EnvPool's games": ("envpool", "benchmark/studies/envpool_peer.py --alpha 1 --beta 0")},
    "dppo": {"SBX (JAX)": ("sbx-rl", "benchmark/studies/sbx_peer.py --peer-of dsppo_continuous.py")},
}


@dataclass
class Suite:
    script: str
    algorithm: str  # of SB3
    env_id: str
    num_envs: int
    num_steps: int
    block: int  # iterations between two readings of the clock
    threads: int  # CPU threads, 0 for all
    arms: dict[str, str]  # label: arguments of the script


SUITES = {
    "atari-ppo": Suite(
        "sppo_atari",
        "ppo",
        "Alien",
        8,
        128,
        1,
        0,
        {
            "PPO (α 1, β 0)": "--alpha 1 --beta 0",
            "SPPO (α 0.5, β 10)": "--alpha 0.5 --beta 10",
            "SPPO with --bf16": "--alpha 0.5 --beta 10 --bf16",
            "SPPO with --bf16 --compile": "--alpha 0.5 --beta 10 --bf16 --compile",
        },
    ),
    "atari-a2c": Suite(
        "sa2c_atari",
        "a2c",
        "Alien",
        16,
        5,
        20,
        0,
        {
            "A2C (α 1, β 0)": "--alpha 1 --beta 0",
            "SA2C (α 0.5, β 5)": "--alpha 0.5 --beta 5",
            "SA2C with --bf16": "--alpha 0.5 --beta 5 --bf16",
        },
    ),
    "dppo": Suite(
        "dsppo_continuous",
        "ppo",
        "Walker2d-v4",
        1,
        2048,
        1,
        1,
        {
            "Gaussian PPO": "--num-bins 0 --alpha 1 --beta 0",
            "DPPO (α 1, β 0)": "--alpha 1 --beta 0",
            "DSPPO (α 0.5, β 20)": "--alpha 0.5 --beta 20",
            "DSPPO with --compile": "--alpha 0.5 --beta 20 --compile",
        },
    ),
    "da2c": Suite(
        "dsa2c_continuous",
        "a2c",
        "Walker2d-v4",
        4,
        8,
        100,
        1,
        {
            "Gaussian A2C": "--num-bins 0 --alpha 1 --beta 0",
            "DA2C (α 1, β 0)": "--alpha 1 --beta 0",
            "DSA2C (α 0.5, β 0.2)": "--alpha 0.5 --beta 0.2",
            "DSA2C with --compile": "--alpha 0.5 --beta 0.2 --compile",
        },
    ),
}


@dataclass
class Args:
    suite: tyro.conf.Positional[Literal["atari-ppo", "atari-a2c", "dppo", "da2c", "imdb", "all"]] = "atari-ppo"
    """which script, or all"""
    blocks: int = 3
    """counted blocks of each process; of imdb: iterations"""
    rounds: int = 4
    """times that the arms take turns"""
    pairs: int = 10
    """pairs of updates that measure what the reverse term costs"""
    cuda: bool = False
    """measure the loops of an Atari script on a GPU"""
    phases: bool = False
    """time the phases of our own loop, nothing else"""
    grow: bool = False
    """measure one iteration at 1, 2, 4, 8 times its size, nothing else"""
    more: str = ""
    """further arguments of the script, of --phases and --grow: --more=--no-torch-deterministic"""


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16, AMX, or the BF16 extension of Arm)."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def commands(suite: str, cuda: bool = False) -> dict[str, str]:
    """Label and command of each arm, SB3 first. Of what cannot be measured here, one line says why."""
    script = f"{SUITES[suite].script}.py"
    if cuda:
        label, arm = next((label, arm) for label, arm in SUITES[suite].arms.items() if "α 0.5" in label)
        ours = {label: f"{script} {arm}", f"{label} with --compile": f"{script} {arm} --compile"}
        return {SB3: f"benchmark/studies/sb3_peer.py --peer-of {script}"} | ours
    found = {SB3: f"benchmark/studies/sb3_peer.py --peer-of {script}"}
    for label, (package, command) in OPTIONAL.get(suite, {}).items():
        try:
            version(package)
            found[label] = command
        except PackageNotFoundError:
            print(f"{label}: left out, as {package} is not installed (benchmark/studies/requirements-peers.txt)", flush=True)
    # without bf16 instructions a CPU emulates them, at a tenth of the speed: nothing to compare
    arms = {label: arm for label, arm in SUITES[suite].arms.items() if "bf16" not in arm or cpu_has_bf16()}
    return found | {label: f"{script} {arm}" for label, arm in arms.items()}


def measure(args: Args, suite: Suite, arm: str, threads: int) -> tuple[list[float], float, float]:
    """Of a fresh process: environment steps per second of each counted block, the peak of memory in MiB, on a CPU all that is
    resident, on a GPU what torch's allocator holds, and the seconds to the end of the warm-up, with nothing compiled before."""
    batch = suite.num_envs * suite.num_steps * suite.block
    total = str(batch * (WARM_UP + args.blocks))
    with tempfile.TemporaryDirectory() as folder:
        common = f"--env-id {suite.env_id} --total-timesteps {total} --num-threads {threads} --eval-episodes 0"
        command = [*arm.split(), *common.split(), "--cuda" if args.cuda else "--no-cuda", "--run-dir", folder]
        if suite.block > 1:
            command += ["--log-interval", str(suite.block), "--checkpoint-interval", str(1000 * suite.block)]
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "GPU_PEAK": f"{folder}/gpu_peak"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
        wrapper, said = ["-c", GPU_PEAK] if args.cuda else [], Path(folder, "said")
        begin = time.time()
        with said.open("w") as output:
            process = subprocess.Popen([sys.executable, *wrapper, *command], env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: {' '.join(command)}\n{said.read_text()[-2000:]}")
        (path,) = Path(folder).glob("*/events.out.tfevents.*")
        events = EventFileLoader(str(path)).Load()  # the time at which each block was logged
        times = [e.wall_time for e in events for v in e.summary.value if v.tag == "charts/SPS"]
        peak = float(Path(folder, "gpu_peak").read_text()) if args.cuda else usage.ru_maxrss / 1024
    return (batch / np.diff(times)[-args.blocks :]).tolist(), peak, times[WARM_UP - 1] - begin


def timed(function, count: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - begin


def plain_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z, literal_signs):
    """`symmetric_ppo_loss` without the reverse term: what a PPO script computes."""
    logratio = logprobs - old_logprobs
    ratio = logratio.clamp(-20, 20).exp()
    surrogate = advantages * ratio
    clipped = advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    with torch.no_grad():
        stats = {
            "old_approx_kl": -logratio.mean(),
            "approx_kl": (logratio.clamp(-20, 20).expm1() - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return -torch.min(surrogate, clipped).mean(), torch.zeros(()), stats


def plain_a2c_loss(logprobs, advantages, Z, literal_signs):
    """`symmetric_a2c_loss` without the reverse term: what an A2C script computes."""
    return -(advantages * logprobs).mean(), torch.zeros(())


def atari_parts(suite: Suite, script):
    """Functions that play one step with random actions and that act, and the batch and arguments of an update."""
    args = script.Args(num_threads=torch.get_num_threads(), num_envs=suite.num_envs, num_steps=suite.num_steps)
    envs = script.make_envs(script.resolve_env(suite.env_id)[1], suite.num_envs, args)
    frames, _ = envs.reset(seed=1)
    agent, rng = script.Agent(int(envs.single_action_space.n)), np.random.default_rng(0)
    size = suite.num_envs * suite.num_steps
    obs = torch.zeros((size, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)

    def play():
        nonlocal frames
        frames, *_ = envs.step(rng.integers(envs.single_action_space.n, size=suite.num_envs))

    def think():
        with torch.no_grad():
            script.act(agent, obs[: suite.num_envs])

    for i in range(0, size, suite.num_envs):
        obs[i : i + suite.num_envs] = torch.as_tensor(frames)
        play()
    with torch.no_grad():
        actions, logprobs, values = script.act(agent, obs)
    old = [logprobs] if suite.algorithm == "ppo" else []
    batch = (obs, actions, *old, torch.randn(size), values)
    if suite.algorithm == "ppo":
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)
        before = (agent, optimizer, script.gradient_step, args, torch.tensor(0.1))
    else:
        square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
        before = (agent, square_avgs, 1e-5, args)
    return play, think, lambda: script.update(*before, batch)


def continuous_parts(suite: Suite, script):
    """As `atari_parts`; acting holds the normalisation."""
    args = script.Args(env_id=suite.env_id, num_envs=suite.num_envs, num_steps=suite.num_steps)
    envs = [script.make_env(args) for _ in range(suite.num_envs)]
    raw_obs, space, rng = np.array([env.reset(seed=1)[0] for env in envs]), envs[0].action_space, np.random.default_rng(0)
    counts, bins = script.make_bins(space, 11)
    agent = script.Agent(raw_obs.shape[1], counts)
    weights, actor = script.flatten_parameters(agent), script.numpy_actor(agent)
    stats = script.RunningMeanStd(np.zeros(raw_obs.shape[1]), np.ones(raw_obs.shape[1]))
    noise = rng.gumbel(size=(suite.num_envs, *space.shape, 11))

    def play():
        script.step_envs(envs, script.to_env(rng.integers(11, size=(suite.num_envs, *space.shape)), space, bins))

    def think():
        stats.update(raw_obs)
        script.act(actor, script.normalise_obs(raw_obs, stats), noise)

    size = suite.num_envs * suite.num_steps
    obs, actions = torch.randn(size, raw_obs.shape[1]), torch.randint(11, (size, *space.shape))
    with torch.no_grad():
        logprobs, _, values = agent(obs, actions)
    if suite.algorithm == "ppo":
        optimizer = torch.optim.Adam([weights], lr=1e-5, eps=1e-5, fused=True)
        batch = (obs, actions, logprobs, torch.randn(size), values)
        before, generator = (agent, weights, optimizer, script.gradient_step, args), torch.Generator()
        return play, think, lambda: script.update(*before, batch, generator)
    optimizer = torch.optim.RMSprop([weights], lr=1e-5, eps=1e-5)
    batch = (obs, actions, torch.randn(size), values)
    return play, think, lambda: script.update(agent, weights, optimizer, args, batch)


def phases(args: Args, suite: Suite, threads: int) -> dict:
    """Seconds of one iteration by phase, each measured alone, and updates with and without the reverse term in pairs."""
    torch.set_num_threads(threads)
    script = importlib.import_module(suite.script)
    name = f"symmetric_{suite.algorithm}_loss"
    symmetric, plain = getattr(script, name), {"ppo": plain_ppo_loss, "a2c": plain_a2c_loss}[suite.algorithm]
    play, think, learn = (atari_parts if "atari" in suite.script else continuous_parts)(suite, script)

    def update(loss):
        setattr(script, name, loss)
        learn()

    left, right = torch.randn(2, 2048, 2048)
    # whole blocks of updates, so that a pair takes seconds; the order within a pair alternates
    count = suite.block
    found = defaultdict(list)
    for pair in range(1 + args.pairs):
        found["environments"].append(timed(play, suite.num_steps))
        found["acting"].append(timed(think, suite.num_steps))
        losses = [("update, plain", plain), ("update", symmetric)]
        for label, loss in losses if pair % 2 else losses[::-1]:
            found[label].append(timed(lambda loss=loss: update(loss), count) / count)
        found["matmul"].append(timed(lambda: left @ right, 3) / 3)
    medians = {label: float(np.median(seconds[1:])) for label, seconds in found.items()}
    ratios = np.array(found["update"][1:]) / np.array(found["update, plain"][1:])
    result = {
        **medians,
        "update, symmetric / plain": float(np.median(ratios)),
        "quartiles": np.percentile(ratios, (25, 75)).tolist(),
        "matmul GFLOP/s": 2 * 2048**3 / medians["matmul"] / 1e9,
    }
    if "atari" in suite.script:
        # NatureCNN: 18.7 MFLOP forward, twice that backward less the first layer's input gradient (6.6)
        epochs = 4 if suite.algorithm == "ppo" else 1
        flop = epochs * suite.num_envs * suite.num_steps * (3 * 18.7e6 - 6.6e6)
        result["update GFLOP/s"] = flop / medians["update"] / 1e9
    return result


def loop_phases(args: Args, suite: Suite) -> list[str]:
    """Seconds of an iteration of the script's own training by phase, as a table.

    Each function of the script is wrapped in a clock that waits for the GPU before and after, so that the sum is above the time
    of an iteration that waits less often. Copies of frames to the device and of actions back are measured alone.
    """
    script, seconds = importlib.import_module(suite.script), defaultdict(float)
    device = torch.device("cuda" if args.cuda else "cpu")
    wait = torch.cuda.synchronize if args.cuda else lambda: None

    def clocked(label, function):
        def call(*given, **named):
            wait()
            begin = time.perf_counter()
            result = function(*given, **named)
            wait()
            seconds[label] += time.perf_counter() - begin
            return result

        call.inside = function, label
        return call

    def compile_inside(function, **options):  # a clock within compiled code would break its graph
        inside, label = getattr(function, "inside", (function, None))
        compiled = torch_compile(inside, **options)
        return clocked(label, compiled) if label else compiled

    torch_compile, torch.compile = torch.compile, compile_inside
    for label, name in (("acting", "act"), ("advantages", "compute_gae"), ("update", "update"), ("shares", "grad_shares")):
        setattr(script, name, clocked(label, getattr(script, name)))
    if "atari" in suite.script:
        make_envs = script.make_envs

        def make_clocked(*given, **named):
            envs = make_envs(*given, **named)
            envs.step = clocked("environments", envs.step)
            return envs

        script.make_envs = make_clocked
    else:
        script.step_envs = clocked("environments", script.step_envs)
    script.Run.save = lambda run, **state: None
    log, ends = clocked("log", script.Run.log), []

    def log_and_note(run, stats, taken):
        log(run, stats, taken)
        ends.append((time.perf_counter(), dict(seconds)))

    script.Run.log = log_and_note
    batch = suite.num_envs * suite.num_steps * suite.block
    label, arm = next((label, arm) for label, arm in suite.arms.items() if "α 0.5" in label)
    with tempfile.TemporaryDirectory() as folder:
        command = f"{arm} --env-id {suite.env_id} --total-timesteps {batch * (WARM_UP + args.blocks)} --eval-episodes 0"
        command += f" --num-threads {suite.threads or os.cpu_count()} --run-dir {folder} {args.more}"
        command += f" --log-interval {suite.block} --checkpoint-interval {1000 * suite.block}" if suite.block > 1 else ""
        script.main(script.parse_args([*command.split(), "--cuda" if args.cuda else "--no-cuda"]))
    (begin, before), (end, after) = ends[WARM_UP - 1], ends[-1]
    found = {name: (after[name] - before.get(name, 0.0)) / args.blocks for name in after}
    if "atari" in suite.script:
        frames = np.zeros((suite.num_envs, 4, 84, 84), dtype=np.uint8)
        held = torch.zeros((suite.num_envs, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        actions, steps = torch.zeros(suite.num_envs, dtype=torch.int64, device=device), suite.num_steps * suite.block
        copy_in, copy_out = clocked("copy in", lambda: held.copy_(torch.as_tensor(frames))), clocked("copy out", actions.cpu)
        for _ in range(steps):
            copy_in()
            copy_out()
        found |= {name: seconds[name] for name in ("copy in", "copy out")}
    whole = (end - begin) / args.blocks
    found["the rest"] = whole - sum(found.values())
    lines = [
        f"{label}{f' {args.more}' if args.more else ''}, {suite.env_id}: {batch / whole:,.0f} steps/s with clocks that wait"
    ]
    lines += ["", f"| phase of {suite.block} iterations | ms | share |", "|---|---|---|"]
    return lines + [f"| {name} | {1000 * taken:.1f} | {taken / whole:.0%} |" for name, taken in found.items()]


def growth(args: Args, suite: Suite) -> list[str]:
    """Time of an iteration and peak memory at 1, 2, 4 and 8 times the environments, the steps and the bins, as a table."""
    lines = [f"| {suite.env_id} | times | s an iteration | against the one before | peak MiB |", "|---|---|---|---|---|"]
    arm = next(arm for label, arm in suite.arms.items() if "α 0.5" in label)
    for name in ("num_envs", "num_steps", *(("bins",) if "continuous" in suite.script else ())):
        last = None
        for times in (1, 2, 4, 8):
            grown = suite if name == "bins" else dataclasses.replace(suite, **{name: getattr(suite, name) * times})
            flags = f" --num-bins {11 * times}" if name == "bins" else ""
            flags += f" --num-envs {grown.num_envs} --num-steps {grown.num_steps} {args.more}"
            rates, peak, _ = measure(args, grown, f"{suite.script}.py {arm}{flags}", suite.threads or os.cpu_count())
            taken = grown.num_envs * grown.num_steps / float(np.median(rates))
            lines.append(f"| {name} | {times} | {taken:.3f} | {f'{taken / last:.2f}' if last else ''} | {peak:,.0f} |")
            print(lines[-1], flush=True)
            last = taken
    return lines


def combine(folder: Path) -> list[str]:
    """All suites in one table: every arm beside its peer, and what the reverse term costs an update."""
    lines = ["| script | | median | against the peer | peak memory | update, beta > 0 / without | commit |", "|---" * 7 + "|"]
    for name in (*SUITES, "atari-ppo-gpu", "atari-a2c-gpu", "imdb"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if name == "imdb":  # seconds by phase, of as many tokens in all arms
            rates = {
                label: np.sum([np.median(times[phase]) for phase in times if phase != "tokens"]) ** -1
                for label, times in found["seconds"].items()
            }
            texts = {label: f"{1 / rate:.1f} s an iteration" for label, rate in rates.items()}
            cost, script = np.median(found["symmetric / plain"]), "sppo_rlhf_imdb"
        else:
            rates = {label: np.median(values) for label, values in found["steps_per_second"].items()}
            texts = {label: f"{rate:,.0f} steps/s" for label, rate in rates.items()}
            cost, script = found.get("phases", {}).get("update, symmetric / plain"), SUITES[name.removesuffix("-gpu")].script
        peer = next(iter(rates))
        for label, rate in rates.items():
            where = f"{script}.py{' on a GPU' if name.endswith('-gpu') else ''}"
            cells = [where, label, texts[label], f"{rate / rates[peer]:.2f} x", f"{found['peak_mib'][label]:,.0f} MiB"]
            symmetric = re.search(r"β (?!0\b)|β 0\.", label)
            cells += [f"{cost:.3f}" if symmetric and cost else "", found["commit"][:12] + found["commit"][40:]]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    for name in ("blocks", "rounds", "pairs"):
        if getattr(args, name) < 1:
            print(f"speed.py: error: --{name} {getattr(args, name)}: expected 1 or more", file=sys.stderr)
            sys.exit(2)
    if args.cuda and not (args.suite.startswith("atari") and torch.cuda.is_available()):
        print(f"speed.py: error: {args.suite} --cuda: expected atari-ppo or atari-a2c, and a GPU", file=sys.stderr)
        sys.exit(2)
    if (args.phases or args.grow) and args.suite not in SUITES:
        print(f"speed.py: error: --phases, --grow {args.suite}: expected one of {', '.join(SUITES)}", file=sys.stderr)
        sys.exit(2)
    os.chdir(Path(__file__).parents[2])
    results = Path("benchmark/results/speed")
    results.mkdir(exist_ok=True)
    if args.phases or args.grow:
        suite, commit, gpu = SUITES[args.suite], git_commit(), "-gpu" if args.cuda else ""
        for name, function in (("phases", loop_phases), ("grow", growth)):
            if getattr(args, name):
                lines = [*function(args, suite), "", f"commit {commit}, torch {version('torch')}"]
                (results / f"{args.suite}-{name}{gpu}{args.more.replace(' ', '')}.md").write_text("\n".join(lines) + "\n")
                print("\n".join(lines))
        return
    if args.suite == "all":
        for name in (*SUITES, "imdb"):
            more = ["--blocks", str(args.blocks), "--rounds", str(args.rounds), "--pairs", str(args.pairs)]
            subprocess.run([sys.executable, __file__, name, *more], check=True)
    elif args.suite == "imdb":
        import speed_rlhf

        speed_rlhf.main(args.rounds, args.blocks, args.pairs)
    else:
        measure_suite(args)
    (results / "report.md").write_text("\n".join(combine(results)) + "\n")


def phases_table(suite: Suite, parts: dict, medians: dict, pairs: int) -> list[str]:
    """What the reverse term costs, and the phases of an iteration; completes `parts`."""
    low, high = parts["quartiles"]
    # beside the three phases: values and advantages, what follows a step (normalisers, episodes), logging
    symmetric = next(label for label in suite.arms if "α 0.5" in label)
    parts["whole"] = suite.num_envs * suite.num_steps / medians[symmetric]
    parts["the rest"] = parts["whole"] - parts["environments"] - parts["acting"] - parts["update"]
    lines = [
        "",
        "An update beside one without the reverse term in its code, in turns: "
        f"{parts['update, symmetric / plain']:.3f} x the time (quartiles {low:.3f} to {high:.3f} of {pairs} pairs).",
        "",
        f"| phase, measured alone, of an iteration of {symmetric} | ms | share |",
        "|---|---|---|",
        *(
            f"| {name} | {1000 * parts[name]:.1f} | {parts[name] / parts['whole']:.0%} |"
            for name in ("environments", "acting", "update", "the rest")
        ),
    ]
    if "update GFLOP/s" in parts:
        lines += [
            "",
            f"The update runs at {parts['update GFLOP/s']:.0f} GFLOP/s; a 2048 x 2048 float32 matrix product at "
            f"{parts['matmul GFLOP/s']:.0f} ({parts['update GFLOP/s'] / parts['matmul GFLOP/s']:.0%} of it).",
        ]
    return lines


def measure_suite(args: Args) -> None:
    """Measures one script beside Stable-Baselines3 and writes what the docstring above says."""
    suite, commit = SUITES[args.suite], git_commit()  # before the files of the results change
    threads = suite.threads or os.cpu_count()
    speeds, memory, warm_up = defaultdict(list), defaultdict(float), defaultdict(list)
    arms = commands(args.suite, args.cuda)
    for turn in range(args.rounds):
        for label, arm in arms.items():
            rates, peak, seconds = measure(args, suite, arm, threads)
            speeds[label] += rates
            warm_up[label].append(seconds)
            memory[label] = max(memory[label], peak)
            print(f"round {turn + 1}, {label}: {np.median(rates):.0f} steps/s, {peak:.0f} MiB", flush=True)
    parts = {} if args.cuda else phases(args, suite, threads)

    medians = {label: float(np.median(rates)) for label, rates in speeds.items()}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    bf16 = "has" if cpu_has_bf16() else "has no"
    gpu = torch.cuda.get_device_name() if args.cuda else None
    names = ["torch", "stable-baselines3", "gymnasium", "ale-py", "mujoco", "numpy"]
    names += [package for label, (package, _) in OPTIONAL.get(args.suite, {}).items() if label in arms]
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    machine = f"{f'{gpu}, ' if gpu else ''}{threads} threads of {cpu}, which {bf16} bf16 instructions"
    lines = [
        f"{suite.env_id}, {suite.num_envs} x {suite.num_steps} steps, {machine}; "
        f"{args.rounds} rounds of {args.blocks} blocks of {suite.block} iterations after {WARM_UP} of warm-up.",
        "",
        "| | steps/s, median (quartiles) | against SB3 | peak memory |",
        "|---|---|---|---|",
    ]
    for label, rates in speeds.items():
        low, high = np.percentile(rates, (25, 75))
        ratio = medians[label] / medians[SB3]
        lines.append(
            f"| {label} | {medians[label]:,.0f} ({low:,.0f} to {high:,.0f}) | {ratio:.2f} x | {memory[label]:.0f} MiB |"
        )
    labels = {arm: label for label, arm in arms.items()}
    for label, arm in arms.items():
        plain = labels.get(arm.removesuffix(" --compile"))
        if plain and medians[label] > medians[plain] and plain != label:
            first = float(np.median(warm_up[label]) - np.median(warm_up[plain]))
            pays = first / (1 / medians[plain] - 1 / medians[label])
            lines += ["", f"{label}: {first:.0f} s more until the end of the warm-up, made good after {pays:,.0f} steps."]
    if parts:
        lines += phases_table(suite, parts, medians, args.pairs)
    stem = Path("benchmark/results/speed") / f"{args.suite}{'-gpu' if gpu else ''}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    about = {"commit": commit, "versions": versions, "cpu": cpu} | ({"gpu": gpu} if gpu else {})
    content = {**about, "steps_per_second": speeds, "peak_mib": memory, "warm_up_seconds": warm_up}
    content |= {"phases": parts} if parts else {}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
