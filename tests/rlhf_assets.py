"""A tokenizer, a GPT-2, a classifier and reviews, all tiny and made here: the RLHF scripts' tests need no network."""

import json

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

GOOD, BAD = (
    f"{kind} and i have seen many this year".split()
    for kind in ("a great film with a wonderful cast the best story", "an awful movie with a terrible plot the worst acting")
)


def reviews(count=80):
    rng = np.random.default_rng(0)
    words = [GOOD if i % 2 else BAD for i in range(count)]
    return [" ".join(rng.choice(choice, size=rng.integers(12, 30))) + "." for choice in words]


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>", "[PAD]"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(reviews(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]", model_max_length=64
    )


def make_lm(vocab_size, dropout=0.1, seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_classifier(vocab_size):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=2, initializer_range=0.5, pad_token_id=1,
        id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def write_assets(folder):
    """policy/, which ends some responses early, reward/, reviews.jsonl and judge.json in `folder`."""
    tokenizer = make_tokenizer()
    lm = make_lm(len(tokenizer))
    eos = lm.transformer.wte.weight[tokenizer.eos_token_id].detach()
    lm.transformer.ln_f.bias.data += 6.5 * eos / eos.square().sum()  # raises the logit of EOS by 6.5 everywhere
    for name, model in (("policy", lm), ("reward", make_classifier(len(tokenizer)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "reviews.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reviews()))
    terms = {"great": [1.0, 2.0], "awful": [1.0, -2.0]}
    (folder / "judge.json").write_text(json.dumps({"intercept": 0.0, "terms": terms}))
    return folder


def arguments(folder):
    """The command line that uses them, at a tiny size."""
    line = f"""--policy {folder / "policy"} --tokenizer {folder / "policy"} --reward-model {folder / "reward"}
        --reward-label positive --dataset {folder / "reviews.jsonl"} --judge {folder / "judge.json"} --iterations 3
        --trajectories-per-update 8 --minibatch-size 4 --update-epochs 2 --max-prompt-length 10 --response-length 6
        --min-response-length 0 --learning-rate 1e-3 --eval-episodes 8 --eval-interval 0 --perplexity-tokens 100
        --checkpoint-interval 1 --top-k 0 --num-threads 1 --no-cuda"""
    return line.split()
