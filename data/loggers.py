"""training.logger: the lines of metrics.jsonl also to TensorBoard or Weights & Biases, where those are installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

Logger = Callable[[dict[str, Any]], None]  # is told an entry of metrics.jsonl
SAME = "metrics.jsonl and report.html have the same"


def open_logger(name: str | None, folder: Path) -> Logger | None:
    """The logger of a run in `folder`, or None, with one line said, if it is not there. Its errors end no run either.

    Each start of a run is one run there, at its own steps: tensorboard --logdir FOLDER/tensorboard shows them together.
    """
    if name is None:
        return None
    try:
        write = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}[name](folder)
    except ImportError:
        tqdm.write(f"note: training.logger is {name}, which is not installed (pip install {name}): {SAME}")
        return None
    except Exception as error:  # no account, no network, ...: as these packages please
        tqdm.write(f"note: training.logger {name} did not start ({_first_line(error)}): {SAME}")
        return None
    broken = []

    def tell(entry: dict[str, Any]) -> None:
        if broken or "step" not in entry:
            return
        try:
            write(entry)
        except Exception as error:
            broken.append(error)
            tqdm.write(f"note: training.logger {name} stopped ({_first_line(error)}): {SAME}")

    return tell


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


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
