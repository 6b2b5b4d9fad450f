"""Tokens per second of serve.py with many clients at once, beside generate.py's engine with as many samples.

    python tests/benchmarks/serving.py
    python tests/benchmarks/serving.py --checkpoint checkpoints/best_model.pth --clients 64 --repeats 5

serve.py runs as a user starts it; its clients are threads of this process, each with a connection of its own over the
loopback interface, that read their streams to the end. The other side is generate_stories() in this process, with the
same prompt, seeds and settings. The two take turns, and the line after them has the median of the ratios. The last:
how long a client that goes away keeps its row, and how long the server takes to stop while all clients read.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

from config import config_from_dict  # noqa: E402
from data.tokenizer import tokenizer_from_json  # noqa: E402
from device import choose_device  # noqa: E402
from inference.generation import generate_stories  # noqa: E402
from inference.packed_weights import choose_compute, pack  # noqa: E402
from training.checkpoints import load_checkpoint, model_from_checkpoint, newest_checkpoint  # noqa: E402


def request(port: int, body: dict) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def count_tokens(port: int, body: dict) -> int:
    """Read one story; returns the number of its tokens."""
    return request(port, body)[1].read().count(b"event: token")


def running(port: int) -> int:
    """How many rows are taken."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())["running"]


def seconds_to_free(port: int, body: dict) -> float:
    """From the moment when the only client goes away, in the middle of a story, until its row is free."""
    connection, response = request(port, body)
    while not response.readline().startswith(b"event: token"):
        pass
    start = time.perf_counter()
    response.close()
    connection.close()
    while running(port):
        time.sleep(0.005)
    return time.perf_counter() - start


def seconds_to_stop(server: subprocess.Popen, port: int, body: dict, clients: int) -> float:
    """From the signal that ends the server until it is gone. The clients read all the while."""
    with ThreadPoolExecutor(clients) as pool:
        for response in [request(port, body)[1] for _ in range(clients)]:
            pool.submit(response.read)
        start = time.perf_counter()
        server.terminate()
        server.wait()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    path = args.checkpoint or newest_checkpoint()
    checkpoint, device = load_checkpoint(path), choose_device("auto")
    compute, _ = choose_compute("auto", device)
    model = pack(model_from_checkpoint(checkpoint, path, device), compute)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(path))
    sampling = dataclasses.replace(config_from_dict(checkpoint["config"], str(path)).sampling, seed=0)
    prompt, seeds = sampling.prompts[0], range(args.clients)
    server = subprocess.Popen([sys.executable, str(REPO / "serve.py"), "--checkpoint", str(path), "--port", "0",
                               "--no_browser", "--compute", compute], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        port = int(re.search(r":(\d+)", server.stdout.readline())[1])

        def generate(clients: range) -> int:
            return sum(len(story.tokens) for story in generate_stories(
                model, tokenizer, [prompt] * len(clients), sampling, clients))

        def serve(clients: range) -> int:
            with ThreadPoolExecutor(len(clients)) as pool:
                return sum(pool.map(lambda seed: count_tokens(port, {"prompt": prompt, "seed": seed}), clients))

        ratios = []
        for side in (generate, serve):  # what is done only once
            side(seeds[:2])
        print("| generate, tokens/s | serve, tokens/s | ratio |\n|---|---|---|")
        for _ in range(args.repeats):
            speeds = []
            for side in (generate, serve):
                start = time.perf_counter()
                tokens = side(seeds)
                speeds.append(tokens / (time.perf_counter() - start))
            ratios.append(speeds[1] / speeds[0])
            print(f"| {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratios[-1]:.2f} |", flush=True)
        print(f"{path}, {args.clients} clients, {device.type}, {compute}: median ratio {statistics.median(ratios):.2f}")
        body = {"prompt": prompt, "max_new_tokens": 2000, "temperature": 2.0, "top_p": 1.0}  # a long story
        times = [seconds_to_free(port, body) for _ in range(args.repeats)]
        print(f"a row is free again after {statistics.median(times):.2f} s (median; at most {max(times):.2f}); stopped "
              f"with {args.clients} open stories in {seconds_to_stop(server, port, body, args.clients):.2f} s")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
