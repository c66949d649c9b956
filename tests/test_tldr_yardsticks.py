"""benchmark/studies/tldr_yardsticks.py on tiny assets, where a post's own beginning is its reference, or is not."""

import json
import sys

import pytest
import rlhf_assets
import tldr_assets
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark/studies"))
import tldr_yardsticks

import sppo_rlhf_tldr as script


def test_the_beginning_is_worth_what_a_reference_of_the_same_words_is(tmp_path):
    folder = tldr_assets.write_assets(tmp_path)
    args = script.parse_args(list(map(str, tldr_assets.arguments(folder))))
    texts = rlhf_assets.reviews(8)
    for references in (texts, ["0 1 2 3"] * 8):
        lines = [json.dumps({"prompt": f"{text}\nTL;DR:", "label": it}) for text, it in zip(texts, references, strict=True)]
        (folder / "posts/test.jsonl").write_text("\n".join(lines) + "\n")
        found = tldr_yardsticks.yardsticks(args)
        beginning, reference = found["the post's own beginning"], found["the reference"]
        assert not [name for name in reference if "rouge" in name]
        if references is texts:
            assert {name: beginning[name] for name in reference} == pytest.approx(reference)
            # six tokens of the text, up to its whole: precision 1, recall the words' share
            assert 0 < beginning["rouge1"] < 1 and beginning["rouge1"] == pytest.approx(beginning["rougeL"])
        else:
            assert beginning["score"] != pytest.approx(reference["score"]) and beginning["rouge1"] == 0
