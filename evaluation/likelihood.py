"""How likely a model finds a text: nats per token, bits per byte and per character, by position, and of articles.

Each token of a token file but the first, which is a separator, is predicted once, in the sequences of the validation
pass, so each byte of the text counts once.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import IGNORED, read_batch, validation_sequences
from data.tokenizer import END_OF_STORY, article_mask, byte_characters, token_byte_lengths

POSITIONS = (1, 4, 16, 64, 256)  # the last position of each row of the table by position; one more row for the rest


def token_char_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Characters that begin in each token, int64, shape (tokenizer's vocabulary size,).

    A character of several bytes may be spread over tokens. It counts in the token of its first byte, so that the sum
    over a text is the text's length. Continuation bytes are 0x80 to 0xbf, as a byte-level BPE spells them.
    """
    continuation = set(byte_characters()[0x80:0xc0])
    lengths = token_byte_lengths(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if lengths[index]:
            lengths[index] -= sum(character in continuation for character in token)
    return lengths


@torch.no_grad()
def measure_likelihood(model: nn.Module, tokens: np.ndarray, tokenizer: Tokenizer, seq_len: int, batch_size: int,
                       device: torch.device, precision: Callable[[], Any], show_progress: bool = True,
                       ) -> dict[str, Any]:
    """One pass of a model, in eval mode, over the tokens of a token file, (num_tokens,).

    Returns val_loss (nats per token), perplexity, bits_per_byte and bits_per_character (the bits of separators count,
    but separators have no bytes), tokens, bytes, characters; article_loss, other_loss (nats per token), articles (their
    number) and article_accuracy (how often the most likely token is right where the target is an article); next_loss,
    after_next_loss and present_loss (nats per token of the tokens t + 1, t + 2 and t, where there is a t + 2);
    by_position: rows of first and last position in the story (None: to the end), tokens, nats per token, of stories
    that begin within a sequence, so that the model sees all of the story before each token.
    """
    byte_lengths, char_lengths, is_article = (  # each (tokenizer's size,)
        torch.from_numpy(of_token(tokenizer)).to(device)
        for of_token in (token_byte_lengths, token_char_lengths, article_mask))
    separator = tokenizer.token_to_id(END_OF_STORY)
    edges, sequences, sums = torch.tensor(POSITIONS, device=device), validation_sequences(len(tokens), seq_len), []
    for start in tqdm(range(0, len(sequences), batch_size), desc="likelihood", leave=False, unit="batch",
                      disable=None if show_progress else True):
        inputs, targets = read_batch(tokens, sequences[start:start + batch_size], seq_len, device)
        with precision():
            logits = model(inputs)  # (batch, seq_len, vocab_size)
        counted, truth = targets != IGNORED, targets.clamp(min=0)  # (batch, seq_len)
        of_batch = likelihood_sums(logits, inputs, truth, counted, is_article)
        losses, articles = of_batch.pop("losses"), is_article[truth] & counted
        where = position_in_story(inputs, separator)  # (batch, seq_len)
        row = torch.where((where > 0) & counted, torch.bucketize(where, edges), len(POSITIONS) + 1).flatten()
        rows = torch.zeros(2, len(POSITIONS) + 2, device=device)  # the last column: targets in no row
        rows[0].index_add_(0, row, losses.flatten())
        rows[1].index_add_(0, row, torch.ones_like(losses).flatten())
        sums.append(torch.cat([torch.stack([
            losses.sum(), counted.sum(), (byte_lengths[truth] * counted).sum(), (char_lengths[truth] * counted).sum(),
            (losses * articles).sum(), articles.sum(), *of_batch.values()]), rows.flatten()]).cpu().double())
    total = torch.stack(sums).sum(dim=0)
    (nats, count, num_bytes, characters, article_nats, articles, hits, neighbours, following, after, present,
     ) = total[:11].tolist()
    by_position = total[11:].view(2, -1)[:, :-1].T.tolist()  # (rows, 2)
    firsts = [1, *(last + 1 for last in POSITIONS)]
    return {
        "val_loss": nats / count, "perplexity": math.exp(min(nats / count, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1.0, num_bytes),
        "bits_per_character": nats / math.log(2) / max(1.0, characters),
        "tokens": int(count), "bytes": int(num_bytes), "characters": int(characters), "articles": int(articles),
        "article_loss": article_nats / max(1.0, articles), "article_accuracy": hits / max(1.0, articles),
        "other_loss": (nats - article_nats) / max(1.0, count - articles),
        "next_loss": following / max(1.0, neighbours), "after_next_loss": after / max(1.0, neighbours),
        "present_loss": present / max(1.0, neighbours),
        "by_position": [{"first": first, "last": last, "tokens": int(number), "loss": part / number}
                        for first, last, (part, number) in zip(firsts, (*POSITIONS, None), by_position, strict=True)
                        if number]}


def likelihood_sums(logits: Tensor, inputs: Tensor, truth: Tensor, counted: Tensor, is_article: Tensor,
                    ) -> dict[str, Tensor]:
    """The loss of each target, 0 where ignored, (batch, seq_len), and sums, each ().

    logits: (batch, seq_len, vocab_size). inputs, truth: int64; counted: bool, (batch, seq_len). is_article:
    (tokenizer's size,). The sums are hits: articles that are the most likely token; pairs: positions with a t + 2; and
    the nats of t + 1, t + 2 and t at those positions.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1)  # (batch, seq_len)

    def nats(tokens: Tensor) -> Tensor:
        return total[:, :tokens.shape[1]] - logits[:, :tokens.shape[1]].gather(2, tokens[..., None]).squeeze(2)

    losses, pairs = nats(truth) * counted, counted[:, 1:]  # (batch, seq_len), (batch, seq_len - 1)
    articles = is_article[truth] & counted
    hits = (logits[articles].argmax(dim=-1) == truth[articles]).sum()
    return {"losses": losses, "hits": hits, "pairs": pairs.sum(), "next": (losses[:, :-1] * pairs).sum(),
            "after_next": (nats(truth[:, 1:]) * pairs).sum(), "present": (nats(inputs[:, :-1]) * pairs).sum()}


def position_in_story(inputs: Tensor, separator: int) -> Tensor:
    """Position of each target in its story, (batch, seq_len): from 1 on; 0 if the story began before the sequence.

    inputs: int64, (batch, seq_len). The target at t follows the input at t, which may be the separator.
    """
    places = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)  # (batch, seq_len)
    last = torch.where(inputs == separator, places, -1).cummax(dim=1).values
    return torch.where(last >= 0, places - last + 1, 0)


def describe_likelihood(found: dict[str, Any], name: str, english: bool) -> str:
    """The result of measure_likelihood() as text; with its articles if the text is English."""
    positions = ", ".join(f"{row['first']}" + ("" if row["last"] == row["first"] else f"-{row['last'] or ''}")
                          + f": {row['loss']:.3f}" for row in found["by_position"])
    articles = [
        f"  articles ({found['articles']:,}): {found['article_loss']:.3f} nats per token, the most likely token is "
        f"right in {found['article_accuracy']:.1%}; all other tokens: {found['other_loss']:.3f}"]
    return "\n".join([
        f"{name}: {found['tokens']:,} tokens, {found['bytes']:,} bytes, {found['characters']:,} characters",
        f"  {found['val_loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_byte']:.4f} bits per byte, {found['bits_per_character']:.4f} bits per character",
        *(articles if english else []),
        f"  by position in the story: {positions}"])
