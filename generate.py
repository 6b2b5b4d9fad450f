"""Generate stories with a trained model.

    python generate.py --prompt "Once upon a time there was" --temperature 0.8 --num_samples 3
    python generate.py --interactive

Stories go to standard output, everything else to standard error. The engine is in inference/engine.py, sampling in
inference/sampling.py; this script has the command line, the output as it grows, and the interactive mode.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence

from config import UserError, config_from_dict, run_script
from config.command_line import Parser, file_path, parse_before_imports, positive
from config.schema import SAMPLING_SETTINGS, SamplingConfig, change_settings


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Generate stories with a trained model. The defaults are those of "
                    "the checkpoint's config, section sampling.")
    parser.add_argument("--checkpoint", type=file_path, help="a .pth file, or a folder of Hugging Face "
                        "transformers (default: the best model of the newest run under checkpoints/)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="how the story begins (default: the first of sampling.prompts)")
    prompts.add_argument("--prompts_file", type=file_path, metavar="FILE", help="a UTF-8 file with one prompt a line")
    prompts.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one after another")
    parser.add_argument("--temperature", help="0: always the most likely token; higher: more varied")
    parser.add_argument("--top_k", help="sample from the k most likely tokens; 0: from all")
    parser.add_argument("--top_p", help="sample from the most likely tokens whose probabilities sum to this")
    parser.add_argument("--min_p", help="drop tokens below this fraction of the highest probability; 0: none")
    parser.add_argument("--repetition_penalty", help="above 1: tokens that occurred before become less likely")
    parser.add_argument("--max_new_tokens", help="the most tokens to generate after the prompt")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end a story before this text; may be given many times")
    parser.add_argument("--seed", help="story i of a prompt is sampled with seed + i")
    parser.add_argument("--num_samples", type=positive, default=1, help="how many stories of each prompt (%(default)s)")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="write each story as a JSON line to a new file")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--compute", choices=("auto", "float32", "bf16", "int8"), default="auto",
                        help="auto: bf16 where the device is faster with it, else float32; int8 (8-bit weights) for a "
                        "few stories on a CPU")
    args = parser.parse_args()
    if args.interactive and args.num_samples > 1:
        raise UserError(f"--num_samples {args.num_samples}: must be 1 with --interactive")
    if "" in args.stop:
        raise UserError("--stop: found an empty text, expected one that ends a story")
    args.settings = {name: getattr(args, name) for name in SAMPLING_SETTINGS if getattr(args, name) is not None}
    change_settings(SamplingConfig(), args.settings, "--{} {}")  # checks them
    return args


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments, spin=True)  # a token takes many small products

from tokenizers import Tokenizer
from tqdm import tqdm

from data.atomic_files import create_file, name_in_errors
from data.readers import SEPARATOR, read_prompts
from data.tokenizer import token_bytes, tokenizer_from_json
from device import choose_device, explain_out_of_memory, unused_gpu
from evaluation.checklist import GOOD_LOSS
from inference.engine import Continuation
from inference.generation import Story, encode_prompts, generate_stories
from inference.growing_text import GrowingText
from inference.packed_weights import choose_compute, pack
from model import Transformer
from training.checkpoints import describe_checkpoint, load_checkpoint, model_from_checkpoint, newest_checkpoint

FRAME = 1 / 30  # seconds between two looks at a growing story
HELP = """Type the beginning of a story and press Enter (nothing: from scratch). Ctrl-C stops a story.
/set NAME VALUE  change a setting, such as /set temperature 0.7
/help            this text and the settings
/quit            leave (or Ctrl-D; on Windows Ctrl-Z and Enter)"""


def print_as_it_grows(tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Callable[[list[Continuation]], None]:
    """A function that prints the new text of the one running story."""
    growing, printed = GrowingText(token_bytes(tokenizer), stops), 0  # printed: how many of the new tokens
    shown = 0.0  # when the story was printed last

    def watch(running: list[Continuation]) -> None:
        nonlocal printed, shown
        story = running[0]
        if not story.done and time.perf_counter() - shown < FRAME:
            return
        shown = time.perf_counter()
        if not printed:
            print(tokenizer.decode(story.prompt, skip_special_tokens=True), end="")
        print(growing.add(story.new[printed:], story.done), end="", flush=True)
        printed = len(story.new)

    return watch


def generate_and_print(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig,
                       seeds: Sequence[int], record: Callable[[str, int, Story], None], stops: Sequence[str] = (),
                       ) -> None:
    """Print stories: a single one as it grows, many in order with a progress bar. Calls record() for each story."""
    single, start, done, waiting, following = len(prompts) == 1, time.perf_counter(), [], {}, 0
    lengths: dict[int, int] = {}  # tokens of each story so far
    beyond = False  # whether a story has outgrown the model's context
    print_growing = print_as_it_grows(tokenizer, stops) if single else lambda running: None

    def watch(running: list[Continuation]) -> None:
        nonlocal beyond
        lengths.update((row.index, len(row.new)) for row in running)
        beyond = beyond or any(len(row.context) < len(row.prompt) + len(row.new) for row in running)
        print_growing(running)

    progress = tqdm(total=len(prompts), desc="stories", unit="story", leave=False, disable=True if single else None)
    try:
        for story in generate_stories(model, tokenizer, prompts, sampling, seeds, watch, stops):
            record(prompts[story.index], seeds[story.index], story)
            done.append(story)
            progress.update()
            waiting[story.index] = story.text
            while following in waiting and not single:
                tqdm.write(waiting.pop(following), file=sys.stdout, end="\n\n")
                following += 1
    finally:  # after Ctrl-C too, print the stories that are done
        progress.close()
        print("\n\n" if single else "".join(f"{waiting[index]}\n\n" for index in sorted(waiting)), end="", flush=True)
        total, cut = sum(lengths.values()), sum(not story.ended for story in done)
        notes = [f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s"]
        if len(done) < len(prompts):
            notes.append(f"{len(done):,} of {len(prompts):,} stories generated")
        if cut:
            notes.append(f"{cut:,} cut after {sampling.max_new_tokens} new tokens (max_new_tokens)")
        if beyond:
            notes.append(f"beyond its context of {model.config.max_seq_len} tokens, the model continued from the last "
                         "half of it")
        print("; ".join(notes), file=sys.stderr)


def run_interactive(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig,
                    record: Callable[[SamplingConfig, str, int, Story], None], stops: Sequence[str] = ()) -> None:
    """Read prompts and commands from standard input until it ends, and continue each prompt."""
    with contextlib.suppress(ImportError):  # Windows has no readline
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
                lines = (f"{name} {getattr(sampling, name)}" for name in SAMPLING_SETTINGS)
                print(HELP, *lines, sep="\n", file=sys.stderr)
            elif command.startswith("/"):
                raise UserError(f"{command}: unknown command; known: /set, /help, /quit")
            else:
                try:
                    generate_and_print(model, tokenizer, tidy_prompts([line]), sampling, [sampling.seed],
                                       functools.partial(record, sampling), stops)
                except KeyboardInterrupt:
                    print("(stopped; /quit leaves)", file=sys.stderr)
                sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(/quit leaves)", file=sys.stderr)
        except EOFError:
            return


def tidy_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts without spaces at their ends. Prints notes on standard error about what a model cannot continue."""
    tidy = [prompt.rstrip(" ") for prompt in prompts]
    if tidy != list(prompts):
        print("note: spaces at the end of a prompt are left out, since a token begins with the space before its word",
              file=sys.stderr)
    if any(SEPARATOR in prompt for prompt in tidy):
        print(f"note: {SEPARATOR} in a prompt is text like any other, which the model has not seen; leave it out: each "
              "story begins after a separator already", file=sys.stderr)
    return tidy


@explain_out_of_memory("close what else uses the device, or compute on the CPU with --device cpu")
def main(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts_file) if args.prompts_file else []
    device, path = choose_device(args.device), args.checkpoint or newest_checkpoint()
    if args.device == "auto" and (warning := unused_gpu(device)):
        print(warning, file=sys.stderr)
    checkpoint = load_checkpoint(path)
    sampling = change_settings(config_from_dict(checkpoint["config"], str(path)).sampling, args.settings, "--{} {}")
    if not prompts:
        typed = sampling.prompts[0] if args.prompt is None else args.prompt
        prompts = [typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]  # it may hold any bytes
    prompts = tidy_prompts(prompts)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(path))
    encode_prompts(tokenizer, prompts, checkpoint["config"]["model"]["max_seq_len"])  # checks them before --out opens
    print(describe_checkpoint(checkpoint, path), file=sys.stderr)
    aim = GOOD_LOSS.get(checkpoint["config"].get("data", {}).get("dataset"), math.inf)
    if aim < checkpoint["best_val_loss"] < math.inf:
        print(f"warning: that loss is above {aim}: expect grammar mistakes; train longer", file=sys.stderr)
    compute, why = choose_compute(args.compute, device, len(prompts) * args.num_samples)
    print(f"computing in {compute}{why}", file=sys.stderr)
    model = pack(model_from_checkpoint(checkpoint, path, device), compute)
    with (name_in_errors("standard output"),
          create_file(args.out, "--out") if args.out else contextlib.nullcontext() as file):
        def record(sampling: SamplingConfig, prompt: str, seed: int, story: Story) -> None:
            if file is not None:
                settings = {name: getattr(sampling, name) for name in SAMPLING_SETTINGS if name != "seed"}
                settings |= {"compute": compute, "checkpoint": str(path)}
                line = {"prompt": prompt, "seed": seed, "text": story.text, "tokens": story.tokens,
                        "mean_log_probability": story.log_probability, "ended": story.ended, "settings": settings}
                with name_in_errors(f"--out {args.out}"):
                    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)

        if args.interactive:
            return run_interactive(model, tokenizer, sampling, record, args.stop)
        seeds = [sampling.seed + number for _ in prompts for number in range(args.num_samples)]
        prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
        generate_and_print(model, tokenizer, prompts, sampling, seeds, functools.partial(record, sampling), args.stop)


if __name__ == "__main__":
    atexit.register(gc.freeze)  # otherwise Python's exit collects garbage among all of torch's objects, for 0.2 s
    run_script(main, arguments)
