"""benchmark/winrate.py against a local server that speaks the protocol, and sometimes does not."""

import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import winrate

KEY = "sk-that-no-file-may-hold"


class Judge(BaseHTTPRequestHandler):
    """Answers as `server.reply(question, attempt)` says: a text, or (status, body), or seconds to wait first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            self.server.questions.append(question)
            self.server.attempts[question] += 1
            self.server.seen.append((self.path, self.headers["Authorization"], body["model"], body.get("temperature")))
        reply = self.server.reply(question, self.server.attempts[question])
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "A"
        status, content = reply if isinstance(reply, tuple) else (200, completion(reply))
        content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client's patience has ended
            pass

    def log_message(self, *_):
        pass


def completion(text, refusal=None, finish="stop"):
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": choices, "usage": usage}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.lock, server.questions, server.seen, server.attempts = threading.Lock(), [], [], Counter()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """Six samples; "good" is better than "plain", which is better than "bad"."""
    words = [("good", "plain", "bad")] * 3 + [("bad", "plain", "bad"), ("plain", "plain", "bad"), ("", "plain", "good")]
    samples = [
        {
            "post": f"Post {i}.",
            "prompt": "Post\nTL;DR:",
            "response": response,
            "reference": reference,
            "response_before": before,
        }
        for i, (response, reference, before) in enumerate(words)
    ]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    return tmp_path


def summaries(question):
    return re.search(r"Summary A:\n(.*)\n\nSummary B:\n(.*)\n\nAnswer", question).groups()


def honest(question, _=1):
    a, b = (("(empty)", "bad", "plain", "good").index(text) for text in summaries(question))
    return "A" if a > b else "B" if b > a else "Tie."


def judge(server, folder, **changed):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    args = {"model": "a/judge", "base_url": address, "retries": 2, "timeout": 5.0, **changed}
    winrate.main(winrate.Args(run=folder, **args))
    return json.loads((folder / f"winrate_{args.get('against', 'reference')}_a_judge.json").read_text())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The library's pauses between attempts, which grow to seconds, are short here."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.02)


def test_both_orders_are_asked_and_ties_count_half(server, folder):
    server.reply = honest
    result = judge(server, folder, input_price=2.0, output_price=10.0)
    assert len(server.questions) == len(set(server.questions)) == 10  # one pair is equal
    pairs = Counter(frozenset(summaries(question)) for question in server.questions)
    assert all(count % 2 == 0 for count in pairs.values())
    assert (result["wins"], result["ties"], result["losses"], result["pairs"], result["equal"]) == (3, 1, 2, 6, 1)
    assert result["win_rate"] == pytest.approx(3.5 / 6)
    scores = [1, 1, 1, 0, 0.5, 0]
    mean = sum(scores) / 6
    assert result["win_rate_stderr"] == pytest.approx((sum((x - mean) ** 2 for x in scores) / 5 / 6) ** 0.5)
    assert result["orders_agree"] == 1 and result["first_place_won"] == 0.5
    assert result["input_tokens"] == 1000 and result["output_tokens"] == 20
    assert result["cost"] == pytest.approx((1000 * 2 + 20 * 10) / 1e6)
    assert result["refused"] == result["unreadable"] == result["failed"] == 0
    path, authorization, model, temperature = server.seen[0]
    assert path == "/v1/chat/completions" and model == "a/judge" and temperature == 0
    assert authorization == f"Bearer {KEY}"
    assert all("TL;DR" not in question for question in server.questions)


def test_a_judge_that_loves_the_first_place_makes_ties(server, folder):
    server.reply = lambda question, _: "A"
    result = judge(server, folder)
    assert result["ties"] == 6 and result["win_rate"] == 0.5 and result["win_rate_stderr"] == 0
    assert result["orders_agree"] == 0 and result["first_place_won"] == 1


def test_against_the_untrained_policy(server, folder):
    server.reply = honest
    result = judge(server, folder, against="before")
    assert (result["wins"], result["ties"], result["losses"]) == (4, 1, 1)


def test_the_key_is_written_nowhere(server, folder, capsys):
    server.reply = lambda question, attempt: (500, {"error": {"message": "broken"}}) if attempt == 1 else honest(question)
    judge(server, folder)
    out = "".join(capsys.readouterr())
    assert KEY not in out + "".join(path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_is_over_in_a_while_is_asked_again(status, server, folder):
    body = {"error": {"message": "later"}}
    server.reply = lambda question, attempt: (status, body) if attempt <= 2 else honest(question)
    result = judge(server, folder)
    assert result["pairs"] == 6 and result["failed"] == 0 and set(server.attempts.values()) == {3}


def test_timeouts_are_asked_again(server, folder):
    slow = []

    def reply(question, attempt):
        if attempt == 1 and len(slow) < 2:
            slow.append(question)
            return 1.0
        return honest(question)

    server.reply = reply
    result = judge(server, folder, timeout=0.3)
    assert result["pairs"] == 6 and result["failed"] == 0 and len(server.questions) == 12 and len(slow) == 2


def test_a_start_after_failures_asks_for_the_missing_alone(server, folder, capsys):
    server.reply = lambda question, _: (500, {"error": {"message": "broken"}}) if "Post 2" in question else honest(question)
    with pytest.raises(SystemExit, match=r"2 requests failed \(InternalServerError.*start again"):
        judge(server, folder)
    result = json.loads((folder / "winrate_reference_a_judge.json").read_text())
    assert result["pairs"] == 5 and result["failed"] == 2
    assert max(server.attempts.values()) == 3
    server.questions.clear()
    server.reply = honest
    result = judge(server, folder)
    assert result["pairs"] == 6 and result["failed"] == 0 and result["wins"] == 3
    assert len(server.questions) == 2 and all("Post 2" in question for question in server.questions)
    server.questions.clear()
    assert judge(server, folder) == result and server.questions == []


def test_killed_in_the_middle_of_a_line_it_goes_on(server, folder):
    server.reply = honest
    result = judge(server, folder)
    answers = folder / "winrate_reference_a_judge.jsonl"
    lines = answers.read_text()
    answers.write_text(lines[: len(lines) // 2])
    whole = lines[: len(lines) // 2].count("\n")
    server.questions.clear()
    assert judge(server, folder) == result and len(server.questions) == 10 - whole
    server.questions.clear()
    assert judge(server, folder) == result and server.questions == []


def test_new_samples_are_asked_anew(server, folder):
    server.reply = honest
    judge(server, folder)
    samples = json.loads((folder / "samples.json").read_text())
    samples[3]["response"] = "good"
    (folder / "samples.json").write_text(json.dumps(samples))
    server.questions.clear()
    result = judge(server, folder)
    assert result["wins"] == 4 and len(server.questions) == 2 and all("Post 3" in question for question in server.questions)


def test_refusals_and_unreadable_answers_are_counted_and_left_out(server, folder):
    def reply(question, attempt):
        if "Post 0" in question:
            return 200, completion(None, refusal="I cannot judge that.")
        if "Post 1" in question:
            return 200, completion("", finish="content_filter")
        if "Post 2" in question:
            return "It depends: A and B are both fine."
        return "well..." if attempt == 1 else honest(question)  # which the second question mends

    server.reply = reply
    result = judge(server, folder)
    assert result["refused"] == 4 and result["unreadable"] == 2 and result["failed"] == 0
    assert (result["pairs"], result["wins"], result["ties"], result["losses"]) == (3, 0, 1, 2)
    assert server.attempts[next(question for question in server.questions if "Post 2" in question)] == 2
    assert result["input_tokens"] == 100 * (4 + 2 * 2 + 4 * 2)


ODD = ("[]", "5", '[{"type": "text", "text": "A"}]')  # contents that are no texts
BODIES = ["not json", "[]", "{}", '{"choices": []}', '"text"', '{"choices": [{"message": null}]}']


@pytest.mark.parametrize("body", BODIES + [json.dumps(completion(json.loads(text))) for text in ODD])
def test_malformed_answers_are_failures_and_not_verdicts(body, server, folder):
    server.reply = lambda question, _: (200, body) if "Post 3" in question else honest(question)
    with pytest.raises(SystemExit, match="2 requests failed"):
        judge(server, folder)
    result = json.loads((folder / "winrate_reference_a_judge.json").read_text())
    assert result["pairs"] == 5 and result["failed"] == 2


ENDS = [(400, "BadRequest"), (401, "AuthenticationError"), (403, "PermissionDenied"), (404, "NotFoundError")]


@pytest.mark.parametrize(("status", "name"), ENDS)
def test_a_wrong_key_or_model_ends_at_once_in_one_line(status, name, server, folder, capsys):
    server.reply = lambda *_: (status, {"error": {"message": f"not with {KEY}"}})
    with pytest.raises(SystemExit) as stopped:
        judge(server, folder, jobs=1)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{server.server_port}/v1 says {name}" in err
    assert err.count("\n") == 1 and len(server.questions) == (4 if status == 400 else 1)  # 400 might be one pair's
    assert KEY not in err + "".join(path.read_text() for path in folder.iterdir())
    assert "not with (key)" in err


def test_400_counts_for_its_pair_alone(server, folder):
    """A content filter, or a text that is too long; asked again at the next start, as it may be lifted."""

    def reply(question, _):
        return (400, {"error": {"message": "content_filter"}}) if "Post 1." in question else honest(question)

    server.reply = reply
    result = judge(server, folder, jobs=1)
    assert result["pairs"] == 5 and result["refused"] == 2 and result["failed"] == 0
    before = len(server.questions)
    server.reply = honest
    result = judge(server, folder)
    assert len(server.questions) == before + 2 and result["pairs"] == 6 and result["refused"] == 0


def test_no_credit_ends_at_once(server, folder, capsys):
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota", "type": "insufficient_quota"}}
    server.reply = lambda *_: (429, body)
    with pytest.raises(SystemExit) as stopped:
        judge(server, folder, jobs=1, retries=6)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "says RateLimitError: Error code: 429" in err and err.count("\n") == 1
    assert len(server.questions) == 1


def test_thoughts_are_cut_before_the_verdict_is_read(server, folder):
    server.reply = lambda question, _: f"<think>B is bad,\nA is worse: B? </think>\n\n{honest(question)}"
    assert judge(server, folder)["pairs"] == 6
    assert winrate.read_verdict("<think>A") is None and winrate.read_verdict("<think>A</think> B") == "B"


def test_without_a_readable_verdict_the_status_is_1(server, folder, capsys):
    server.reply = lambda *_: "I cannot say."
    with pytest.raises(SystemExit) as stopped:
        judge(server, folder)
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "no readable verdict: 0 answers refused, 10 unreadable" in out
    assert json.loads((folder / "winrate_reference_a_judge.json").read_text())["unreadable"] == 10


def test_bad_input_is_one_line(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for run, base_url, expected in (
        (tmp_path / "nothing", "http://x", "nothing: expected a folder of a finished run"),
        (folder, None, "OPENAI_API_KEY is not set; expected"),
    ):
        with pytest.raises(SystemExit) as stopped:
            winrate.main(winrate.Args(run=run, model="m", base_url=base_url))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and expected in err and err.count("\n") == 1
    (folder / "samples.json").write_text('[{"prompt": "a", "response": "b"}]')
    with pytest.raises(SystemExit):
        winrate.main(winrate.Args(run=folder, model="m", base_url="http://x"))
    assert "expected a folder of a finished run of sppo_rlhf_tldr.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tie**", "tie"),
        ("Summary A", "A"),
        ("(B)", "B"),
        ("Answer: A", "A"),
        ("A or B", None),
        ("", None),
        ("Apple", None),
        ("Final answer: B", "B"),
        ("\\boxed{A}", "A"),
        ("The final answer is \\(\\boxed{\\text{B}}\\).", "B"),
        ("A</s>", "A"),
        ("tie<|im_end|>", "tie"),
        ("The answer is A or B", None),
        ("boxed", None),
    ],
)
def test_read_verdict(text, verdict):
    assert winrate.read_verdict(text) == verdict


def test_a_host_that_is_not_there_ends_at_once(folder, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(SystemExit) as stopped:
        winrate.main(winrate.Args(run=folder, model="m", base_url="http://127.0.0.1:9/v1", retries=1, jobs=1))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "http://127.0.0.1:9/v1 says APIConnectionError" in err and err.count("\n") == 1


def test_no_answer_waits_for_a_slower_one(server, folder):
    """The first question takes long; what the others got is in the file before."""
    done = threading.Event()

    def reply(question, _):
        if "Post 0" in question:
            done.wait(10)
        return honest(question)

    server.reply = reply
    thread = threading.Thread(target=judge, args=(server, folder), kwargs={"jobs": 4, "timeout": 30.0})
    thread.start()
    answers = folder / "winrate_reference_a_judge.jsonl"
    end = time.time() + 10
    while not (answers.exists() and answers.read_text().count("\n") == 8):
        assert time.time() < end
        time.sleep(0.05)
    done.set()
    thread.join()
    assert answers.read_text().count("\n") == 10


def test_an_endpoint_that_takes_no_temperature(server, folder):
    server.reply = honest
    judge(server, folder, temperature=None)
    assert all(temperature is None for *_, temperature in server.seen)


@pytest.mark.parametrize(
    ("name", "value"), [("jobs", 0), ("retries", -1), ("timeout", -1.0), ("pairs", -3), ("temperature", 3.0)]
)
def test_values_that_cannot_be_are_one_line(name, value, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        winrate.main(winrate.Args(**{"run": folder, "model": "m", "base_url": "http://x", name: value}))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{name} {value}: expected" in err and err.count("\n") == 1
