"""training.output_dir during a run: checkpoints, metrics.jsonl and the report, locked by one program."""

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
from config.wording import format_bytes, one_line
from data.atomic_files import atomic_write, file_lock, remove_partial_files
from training.checkpoints import BEST, CHECKPOINT_NAME, LATEST, PREVIOUS, save_checkpoint
from training.interruptions import deferred_interrupts
from training.loggers import Logger, open_logger
from training.metrics_file import METRICS

REPORT, PICTURE, EVALUATION = "report.html", "loss.png", "evaluation.json"


def copy_to_cpu(value: Any, copies: dict[tuple, Tensor]) -> Any:
    """Copy nested dicts, lists and tuples with their tensors, each tensor once; `copies` has those made so far."""
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.shape  # a tied matrix has two names
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: copy_to_cpu(item, copies) for key, item in value.items()}
    return type(value)(copy_to_cpu(item, copies) for item in value) if isinstance(value, (list, tuple)) else value


class RunFolder:
    """The output folder of one run. A thread writes the checkpoints and draws the report while training continues.

    A write that fails (a full disk) is reported as a warning, and no half-written file remains. metrics.jsonl counts
    up to `metrics_size` bytes: a checkpoint stores that number, and a resumed run truncates the file there, so that no
    step occurs twice. With writes=False (all processes but the main one), nothing is written.

    draw: writes the report of the folder and returns a warning if that failed (evaluation/report.py).
    """

    def __init__(self, path: Path, writes: bool = True, draw: Callable[[Path], str | None] | None = None) -> None:
        self.path = path
        self.writes = writes
        self.metrics = path / METRICS
        self.metrics_size = 0
        self.saving = ""  # the checkpoint file that is being written, or was written last
        self._draw = draw
        self._draw_warning: str | None = None
        self._to_draw = False
        self._unwritten = b""  # lines of metrics.jsonl that could not be written yet
        self._logger: Logger | None = None
        self._save: Future | None = None  # of the file `saving`
        self._failed: set[Path] = set()  # checkpoint files whose last save failed
        self._thread = ThreadPoolExecutor(max_workers=1)

    def begin(self, checkpoint: Path | None = None, metrics_size: int = 0, logger: str | None = None) -> None:
        """Prepare the folder for a new run, or for a run resumed from `checkpoint`, which stored `metrics_size`.

        Unless the run resumes from LATEST of this folder, the files here move to previous/N, and the best model and the
        metrics beside the checkpoint are copied to this folder. LATEST and metrics.jsonl always belong together: LATEST
        becomes a copy of `checkpoint` before the later lines of metrics.jsonl are cut off.
        """
        if not self.writes:
            return
        if checkpoint is None:
            self._move_to_previous()
        elif checkpoint.resolve() != (self.path / LATEST).resolve():
            content, home = checkpoint.read_bytes(), checkpoint.resolve().parent
            moved = self._move_to_previous()
            if moved and home == self.path.resolve():
                home = moved
            for name in (BEST, METRICS):
                if (home / name).is_file():
                    shutil.copyfile(home / name, self.path / name)
            with atomic_write(self.path / LATEST) as file:
                file.write(content)
        if self.metrics.exists():
            with self.metrics.open("r+b") as file:
                whole_lines = file.read(metrics_size).rpartition(b"\n")
                self.metrics_size = len(whole_lines[0] + whole_lines[1])
                file.truncate(self.metrics_size)
        self._logger = open_logger(logger, self.path)

    def _move_to_previous(self) -> Path | None:
        """Move the files of an earlier run to previous/N, N being the next number. Nothing is ever removed from it."""
        if not any(CHECKPOINT_NAME.fullmatch(path.name) for path in self.path.iterdir()):
            return None  # a run that never saved is not worth keeping
        previous = self.path / PREVIOUS
        numbers = [int(path.name) for path in previous.glob("*") if path.name.isdecimal()]
        target = previous / str(max(numbers, default=0) + 1)
        target.mkdir(parents=True)
        files = [path for path in self.path.iterdir()
                 if CHECKPOINT_NAME.fullmatch(path.name) or path.name in (METRICS, REPORT, PICTURE, EVALUATION)]
        size = sum(path.stat().st_size for path in files)
        try:
            for path in files:
                path.replace(target / path.name)
        except OSError as error:  # such as a file in use on Windows: the earlier run stays whole
            for moved in list(target.iterdir()):
                moved.replace(self.path / moved.name)
            target.rmdir()
            raise UserError(f"{path}: cannot be moved to {target}, which keeps the earlier run ({error.strerror}): "
                            "close the program that uses it, or set training.output_dir to another folder") from None
        print(f"output: the earlier run in {self.path} is now in {target} ({format_bytes(size)}), yours to delete")
        return target

    def record(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. A line that cannot be written is kept and written with the next one."""
        if not self.writes:
            return
        failed_before = bool(self._unwritten)
        self._unwritten += (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8")
        with (_warn_if_not_saved(self.metrics, failed_before),
              self.metrics.open("r+b" if self.metrics.exists() else "wb") as file):
            file.seek(self.metrics_size)  # over a part that a failed attempt may have left
            file.write(self._unwritten)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not count lines that a power failure would lose
            self.metrics_size, self._unwritten = file.tell(), b""
        self._to_draw |= entry.get("type") in ("evaluation", "final")
        if self._logger:
            self._logger(entry)

    def save(self, name: str, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Start writing what checkpoint() returns now to the file `name`. Call wait_for_save() before the next one."""
        self.saving = name
        if self.writes:
            self._save = self._thread.submit(self._write, self.path / name, copy_to_cpu(checkpoint(), {}))

    def wait_for_save(self) -> bool:
        """Wait for the save in progress, if any. Returns False if it failed; the old file is then still there."""
        succeeded, self._save = self._save is None or self._save.result(), None
        return succeeded

    def _write(self, path: Path, checkpoint: dict[str, Any]) -> bool:
        with _warn_if_not_saved(path, path in self._failed):
            self._failed.add(path)
            save_checkpoint(path, checkpoint)
            self._failed.remove(path)
            return True
        return False

    def draw(self) -> None:
        """Start drawing the report, if an evaluation was recorded since it was last drawn."""
        if self._to_draw and self._draw:
            self._to_draw = False
            self._thread.submit(self._draw_report)

    def _draw_report(self) -> None:
        warning = self._draw(self.path)
        if warning and warning != self._draw_warning:  # once, not at each evaluation
            tqdm.write(warning)
        self._draw_warning = warning

    def close(self) -> None:
        """Wait until everything is written and drawn, with signals deferred: torchrun sends one as a process exits."""
        with deferred_interrupts():
            self.draw()
            self._thread.shutdown()

    def keep_newest(self, count: int) -> None:
        """Remove all checkpoint_epoch_N.pth but the `count` newest."""
        if not self.writes:
            return
        with contextlib.suppress(OSError):  # such as a file in use on Windows: the next call tries again
            epochs = [path for path in self.path.glob("checkpoint_epoch_*") if CHECKPOINT_NAME.fullmatch(path.name)]
            epochs.sort(key=lambda path: path.stat().st_mtime_ns)
            for path in epochs[:max(0, len(epochs) - count)]:
                path.unlink()


@contextlib.contextmanager
def _warn_if_not_saved(path: Path, failed_before: bool) -> Iterator[None]:
    """Report a failed write (disk full, unplugged, over quota, too little memory) as a warning and keep training.

    failed_before: the last write of the same file failed too, and was reported.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:  # torch.save raises RuntimeError for lack of memory
        if not failed_before:
            reason = getattr(error, "strerror", None) or one_line(error) or "out of memory"
            tqdm.write(f"warning: {path}: not saved ({reason}); the old file is kept, and the next save tries again")


@contextlib.contextmanager
def lock_output_dir(path: Path, writes: bool = True, draw: Callable[[Path], str | None] | None = None,
                    ) -> Iterator[RunFolder]:
    """The output folder, locked for this run. Raises UserError if another run has it or if it is not writable."""
    if not writes:
        yield RunFolder(path, writes)
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path / ".lock", f"{path}: another program is training into this folder: wait "
                                          "for it, or set training.output_dir to another one", wait=False))
            for name in ("*.pth", REPORT, PICTURE):
                remove_partial_files(path, name)
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror or error}): set training.output_dir to "
                            "another folder") from None
        folder = RunFolder(path, draw=draw)
        stack.callback(folder.close)
        yield folder
