"""The processes of a run: a single one, or those that torchrun starts, one for each GPU.

    torchrun --nproc_per_node=2 train.py --config ...

Each process trains on its part of every step's micro-batches. What one process decides, such as to stop, all decide.
"""

import contextlib
import datetime
import gc
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import Config, UserError
from config.wording import counted, one_line

TIMEOUT = datetime.timedelta(hours=1)  # long, since the others wait while the main process writes the token files


@dataclass(frozen=True)
class DistributedContext:
    """This process among all processes of the run. With one process, no method communicates."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """The main process prints and writes files; the others do neither."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true in any process. Waits for the other processes, but not for a GPU."""
        return flag if self.world_size == 1 else self.sum(torch.tensor(int(flag))).item() > 0

    def from_main(self, value: float) -> float:
        """The main process's value."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(tensor, src=0)
        return tensor.item()

    def check_equal(self, text: str, what: str) -> None:
        """Raise UserError in every process unless `text` is the same in all."""
        if self.world_size == 1:
            return
        own = torch.tensor([*hashlib.sha256(text.encode("utf-8")).digest()])  # (32,)
        digests = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(digests, own)
        other = next((rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])), None)
        if other is not None:
            raise UserError(f"rank {other} has other {what} than rank 0: give all machines the same files")

    def check_divisible(self, config: Config) -> None:
        """Raise UserError if a step cannot be divided equally among the processes."""
        training, sequences = config.training, counted(config.sequences_per_step, "sequence")
        steps = training.gradient_accumulation_steps
        if (steps or config.sequences_per_step) % self.world_size:
            key, advice = ((f"gradient_accumulation_steps {steps}", f"set it to a multiple of {self.world_size}, and "
                            f"batch_size so that their product stays {sequences}") if steps else
                           (f"tokens_per_step {training.tokens_per_step}, {sequences},",
                            f"set it to a multiple of {self.world_size} sequences"))
            raise UserError(f"training.{key} cannot be divided among {self.world_size} processes: {advice}")

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in one process of each machine, then in the others, which find its files on the disk."""
        if self.local_rank:
            self.any_process(False)  # a barrier
        yield
        if not self.local_rank:
            self.any_process(False)

    def data_parallel(self, forward: Callable, device: torch.device) -> Callable:
        """The forward pass whose backward averages the gradients over all processes."""
        if self.world_size == 1:
            return forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name after torch 2.12
            return DistributedDataParallel(forward, [device] if device.type == "cuda" else None,
                                           broadcast_buffers=False, gradient_as_bucket_view=True)


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the other processes if torchrun started this one. All but the main process print nothing."""
    if not dist.is_available() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield SINGLE_PROCESS
        return
    if device.type == "mps":
        raise UserError("torchrun: processes cannot share mps; set hardware.device to cpu, or start only one process")
    try:  # CPU tensors, such as a decision to stop, go by gloo, so that nothing waits for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, as if by torchrun, but {one_line(error)}: start the script with "
                        "torchrun, or unset them") from None
    try:
        distributed = DistributedContext(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        with contextlib.ExitStack() as stack:
            if not distributed.is_main:
                devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(devnull))
            yield distributed
            distributed.any_process(False)  # a barrier: no process leaves while another still needs it
    except RuntimeError as error:
        if dist.get_rank() == 0 or "gloo" not in str(error).lower():
            raise
        raise UserError(f"rank {dist.get_rank()}: another process has exited; its message says why") from None
    finally:
        # free the DistributedDataParallel, a cycle of references: it keeps the group's threads, which could otherwise
        # ask for Python's lock while Python exits, and abort the process
        gc.collect()
        dist.destroy_process_group()
