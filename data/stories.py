"""Where stories come from: the TinyStories data set, other hub data sets, local files, or the offline story maker.

    for story in open_stories(config.data, "train"): ...

Everything is streamed in bounded memory. What cannot be read is a UserError, one line: the file, the line or number of
the story in it, what was found, what to set.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from config.cli import UserError
from config.schema import DataConfig
from config.values import one_line
from data.readers import EXTENSIONS, choose_column, read_files, read_rows

TINYSTORIES = "roneneldan/TinyStories"
SAMPLE_STORIES, SAMPLE_VALIDATION = 20_000, 10**9  # the train split's default size; where the validation stories start
CLEANING_VERSION = 1  # raise it when cleaning changes: token files made before are then rebuilt
SHORT, CLOSING = 100, ".!?…\"'”’»)"  # a text of fewer characters that ends in none of these was cut off


@dataclass
class Stories:
    """One split of a corpus, streamed: iterate to read it, again to read it again."""

    name: str  # one phrase for messages, e.g. "roneneldan/TinyStories, train"
    identity: dict[str, Any]  # plain JSON values, equal only where iterating gives the same stories
    total_bytes: int | None  # about how many bytes of text iterating yields (of JSON: at most); None: unknown
    _read: Callable[[], Iterable[str]] = field(repr=False)  # the texts as the source has them
    _keep: Callable[[str], bool] | None = field(repr=False, default=None)  # is it this split's, and not the other's?
    _limit: int | None = None
    _clean: bool = True
    # Of the last pass. stories and bytes (UTF-8): yielded; empty, stubs, unrepairable, held_out (by the other split):
    # left out; repaired: texts that a repair of their encoding saved
    counts: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[str]:
        """The stories, cleaned. Raises UserError for a text that cannot be read, and at the end if there was none."""
        counts = self.counts = Counter()
        for text in self._read():
            text = _clean(text, counts) if self._clean else _as_it_is(text, counts, self.name)
            if not text:
                continue
            if self._keep and not self._keep(text):
                counts["held_out"] += 1
                continue
            counts["stories"] += 1
            counts["bytes"] += len(text) if text.isascii() else len(text.encode("utf-8"))
            yield text
            if counts["stories"] == self._limit:
                break
        if not counts["stories"]:
            dropped = {key: counts[key] for key in ("empty", "stubs", "unrepairable", "held_out") if counts[key]}
            dropped = {key.replace("held_out", "kept for the other split"): number for key, number in dropped.items()}
            why = ", ".join(f"{number} {key}" for key, number in dropped.items())
            why = f"all {sum(dropped.values())} stories were dropped: {why}" if dropped else "there is no story in it"
            advice = "; set data.validation, or another data.validation_fraction" if counts["held_out"] else ""
            raise UserError(f"{self.name}: {why}{advice}")


def open_stories(data: DataConfig, split: Literal["train", "validation"]) -> Stories:
    """The split that `data` describes. Raises UserError if there is no such source.

    Validation is data.validation if that is set (its validation split if it has one, else all of it), else the
    validation split of data.dataset if it has one, else a share of the stories chosen by a hash of their text.
    """
    elsewhere = data.validation not in (None, data.dataset)
    if not elsewhere:
        sources = _open("data.dataset", data.dataset, data)
    elif split == "train":
        named = data.validation in ("tinystories", "sample")
        sources = _open("data.dataset", data.dataset, data, [] if named else _find_files(data.validation)[1])
    else:
        sources = _open("data.validation", data.validation, data)
        sources.setdefault("validation", next(iter(sources.values())))
    hold_out = not elsewhere and "validation" not in sources
    wanted = "train" if hold_out else split
    if (stories := sources.get(wanted)) is None:
        raise UserError(f"data.dataset {data.dataset}: has no {wanted} split, only {', '.join(sources)}")
    if data.text_column and not stories.identity.keys() & {"column", "text_column"}:
        _say_once(f"note: data.text_column is {data.text_column}, but {stories.name} has no fields: all of it is read")
    stories.name += f", {split}"
    stories._clean = data.clean
    stories.identity["clean"] = CLEANING_VERSION if data.clean else False
    if hold_out:
        share, other = data.validation_fraction, split == "validation"
        stories._keep = lambda text: (_place(text) < share) == other
        stories.identity["held_out"] = [split, share]
        stories.name += f" ({share:g} of the stories held out)"
        if stories.total_bytes is not None:
            stories.total_bytes = round(stories.total_bytes * (share if other else 1 - share))
    if split == "train" and data.max_stories is not None:
        stories.identity["max_stories"] = stories._limit = data.max_stories
        stories.total_bytes = None
    return stories


def _place(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: duplicates stay on one side, in any order and every run."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest(), "big") / 2**64


# ---- sources: from a setting to the splits that it has


def _open(key: str, spec: str, data: DataConfig, excluded: list[Path] | None = None) -> dict[str, Stories]:
    """The splits of a source by name. `key` is the setting that `spec` is the value of.

    `excluded`, the files that data.validation names, says that this source need not have a validation split.
    """
    path, title = Path(os.path.expanduser(spec)), f"{key} {one_line(spec)}"
    if spec == "sample":
        return _open_sample(data)
    if spec == "tinystories":
        return _open_rows(f"{title} ({TINYSTORIES})", TINYSTORIES, data)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_rows(title, path, data)
    if path.exists() or path.suffix.lower() in EXTENSIONS or re.search(r"[*?\[\\]|^[./~]|^[A-Za-z]:|/.*/|/$", spec):
        return _open_files(title, spec, data, excluded)
    if "/" in spec:
        return _open_rows(title, spec, data)
    near = difflib.get_close_matches(spec.lower(), ("tinystories", "sample"), 1)
    hint = f"did you mean {near[0]}?" if near else "known: tinystories, sample, a hub id owner/name, a file, a folder"
    raise UserError(f"{title}: no such data set, file or folder; {hint}")


def _open_sample(data: DataConfig) -> dict[str, Stories]:
    from data import sample

    count = data.max_stories or SAMPLE_STORIES
    size = max(200, count // 50)
    maker = hashlib.sha256(Path(sample.__file__).read_bytes()).hexdigest()  # an edited maker makes other stories

    def train() -> Iterator[str]:
        return islice(sample.sample_stories(0), count)

    def validation() -> Iterator[str]:
        seen = {_place(story) for story in train()}
        candidates = islice(sample.sample_stories(0, SAMPLE_VALIDATION), 10 * size)
        return islice((story for story in candidates if _place(story) not in seen), size)

    identity = {"source": "sample", "maker": maker, "seed": 0, "train": count}
    return {"train": Stories("sample", identity, None, train),
            "validation": Stories("sample", identity | {"validation": size}, None, validation)}


def _open_rows(title: str, source: str | Path, data: DataConfig) -> dict[str, Stories]:
    """A hub id, or the folder of a save_to_disk(): both open as a data set of the `datasets` library."""
    import datasets

    # its retries are many lines; what comes of them is one
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    saved = isinstance(source, Path)
    if not (saved or datasets.config.HF_HUB_OFFLINE):
        _say_once(f"stories: asking the hub for {source} (without a connection it gives up after half a minute; "
                  "HF_HUB_OFFLINE=1 asks only for what was downloaded before)")
    try:
        loaded = datasets.load_from_disk(str(source)) if saved else datasets.load_dataset(source)
    except Exception as error:  # OSError, ValueError, RuntimeError, DatasetsError, httpx's: they share no nearer base
        problem = "a saved data set that cannot be opened" if saved else (
            "no file or folder here, and not to be had from the Hugging Face hub; check the name and the connection, "
            "or download its .txt files and name their folder, or use sample, which needs no network")
        raise UserError(f"{title}: {problem} ({one_line(error)})") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    sources = {}
    for split in [name for name in splits if name in ("train", "validation")] or list(splits):
        where = f"{title}, {split}"
        column = choose_column(splits[split].column_names, data, where)
        rows = splits[split].select_columns([column])
        files = sorted(Path(entry["filename"]) for entry in rows.cache_files)
        # the hub's cache names the folder of a file by its revision; the rest of the path is this machine's
        files = [entry for file in files for entry in _describe(file.parent, [file])] if saved else [
            f"{file.parent.name}/{file.name}" for file in files]
        identity = {"source": "saved" if saved else source, "split": split, "column": column, "rows": len(rows),
                    "files": files}
        sources[split] = Stories(str(source), identity, rows.data.nbytes, partial(read_rows, rows, column, where))
    return sources


@cache  # once, though each split is opened by itself
def _say_once(line: str) -> None:
    print(line, flush=True)


def _open_files(title: str, spec: str, data: DataConfig, excluded: list[Path] | None) -> dict[str, Stories]:
    base, files = _find_files(spec)
    if not files:
        path, allowed = Path(os.path.expanduser(spec)), ", ".join(EXTENSIONS)
        raise UserError(f"{title}: " + (f"no {allowed} file in it" if path.is_dir() else
                                        f"not a kind of file that can be read; allowed: {allowed}" if path.exists() else
                                        "no such file or folder"))
    if excluded is None:
        valid = [path for path in files if _is_validation(path.relative_to(base))]
    else:
        valid, paths = [], {path.resolve() for path in excluded}
        files = [path for path in files if path.resolve() not in paths]
        if not files:
            raise UserError(f"{title}: data.validation names all of it too, which leaves nothing to train on")
    train = [path for path in files if path not in set(valid)]
    splits = {"train": train, "validation": valid} if train and valid else {"train": files}
    sources = {}
    for split, paths in splits.items():
        kinds = {path.suffix.lower() for path in paths}
        size = None if ".parquet" in kinds else sum(path.stat().st_size for path in paths)  # parquet is compressed
        identity = {"source": "files", "files": _describe(base, paths)}
        identity |= {} if kinds == {".txt"} else {"text_column": data.text_column}
        sources[split] = Stories(spec, identity, size, partial(read_files, paths, data))
    return sources


def _find_files(spec: str) -> tuple[Path, list[Path]]:
    """The files of a file, folder or glob (none if it is not there), and the folder their names are relative to."""
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        base, found = path, path.rglob("*")
    elif path.exists():
        base, found = path.parent, [path]
    else:
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        found = map(Path, glob.glob(str(path), recursive=True))
    names = {file.relative_to(base).as_posix(): file for file in found
             if file.suffix.lower() in EXTENSIONS and file.is_file()}
    # hidden ones (.ipynb_checkpoints, macOS's ._train.txt) are nobody's stories unless asked for
    files = {name: file for name, file in names.items() if "/." not in f"/{name}" or file == path}
    return base, [files[name] for name in sorted(files)]


def _is_validation(path: Path) -> bool:
    return "valid" in path.name.lower() or any(part.lower() in ("valid", "validation") for part in path.parts[:-1])


def _describe(base: Path, paths: list[Path]) -> list[list[Any]]:
    """Name, size and time of change of each file: plain values that differ when a file does."""
    return [[path.relative_to(base).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


# ---- cleaning


def _clean(text: str, counts: Counter[str]) -> str:
    """The story without outer white space and with its encoding repaired, or "" if it is left out; counts why."""
    text = text.strip()
    if not text:
        counts["empty"] += 1
    elif not text.isascii() and not (text := _repair(text, counts)):
        counts["unrepairable"] += 1
    elif len(text) < SHORT and text[-1] not in CLOSING:
        counts["stubs"] += 1
        return ""
    return text


def _repair(text: str, counts: Counter[str]) -> str:
    """The text with mojibake such as `â€œ` undone, or "" where that fails or characters are lost."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return ""
    from ftfy import fix_encoding  # here, since generate.py starts without it a tenth of a second sooner
    from ftfy.badness import is_bad

    if damaged := is_bad(text):
        # `â€` alone was a closing quote whose third byte, undefined in cp1252, got lost; ftfy would read a dagger
        text = fix_encoding(re.sub("â€(?=[\x00-\x7fâ]|$)", "”", text)).strip()
    if "\ufffd" in text or (damaged and is_bad(text)):
        return ""
    counts["repaired"] += damaged
    return text


def _as_it_is(text: str, counts: Counter[str], name: str) -> str:
    """The text, or "" if it is empty; counts it. Raises UserError if no file could hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        number = counts["stories"] + counts["empty"] + counts["held_out"] + 1
        raise UserError(f"{name}: story {number} holds half of a character (\\u{ord(text[error.start]):x}); "
                        "data.clean: true leaves such stories out") from None
    if text.strip():
        return text
    counts["empty"] += 1
    return ""
