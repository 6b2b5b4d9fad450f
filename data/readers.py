"""From a file to its texts: .txt split at `<|endoftext|>`, JSON arrays or lines, parquet. All are streamed.

A file that cannot be read raises UserError, one line: the file, the line or number of the story in it, what was found,
what to set. data/stories.py decides which files to read.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from config import UserError
from config.schema import DataConfig
from config.values import one_line, show

EXTENSIONS = (".txt", ".jsonl", ".json", ".parquet")
SEPARATOR = b"<|endoftext|>"  # between the stories of a .txt file
CHUNK = 1 << 18  # bytes (for JSON characters) read at once
LONGEST = 1 << 24  # bytes; a longer text means that the file has another layout


def read_files(paths: list[Path], data: DataConfig) -> Iterator[str]:
    """The texts of the files, one after another, unchanged."""
    readers = {".txt": _read_txt, ".parquet": _read_parquet}
    for path in paths:
        yield from readers.get(path.suffix.lower(), _read_json)(path, data)


def _read_txt(path: Path, data: DataConfig) -> Iterator[str]:
    """UTF-8. One newline on each side of a separator (or at the end) is layout; all else belongs to the story."""
    def story(piece: bytes) -> str:
        start = piece.startswith((b"\n", b"\r\n")) + piece.startswith(b"\r\n")
        return piece[start:len(piece) - piece.endswith(b"\n") - piece.endswith(b"\r\n")].decode("utf-8")

    rest = b"\n"  # as if after a separator, so that the first story keeps its newlines
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # the byte order mark of Windows editors
            file.seek(0)
        try:
            while chunk := file.read(CHUNK):
                *pieces, rest = (rest + chunk).split(SEPARATOR)
                yield from map(story, pieces)
                if len(rest) > LONGEST:
                    raise UserError(f"{path}: {len(rest):,} bytes without <|endoftext|>, which separates stories")
            if rest.strip():
                yield story(rest)
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _read_json(path: Path, data: DataConfig) -> Iterator[str]:
    """Objects in one array, or one a line. Each is decoded on its own; what is between them is skipped."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    buffer, start, end, line, number, column = "", 0, 0, 1, 1, None
    with path.open(encoding="utf-8-sig", newline="") as file:
        while True:
            last, start = start, between.match(buffer, end).end()
            line += buffer.count("\n", last, start)
            where = f"{path}, line {line}, object {number}"
            try:
                record, end = decode(buffer, start)
            except (ValueError, RecursionError) as error:  # also where the buffer ends inside an object
                try:
                    chunk = file.read(CHUNK)
                except UnicodeDecodeError:
                    raise _not_utf8(path) from None
                if not chunk and start == len(buffer):
                    return
                if not chunk or len(buffer) - start > LONGEST:
                    raise UserError(f"{where}: not valid JSON: {getattr(error, 'msg', 'nested too deep')}") from None
                buffer, start, end = buffer[start:] + chunk, 0, 0
                continue
            if not isinstance(record, dict):
                raise UserError(f"{where}: found {show(record)}, expected an object with the field text or story")
            if column not in record:
                column = choose_column(record, data, where)
            yield _check_text(record[column], column, where)
            number += 1


def _not_utf8(path: Path) -> UserError:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return UserError(f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; convert it")
    return UserError(f"{path}: not UTF-8")


def _read_parquet(path: Path, data: DataConfig) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = choose_column(file.schema_arrow.names, data, str(path))
            batches = file.iter_batches(batch_size=1000, columns=[column])
            yield from _check_rows((batch.column(0).to_pylist() for batch in batches), column, str(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {one_line(error)}") from None


def read_rows(rows: Any, column: str, where: str) -> Iterator[str]:
    """The texts in a column of a `datasets` data set."""
    return _check_rows((batch[column] for batch in rows.iter(batch_size=1000)), column, where)


def choose_column(names: Iterable[str], data: DataConfig, where: str) -> str:
    """The field that holds the story: data.text_column, else text or story. UserError begins with `where`."""
    wanted = [data.text_column] if data.text_column else ["text", "story"]
    for name in wanted:
        if name in names:
            return name
    raise UserError(f"{where}: no field {' or '.join(wanted)}, only {one_line(', '.join(names))}; set data.text_column "
                    "to the field that holds the story")


def _check_rows(batches: Iterable[list], column: str, where: str) -> Iterator[str]:
    for number, value in enumerate(chain.from_iterable(batches), 1):
        yield value if isinstance(value, str) else _check_text(value, column, f"{where}, row {number}")


def _check_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{where}: {column} is {show(value)}, expected a text; data.text_column sets which field is read")


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--prompts_file {path}: {error.strerror}") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file {path}: no prompt in it; expected one a line")
    return prompts
