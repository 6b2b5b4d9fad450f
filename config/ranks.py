"""The processes of one run: a single one, or the ranks that torchrun starts (imports torch).

    torchrun --nproc_per_node=2 train.py --config ...

Each rank trains on its share of every step's batches; what one decides (to stop, say) all decide.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config.cli import UserError
from config.schema import Config
from config.values import counted, one_line

PATIENCE = datetime.timedelta(hours=1)  # that ranks wait for one another: the first may be writing token files


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are. With one, every method is the plain thing and no other is asked."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        """The one rank that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor added up over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Is it true of any rank? Waits for the other processes, not for a GPU."""
        return flag if self.count == 1 else self.sum(torch.tensor(int(flag))).item() > 0

    def of_first(self, value: float) -> float:
        """The first rank's value."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(tensor, src=0)
        return tensor.item()

    def check_same(self, text: str, what: str) -> None:
        """Raise UserError, on every rank, unless the text is the same on all."""
        if self.count == 1:
            return
        own = torch.tensor([*hashlib.sha256(text.encode("utf-8")).digest()])  # (32,)
        all_ranks = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(all_ranks, own)
        other = next((rank for rank, theirs in enumerate(all_ranks) if not torch.equal(theirs, all_ranks[0])), None)
        if other is not None:
            raise UserError(f"rank {other} has other {what} than rank 0: give all machines the same files")

    def check_shares(self, config: Config) -> None:
        """Raise UserError if a step's micro-batches, or with batch_size auto its windows, do not go round."""
        steps = config.training.gradient_accumulation_steps
        if (steps or config.step_windows) % self.count:
            raise UserError(
                (f"training.gradient_accumulation_steps {steps}" if steps else
                 f"training.tokens_per_step {config.training.tokens_per_step}, "
                 f"{counted(config.step_windows, 'window')},")
                + f" cannot be shared out to {self.count} processes: make it a multiple of that"
                + (", and batch_size so much smaller that their product, the windows of a step, stays what it is"
                   if steps else " in windows"))

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Run the block on the first rank of each machine, then on the others, who find on disk what it wrote."""
        if self.local_rank:
            self.any(False)  # waits until all have come here
        yield
        if not self.local_rank:
            self.any(False)

    def parallel(self, forward: Callable, device: torch.device) -> Callable:
        """The forward whose backward averages the gradients over the ranks."""
        if self.count == 1:
            return forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name after torch 2.12
            return DistributedDataParallel(forward, [device] if device.type == "cuda" else None,
                                           broadcast_buffers=False, gradient_as_bucket_view=True)


ALONE = Ranks()


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes of torchrun, if it started this one. All but the first print nothing."""
    if not dist.is_available() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield ALONE
        return
    if device.type == "mps":
        raise UserError("torchrun: several processes cannot share mps; set hardware.device to cpu, or start just one")
    try:  # what the CPU holds (a decision to stop) goes by gloo, so that nothing waits for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, as if by torchrun, but {one_line(error)}: start this with "
                        "torchrun, or unset them") from None
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        with contextlib.ExitStack() as stack:
            if not ranks.first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield ranks
            ranks.any(False)  # whoever leaves first waits
    except RuntimeError as error:
        if dist.get_rank() == 0 or "gloo" not in str(error).lower():
            raise
        raise UserError(f"rank {dist.get_rank()}: another process has gone; it says why") from None
    finally:
        dist.destroy_process_group()
