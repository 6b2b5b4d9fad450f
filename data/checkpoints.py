"""Checkpoint files: a dict of tensors and plain values, saved by torch, with a checksum of all of it that is verified
on reading. model.py makes a model of one, train.py goes on from one, run_folder.py holds those of a run.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, UserError, config_from_dict
from config.files import replacing

FORMAT = 2
KEYS = {"model": dict, "config": dict, "tokenizer": str, "iter_num": int, "epoch": float, "best_val_loss": float}
LATEST, BEST = "checkpoint_latest.pth", "best_model.pth"
OWN = "--checkpoint without --config and --set takes its own"
OURS = re.compile(r"checkpoint_latest\.pth|best_model\.pth|checkpoint_epoch_\d+\.pth")
# what a checkpoint holds of train.py's Run, beside its weights and its optimizer
CARRIED = ("iter_num", "position", "best_val_loss", "evaluations_without_gain", "evaluated", "completed", "unlogged",
           "norms")


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values. Whatever stops it, `path` holds the old file or the whole new one."""
    whole = io.BytesIO()  # torch's writer does not bear a file that fails under it (a full disk, a signal)
    torch.save({"format": FORMAT, "digest": content_digest(checkpoint), **checkpoint}, whole)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is run. Raises UserError if it is missing, damaged or not one of ours."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the checkpoint in it, such as {path / LATEST}")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes {LATEST} to training.output_dir")
    damaged = f"{path}: damaged, or not a checkpoint; use another one, such as {BEST}"
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's guesses at what is wrong with the file
        try:
            checkpoint = torch.load(file, map_location=device, weights_only=True)
        except Exception:  # on a bad file torch raises nearly everything, even OSError
            raise UserError(damaged) from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key, kind in KEYS.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project: it lacks {', '.join(missing)}")
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {found.get('format')}, but this program reads {FORMAT}: use the "
                        "version of this project that wrote it")
    content = {key: value for key, value in checkpoint.items() if key not in ("format", "digest")}
    if checkpoint.get("digest") != content_digest(content):  # torch believes a zip file's damaged directory
        raise UserError(damaged)
    return checkpoint


def content_digest(content: Any) -> str:
    """sha256 of nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(content)
    return digest.hexdigest()


def newest_checkpoint(folder: Path = Path("checkpoints")) -> Path:
    """The .pth file under folder that was written last; files of replaced runs (in previous/) do not count."""
    files = [path for path in folder.rglob("*.pth") if path.parent.name != "previous"]
    if not files:
        raise UserError(f"{folder}: no checkpoint here; train one with python train.py, or name one with --checkpoint")
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def check_model(checkpoint: dict[str, Any], source: Path, config: Config) -> None:
    """Raise UserError if the config's model is another one than the checkpoint's."""
    theirs = config_from_dict(checkpoint["config"], str(source)).to_dict()["model"]
    for key, value in config.to_dict()["model"].items():
        free = key in ("dropout", "use_flash_attention")  # no weight depends on these
        if not free and theirs[key] != value:
            raise UserError(f"{source}: model.{key} is {theirs[key]} there, but {value} in the config: {OWN}")


def check_resumable(checkpoint: dict[str, Any], source: Path, config: Config, train_digest: str | None = None,
                    ) -> list[str]:
    """Raise UserError if a run with this config cannot go on from the checkpoint. Returns what changed, for a note.

    train_digest: of the training tokens, once they are there.
    """
    missing = [key for key in ("optimizer", "train_digest", "metrics_size", *CARRIED) if key not in checkpoint]
    if missing:
        raise UserError(f"{source}: cannot be resumed from, it lacks {', '.join(missing)}: a version of this project "
                        "before resuming was exact wrote it; it still works with generate.py")
    if train_digest not in (None, checkpoint["train_digest"]):
        raise UserError(f"{source}: was trained on other stories than the training tokens hold now: give it back its "
                        "data.dataset and its files, or train a new model on these")
    check_model(checkpoint, source, config)
    before, now, changed = config_from_dict(checkpoint["config"], str(source)).to_dict(), config.to_dict(), []
    kind, other = before["optimizer"]["type"], now["optimizer"]["type"]
    if kind != other:
        raise UserError(f"{source}: optimizer.type is {kind} there, but {other} in the config: they gather different "
                        f"things of the gradients; {OWN}")
    for key in ("dataset", "max_stories"):
        was, new = before["data"][key], now["data"][key]
        # two paths may hold the same stories: of those the tokens tell, once they are there
        if was != new and (key == "max_stories" or "sample" in (was, new)):
            raise UserError(f"{source}: data.{key} is {json.dumps(was)} there, but {json.dumps(new)} in the config: a "
                            f"run goes on with the stories that it began with; {OWN}")
    for section, values in now.items():
        changed += [f"{section}.{key} {before[section][key]} -> {value}" for key, value in values.items()
                    if before[section][key] != value and key not in ("show_progress", "output_dir")]
    return ["changed since the checkpoint: " + ", ".join(changed)] if changed else []
