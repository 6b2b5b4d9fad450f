"""training.logger: writes the entries of metrics.jsonl also to TensorBoard or Weights & Biases, if installed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

Logger = Callable[[dict[str, Any]], None]  # takes an entry of metrics.jsonl


def open_logger(name: str | None, folder: Path) -> Logger | None:
    """The logger of a run in `folder`, or None, with a note, if it is missing. No error of a logger ends a run.

    Each start of a run is one run in the logger, at its own steps: tensorboard --logdir FOLDER/tensorboard shows all.
    """
    write: Logger | None = None

    def guarded(problem: str, call: Callable, *args: Any) -> Any:
        nonlocal write
        try:
            return call(*args)
        except Exception as error:  # no account, no network, ...: these packages raise anything
            reason = (f"is not installed: pip install {name}" if isinstance(error, ImportError) else
                      f"{problem} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]})")
            tqdm.write(f"note: training.logger {name} {reason}; metrics.jsonl and report.html have the same")
            write = None

    def log(entry: dict[str, Any]) -> None:
        if write is not None and "step" in entry:
            guarded("stopped", write, entry)

    if name is not None:
        write = guarded("did not start", {"tensorboard": _open_tensorboard, "wandb": _open_wandb}[name], folder)
    return log if write is not None else None


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The figures of an entry by name, such as evaluation/val_loss."""
    return {f"{entry['type']}/{key}": value for key, value in entry.items()
            if isinstance(value, (int, float)) and key != "step"}


def _open_tensorboard(folder: Path) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")))

    def write(entry: dict[str, Any]) -> None:
        for key, value in _numbers(entry).items():
            writer.add_scalar(key, value, entry["step"])
        for number, story in enumerate(entry.get("samples", ())):
            writer.add_text(f"story {number + 1}", story, entry["step"])
        if entry["type"] != "step":
            writer.flush()

    return write


def _open_wandb(folder: Path) -> Logger:
    import wandb

    run = wandb.init(project="tinystories-llama", name=folder.name, dir=str(folder))

    def write(entry: dict[str, Any]) -> None:
        if entry["type"] == "plan":
            run.config.update(entry["config"], allow_val_change=True)
        run.log({**_numbers(entry), **{f"story {number + 1}": wandb.Html(f"<pre>{story}</pre>")
                                       for number, story in enumerate(entry.get("samples", ()))}}, step=entry["step"])

    return write
