"""The model with its weights laid out for generation: products of one input joined, in float32, bf16 or int8."""

import contextlib
import copy
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from device import choose_precision, speedup
from model import Attention, FeedForward, Transformer

MANY_ROWS = 5  # with this many stories or more at once, int8 does not pay on every CPU


def choose_compute(compute: str, device: torch.device, rows: int = MANY_ROWS) -> tuple[str, str]:
    """float32, bf16 or int8, and the reason. auto depends on the device and on the number of stories.

    On a CPU, a few stories are faster in int8, which has fewer bytes to read for each token.
    """
    if compute == "int8" and device.type != "cpu":
        raise UserError(f"--compute int8: only on the cpu, not on {device.type}; use bf16")
    if compute != "auto":
        return compute, ""
    if device.type == "cpu" and rows < MANY_ROWS and has_fast_int8():
        return "int8", ""
    precision, why = choose_precision(device, True)
    return ("float32", why.removeprefix("float32")) if precision is contextlib.nullcontext else ("bf16", "")


def has_fast_int8() -> bool:
    """Measure whether int8 weights pay here, compared with float32 ones, for one row.

    The test matrix fits the CPU's cache, so int8 may take up to 1.4 times as long: a model's weights come from memory,
    where fewer bytes win.
    """
    linear, row = nn.Linear(512, 2048, bias=False), torch.ones(1, 512)
    real, small = PackedLinear("float32"), PackedLinear("int8")
    try:
        real.load([linear])
        small.load([linear])
        with torch.inference_mode():
            return speedup(lambda: real(row), lambda: small(row)) > 0.7
    except (AttributeError, RuntimeError):  # this torch has none
        return False


def pack(model: Transformer, compute: str) -> Transformer:
    """A model for generation, in eval mode, with copies of the matrices. compute: float32, bf16 or int8.

    It shares embedding, norms and device with `model`; see refresh().
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)  # copies the modules, not the tensors
    for layer in packed.layers:
        layer.attention = PackedAttention(layer.attention, compute)
        layer.feed_forward = PackedFeedForward(compute)
    packed.output = PackedLinear(compute)
    refresh(packed, model)
    return packed.eval()


def refresh(packed: Transformer, model: Transformer) -> None:
    """Copy the model's present weights into its packed form; on a GPU in place, where a CUDA graph reads them."""
    for own, layer in zip(packed.layers, model.layers, strict=True):
        own.attention.load(layer.attention)
        own.feed_forward.load(layer.feed_forward)
    packed.output.load([model.output])


class PackedAttention(Attention):
    """Attention of packed matrices."""

    def __init__(self, attention: Attention, compute: str) -> None:
        nn.Module.__init__(self)
        self.config, self.layer = attention.config, attention.layer
        self.wqkv, self.wo = PackedLinear(compute), PackedLinear(compute)

    def load(self, attention: Attention) -> None:
        self.wqkv.load([attention.wq, attention.wk, attention.wv])
        self.wo.load([attention.wo])

    def multiply_qkv(self, x: Tensor) -> Tensor:
        return self.wqkv(x)


class PackedFeedForward(nn.Module):
    """FeedForward with one product for w1 and w3."""

    def __init__(self, compute: str) -> None:
        super().__init__()
        self.w13, self.w2 = PackedLinear(compute), PackedLinear(compute)

    def load(self, feed_forward: FeedForward) -> None:
        self.w13.load([feed_forward.w1, feed_forward.w3])
        self.w2.load([feed_forward.w2])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # (batch, seq_len, d_ffn) each
        return self.w2(F.silu(gate) * up)


class PackedLinear(nn.Module):
    """Linear layers of one input joined to one, in float32, bf16 or int8. Input and output: (..., features).

    The output is float32; on a GPU it has the dtype of the weights, as in training, which saves a kernel for each cast.
    On the CPU, float32 and bf16 weights are laid out for oneDNN once, as torch.compile's freezing does. int8: weights
    in 255 steps with one scale for each output, products in bf16.
    """

    def __init__(self, compute: str) -> None:
        super().__init__()
        self.compute, self.dtype = compute, torch.float32 if compute == "float32" else torch.bfloat16
        self.outputs, self.weight, self.multiply = 0, None, F.linear

    def load(self, linears: Sequence[nn.Linear]) -> None:
        """Copy the current weights of these layers."""
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (outputs of all, inputs)
        self.outputs = len(weight)
        if self.compute == "int8":
            scales = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (outputs of all,)
            self.weight, self.scales = (weight / scales[:, None]).round().to(torch.int8), scales.to(self.dtype)
            self.weight = F.pad(self.weight, (0, -weight.shape[1] % 64))  # the kernel needs whole blocks of 64
            self.multiply = self.multiply_int8
        elif weight.device.type == "cpu" and can_prepack(self.dtype):
            self.weight, self.multiply = prepack(weight.to(self.dtype)), multiply_prepacked
        elif self.weight is None:
            self.weight = weight.to(self.dtype)
        else:
            self.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x.to(self.dtype).flatten(0, -2), self.weight)  # (all rows, outputs of all)
        return (out if out.is_cuda else out.float()).view(*x.shape[:-1], self.outputs)

    def multiply_int8(self, x: Tensor, weight: Tensor) -> Tensor:
        x = F.pad(x, (0, weight.shape[1] - x.shape[1])) if x.shape[1] < weight.shape[1] else x
        return torch._weight_int8pack_mm(x, weight, self.scales)


def prepack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # of the layouts for 1 to 128 rows, that for 32 was best


def multiply_prepacked(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Probe whether the oneDNN operators that torch.compile uses work here: they are not public, and for bf16 they
    need a CPU with AVX-512."""
    try:
        x, weight = torch.eye(4, dtype=dtype), torch.arange(16.0).view(4, 4).to(dtype)
        return torch.equal(multiply_prepacked(x, prepack(weight)), weight.T)
    except (AttributeError, RuntimeError):
        return False
