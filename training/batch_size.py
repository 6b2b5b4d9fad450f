"""training.batch_size: auto. Finds the largest micro-batch that fits into memory, starting from an estimate."""

import math
import os
from collections.abc import Callable

import torch

from config import Config, UserError
from device import is_out_of_memory
from model import Transformer
from training.distributed import DistributedContext

CPU_BATCH_TOKENS = 4096  # in a micro-batch: enough to keep a CPU busy


def estimate_memory(model: Transformer, batch_size: int, bf16: bool, use_compile: bool | str = "auto") -> float:
    """Estimate the bytes that training takes: weights, gradients, two Adam moments, and a micro-batch's activations.

    On a GPU, torch.compile fuses operations, so that less is kept between them.
    """
    m, width, device = model.config, 2 if bf16 else 4, model.output.weight.device.type
    kept_by_layer = m.d_model * (8 * width + 18) + m.d_ffn * 4 * width  # per token
    logits = m.vocab_size * (width + 4 + 4 + 4)  # logits, their float32 copy, their log-softmax, their gradient
    if use_compile and device not in ("cpu", "mps"):  # measured on an H200, see tests/training/test_batch_size.py
        kept_by_layer, logits = m.d_model * (8 * width + 10) + m.d_ffn * 2 * width, m.vocab_size * 2 * width
    if device == "cpu":
        kept_by_layer += m.n_heads * m.max_seq_len * width / 2  # the attention weights, half of which are masked
    if model.gradient_checkpointing:
        layers = m.n_layers * 4 * m.d_model + kept_by_layer
    else:
        layers = m.n_layers * kept_by_layer
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 16 * parameters + batch_size * m.max_seq_len * (layers + logits)


def choose_batch_size(config: Config, model: Transformer, device: torch.device, distributed: DistributedContext,
                      bf16: bool, probe: Callable[[int], object]) -> Config:
    """The config with a number for batch_size auto: the most sequences that divide the step and fit into memory.

    On a CPU, where larger batches gain little, at most CPU_BATCH_TOKENS. probe: a forward and a backward pass of that
    many sequences, in all processes at once, compiled if the run is to be. Raises UserError.
    """
    if config.training.batch_size != "auto":
        return config
    per_process, limit = config.sequences_per_step // distributed.world_size, math.inf
    if device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        # a system that runs out of memory kills the process, so sizes above the limit are not probed
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    # a step also holds the gradients of the micro-batch before and two moments, which a probe does not have yet
    held = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(3)]
    most = max(1, CPU_BATCH_TOKENS // config.model.max_seq_len) if device.type == "cpu" else per_process
    for size in (size for size in range(min(most, per_process), 0, -1) if per_process % size == 0):
        failed = size > 1 and estimate_memory(model, size, bf16, config.training.use_compile) > limit
        if distributed.any_process(failed):
            continue
        try:
            probe(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        model.zero_grad(set_to_none=True)
        if not distributed.any_process(failed):
            del held
            return config.with_batch_size(size)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise UserError("training.batch_size auto: not even one sequence fits into memory: set training."
                    "use_gradient_checkpointing: true, or make the model smaller")
