"""serve.py: each client gets the right story, many at once; limits, refusals, headers; OpenAI's client; Ctrl-C."""

import base64
import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import REPO

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import export
import serve
from config import Config
from config.schema import ModelConfig, SamplingConfig
from inference import live_stories, web_safety
from inference.generation import generate_stories
from inference.live_stories import LiveStories
from model import Transformer
from training.checkpoints import load_checkpoint, save_checkpoint

SHAPE = ModelConfig(vocab_size=1500, d_model=32, n_layers=2, n_heads=4, d_ffn=64, max_seq_len=96, tie_embeddings=False)
GREEDY = {"temperature": 0, "max_new_tokens": 40}
LONG = {"temperature": 1, "max_new_tokens": 2048}


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint with random weights, so peaked that its stories differ and have all kinds of tokens."""
    torch.manual_seed(1)
    model, path = Transformer(SHAPE), tmp_path_factory.mktemp("secret_folder") / "best_model.pth"
    weights = {name: tensor * (8 if tensor.dim() == 2 else 1) for name, tensor in model.state_dict().items()}
    save_checkpoint(path, {"model": weights, "config": Config(model=SHAPE).to_dict(), "tokenizer": tokenizer.to_str(),
                           "iter_num": 7, "epoch": 0.5, "best_val_loss": 3.25})
    return path


@contextlib.contextmanager
def serving(path, rate_limit=None, rows=32, waiting=32, cores=1):
    """A server in this process; yields its Service, whose `port` it has. rows, waiting: of each engine."""
    torch.set_num_threads(cores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "LiveStories", lambda *arguments: LiveStories(*arguments[:3], rows, waiting))
        service = serve.Service(Namespace(device="cpu", compute="float32", rate_limit=rate_limit), path,
                                load_checkpoint(path))
    with serve.listen("127.0.0.1", 0) as opened:
        service.port = opened.getsockname()[1]
        server = serve.Server(service, "127.0.0.1", service.port)
        listener = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        for thread in (*service.threads, listener):
            thread.start()
        try:
            yield service
        finally:
            for thread in service.threads:
                thread.close()
            server.should_exit = True
            listener.join()


@pytest.fixture(scope="module")
def service(checkpoint):
    with serving(checkpoint, cores=2) as service:
        yield service


@pytest.fixture
def story_of(checkpoint, tokenizer):
    """A function: prompt, settings -> the Story that generate.py makes, alone."""
    model = serve.model_from_checkpoint(load_checkpoint(checkpoint), checkpoint, "cpu")

    def story(prompt, stops=(), **settings):
        sampling = SamplingConfig(**settings)
        return next(generate_stories(model, tokenizer, [prompt], sampling, [sampling.seed], stops=stops))
    return story


def send(service, body, path="/generate", method="POST", **headers):
    """Send a request; returns the connection and the response, whose body is not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    connection.request(method, path, content, headers)
    return connection, connection.getresponse()


def ask(service, body, path="/generate", method="POST", **headers):
    """Send a request; returns its status, its headers and its whole body."""
    connection, response = send(service, body, path, method, **headers)
    with contextlib.closing(connection):
        return response.status, response.headers, response.read().decode("utf-8")


def events_of(text):
    """Server-sent events as pairs: name, data."""
    return [(re.match("event: (.*)", block)[1], json.loads(re.search("^data: (.*)", block, re.M)[1]))
            for block in text.split("\n\n")[:-1]]


def generate(service, **body):
    """The start, the tokens and the end of a story."""
    status, _, text = ask(service, body)
    assert status == 200, text
    (first, start), *tokens, (last, end) = events_of(text)
    assert (first, last) == ("start", "end") and all(name == "token" for name, _ in tokens)
    return start, [token for _, token in tokens], end


def text_of(tokens, end):
    return "".join(event["text"] for event in (*tokens, end))


def first_token(response):
    """Read a stream until a token has come."""
    while not response.readline().startswith(b"event: token"):
        pass


# Stories

@pytest.mark.parametrize("settings", [
    GREEDY, {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 150},
    {"temperature": 0.9, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 4, "max_new_tokens": 60}])
def test_a_story_is_that_of_generate_with_the_same_seed_and_settings(service, story_of, settings):
    """Also one that outgrows the context, and characters that end in a later token than they begin."""
    for prompt in ("One day, a cat", "", "Ein Mädchen namens 李 🦊"):
        story, (_, tokens, end) = story_of(prompt, **settings), generate(service, prompt=prompt, **settings)
        assert prompt + text_of(tokens, end) == story.text
        assert [token["id"] for token in tokens] == story.tokens and end["tokens"] == len(story.tokens)
        assert end["log_probability"] / len(tokens) == pytest.approx(story.log_probability, abs=1e-4)
        assert end["reason"] == ("end" if story.ended else "max_new_tokens")


def test_a_stop_text_ends_a_story_before_it(service, story_of):
    whole = story_of("Tom", **GREEDY).text
    stop = whole[20:23]
    start, tokens, end = generate(service, prompt="Tom", stop=["never in it", stop], **GREEDY)
    assert "Tom" + text_of(tokens, end) == story_of("Tom", [stop], **GREEDY).text == whole[:whole.index(stop, 3)]
    assert end["reason"] == "stop" and end["tokens"] == len(tokens) < 40
    assert start["temperature"] == 0 and start["max_new_tokens"] == 40 and start["top_p"] == SamplingConfig().top_p


def test_tokens_continue_exactly_where_they_end(service):
    """What the page does after an alternative: the ids so far and the alternative, also in the midst of a character."""
    start, tokens, end = generate(service, prompt="Tom", **GREEDY)
    for kept in (0, 1, 7, 20):
        ids = start["tokens"] + [token["id"] for token in tokens[:kept]]
        _, rest, rest_end = generate(service, tokens=ids, **{**GREEDY, "max_new_tokens": 40 - kept})
        for again, token in zip(rest, tokens[kept:], strict=True):
            assert (again["id"], again["text"]) == (token["id"], token["text"])
        assert rest_end["text"] == end["text"]


def test_each_token_has_its_log_probability_and_the_five_likeliest(service):
    _, tokens, _ = generate(service, prompt="Tom", **GREEDY)
    for token in tokens:
        probabilities = [other["probability"] for other in token["likeliest"]]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-5 and token["likeliest"][0]["id"] == token["id"]
        assert math.exp(token["log_probability"]) == pytest.approx(probabilities[0], abs=1e-5)
    taken = tokens[3]["likeliest"][1]
    ids = service.prompt({"prompt": "Tom"})[1:] + [token["id"] for token in tokens[:3]]
    _, more, end = generate(service, tokens=[*ids, taken["id"]], **GREEDY)
    start = "".join(token["text"] for token in tokens[:3])
    whole = service.tokenizer.decode([*ids, taken["id"], *(token["id"] for token in more)])
    assert "Tom" + start + taken["text"] + text_of(more, end) == whole


def test_a_stop_text_frees_the_row(one_row, monkeypatch):
    stories, add = [], one_row.threads[0].add
    monkeypatch.setattr(one_row.threads[0], "add", lambda *arguments: stories.append(add(*arguments)) or stories[-1])
    _, tokens, _ = generate(one_row, prompt="Tom", **GREEDY)
    stop = text_of(tokens[10:12], {"text": ""})
    assert generate(one_row, prompt="Tom", stop=stop, **GREEDY | {"max_new_tokens": 2048})[2]["reason"] == "stop"
    generate(one_row, prompt="Lily", **GREEDY)  # it has the only row
    assert len(stories[1].row.new) <= 12 + live_stories.STEPS


# Many at once

def test_64_clients_at_once_get_their_own_stories(service, story_of):
    """Some greedy, some drawn, of different lengths: more at once than one would be served after the other."""
    def body(client):
        return {"prompt": f"{'Tom' if client % 2 else 'Lily'} saw {client}", "seed": client,
                "max_new_tokens": 5 + client, "temperature": 0 if client % 3 else 0.9}

    with ThreadPoolExecutor(64) as pool:
        stories = list(pool.map(lambda client: generate(service, **body(client)), range(64)))
    for client, (_, tokens, end) in enumerate(stories):
        settings = body(client)
        prompt = settings.pop("prompt")
        assert prompt + text_of(tokens, end) == story_of(prompt, **settings).text, client
    assert not any(thread.open for thread in service.threads)


@pytest.mark.parametrize(("cores", "threads"), [(1, [1]), (2, [1, 1]), (3, [2]), (8, [7])])
def test_a_core_is_left_free_and_two_cores_have_an_engine_each(checkpoint, monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with serving(checkpoint, cores=cores) as service:
        assert [thread.threads for thread in service.threads] == threads


def test_two_engines_share_the_stories(checkpoint):
    with serving(checkpoint, rows=1, waiting=0, cores=2) as service:
        for thread in service.threads:
            thread.engine.end = -1
        running = [send(service, {"prompt": "Tom", **LONG}) for _ in range(2)]
        assert [len(thread.open) for thread in service.threads] == [1, 1]
        assert ask(service, {"prompt": "Lily"})[0] == 503
        for connection, response in running:
            response.close()
            connection.close()
        generate_when_free(service, prompt="Lily", **GREEDY)


@pytest.fixture
def one_row(checkpoint):
    """A server with one row and one place to wait, whose stories never end by themselves."""
    with serving(checkpoint, rows=1, waiting=1) as service:
        service.threads[0].engine.end = -1
        yield service


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_client_that_goes_away_frees_its_row(one_row, path):
    """One that reads, and one that waits for the whole answer; then one that waits for a row."""
    leaving, response = send(one_row, {"prompt": "Tom", "stream": True, "max_tokens": 2048} if path != "/generate" else
                             {"prompt": "Tom", **LONG}, path)
    response.readline()
    gone = next(iter(one_row.threads[0].open))
    waits, _ = send(one_row, {"prompt": "Lily", **LONG})
    also_gone = next(iter(one_row.threads[0].open - {gone}))
    response.close()
    leaving.close()
    waits.close()
    _, tokens, _ = generate_when_free(one_row, prompt="Lily", **GREEDY)
    assert len(tokens) == 40 and len(gone.row.new) < 2048 and len(also_gone.row.new) < 2048


def generate_when_free(service, **body):
    while True:
        status, _, text = ask(service, body)
        if status == 200:
            return text, events_of(text)[1:-1], events_of(text)[-1]
        assert status == 503


def test_a_client_that_waits_for_the_whole_answer_and_goes_away_frees_its_row(one_row):
    leaving = socket.create_connection(("127.0.0.1", one_row.port))
    body = json.dumps({"prompt": "Tom", "max_tokens": 2048}).encode()
    leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost:%d\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (one_row.port, len(body), body))
    assert leaving.recv(15) == b"HTTP/1.1 200 OK"
    gone = next(iter(one_row.threads[0].open))
    leaving.close()
    _, tokens, _ = generate_when_free(one_row, prompt="Lily", **GREEDY)
    assert len(tokens) == 40 and len(gone.row.new) < 2048


def test_the_health_counts_the_stories_that_run_and_wait(one_row):
    def counts():
        found = json.loads(ask(one_row, b"", "/health", "GET")[2])
        return found["running"], found["waiting"]

    assert counts() == (0, 0)
    streams = [send(one_row, {"prompt": "Tom", **LONG}) for _ in range(2)]
    first_token(streams[0][1])
    assert counts() == (1, 1)
    for connection, response in streams:
        response.close()
        connection.close()
    generate_when_free(one_row, prompt="Lily", **GREEDY)
    assert counts() == (0, 0)


def test_too_many_are_refused_and_told_when_to_come_again(one_row):
    running = [send(one_row, {"prompt": "Tom", **LONG}) for _ in range(2)]
    status, headers, text = ask(one_row, {"prompt": "Lily"})
    assert status == 503 and int(headers["Retry-After"]) > 0 and "wait" in json.loads(text)["error"]["message"]
    for connection, response in running:
        response.close()
        connection.close()
    generate_when_free(one_row, prompt="Lily", **GREEDY)


def test_rate_limit_counts_the_stories_of_an_address(checkpoint, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(serve, "time", Namespace(monotonic=lambda: now[0]))  # the event loop has its own
    with serving(checkpoint, rate_limit=2) as service:
        assert [ask(service, GREEDY)[0] for _ in range(3)] == [200, 200, 429]
        _, headers, text = ask(service, GREEDY)
        assert int(headers["Retry-After"]) > 0 and "2 stories a minute" in text
        assert ask(service, b"", "/health", "GET")[0] == 200
        now[0] += 60
        assert ask(service, GREEDY)[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_if_the_engine_fails_the_streams_end_and_the_health_says_so(checkpoint):
    with serving(checkpoint) as service:
        def advance():
            raise RuntimeError("/secret/path")

        service.threads[0].engine.advance = advance
        text = ask(service, {"prompt": "Tom"})[2]
        assert events_of(text)[-1] == ("end", {"reason": "error", "text": ""})
        service.threads[0].join()
        assert ask(service, b"", "/health", "GET")[0] == 503
        for path, more in (("/generate", {}), ("/v1/completions", {"stream": True})):
            status, _, text = ask(service, {"prompt": "Tom", **more}, path)
            assert status == 500 and "engine" in text and "secret" not in text


# Refusals

BAD = [  # body, status, part of the reason
    (b"not JSON", 400, "not JSON"), (b"\xff", 400, "not JSON"), (b"[" * 60_000, 400, "not JSON"),
    ([1], 400, "object"), ({"prompt": 3}, 400, "prompt: found 3"), ({"temperatur": 1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature: found 'hot'"), ({"temperature": -1}, 400, "temperature"),
    ({"temperature": [1]}, 400, "temperature"), (b'{"temperature": NaN}', 400, "temperature"),
    (b'{"temperature": 1e999}', 400, "temperature"), ({"top_p": 0}, 400, "top_p"), ({"top_k": 1.5}, 400, "top_k"),
    ({"seed": -1}, 400, "seed"), ({"prompts": ["x"]}, 400, "prompts"), ({"max_new_tokens": 0}, 400, "at least 1"),
    ({"max_new_tokens": 2049}, 400, "at most 2048"), ({"stop": [""]}, 400, "stop"), ({"stop": 3}, 400, "stop"),
    ({"stop": ["x"] * 5}, 400, "at most 4"), ({"stop": "x" * 101}, 400, "100 characters"),
    ({"prompt": "cat " * 100}, 400, "shorten it"),
    ({"prompt": "x" * 70_000}, 413, "bytes"), ({"tokens": [1500]}, 400, "below"),
    ({"tokens": [0]}, 400, "none of them 0"), ({"tokens": [True]}, 400, "tokens"), ({"tokens": "3"}, 400, "tokens"),
    ({"tokens": [5] * 95}, 400, "context holds 96"), ({"tokens": [5], "prompt": "x"}, 400, "no prompt")]
BAD_OPENAI = [({"n": 2}, "n: not supported"), ({"logprobs": 6}, "at most 5"), ({"stream": "yes"}, "stream"),
              ({"stream_options": 3}, "stream_options"), ({"prompt": ["a", "b"]}, "tokens"), ({"echo": True}, "echo"),
              ({"max_tokens": 10**9}, "at most 2048")]


@pytest.mark.parametrize(("path", "body", "status", "part"), [
    *(("/generate", *case) for case in BAD), *(("/v1/completions", body, 400, part) for body, part in BAD_OPENAI)])
def test_a_bad_request_is_refused_with_a_reason(service, checkpoint, path, body, status, part):
    found, headers, text = ask(service, body, path)
    assert found == status and headers["Content-Type"] == "application/json"
    message = json.loads(text)["error"]["message"]
    assert part in message and len(message) < 400 and "sampling." not in message
    assert not any(thread.open for thread in service.threads) and str(checkpoint.parent) not in text and "/" not in text


def test_a_lone_surrogate_in_a_prompt_is_replaced(service):
    assert generate(service, **GREEDY | {"prompt": "Tom"})
    status, _, text = ask(service, b'{"prompt": "Tom \\ud800", "max_new_tokens": 3}')
    assert status == 200 and events_of(text)[-1][1]["reason"] == "max_new_tokens"


def test_a_foreign_page_cannot_ask(service):
    """Neither under another name, which may be bound to this address, nor with what a form can send."""
    port = service.port
    for host in ("evil.example", f"evil.example:{port}", "localhost", f"localhost:{port + 1}", f"10.0.0.1:{port}", "",
                 f"localhost.evil.example:{port}", "localhost:" + "9" * 5000):
        assert ask(service, GREEDY, Host=host)[0] in (400, 421), host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert ask(service, GREEDY, Host=host)[0] == 200, host
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(service, GREEDY, Content_Type=kind)[0] == 415
    status, headers, _ = ask(service, b"", method="OPTIONS", Origin="https://evil.example",
                             Access_Control_Request_Method="POST", Access_Control_Request_Headers="content-type")
    assert status == 405 and not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(("host", "named", "known"), [
    ("0.0.0.0", "192.168.1.5:7779", True), ("0.0.0.0", "evil.example:7779", False), ("0.0.0.0", "192.168.1.5", False),
    ("::", "[fe80::1]:7779", True), ("192.168.1.5", "192.168.1.5:7779", True),
    ("192.168.1.5", "192.168.1.6:7779", False), ("my-box", "My-Box:7779", True),
    ("127.0.0.1", "192.168.1.5:7779", False)])
def test_the_names_of_a_server_for_other_machines(host, named, known):
    assert serve.Guard(None, host, 7779, []).knows(named) == known


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 200), ("GET", "/health", 200), ("GET", "/generate", 405), ("POST", "/", 405), ("GET", "/docs", 404),
    ("GET", "/openapi.json", 404), ("GET", "/best_model.pth", 404), ("GET", "/inference/page.html", 404),
    ("GET", "/../serve.py", 404), ("GET", "/%2e%2e/serve.py", 404), ("GET", "//etc/passwd", 404)])
def test_nothing_else_is_served_and_every_response_is_guarded(service, method, path, status):
    found, headers, text = ask(service, {}, path, method)
    assert found == status and headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert "Access-Control-Allow-Origin" not in headers and "server" not in headers
    if path == "/" and status == 200:
        assert headers["Content-Type"].startswith("text/html") and not re.search(r"(src|href)=.?(https?:|//)", text)
        for tag in ("script", "style"):
            (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
            assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    elif status != 200:
        assert "error" in json.loads(text)


def test_health_says_which_model_this_is(service, checkpoint):
    found = json.loads(ask(service, b"", "/health", "GET")[2])
    assert found["status"] == "ok" and found["step"] == 7 and found["loss"] == 3.25 and found["device"] == "cpu"
    assert found["checkpoint"] == f"{checkpoint.parent.name}/best_model.pth" and found["compute"] == "float32"
    assert found["parameters"] == serve.count_parameters(Transformer(SHAPE)) and found["context"] == 96
    assert found["settings"] == {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1,
                                 "max_new_tokens": 400, "seed": 42}


def test_a_body_that_does_not_come_is_waited_for_only_so_long(service, monkeypatch):
    monkeypatch.setattr(web_safety, "BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", service.port)) as slow:
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost:%d\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 9\r\n\r\n{" % service.port)
        assert slow.recv(12) == b"HTTP/1.1 408"


# OpenAI's client

def test_openais_client_gets_the_same_stories(service, story_of):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0)
    settings = {"temperature": 0.9, "seed": 5, "top_p": 0.9}
    story = story_of("One day", max_new_tokens=30, **settings)
    request = {"model": "any", "prompt": "One day", "max_tokens": 30, **settings}
    with client:
        done = client.completions.create(**request, logprobs=2)
        assert "One day" + done.choices[0].text == story.text
        assert done.choices[0].finish_reason == ("stop" if story.ended else "length")
        assert done.usage.completion_tokens == len(story.tokens) and done.object == "text_completion"
        assert len(done.choices[0].logprobs.token_logprobs) == len(story.tokens)
        assert all(len(likely) <= 2 for likely in done.choices[0].logprobs.top_logprobs)
        chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        assert "One day" + "".join(chunk.choices[0].text for chunk in chunks[:-1]) == story.text
        assert chunks[-1].usage.completion_tokens == len(story.tokens) and chunks[-2].choices[0].finish_reason
        ids = service.tokenizer.encode("One day", add_special_tokens=False).ids
        again = client.completions.create(**{**request, "prompt": ids}, extra_body={"top_k": 0, "min_p": 0})
        assert again.choices[0].text == done.choices[0].text and again.choices[0].logprobs is None
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(**{**request, "temperature": -1})


# The script

@pytest.fixture
def not_run(monkeypatch):
    """main() up to the moment when the server would run."""
    ran = []
    monkeypatch.setattr(serve.Server, "run", lambda self, sockets: ran.append(self))
    yield ran
    for server in ran:
        for thread in server.service.threads:
            thread.close()


def test_the_script_prints_its_address_and_warns_of_other_machines(run_main, not_run, checkpoint):
    base = ("--checkpoint", str(checkpoint), "--port", "0", "--no_browser")
    status, out, error = run_main(serve, *base)
    assert status == 0 and re.fullmatch(r"http://127\.0\.0\.1:\d+ .*\n", out) and "warning" not in error
    assert "step 7" in error and "3.250" in error
    status, out, error = run_main(serve, *base, "--host", "0.0.0.0")
    assert "http://127.0.0.1:" in out and "warning: --host 0.0.0.0: other machines" in error and "--rate_limit" in error
    assert len(not_run) == 2


@pytest.mark.parametrize(("screen", "flag", "opens"), [(True, [], True), (False, [], False),
                                                       (True, ["--no_browser"], False)])
def test_the_browser_opens_where_there_is_a_screen(run_main, not_run, checkpoint, monkeypatch, screen, flag, opens):
    opened, came = [], threading.Event()
    monkeypatch.setattr(serve, "has_screen", lambda: screen)
    monkeypatch.setattr(serve.webbrowser, "open", lambda address: (opened.append(address), came.set()))
    _, out, _ = run_main(serve, "--checkpoint", str(checkpoint), "--port", "0", *flag)
    if opens:
        came.wait()
    assert opened == ([out.split()[0]] if opens else [])


def test_an_hf_folder_is_served(run_main, checkpoint, tmp_path):
    assert run_main(export, "--checkpoint", str(checkpoint), "--format", "hf", "--out", str(tmp_path / "mine"))[0] == 0
    with serving(tmp_path / "mine") as service:
        assert service.about["checkpoint"].endswith("/mine") and service.about["loss"] is None
        assert generate(service, prompt="Tom", **GREEDY)[2]["tokens"] == 40


def test_a_wrong_command_line_is_one_line(run_main, checkpoint, monkeypatch):
    with serve.listen("127.0.0.1", 0) as opened:
        port = str(opened.getsockname()[1])
        status, _, error = run_main(serve, "--checkpoint", str(checkpoint), "--port", port)
        assert status == 2 and re.fullmatch(f"error: .*--port {port}: .*choose another --port\n", error)
    for arguments, part in ((["--port", "70000"], "at most 65535"), (["--rate_limit", "0"], "at least 1"),
                            (["--host", "no such host"], "--host no such host"), (["--checkpoint", "x"], "no such")):
        status, _, error = run_main(serve, "--checkpoint", str(checkpoint), "--port", "0", *arguments)
        assert status == 2 and error.startswith("error: ") and part in error and error.count("\n") == 1
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert run_main(serve) == (2, "", "error: serve.py needs fastapi and uvicorn: pip install fastapi uvicorn\n")


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent signals there")
def test_ctrl_c_ends_open_streams_politely(checkpoint, tmp_path):
    """One that reads, one that has stopped reading; the server leaves nevertheless."""
    process = subprocess.Popen([sys.executable, str(REPO / "serve.py"), "--checkpoint", str(checkpoint), "--port", "0"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    address = Namespace(port=int(re.search(r":(\d+)", process.stdout.readline())[1]))
    connection, response = send(address, {"prompt": "Tom", **LONG})
    idle, _ = send(address, {"prompt": "Lily", **LONG})
    first_token(response)
    process.send_signal(signal.SIGINT)
    text = response.read().decode("utf-8")
    assert events_of("event: end" + text.rpartition("event: end")[2])[-1][1]["reason"] in ("shutdown", "end")
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130
    connection.close()
    idle.close()


def test_a_story_that_comes_while_the_server_closes_ends_too(checkpoint):
    """It is in the inbox when the thread leaves: no client may wait for it forever."""
    with serving(checkpoint) as service:
        released = threading.Event()
        advance = service.threads[0].engine.advance
        service.threads[0].engine.advance = lambda: (released.wait(), advance())[1]
        connections = [send(service, {"prompt": "Tom", **LONG}) for _ in range(2)]
        service.threads[0].close()
        released.set()
        for connection, response in connections:
            assert events_of(response.read().decode())[-1][1]["reason"] == "shutdown"
            connection.close()


def test_the_thread_looks_at_the_stories_more_often_where_tokens_are_slow(checkpoint, monkeypatch):
    with serving(checkpoint) as service:
        for pace, most in ((1e-9, 1), (1e9, live_stories.STEPS)):
            monkeypatch.setattr(live_stories, "PACE", pace)
            generate(service, prompt="Tom", **GREEDY)
            assert service.threads[0].engine.check_every == most
