"""Tell stories with a trained model.

    python generate.py --prompt "Once upon a time there was" --temperature 0.8 --num_samples 3
    python generate.py --interactive

Stories go to standard output, everything else to standard error. Read it from generate_tokens(), the engine: many
prompts are continued at once, with a key/value cache, each token drawn as asked. Above it is how a token is chosen
and how the weights are laid out, below it the text, the talking and the command line.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from config import UserError, config_from_dict, run_script
from config.cli import Parser, check_first, positive
from config.schema import SamplingConfig, change_settings

SETTINGS = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "prompts"]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Tell stories with a trained model. Defaults are those of its config's sampling.")
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
    parser.add_argument("--num_samples", type=positive, default=1, help="how many stories of each prompt (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a line of JSON for each story to a new file")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--compute", choices=("auto", "float32", "bf16", "int8"), default="auto",
                        help="auto: bf16 where the device is faster with it, else float32; int8: 8-bit weights")
    args = parser.parse_args()
    if args.interactive and args.num_samples > 1:
        raise UserError(f"--num_samples {args.num_samples}: with --interactive just 1")
    args.settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    change_settings(SamplingConfig(), args.settings, "--{} {}")  # for its errors
    return args


if __name__ == "__main__":
    check_first(parse_arguments)  # a mistake is told at once, before seconds of importing what follows

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from config.files import naming, open_new
from config.hardware import PackedLinear, choose_compute, choose_device, send
from config.values import show
from data.checkpoints import load_checkpoint, newest_checkpoint
from data.readers import read_prompts
from data.tokens import END_OF_STORY, tokenizer_from_json
from model import Attention, KVCache, Transformer, apply_rope, model_from_checkpoint

GOOD_LOSS = 2.0  # nats per token; above it, a model on TinyStories still makes mistakes in grammar
HELP = """Type the beginning of a story and press Enter (nothing: from scratch). Ctrl-C stops a story.
/set NAME VALUE  change a setting, such as /set temperature 0.7
/help            this, and the settings
/quit            leave (or Ctrl-D; on Windows Ctrl-Z and Enter)"""
MAX_ROWS = 128  # prompts continued at once
CACHE_BYTES = 2**31  # or fewer, if their keys and values took more memory than this
CHECK_EVERY = 8  # tokens between two looks at which rows have ended; on a GPU each look is a wait
CANDIDATES = 64  # on the CPU the likeliest so many tokens are looked at before all the others
PREFILL_TOKENS = 4096  # of prompts in one pass: their attention takes memory


# Choosing a token

def sample_next(logits: Tensor, luck: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Draw one token for each row, int64, (batch,).

    logits: (batch, vocab_size). luck: float32, (batch,), uniform in [0, 1): it picks a token by the cumulative
    distribution in the order of their ids. seen: bool, (batch, vocab_size), what repetition_penalty acts on.
    In this order, as in transformers: repetition_penalty, temperature (0: simply the likeliest token),
    top_k, top_p, min_p. Equally likely tokens are kept or cut together: nothing depends on how a sort breaks ties.
    """
    logits = logits.float()
    if seen is not None:
        logits = torch.where(seen, penalise(logits, sampling.repetition_penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature  # the likeliest token has 0
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return draw_index(logits.exp(), luck)
    on_cpu = logits.device.type == "cpu"  # elsewhere, to see whether some are enough is to wait
    return draw_from_likeliest(logits, luck, sampling, CANDIDATES if on_cpu else logits.shape[1])


def draw_index(weights: Tensor, luck: Tensor) -> Tensor:
    """Where in each row of weights, (batch, any number), luck falls, int64, (batch,)."""
    cumulative = weights.cumsum(dim=-1)
    return (cumulative > luck[:, None] * cumulative[:, -1:]).int().argmax(dim=-1)  # the first that reaches it


def penalise(logits: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely by a factor on their logit (Keskar et al., 2019), whichever its sign."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def draw_from_likeliest(logits: Tensor, luck: Tensor, sampling: SamplingConfig, count: int) -> Tensor:
    """Draw a token for each row, int64, (batch,), looking at the `count` likeliest; rows that need more look at more.

    logits: (batch, vocab_size), at most 0, divided by the temperature. top_k keeps the k likeliest; top_p of these the
    fewest that reach that share (Holtzman et al., 2020); min_p what is at least that share as likely as the likeliest
    (Nguyen et al., 2024).
    """
    count, top_k = min(max(count, sampling.top_k + 1), logits.shape[1]), min(sampling.top_k, logits.shape[1])
    values, tokens = logits.topk(count)  # (batch, count), the likeliest first
    kept = values >= (values[:, top_k - 1:top_k] if top_k else -math.inf)
    if sampling.top_p < 1:
        shares = values.exp() * kept
        total = shares.sum(dim=-1, keepdim=True) if top_k else logits.exp().sum(dim=-1, keepdim=True)
        likelier = (shares.cumsum(dim=-1) - shares) / total  # the share of all likelier tokens
        kept &= values >= values.masked_fill(likelier >= sampling.top_p, math.inf).amin(dim=-1, keepdim=True)
    if sampling.min_p:
        kept &= values >= math.log(sampling.min_p)
    tokens, order = tokens.sort(dim=-1)
    chosen = draw_index((values.exp() * kept).gather(1, order), luck)  # in the order of the ids
    drawn = tokens.gather(1, chosen[:, None]).squeeze(1)
    if count < logits.shape[1]:
        rest = kept[:, -1].nonzero().squeeze(1)  # the last one is kept, so there may be more
        if len(rest):
            drawn[rest] = draw_from_likeliest(logits[rest], luck[rest], sampling, 8 * count)
    return drawn


# The same model with its weights laid out for generating

class PackedAttention(Attention):
    """Attention with one product for queries, keys and values, and one rotation."""

    def __init__(self, attention: Attention, compute: str) -> None:
        nn.Module.__init__(self)
        self.config, self.layer = attention.config, attention.layer
        self.wqkv = PackedLinear([attention.wq, attention.wk, attention.wv], compute)
        self.wo = PackedLinear([attention.wo], compute)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, shared = self.config.n_heads, self.config.kv_heads
        states = self.wqkv(x).view(*x.shape[:2], -1, self.config.head_dim)
        rotated, values = states.split([heads + shared, shared], dim=2)  # (batch, seq_len, heads, head_dim)
        queries, keys = apply_rope(rotated, cos, sin).split([heads, shared], dim=2)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


class PackedFeedForward(nn.Module):
    def __init__(self, feed_forward: nn.Module, compute: str) -> None:
        super().__init__()
        self.w13 = PackedLinear([feed_forward.w1, feed_forward.w3], compute)
        self.w2 = PackedLinear([feed_forward.w2], compute)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # (batch, seq_len, d_ffn) each
        return self.w2(F.silu(gate) * up)


def pack(model: Transformer, compute: str) -> Transformer:
    """Lay the model's weights out for generating: compute is float32, bf16 or int8. Changes it; not for training."""
    for layer in model.layers:
        layer.attention = PackedAttention(layer.attention, compute)
        layer.feed_forward = PackedFeedForward(layer.feed_forward, compute)
    model.output = PackedLinear([model.output], compute)
    return model


# The engine

class Continuation:
    """A prompt that is being continued: its tokens, its source of luck, and what was drawn so far."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, max_new_tokens: int) -> None:
        self.index, self.prompt, self.new = index, prompt, []
        self.window = list(prompt)  # the tokens that the model looks back on; the last is not in the cache yet
        # on the CPU, and its own: what is drawn depends neither on the device nor on the rest of the batch
        self.luck = torch.Generator().manual_seed(seed)
        self.log_probability = 0.0  # of the new tokens, nats, by the model's own distribution (temperature 1)
        self.max_new_tokens, self.done = max_new_tokens, False

    def extend(self, tokens: list[int], log_probabilities: list[float], end: int) -> None:
        count = tokens.index(end) + 1 if end in tokens else len(tokens)  # what follows `end` is thrown away
        self.new += tokens[:count]
        self.window += tokens[:count]
        self.log_probability += sum(log_probabilities[:count])
        self.done = self.new[-1] == end or len(self.new) == self.max_new_tokens


@torch.inference_mode()
def generate_tokens(model: Transformer, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end: int,
                    num_tokens: int, sampling: SamplingConfig, check_every: int = CHECK_EVERY,
                    ) -> Iterator[list[Continuation]]:
    """Continue prompts[i] with seeds[i], many at once. Yields every check_every tokens those that are under way.

    A continuation is done after `end`, then its last new token, or after max_new_tokens; it is not yielded again. When
    it outgrows the model's context it goes on from the last half of that. Only ids below num_tokens are drawn: the
    tokenizer's size, which the model's vocabulary may exceed. The model must be in eval mode.
    """
    config, device = model.config, model.tok_embeddings.weight.device
    context = min(config.max_seq_len, max(map(len, prompts)) + sampling.max_new_tokens)
    row_bytes = 8 * config.n_layers * config.kv_heads * config.head_dim * context  # keys and values in float32
    batches = -(-len(prompts) // max(1, min(MAX_ROWS, CACHE_BYTES // row_bytes)))  # rounded up
    rows = -(-len(prompts) // batches)
    cache = KVCache(config, rows, context, device)
    for first in range(0, len(prompts), rows):
        running = [Continuation(i, prompts[i], seeds[i], sampling.max_new_tokens)
                   for i in range(first, min(first + rows, len(prompts)))]
        cache.lengths = [0] * len(running)
        prefill(model, cache, running, range(len(running)))
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(running), num_tokens, dtype=torch.bool)
            for row, told in enumerate(running):
                # not `end`, which begins every prompt: else repetition_penalty would keep stories from ending
                seen[row, [token for token in told.prompt if token != end]] = True
            seen = send(seen, device)
        while running:
            left = sampling.max_new_tokens - len(running[0].new)  # the same in all rows
            steps = min(check_every, left, context - cache.length)
            luck = torch.stack([torch.rand(steps, generator=told.luck) for told in running])  # (rows, steps)
            tokens = torch.tensor([told.window[-1:] for told in running])  # (rows, 1)
            drawn = draw(model, cache, tokens, luck, num_tokens, sampling, seen)
            for told, *row in zip(running, *drawn, strict=True):
                told.extend(*row, end)
            yield running
            kept = sum(not told.done for told in running)
            last = [row for row in range(kept, len(running)) if not running[row].done]
            order = [last.pop() if running[row].done else row for row in range(kept)]  # the last fill the gaps
            moved = [row for row in range(kept) if order[row] != row]
            copy_rows(cache, moved, cache, [order[row] for row in moved])
            del cache.lengths[kept:]
            running = [running[row] for row in order]
            seen = seen[send(torch.tensor(order, dtype=torch.int64), device)] if seen is not None else None
            full = [row for row, length in enumerate(cache.lengths) if length == config.max_seq_len]
            for row in full:
                running[row].window = running[row].window[-(config.max_seq_len // 2):]
            prefill(model, cache, [running[row] for row in full], full)


def draw(model: Transformer, cache: KVCache, tokens: Tensor, luck: Tensor, num_tokens: int, sampling: SamplingConfig,
         seen: Tensor | None) -> tuple[list[list[int]], list[list[float]]]:
    """As many tokens for each row as luck, (rows, steps), has columns, and their log-probabilities at temperature 1.

    tokens: int64, (rows, 1), what comes before. The device is waited for once, at the end.
    """
    tokens, luck = (send(x, model.tok_embeddings.weight.device) for x in (tokens, luck))
    drawn, log_probabilities = [], []
    for column in luck.unbind(dim=1):
        logits = model(tokens, cache=cache)[:, -1, :num_tokens].float()  # (rows, num_tokens)
        tokens = sample_next(logits, column, sampling, seen)[:, None]  # (rows, 1)
        if seen is not None:
            seen.scatter_(1, tokens, True)
        drawn.append(tokens)
        log_probabilities.append(logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True))
    return torch.cat(drawn, dim=1).tolist(), torch.cat(log_probabilities, dim=1).tolist()


def copy_rows(cache: KVCache, rows: Sequence[int], source: KVCache, source_rows: Sequence[int]) -> None:
    """Make rows of a cache copies of source_rows of another one, or of itself."""
    if not rows:
        return
    into, of = (send(torch.tensor(numbers), cache.device) for numbers in (rows, source_rows))  # lists are waited for
    for mine, theirs in zip(cache.layers, source.layers, strict=True):
        for cached, other in zip(mine, theirs, strict=True):
            cached[into, :, :source.length] = other[of, :, :source.length]
    for row, source_row in zip(rows, source_rows, strict=True):
        cache.lengths[row] = source.lengths[source_row]


def prefill(model: Transformer, cache: KVCache, running: Sequence[Continuation], rows: Sequence[int]) -> None:
    """Give these rows of the cache all tokens of their windows but the last.

    Windows of one length take one pass (or more, of PREFILL_TOKENS), and equal ones are computed once. Nothing is
    padded, so that a story's bits do not depend on which other prompts are told with it.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for told, row in zip(running, rows, strict=True):
        cache.lengths[row] = 0
        rows_of.setdefault(tuple(told.window[:-1]), []).append(row)
    for length in sorted({len(window) for window in rows_of} - {0}):
        windows = [window for window in rows_of if len(window) == length]
        size = max(1, PREFILL_TOKENS // length)
        for some in (windows[i:i + size] for i in range(0, len(windows), size)):
            filled = KVCache(model.config, len(some), length, cache.device)
            model.residual_stream(send(torch.tensor(some), cache.device), filled)
            pairs = [(row, source) for source, window in enumerate(some) for row in rows_of[window]]
            copy_rows(cache, [row for row, _ in pairs], filled, [source for _, source in pairs])


# Stories

class Story(NamedTuple):
    """index: of its prompt and seed among those asked for. text: the prompt and what follows. tokens: the new ones,
    ids. log_probability: their mean, nats, by the model itself (temperature 1, nothing cut). ended: by END_OF_STORY."""

    index: int
    text: str
    tokens: list[int]
    log_probability: float
    ended: bool


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], context: int) -> list[list[int]]:
    """The tokens of each prompt, after a separator, as every story begins. UserError if one fills the context."""
    end = tokenizer.token_to_id(END_OF_STORY)
    every = [[end, *encoding.ids] for encoding in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
    for prompt, ids in zip(prompts, every, strict=True):
        if len(ids) >= context:
            raise UserError(f"the prompt {show(prompt[:30] + '...')} has {len(ids) - 1:,} tokens, but the model's "
                            f"context holds {context:,} with the story: shorten it to {context - 2:,}")
    return every


def tell_stories(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig,
                 seeds: Sequence[int], watch: Callable[[list[Continuation]], None] | None = None) -> Iterator[Story]:
    """A story for each prompt and its seed, in the order in which they are done. A prompt may be empty.

    watch is called with the stories under way, every few tokens; if there is only one, after each token.
    Raises UserError if a prompt fills the model's context.
    """
    end, every = tokenizer.token_to_id(END_OF_STORY), encode_prompts(tokenizer, prompts, model.config.max_seq_len)
    check_every = 1 if watch is not None and len(prompts) == 1 else CHECK_EVERY
    for running in generate_tokens(model, every, seeds, end, tokenizer.get_vocab_size(), sampling, check_every):
        if watch is not None:
            watch(running)
        for told in running:
            if told.done:
                text = tokenizer.decode([*told.prompt, *told.new], skip_special_tokens=True)
                yield Story(told.index, text, told.new, told.log_probability / len(told.new), told.new[-1] == end)


# Talking

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
    lengths, show = {}, printer(tokenizer) if alone else lambda running: None  # lengths: tokens of each story so far

    def watch(running: list[Continuation]) -> None:
        lengths.update((told.index, len(told.new)) for told in running)
        show(running)
    progress = tqdm(total=len(prompts), desc="stories", unit="story", leave=False, disable=True if alone else None)
    try:
        for story in tell_stories(model, tokenizer, prompts, sampling, seeds, watch):
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
        total, cut = sum(lengths.values()), sum(not story.ended for story in done)
        notes = [f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s"]
        if len(done) < len(prompts):
            notes.append(f"{len(done):,} of {len(prompts):,} stories told")
        if cut:
            notes.append(f"{cut:,} cut after {sampling.max_new_tokens} new tokens (max_new_tokens)")
        if max(lengths.values(), default=0) >= model.config.max_seq_len:
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
                try:
                    tell_and_print(model, tokenizer, [line], sampling, [sampling.seed],
                                   functools.partial(record, sampling))
                except KeyboardInterrupt:
                    print("(stopped; /quit leaves)", file=sys.stderr)
                sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(/quit leaves)", file=sys.stderr)
        except EOFError:
            return


def main() -> None:
    args = parse_arguments()
    typed = args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # it may hold any bytes
    prompts = read_prompts(args.prompts_file) if args.prompts_file else [typed]
    device, path = choose_device(args.device), args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    sampling = change_settings(config_from_dict(checkpoint["config"], str(path)).sampling, args.settings, "--{} {}")
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(path))
    encode_prompts(tokenizer, prompts, checkpoint["config"]["model"]["max_seq_len"])  # told before a file is opened
    over = "" if checkpoint.get("completed") == checkpoint["iter_num"] else " so far"
    loss, whose = checkpoint["best_val_loss"], "" if path.name == "best_model.pth" else f"best of its run{over}: "
    known = f"{whose}validation loss {loss:.3f}" if loss < math.inf else "not evaluated yet"
    print(f"{path}: step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}, {known}", file=sys.stderr)
    if GOOD_LOSS < loss < math.inf:
        print(f"warning: that loss is above {GOOD_LOSS}: expect mistakes in grammar; train longer", file=sys.stderr)
    compute, why = choose_compute(args.compute, device)
    print(f"computing in {compute}{why}", file=sys.stderr)
    model = pack(model_from_checkpoint(checkpoint, path, device), compute)
    with naming("standard output"), (open_new(args.out, "--out") if args.out else contextlib.nullcontext()) as file:
        def record(sampling: SamplingConfig, prompt: str, seed: int, story: Story) -> None:
            if file is not None:
                settings = {name: getattr(sampling, name) for name in SETTINGS if name != "seed"}
                settings |= {"compute": compute, "checkpoint": str(path)}
                line = {"prompt": prompt, "seed": seed, "text": story.text, "tokens": story.tokens,
                        "mean_log_probability": story.log_probability, "ended": story.ended, "settings": settings}
                with naming(f"--out {args.out}"):  # not standard output
                    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)

        if args.interactive:
            return talk(model, tokenizer, sampling, record)
        seeds = [sampling.seed + number for _ in prompts for number in range(args.num_samples)]
        prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
        tell_and_print(model, tokenizer, prompts, sampling, seeds, functools.partial(record, sampling))


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else Python looks all of torch over once more at the end: 0.2 s
    run_script(main)
