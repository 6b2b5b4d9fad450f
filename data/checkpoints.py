"""What a run leaves on disk: checkpoint files, and the folder that holds them with metrics.jsonl.

A checkpoint is a dict of tensors and plain values, saved by torch, with a checksum of all of it that is verified on
reading. model.py makes a model of one, train.py goes on from one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, config_from_dict
from config.files import only_one, remove_leftovers, replacing
from data.loggers import Logger, open_logger
from data.report import PICTURE, REPORT, update_report

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


class RunFolder:
    """training.output_dir while a run holds it. Full disks are told and outlived; nothing half-written stays.

    metrics.jsonl counts up to `metrics_size` bytes: a checkpoint notes that number, and a resumed run cuts the file
    there, so that no step stands in it twice. Without `writes` (of several processes, all but the first) nothing is
    written.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.metrics = path / "metrics.jsonl"
        self.metrics_size = 0
        self._unwritten = b""  # lines that a full disk had no room for
        self._logger: Logger | None = None
        self._to_draw = False

    def begin(self, checkpoint: Path | None = None, metrics_size: int = 0, logger: str | None = None) -> None:
        """Make the folder ready for a new run, or for going on from `checkpoint`, which noted `metrics_size`.

        logger: training.logger, which is told what goes to metrics.jsonl.
        The files of another run go to previous/, which holds one run: starting anew by mistake loses nothing.
        Whoever goes on from a checkpoint in previous/ has the two change places. LATEST always belongs to
        metrics.jsonl: it becomes `checkpoint` before the lines of what came after that are cut off.
        """
        if not self.writes:
            return
        home = checkpoint.expanduser().resolve().parent if checkpoint else None
        previous = self.path / "previous"
        aside = self.path / "previous.part"
        back = home is not None and home == previous.resolve()
        if aside.exists():
            raise UserError(f"{aside}: a program was killed while this run and the one in previous/ changed places: "
                            f"move its files to a folder of their own, remove it, and try again")
        if back:
            previous.rename(aside)
        if home != self.path.resolve():
            self._move_to(previous)
        if back:
            for path in aside.iterdir():
                path.replace(self.path / path.name)
            aside.rmdir()
        elif home and home != self.path.resolve():
            for name in (BEST, self.metrics.name):
                if (home / name).is_file():
                    shutil.copyfile(home / name, self.path / name)
        source = self.path / checkpoint.name if back else checkpoint
        if source and source.resolve() != (self.path / LATEST).resolve():
            with replacing(self.path / LATEST) as file:
                file.write(source.read_bytes())
        if self.metrics.exists():
            with self.metrics.open("r+b") as file:
                whole_lines = file.read(metrics_size).rpartition(b"\n")
                self.metrics_size = len(whole_lines[0] + whole_lines[1])
                file.truncate(self.metrics_size)
        self._logger = open_logger(logger, self.path)

    def _move_to(self, previous: Path) -> None:
        """Move what a run left in this folder to `previous`, in place of the run that was there."""
        earlier = [path for path in self.path.iterdir() if OURS.fullmatch(path.name)]
        if not earlier:  # a run that never saved is none to keep, and replaces none
            return
        previous.mkdir(exist_ok=True)
        others = (self.metrics.name, REPORT, PICTURE)
        for path in previous.iterdir():
            if OURS.fullmatch(path.name) or path.name in others:
                path.unlink()
        for path in (*earlier, *(self.path / name for name in others)):
            if path.exists():
                path.replace(previous / path.name)
        print(f"output: {self.path} held an earlier run: moved to {previous} (to go on with it: --checkpoint "
              f"{previous / LATEST})")

    def record(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; what a full disk refuses is kept and written with the next."""
        if not self.writes:
            return
        told_already = bool(self._unwritten)
        self._unwritten += (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8")
        with _told(self.metrics, told_already), self.metrics.open("r+b" if self.metrics.exists() else "wb") as file:
            file.seek(self.metrics_size)  # over what an earlier try may have left
            file.write(self._unwritten)
            file.flush()
            os.fsync(file.fileno())  # no checkpoint is to count lines that a power failure takes
            self.metrics_size, self._unwritten = file.tell(), b""
        self._to_draw |= entry.get("type") in ("evaluation", "final")
        if self._logger:
            self._logger(entry)

    def draw(self) -> None:
        """Draw report.html and loss.png anew, if there was an evaluation since they last were."""
        if self._to_draw:
            self._to_draw = False
            update_report(self.path)

    def save(self, name: str, checkpoint: Callable[[], dict[str, Any]]) -> bool:
        """Write what checkpoint() returns. False if that failed, which is told; the old file is then still there."""
        if not self.writes:
            return True
        with _told(self.path / name):
            save_checkpoint(self.path / name, checkpoint())
            return True
        return False

    def keep_newest(self, count: int) -> None:
        """Remove all checkpoint_epoch_N.pth but the `count` written last."""
        if not self.writes:
            return
        with contextlib.suppress(OSError):  # in use on Windows, say: then the next time
            epochs = [path for path in self.path.iterdir() if OURS.fullmatch(path.name) and "epoch" in path.name]
            epochs.sort(key=lambda path: path.stat().st_mtime_ns)
            for path in epochs[:max(0, len(epochs) - count)]:
                path.unlink()


@contextlib.contextmanager
def _told(path: Path, already: bool = False) -> Iterator[None]:
    """Turn a disk that refuses (full, unplugged, over quota) into a line: training goes on and tries again later."""
    try:
        yield
    except OSError as error:
        if not already:
            tqdm.write(f"warning: {path}: not saved ({error.strerror or error}); what was there is kept, the run goes "
                       "on and tries again at the next save")


@contextlib.contextmanager
def hold_folder(path: Path, writes: bool = True) -> Iterator[RunFolder]:
    """The output folder, for this run alone. Raises UserError if another run has it, or if it cannot be written to."""
    if not writes:
        yield RunFolder(path, writes)
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_one(path / ".lock", f"{path}: another program is training into this folder: wait "
                                         "for it, or set training.output_dir to another one", wait=False))
            remove_leftovers(path, "*.pth")
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror or error}): set training.output_dir to "
                            "another folder") from None
        yield RunFolder(path)
