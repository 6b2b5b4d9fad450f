"""Choosing the next token: repetition penalty, temperature, top-k, top-p, min-p. Each row has its own settings."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from config.schema import SamplingConfig

NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}  # values that change nothing
TOP_CANDIDATES = 32  # on a CPU, only so many of the most likely tokens are sorted, unless a row needs more
TRIALS = 64  # comparisons in a pass of threshold(), of all rows: fewer rows then need fewer passes, so fewer kernels


def settings_tensor(rows: Sequence[SamplingConfig]) -> Tensor:
    """The settings of each row in the order of NEUTRAL, float32, (rows, 5)."""
    return torch.tensor([[getattr(row, name) for name in NEUTRAL] for row in rows], dtype=torch.float32)


def settings_in_use(rows: Sequence[SamplingConfig]) -> frozenset[str]:
    """The settings that change something in at least one row. Temperature 0 counts as "greedy", others as "sampled"."""
    used = {name for row in rows for name, neutral in NEUTRAL.items() if getattr(row, name) != neutral}
    return frozenset(used | {"sampled" if row.temperature else "greedy" for row in rows})


def sample_next(logits: Tensor, uniforms: Tensor, settings: Tensor, used: frozenset[str], seen: Tensor | None = None,
                ) -> Tensor:
    """Sample one token for each row, int64, (rows,).

    logits: (rows, vocab_size). uniforms: float32, (rows,), draws from U(0, 1) that select a token by inverse transform
    sampling in the order of token ids. settings, used: see above. seen: bool, (rows, vocab_size), the tokens that
    repetition_penalty acts on. The order of operations is that of transformers: repetition_penalty, temperature (0: the
    most likely token), top_k, top_p, min_p. Equally likely tokens are kept or dropped together, so that the result does
    not depend on how a sort breaks ties. Never synchronizes with a GPU.
    """
    logits, (temperature, *limits, penalty) = logits.float(), settings.split(1, dim=1)  # (rows, 1) each
    if "repetition_penalty" in used:
        logits = torch.where(seen, apply_repetition_penalty(logits, penalty), logits)
    if "sampled" not in used:
        return logits.argmax(dim=-1)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.clamp(min=1e-6)  # the most likely token has 0
    if used.isdisjoint(("top_k", "top_p", "min_p")):
        sampled = sample_index(scaled.exp(), uniforms)
    elif logits.device.type == "cpu":
        sampled = sample_from_top(scaled, uniforms, limits, TOP_CANDIDATES)
    else:  # checking whether the candidates suffice would wait for the device, and sorting all tokens is slow
        kept = scaled >= lowest_kept(scaled, limits, used)
        sampled = sample_index(scaled.exp() * kept, uniforms)
    return torch.where(temperature[:, 0] == 0, logits.argmax(dim=-1), sampled) if "greedy" in used else sampled


def sample_index(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling: the index in each row of weights, (rows, n), that its uniform draw selects, int64,
    (rows,)."""
    cumulative = weights.cumsum(dim=-1)
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).int().argmax(dim=-1)  # the first index above the draw


def apply_repetition_penalty(logits: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens less likely by a factor on their logit (Keskar et al., 2019), whatever its sign."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


# top_k keeps the k most likely tokens; top_p, of these, the fewest whose probabilities sum to at least top_p (Holtzman
# et al., 2020); min_p the tokens with at least that fraction of the highest probability (Nguyen et al., 2024). There
# are two ways to find the same tokens. Both take logits, (rows, vocab_size), at most 0, divided by the temperature, and
# limits: top_k, top_p and min_p, float32, (rows, 1) each.

def sample_from_top(logits: Tensor, uniforms: Tensor, limits: Sequence[Tensor], count: int) -> Tensor:
    """Sample a token for each row, int64, (rows,), from the `count` most likely ones; rows that need more get more."""
    top_k, top_p, min_p = limits
    count = min(max(count, int(top_k.max()) + 1), logits.shape[1])
    values, tokens = logits.topk(count)  # (rows, count), the most likely first
    last = values.gather(1, (top_k.long() - 1).clamp(0, count - 1))  # the value of the k-th token
    kept = (values >= last) | (top_k == 0)
    weights = values.exp() * kept
    total = torch.where(top_k > 0, weights.sum(dim=-1, keepdim=True), logits.exp().sum(dim=-1, keepdim=True))
    before = (weights.cumsum(dim=-1) - weights) / total  # the probability of all tokens that are more likely
    dropped = (before >= top_p) & (top_p < 1)
    kept &= (values >= values.masked_fill(dropped, math.inf).amin(dim=-1, keepdim=True)) & (values >= min_p.log())
    tokens, order = tokens.sort(dim=-1)
    chosen = sample_index((values.exp() * kept).gather(1, order), uniforms)  # in the order of token ids
    sampled = tokens.gather(1, chosen[:, None]).squeeze(1)
    if count < logits.shape[1]:
        rest = kept[:, -1].nonzero().squeeze(1)  # rows whose last candidate is kept: there may be more to keep
        if len(rest):
            sampled[rest] = sample_from_top(logits[rest], uniforms[rest], [x[rest] for x in limits], 8 * count)
    return sampled


def lowest_kept(logits: Tensor, limits: Sequence[Tensor], used: frozenset[str]) -> Tensor:
    """The value of the least likely token that is kept in each row, float32, (rows, 1)."""
    top_k, top_p, min_p = limits
    lowest, weights = min_p.log(), logits.exp()
    if "top_k" in used:
        of_k = torch.where(top_k > 0, threshold(logits, torch.ones_like(logits), top_k), -math.inf)
        lowest, weights = torch.maximum(lowest, of_k), weights * (logits >= of_k)
    if "top_p" in used:
        of_p = threshold(logits, weights, top_p * weights.sum(dim=-1, keepdim=True))
        lowest = torch.maximum(lowest, torch.where(top_p < 1, of_p, -math.inf))
    return lowest


def threshold(logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The highest value in each row for which all tokens at or above it weigh at least `target`, float32, (rows, 1).

    weights: (rows, vocab_size). target: (rows, 1); if all tokens weigh less, the least likely one's value is returned.
    Instead of sorting, this finds the value bit by bit, since floats of one sign are ordered like their bits.
    """
    target = torch.minimum(target, (1 - 1e-6) * weights.sum(dim=-1, keepdim=True))  # less, as sums are rounded
    keys = (0 - logits).view(torch.int32)  # the more likely, the smaller; 0 minus, since the bits of -0.0 are negative
    bits = max(1, (TRIALS // len(logits)).bit_length() - 1)  # found in a pass
    bound, steps = torch.zeros_like(keys[:, :1]), torch.arange(1, 2**bits, device=keys.device, dtype=torch.int32)
    for shift in (*range(31 - bits, 0, -bits), 0):
        trials = bound.add(steps, alpha=1 << shift)  # (rows, 2**bits - 1)
        below = torch.where(keys[:, None] < trials[:, :, None], weights[:, None], 0).sum(dim=-1)  # as trials
        bound = bound.add(torch.searchsorted(below, target, out_int32=True), alpha=1 << shift)  # how many are < target
    return -bound.view(torch.float32)
