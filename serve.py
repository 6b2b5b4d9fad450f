"""Serve a page for writing stories, and an HTTP API for programs.

    python serve.py                  the best model of the newest run, at http://127.0.0.1:7779
    python serve.py --checkpoint checkpoints/best_model.pth --port 8000

GET / is the page (inference/page.html), POST /generate streams a story as server-sent events, POST /v1/completions does
so in OpenAI's form, and GET /health says which model this is. Stories share engines (inference/live_stories.py).
"""

import argparse
import dataclasses
import errno
import importlib.util
import json
import math
import os
import socket
import sys
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from config import UserError, config_from_dict, run_script
from config.command_line import Parser, file_path, not_negative, parse_before_imports, positive
from config.schema import SAMPLING_SETTINGS, SamplingConfig, change_settings
from config.wording import show

PAGE = Path(__file__).parent / "inference" / "page.html"
MAX_NEW_TOKENS, MAX_STOPS, MAX_STOP = 2048, 4, 100  # of a request: tokens, stop texts, characters of one
CONNECTIONS = 500  # further ones are refused


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Serve a page to write stories with, and a trained model for programs.")
    parser.add_argument("--checkpoint", type=file_path, help="a .pth file, or a folder of Hugging Face transformers "
                        "(default: the best model of the newest run under checkpoints/)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s: this machine only; "
                        "0.0.0.0: all of its addresses)")
    parser.add_argument("--port", type=not_negative, default=7779, help="0 picks a free one (%(default)s)")
    parser.add_argument("--rate_limit", type=positive, metavar="N", help="stories a minute for each client's address")
    parser.add_argument("--no_browser", action="store_true", help="do not open the page in a browser")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--compute", choices=("auto", "float32", "bf16", "int8"), default="auto",
                        help="auto: bf16 where the device is faster with it, else float32")
    args = parser.parse_args()
    if args.port > 65535:
        raise UserError(f"--port {args.port}: expected at most 65535")
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve.py needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return args


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from data.tokenizer import tokenizer_from_json
from device import choose_device, explain_out_of_memory, unused_gpu
from inference.generation import encode_prompts
from inference.live_stories import ROWS, WAITING, LiveStories, LiveStory, server_sent
from inference.openai_form import from_openai, to_openai
from inference.packed_weights import choose_compute, pack
from inference.web_safety import Guard, read_json, refuse, security_headers
from model import count_parameters
from training.checkpoints import describe_checkpoint, load_checkpoint, model_from_checkpoint, newest_checkpoint


class Service:
    """The model that is served, and the handlers of the requests."""

    def __init__(self, args: argparse.Namespace, path: Path, checkpoint: dict[str, Any]) -> None:
        device, config = choose_device(args.device), config_from_dict(checkpoint["config"], str(path))
        # an engine's threads wait for each other at each product, which is slow while the event loop or a browser has
        # one of their cores: so a core is left to those, two cores get an engine each, and this thread computes alone
        cores = torch.get_num_threads()
        engines = 2 if device.type == "cpu" and cores == 2 else 1
        cores_each = max(1, cores // engines - ("OMP_NUM_THREADS" not in os.environ))
        torch.set_num_threads(1)
        model = model_from_checkpoint(checkpoint, path, device)
        self.tokenizer, self.context = tokenizer_from_json(checkpoint["tokenizer"], str(path)), config.model.max_seq_len
        most = min(config.sampling.max_new_tokens, MAX_NEW_TOKENS)
        self.sampling, self.rate_limit = dataclasses.replace(config.sampling, max_new_tokens=most), args.rate_limit
        compute, self.why = choose_compute(args.compute, device)
        loss, self.page = checkpoint["best_val_loss"], PAGE.read_text(encoding="utf-8")
        packed = pack(model, compute)
        self.threads = [LiveStories(packed, self.tokenizer, cores_each, ROWS // engines, WAITING // engines)
                        for _ in range(engines)]
        self.about = {
            "checkpoint": "/".join(path.resolve().parts[-2:]), "step": checkpoint["iter_num"],
            "loss": loss if loss < math.inf else None, "parameters": count_parameters(model), "device": device.type,
            "compute": compute, "context": self.context, "max_new_tokens": MAX_NEW_TOKENS,
            "prompts": self.sampling.prompts, "settings": self.settings(self.sampling), "end": self.threads[0].end}
        self.minute, self.requests = 0, Counter()  # of the minute, by the client's address

    @staticmethod
    def settings(sampling: SamplingConfig) -> dict[str, float]:
        return {name: getattr(sampling, name) for name in SAMPLING_SETTINGS}

    def begin(self, request: Request, values: dict[str, Any]) -> LiveStory:
        """Check a request and begin its story. Raises UserError and HTTPException."""
        if unknown := [name for name in values if name not in ("prompt", "tokens", "stop", *SAMPLING_SETTINGS)]:
            raise UserError(f"unknown: {show(unknown[0])}; known: prompt, tokens, stop, {', '.join(SAMPLING_SETTINGS)}")
        texts = {name: json.dumps(value) for name, value in values.items() if name in SAMPLING_SETTINGS}
        sampling = change_settings(self.sampling, texts, "the request")
        if sampling.max_new_tokens > MAX_NEW_TOKENS:
            raise UserError(f"max_new_tokens: found {sampling.max_new_tokens}, expected at most {MAX_NEW_TOKENS}")
        stops = values.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        if not (isinstance(stops, list) and len(stops) <= MAX_STOPS
                and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops)):
            raise UserError(f"stop: expected a text or at most {MAX_STOPS} texts, each of 1 to {MAX_STOP} characters")
        prompt = self.prompt(values)
        if self.rate_limit:
            if self.minute != (now := time.monotonic() // 60):
                self.minute, self.requests = now, Counter()
            self.requests[address := request.client.host] += 1
            if self.requests[address] > self.rate_limit:
                raise HTTPException(429, f"more than {self.rate_limit} stories a minute", {"Retry-After": "60"})
        if not all(thread.is_alive() for thread in self.threads):
            raise HTTPException(500, "the engine has failed; what the server printed says why")
        story = min(self.threads, key=lambda thread: len(thread.open)).add(prompt, sampling, stops)
        if story is None:
            raise HTTPException(503, "too many stories wait already: try again later", {"Retry-After": "5"})
        return story

    def prompt(self, values: dict[str, Any]) -> list[int]:
        """The token ids of a request's prompt or tokens, after the separator. Raises UserError."""
        tokens, text, end = values.get("tokens"), values.get("prompt", ""), self.threads[0].end
        if tokens is None:
            if not isinstance(text, str):
                raise UserError(f"prompt: found {show(text)}, expected a text")
            return encode_prompts(self.tokenizer, [text.encode("utf-8", "replace").decode("utf-8")], self.context)[0]
        size = self.tokenizer.get_vocab_size()
        if text or not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size and t != end
                                                           for t in tokens):
            raise UserError(f"tokens: expected a list of token ids below {size}, none of them {end}, and no prompt")
        if len(tokens) + 1 >= self.context:
            raise UserError(f"tokens: found {len(tokens):,}, but the model's context holds {self.context:,} with the "
                            "story")
        return [end, *tokens]

    async def serve_page(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html")

    async def health(self, request: Request) -> Response:
        alive = all(thread.is_alive() for thread in self.threads)
        running = sum(not row.done for thread in self.threads for row in thread.engine.rows)  # not the done ones
        waiting = max(0, sum(len(thread.open) for thread in self.threads) - running)
        return JSONResponse({"status": "ok" if alive else "failed", **self.about, "waiting": waiting,
                             "running": running}, 200 if alive else 503)

    async def generate(self, request: Request) -> Response:
        story = self.begin(request, await read_json(request))

        async def stream() -> AsyncIterator[str]:
            yield server_sent({"tokens": story.row.prompt[1:], **self.settings(story.row.sampling)}, "start")
            async for events in story.read():
                yield "".join(server_sent(event, "end" if "reason" in event else "token") for event in events)

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def completions(self, request: Request) -> Response:
        values, answer = from_openai(await read_json(request))
        story = self.begin(request, values)
        text = to_openai(story.read(), answer, self.about["checkpoint"], len(story.row.prompt))
        return StreamingResponse(text, media_type="text/event-stream" if answer["stream"] else "application/json")

    def app(self, host: str, port: int) -> Guard:
        """The application for the server."""
        async def bad_request(request: Request, error: UserError) -> Response:
            return refuse(400, str(error).replace("sampling.", ""))

        async def refused(request: Request, error: StarletteHTTPException) -> Response:
            return refuse(error.status_code, str(error.detail), error.headers)

        async def failed(request: Request, error: Exception) -> Response:
            return refuse(500, "the server has failed; what it printed says why")

        app = FastAPI(openapi_url=None, exception_handlers={UserError: bad_request, StarletteHTTPException: refused,
                                                            Exception: failed})
        for method, path, handler in (("GET", "/", self.serve_page), ("GET", "/health", self.health),
                                      ("POST", "/generate", self.generate),
                                      ("POST", "/v1/completions", self.completions)):
            app.add_route(path, handler, methods=[method])
        return Guard(app, host, port, security_headers(self.page))


class Server(uvicorn.Server):
    """uvicorn's server, which ends the open stories first when it is stopped."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        super().__init__(uvicorn.Config(
            service.app(host, port), http="h11", ws="none", lifespan="off", log_level="error", access_log=False,
            server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=1))
        self.service = service

    def handle_exit(self, number: int, frame: Any) -> None:
        for thread in self.service.threads:
            thread.close()
        super().handle_exit(number, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to. Raises UserError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        advice = "" if error.errno != errno.EADDRINUSE else "; another program uses the port: choose another --port"
        raise UserError(f"--host {host} --port {port}: {error.strerror}{advice}") from None


def has_screen() -> bool:
    return sys.stdout.isatty() and (sys.platform in ("win32", "darwin") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")))


@explain_out_of_memory("close what else uses the device, or compute on the CPU with --device cpu")
def main(args: argparse.Namespace) -> None:
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    with listen(args.host, args.port) as opened:  # before the model is loaded, since the port may be in use
        port = opened.getsockname()[1]
        service = Service(args, path, checkpoint)
        if args.device == "auto" and (warning := unused_gpu(service.threads[0].engine.device)):
            print(warning, file=sys.stderr)
        print(describe_checkpoint(checkpoint, path), f"computing in {service.about['compute']}{service.why}", sep="\n",
              file=sys.stderr)
        local = args.host in ("localhost", "::1") or args.host.startswith("127.")
        if not local:
            print(f"warning: --host {args.host}: other machines can use this server, without a password"
                  + ("" if args.rate_limit else "; --rate_limit limits how much"), file=sys.stderr)
        shown = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        print(f"{address}   (Ctrl-C stops)", flush=True)
        if has_screen() and not args.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        for thread in service.threads:
            thread.start()
        Server(service, args.host, port).run(sockets=[opened])


if __name__ == "__main__":
    run_script(main, arguments)
