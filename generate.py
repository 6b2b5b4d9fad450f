"""Tell stories with a trained model.

    python generate.py --prompt "Once upon a time there was" --temperature 0.8 --num_samples 3

Stories go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import UserError, config_from_dict, run_script
from config.hardware import choose_device
from config.schema import SamplingConfig
from data.checkpoints import load_checkpoint
from data.tokens import END_OF_STORY, tokenizer_from_json
from model import KVCache, Transformer, model_from_checkpoint

GOOD_LOSS = 2.0  # nats per token; above it, a model on TinyStories still makes mistakes in grammar
BATCH_SIZE = 32  # stories told at once


class Story(NamedTuple):
    """text: the prompt and what follows. ended: by END_OF_STORY, not by max_new_tokens or a full context."""

    text: str
    num_new_tokens: int
    ended: bool


def sample_next(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Tensor:
    """Draw one token for each row, int64, (batch,).

    logits: (batch, vocab_size). uniform: float32, (batch,), in [0, 1): the row's share of luck, which picks the token
    at that point of the cumulative distribution. Kept are the top_k likeliest tokens (0: all) and of those the
    fewest that reach top_p of the probability (nucleus sampling: Holtzman et al., 2020).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    values, tokens = logits.float().sort(dim=-1, descending=True, stable=True)  # (batch, vocab_size)
    if sampling.top_k:
        values, tokens = values[:, :sampling.top_k], tokens[:, :sampling.top_k]
    probabilities = ((values - values[:, :1]) / sampling.temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all likelier tokens
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    reached = cumulative > uniform[:, None] * cumulative[:, -1:]
    return tokens.gather(1, reached.int().argmax(dim=-1, keepdim=True)).squeeze(1)  # the first that is reached


@torch.inference_mode()
def generate_tokens(model: Transformer, prompt: Sequence[int], end: int, num_tokens: int, sampling: SamplingConfig,
                    seeds: Sequence[int]) -> list[list[int]]:
    """Continue one prompt once for each seed. Returns the new tokens of each; the last is `end` where it was drawn.

    Only ids below num_tokens are drawn: the tokenizer's size, which the model's vocabulary may exceed. The model must
    be in eval mode. Stops at max_new_tokens or when prompt and continuation fill the model's context.
    """
    device = model.tok_embeddings.weight.device
    limit = min(sampling.max_new_tokens, model.config.max_seq_len - len(prompt))
    # drawn on the CPU beforehand: a story depends on its own seed, not on the device or on the rest of the batch
    luck = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    luck = luck.to(device)  # (batch, limit)
    cache = KVCache(model.config, len(seeds), len(prompt) + limit, device, model.tok_embeddings.weight.dtype)
    tokens = torch.tensor([list(prompt)] * len(seeds), device=device)  # (batch, prompt_len)
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    drawn = []
    for position in range(limit):
        logits = model(tokens, cache=cache)[:, -1, :num_tokens]  # (batch, num_tokens)
        tokens = sample_next(logits, luck[:, position], sampling).masked_fill(ended, end)[:, None]  # (batch, 1)
        drawn.append(tokens)
        ended |= tokens[:, 0] == end
        if ended.all():
            break
    rows = torch.cat(drawn, dim=1).tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def tell_stories(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig,
                 seeds: Sequence[int]) -> list[Story]:
    """One story for each seed from a prompt, which may be empty. Raises UserError if the prompt fills the context."""
    end = tokenizer.token_to_id(END_OF_STORY)
    ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]  # every story begins after a separator
    if len(ids) >= model.config.max_seq_len:
        raise UserError(f"the prompt has {len(ids) - 1:,} tokens, but the model's context holds "
                        f"{model.config.max_seq_len:,} with the story: shorten it to {model.config.max_seq_len - 2:,}")
    stories = []
    for new in generate_tokens(model, ids, end, tokenizer.get_vocab_size(), sampling, seeds):
        text = tokenizer.decode(ids + new, skip_special_tokens=True)
        stories.append(Story(text, len(new), new[-1] == end))
    return stories


def newest_checkpoint(folder: Path = Path("checkpoints")) -> Path:
    """The .pth file under folder that was written last; files of replaced runs (in previous/) do not count."""
    files = [path for path in folder.rglob("*.pth") if path.parent.name != "previous"]
    if not files:
        raise UserError(f"{folder}: no checkpoint here; train one with python train.py, or name one with --checkpoint")
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tell stories with a trained model. What is not given is taken from "
                                                 "the sampling section of the checkpoint's config.")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file (default: the newest under checkpoints/)")
    parser.add_argument("--prompt", default="Once upon a time there was", help="how the story begins (%(default)s)")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token; higher: more daring")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that make up this share")
    parser.add_argument("--max_new_tokens", type=int, help="at most so many tokens after the prompt")
    parser.add_argument("--num_samples", type=int, default=1, help="how many stories (%(default)s)")
    parser.add_argument("--seed", type=int, help="story i is drawn with seed + i")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: at least 1")
    device = choose_device(args.device)
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    flags = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(SamplingConfig)}
    given = [f"sampling.{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    sampling = config_from_dict(checkpoint["config"], str(path), given).sampling
    model = model_from_checkpoint(checkpoint, path, device)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(path))
    loss = checkpoint["best_val_loss"]
    print(f"{path}: step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}, best validation loss {loss:.3f}",
          file=sys.stderr)
    if loss > GOOD_LOSS:
        print(f"warning: that loss is above {GOOD_LOSS}: expect mistakes in grammar; train longer", file=sys.stderr)
    tell_and_print(model, tokenizer, args.prompt, sampling, args.num_samples)


def tell_and_print(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig,
                   num_samples: int) -> None:
    """Tell num_samples stories and print them as their batches are done."""
    start, total = time.perf_counter(), 0
    seeds = range(sampling.seed, sampling.seed + num_samples)
    for first in range(0, num_samples, BATCH_SIZE):
        for story in tell_stories(model, tokenizer, prompt, sampling, seeds[first:first + BATCH_SIZE]):
            print(story.text, end="\n\n", flush=True)
            total += story.num_new_tokens
            if not story.ended:
                print(f"(cut after {story.num_new_tokens} new tokens: max_new_tokens is {sampling.max_new_tokens}, the "
                      f"context {model.config.max_seq_len})", file=sys.stderr)
    print(f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
