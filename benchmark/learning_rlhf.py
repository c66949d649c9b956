"""Learning curves of the RLHF scripts on the offline assets: PPO, SPPO and its control, several seeds.

    python benchmark/assets/make_rlhf_assets.py imdb      # first
    python benchmark/learning_rlhf.py imdb         # 9 runs, hours on two cores; tldr likewise
    python benchmark/learning_rlhf.py imdb --plot-only

Runs `--jobs` at a time, which share the cores, in runs/learning/ (a run that was killed goes on from its checkpoint; one
that is in the csv or has finished is not run again), and writes to benchmark/results/ after each of them:

    learning_{task}.csv           arm, seed, tag, global_step, value: curves (objective/...), before and after (eval/, test/)
    learning_{task}.json          of each run: command, versions, commit, seconds, changes with their standard errors
    learning_{task}_samples.json  of each run ten prompts with what followed before and after
    learning_{task}.md, .png      the table and the picture
    learning_tldr_yardsticks.json what the reward model says of the posts' beginnings and of the references
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from rouge_score.rouge_scorer import RougeScorer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))

TASKS = {  # arm: label, colour, script and arguments
    "imdb": {
        "ppo": ("PPO (α 1, β 0)", "tab:blue", "sppo_rlhf_imdb.py --offline --alpha 1 --beta 0"),
        "sppo": ("SPPO (α 0.5, β 0.4)", "tab:red", "sppo_rlhf_imdb.py --offline --alpha 0.5 --beta 0.4"),
        "control": ("control (α 0.9, β 0)", "tab:orange", "sppo_rlhf_imdb.py --offline --alpha 0.9 --beta 0"),
    },
    "tldr": {
        "ppo": ("PPO (α 1, β 0)", "tab:blue", "sppo_rlhf_tldr.py --offline --alpha 1 --beta 0"),
        "sppo": ("SPPO (α 0.5, β 0.2)", "tab:red", "sppo_rlhf_tldr.py --offline --alpha 0.5 --beta 0.2"),
        "control": ("control (α 0.7, β 0)", "tab:orange", "sppo_rlhf_tldr.py --offline --alpha 0.7 --beta 0"),
    },
}
CURVES = ("objective/scores", "objective/kl", "objective/empty_share", "objective/response_length", "losses/value_loss")
SCORES = {"imdb": "eval/", "tldr": "test/"}  # before and after
COLUMNS = {
    "imdb": {"score": "score", "judge_score": "judge", "kl": "KL", "perplexity": "perplexity", "empty_share": "empty"},
    "tldr": {
        "score": "score",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
        "kl": "log π - log π_ref, greedy",
        "perplexity": "perplexity of references",
        "words": "words",
        "empty_share": "empty",
        "empty_score": "score of these",
        "unfinished_share": "unfinished",
    },
}


@dataclass
class Args:
    task: tyro.conf.Positional[Literal["imdb", "tldr"]] = "imdb"
    """which script"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each arm"""
    jobs: int = 2
    """processes at a time; each of --offline needs 4 GB"""
    plot_only: bool = False
    """make the table and the picture from the csv that is there"""


def run(command: list[str], folder: Path) -> dict:
    """The result.json of this run, new or continued; also its curves and ten samples."""
    started = [path.parent for path in folder.glob("*/args.json")]
    if not (started and (started[0] / "result.json").exists()):
        resumed = [command[0], "--resume", str(started[0])] if started else [*command, "--run-dir", str(folder)]
        print(" ".join(resumed), flush=True)
        subprocess.run([sys.executable, *resumed], check=True, stdout=subprocess.DEVNULL)
    (result_path,) = folder.glob("*/result.json")
    events = EventAccumulator(str(result_path.parent), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag in CURVES or tag.startswith(("eval/", "test/"))]
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    samples = json.loads((result_path.parent / "samples.json").read_text())
    return {**json.loads(result_path.read_text()), "curves": curves, "samples": samples[:10], "change": change(samples)}


def change(samples: list[dict]) -> dict:
    """By measure, its mean change over the prompts and the standard error of that. Of summaries also `copied`: the share of
    their pairs of words that the post has, before, after, and of the references."""
    found = {}
    for name in samples[0]:
        if isinstance(samples[0].get(f"{name}_before"), float):
            changes = [sample[name] - sample[f"{name}_before"] for sample in samples]
            found[name] = [statistics.mean(changes), statistics.stdev(changes) / len(changes) ** 0.5]

    def words(text: str) -> list[str]:
        return re.findall(r"[\w'-]+", text.lower())

    for name in ("response_before", "response", "reference") if "post" in samples[0] else ():
        shares = []
        for sample in samples:
            post, pairs = set(pairwise(words(sample["post"]))), list(pairwise(words(sample[name])))
            shares += [statistics.mean(pair in post for pair in pairs)] if pairs else []
        found[f"copied, {name}"] = statistics.mean(shares)
    return found


def yardsticks_of_summaries() -> dict[str, dict[str, float]]:
    """What a summary is worth that nobody learned to write, on the test posts: the beginning of the post, as long as a summary
    may be, and the reference, cut to that length; scored as the script scores."""
    import sppo_rlhf_tldr as script

    args = script.OFFLINE
    posts = script.load_texts(args)["test"][: args.test_episodes]
    tokenizer, _, reward = script.load_models(args, torch.device("cpu"))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = {}
    for name, summaries in (
        ("the post's own beginning", [post for post, _ in posts]),
        ("the reference", [it for _, it in posts]),
    ):
        prompts, cut = script.encode([(post, it) for (post, _), it in zip(posts, summaries, strict=True)], tokenizer, args)
        with torch.no_grad():
            scores = script.score(script.decode(torch.cat([prompts, cut], dim=1), tokenizer), reward, tokenizer, args)
        texts = [text.strip() for text in script.decode(cut, tokenizer)]
        found[name] = {"score": scores.mean().item(), "score_std": scores.std().item()}
        found[name]["words"] = statistics.mean(len(text.split()) for text in texts)
        if summaries[0] != posts[0][1]:
            rouge = [scorer.score(reference.strip(), text) for (_, reference), text in zip(posts, texts, strict=True)]
            found[name] |= {kind: statistics.mean(one[kind].fmeasure for one in rouge) for kind in rouge[0]}
    return found


def summarise(args: Args, curves: pd.DataFrame, yardsticks: dict, stem: Path) -> None:
    """The table, before and after with each seed's value, and the picture: score and KL while training."""
    found = {tag.removeprefix(SCORES[args.task]) for tag in curves.tag}
    columns = {name: title for name, title in COLUMNS[args.task].items() if name in found}  # no empty ones have no score
    lines = ["| | " + " | ".join(columns.values()) + " | seeds |", "|---" * (len(columns) + 2) + "|"]
    last = curves.global_step.max()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))

    def row(label: str, mine: pd.DataFrame, step: int) -> str:
        cells = []
        for name in columns:
            values = mine[(mine.tag == SCORES[args.task] + name) & (mine.global_step == step)].value
            one = values.nunique() == 1 and len(values) > 1  # seeds that evaluate alike
            each = "all" if one else ", ".join(f"{value:.3g}" for value in values)
            cells.append(f"{values.mean():.3g} ({each})" if len(values) else "")
        return f"| {label} | {' | '.join(cells)} | {mine.seed.nunique()} |"

    for text, measured in yardsticks.items():
        cells = [f"{measured[name]:.3g}" if name in measured else "" for name in columns]
        lines.append(f"| {text} | {' | '.join(cells)} | |")
    lines.append(row("before training, any arm", curves[curves.arm == next(iter(TASKS[args.task]))], 0))
    for arm, (label, colour, _) in TASKS[args.task].items():
        mine = curves[curves.arm == arm]
        if mine.empty:
            continue
        lines.append(row(f"{label}, after", mine, last))
        for axis, tag in zip(axes, ("objective/scores", "objective/kl"), strict=True):
            table = (
                mine[mine.tag == tag]
                .pivot(index="global_step", columns="seed", values="value")
                .rolling(3, min_periods=1)
                .mean()
            )
            style = "--" if arm == "control" else "-"  # which may lie on another curve
            axis.plot(table.index, table.mean(axis=1), style, color=colour, label=label)
            axis.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.15, linewidth=0)
            axis.set(xlabel="episodes", ylabel={"objective/scores": "score", "objective/kl": "KL to the reference, nats"}[tag])
    axes[0].legend()
    figure.suptitle(f"{args.task}: mean and range of the seeds, mean of three iterations")
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(args: Args) -> None:
    os.chdir(Path(__file__).parents[1])
    stem = Path("benchmark/results") / f"learning_{args.task}"
    paths = {"csv": stem.with_suffix(".csv"), "runs": stem.with_suffix(".json"), "samples": Path(f"{stem}_samples.json")}
    stem.parent.mkdir(exist_ok=True)
    curves = pd.read_csv(paths["csv"]) if paths["csv"].exists() else pd.DataFrame(columns=["arm", "seed"])
    runs, samples = (json.loads(paths[name].read_text()) if paths[name].exists() else [] for name in ("runs", "samples"))
    known = set(zip(curves.arm, curves.seed, strict=True))
    jobs = [(arm, seed) for seed in args.seeds for arm in TASKS[args.task] if (arm, seed) not in known and not args.plot_only]
    threads = str(max(1, os.cpu_count() // args.jobs))
    commands = [[*TASKS[args.task][arm][2].split(), "--seed", str(seed), "--num-threads", threads] for arm, seed in jobs]
    folders = [Path("runs/learning") / f"{args.task}_{arm}_{seed}" for arm, seed in jobs]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (arm, seed), command, result in zip(jobs, commands, pool.map(run, commands, folders), strict=True):
            rows = [(arm, seed, tag, *point) for tag, points in result["curves"].items() for point in points]
            new = pd.DataFrame(rows, columns=["arm", "seed", "tag", "global_step", "value"])
            curves = pd.concat([curves, new]) if len(curves) else new
            runs.append(
                {"arm": arm, "seed": seed, "command": "python " + " ".join(command)}
                | {name: result[name] for name in ("versions", "commit", "device", "seconds", "before", "after", "change")}
            )
            samples.append({"arm": arm, "seed": seed, "samples": result["samples"]})
            curves.sort_values(["arm", "seed", "tag", "global_step"]).to_csv(paths["csv"], index=False, float_format="%.6g")
            paths["runs"].write_text(json.dumps(runs, indent=1) + "\n")
            paths["samples"].write_text(json.dumps(samples, indent=1) + "\n")
    path = Path(f"{stem}_yardsticks.json")
    if args.task == "tldr" and not path.exists():
        path.write_text(json.dumps(yardsticks_of_summaries(), indent=1) + "\n")
    summarise(args, curves, json.loads(path.read_text()) if path.exists() else {}, stem)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
