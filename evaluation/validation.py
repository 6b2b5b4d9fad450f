"""The validation pass: loss, perplexity and bits per byte over fixed sequences of the validation split."""

import math
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from config import Config
from data.batches import IGNORED, read_batch, validation_sequences
from data.token_files import TokenFile, has_english
from data.tokenizer import article_mask, token_byte_lengths
from model import Transformer
from training.distributed import SINGLE_PROCESS, DistributedContext


@torch.no_grad()
def evaluate(model: Transformer, validation: TokenFile, tokenizer: Tokenizer, config: Config, device: torch.device,
             precision: Callable[[], Any], limit: int = 0, distributed: DistributedContext = SINGLE_PROCESS,
             ) -> dict[str, float]:
    """A pass over fixed sequences of the validation split: all, with the incomplete last one, or `limit` of them.

    Each process evaluates its part of the sequences, and all return the whole result: val_loss (nats per token),
    perplexity, bits_per_byte (of the text: the bits of separators count, but separators have no bytes), val_tokens,
    and of English text article_loss and other_loss (nats per token whose target is an article, or is not).
    """
    seq_len, batch_size = config.model.max_seq_len, config.evaluation_batch
    sequences = validation_sequences(len(validation.tokens), seq_len, limit)[distributed.rank::distributed.world_size]
    byte_lengths = torch.from_numpy(token_byte_lengths(tokenizer)).to(device)  # (tokenizer's size,)
    is_article = torch.from_numpy(article_mask(tokenizer)).to(device)  # (tokenizer's size,)
    sums = [torch.zeros(5, device=device)]
    model.eval()
    for start in tqdm(range(0, len(sequences), batch_size), desc="evaluate", leave=False, unit="batch",
                      disable=None if config.training.show_progress else True):
        inputs, targets = read_batch(validation.tokens, sequences[start:start + batch_size], seq_len, device)
        with precision():
            losses = model(inputs, targets, reduction="none")  # (batch, seq_len), 0 where ignored
        counted = targets != IGNORED
        truth = targets.clamp(min=0)
        articles = is_article[truth] & counted
        sums.append(torch.stack([losses.sum(), counted.sum(), (byte_lengths[truth] * counted).sum(),
                                 (losses * articles).sum(), articles.sum()]))
    model.train()
    total = distributed.sum(torch.stack(sums).cpu().double().sum(dim=0))  # (5,)
    nats, tokens, num_bytes, article_nats, article_tokens = total.tolist()
    loss = nats / tokens
    result = {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0)),
              "bits_per_byte": nats / math.log(2) / max(1.0, num_bytes), "val_tokens": int(tokens)}
    if has_english(validation.counts):
        result |= {"article_loss": article_nats / max(1.0, article_tokens),
                   "other_loss": (nats - article_nats) / max(1.0, tokens - article_tokens)}
    return result


def describe_evaluation(result: dict[str, float]) -> str:
    """The result of evaluate() as one line."""
    articles = ""
    if "article_loss" in result:
        articles = f"; articles {result['article_loss']:.3f}, other tokens {result['other_loss']:.3f}"
    return (f"validation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, "
            f"{result['bits_per_byte']:.4f} bits per byte{articles}")
