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

import torch
from rouge_score.rouge_scorer import RougeScorer

sys.path.insert(0, str(Path(__file__).parents[2]))
import sppo_rlhf_tldr as script


def main() -> None:
    args = script.OFFLINE
    posts = script.load_texts(args)["test"][: args.test_episodes]
    tokenizer, _, reward = script.load_models(args, torch.device("cpu"))
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
    print(json.dumps(found, indent=1))
    path = Path(__file__).parents[1] / "results/learning-tldr/yardsticks.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
