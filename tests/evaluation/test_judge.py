"""The judge asks an endpoint politely, bears with a bad one, loses no answer, and shows no key."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai")
import evaluate
import train
from config import UserError
from evaluation import judge as judging
from evaluation.judge import TRIES, Judge, describe, judge_stories, parse_marks

KEY = "sk-secret-7391"
GOOD = {"grammar": 8, "creativity": 6, "consistency": 7, "plot": 5, "age": "6-7", "comment": "It stops early."}


def completion(text: str) -> tuple[int, dict, dict]:
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}, {}


@pytest.fixture
def endpoint():
    """A server on the loopback; .answer(body, number) gives status, JSON and headers, or None: no answer at all."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append({**body, "authorization": self.headers.get("Authorization")})
            answer = server.answer(body, len(server.requests))
            if answer is None:
                server.released.wait(20)
                return
            status, content, headers = answer
            data = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8")
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.released = [], threading.Event()
    server.answer = lambda body, number: completion(json.dumps(GOOD))
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def make_judge(endpoint, monkeypatch):
    """A function that makes a judge, whose waits are only noted."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    waits = []

    def make(url=endpoint.url, timeout=10.0):
        judge = Judge("m", url, waits.append, timeout)
        judge.waits = waits
        return judge

    return make


def error(text: str, **more) -> dict:
    return {"error": {"message": text, "type": "x", "param": None, "code": None, **more}}


STORIES = [{"prompt": f"Tom had a {thing}", "text": f". The {thing} was red.", "ended": True}
           for thing in ("ball", "dog", "hat", "cat", "car")]
REAL = [{**story, "text": story["text"] + " He liked it."} for story in STORIES]


def test_beginning_and_completion_are_apart_and_the_marks_come_back(endpoint, make_judge):
    assert make_judge().mark("Tom had", " a {red} ball.") == GOOD
    asked = endpoint.requests[0]
    text = asked["messages"][0]["content"]
    assert "<beginning>\nTom had\n</beginning>" in text and "<completion>\n a {red} ball.\n</completion>" in text
    assert asked["temperature"] == 0 and asked["authorization"] == f"Bearer {KEY}"


def test_a_local_server_needs_no_key(endpoint, make_judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_judge().mark("a", "b") == GOOD and KEY not in endpoint.requests[0]["authorization"]


@pytest.mark.parametrize("answer", [
    "I cannot help with that.", "", "{", json.dumps({**GOOD, "plot": 11}), json.dumps({**GOOD, "plot": True}),
    json.dumps({**GOOD, "grammar": "good"}), json.dumps({"grammar": 5}), "[" * 100_000 + "{}"])
def test_an_answer_without_marks_is_asked_for_again(endpoint, make_judge, answer):
    endpoint.answer = lambda body, number: completion(answer if number < 3 else f"Sure!\n```{json.dumps(GOOD)}```")
    judge = make_judge()
    assert judge.mark("a", "b") == GOOD and len(endpoint.requests) == 3 and judge.waits == []
    endpoint.answer = lambda body, number: completion(answer)
    with pytest.raises(judging.BadAnswer):
        judge.mark("a", "b")
    assert len(endpoint.requests) == 3 + TRIES


@pytest.mark.parametrize(("content", "kind"), [
    ("<html>Log in</html>", "text/html"), ("no JSON", "application/json"), ("{}", "application/json"),
    ("[]", "application/json"), ('{"choices": []}', "application/json"), ('{"choices": [{}]}', "application/json"),
    ('{"choices": [{"message": null}]}', "application/json"), ('"text"', "application/json")])
def test_an_address_that_speaks_another_protocol_is_no_traceback(endpoint, make_judge, content, kind):
    endpoint.answer = lambda body, number: (200, content, {"Content-Type": kind})
    with pytest.raises(judging.BadAnswer):
        make_judge().mark("a", "b")


def test_an_unknown_age_is_left_out():
    assert parse_marks(json.dumps({**GOOD, "age": "old"}))["age"] is None


def test_an_endpoint_that_refuses_temperature_0_is_asked_without(endpoint, make_judge, tmp_path):
    def answer(body, number):
        if "temperature" in body:
            return 400, error("Unsupported value: 'temperature' does not support 0", param="temperature"), {}
        return completion(json.dumps(GOOD))

    endpoint.answer, judge = answer, make_judge()
    result = judge_stories(judge, STORIES[:2], REAL[:2], tmp_path / "judge.json", lambda cost: None, False)
    assert result["temperature"] is None and "since it refuses 0" in next(describe(result))
    assert len(endpoint.requests) == 5  # it is refused once


@pytest.mark.parametrize(("status", "content", "headers", "waits"), [
    (429, error("slow down"), {"Retry-After": "7"}, [7.0]), (429, error("slow down"), {}, [1.0, 2.0]),
    (429, error("slow down"), {"Retry-After": "soon"}, [1.0]),
    (429, error("slow down"), {"Retry-After": "9999"}, [60.0]),
    (500, error("oops"), {}, [1.0, 2.0, 4.0]), (503, {}, {}, [1.0])])
def test_a_busy_endpoint_is_given_time(endpoint, make_judge, status, content, headers, waits):
    endpoint.answer = lambda body, number: (
        (status, content, headers) if number <= len(waits) else completion(json.dumps(GOOD)))
    judge = make_judge()
    assert judge.mark("a", "b") == GOOD and judge.waits == waits


@pytest.mark.parametrize(("status", "content", "part", "calls"), [
    (401, error(f"Incorrect API key provided: {KEY[:8]}"), "refuses the key: set OPENAI_API_KEY", 1),
    (403, error("no"), "refuses the key", 1), (404, error("The model m does not exist"), "does not exist", 1),
    (400, error("too long"), "too long", 1), (429, error("pay", code="insufficient_quota"), "quota is used up", 1),
    (500, error(f"bad key {KEY}"), f"no answer, after {TRIES} tries", TRIES)])
def test_what_no_patience_helps_is_one_line_without_the_key(endpoint, make_judge, status, content, part, calls):
    endpoint.answer = lambda body, number: (status, content, {})
    with pytest.raises(UserError) as caught:
        make_judge().mark("a", "b")
    line = str(caught.value)
    assert part in line and endpoint.url in line and "\n" not in line and len(endpoint.requests) == calls
    assert KEY not in line and KEY[:8] not in line


def test_an_endpoint_that_says_nothing_or_is_not_there_is_one_line(endpoint, make_judge):
    endpoint.answer = lambda body, number: None
    judge = make_judge(timeout=0.05)
    with pytest.raises(UserError, match=f"gives no answer, after {TRIES} tries"):
        judge.mark("a", "b")
    assert judge.waits == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(UserError, match="gives no answer"):
        make_judge("http://127.0.0.1:9/v1").mark("a", "b")  # the discard port


def test_a_stopped_judge_goes_on_where_it_was(endpoint, make_judge, tmp_path):
    def answer(body, number):
        if number == 4:
            endpoint.stop = True
        return completion(json.dumps({**GOOD, "grammar": 9 if "He liked it." in body["messages"][0]["content"] else 4}))

    endpoint.answer, endpoint.stop = answer, False
    path, judge, costs = tmp_path / "judge.json", make_judge(), []
    original = judge.ask

    def ask(text):
        if endpoint.stop:
            raise KeyboardInterrupt
        return original(text)

    judge.ask = ask
    with pytest.raises(KeyboardInterrupt):
        judge_stories(judge, STORIES, REAL, path, costs.append, False)
    assert len(json.loads(path.read_text(encoding="utf-8"))["answers"]) == 4
    endpoint.answer = lambda body, number: answer(body, 0)
    result = judge_stories(make_judge(), STORIES, REAL, path, costs.append, False)
    assert len(endpoint.requests) == 10 and [cost.split(" of ")[0] for cost in costs] == ["10 calls", "6 calls"]
    assert result == json.loads(path.read_text(encoding="utf-8"))
    again = judge_stories(make_judge(), STORIES, REAL, path, costs.append, False)
    assert again["summary"] == result["summary"] and len(endpoint.requests) == 10 and len(costs) == 2
    grammar = result["summary"]["marks"]["grammar"]
    assert (grammar["model"], grammar["real"], grammar["difference"]) == (4, 9, -5) == (4, 9, grammar["low"])
    lines = "\n".join(describe(result))
    assert "difference -5.0 (95% interval -5.0 to -5.0)" in lines and lines.count("It stops early.") == 3
    assert KEY not in path.read_text(encoding="utf-8")
    seen = ["He liked it." in request["messages"][0]["content"] for request in endpoint.requests]
    assert seen != sorted(seen) and seen != sorted(seen, reverse=True)  # the two sides are mixed


def test_stories_without_marks_are_counted_and_asked_for_again(endpoint, make_judge, tmp_path):
    endpoint.answer = lambda body, number: completion(
        "no" if "ball was red" in body["messages"][0]["content"] else json.dumps(GOOD))
    path = tmp_path / "judge.json"
    result = judge_stories(make_judge(), STORIES, REAL, path, lambda cost: None, False)
    assert result["summary"]["pairs"] == 4 and "2 stories not judged" in "\n".join(describe(result))
    endpoint.answer = lambda body, number: completion(json.dumps(GOOD))
    asked = len(endpoint.requests)
    result = judge_stories(make_judge(), STORIES, REAL, path, lambda cost: None, False)
    assert result["summary"]["pairs"] == 5 and len(endpoint.requests) == asked + 2


def test_a_damaged_file_costs_its_answers_and_no_more(endpoint, make_judge, tmp_path):
    for content in ("{", "[]", '{"answers": {"a": {"grammar": "x"}}}', '{"answers": 3}'):
        (tmp_path / "judge.json").write_text(content, encoding="utf-8")
        result = judge_stories(make_judge(), STORIES[:1], REAL[:1], tmp_path / "judge.json", lambda cost: None, False)
        assert result["summary"]["pairs"] == 1


@pytest.mark.parametrize(("arguments", "part"), [
    (["--judge", "m"], "set the environment variable OPENAI_API_KEY, or name a local server by --judge_url"),
    (["--judge", "m", "--judge_url", "http://x/v1"], "no terminal to ask on: confirm by --yes"),
    (["--judge_url", "http://x/v1"], "--judge MODEL"), (["--judge", "m", "--data", "x.txt"], "leave out --data"),
    (["--judge", "m", "--judge_stories", "0"], "--judge_stories")])
def test_what_cannot_be_judged_is_refused_before_any_work(run_main, monkeypatch, arguments, part):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    status, _, error = run_main(evaluate, *arguments)
    assert status == 2 and part in error.splitlines()[-1]


def test_evaluate_has_its_stories_judged(endpoint, tiny_config, run_main, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert train.start_run(tiny_config("training.max_steps=2", "training.output_dir=run"), None, None) == 0
    status, out, error = run_main(evaluate, "--checkpoint", "run/best_model.pth", "--num_stories", "4", "--judge", "m",
                                  "--judge_url", endpoint.url, "--judge_stories", "3", "--yes")
    assert status == 0 and "The judge: 6 calls of m, about" in out and "Marks by m for 3 pairs" in out, error
    assert len(endpoint.requests) == 6 and KEY not in out + error
    assert json.loads((tmp_path / "run" / "judge.json").read_text(encoding="utf-8"))["summary"]["pairs"] == 3


def test_without_the_package_it_is_named(run_main, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = run_main(evaluate, "--judge", "m", "--judge_url", "http://x/v1", "--yes")
    assert status == 2 and "pip install openai" in error


def test_the_cost_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda text: "n")
    with pytest.raises(UserError, match="cancelled"):
        evaluate.confirm(False, "100 calls of m, about 60,000 tokens")
    assert "about 60,000 tokens" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda text: "y")
    evaluate.confirm(False, "x")
    evaluate.confirm(True, "x")

    def end_of_input(text):
        raise EOFError
    monkeypatch.setattr("builtins.input", end_of_input)  # Ctrl-D
    with pytest.raises(UserError, match="cancelled"):
        evaluate.confirm(False, "x")


def test_a_judge_that_fails_does_not_lose_the_evaluation(endpoint, tiny_config, run_main, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.answer = lambda body, number: (401, {"error": {"message": "no such key"}}, {})
    assert train.start_run(tiny_config("training.max_steps=2", "training.output_dir=run"), None, None) == 0
    status, _, error = run_main(evaluate, "--checkpoint", "run/best_model.pth", "--num_stories", "4", "--judge", "m",
                                "--judge_url", endpoint.url, "--judge_stories", "3", "--yes", "--out", "found.json")
    assert status == 2 and "refuses the key" in error
    assert len(json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["stories"]) == 4
