"""Where stories come from: TinyStories, other Hugging Face data sets, local files, or the synthetic story generator.

    for story in open_stories(config.data, "train"): ...

Stories are streamed in bounded memory. A source that cannot be read raises UserError, one line: the file, the line or
number of the story in it, what was found, what to set.
"""

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

from config import UserError
from config.schema import DataConfig
from config.values import one_line
from data.cleaning import CLEANING_VERSION, clean, keep_as_is
from data.readers import EXTENSIONS, choose_column, read_files, read_rows

TINYSTORIES = "roneneldan/TinyStories"
SAMPLE_SIZE, SAMPLE_VALIDATION = 20_000, 10**9  # default size of the train split; number of the first validation story


@dataclass
class Stories:
    """One split of a corpus, streamed. Each iteration reads it from the start."""

    name: str  # one phrase for messages, e.g. "roneneldan/TinyStories, train"
    identity: dict[str, Any]  # plain JSON values, equal only if the stories are the same
    total_bytes: int | None  # estimated bytes of text (for JSON an upper bound); None: unknown
    _read: Callable[[], Iterable[str]] = field(repr=False)  # yields the texts as the source has them
    _keep: Callable[[str], bool] | None = field(repr=False, default=None)  # whether a story is in this split
    _limit: int | None = None
    _clean: bool = True
    # of the last iteration. stories and bytes (UTF-8) of what was yielded; left out: empty, stubs (cut off),
    # unrepairable, held_out (in the other split); repaired: yielded with a repaired encoding
    counts: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[str]:
        """The stories, cleaned. Raises UserError for a text that cannot be read, and at the end if there was none."""
        counts = self.counts = Counter()
        for text in self._read():
            text = clean(text, counts) if self._clean else keep_as_is(text, counts, self.name)
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
    validation split of data.dataset if it has one, else a fraction of the stories, chosen by a hash of their text.
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
        _say_once(f"note: data.text_column is {data.text_column}, but {stories.name} has no fields: all text is read")
    stories.name += f", {split}"
    stories._clean = data.clean
    stories.identity["clean"] = CLEANING_VERSION if data.clean else False
    if hold_out:
        fraction, held_out = data.validation_fraction, split == "validation"
        stories._keep = lambda text: (_hash_to_unit(text) < fraction) == held_out
        stories.identity["held_out"] = [split, fraction]
        stories.name += f" ({fraction:g} of the stories held out)"
        if stories.total_bytes is not None:
            stories.total_bytes = round(stories.total_bytes * (fraction if held_out else 1 - fraction))
    if split == "train" and data.max_stories is not None:
        stories.identity["max_stories"] = stories._limit = data.max_stories
        stories.total_bytes = None
    return stories


def _hash_to_unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that duplicates are in one split, in every run."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest(), "big") / 2**64


# Sources: from a setting to its splits

def _open(key: str, spec: str, data: DataConfig, excluded: list[Path] | None = None) -> dict[str, Stories]:
    """The splits of a source by name. `spec` is the value of the setting `key`.

    excluded: the files of data.validation, if that is set; this source then needs no validation split.
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
    from data import synthetic_stories as generator

    count = data.max_stories or SAMPLE_SIZE
    size = max(200, count // 50)
    sources = Path(generator.__file__).read_bytes() + generator.TEXTS.read_bytes()  # if edited, other stories result

    def train() -> Iterator[str]:
        return islice(generator.synthetic_stories(0), count)

    def validation() -> Iterator[str]:
        seen = {_hash_to_unit(story) for story in train()}
        candidates = islice(generator.synthetic_stories(0, SAMPLE_VALIDATION), 10 * size)
        return islice((story for story in candidates if _hash_to_unit(story) not in seen), size)

    identity = {"source": "sample", "generator": hashlib.sha256(sources).hexdigest(), "seed": 0, "train": count}
    return {"train": Stories("sample", identity, None, train),
            "validation": Stories("sample", identity | {"validation": size}, None, validation)}


def _open_rows(title: str, source: str | Path, data: DataConfig) -> dict[str, Stories]:
    """A hub id, or a folder written by save_to_disk(): a data set of the `datasets` library."""
    import datasets

    # it logs each retry, but the outcome is reported in one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    saved = isinstance(source, Path)
    if not (saved or datasets.config.HF_HUB_OFFLINE):
        _say_once(f"stories: asking the hub for {source} (without a connection, this fails after half a minute; "
                  "HF_HUB_OFFLINE=1 uses only what was downloaded before)")
    try:
        loaded = datasets.load_from_disk(str(source)) if saved else datasets.load_dataset(source)
    except Exception as error:  # OSError, ValueError, RuntimeError, DatasetsError, httpx's: no other common base
        problem = "a saved data set that cannot be opened" if saved else (
            "no such file or folder, and the Hugging Face hub did not return it; check the name and the connection, "
            "or download its .txt files and name their folder, or use sample, which needs no network")
        raise UserError(f"{title}: {problem} ({one_line(error)})") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    sources = {}
    for split in [name for name in splits if name in ("train", "validation")] or list(splits):
        where = f"{title}, {split}"
        column = choose_column(splits[split].column_names, data, where)
        rows = splits[split].select_columns([column])
        files = sorted(Path(entry["filename"]) for entry in rows.cache_files)
        # in the hub's cache, the name of a file's folder is its revision; the path before depends on the machine
        files = [entry for file in files for entry in _describe(file.parent, [file])] if saved else [
            f"{file.parent.name}/{file.name}" for file in files]
        identity = {"source": "saved" if saved else source, "split": split, "column": column, "rows": len(rows),
                    "files": files}
        sources[split] = Stories(str(source), identity, rows.data.nbytes, partial(read_rows, rows, column, where))
    return sources


@cache  # once, although each split is opened separately
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
            raise UserError(f"{title}: data.validation names all of its files too, so nothing is left to train on")
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
    """The files of a file, folder or glob (perhaps none), and the folder that their names are relative to."""
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
    # hidden files (.ipynb_checkpoints, macOS's ._train.txt) hold no stories, unless one is named
    files = {name: file for name, file in names.items() if "/." not in f"/{name}" or file == path}
    return base, [files[name] for name in sorted(files)]


def _is_validation(path: Path) -> bool:
    return "valid" in path.name.lower() or any(part.lower() in ("valid", "validation") for part in path.parts[:-1])


def _describe(base: Path, paths: list[Path]) -> list[list[Any]]:
    """Name, size and modification time of each file: plain values that change when a file does."""
    return [[path.relative_to(base).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
