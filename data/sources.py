"""From the setting data.dataset or data.validation to the splits of that source: their texts, and what identifies them.

A source is TinyStories, another Hugging Face data set, local files, or the synthetic story generator. data/stories.py
makes the training and the validation split of what a source has.
"""

import difflib
import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from config import UserError
from config.schema import DataConfig
from config.wording import counted, one_line
from data.readers import READERS, columns_of, kind_of, read_files, read_rows

TINYSTORIES = "roneneldan/TinyStories"
V2_FILES = {"train": "TinyStoriesV2-GPT4-train.txt", "validation": "TinyStoriesV2-GPT4-valid.txt"}
SAMPLE_SIZE, SAMPLE_VALIDATION = 20_000, 10**9  # default size of the train split; number of the first validation story
SPLIT_WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
               "validation": "validation", "dev": "validation", "test": "test"}  # as the `datasets` library has them
KINDS = ", ".join(READERS) + ", each also as .gz"


@dataclass
class Source:
    """One split of a source."""

    name: str  # for messages
    identity: dict[str, Any]  # plain JSON values, equal only if the texts are the same
    total_bytes: int | None  # estimated bytes of text (for JSON an upper bound); None: unknown
    read: Callable[[], Iterable[str | None]]  # yields the texts as the source has them; None: null or missing
    plain: bool = False  # its texts are not fields of records


def open_source(key: str, spec: str, data: DataConfig, excluded: list[Path] | None = None) -> dict[str, Source]:
    """The splits of a source by name. `spec` is the value of the setting `key`. Raises UserError.

    excluded: the files of data.validation, if that is set; this source then needs no validation split.
    """
    path, title = Path(os.path.expanduser(spec)), f"{key} {one_line(spec)}"
    if spec == "sample":
        return _open_sample(data)
    if spec == "tinystories":
        return _open_rows(f"{title} ({TINYSTORIES})", TINYSTORIES, None, data)
    if spec == "tinystories-v2":
        return _open_tinystories_v2(title, data)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_rows(title, path, None, data)
    if path.exists() or kind_of(path) or re.search(r"[*?\[\\]|^[./~]|^[A-Za-z]:[\\/]|/.*/|/$", spec):
        return _open_files(title, spec, data, excluded)
    if "/" in spec:
        name, _, configuration = spec.partition(":")
        return _open_rows(title, name, configuration or None, data)
    known = ("tinystories", "tinystories-v2", "sample")
    near = difflib.get_close_matches(spec.lower(), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, a hub id owner/name, a file, a folder"
    raise UserError(f"{title}: no such data set, file or folder; {hint}")


def hash_to_unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that duplicates are in one split, in every run."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def _open_sample(data: DataConfig) -> dict[str, Source]:
    from data import synthetic_stories as generator

    count = data.max_stories or SAMPLE_SIZE
    size = max(200, count // 50)
    files = Path(generator.__file__).read_bytes() + generator.TEXTS.read_bytes()  # if edited, other stories result

    def train() -> Iterator[str]:
        return islice(generator.synthetic_stories(0), count)

    def validation() -> Iterator[str]:
        seen = {hash_to_unit(story) for story in train()}
        candidates = islice(generator.synthetic_stories(0, SAMPLE_VALIDATION), 10 * size)
        return islice((story for story in candidates if hash_to_unit(story) not in seen), size)

    identity = {"source": "sample", "generator": hashlib.sha256(files).hexdigest(), "seed": 0, "train": count}
    return {"train": Source("sample", identity, None, train, True),
            "validation": Source("sample", identity | {"validation": size}, None, validation, True)}


# Hugging Face

def _open_rows(title: str, source: str | Path, configuration: str | None, data: DataConfig) -> dict[str, Source]:
    """A hub id, or a folder written by save_to_disk(): a data set of the `datasets` library."""
    import datasets

    # it logs each retry, but the outcome is reported in one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    saved = isinstance(source, Path)
    if not (saved or datasets.config.HF_HUB_OFFLINE):
        say_once(f"stories: asking the hub for {source} (without a connection, this fails after half a minute; "
                 "HF_HUB_OFFLINE=1 uses only what was downloaded before)")
    try:
        loaded = datasets.load_from_disk(str(source)) if saved else datasets.load_dataset(
            source, *([configuration] if configuration else []))
    except Exception as error:  # OSError, ValueError, RuntimeError, DatasetsError, httpx's: no other common base
        raise UserError(f"{title}: {_hub_problem(saved, str(source), error)}") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    sources = {}
    for split in [name for name in splits if name in ("train", "validation")] or list(splits):
        where = f"{title}, {split}"
        columns = columns_of(splits[split].column_names, data, where)
        rows = splits[split].select_columns(columns)
        files = sorted(Path(entry["filename"]) for entry in rows.cache_files)
        # in the hub's cache, the name of a file's folder is its revision; the path before depends on the machine
        files = [entry for file in files for entry in _describe(file.parent, [file])] if saved else [
            f"{file.parent.name}/{file.name}" for file in files]
        identity = {"source": "saved" if saved else str(source), "split": split, "column": columns[0],
                    "rows": len(rows), "files": files}
        identity |= {"configuration": configuration} if configuration else {}
        identity |= {"template": data.template} if data.template else {}
        name = f"{source}:{configuration}" if configuration else str(source)
        sources[split] = Source(name, identity, rows.data.nbytes, partial(read_rows, rows, data, where))
    return sources


def _hub_problem(saved: bool, source: str, error: Exception) -> str:
    configurations = re.search(r"available configs?: (\[.*?\])", str(error), re.S)
    if configurations:
        names = re.findall(r"'([^']+)'", configurations[1])
        return (f"has {counted(len(names), 'configuration')}: {', '.join(names[:40])}{', ...' * (len(names) > 40)}; "
                f"name one: data.dataset={source}:{names[0] if names else 'NAME'}")
    if saved:
        return f"a saved data set that cannot be opened ({one_line(error)})"
    return ("no such file or folder, and the Hugging Face hub did not return it; check the name and the connection, or "
            f"download its .txt files and name their folder, or use sample, which needs no network ({one_line(error)})")


def _open_tinystories_v2(title: str, data: DataConfig) -> dict[str, Source]:
    """The stories that GPT-4 alone wrote: two .txt files of the same hub repository, kept in the hub's cache."""
    from huggingface_hub import hf_hub_download

    sources = {}
    for split, file in V2_FILES.items():
        try:
            path = Path(hf_hub_download(TINYSTORIES, file, repo_type="dataset"))
        except Exception as error:  # as in _open_rows()
            raise UserError(f"{title} ({TINYSTORIES}): {_hub_problem(False, TINYSTORIES, error)}") from None
        # a file's folder in the cache is named by its revision
        identity = {"source": "tinystories-v2", "file": file, "revision": path.parent.name}
        sources[split] = Source(file, identity, path.stat().st_size, partial(read_files, [path], data), True)
    return sources


@cache  # once, although each split is opened separately
def say_once(line: str) -> None:
    print(line, flush=True)


# Local files

def _open_files(title: str, spec: str, data: DataConfig, excluded: list[Path] | None) -> dict[str, Source]:
    base, files = find_files(spec)
    if not files:
        path = Path(os.path.expanduser(spec))
        raise UserError(f"{title}: " + (f"no {KINDS} file in it" if path.is_dir() else
                                        f"not a kind of file that can be read; allowed: {KINDS}" if path.exists() else
                                        "no such file or folder"))
    if excluded is not None:
        paths = {path.resolve() for path in excluded}
        files = [path for path in files if path.resolve() not in paths]
        if not files:
            raise UserError(f"{title}: data.validation names all of its files too, so nothing is left to train on")
    splits = {"train": files}
    if len(files) > 1 or Path(os.path.expanduser(spec)).is_dir():  # a single file is used whatever its name
        by_split = {name: [path for path in files if split_of(path.relative_to(base)) == name]
                    for name in ("train", "validation", "test")}
        if excluded is not None:
            by_split = {"train": by_split["train"] + by_split["validation"], "validation": [],
                        "test": by_split["test"]}
        if by_split["train"]:
            splits = {name: paths for name, paths in by_split.items() if paths}
            say_once("stories: " + "; ".join(f"{name}: {_names(paths, base)}" for name, paths in splits.items())
                     + (" (not used)" if by_split["test"] else ""))
            splits.pop("test", None)
    sources = {}
    for split, paths in splits.items():
        kinds = {kind_of(path) for path in paths}
        packed = ".parquet" in kinds or any(path.suffix.lower() == ".gz" for path in paths)
        identity = {"source": "files", "files": _describe(base, paths)}
        identity |= {} if kinds == {".txt"} else {"text_column": data.text_column}
        identity |= {"template": data.template} if data.template and kinds != {".txt"} else {}
        identity |= {"separator": data.separator} if ".txt" in kinds and data.separator != "<|endoftext|>" else {}
        sources[split] = Source(spec, identity, None if packed else sum(path.stat().st_size for path in paths),
                                partial(read_files, sorted(paths), data), kinds == {".txt"})
    return sources


def find_files(spec: str) -> tuple[Path, list[Path]]:
    """The files of a file, folder or glob (perhaps none), and the folder that their names are relative to."""
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        base, found = path, _walk(path)
    elif path.exists():
        base, found = path.parent, [path]
    else:
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        found = map(Path, glob.glob(str(path), recursive=True))
    names = {file.relative_to(base).as_posix(): file for file in found if kind_of(file) and file.is_file()}
    # hidden files (.ipynb_checkpoints, macOS's ._train.txt) hold no stories, unless one is named
    files = {name: file for name, file in names.items() if "/." not in f"/{name}" or file == path}
    return base, [files[name] for name in sorted(files)]


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, linked folders included, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, file) for file in files)


def split_of(path: Path) -> str:
    """The split that a file belongs to, by the whole words of its name, or else of its folders' names."""
    for part in reversed(path.parts):
        words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_WORDS]
        if words:
            return words[-1]
    return "train"


def _names(paths: list[Path], base: Path) -> str:
    names = [path.relative_to(base).as_posix() for path in paths]
    return ", ".join(names[:3]) + (f", ... ({counted(len(names), 'file')})" if len(names) > 3 else "")


def _describe(base: Path, paths: list[Path]) -> list[list[Any]]:
    """Name, size and modification time of each file: plain values that change when a file does."""
    return [[path.relative_to(base).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
