"""What a summary is worth that nobody learned to write, by the reward model of `sppo_rlhf_tldr.py --offline`.

    python benchmark/assets/make_rlhf_assets.py tldr      # first
    python benchmark/studies/tldr_yardsticks.py

Of the test posts: the post's own beginning, as long as a summary may be, and the reference, cut to that length; scored as the
script scores. Writes benchmark/results/learning-tldr/yardsticks.json.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import torch
    from rouge_score.rouge_scorer import RougeScorer

    import sppo_rlhf_tldr as script
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)


def yardsticks(args: script.Args) -> dict[str, dict[str, float]]:
    """Score, its standard deviation, words and (of the beginnings) ROUGE against the references, means over the test posts."""
    posts = script.load_texts(args)["test"]
    _, reward, tokenizer = script.load_models(args, torch.device("cpu"))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    references = [reference for _, reference in posts]
    found = {}
    for name, summaries in (("the post's own beginning", [post for post, _ in posts]), ("the reference", references)):
        prompts, cut = script.encode([(post, it) for (post, _), it in zip(posts, summaries, strict=True)], tokenizer, args)
        with torch.no_grad():
            scores = script.score(script.decode(torch.cat([prompts, cut], dim=1), tokenizer), reward, tokenizer, args)
        texts = [text.strip() for text in script.decode(cut, tokenizer)]
        found[name] = {"score": scores.mean().item(), "score_std": scores.std().item()}
        found[name]["words"] = statistics.mean(len(text.split()) for text in texts)
        if summaries is not references:
            rouge = [scorer.score(reference.strip(), text) for reference, text in zip(references, texts, strict=True)]
            found[name] |= {kind: statistics.mean(one[kind].fmeasure for one in rouge) for kind in rouge[0]}
    return found


def main() -> None:
    found = yardsticks(script.OFFLINE)
    print(json.dumps(found, indent=1))
    path = Path(__file__).parents[1] / "results/learning-tldr/yardsticks.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
