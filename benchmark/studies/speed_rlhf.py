"""Speed of sppo_rlhf_imdb.py beside rlhf_peer.py, a plain transformers loop: `python benchmark/studies/speed.py imdb`.

Each arm is a process of its own on the offline assets, by turns, A B A B; the first iteration of each is warm-up. Seconds are
the script's own `time/...`, by phase: generate, score, forward (log-probabilities and values of policy and reference) and
update. What the reverse term costs is measured on single minibatches, in pairs, against a loss without it. Writes
benchmark/results/speed/imdb.md and .json. Nothing else should run.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import numpy as np
    import torch
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    import sppo_rlhf_imdb as imdb
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

PEER = "straightforward loop"
ARMS = {
    PEER: "benchmark/studies/rlhf_peer.py",
    "SPPO (α 0.5, β 0.4)": "sppo_rlhf_imdb.py",
    "SPPO with --lora-r 16": "sppo_rlhf_imdb.py --lora-r 16",
}
PHASES = ("generate", "score", "forward", "update")


def measure(arm: str, iterations: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each counted iteration by phase, its response tokens, and peak resident MiB, of a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        size = f"--offline --iterations {iterations + 1} --eval-episodes 0 --checkpoint-interval 1000 --no-cuda"
        command = [sys.executable, *arm.split(), *size.split(), "--run-dir", folder]
        said = Path(folder, "said")
        with said.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: {' '.join(command)}\n{said.read_text()[-2000:]}")
        (path,) = Path(folder).glob("*/events.out.tfevents.*")
        found = defaultdict(list)
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found[value.tag].append(value.tensor.float_val[0])
    times = {name: found[f"time/{name}"][1:] for name in PHASES}
    times["tokens"] = [length * imdb.OFFLINE.trajectories_per_update for length in found["objective/response_length"][1:]]
    return times, usage.ru_maxrss / 1024


def plain_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z, literal_signs):
    """`symmetric_ppo_loss` without the reverse term."""
    logratio = logprobs - old_logprobs
    ratio = logratio.clamp(-20, 20).exp()
    clipped = advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    stats = {
        "old_approx_kl": -logratio.mean().detach(),
        "approx_kl": (logratio.clamp(-20, 20).expm1() - logratio).mean().detach(),
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    return -torch.minimum(advantages * ratio, clipped).mean(), torch.zeros(()), stats


def reverse_term(pairs: int) -> list[float]:
    """Ratios of the time of a minibatch's loss and gradient with the reverse term to that without."""
    args = imdb.OFFLINE
    agent = imdb.load_models(args, torch.device("cpu"))[0]
    torch.manual_seed(0)
    size = (args.minibatch_size, args.response_length)
    tokens = torch.randint(100, 40_000, (size[0], args.max_prompt_length + size[1]))
    zeros, advantages = torch.zeros(size), torch.randn(size)
    with torch.no_grad():
        logprobs = agent(tokens, args.max_prompt_length, 1.0)[0].reshape(size)
    symmetric, ratios = imdb.symmetric_ppo_loss, []
    for pair in range(1 + pairs):
        seconds = {}
        for loss in (symmetric, plain_ppo_loss) if pair % 2 else (plain_ppo_loss, symmetric):
            imdb.symmetric_ppo_loss = loss
            begin = time.perf_counter()
            for _ in range(2):
                batch = (tokens, logprobs, zeros, advantages, zeros, tokens[:, args.max_prompt_length :])
                imdb.minibatch_loss(agent, args, 1.0, 1.0, *batch)[0].backward()
            seconds[loss] = time.perf_counter() - begin
        ratios.append(seconds[symmetric] / seconds[plain_ppo_loss])
    return ratios[1:]


def main(rounds: int, blocks: int, pairs: int) -> None:
    commit = git_commit()  # before the files of the results change
    times, memory = {label: defaultdict(list) for label in ARMS}, defaultdict(float)
    for turn in range(rounds):
        for label, arm in ARMS.items():
            found, peak = measure(arm, blocks)
            memory[label] = max(memory[label], peak)
            for name, values in found.items():
                times[label][name] += values
            print(
                f"round {turn + 1}, {label}:",
                {name: np.round(values, 2).tolist() for name, values in found.items()},
                flush=True,
            )
    ratios = reverse_term(pairs)

    medians = {label: {name: float(np.median(values)) for name, values in found.items()} for label, found in times.items()}
    wholes = {label: sum(medians[label][name] for name in PHASES) for label in ARMS}
    args = imdb.OFFLINE
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    low, high = np.percentile(ratios, (25, 75))
    lines = [
        f"`--offline`: {args.trajectories_per_update} prompts of {args.max_prompt_length} tokens, up to {args.response_length} "
        f"new ones, {args.update_epochs} epochs; {os.cpu_count()} threads of {cpu}; {rounds} rounds of {blocks} iterations.",
        "",
        "| | generate | score | forward | update | an iteration | against the peer | tokens/s: generated | trained | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in ARMS:
        m = medians[label]
        cells = [f"{m[name]:.1f} s" for name in PHASES]
        trained = m["tokens"] * args.update_epochs / m["update"]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {wholes[label]:.1f} s | {wholes[PEER] / wholes[label]:.2f} x | "
            f"{m['tokens'] / m['generate']:.0f} | {trained:.0f} | {memory[label]:,.0f} MiB |"
        )
    lines += [
        "",
        "Loss and gradient of a minibatch beside one without the reverse term in its code, in turns: "
        f"{np.median(ratios):.3f} x the time (quartiles {low:.3f} to {high:.3f} of {pairs} pairs).",
    ]
    stem = Path("benchmark/results/speed/imdb")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    versions = {"python": platform.python_version(), **{name: version(name) for name in imdb.PACKAGES}}
    about = {"commit": commit, "versions": versions, "cpu": cpu}
    content = {**about, "seconds": times, "peak_mib": memory, "symmetric / plain": ratios}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))
