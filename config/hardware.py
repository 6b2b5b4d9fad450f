"""What the machine at hand can do: device, precision, compiler, the layout of weights; found out, not assumed.

Imports torch, as ranks.py and optimizer.py of this room do; `import config` loads none of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.cli import UserError
from config.ranks import ALONE, Ranks
from config.schema import Config
from config.values import counted, one_line

# dense bf16 FLOP/s with float32 accumulation, from the vendors' data sheets, by a part of torch's device name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12,
              "RTX 3090": 71e12}
SPLIT_FROM = 1024  # inputs; above it oneDNN splits the sums of a row that is alone, and rounds them differently
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|STATUS_ALLOC_FAILED|bad_alloc|"
                           "Storage size calculation overflowed")
CPU_BATCH_TOKENS = 4096  # of a micro-batch: enough for a CPU to be busy
COMPILE_PAYS = 1e14  # FLOP of a run on the CPU from which compiling (tens of seconds) is worth its time


def choose_device(name: str) -> torch.device:
    """hardware.device as a torch.device; auto takes cuda, else mps, else cpu. Raises UserError if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in available.items() if here)
    if not available.get(name):
        here = ", ".join(kind for kind, here in available.items() if here)
        raise UserError(f"device {name}: not available to this torch ({torch.__version__}); here: {here}, or auto")
    if name != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"torchrun: {processes} processes on this machine, but it has {counted(gpus, 'GPU')}, and each "
                        f"process needs its own: --nproc_per_node={gpus}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def choose_precision(device: torch.device, wanted: bool, ranks: Ranks = ALONE) -> tuple[Callable[[], Any], str]:
    """A factory of the context to compute in, and why. bf16 autocast keeps the weights in float32."""
    if not wanted:
        return contextlib.nullcontext, "float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return contextlib.nullcontext, "float32 (this GPU has no bf16)"
    if device.type == "mps":
        return contextlib.nullcontext, "float32 (bf16 was never tried on mps)"
    if device.type == "cpu":
        gain = ranks.of_first(bf16_gain_on_cpu())
        if gain < 1.5:
            return contextlib.nullcontext, f"float32 (bf16 products run at {gain:.1f} times its speed on this CPU)"
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16), "bf16 autocast"


def bf16_gain_on_cpu() -> float:
    """How many times faster this CPU multiplies bf16 matrices than float32 ones; far from 1 on every known CPU."""
    def seconds(dtype: torch.dtype) -> float:
        a, times = torch.randn(512, 512).to(dtype), []
        for _ in range(7):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    return seconds(torch.float32) / seconds(torch.bfloat16)


def choose_compile(model: nn.Module, try_it: Callable[[Callable], object], device: torch.device,
                   wanted: bool | str, run_flops: float) -> tuple[Callable, str]:
    """The model compiled, if that is wanted, pays and works, else as it is; and why. Weights stay shared.

    try_it: calls what it is given on a batch of the real shape, forward and backward. run_flops: of the whole run.
    """
    if wanted is False:
        return model, "eager"
    if wanted == "auto" and device.type == "mps":
        return model, "eager (torch.compile was never tried on mps)"
    if wanted == "auto" and device.type == "cpu" and run_flops < COMPILE_PAYS:
        return model, "eager (too short a run for torch.compile to pay)"
    compiled, start = torch.compile(model, dynamic=False), time.perf_counter()
    try:  # whether a compiler is there and does it is found out, not assumed
        try_it(compiled)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:80]}"
        if wanted is True:
            raise UserError(f"training.use_compile is true, but torch.compile fails here ({reason}): set it to auto "
                            "or false") from None
        return model, f"eager (torch.compile does not work here: {reason})"
    finally:
        model.zero_grad(set_to_none=True)
    return compiled, f"compiled in {time.perf_counter() - start:.0f} s"


def estimate_memory(model: nn.Module, batch_size: int, bf16: bool) -> float:
    """Roughly the bytes that training holds: weights, gradients, two Adam moments, and a micro-batch's activations.

    model: a Transformer (model.py).
    """
    m, width = model.config, 2 if bf16 else 4
    kept_by_layer = m.d_model * (8 * width + 18) + m.d_ffn * 4 * width  # per token
    if model.output.weight.device.type == "cpu":
        kept_by_layer += m.n_heads * m.max_seq_len * width / 2  # the shares of attention, of which half are 0
    if model.gradient_checkpointing:
        layers = m.n_layers * 4 * m.d_model + kept_by_layer
    else:
        layers = m.n_layers * kept_by_layer
    logits = m.vocab_size * (width + 4 + 4 + 4)  # the logits, in float32, their log-softmax, their gradient
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 16 * parameters + batch_size * m.max_seq_len * (layers + logits)


def choose_batch_size(config: Config, model: nn.Module, device: torch.device, ranks: Ranks, bf16: bool,
                      try_it: Callable[[int], object]) -> Config:
    """The config with a number for batch_size auto: the most windows that divide the step and fit, tried out.

    On a CPU, where a larger one gains little, CPU_BATCH_TOKENS at the most. try_it: a forward and backward
    pass of so many windows, on every rank at once. Raises UserError.
    """
    if config.training.batch_size != "auto":
        return config
    share, limit = config.step_windows // ranks.count, math.inf  # windows of a step for one rank
    if device.type == "cuda":
        limit = 1.5 * torch.cuda.mem_get_info(device)[0]  # the estimate is rough: what is near is tried
    elif device.type == "cpu":
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # a system that runs short kills, so nothing is tried
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    # a step holds these besides, but not yet a try: the gradients of the micro-batch before it, and two moments
    held = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(3)]
    for size in range(share, 0, -1):
        if share % size or (device.type == "cpu" and size > max(1, CPU_BATCH_TOKENS // config.model.max_seq_len)):
            continue
        failed = size > 1 and estimate_memory(model, size, bf16) > limit
        if not ranks.any(failed):
            try:
                try_it(size)
            except (MemoryError, RuntimeError) as error:
                if not OUT_OF_MEMORY.search(str(error)):
                    raise
                failed = True
            model.zero_grad(set_to_none=True)
            if not ranks.any(failed):
                del held
                return config.with_batch_size(size)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    raise UserError("training.batch_size auto: not even one window fits the memory: set training."
                    "use_gradient_checkpointing: true, or make the model smaller")


@contextlib.contextmanager
def memory_is_told() -> Iterator[None]:
    """Turn running out of the device's or the machine's memory into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(f"out of memory ({one_line(error)}): lower training.batch_size and raise training."
                        "gradient_accumulation_steps by as much, or set training.use_gradient_checkpointing: true, or "
                        "make the model smaller") from None


def keep_freed_memory() -> None:
    """Let glibc, where it is the allocator, keep what is freed for the next step instead of giving it to the system.

    Else every large buffer of every step is zeroed anew, page by page: a third of the time of eager bf16 on a CPU.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no buffer is a mapping of its own, which would end with it
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def choose_compute(wanted: str, device: torch.device) -> tuple[str, str]:
    """float32, bf16 or int8, and why. auto asks the device alone, so that a seed tells one story in every batch."""
    if wanted == "int8" and device.type != "cpu":
        raise UserError(f"--compute int8: only on the cpu, not on {device.type}; use bf16")
    if wanted != "auto":
        return wanted, ""
    precision, why = choose_precision(device, True)
    return ("float32", why.removeprefix("float32")) if precision is contextlib.nullcontext else ("bf16", "")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to CUDA without waiting for it. On mps such a copy may read what is freed by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


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
        elif weight.device.type == "cpu" and can_prepack(self.dtype):
            self.weight, self.multiply = prepack(self.weight), multiply_prepacked

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x.to(self.dtype).flatten(0, -2), self.weight)  # (all rows, outputs of all)
        return out.float().view(*x.shape[:-1], self.outputs)

    def multiply_int8(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(F.pad(x, (0, weight.shape[1] - x.shape[1])), weight, self.scales)


def prepack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # 32 rows: its layout was the best for 1 to 128


def multiply_prepacked(x: Tensor, weight: Tensor) -> Tensor:
    if len(x) == 1 and x.shape[1] > SPLIT_FROM:
        return multiply_prepacked(x.expand(2, -1), weight)[:1]  # so that a row has the same bits as among others
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether the oneDNN operators that torch.compile uses work here, tried out: they are not public, and for bf16 want
    a CPU with AVX-512."""
    try:
        x, weight = torch.eye(4, dtype=dtype), torch.arange(16.0).view(4, 4).to(dtype)
        return torch.equal(multiply_prepacked(x, prepack(weight)), weight.T)
    except (AttributeError, RuntimeError):
        return False
