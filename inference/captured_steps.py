"""Decode steps as CUDA graphs: the hundreds of small kernels of a step are recorded once and then replayed as one.

A graph replays the same kernels on the same memory. So all that changes from step to step must be in tensors, and the
numbers of rows and of cache slots are fixed. There is a graph for each power of two of both, made when it is needed.
"""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from config.wording import one_line
from device import send
from model import KVCache, cache_mask

FEWEST_SLOTS = 64


class StaticCache(KVCache):
    """The first rows and slots of a KVCache, with the lengths of the rows in a tensor on the device, int64, (rows,)."""

    length = 0  # only the device knows the lengths

    def __init__(self, cache: KVCache, lengths: Tensor, slots: int) -> None:
        self.layers = [tuple(tensor[:len(lengths), :, :slots] for tensor in layer) for layer in cache.layers]
        self.device, self.lengths, self.slots = lengths.device, lengths, slots

    def positions(self, seq_len: int) -> tuple[Tensor, Tensor]:
        positions = self.lengths[:, None]  # (rows, 1): a step is one token
        return positions, cache_mask(positions, self.slots).type_as(self.layers[0][0])

    def append(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        super().append(layer, positions, keys, values)
        return self.layers[layer]  # all slots, since a graph has fixed shapes

    def advance(self, seq_len: int) -> None:
        self.lengths.add_(seq_len)


class CapturedSteps:
    """Runs an engine's decode_step() on its cache and batch by graphs."""

    def __init__(self, step: Callable, model: torch.nn.Module, cache: KVCache, batch: tuple, compiled: bool) -> None:
        self.step, self.model, self.cache, self.batch = step, model, cache, batch
        self.compiled = torch.compile(step, dynamic=False) if compiled else None
        self.graphs: dict[tuple, Any] = {}  # with a method replay()

    def run(self, steps: int, used: frozenset[str]) -> None:
        """Do a number of steps on the rows of the cache that are in use."""
        lengths = self.cache.lengths
        rows = power_of_two(len(lengths), 1, len(self.batch.tokens))
        slots = power_of_two(self.cache.length + steps, FEWEST_SLOTS, self.cache.layers[0][0].shape[2])
        padded = torch.tensor(lengths + [0] * (rows - len(lengths)))  # free rows compute what nobody reads
        self.batch.lengths[:rows].copy_(send(padded, self.batch.lengths.device))
        self.cache.lengths = [length + steps for length in lengths]
        key = rows, slots, used
        if key not in self.graphs:
            self.graphs[key] = self.first_step(rows, slots, used)
            steps -= 1
        for _ in range(steps):
            self.graphs[key].replay()

    def first_step(self, rows: int, slots: int, used: frozenset[str]) -> Any:
        """Do a step without a graph, since capturing must find all kernels loaded. Returns the graph of the next ones.

        A step of all rows is compiled if that was asked for; the graphs of fewer rows serve only the end of a job.
        Where capturing fails, what is returned does steps without a graph.
        """
        batch = self.batch.first(rows)
        arguments = self.model, StaticCache(self.cache, batch.lengths, slots), batch, used
        step, earlier = self.step, next((graph for graph in self.graphs.values() if hasattr(graph, "pool")), None)
        if self.compiled is not None and rows == len(self.batch.tokens):
            try:  # the only way to know whether a working compiler is installed
                self.compiled(*arguments)
                step = self.compiled
            except torch._dynamo.exc.TorchDynamoException:
                self.compiled = None
        if step is self.step:
            step(*arguments)
        try:  # the driver or another thread may make capturing fail
            return capture(lambda: step(*arguments), earlier)
        except RuntimeError as error:
            warnings.warn(f"generating is slower here, without CUDA graphs: {one_line(error)}", stacklevel=2)
            return SimpleNamespace(replay=lambda: step(*arguments))


def power_of_two(number: int, fewest: int, most: int) -> int:
    """The smallest power of two from `number` and `fewest` on, but at most `most`."""
    return min(most, max(fewest, 1 << (number - 1).bit_length()))


def capture(step: Callable[[], None], earlier: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
    """Record a step in a CUDA graph, without running it. earlier: a graph whose memory it shares; two never run at
    once."""
    graph = torch.cuda.CUDAGraph()
    # the outer context returns to this stream if capturing fails; other threads may use the GPU meanwhile, such as one
    # that saves a checkpoint
    with (torch.cuda.stream(torch.cuda.current_stream()),
          torch.cuda.graph(graph, pool=earlier.pool() if earlier else None, capture_error_mode="thread_local")):
        step()
    return graph
