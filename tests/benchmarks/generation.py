"""Tokens per second of generating, and the time to one story from a cold start, beside transformers' generate.

    python tests/benchmarks/generation.py
    python tests/benchmarks/generation.py --minutes 3          what fits into so much time, the most important first
    python tests/benchmarks/generation.py --run_c llama2.c/run  beside llama2.c's program, which you have built
    python tests/benchmarks/generation.py --configs train_config_tinystories_33M_TOP10K --batches 32 --repeats 5

Random weights of the configs' shapes, made so peaked that a token has about as much entropy as in a trained model; the
settings are generate.py's (temperature 0.8, top_p 0.95). No side ever stops early: all draw --tokens tokens a story.
What is compared takes turns; the table has medians over the repeats. transformers runs with its default (dynamic)
cache and with its static one, in float32 and in bf16. "Start" is the first call, with what is done only once.

The first table is generate.py as a user types it, by the tokens/s that it prints itself: without its start-up. There
all dimensions are rotated, since run.c knows no other model.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging  # noqa: E402

from config import Config, load_config  # noqa: E402
from config.schema import ModelConfig, SamplingConfig  # noqa: E402
from config.wording import counted  # noqa: E402
from data.synthetic_stories import synthetic_stories  # noqa: E402
from data.tokenizer import train_tokenizer  # noqa: E402
from device import choose_device  # noqa: E402
from inference.engine import Engine, generate_tokens  # noqa: E402
from inference.packed_weights import choose_compute, pack  # noqa: E402
from model import Transformer  # noqa: E402
from training.checkpoints import save_checkpoint  # noqa: E402

CONFIGS = ["stories260K", "stories15M", "train_config_tinystories_33M_TOP10K"]
ENTROPY = 2.2  # nats per token of the random models
PROMPT = [0, *range(3, 9)]  # seven tokens, as "Once upon a time there was" has
INT8_ROWS = 8  # int8 is for few rows: more are not measured
STATIC = {"cache_implementation": "static"}
TRANSFORMERS = """
import sys, torch
from transformers import AutoTokenizer, LlamaForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
ids = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=int(sys.argv[3]), min_new_tokens=int(sys.argv[3]), do_sample=True,
                     temperature=0.8, top_p=0.95, top_k=0, pad_token_id=0)
print(tokenizer.decode(out[0]))
"""


def make_ours(config: ModelConfig) -> Transformer:
    """Random weights; normal logits of variance s^2 leave a token about ln(vocab_size) - s^2 / 2 nats of entropy."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():  # at the start the logits have a variance of 1/2
        model.norm.weight.mul_(math.sqrt(2 * (math.log(config.vocab_size) - ENTROPY) / 0.5))
    return model


def make_theirs(config: ModelConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ffn,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tie_embeddings, bos_token_id=0,
        eos_token_id=0, pad_token_id=0)).eval()


class OutOfTime(Exception):
    """--minutes are over."""


def sides_of(config: ModelConfig, batch: int, num_tokens: int, device: torch.device,
             ) -> dict[str, Callable[[], float]]:
    """What is compared, by name; each makes batch * num_tokens tokens and returns the seconds it took."""
    sampling = SamplingConfig(temperature=0.8, top_k=0, top_p=0.95, max_new_tokens=num_tokens)

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def ours(model: Transformer, graphs: bool = True, compiled: bool = False) -> Callable[[], float]:
        prompts, never = [PROMPT] * batch, -1
        engine = Engine(model, never, config.vocab_size, batch, len(PROMPT) + num_tokens, compiled=compiled)
        engine.captured = engine.captured if graphs else None
        return lambda: timed(lambda: list(generate_tokens(model, prompts, range(batch), never, config.vocab_size,
                                                          sampling, engine=engine)))

    @torch.inference_mode()
    def without_cache(model: Transformer) -> None:
        tokens = torch.tensor([PROMPT] * batch, device=device)
        for _ in range(num_tokens):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)

    def theirs(model: LlamaForCausalLM, **cache) -> Callable[[], float]:
        ids = torch.tensor([PROMPT] * batch, device=device)
        return lambda: timed(lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=num_tokens, max_new_tokens=num_tokens,
            do_sample=True, temperature=0.8, top_k=0, top_p=0.95, pad_token_id=0, disable_compile=True, **cache))

    chosen, _ = choose_compute("auto", device)
    computes = dict.fromkeys([chosen, "float32"] + (["int8"] if batch <= INT8_ROWS and device.type == "cpu" else []))
    sides = {f"ours, {compute}" + (" (auto)" if compute == chosen else ""):
             ours(pack(make_ours(config).to(device), compute)) for compute in computes}
    if device.type == "cuda":
        packed = pack(make_ours(config).to(device), chosen)
        sides |= {f"ours, {chosen}, no graphs": ours(packed, graphs=False),
                  f"ours, {chosen}, compiled": ours(packed, compiled=True)}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_theirs(config).to(device, dtype)
        name = f"transformers, {str(dtype).removeprefix('torch.')}"
        sides |= {name: theirs(model), f"{name}, static cache": theirs(model, **STATIC)}
    if batch == 1:
        model = make_ours(config).to(device)
        sides["ours, float32, no cache"] = lambda: timed(lambda: without_cache(model))
    return sides


def measure_speed(name: str, config: ModelConfig, batches: list[int], num_tokens: int, repeats: int,
                  device: torch.device, check_time: Callable[[], None]) -> None:
    for batch in batches:
        check_time()
        sides = sides_of(config, batch, num_tokens, device)
        first = {side: run() for side, run in sides.items()}
        seconds = {side: [] for side in sides}
        for _ in range(repeats):
            check_time()
            for side, run in sides.items():
                seconds[side].append(run())
        rates = {side: batch * num_tokens / statistics.median(times) for side, times in seconds.items()}
        best = {dtype: max(rate for side, rate in rates.items() if side.startswith(f"transformers, {dtype}"))
                for dtype in ("float32", "bfloat16")}
        for side, rate in rates.items():
            start = max(0.0, first[side] - statistics.median(seconds[side]))
            print(f"| {name} | {batch} | {side} | {rate:,.0f} | {rate / best['float32']:.2f} | "
                  f"{rate / best['bfloat16']:.2f} | {start:.2f} |", flush=True)


def write_ours(folder: str, config: ModelConfig) -> tuple[Path, Tokenizer]:
    """A checkpoint of random weights, whose tokenizer has all ids of the model, and its path."""
    tokenizer = train_tokenizer([story for story, _ in zip(synthetic_stories(seed=0), range(3000), strict=False)],
                                min(config.vocab_size, 2048), show_progress=False)
    path = Path(folder) / "ours.pth"
    save_checkpoint(path, {
        "model": make_ours(config).state_dict(), "config": dataclasses.replace(Config(), model=config).to_dict(),
        "tokenizer": tokenizer.to_str(), "iter_num": 0, "epoch": 0.0, "best_val_loss": 0.0})
    return path, tokenizer


def measure_typed(name: str, config: ModelConfig, repeats: int, device: str, run_c: Path | None,
                  check_time: Callable[[], None]) -> None:
    """generate.py as typed, and run.c on the same model as export.py writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = write_ours(folder, dataclasses.replace(config, rope_percentage=1.0))
        generate = [sys.executable, str(REPO / "generate.py"), "--checkpoint", str(path), "--device", device]
        commands = {f"generate.py, {counted(stories, 'story')}": [
            *generate, "--num_samples", str(stories), "--max_new_tokens", str(tokens)]
            for stories, tokens in ([(1, 300)] + [(1000, 160), (10_000, 160)] * (device == "cuda"))}
        if run_c is not None:
            subprocess.run([sys.executable, str(REPO / "export.py"), "--checkpoint", str(path), "--format", "llama2c",
                            "--out", str(Path(folder) / "c")], check=True, capture_output=True)
            commands["run.c, one story"] = [
                str(run_c.resolve()), str(Path(folder) / "c" / "model.bin"), "-z",
                str(Path(folder) / "c" / "tokenizer.bin"), "-t", "0.8", "-p", "0.95", "-n", "300", "-i",
                "Once upon a time there was"]
        rates = {side: [] for side in commands}
        for _ in range(repeats):
            for side, command in commands.items():
                check_time()
                done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
                rate = re.search(r"([\d,.]+) tokens/s|tok/s: ([\d.]+)", done.stderr)
                rates[side].append(float((rate[1] or rate[2]).replace(",", "")))
        for side, found in rates.items():
            print(f"| {name} | {side} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} |",
                  flush=True)


def measure_cold(name: str, config: ModelConfig, repeats: int, num_tokens: int, device: str) -> None:
    """Seconds from the start of a process to its end, with one story, from a checkpoint that is in the disk's cache."""
    with tempfile.TemporaryDirectory() as folder:
        path, tokenizer = write_ours(folder, config)
        make_theirs(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        ours = [sys.executable, str(REPO / "generate.py"), "--checkpoint", str(path), "--device", device,
                "--max_new_tokens", str(num_tokens), "--compute"]
        theirs = [sys.executable, "-c", TRANSFORMERS, folder]
        commands = {f"ours, {compute}": [*ours, compute] for compute in ("auto", "float32", "int8")}
        commands |= {f"transformers, {dtype}": [*theirs, dtype, str(num_tokens)] for dtype in ("float32", "bfloat16")}
        seconds, counts = {side: [] for side in commands}, {}
        for _ in range(repeats):
            for side, command in commands.items():
                start = time.perf_counter()
                done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
                seconds[side].append(time.perf_counter() - start)
                counts[side] = (re.findall(r"([\d,]+) tokens,", done.stderr) or [num_tokens])[-1]
        base = statistics.median(seconds["transformers, float32"])
        for side, times in seconds.items():
            median = statistics.median(times)
            print(f"| {name} | {side} | {counts[side]} | {median:.2f} | {base / median:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of generating, beside transformers' generate.")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names of files in config/ (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of each story (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no_cold", action="store_true", help="leave out the cold start")
    parser.add_argument("--run_c", type=Path, metavar="PROGRAM", help="llama2.c's run, built from its run.c")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so much time")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise OutOfTime

    logging.set_verbosity_error()
    device = choose_device(args.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.tokens} tokens a story, "
          f"medians of {args.repeats}\n")
    configs = {name: load_config(REPO / "config" / f"{name}.yaml").model for name in args.configs}
    try:
        measure_all(configs, args, device, check_time)
    except OutOfTime:
        print(f"\nstopped after {args.minutes:g} minutes: what is missing was not measured")


def measure_all(configs: dict[str, ModelConfig], args: argparse.Namespace, device: torch.device,
                check_time: Callable[[], None]) -> None:
    """Print all tables, those of the largest shape first."""
    print("| shape | as typed | tokens/s | from, to |\n|---|---|---|---|")
    for name, config in reversed(configs.items()):
        measure_typed(name, config, args.repeats, device.type, args.run_c, check_time)
    print()
    if args.batches:
        print("| shape | stories at once | side | tokens/s | times transformers float32 | times transformers bf16 | "
              "start, s |\n|---|---|---|---|---|---|---|")
        for name, config in reversed(configs.items()):
            measure_speed(name, config, args.batches, args.tokens, args.repeats, device, check_time)
    if not args.no_cold:
        print("\n| shape | side | tokens | seconds from a cold start | times transformers float32 |\n"
              "|---|---|---|---|---|")
        for name, config in configs.items():
            check_time()
            measure_cold(name, config, args.repeats, args.tokens, device.type)


if __name__ == "__main__":
    main()
