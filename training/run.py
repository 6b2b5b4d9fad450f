"""The state of a run: model, optimizer, position in the data, and what a checkpoint stores of them."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError
from config.schema import SamplingConfig
from config.wording import indented
from data.batches import count_sequences, dropout_seed, read_batch, training_sequences
from data.cleaning import CLEANING_VERSION
from data.token_files import TokenFile
from model import Transformer
from training.checkpoints import BEST, LATEST, RUN_STATE, load_weights
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.non_finite import find_non_finite
from training.optimizer import load_optimizer
from training.run_folder import RunFolder


@dataclass
class Run:
    """All that changes during training. state() and restore() carry it across a restart."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    device: torch.device
    train_file: TokenFile
    folder: RunFolder | None = None
    distributed: DistributedContext = SINGLE_PROCESS
    precision: Callable[[], Any] = contextlib.nullcontext
    sample: Callable[[SamplingConfig], list[str]] = lambda sampling: []  # generates a story for each of its prompts
    iter_num: int = 0  # steps done
    position: int = 0  # sequences trained on, over all epochs
    best_val_loss: float = math.inf
    evaluations_without_gain: int = 0
    evaluated: int = 0  # the step of the last evaluation
    completed: int = 0  # the step at which the whole run was finished
    pending: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)  # step, position, loss, gradient norm
    unlogged: list[tuple[int, float, float]] = field(default_factory=list)  # step, loss, gradient norm
    norms: list[float] = field(default_factory=list)  # the last gradient norms
    found_inf: Tensor | None = None  # float32, (): 1 after a non-finite gradient; from then on weights do not change
    best_before: float = math.inf  # best_val_loss before the last gain, restored if writing BEST fails
    clock: tuple[int, float] = (0, 0.0)  # a step and the time at its end; since then, only training took time
    spent: dict[str, float] = field(default_factory=dict)  # seconds outside of training steps, by name

    @property
    def sequences_per_epoch(self) -> int:
        return count_sequences(len(self.train_file.tokens), self.config.model.max_seq_len)

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.position / self.sequences_per_epoch

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"model": self.model.state_dict(), "config": self.config.to_dict(), "tokenizer": self.tokenizer.to_str(),
                "epoch": self.epoch, "optimizer": self.optimizer.state_dict(), "train_digest": self.train_file.digest,
                "cleaning_version": CLEANING_VERSION,
                "metrics_size": self.folder.metrics_size, **{name: getattr(self, name) for name in RUN_STATE}}

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Continue from the state of a checkpoint. Raises UserError if it does not fit."""
        load_weights(self.model, checkpoint, source)
        load_optimizer(self.optimizer, checkpoint["optimizer"], source)
        for name in RUN_STATE:
            setattr(self, name, checkpoint[name])

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block, which is not part of a step, to spent[part]. All processes call it together."""
        read_losses(self)  # waits for the steps so far
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.spent[part] = self.spent.get(part, 0.0) + seconds
        self.clock = self.clock[0], self.clock[1] + seconds

    def save(self, name: str) -> None:
        """Start writing a checkpoint file. All processes call this method; the main process writes."""
        with self.timed("saves"):  # which reads the losses, so a saved model is known to be finite
            self.finish_save()
            self.folder.save(name, self.state)

    def finish_save(self) -> bool:
        """Wait for the save in progress. Returns False, in all processes, if it failed."""
        succeeded = bool(self.distributed.from_main(self.folder.wait_for_save()))
        if not succeeded and self.folder.saving == BEST:
            self.best_val_loss = self.best_before
        self.folder.keep_newest(self.config.training.keep_checkpoints)
        return succeeded


def micro_batch(run: Run, start: int) -> tuple[np.ndarray, tuple[Tensor, Tensor]]:
    """The batch_size sequences from position `start` on: their indices, and their inputs and targets on the device."""
    sequences = training_sequences(start, run.config.training.batch_size, run.sequences_per_epoch,
                                   run.config.training.seed)
    return sequences, read_batch(run.train_file.tokens, sequences, run.config.model.max_seq_len, run.device)


def read_losses(run: Run) -> None:
    """Move run.pending to run.unlogged, which synchronizes with the device. Raises UserError if one is not finite."""
    if not run.pending:
        return
    steps, positions, losses, norms = zip(*run.pending, strict=True)
    run.pending.clear()
    mean = run.distributed.sum(torch.stack(losses)) / run.distributed.world_size  # (steps,)
    values = torch.stack([mean, torch.stack(norms)]).tolist()  # (2, steps)
    for step, position, loss, norm in zip(steps, positions, *values, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            run.folder.wait_for_save()
            kept = f"{LATEST} is from an earlier step" if (run.folder.path / LATEST).exists() else "nothing was saved"
            raise UserError(f"step {step:,}: loss {loss:g}, gradient norm {norm:g}: not finite, so training stopped; "
                            f"{diagnose_step(run, position)}; {kept}. Try a lower optimizer.learning_rate, a longer "
                            "scheduler.warmup_steps or a lower optimizer.max_grad_norm")
        run.unlogged.append((step, loss, norm))


def diagnose_step(run: Run, position: int) -> str:
    """Repeat the step that began at `position`. The weights are still those of that step, since the optimizer skips a
    step whose gradient is not finite.

    Prints the text of the worst sequence. Returns which module's output or gradient was not finite first.
    """
    training = run.config.training
    with find_non_finite(run.model) as faults:
        for start in range(position, position + run.config.sequences_per_step, training.batch_size):
            sequences, (inputs, targets) = micro_batch(run, start)
            torch.manual_seed(dropout_seed(training.seed, start))
            with run.precision():
                losses = run.model(inputs, targets, reduction="none")  # (batch, seq_len)
            (losses.mean() / training.gradient_accumulation_steps).backward()
            if faults:
                worst = int(losses.sum(dim=1).nan_to_num(nan=math.inf).argmax())
                text = run.tokenizer.decode(inputs[worst].tolist(), skip_special_tokens=False)
                tqdm.write(f"sequence {sequences[worst]} of the training tokens, the worst of its batch:\n"
                           + indented(text))
                return f"the first to go wrong was {faults[0]}"
    return "the same step was finite when it was repeated"
