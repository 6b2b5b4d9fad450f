"""What the machine at hand can do: device, precision, compilation, memory. All of it is detected or probed."""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import UserError
from config.wording import counted, one_line

# peak dense bf16 FLOP/s with float32 accumulation, from the vendors' data sheets, by a part of torch's device name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12,
              "RTX 3090": 71e12}
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory|STATUS_ALLOC_FAILED|bad_alloc|"
                           "Storage size calculation overflowed")
COMPILE_PAYS = 1e14  # FLOP; a shorter run on the CPU does not earn back the tens of seconds that compiling takes


def choose_device(name: str) -> torch.device:
    """The torch.device of hardware.device; auto takes cuda, else mps, else cpu. Raises UserError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    if not available.get(name):
        found = ", ".join(kind for kind, found in available.items() if found)
        raise UserError(f"device {name}: not available to this torch ({torch.__version__}); found: {found}")
    if name != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"torchrun: {processes} processes on this machine, but it has {counted(gpus, 'GPU')}, and each "
                        f"process needs its own: --nproc_per_node={gpus}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def unused_gpu(device: torch.device) -> str:
    """A warning if the CPU was chosen although an NVIDIA driver is here; else ""."""
    driver = (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
              or Path(os.environ.get("SYSTEMROOT", "/none"), "System32", "nvcuda.dll").exists())
    if device.type != "cpu" or not driver or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    reason = "cannot use its driver: update the driver, or install" if torch.version.cuda else "has no CUDA: install"
    return (f"warning: this machine has an NVIDIA GPU, but torch {torch.__version__} {reason} torch with the command "
            "that https://pytorch.org/get-started/locally/ shows (Windows' default build has no CUDA)")


def choose_precision(device: torch.device, use_bf16: bool, same_everywhere: Callable[[float], float] = float,
                     ) -> tuple[Callable[[], Any], str]:
    """A function that makes the context to compute in, and its description. bf16 autocast keeps weights in float32.

    same_everywhere: takes a measured value and returns the one that all processes of a run are to use.
    """
    if not use_bf16:
        return contextlib.nullcontext, "float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return contextlib.nullcontext, "float32 (this GPU has no bf16)"
    if device.type == "mps":
        return contextlib.nullcontext, "float32 (bf16 is untested on mps)"
    if device.type == "cpu":
        times = same_everywhere(bf16_speedup_on_cpu())
        if times < 1.5:
            return contextlib.nullcontext, f"float32 (this CPU multiplies bf16 at {times:.2g} times that speed)"
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16), "bf16 autocast"


def bf16_speedup_on_cpu() -> float:
    """How many times faster this CPU multiplies bf16 matrices than float32 ones; far from 1 on every known CPU."""
    real = torch.randn(512, 512)
    brief = real.to(torch.bfloat16)
    return speedup(lambda: real @ real, lambda: brief @ brief)


def speedup(first: Callable[[], object], second: Callable[[], object]) -> float:
    """How many times faster the second function is on this CPU.

    The two take turns, and the fastest call of each counts: it is what the CPU can do, however busy it is now.
    """
    fastest, end = [math.inf] * 2, time.perf_counter() + 0.25  # seconds; where bf16 is slow, one call may take as long
    for turn in range(10):
        for kind, work in enumerate((first, second)):
            start = time.perf_counter()
            work()
            fastest[kind] = min(fastest[kind], time.perf_counter() - start)
        if turn and time.perf_counter() > end:
            break
    return fastest[0] / fastest[1]


def choose_compile(model: nn.Module, probe: Callable[[Callable], object], device: torch.device,
                   use_compile: bool | str, run_flops: float) -> tuple[Callable, str]:
    """The model, compiled if that is wanted, pays and works; and a description. The weights stay shared.

    probe: calls its argument on a batch of the real shape, forward and backward; running out of memory in it is raised.
    run_flops: of the whole run.
    """
    if use_compile is False:
        return model, "eager"
    if use_compile == "auto" and device.type == "mps":
        return model, "eager (torch.compile is untested on mps)"
    if use_compile == "auto" and device.type == "cpu" and run_flops < COMPILE_PAYS:
        return model, "eager (the run is too short for torch.compile to pay)"
    start = time.perf_counter()
    compiled = torch.compile(model, dynamic=False, options=compiler_options(device) or None)
    try:  # the only way to know whether a working compiler is installed
        probe(compiled)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:80]}"
        if use_compile is True:
            raise UserError(f"training.use_compile is true, but torch.compile fails here ({reason}): set it to auto "
                            "or false") from None
        package = "triton-windows" if os.name == "nt" else "triton"
        hint = f"; training is slower without it: pip install {package}" if "triton" in str(error).lower() else ""
        return model, f"eager (torch.compile does not work here: {reason}{hint})"
    finally:
        model.zero_grad(set_to_none=True)
    return compiled, f"compiled in {time.perf_counter() - start:.0f} s"


def compiler_options(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile: what was measured to pay on this kind of device, as far as this torch knows it."""
    from torch._inductor import config as inductor
    # torch 2.11 on an H200: without the first, the backward pass of the norms is fused with too much else (1.3%), and
    # without the second, the loss computes twice the exponentials to save a reading of the logits (1.3%)
    wanted = {"triton.mix_order_reduction": False, "online_softmax": False} if device.type == "cuda" else {}
    return {name: value for name, value in wanted.items() if name in inductor.get_config_copy()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn running out of the device's or the machine's memory into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({one_line(error) or type(error).__name__}): {advice}") from None


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory for the next step instead of returning it to the system.

    Otherwise the system zeroes each large buffer of each step page by page, which takes a third of the time of eager
    bf16 training on a CPU. Has no effect with other C libraries.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: never map a buffer by itself, since unmapping returns it to the system
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_flops(device: torch.device) -> float | None:
    """The device's peak dense bf16 FLOP/s, where known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def describe_machine(device: torch.device) -> str:
    """The device, the system, and the versions of Python and torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return (f"{name}; {platform.system()} {platform.machine()}; Python {platform.python_version()}, "
            f"torch {torch.__version__}")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied to CUDA without waiting. (On mps, such a copy may read memory freed by then.)"""
    return tensor.to(device, non_blocking=device.type == "cuda")
