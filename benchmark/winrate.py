"""Win rate of a run's summaries by an LLM judge: any endpoint that speaks OpenAI's chat protocol.

    OPENAI_API_KEY=... python benchmark/winrate.py runs/tldr__sppo_a0.5_b0.2__1__1700000000000 --model MODEL
    python benchmark/winrate.py RUN_FOLDER --model MODEL --base-url http://localhost:8000/v1      # a server of your own
    python benchmark/winrate.py RUN_FOLDER --model MODEL --against before                         # the untrained policy

Reads samples.json of the run folder of sppo_rlhf_tldr.py. Each pair of summaries is judged twice, in both orders, as judges
favour a place; a pair won in one order and lost in the other counts as a tie. Two equal summaries are a tie without asking.
Writes into the run folder

    winrate_{against}_{model}.jsonl   each answer as it comes: killed, the next start asks for the missing ones alone
    winrate_{against}_{model}.json    win rate (ties count half) with its standard error, wins, ties, losses, how often both
                                      orders agree and how often the first place won, refusals, failures, tokens and cost

The key is read from OPENAI_API_KEY by the library and is written nowhere. A question that the endpoint refuses with status 400
counts as refused; the next start asks it again. Exit status 1 if requests failed for good, or no pair has a readable verdict.
"""

from __future__ import annotations  # openai's types, which --help does without

import hashlib
import json
import math
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import tyro
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)
MISSING = None
try:
    import openai
    from tqdm import tqdm
except ModuleNotFoundError as error:
    MISSING = error.name

QUESTION = """Below are a post and two summaries of it, A and B. Which summary is better? A good summary states the main \
points of the post, is true to it, and is short and clear.

Post:
{post}

Summary A:
{a}

Summary B:
{b}

Answer with one word: A, B or tie."""
ASK_AGAIN = 1  # times, where an answer is none of these


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """run folder with samples.json"""
    model: str
    """name of the judge at the endpoint"""
    base_url: str | None = None
    """address of the endpoint; OpenAI's own unless given"""
    against: Literal["reference", "before"] = "reference"
    """what the trained policy's summaries are compared with: the reference summaries or the untrained policy's"""
    pairs: int = 0
    """the first so many samples; 0 for all"""
    jobs: int = 8
    """requests at a time"""
    timeout: float = 60.0
    """seconds that a request may take"""
    retries: int = 6
    """times that a request is sent again after 429, 5xx, a timeout or a broken connection, after longer and longer waits"""
    temperature: float | None = 0.0
    """of the judge; None leaves it to endpoints that accept no other than their own"""
    input_price: float = 0.0
    """what a million tokens of questions cost, in any currency"""
    output_price: float = 0.0
    """what a million tokens of answers cost"""


def read_verdict(text: str) -> str | None:
    """ "A", "B" or "tie" if the answer is one of these, whatever marks stand around it; None otherwise."""
    text = re.sub(r"(?s)^.*</think>", "", text)  # what a reasoning model thinks aloud first
    text = re.sub(r"(</?\w+>|<\|\w+\|>|\s)+$", "", text)  # a template's own marks behind it, such as </s>
    words = r"(?:(?:the|my|final|better|answer|summary|verdict|is|boxed|text)\W+)*"  # \boxed{\text{A}} of reasoning models, too
    found = re.fullmatch(rf"\W*{words}(A|B|tie)\W*", text.strip(), flags=re.IGNORECASE)
    return found and {"a": "A", "b": "B", "tie": "tie"}[found.group(1).lower()]


def give_up_without_credit(response) -> None:
    """Tells the library not to send a request again for which there is no money: status 429, as if the endpoint were busy."""
    if response.status_code == 429:
        response.read()
        if "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"


def ask(client: openai.OpenAI, args: Args, question: str) -> dict:
    """{"verdict": "A", "B", "tie", "refused" or "unreadable", "answer", "input_tokens", "output_tokens"}.

    Raises openai.APIError if the request fails for good, ValueError if what came back is no answer of the protocol.
    """
    used = {"input_tokens": 0, "output_tokens": 0}
    for _ in range(1 + ASK_AGAIN):
        options = {} if args.temperature is None else {"temperature": args.temperature}
        messages = [{"role": "user", "content": question}]
        try:
            reply = client.chat.completions.create(model=args.model, messages=messages, **options)
        except openai.BadRequestError as error:  # of this pair: a content filter, a text that is too long
            return {"verdict": "refused", "answer": f"{type(error).__name__}: {error}"[:200], **used}
        try:
            choice = reply.choices[0]
            text = "" if choice.message.content is None else choice.message.content + ""  # TypeError unless a text
            used["input_tokens"] += reply.usage.prompt_tokens if reply.usage else 0
            used["output_tokens"] += reply.usage.completion_tokens if reply.usage else 0
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"no answer of the protocol: {str(reply)[:80]!r}") from error
        if choice.message.refusal or choice.finish_reason == "content_filter":
            return {"verdict": "refused", "answer": choice.message.refusal or text, **used}
        verdict = read_verdict(text)
        if verdict:
            return {"verdict": verdict, "answer": text, **used}
    return {"verdict": "unreadable", "answer": text, **used}


def summarise(answers: dict[tuple[int, str], dict], equal: int, args: Args) -> dict:
    """The numbers of the .json from the answers by (sample, order); order "AB" has the trained policy's summary as A.

    A pair scores 1 if it wins in both orders, or in one with a tie in the other; 0 if it loses so; else 1/2, like the `equal`
    pairs that were not asked about. Pairs without a verdict in both orders are left out; what they lack is counted.
    """
    points = {"AB": {"A": 1.0, "B": 0.0, "tie": 0.5}, "BA": {"A": 0.0, "B": 1.0, "tie": 0.5}}
    scores, agree, first = [], [], []
    for sample in sorted({sample for sample, _ in answers}):
        both = [points[order].get(answers.get((sample, order), {}).get("verdict")) for order in points]
        if None not in both:
            mean = sum(both) / 2
            scores.append(0.5 if mean == 0.5 else float(mean > 0.5))
            agree.append(both[0] == both[1])
            first.append((both[0] + 1 - both[1]) / 2)
    asked = len(scores)
    scores += [0.5] * equal
    n = len(scores)
    rate = sum(scores) / n if n else None
    verdicts = [answer["verdict"] for answer in answers.values()]
    tokens = {name: sum(answer[name] for answer in answers.values()) for name in ("input_tokens", "output_tokens")}
    return {
        "win_rate": rate,
        "win_rate_stderr": math.sqrt(sum((score - rate) ** 2 for score in scores) / (n - 1) / n) if n > 1 else None,
        "pairs": n,
        "wins": scores.count(1.0),
        "ties": scores.count(0.5),
        "losses": scores.count(0.0),
        "equal": equal,
        "orders_agree": sum(agree) / asked if asked else None,
        "first_place_won": sum(first) / asked if asked else None,
        "refused": verdicts.count("refused"),
        "unreadable": verdicts.count("unreadable"),
        **tokens,
        "cost": (tokens["input_tokens"] * args.input_price + tokens["output_tokens"] * args.output_price) / 1e6,
        "model": args.model,
        "against": args.against,
        "temperature": args.temperature,
        "question": QUESTION,
    }


def load_questions(args: Args) -> tuple[dict[tuple[int, str], str], int]:
    """What to ask, by (sample, order), and how many pairs are equal texts."""
    other = {"reference": "reference", "before": "response_before"}[args.against]
    try:
        samples = json.loads((args.run / "samples.json").read_text())
        triples = [(sample["post"], sample["response"], sample[other]) for sample in samples[: args.pairs or None]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{args.run}: expected a folder of a finished run of sppo_rlhf_tldr.py, with its samples.json ({error!r:.80})")
    questions, equal = {}, 0
    for i, (post, response, against) in enumerate(triples):
        if response.strip() == against.strip():
            equal += 1
            continue
        for order, (a, b) in (("AB", (response, against)), ("BA", (against, response))):
            questions[i, order] = QUESTION.format(post=post, a=a.strip() or "(empty)", b=b.strip() or "(empty)")
    return questions, equal


def fail(message: str):
    print(f"winrate.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(args: Args) -> None:
    for name, accepted, expected in (
        ("pairs", args.pairs >= 0, "0 or more"),
        ("jobs", args.jobs >= 1, "1 or more"),
        ("timeout", args.timeout > 0, "a number above 0"),
        ("retries", args.retries >= 0, "0 or more"),
        ("temperature", args.temperature is None or 0 <= args.temperature <= 2, "None, or a number from 0 to 2"),
    ):
        if not accepted:
            fail(f"--{name} {getattr(args, name)}: expected {expected}")
    questions, equal = load_questions(args)
    key = os.environ.get("OPENAI_API_KEY")
    if not (args.base_url or key):
        fail("OPENAI_API_KEY is not set; expected the key of the endpoint, or --base-url of one that needs none")
    stem = args.run / f"winrate_{args.against}_{re.sub(r'[^A-Za-z0-9.-]', '_', args.model)}"
    answers_path, result_path = Path(f"{stem}.jsonl"), Path(f"{stem}.json")
    # an answer belongs to the judge, its settings and the very question: another run of the policy asks anew
    judge = f"{args.base_url} {args.model} {args.temperature}"
    digest = {place: hashlib.sha256(f"{judge} {text}".encode()).hexdigest()[:16] for place, text in questions.items()}
    answers = {}
    for line in answers_path.read_text().splitlines() if answers_path.exists() else []:
        try:
            answer = json.loads(line)
            place = (answer["sample"], answer["order"])
            if digest.get(place) == answer["question"]:
                answers[place] = answer
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
    missing = [place for place in questions if place not in answers]
    http = openai.DefaultHttpxClient(timeout=args.timeout, event_hooks={"response": [give_up_without_credit]})
    client = openai.OpenAI(base_url=args.base_url, api_key=key or "none", max_retries=args.retries, http_client=http)
    failures: list[str] = []
    hopeless: list[str] = []  # what would meet every request
    bad: list[str] = []  # answers of status 400
    points = ("A", "B", "tie")
    lock = threading.Lock()
    file = answers_path.open("a")
    if answers_path.stat().st_size and not answers_path.read_text().endswith("\n"):
        file.write("\n")

    def answer_one(place: tuple[int, str]) -> None:
        if hopeless:
            return
        try:
            answer = {"sample": place[0], "order": place[1], "question": digest[place], **ask(client, args, questions[place])}
        except (openai.APIError, ValueError) as error:
            text = f"{type(error).__name__}: {error}".replace(key or "\0", "(key)")[:200]  # some endpoints repeat it
            with lock:
                failures.append(text)
                known = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
                unreachable = isinstance(error, openai.APIConnectionError) and not answers
                if isinstance(error, known) or unreachable or getattr(error, "code", None) == "insufficient_quota":
                    hopeless.append(text)
            return
        with lock:
            if answer["answer"].startswith("BadRequestError: "):
                bad.append(answer["answer"].replace(key or "\0", "(key)"))
                if len(bad) == min(4, len(questions)) and not any(other["verdict"] in points for other in answers.values()):
                    hopeless.append(bad[0])  # not these pairs: the model or its options
            else:
                file.write(json.dumps(answer).replace(key or "\0", "(key)") + "\n")
                file.flush()
            answers[place] = answer

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for _ in tqdm(pool.map(answer_one, missing), total=len(missing), disable=None):
                pass
        except KeyboardInterrupt:  # what has been asked is waited for and kept
            hopeless.append("stopped")
            pool.shutdown(cancel_futures=True)
            sys.exit(130)
        finally:
            file.close()
    if hopeless:
        where = args.base_url or "the endpoint"
        fail(f"--model {args.model}: {where} says {hopeless[0]}; expected a key, a model and options that it accepts")
    result = {**summarise(answers, equal, args), "failed": len(failures), "failures": sorted(set(failures))[:5]}
    temporary = result_path.with_name(result_path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, result_path)
    readable = result["pairs"] > equal or not questions
    if readable and result["pairs"]:
        error = "" if result["win_rate_stderr"] is None else f" ± {result['win_rate_stderr']:.3f}"
        agree = "" if result["orders_agree"] is None else f"orders agree in {result['orders_agree']:.0%}; "
        print(
            f"winrate.py: {result['win_rate']:.3f}{error} against {args.against}, {result['pairs']} pairs: "
            f"{result['wins']} won, {result['ties']} tied, {result['losses']} lost; "
            f"{agree}{result['refused']} refused, {result['unreadable']} unreadable; cost {result['cost']:.4f}; {result_path}"
        )
    elif not readable:
        print(f"winrate.py: no readable verdict: {result['refused']} answers refused, {result['unreadable']} unreadable")
    if failures:
        sys.exit(f"winrate.py: {len(failures)} requests failed ({failures[0]}); start again to ask for them")
    if not readable:
        sys.exit(1)


if __name__ == "__main__":
    try:
        arguments = tyro.cli(Args, description=__doc__)
    finally:
        if MISSING:  # after --help, too
            fail(f"needs {MISSING}; expected what `{INSTALL}` installs")
    main(arguments)
