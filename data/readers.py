"""From a file to its texts: .txt, JSON arrays or lines, .csv, .tsv and .parquet, each also as .gz. All are streamed.

A record of several fields becomes one text, by data.text_column or data.template. None stands for a null or missing
text. A file that cannot be read raises UserError, one line: the file, the line or number of the story in it, what was
found, what to set. data/sources.py decides which files to read.
"""

import csv
import gzip
import io
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError
from config.schema import DataConfig
from config.wording import format_bytes, one_line, show

SEPARATOR = "<|endoftext|>"  # the default of data.separator; in a record it separates stories, too
CHUNK = 1 << 18  # bytes (for JSON characters) read at once
MAX_OBJECT = 1 << 28  # characters of a JSON object
SEARCHED = 1000  # the field of the text must occur in the first so many objects


def read_files(paths: list[Path], data: DataConfig) -> Iterator[str | None]:
    """The texts of the files, one after another."""
    for path in paths:
        try:
            yield from READERS[kind_of(path)](path, data)
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: cannot be read as gzip: {one_line(error)}") from None


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, without .gz; "" if it is none of READERS."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = (suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]) or [""]
    return kind[0] if kind[0] in READERS else ""


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_txt(path: Path, data: DataConfig) -> Iterator[str]:
    """UTF-8, split at data.separator. One newline on each side of a separator that is no newline itself is layout."""
    # \n may be two characters: in a YAML without double quotes, and where a shell took the quotes away
    separator = data.separator.replace("\\n", "\n").replace("\r\n", "\n").encode("utf-8")
    line_ends = b"\n" in separator

    def story(piece: bytes) -> str:
        start = piece.startswith((b"\n", b"\r\n")) + piece.startswith(b"\r\n")
        piece = piece if line_ends else piece[start:len(piece) - piece.endswith(b"\n") - piece.endswith(b"\r\n")]
        return piece.decode("utf-8")

    with _open(path) as file:
        chunks = iter(lambda: file.read(CHUNK), b"")
        first = next(chunks, b"").removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows editors
        # as if after a separator, so that the first story keeps its newlines
        chunks = chain([first] if line_ends else [b"\n", first], chunks)
        try:
            for piece in _split(_unix_lines(chunks) if line_ends else chunks, separator):
                if piece.strip():
                    yield story(piece)
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _unix_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks with CRLF as LF."""
    rest = b""
    for chunk in chunks:
        chunk = rest + chunk
        rest = b"\r" if chunk.endswith(b"\r") else b""
        yield chunk[:len(chunk) - len(rest)].replace(b"\r\n", b"\n")
    yield rest


def _split(chunks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """The pieces between separators, in time linear in the size of a piece: a text may be one piece of a gigabyte."""
    parts, tail, keep = [], b"", len(separator) - 1  # a separator may lie across two chunks
    for chunk in chunks:
        first, *others = (tail + chunk).split(separator)
        for other in others:
            yield b"".join([*parts, first])
            parts, first = [], other
        cut = max(0, len(first) - keep)
        parts.append(first[:cut])
        tail = first[cut:]
    yield b"".join([*parts, tail])


def _not_utf8(path: Path) -> UserError:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return UserError(f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; convert it")
    return UserError(f"{path}: not UTF-8")


def _read_json(path: Path, data: DataConfig) -> Iterator[str | None]:
    """Objects in one array, or one a line. Each is decoded on its own; what is between them is skipped."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    buffer, start, end, line, number, text_of, first = "", 0, 0, 1, 1, None, None
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        while True:
            last, start = start, between.match(buffer, end).end()
            line += buffer.count("\n", last, start)
            where = f"{path}, line {line}, object {number}"
            try:
                record, end = decode(buffer, start)
            except (ValueError, RecursionError) as error:  # also where the buffer ends inside an object
                left = len(buffer) - start
                try:
                    chunk = file.read(max(CHUNK, left))  # twice as much each time, so that the time is linear
                except UnicodeDecodeError:
                    raise _not_utf8(path) from None
                if not chunk and not left:
                    if first:  # no object had the field
                        columns_of(*first)
                    return
                if not chunk:
                    raise UserError(f"{where}: not valid JSON: {getattr(error, 'msg', 'nested too deep')}") from None
                if left > MAX_OBJECT:
                    raise UserError(f"{where}: larger than {format_bytes(MAX_OBJECT)}, or not valid JSON: split it, or "
                                    "save the text as .txt") from None
                buffer, start, end = buffer[start:] + chunk, 0, 0
                continue
            if not isinstance(record, dict):
                raise UserError(f"{where}: found {show(record)}, expected an object with the field text or story")
            if text_of is None and (has_text(record, data) or number == SEARCHED):
                text_of, first = make_reader(*(first if number == SEARCHED else (record, data, where))), None
            if text_of is None:
                first = first or (record, data, where)
            yield text_of(record, where) if text_of else None
            number += 1


def _read_csv(path: Path, data: DataConfig) -> Iterator[str | None]:
    """Comma- or tab-separated values with a line of names at the top."""
    limit = csv.field_size_limit(2**31 - 1)  # a field may be a whole novel
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if kind_of(path) == ".tsv" else ",")
            text_of = make_reader(rows.fieldnames or (), data, str(path))
            for row in rows:
                yield text_of(row, f"{path}, line {rows.line_num}")
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as {kind_of(path)[1:]}: {one_line(error)}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, data: DataConfig) -> Iterator[str | None]:
    import pyarrow.parquet

    try:
        with _open(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            text_of, columns = make_reader(names, data, str(path)), columns_of(names, data, str(path))
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000, columns=columns))
            for number, row in enumerate(rows, 1):
                yield text_of(row, f"{path}, row {number}")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {one_line(error)}") from None


READERS = {".txt": _read_txt, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
           ".parquet": _read_parquet}


def read_rows(rows: Any, data: DataConfig, where: str) -> Iterator[str | None]:
    """The texts of a `datasets` data set."""
    text_of, number = make_reader(rows.column_names, data, where), 0
    for batch in rows.iter(batch_size=1000):
        for number, values in enumerate(zip(*batch.values(), strict=True), number + 1):  # noqa: B020
            yield text_of(dict(zip(batch, values, strict=True)), f"{where}, row {number}")


# From a record to a text

def fields_of(data: DataConfig) -> list[str]:
    """The fields that make the text: those of data.template, or data.text_column, or else text or story."""
    if data.template:
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(data.template) if name))
    return [data.text_column] if data.text_column else ["text", "story"]


def has_text(record: Iterable[str], data: DataConfig) -> bool:
    """Whether a record, or a table with such columns, has the fields."""
    return (all if data.template else any)(name in record for name in fields_of(data))


def columns_of(names: Iterable[str], data: DataConfig, where: str) -> list[str]:
    """The fields that a table with these columns has of fields_of(). Raises UserError, which begins with `where`."""
    wanted, names = fields_of(data), list(names)
    if not has_text(names, data):
        missing = ", ".join(name for name in wanted if name not in names) if data.template else " or ".join(wanted)
        advice = "name others in data.template" if data.template else (
            "set data.text_column to the field that holds the story, or data.template to make a text of several")
        raise UserError(f"{where}: no field {missing}, only {one_line(', '.join(map(str, names)))}; {advice}")
    return [name for name in wanted if name in names]


def make_reader(names: Iterable[str], data: DataConfig, where: str) -> Callable[[dict, str], str | None]:
    """A function from a record and its place to its text, or None if that is null or missing. Raises UserError."""
    columns_of(names, data, where)
    wanted, kinds = fields_of(data), (str, int, float) if data.template else str

    def text_of(record: dict, where: str) -> str | None:
        values = {name: record[name] for name in wanted if record.get(name) is not None}
        for name, value in values.items():
            if not isinstance(value, kinds):
                raise UserError(f"{where}: {name} is {show(value)}, expected a text; data.text_column sets which field "
                                "is read")
        if data.template:
            return data.template.format_map(values) if len(values) == len(wanted) else None
        return next(iter(values.values()), None)

    return text_of


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
