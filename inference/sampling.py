"""Choosing the next token: repetition penalty, temperature, top-k, top-p, min-p."""

import math

import torch
from torch import Tensor

from config.schema import SamplingConfig

TOP_CANDIDATES = 64  # on a CPU, only so many of the most likely tokens are sorted, unless a row needs more


def sample_next(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Sample one token for each row, int64, (batch,).

    logits: (batch, vocab_size). uniforms: float32, (batch,), draws from U(0, 1) that select a token by inverse
    transform sampling in the order of token ids. seen: bool, (batch, vocab_size), the tokens that repetition_penalty
    acts on. The order of operations is that of transformers: repetition_penalty, temperature (0: the most likely
    token), top_k, top_p, min_p. Equally likely tokens are kept or dropped together, so that the result does not depend
    on how a sort breaks ties.
    """
    logits = logits.float()
    if seen is not None:
        logits = torch.where(seen, apply_repetition_penalty(logits, sampling.repetition_penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature  # the most likely token has 0
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return sample_index(logits.exp(), uniforms)
    on_cpu = logits.device.type == "cpu"  # on a GPU, checking whether the candidates suffice would wait for the device
    return sample_from_top(logits, uniforms, sampling, TOP_CANDIDATES if on_cpu else logits.shape[1])


def sample_index(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling: the index in each row of weights, (batch, n), that its uniform draw selects, int64,
    (batch,)."""
    cumulative = weights.cumsum(dim=-1)
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).int().argmax(dim=-1)  # the first index above the draw


def apply_repetition_penalty(logits: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely by a factor on their logit (Keskar et al., 2019), whatever its sign."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def sample_from_top(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig, count: int) -> Tensor:
    """Sample one token for each row, int64, (batch,), from the `count` most likely ones; rows that need more get more.

    logits: (batch, vocab_size), at most 0, divided by the temperature. top_k keeps the k most likely tokens; top_p, of
    these, the fewest whose probabilities sum to at least top_p (Holtzman et al., 2020); min_p the tokens with at least
    that fraction of the highest probability (Nguyen et al., 2024).
    """
    count, top_k = min(max(count, sampling.top_k + 1), logits.shape[1]), min(sampling.top_k, logits.shape[1])
    values, tokens = logits.topk(count)  # (batch, count), the most likely first
    kept = values >= (values[:, top_k - 1:top_k] if top_k else -math.inf)
    if sampling.top_p < 1:
        weights = values.exp() * kept
        total = weights.sum(dim=-1, keepdim=True) if top_k else logits.exp().sum(dim=-1, keepdim=True)
        before = (weights.cumsum(dim=-1) - weights) / total  # the probability of all tokens that are more likely
        kept &= values >= values.masked_fill(before >= sampling.top_p, math.inf).amin(dim=-1, keepdim=True)
    if sampling.min_p:
        kept &= values >= math.log(sampling.min_p)
    tokens, order = tokens.sort(dim=-1)
    chosen = sample_index((values.exp() * kept).gather(1, order), uniforms)  # in the order of token ids
    sampled = tokens.gather(1, chosen[:, None]).squeeze(1)
    if count < logits.shape[1]:
        rest = kept[:, -1].nonzero().squeeze(1)  # rows whose last candidate is kept: there may be more to keep
        if len(rest):
            sampled[rest] = sample_from_top(logits[rest], uniforms[rest], sampling, 8 * count)
    return sampled
