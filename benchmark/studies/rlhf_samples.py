"""Tells RLHF runs prompt by prompt: how each measure changed from before to after training, and ten prompts of each run.

    python benchmark/studies/rlhf_samples.py runs/grid/imdb --out report

Reads the samples.json of every finished run below the folders, prints a table, a line a run, and writes it with ten prompts of
each run, what followed before and after training, to OUT/samples.md and OUT/samples.json.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    import numpy as np
    import pandas as pd
    import tyro
    from reporting.figures import write_whole
    from reporting.runs import load_runs
    from reporting.tables import table_of
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    needs = f"needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs"
    print(f"{Path(__file__).name}: error: {needs}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Args:
    sources: tyro.conf.Positional[tuple[Path, ...]]
    """folders, searched for finished runs"""
    out: Path = Path("report")
    """folder to write into"""


def load_samples(runs: pd.DataFrame) -> list[dict]:
    """Of each run with a samples.json: its first ten prompts, and the changes over all prompts."""
    found = []
    for run in runs.sort_values(["arm", "seed"]).to_dict("records"):
        path = Path(run["folder"], "samples.json")
        if path.exists():
            samples = json.loads(path.read_text())
            about = {"prompts": len(samples), "changes": changes(samples), "samples": samples[:10]}
            found.append(about | {name: run[name] for name in ("run_id", "arm", "seed")})
    return found


def changes(samples: list[dict]) -> dict:
    """By measure, its mean change over the prompts and the standard error of that. Of summaries, too, what share of their
    pairs of words is in the post: before, after, and of the references."""
    found = {}
    for name in samples[0]:
        if isinstance(samples[0].get(f"{name}_before"), float):
            change = pd.Series([sample[name] - sample[f"{name}_before"] for sample in samples])
            found[name] = [float(change.mean()), float(change.sem())]

    def pairs(text: str) -> list[tuple[str, str]]:
        return list(itertools.pairwise(re.findall(r"[\w'-]+", text.lower())))

    for name in ("response_before", "response", "reference") if "post" in samples[0] else ():
        told = [(pairs(sample[name]), set(pairs(sample["post"]))) for sample in samples]
        shares = [np.mean([pair in post for pair in own]) for own, post in told if own]
        found[f"copied, {name}"] = float(np.mean(shares)) if shares else 0.0
    return found


def prompt_by_prompt(kept: list[dict]) -> list[str]:
    """The changes as a table, a line a run."""
    text = (
        "Mean change ± its standard error over a run's prompts; copied: what share of a summary's pairs of words is in the "
        "post, before → after (of the references). [Ten prompts of each run with what followed](samples.json)."
    )
    names = list(dict.fromkeys(name for run in kept for name in run["changes"] if not name.startswith("copied")))
    copied = [f"copied, {name}" for name in ("response_before", "response", "reference")]
    some, rows = any(copied[1] in run["changes"] for run in kept), []
    for run in kept:
        found = run["changes"]
        texts = ["{:+.3g} ± {:.2g}".format(*found[name]) if name in found else "" for name in names]
        shares = "{:.2f} → {:.2f} ({:.2f})".format(*(found[name] for name in copied)) if copied[1] in found else ""
        rows.append([f"{run['arm']}, seed {run['seed']}", run["prompts"], *texts, *([shares] if some else [])])
    head = "### Before and after training, prompt by prompt"
    return [head, "", text, "", *table_of(["", "prompts", *names, *(["copied"] if some else [])], rows)]


def main(args: Args) -> None:
    found = load_samples(load_runs(args.sources))
    lines = prompt_by_prompt(found)
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "samples.json", json.dumps(found, indent=1) + "\n")
    write_whole(args.out / "samples.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
