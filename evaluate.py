"""Look at a model: its loss on the validation split, apart for articles and all other tokens, and sample stories.

    python evaluate.py --checkpoint checkpoints/quickstart/best_model.pth

train.py calls evaluate() and sample_stories() at every evaluation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from config import Config, config_from_dict, run_script
from config.hardware import choose_device, choose_precision
from config.ranks import ALONE, Ranks
from data.checkpoints import load_checkpoint
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
from generate import newest_checkpoint, tell_stories
from model import Transformer, model_from_checkpoint


@torch.no_grad()
def evaluate(model: Transformer, validation: TokenFile, tokenizer: Tokenizer, config: Config, device: torch.device,
             precision: Callable[[], Any], limit: int = 0, ranks: Ranks = ALONE) -> dict[str, float]:
    """A pass over fixed windows of the validation split: all of them, the incomplete last included, or `limit`.

    Each rank takes its share of them, and all get the whole result.

    Returns val_loss (nats per token), perplexity, bits_per_byte (of the text: the separators' bits count, but they
    have no bytes), article_loss (nats per token whose truth is an article), other_loss, val_tokens.
    """
    seq_len, batch_size = config.model.max_seq_len, config.training.batch_size
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


def evaluate_checkpoint(config: Config, checkpoint_path: Path) -> None:
    """Print a checkpoint's validation loss, on all of the validation split, and its sample stories."""
    device, checkpoint = choose_device(config.hardware.device), load_checkpoint(checkpoint_path)
    model = model_from_checkpoint(checkpoint, checkpoint_path, device)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(checkpoint_path))
    validation = prepare_tokens(config.data, tokenizer, "validation", config.training.show_progress)
    precision, _ = choose_precision(device, config.training.use_bf16)
    result = evaluate(model, validation, tokenizer, config, device, precision)
    print(f"{checkpoint_path}: step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}: "
          f"{describe_evaluation(result)}")
    for story in sample_stories(model, tokenizer, config):
        print("\n" + story)


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation loss and sample stories of a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file (default: the newest under checkpoints/)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the checkpoint's config; may be given many times")
    args = parser.parse_args()
    path = args.checkpoint or newest_checkpoint()
    evaluate_checkpoint(config_from_dict(load_checkpoint(path)["config"], str(path), args.overrides), path)


if __name__ == "__main__":
    run_script(main)
