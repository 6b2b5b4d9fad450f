"""A Llama-2 style transformer (Touvron et al., 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The names are Meta's (tok_embeddings, layers.N.attention.wq, feed_forward.w1, ...), which converters know. The model
never shifts its targets: targets[t] is what it must predict at position t (data/tokens.py cuts them so). Below it are
its parameter and FLOP counts, and the way back from a checkpoint (data/checkpoints.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from config import UserError, config_from_dict
from config.hardware import send
from config.schema import ModelConfig

FEWEST_SLOTS = 32  # of a cache that attention looks at: the CPU's products group their sums differently below 16
SEPARATOR = 0  # <|endoftext|>, the first of the special tokens of data/tokens.py: a story begins with it


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (Su et al., 2021, eq. 34), float32, each (max_seq_len, rotary_dim / 2).

    Pair i of the rotated dimensions turns by position * rope_base ** (-2 i / rotary_dim) radians. Computed in float64:
    the largest angle is max_seq_len radians, of which float32 would keep few decimals.
    """
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64)
    frequencies = config.rope_base ** (-pairs / max(1, config.rotary_dim))  # (rotary_dim / 2,)
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of each head, pass the rest through.

    x: (batch, seq_len, heads, head_dim); cos, sin: (seq_len, 1, rotary_dim / 2), or with each row's own positions
    (batch, seq_len, 1, rotary_dim / 2). Dimension i is paired with i + rotary_dim / 2 (half-split pairs, as
    transformers has them; Meta's own code pairs neighbours).
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).type_as(x)


class KVCache:
    """Keys and values of the tokens so far, so that the next token needs only itself. Filled by Transformer.forward.

    Slot i of a row holds its token i. layers: for each layer a key and a value tensor, (max_rows, n_kv_heads, max_len,
    head_dim). lengths: the tokens of each row in use, known without asking the device; the rows after them are free.
    """

    def __init__(self, config: ModelConfig, max_rows: int, max_len: int, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> None:
        shape = (max_rows, config.kv_heads, max(max_len, FEWEST_SLOTS), config.head_dim)
        self.layers = [(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
                       for _ in range(config.n_layers)]
        self.device, self.lengths = device, [0] * max_rows

    @property
    def length(self) -> int:
        return max(self.lengths, default=0)

    def positions(self, seq_len: int) -> tuple[slice | Tensor, Tensor | None]:
        """Where each row's next tokens go, and the mask of plain_attention() if it needs one.

        Where: one slice if that is the same for all, else int64, (rows, seq_len).
        """
        end, equal = self.length + seq_len, min(self.lengths) == self.length
        if equal and end >= FEWEST_SLOTS:
            return slice(self.length, end), None  # saves scattering and masks
        starts = send(torch.tensor(self.lengths[:1] if equal else self.lengths), self.device)
        positions = starts[:, None] + torch.arange(seq_len, device=self.device)  # (1 or rows, seq_len)
        slots = torch.arange(max(end, FEWEST_SLOTS), device=self.device)
        hidden = slots > positions[:, None, :, None]  # (1 or rows, 1, seq_len, slots): what comes after, or is unfilled
        mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -math.inf)
        return slice(self.length, end) if equal else positions, mask

    def append(self, layer: int, positions: slice | Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (rows, n_kv_heads, seq_len, head_dim) at `positions`; return the slots that any row has filled.

        At least FEWEST_SLOTS, so that a row's sums are grouped alike whether the rows beside it are longer or not.
        """
        rows, end = len(self.lengths), self.length + keys.shape[2]
        for cached, new in zip(self.layers[layer], (keys, values), strict=True):
            if isinstance(positions, slice):
                cached[:rows, :, positions] = new
            else:
                row = torch.arange(rows, device=self.device)[:, None]  # (rows, 1)
                cached[row, :, positions] = new.transpose(1, 2).type_as(cached)  # (rows, seq_len, n_kv_heads, head_dim)
        keys, values = self.layers[layer]
        return keys[:rows, :, :max(end, FEWEST_SLOTS)], values[:rows, :, :max(end, FEWEST_SLOTS)]


class Attention(nn.Module):
    """Causal self-attention; n_kv_heads < n_heads shares keys and values among heads (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        kv_dim = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.d_model, config.d_model, bias=False)
        self.wk = nn.Linear(config.d_model, kv_dim, bias=False)
        self.wv = nn.Linear(config.d_model, kv_dim, bias=False)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, (batch, n_heads, seq_len, head_dim); rotated keys and values, n_kv_heads of them."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        queries = apply_rope(self.wq(x).view(shape), cos, sin)  # (batch, seq_len, n_heads, head_dim)
        keys = apply_rope(self.wk(x).view(shape), cos, sin)  # (batch, seq_len, n_kv_heads, head_dim)
        values = self.wv(x).view(shape)  # (batch, seq_len, n_kv_heads, head_dim)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)  # a GPU then copies nothing

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                positions: slice | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        queries, keys, values = self.project(x, cos, sin)
        if cache is not None:
            keys, values = cache.append(self.layer, positions, keys, values)  # (batch, n_kv_heads, all_len, head_dim)
        attend = flash_attention if self.config.use_flash_attention and cache is None else plain_attention
        out = attend(queries, keys, values, mask)  # (batch, n_heads, seq_len, head_dim)
        return self.wo(out.transpose(1, 2).reshape(x.shape))  # (batch, seq_len, d_model)


def story_mask(tokens: Tensor) -> Tensor:
    """What is added to the scores of attention so that a position sees itself and what is before it in its own story.

    float32, (batch, 1, seq_len, seq_len), 0 or -inf. What a window holds before its first SEPARATOR is a story's rest.
    """
    story = (tokens == SEPARATOR).cumsum(dim=1)  # (batch, seq_len)
    seen = (story[:, None, :, None] == story[:, None, None, :]).tril()
    return torch.zeros(seen.shape, device=tokens.device).masked_fill(~seen, -math.inf)


def flash_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None,
                    block: int = 128) -> Tensor:
    """Causal attention by torch's fused kernels; with a mask, see story_mask(), what that leaves of it.

    queries: (batch, n_heads, seq_len, head_dim); keys, values: (batch, n_kv_heads, seq_len, head_dim). On the CPU those
    kernels are slow: there each block of queries meets the keys up to its own end by matrix products.
    """
    if queries.device.type == "cpu":
        ends = range(block, queries.shape[2] + block, block)
        return torch.cat([plain_attention(rows, keys[:, :, :end], values[:, :, :end],
                                          mask[:, :, end - block:end, :end] if mask is not None else None)
                          for rows, end in zip(queries.split(block, dim=2), ends, strict=True)], dim=2)
    group = queries.shape[1] // keys.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=group > 1)
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))  # no kernel has both
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask.type_as(queries))


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same written out: softmax(Q K^T / sqrt(head_dim) + mask) V (Vaswani et al., 2017, eq. 1).

    With keys, values of (batch, n_kv_heads, all_len, head_dim) the queries are the last of all_len, or the mask tells
    what each sees: (batch or 1, 1, seq_len, all_len), 0 or -inf. On a CPU this beats the fused kernels if a row has one
    query; its bits then depend neither on the other rows nor, from FEWEST_SLOTS on, on what is masked.
    """
    batch, heads, seq_len, head_dim = queries.shape
    # heads that share keys and values become more queries of one head: (batch, n_kv_heads, group * seq_len, head_dim)
    grouped = (queries / math.sqrt(head_dim)).reshape(batch, keys.shape[1], -1, head_dim).type_as(keys)
    if seq_len == 1:  # on a CPU this order is the faster one then
        scores = (keys @ grouped.transpose(2, 3)).transpose(2, 3)  # (batch, n_kv_heads, group, all_len)
    else:
        scores = grouped @ keys.transpose(2, 3)  # (batch, n_kv_heads, group * seq_len, all_len)
        if mask is None:
            causal = torch.full((seq_len, keys.shape[2]), -math.inf, device=keys.device)
            mask = causal.triu(keys.shape[2] - seq_len + 1)
    if mask is not None:
        scores = (scores.reshape(batch, heads, seq_len, -1) + mask.type_as(scores)).view(scores.shape)
    shares = scores.softmax(dim=-1).type_as(values)
    return (shares @ values).view(queries.shape).type_as(queries)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.w2 = nn.Linear(config.d_ffn, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Two branches, attention and feed-forward, each reading the normed residual stream and writing into it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                positions: slice | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache, positions, mask))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))  # (batch, seq_len, d_model)


class Transformer(nn.Module):
    """The whole model; see forward(). `config` is the ModelConfig it was built from."""

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)  # (max_seq_len, rotary_dim / 2)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal, with a std that follows the width: a fixed 0.02 suits one width and holds back narrow models.

        A projection keeps its input's variance: 1 / sqrt(fan_in). The two of a layer that write into the residual
        stream, wo and w2, start smaller by sqrt(2 n_layers), so that depth does not raise its variance (GPT-2). The
        output matrix gives the first logits a variance of 1/2: a first loss of ln(vocab_size) + 1/4. An embedding that
        is not tied to it is free of that and starts at 1, so that tokens stand out from what the layers add to them.
        """
        nn.init.normal_(self.tok_embeddings.weight)
        nn.init.normal_(self.output.weight, std=(2 * self.config.d_model) ** -0.5)  # if tied, the embedding too
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def residual_stream(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the layers make of the tokens, (batch, seq_len, d_model), before the last norm; see forward()."""
        start, seq_len = (cache.length if cache is not None else 0), tokens.shape[1]
        if start + seq_len > self.config.max_seq_len:
            raise ValueError(f"{start + seq_len} tokens, but the model's context is {self.config.max_seq_len}")
        positions, mask = cache.positions(seq_len) if cache is not None else (slice(seq_len), None)
        if self.config.mask_stories and cache is None:  # a cache never holds two stories
            mask = story_mask(tokens)  # (batch, 1, seq_len, seq_len)
        # (seq_len, 1, rotary_dim / 2), or (batch, seq_len, 1, rotary_dim / 2)
        cos, sin = self.rope_cos[positions].unsqueeze(-2), self.rope_sin[positions].unsqueeze(-2)
        x = self.dropout(self.tok_embeddings(tokens))  # (batch, seq_len, d_model)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = recompute_in_backward(layer, x, cos, sin, mask=mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, positions, mask)
        if cache is not None:
            cache.lengths = [length + seq_len for length in cache.lengths]
        return x

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                reduction: str = "mean") -> Tensor:
        """Logits, or with targets the loss.

        tokens: int64, (batch, seq_len), seq_len at most max_seq_len (with a cache: what is in it included).
        targets: int64, (batch, seq_len); the token that follows each position, or -100 where none counts.
        Without targets: logits (batch, seq_len, vocab_size), of float32 or the autocast dtype. With targets:
        cross-entropy in nats, float32: the mean over the counted targets, or with reduction="none" one per target,
        (batch, seq_len), 0 where none counts. A cache is filled with the tokens and grows by seq_len.
        """
        logits = self.output(self.norm(self.residual_stream(tokens, cache)))  # (batch, seq_len, vocab_size)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view(targets.shape)


# Counts

def count_parameters(model: Transformer) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: Transformer) -> int:
    """Floating-point operations to train on one token: forward and backward, 6 N plus causal attention.

    N counts the parameters that are multiplied: an untied embedding is only looked up. Attention adds
    6 n_layers d_model max_seq_len: half of the full square's 12 (PaLM, appendix B), as the causal mask leaves it.
    """
    config = model.config
    multiplied = count_parameters(model) - (0 if config.tie_embeddings else model.tok_embeddings.weight.numel())
    return 6 * multiplied + 6 * config.n_layers * config.d_model * config.max_seq_len


# When numbers go wrong

@contextlib.contextmanager
def find_non_finite(model: Transformer) -> Iterator[list[str]]:
    """Watch forward and backward passes: the list fills with what was not finite, in the order of computation."""
    faults: list[str] = []

    def check(tensor: Tensor, what: str) -> None:
        if not tensor.isfinite().all():
            faults.append(what)

    def look(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        check(output, f"the output of {name}")
        if output.requires_grad:
            output.register_hook(functools.partial(check, what=f"the gradient of {name}'s output"))

    with contextlib.ExitStack() as hooks:  # at its end it removes them
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                hooks.enter_context(module.register_forward_hook(functools.partial(look, name)))
        for name, parameter in model.named_parameters():
            check(parameter, f"the weights {name}")
            hooks.enter_context(parameter.register_hook(functools.partial(check, what=f"the gradient of {name}")))
        yield faults


# From a checkpoint

def model_from_checkpoint(checkpoint: dict[str, Any], source: str | Path, device: torch.device | str) -> Transformer:
    """Build the model that a checkpoint describes and give it its weights; in eval mode. Raises UserError."""
    model = Transformer(config_from_dict(checkpoint["config"], str(source)).model)
    load_weights(model, checkpoint, source)
    return model.to(device).eval()


def load_weights(model: Transformer, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape. Raises UserError if the shapes differ."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        why = str(error).splitlines()[:2][-1].strip()
        raise UserError(f"{source}: its weights do not fit the model of the config: {why}") from None
