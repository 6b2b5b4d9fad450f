"""Did it work? Checks of a model, how likely it finds the validation split, and its stories beside real ones.

    python evaluate.py --checkpoint checkpoints/quickstart/best_model.pth
    python evaluate.py --checkpoint X --data some.txt      only how likely it finds that text, byte for byte

train.py calls evaluate() and sample_stories() at every evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config import Config, UserError, check_overrides, config_from_dict, run_script
from config.cli import Parser, check_first, not_negative

NUM_STORIES = 200


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Did it work? Checks, likelihood and stories of a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file (default: the newest under checkpoints/)")
    parser.add_argument("--data", metavar="FILE", help="only score this text, a file, folder or glob, byte for byte: "
                        "models with different tokenizers compare in bits per byte")
    parser.add_argument("--num_stories", type=not_negative, default=NUM_STORIES, help="told, and held against as many "
                        "real ones; 0: none (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all of it, with the stories, as JSON")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the checkpoint's config; may be given many times")
    args = parser.parse_args()
    check_overrides(args.overrides)
    for override in args.overrides:
        if override.strip().startswith("model."):
            raise UserError(f"--set {override}: the model is the checkpoint's, and cannot be changed here")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}: make it, or name another file")
    if args.out and not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: the folder {args.out.parent} cannot be written to: name another file")
    return args


if __name__ == "__main__":
    check_first(parse_arguments)  # a mistake is told at once, before seconds of importing what follows

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from config.files import replacing
from config.hardware import choose_compute, choose_device, choose_precision
from config.ranks import ALONE, Ranks
from config.values import counted
from data.checklist import check_likelihood, check_run
from data.checkpoints import check_model, load_checkpoint, newest_checkpoint
from data.likelihood import measure_likelihood
from data.measures import learn
from data.report import EVALUATION, read_metrics, update_report
from data.tokens import (
    IGNORED,
    TokenFile,
    article_mask,
    prepare_tokens,
    read_batch,
    token_byte_lengths,
    tokenizer_from_json,
    validation_windows,
)
from data.yardstick import (
    Passage,
    choose_references,
    compare,
    cut_reference,
    format_table,
    measure_passages,
    read_stories,
)
from generate import GOOD_LOSS, pack, tell_stories
from model import Transformer, model_from_checkpoint

LEARN_FROM = 30_000  # training stories that words and nouns are learned from
CHOOSE_FROM = 20_000  # validation stories that references are chosen from


@torch.no_grad()
def evaluate(model: Transformer, validation: TokenFile, tokenizer: Tokenizer, config: Config, device: torch.device,
             precision: Callable[[], Any], limit: int = 0, ranks: Ranks = ALONE) -> dict[str, float]:
    """A pass over fixed windows of the validation split: all of them, the incomplete last included, or `limit`.

    Each rank takes its share of them, and all get the whole result.

    Returns val_loss (nats per token), perplexity, bits_per_byte (of the text: the separators' bits count, but they
    have no bytes), article_loss (nats per token whose truth is an article), other_loss, val_tokens.
    """
    seq_len, batch_size = config.model.max_seq_len, config.evaluation_batch
    windows = validation_windows(len(validation.tokens), seq_len, limit)[ranks.rank::ranks.count]
    byte_lengths = torch.from_numpy(token_byte_lengths(tokenizer)).to(device)  # (tokenizer's size,)
    is_article = torch.from_numpy(article_mask(tokenizer)).to(device)  # (tokenizer's size,)
    sums = [torch.zeros(5, device=device)]
    model.eval()
    for start in tqdm(range(0, len(windows), batch_size), desc="evaluate", leave=False, unit="batch",
                      disable=None if config.training.show_progress else True):
        inputs, targets = read_batch(validation.tokens, windows[start:start + batch_size], seq_len, device)
        with precision():
            losses = model(inputs, targets, reduction="none")  # (batch, seq_len), 0 where nothing counts
        counted = targets != IGNORED
        truth = targets.clamp(min=0)
        articles = is_article[truth] & counted
        sums.append(torch.stack([losses.sum(), counted.sum(), (byte_lengths[truth] * counted).sum(),
                                 (losses * articles).sum(), articles.sum()]))
    model.train()
    total = ranks.sum(torch.stack(sums).cpu().double().sum(dim=0))  # (5,)
    nats, tokens, num_bytes, article_nats, article_tokens = total.tolist()
    loss = nats / tokens
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(1.0, num_bytes),
            "article_loss": article_nats / max(1.0, article_tokens),
            "other_loss": (nats - article_nats) / max(1.0, tokens - article_tokens), "val_tokens": int(tokens)}


def describe_evaluation(result: dict[str, float]) -> str:
    return (f"validation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, "
            f"{result['bits_per_byte']:.4f} bits per byte; articles {result['article_loss']:.3f}, "
            f"other tokens {result['other_loss']:.3f}")


def sample_stories(model: Transformer, tokenizer: Tokenizer, config: Config) -> list[str]:
    """One story for each prompt of the config, always with the same seed, so that evaluations compare."""
    model.eval()
    try:
        prompts = config.sampling.prompts
        stories = tell_stories(model, tokenizer, prompts, config.sampling, [config.sampling.seed] * len(prompts))
        return [story.text for story in sorted(stories)]
    finally:
        model.train()


# A checkpoint, from all sides

def describe_likelihood(found: dict[str, Any], name: str) -> str:
    rows = [f"{name}: {found['tokens']:,} tokens, {found['bytes']:,} bytes, {found['characters']:,} characters",
            f"  {found['val_loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
            f"{found['bits_per_byte']:.4f} bits per byte, {found['bits_per_character']:.4f} bits per character",
            f"  articles ({found['articles']:,}): {found['article_loss']:.3f} nats per token, the likeliest token is "
            f"the right one in {found['article_accuracy']:.1%}; all other tokens: {found['other_loss']:.3f}",
            "  by position in the story: " + ", ".join(
                f"{of['first']}-{of['last'] or ''}: {of['loss']:.3f}" if of["last"] != of["first"] else
                f"{of['first']}: {of['loss']:.3f}" for of in found["by_position"])]
    return "\n".join(rows)


def tell_passages(model: Transformer, tokenizer: Tokenizer, config: Config, prompts: Sequence[str]) -> list[Passage]:
    """A story from each prompt, each with a seed of its own, without the prompt."""
    seeds = [config.sampling.seed + place for place in range(len(prompts))]
    told = tqdm(tell_stories(model, tokenizer, prompts, config.sampling, seeds), total=len(prompts), desc="stories",
                unit="story", leave=False, disable=None if config.training.show_progress else True)
    return [Passage(prompt, story.text[len(prompt):], story.ended)
            for prompt, story in zip(prompts, sorted(told), strict=True)]


def compare_stories(model: Transformer, tokenizer: Tokenizer, config: Config, train_file: TokenFile,
                    validation: TokenFile, num_stories: int) -> dict[str, Any]:
    """Tell num_stories, or as many as there are references for, and hold them against as many validation stories with
    the same beginning cut off."""
    real = list(read_stories(validation, tokenizer, CHOOSE_FROM))
    pairs = choose_references(real, config.sampling.prompts, num_stories)
    if not pairs:
        raise UserError(f"{validation.path}: no story in it is long enough to be a yardstick: --num_stories 0 leaves "
                        "the comparison out")
    if len(pairs) < num_stories:
        print(f"\nnote: {counted(len(pairs), 'story')}, not {num_stories:,}: each is held against a real one with its "
              f"beginning, and of the {len(real):,} validation stories looked at no more have one of the beginnings")
    references = [cut_reference(prompt, story, tokenizer, config.sampling.max_new_tokens) for prompt, story in pairs]
    passages = tell_passages(model, tokenizer, config, [prompt for prompt, _ in pairs])
    learned = learn(read_stories(train_file, tokenizer, LEARN_FROM))
    measured, yardstick = (measure_passages(side, learned, tokenizer, train_file.tokens, config.training.show_progress)
                           for side in (passages, references))
    described = [[{**passage._asdict(), **{key: list(value) for key, value in of.items()}}
                  for passage, of in zip(side, figures, strict=True)]
                 for side, figures in ((passages, measured), (references, yardstick))]
    return {"table": compare(passages, references, measured, yardstick), "stories": described[0],
            "references": described[1], "learned_from": learned.num_stories, "nouns": sorted(learned.nouns)}


def evaluate_checkpoint(config: Config, checkpoint_path: Path, data: str | None = None,
                        num_stories: int = NUM_STORIES, out: Path | None = None) -> None:
    """Print all that this file finds out about a checkpoint; with `data`, only how likely it finds that text.

    Of the processes of torchrun the first one does it all, and the others nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    device, checkpoint = choose_device(config.hardware.device), load_checkpoint(checkpoint_path)
    check_model(checkpoint, checkpoint_path, config)
    model = model_from_checkpoint(checkpoint, checkpoint_path, device)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(checkpoint_path))
    progress = config.training.show_progress
    source = config.data
    if data is not None:  # as it stands, so that the bytes are the same whatever model is asked; in a cache of its own
        source = dataclasses.replace(source, dataset="sample", validation=data, clean=False,
                                     cache_dir=str(Path(source.cache_dir) / "evaluate"))
    try:
        validation = prepare_tokens(source, tokenizer, "validation", progress)
    except UserError as error:
        if data is None:
            raise
        raise UserError(str(error).replace("data.validation", "--data", 1)) from None
    train_file = prepare_tokens(config.data, tokenizer, "train", progress) if data is None else None
    precision, _ = choose_precision(device, config.training.use_bf16)
    likelihood = measure_likelihood(model, validation.tokens, tokenizer, config.model.max_seq_len,
                                    config.evaluation_batch, device, precision, progress)
    if likelihood["bytes"] != validation.counts["bytes"]:  # a tokenizer of another make that changes what it reads
        print(f"warning: {validation.path.name}: its tokens spell {likelihood['bytes']:,} bytes, the text has "
              f"{validation.counts['bytes']:,}: bits per byte are of the former")
    result = {"checkpoint": str(checkpoint_path), "step": checkpoint["iter_num"], "epoch": checkpoint["epoch"],
              "data": data or "validation", "likelihood": likelihood}
    print()
    if train_file:
        metrics = read_metrics(checkpoint_path.parent / "metrics.jsonl")
        checks = [*check_run(checkpoint, checkpoint_path, config, train_file),
                  *check_likelihood(likelihood, checkpoint["iter_num"], metrics, GOOD_LOSS)]
        result["checks"] = [check._asdict() for check in checks]
        print(checkpoint_path)
        for mark, name, found, meaning in checks:
            print(f"{mark:>5}  {name}: {found}" + (f"\n       {meaning}" if meaning else ""))
        print()
    print(describe_likelihood(likelihood, data or "validation split"))
    if train_file and num_stories:
        compute, _ = choose_compute("auto", device)
        result |= compare_stories(pack(model, compute), tokenizer, config, train_file, validation, num_stories)
        print(f"\n{counted(len(result['stories']), 'story')}, and as many of the validation split with the same "
              f"beginnings; the beginning counts for neither\n\n{format_table(result['table'])}")
        for story in result["stories"][:3]:
            print(f"\n{story['prompt']}{story['text']}")
    if out:
        with replacing(out) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
        print(f"\nwritten: {out}")
        if out.name == EVALUATION and "table" in result:
            update_report(out.parent)


def main() -> None:
    args = parse_arguments()
    if args.out and (args.out.is_dir() or (args.out.exists() and args.out.name != EVALUATION)):
        raise UserError(f"--out {args.out}: is there already; name another file, or remove it (only {EVALUATION} is "
                        "written anew)")
    path = args.checkpoint or newest_checkpoint()
    config = config_from_dict(load_checkpoint(path)["config"], str(path), args.overrides)
    evaluate_checkpoint(config, path, args.data, args.num_stories, args.out)


if __name__ == "__main__":
    run_script(main)
