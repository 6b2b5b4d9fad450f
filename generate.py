"""Tell stories with a trained model.

    python generate.py --prompt "Once upon a time there was" --temperature 0.8 --num_samples 3
    python generate.py --interactive

Stories go to standard output, everything else to standard error. engine.py does the counting, this file the talking.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from config import UserError, config_from_dict, run_script
from config.hardware import choose_device, choose_precision
from config.schema import SamplingConfig
from config.values import build_section, parse_yaml, show
from data.tokens import END_OF_STORY, tokenizer_from_json
from engine import CHECK_EVERY, Continuation, generate_tokens, pack
from model import Transformer, load_checkpoint, model_from_checkpoint

GOOD_LOSS = 2.0  # nats per token; above it, a model on TinyStories still makes mistakes in grammar
SETTINGS = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "prompts"]
HELP = """Type the beginning of a story and press Enter (nothing: from scratch). Ctrl-C stops a story.
/set NAME VALUE  change a setting, such as /set temperature 0.7
/help            this, and the settings
/quit            leave (or Ctrl-D; on Windows Ctrl-Z and Enter)"""


class Story(NamedTuple):
    """index: of its prompt and seed among those asked for. text: the prompt and what follows. tokens: the new ones,
    ids. log_probability: their mean, nats, by the model itself (temperature 1, nothing cut). ended: by END_OF_STORY."""

    index: int
    text: str
    tokens: list[int]
    log_probability: float
    ended: bool


def tell_stories(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig,
                 seeds: Sequence[int], watch: Callable[[list[Continuation]], None] | None = None) -> Iterator[Story]:
    """A story for each prompt and its seed, in the order in which they are done. A prompt may be empty.

    watch is called with the stories under way, every few tokens; if there is only one, after each token.
    Raises UserError if a prompt fills the model's context.
    """
    end, context = tokenizer.token_to_id(END_OF_STORY), model.config.max_seq_len
    every = [[end, *encoding.ids]  # every story begins after a separator
             for encoding in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
    for prompt, ids in zip(prompts, every, strict=True):
        if len(ids) >= context:
            raise UserError(f"the prompt {show(prompt[:30] + '...')} has {len(ids) - 1:,} tokens, but the model's "
                            f"context holds {context:,} with the story: shorten it to {context - 2:,}")
    check_every = 1 if watch is not None and len(prompts) == 1 else CHECK_EVERY
    for running in generate_tokens(model, every, seeds, end, tokenizer.get_vocab_size(), sampling, check_every):
        if watch is not None:
            watch(running)
        for told in running:
            if told.done:
                text = tokenizer.decode([*told.prompt, *told.new], skip_special_tokens=True)
                yield Story(told.index, text, told.new, told.log_probability / len(told.new), told.new[-1] == end)


def printer(tokenizer: Tokenizer) -> Callable[[list[Continuation]], None]:
    """What prints a story while it grows, and never a part of a character: a token may end inside one."""
    printed = 0

    def watch(running: list[Continuation]) -> None:
        nonlocal printed
        tokens = [*running[0].prompt, *running[0].new]
        text = tokenizer.decode(tokens[printed:], skip_special_tokens=True)
        if running[0].done or not text.endswith("\ufffd"):  # which is what an unfinished character decodes to
            print(text, end="", flush=True)
            printed = len(tokens)

    return watch


def tell_and_print(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig,
                   seeds: Sequence[int], record: Callable[[str, int, Story], None]) -> None:
    """Print stories: one while it grows, many in their order with a progress bar. Each is recorded when it is done."""
    alone, start, done, waiting, following = len(prompts) == 1, time.perf_counter(), [], {}, 0
    progress = tqdm(total=len(prompts), desc="stories", unit="story", leave=False, disable=True if alone else None)
    try:
        for story in tell_stories(model, tokenizer, prompts, sampling, seeds, printer(tokenizer) if alone else None):
            record(prompts[story.index], seeds[story.index], story)
            done.append(story)
            progress.update()
            waiting[story.index] = story.text
            while following in waiting and not alone:
                tqdm.write(waiting.pop(following), file=sys.stdout, end="\n\n")
                following += 1
    finally:  # on Ctrl-C, too, what is done is printed
        progress.close()
        print("\n\n" if alone else "".join(f"{waiting[index]}\n\n" for index in sorted(waiting)), end="", flush=True)
        total, cut = sum(len(story.tokens) for story in done), sum(not story.ended for story in done)
        longest = max((len(story.tokens) for story in done), default=0)
        notes = [f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s"]
        if len(done) < len(prompts):
            notes.append(f"{len(done):,} of {len(prompts):,} stories told")
        if cut:
            notes.append(f"{cut:,} cut after {sampling.max_new_tokens} new tokens (max_new_tokens)")
        if longest >= model.config.max_seq_len:
            notes.append(f"past {model.config.max_seq_len} tokens, its context, the model went on from the last half")
        print("; ".join(notes), file=sys.stderr)


def talk(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig,
         record: Callable[[SamplingConfig, str, int, Story], None]) -> None:
    """Read beginnings of stories, and commands, from standard input until it ends; go on with each beginning."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (importing it gives input() a history and editing)
    sys.stdin.reconfigure(errors="replace")
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            command, *words = line.split() or [""]
            if command == "/quit":
                return
            if command == "/set" and words:
                sampling = change_settings(sampling, {words[0]: " ".join(words[1:])}, "/set {} {}")
            elif command in ("/help", "/set"):
                print(HELP, *(f"{name} {getattr(sampling, name)}" for name in SETTINGS), sep="\n", file=sys.stderr)
            elif command.startswith("/"):
                raise UserError(f"{command}: no such command; there are /set, /help and /quit")
            else:
                tell_and_print(model, tokenizer, [line], sampling, [sampling.seed], functools.partial(record, sampling))
                sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped; /quit leaves)", file=sys.stderr)
        except EOFError:
            return


def change_settings(sampling: SamplingConfig, texts: dict[str, str], origin: str) -> SamplingConfig:
    """Replace some settings by what their texts say; an error begins with `origin`, filled with name and text."""
    origins = {name: origin.format(name, text) for name, text in texts.items()}
    values = {name: parse_yaml(text, origins[name]) for name, text in texts.items()}
    return build_section(SamplingConfig, "sampling", {**dataclasses.asdict(sampling), **values}, "",
                         {f"sampling.{name}": where for name, where in origins.items()})


def newest_checkpoint(folder: Path = Path("checkpoints")) -> Path:
    """The .pth file under folder that was written last; files of replaced runs (in previous/) do not count."""
    files = [path for path in folder.rglob("*.pth") if path.parent.name != "previous"]
    if not files:
        raise UserError(f"{folder}: no checkpoint here; train one with python train.py, or name one with --checkpoint")
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--prompts_file {path}: {error.strerror}") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file {path}: no prompt in it; one a line is expected")
    return prompts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tell stories with a trained model. What is not given is taken from "
                                                 "the sampling section of the checkpoint's config.")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file (default: the newest under checkpoints/)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--prompt", default="Once upon a time there was", help="how the story begins (%(default)s)")
    begin.add_argument("--prompts_file", type=Path, metavar="FILE", help="a text file, UTF-8, with a prompt a line")
    begin.add_argument("--interactive", action="store_true", help="ask for one beginning after the other")
    parser.add_argument("--temperature", help="0: always the likeliest token; higher: more daring")
    parser.add_argument("--top_k", help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--top_p", help="draw from the likeliest tokens that make up this share")
    parser.add_argument("--min_p", help="draw from tokens at least this share as likely as the likeliest; 0: from all")
    parser.add_argument("--repetition_penalty", help="above 1: tokens that are there already become less likely")
    parser.add_argument("--max_new_tokens", help="at most so many tokens after the prompt")
    parser.add_argument("--seed", help="story i of a prompt is drawn with seed + i")
    parser.add_argument("--num_samples", type=int, default=1, help="how many stories of each prompt (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a line of JSON for each story to a new file")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--compute", choices=("auto", "float32", "bf16", "int8"), default="auto",
                        help="auto: bf16 where the device is faster with it, else float32; int8: 8-bit weights")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.num_samples < 1 or (args.interactive and args.num_samples > 1):
        raise UserError(f"--num_samples {args.num_samples}: at least 1, and with --interactive just 1")
    typed = args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # it may hold any bytes
    prompts = read_prompts(args.prompts_file) if args.prompts_file else [typed]
    device, path = choose_device(args.device), args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    sampling = change_settings(config_from_dict(checkpoint["config"], str(path)).sampling, given, "--{} {}")
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(path))
    loss = checkpoint["best_val_loss"]
    print(f"{path}: step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}, best validation loss {loss:.3f}",
          file=sys.stderr)
    if loss > GOOD_LOSS:
        print(f"warning: that loss is above {GOOD_LOSS}: expect mistakes in grammar; train longer", file=sys.stderr)
    compute, why = choose_compute(args.compute, device)
    print(f"computing in {compute}{why}", file=sys.stderr)
    model = pack(model_from_checkpoint(checkpoint, path, device), compute)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_new(args.out)) if args.out else None

        def record(sampling: SamplingConfig, prompt: str, seed: int, story: Story) -> None:
            if file is not None:
                settings = {name: getattr(sampling, name) for name in SETTINGS if name != "seed"}
                settings |= {"compute": compute, "checkpoint": str(path)}
                print(json.dumps({"prompt": prompt, "seed": seed, "text": story.text, "tokens": story.tokens,
                                  "mean_log_probability": story.log_probability, "ended": story.ended,
                                  "settings": settings}, ensure_ascii=False), file=file, flush=True)

        if args.interactive:
            return talk(model, tokenizer, sampling, record)
        seeds = [sampling.seed + number for _ in prompts for number in range(args.num_samples)]
        prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
        tell_and_print(model, tokenizer, prompts, sampling, seeds, functools.partial(record, sampling))


def choose_compute(wanted: str, device: torch.device) -> tuple[str, str]:
    """float32, bf16 or int8, and why. auto asks the device alone, so that a seed tells one story in every batch."""
    if wanted == "int8" and device.type != "cpu":
        raise UserError(f"--compute int8: only on the cpu, not on {device.type}; use bf16")
    if wanted != "auto":
        return wanted, ""
    precision, why = choose_precision(device, True)
    return ("float32", why.removeprefix("float32")) if precision is contextlib.nullcontext else ("bf16", "")


def open_new(path: Path) -> TextIO:
    """Open a file to write; raise UserError if it is there already: stories are never overwritten."""
    try:
        return path.open("x", encoding="utf-8", newline="\n")
    except FileExistsError:
        raise UserError(f"--out {path}: is there already; name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else Python looks all of torch over once more at the end: 0.2 s
    run_script(main)
