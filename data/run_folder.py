"""What a run leaves on disk: the folder of its checkpoints, metrics.jsonl and the report, held by one program."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from config import UserError
from config.cli import deferred_interrupts
from config.files import only_one, remove_leftovers, replacing
from config.values import counted, one_line
from data.checkpoints import BEST, LATEST, OURS, load_checkpoint, save_checkpoint
from data.loggers import Logger, open_logger
from data.report import PICTURE, REPORT, update_report


def copy_of(value: Any, copies: dict[tuple, Tensor]) -> Any:
    """Nested dicts, lists and tuples, their tensors copied to main memory: each once, and noted in `copies`."""
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.shape  # a tied matrix has two names
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: copy_of(item, copies) for key, item in value.items()}
    return type(value)(copy_of(item, copies) for item in value) if isinstance(value, (list, tuple)) else value


def steps_of(folder: Path) -> int:
    """Of the run whose files are in `folder`; 0 if there is none."""
    with contextlib.suppress(UserError):
        return load_checkpoint(folder / LATEST)["iter_num"]
    return 0


class RunFolder:
    """training.output_dir while a run holds it. Full disks are told and outlived; nothing half-written stays.

    Checkpoints are written and the report is drawn by a thread, one after the other, while training goes on.

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
        self.saving = ""  # the checkpoint file that is being written, or was the last
        self._save: Future | None = None  # of it
        self._refused: set[Path] = set()  # checkpoint files whose last save failed
        self._thread = ThreadPoolExecutor(max_workers=1)

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
        here, there = steps_of(self.path), steps_of(previous)
        if there > here:
            raise UserError(f"{self.path}: holds a run of {counted(here, 'step')}, and starting anew would put it in "
                            f"place of that of {there:,} in {previous}: move or remove one of them, set training."
                            f"output_dir to another folder, or go on with one: --checkpoint {previous / LATEST}")
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

    def save(self, name: str, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Have what checkpoint() returns now written to `name`. To be called after saved(), which also ends it."""
        self.saving = name
        if self.writes:
            self._save = self._thread.submit(self._write, self.path / name, copy_of(checkpoint(), {}))

    def saved(self) -> bool:
        """Wait for the save under way, if there is one. False if it failed: that was told, the old file is there."""
        worked, self._save = self._save is None or self._save.result(), None
        return worked

    def _write(self, path: Path, checkpoint: dict[str, Any]) -> bool:
        with _told(path, path in self._refused):
            self._refused.add(path)
            save_checkpoint(path, checkpoint)
            self._refused.remove(path)
            return True
        return False

    def draw(self) -> None:
        """Have report.html and loss.png drawn anew, if there was an evaluation since they last were."""
        if self._to_draw:
            self._to_draw = False
            self._thread.submit(update_report, self.path)

    def close(self) -> None:
        """Wait until all is written and drawn. Signals wait, too: torchrun sends one once any process has left."""
        with deferred_interrupts():
            self.draw()
            self._thread.shutdown()

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
    """Turn a disk that refuses (full, unplugged, over quota) into a line: training goes on and tries again later.

    already: it was told when the same file was last tried.
    Too little memory for the file is told as well: torch.save makes a RuntimeError of it.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if not already:
            reason = getattr(error, "strerror", None) or one_line(error) or "out of memory"
            tqdm.write(f"warning: {path}: not saved ({reason}); what was there is kept, and each further save "
                       "tries again")


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
            for name in ("*.pth", REPORT, PICTURE):
                remove_leftovers(path, name)
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror or error}): set training.output_dir to "
                            "another folder") from None
        folder = RunFolder(path)
        stack.callback(folder.close)
        yield folder
