"""Files that are written whole or not at all, and a lock that lets one program at a time build a file."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from filelock import FileLock, Timeout

from config import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which replaces `path` when the block ends.

    Whatever interrupts the block, a kill or a power failure included, `path` holds the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, path)
        if os.name == "posix":  # so that the new name survives a power failure, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def replace_file(part: Path, path: Path) -> None:
    """os.replace(), tried again for two seconds: Windows refuses it while a program, such as a virus scanner, has a
    file open."""
    for _ in range(40):
        with contextlib.suppress(PermissionError):
            return os.replace(part, path)
        time.sleep(0.05)
    os.replace(part, path)


def remove_partial_files(folder: Path, name: str) -> None:
    """Remove what killed programs left of files called `name`. The caller must hold the lock of these files."""
    for part in folder.glob(f"{name}.*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, busy: str, wait: bool) -> Iterator[None]:
    """Hold the lock file `path` during the block; the system releases the lock however the program ends.

    If another program holds the lock: print `busy` and wait, or without `wait` raise UserError with that text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
        print(busy, flush=True)
        lock.acquire()
    except NotImplementedError:  # a network file system without locks: continue without one
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def name_in_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names `what`, since the error of a full disk names no file."""
    try:
        yield
    except BrokenPipeError:  # the reader has closed the pipe, which is no error; see run_script
        raise
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None


@contextlib.contextmanager
def create_file(path: Path, flag: str) -> Iterator[TextIO]:
    """A new file to write lines to. Raises UserError if the file exists: stories are never overwritten.

    Whatever ends the block, a full disk included, only whole lines remain, and no empty file.
    """
    if path.exists():
        raise UserError(f"{flag} {path}: exists already; name another file, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}: create it, or name another file")
    with name_in_errors(f"{flag} {path}"):
        file = path.open("x", encoding="utf-8", newline="\n")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # a full disk was reported before
            file.close()
        with contextlib.suppress(OSError):
            whole_lines = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole_lines)
            if not whole_lines:
                path.unlink()
