"""Tokens in, tokens out: many prompts are continued at once, with a key/value cache; each token is drawn as asked.

generate.py puts text around it. The parts: choosing a token; the model's weights laid out for generating; the engine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.schema import SamplingConfig
from model import Attention, KVCache, Transformer, apply_rope

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


# Computing fast: the same model with its weights laid out anew

class PackedLinear(nn.Module):
    """Linear layers of one input, side by side, in float32, bf16 or int8; float32 in and out, (..., features).

    On the CPU float32 and bf16 weights are laid out once for oneDNN, as torch.compile's freezing does. int8: weights in
    255 steps with a scale for each output, products in bf16.
    """

    def __init__(self, linears: Sequence[nn.Linear], compute: str) -> None:
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (outputs of all, inputs)
        self.dtype = torch.float32 if compute == "float32" else torch.bfloat16
        self.outputs, self.weight, self.multiply = weight.shape[0], weight.to(self.dtype), F.linear
        if compute == "int8":
            scales = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (outputs of all,)
            self.weight, self.scales = (weight / scales[:, None]).round().to(torch.int8), scales.to(self.dtype)
            self.weight = F.pad(self.weight, (0, -weight.shape[1] % 64))  # the kernel works on whole blocks only
            self.multiply = self.multiply_int8
        elif weight.device.type == "cpu" and can_prepack():
            self.weight, self.multiply = prepack(self.weight), multiply_prepacked

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x.to(self.dtype).flatten(0, -2), self.weight)  # (all rows, outputs of all)
        return out.float().view(*x.shape[:-1], self.outputs)

    def multiply_int8(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(F.pad(x, (0, weight.shape[1] - x.shape[1])), weight, self.scales)


def prepack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # 32 rows: its layout was the best for 1 to 128


def multiply_prepacked(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def can_prepack() -> bool:
    """Whether this torch has the oneDNN operators that torch.compile uses, tried out: they are not public."""
    try:
        x, weight = torch.eye(4), torch.arange(16.0).view(4, 4)
        return torch.equal(multiply_prepacked(x, prepack(weight)), weight.T)
    except (AttributeError, RuntimeError):
        return False


class PackedAttention(Attention):
    """Attention with one product for queries, keys and values, and one rotation."""

    def __init__(self, attention: Attention, compute: str) -> None:
        nn.Module.__init__(self)
        self.config, self.layer = attention.config, attention.layer
        self.wqkv = PackedLinear([attention.wq, attention.wk, attention.wv], compute)
        self.wo = PackedLinear([attention.wo], compute)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, shared = self.config.n_heads, self.config.kv_heads
        states = self.wqkv(x).view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)
        rotated, values = states.split([heads + shared, shared], dim=1)  # (batch, heads, seq_len, head_dim)
        queries, keys = apply_rope(rotated, cos, sin).split([heads, shared], dim=1)
        return queries, keys, values


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
            seen = seen.to(device)
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
            seen = seen[order] if seen is not None else None
            full = [row for row, length in enumerate(cache.lengths) if length == config.max_seq_len]
            for row in full:
                running[row].window = running[row].window[-(config.max_seq_len // 2):]
            prefill(model, cache, [running[row] for row in full], full)


def draw(model: Transformer, cache: KVCache, tokens: Tensor, luck: Tensor, num_tokens: int, sampling: SamplingConfig,
         seen: Tensor | None) -> tuple[list[list[int]], list[list[float]]]:
    """As many tokens for each row as luck, (rows, steps), has columns, and their log-probabilities at temperature 1.

    tokens: int64, (rows, 1), what comes before. The device is waited for once, at the end.
    """
    tokens, luck = (x.to(model.tok_embeddings.weight.device, non_blocking=True) for x in (tokens, luck))
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
    for mine, theirs in zip(cache.layers, source.layers, strict=True):
        for cached, other in zip(mine, theirs, strict=True):
            cached[rows, :, :source.length] = other[source_rows, :, :source.length]
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
            model.residual_stream(torch.tensor(some, device=cache.device), filled)
            pairs = [(row, source) for source, window in enumerate(some) for row in rows_of[window]]
            copy_rows(cache, [row for row, _ in pairs], filled, [source for _, source in pairs])
