"""Files on a disk that may be full, with other programs beside this one: written whole or not at all, built by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from filelock import FileLock, Timeout

from config.cli import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the block ends.

    Whatever stops it, a kill or a power failure included, `path` holds the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # so that the new name, too, outlasts a power failure
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the parts that killed programs left of files called `name`. To be called by who holds the lock."""
    for part in folder.glob(f"{name}.*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(lock: Path, busy: str, wait: bool) -> Iterator[None]:
    """Hold the file `lock` while the block runs; the system frees it however the program ends.

    If another program holds it: print `busy` and wait, or, without `wait`, raise UserError with that text.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
        print(busy, flush=True)
        held.acquire()
    except NotImplementedError:  # a network file system without locks: as careful as it can be is without
        pass
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn an OSError into a UserError that says what could not be opened or written: a full disk's does not."""
    try:
        yield
    except BrokenPipeError:  # the reader has gone, which is no error; see run_script
        raise
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None


@contextlib.contextmanager
def open_new(path: Path, flag: str) -> Iterator[TextIO]:
    """A new file to write lines to; UserError if it is there already: stories are never overwritten.

    Whatever ends it, a full disk included, only whole lines stay, and no empty file.
    """
    if path.exists():
        raise UserError(f"{flag} {path}: is there already; name another file, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}: make it, or name another file")
    with naming(f"{flag} {path}"):
        file = path.open("x", encoding="utf-8", newline="\n")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # a full disk has been told
            file.close()
        with contextlib.suppress(OSError):
            whole_lines = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole_lines)  # which takes no room
            if not whole_lines:
                path.unlink()
