"""benchmark/learning_rlhf.py: what it tells of samples, by hand."""

import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import learning_rlhf


def test_changes_and_copied_words_by_hand():
    post = "The cat sat on the mat. It was Tuesday"
    one = {"post": post, "reference": "a cat", "response_before": "cat sat", "response": "The cat sat, it was", "prompt": post}
    two = {"post": post, "reference": "mat it", "response_before": "", "response": "dog sat on a mat", "prompt": post}
    samples = [{**one, "score": 3.0, "score_before": 1.0}, {**two, "score": 2.0, "score_before": 1.0}]
    found = learning_rlhf.change(samples)
    assert found.pop("score") == pytest.approx([1.5, 0.5])  # of 2 and 1: sqrt(0.5) / sqrt(2)
    assert found == pytest.approx(
        {
            "copied, response_before": 1.0,  # cat sat; an empty one has no pairs
            "copied, response": ((3 / 4) + (1 / 4)) / 2,  # the cat, cat sat, (sat it), it was; sat on of four
            "copied, reference": (0 + 1) / 2,
        }
    )
    without = [{key: value for key, value in sample.items() if key != "post"} for sample in samples]
    assert set(learning_rlhf.change(without)) == {"score"}  # reviews have no post
