"""benchmark/report.py and studies/rlhf_samples.py of RLHF runs: before and after, prompt by prompt, by hand."""

import json
import sys

import pandas as pd
import pytest
from helpers import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
sys.path.insert(0, str(ROOT / "benchmark/studies"))
import report
import rlhf_samples

POST = "The cat sat on the mat. It was Tuesday"


def two_samples():
    one = {"post": POST, "reference": "a cat", "response_before": "cat sat", "response": "The cat sat, it was", "prompt": POST}
    two = {"post": POST, "reference": "mat it", "response_before": "", "response": "dog sat on a mat", "prompt": POST}
    return [{**one, "score": 3.0, "score_before": 1.0}, {**two, "score": 2.0, "score_before": 1.0}]


def test_changes_and_copied_words_by_hand():
    found = rlhf_samples.changes(two_samples())
    assert found.pop("score") == pytest.approx([1.5, 0.5])  # of 2 and 1: sqrt(0.5) / sqrt(2)
    assert found == pytest.approx(
        {
            "copied, response_before": 1.0,  # cat sat; an empty one has no pairs
            "copied, response": ((3 / 4) + (1 / 4)) / 2,  # the cat, cat sat, (sat it), it was; sat on of four
            "copied, reference": (0 + 1) / 2,
        }
    )
    without = [{key: value for key, value in sample.items() if key != "post"} for sample in two_samples()]
    assert set(rlhf_samples.changes(without)) == {"score"}  # reviews have no post


def write_runs(folder):
    """PPO and SPPO of sppo_rlhf_tldr.py, with what the script leaves."""
    for arm, alpha, beta in (("ppo", 1.0, 0.0), ("sppo", 0.5, 0.2)):
        run = folder / arm
        run.mkdir(parents=True)
        after = {"score": 2.5, "kl": 7.0 + beta, "perplexity": 40.0}
        result = {
            "script": "sppo_rlhf_tldr.py",
            "run_id": f"id-{arm}",
            "env_id": "tldr",
            "args": {"seed": 1, "alpha": alpha, "beta": beta, "Z": -1.0, "iterations": 2, "exp_name": arm},
            "versions": {"torch": "2"},
            "commit": "a" * 40,
            "device": "cpu",
            "score": 2.5,
            "seconds": 36.0,
            "global_step": 32,
            "before": {"score": 1.0, "kl": 0.0, "perplexity": 30.0},
            "after": after,
        }
        (run / "result.json").write_text(json.dumps(result))
        (run / "args.json").write_text(json.dumps({key: result[key] for key in ("script", "run_id", "args", "versions")}))
        with SummaryWriter(run) as writer:
            for step in (16, 32):
                writer.add_scalar("objective/scores", step / 16, step)
                writer.add_scalar("objective/kl", alpha * step, step)
        (run / "samples.json").write_text(json.dumps(two_samples() * 8))
    return folder


def test_a_report_of_rlhf_runs_has_before_and_after(tmp_path):
    out = tmp_path / "out"
    report.main(report.Args((write_runs(tmp_path / "runs"),), out))
    text = (out / "report.md").read_text()
    assert "| perplexity | 30.0 | 40.0 | 40.0 |" in text and "| kl | 0" in text
    curves = pd.read_csv(out / "curves.csv", index_col=["tag", "step"]).loc["objective/kl"]
    assert curves.to_dict() == {"id-ppo": {16: 16.0, 32: 32.0}, "id-sppo": {16: 8.0, 32: 16.0}}
    assert "![KL while training](kl.svg)" in text and (out / "kl.svg").exists() and (out / "kl.png").exists()


def test_samples_are_told_prompt_by_prompt(tmp_path):
    out = tmp_path / "out"
    rlhf_samples.main(rlhf_samples.Args((write_runs(tmp_path / "runs"),), out))
    rows = [line for line in (out / "samples.md").read_text().splitlines() if ", seed 1 |" in line]
    # 16 changes, 2 and 1 by turns: standard deviation sqrt(4 / 15), over sqrt(16)
    assert len(rows) == 2 and all(row.endswith("| 16 | +1.5 ± 0.13 | 1.00 → 0.50 (0.50) |") for row in rows)
    kept = json.loads((out / "samples.json").read_text())
    assert [(run["run_id"], run["seed"], len(run["samples"])) for run in kept] == [("id-ppo", 1, 10), ("id-sppo", 1, 10)]
    assert kept[0]["samples"] == two_samples() * 5
