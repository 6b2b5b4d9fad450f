"""A Llama-2 style transformer (Touvron et al., 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The parameter names are Meta's (tok_embeddings, layers.N.attention.wq, feed_forward.w1, ...), which converters know.
The model never shifts its targets: targets[t] is the token to predict at position t (data/batches.py shifts them).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from config.schema import ModelConfig
from device import send

SEPARATOR = 0  # the id of <|endoftext|>, which precedes every story (the first special token of data/tokenizer.py)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (Su et al., 2021, eq. 34), float32, each (max_seq_len, rotary_dim), for
    apply_rope(): the sines of the first half have a minus.

    The angle of pair i of the rotated dimensions is position * rope_base ** (-2 i / rotary_dim) radians. It is computed
    in float64, since the largest angle is max_seq_len radians, of which float32 would keep few decimals.
    """
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64)
    frequencies = config.rope_base ** (-pairs / max(1, config.rotary_dim))  # (rotary_dim / 2,)
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().float(), angles.sin().float()  # (max_seq_len, rotary_dim / 2)
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of each head and pass the rest through.

    x: (batch, seq_len, heads, head_dim). cos, sin: (seq_len, 1, rotary_dim), or (batch, seq_len, 1, rotary_dim) if each
    row has its own positions; see rope_tables(). Dimension i is paired with i + rotary_dim / 2, as in transformers;
    Meta's own code pairs neighbouring dimensions.
    """
    rotary_dim = cos.shape[-1]
    rotated, rest = x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    partners = rotated.roll(rotary_dim // 2, dims=-1)  # each dimension's partner in its pair
    return torch.cat([rotated * cos + partners * sin, rest], dim=-1).type_as(x)


class KVCache:
    """Keys and values of the tokens so far, so that the next token needs only itself. Filled by Transformer.forward.

    Slot i of a row holds token i of that row. layers: for each layer a key and a value tensor, (max_rows, n_kv_heads,
    max_len, head_dim). lengths: the number of tokens in each row in use, kept on the CPU; later rows are free.
    """

    def __init__(self, config: ModelConfig, max_rows: int, max_len: int, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> None:
        shape = (max_rows, config.kv_heads, max_len, config.head_dim)
        self.layers = [(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
                       for _ in range(config.n_layers)]
        self.device, self.lengths = device, [0] * max_rows

    @property
    def length(self) -> int:
        return max(self.lengths, default=0)

    def positions(self, seq_len: int) -> tuple[slice | Tensor, Tensor | None]:
        """The slots of each row's next tokens, and the mask for plain_attention(), or None if none is needed.

        Slots: one slice if they are the same in all rows, else int64, (rows, seq_len).
        """
        end = self.length + seq_len
        if min(self.lengths) == self.length:
            return slice(self.length, end), None  # the fast case: no scatter, no mask
        starts = send(torch.tensor(self.lengths), self.device)
        positions = starts[:, None] + torch.arange(seq_len, device=self.device)  # (rows, seq_len)
        return positions, cache_mask(positions, end)

    def append(self, layer: int, positions: slice | Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values, (rows, n_kv_heads, seq_len, head_dim), at `positions`; return all filled slots."""
        rows, end = len(self.lengths), self.length + keys.shape[2]
        for cached, new in zip(self.layers[layer], (keys, values), strict=True):
            if isinstance(positions, slice):
                cached[:rows, :, positions] = new
            else:
                cached[:rows].scatter_(2, positions[:, None, :, None].expand_as(new), new.type_as(cached))
        keys, values = self.layers[layer]
        return keys[:rows, :, :end], values[:rows, :, :end]

    def advance(self, seq_len: int) -> None:
        """Count the tokens that were appended in all layers."""
        self.lengths = [length + seq_len for length in self.lengths]


def cache_mask(positions: Tensor, slots: int) -> Tensor:
    """The additive mask, 0 or -inf, (rows, 1, seq_len, slots), that hides the slots after each row's `positions`."""
    hidden = torch.arange(slots, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(hidden.shape, device=positions.device).masked_fill(hidden, -math.inf)


def multiply(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply several linear layers to one input as a single product, which is faster. Returns their outputs,
    concatenated: (batch, seq_len, outputs of all).

    On a GPU the weights are transposed first, since cuBLAS then computes the gradients of weights with more outputs
    than inputs 1.4 times as fast (H200).
    """
    weight = torch.cat([layer.weight for layer in layers])  # (outputs of all, inputs)
    return x @ weight.t().contiguous() if x.is_cuda else F.linear(x, weight)


class Attention(nn.Module):
    """Causal self-attention; with n_kv_heads < n_heads, grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        kv_dim = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.d_model, config.d_model, bias=False)
        self.wk = nn.Linear(config.d_model, kv_dim, bias=False)
        self.wv = nn.Linear(config.d_model, kv_dim, bias=False)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=False)

    def multiply_qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads, (batch, seq_len, d_model + 2 kv_dim)."""
        return multiply(x, self.wq, self.wk, self.wv)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, (batch, n_heads, seq_len, head_dim); rotated keys and values, n_kv_heads of them."""
        heads, kv_heads = self.config.n_heads, self.config.kv_heads
        # (batch, seq_len, n_heads + 2 n_kv_heads, head_dim)
        states = self.multiply_qkv(x).view(*x.shape[:2], -1, self.config.head_dim)
        rotated, values = states.split([heads + kv_heads, kv_heads], dim=2)
        queries, keys = apply_rope(rotated, cos, sin).split([heads, kv_heads], dim=2)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)  # no copy on a GPU

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                positions: slice | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        queries, keys, values = self.project(x, cos, sin)
        if cache is not None:
            keys, values = cache.append(self.layer, positions, keys, values)  # (batch, n_kv_heads, all_len, head_dim)
        fused = cache is None or x.shape[1] == 1  # with a cache, queries are the last of all_len
        attend = flash_attention if fused and self.config.use_flash_attention else plain_attention
        out = attend(queries, keys, values, mask)  # (batch, n_heads, seq_len, head_dim)
        return self.wo(out.transpose(1, 2).reshape(x.shape))  # (batch, seq_len, d_model)


def story_mask(tokens: Tensor) -> Tensor:
    """The additive mask of attention scores that lets a position see only earlier positions of its own story.

    Returns float32, (batch, 1, seq_len, seq_len), 0 or -inf. The tokens before a sequence's first SEPARATOR are the
    rest of a story.
    """
    story = (tokens == SEPARATOR).cumsum(dim=1)  # (batch, seq_len)
    seen = (story[:, None, :, None] == story[:, None, None, :]).tril()
    return torch.zeros(seen.shape, device=tokens.device).masked_fill(~seen, -math.inf)


def flash_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention by torch's fused kernels; with a mask (see story_mask()), masked attention.

    queries: (batch, n_heads, seq_len, head_dim); keys, values: (batch, n_kv_heads, seq_len, head_dim), or, for a single
    query, which is the last token, any number of them. On a CPU those kernels are fast only for such a query; else each
    block of queries is multiplied with the keys up to the block's end.
    """
    mask = mask.type_as(keys) if mask is not None else None
    if queries.shape[2] == 1:  # the heads of a group become queries of their one key/value head
        grouped = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[3]).type_as(keys)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(queries.shape)
    if queries.device.type == "cpu":
        block = 128  # queries; about as fast with 32 or 64
        ends = range(block, queries.shape[2] + block, block)
        return torch.cat([plain_attention(rows, keys[:, :, :end], values[:, :, :end],
                                          mask[:, :, end - block:end, :end] if mask is not None else None)
                          for rows, end in zip(queries.split(block, dim=2), ends, strict=True)], dim=2)
    group = queries.shape[1] // keys.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=group > 1)
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))  # no kernel has both
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same written out: softmax(Q K^T / sqrt(head_dim) + mask) V (Vaswani et al., 2017, eq. 1).

    keys, values: (batch, n_kv_heads, all_len, head_dim); the queries are the last of all_len, unless a mask, (batch or
    1, 1, seq_len, all_len), 0 or -inf, says what each query sees.
    """
    batch, heads, seq_len, head_dim = queries.shape
    # the heads of a group become queries of their one key/value head: (batch, n_kv_heads, group * seq_len, head_dim)
    grouped = (queries / math.sqrt(head_dim)).reshape(batch, keys.shape[1], -1, head_dim).type_as(keys)
    scores = grouped @ keys.transpose(2, 3)  # (batch, n_kv_heads, group * seq_len, all_len)
    if mask is None:
        causal = torch.full((seq_len, keys.shape[2]), -math.inf, device=keys.device)
        mask = causal.triu(keys.shape[2] - seq_len + 1)
    scores = (scores.reshape(batch, heads, seq_len, -1) + mask.type_as(scores)).view(scores.shape)
    attention_weights = scores.softmax(dim=-1).type_as(values)
    return (attention_weights @ values).view(queries.shape).type_as(queries)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.w2 = nn.Linear(config.d_ffn, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(multiply(x, self.w1)) * multiply(x, self.w3))


class TransformerBlock(nn.Module):
    """Attention and feed-forward: each reads the normalized residual stream and adds its output to the stream."""

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
    """The whole model; see forward()."""

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
        self.register_buffer("rope_cos", cos, persistent=False)  # (max_seq_len, rotary_dim)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize from normal distributions whose std follows the width, since a fixed 0.02 suits only one width.

        A projection keeps the variance of its input: std 1 / sqrt(fan_in). The two projections of a layer that write
        into the residual stream, wo and w2, are smaller by sqrt(2 n_layers), so that the stream's variance does not
        grow with depth (GPT-2). The output matrix gives the first logits a variance of 1/2, so the first loss is
        ln(vocab_size) + 1/4. An untied embedding has std 1, so that tokens stand out from what the layers add.
        """
        nn.init.normal_(self.tok_embeddings.weight)
        nn.init.normal_(self.output.weight, std=(2 * self.config.d_model) ** -0.5)  # if tied, the embedding too
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the last layer, before the final norm, (batch, seq_len, d_model); see forward()."""
        start, seq_len = (cache.length if cache is not None else 0), tokens.shape[1]
        if start + seq_len > self.config.max_seq_len:
            raise ValueError(f"{start + seq_len} tokens, but the model's context is {self.config.max_seq_len}")
        positions, mask = cache.positions(seq_len) if cache is not None else (slice(seq_len), None)
        if self.config.mask_stories and cache is None:  # a row of a cache holds one story
            mask = story_mask(tokens)  # (batch, 1, seq_len, seq_len)
        # (seq_len, 1, rotary_dim), or (batch, seq_len, 1, rotary_dim)
        cos, sin = self.rope_cos[positions].unsqueeze(-2), self.rope_sin[positions].unsqueeze(-2)
        x = self.dropout(self.tok_embeddings(tokens))  # (batch, seq_len, d_model)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = recompute_in_backward(layer, x, cos, sin, mask=mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, positions, mask)
        if cache is not None:
            cache.advance(seq_len)
        return x

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                reduction: str = "mean") -> Tensor:
        """Logits, or with targets the loss.

        tokens: int64, (batch, seq_len); seq_len plus the tokens in the cache is at most max_seq_len.
        targets: int64, (batch, seq_len); the token that follows each position, or -100 to ignore the position.
        Without targets: logits, (batch, seq_len, vocab_size), of float32 or the autocast dtype. With targets: loss
        (cross-entropy) in nats, float32, the mean over the targets not ignored; with reduction="none" one per target,
        (batch, seq_len), 0 where ignored. A cache is extended by the tokens.
        """
        logits = self.output(self.norm(self.hidden_states(tokens, cache)))  # (batch, seq_len, vocab_size)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view(targets.shape)


# Counts

def count_parameters(model: Transformer) -> int:
    """Number of trainable parameters; a tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: Transformer) -> int:
    """Floating-point operations to train on one token, forward and backward: 6 N plus causal attention.

    N counts the parameters that are multiplied, so not an untied embedding. Attention adds 6 n_layers d_model
    max_seq_len: half of the 12 of the full square (PaLM, appendix B), since the mask is causal.
    """
    config = model.config
    multiplied = count_parameters(model) - (0 if config.tie_embeddings else model.tok_embeddings.weight.numel())
    return 6 * multiplied + 6 * config.n_layers * config.d_model * config.max_seq_len
