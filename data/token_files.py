"""Token files: all stories of a split as token ids, tokenized once and then memory-mapped.

A token file is `<name>.bin`, the ids of all stories in a row, each after one `<|endoftext|>` and one more at the very
end, as little-endian uint16 (uint32 for vocabularies past 65,536), beside `<name>.json` with its fingerprint, its
counts and a checksum. The JSON is written last, so a half-written .bin is never used.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from config import UserError
from config.schema import DataConfig
from config.wording import counted
from data.atomic_files import atomic_write, file_lock, remove_partial_files
from data.quality import NOTED, StoryChecks, describe_check
from data.stories import Stories, describe_counts, open_stories
from data.tokenizer import END_OF_STORY, article_mask, train_tokenizer
from data.word_cache import count_processes, encode_chunks

FORMAT = 2  # of the files
COUNTS = ("stories", "tokens", "bytes", "article_tokens")
MISFIT, FRESH_CHARACTERS = 0.6, 1_000_000  # a tokenizer with fewer bytes per token than that share does not fit
CHUNK_BYTES = 2_000_000  # of text given to the tokenizer library at once, which divides it among all cores


@dataclass(frozen=True)
class TokenFile:
    """A tokenized split. tokens: memmap of shape (counts["tokens"],)."""

    path: Path
    tokens: np.ndarray
    counts: dict[str, int]  # stories, tokens, bytes (of text), article_tokens
    digest: str  # equal only if tokens and COUNTS are equal
    examples: dict[str, str] = field(default_factory=dict)  # a text of each kind that was not kept as it was
    fresh: float = 0.0  # bytes per token of a tokenizer of this size made from this text; 0: unknown
    checks: list[dict[str, Any]] = field(default_factory=list)  # of data/quality.py; none in old files


def prepare_tokens(data: DataConfig, tokenizer: Tokenizer, split: str, show_progress: bool = True) -> TokenFile:
    """Open the token file of a split (train or validation); build it first if it is missing, stale or damaged."""
    stories = open_stories(data, split)
    corpus = data.validation if split == "validation" and data.validation else data.dataset
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(corpus).parts[-2:])).strip("-.")[-60:]
    path = Path(data.cache_dir).expanduser() / f"{name}.{split}.{Path(data.tokenizer_path).name}.bin"
    fingerprint = make_fingerprint(stories, tokenizer)
    found, reason = open_token_file(path, fingerprint)
    if found is None:
        busy = f"tokens: {path.name}: another program is building it: waiting"
        with file_lock(path.with_suffix(".lock"), busy, wait=True):
            found, reason = open_token_file(path, fingerprint)  # the other program may have built it
            if found is None:
                print(f"tokens: {path.name}: {reason}, building it from {stories.name}")
                fresh = fresh_bytes_per_token(stories, tokenizer) if split == "train" else 0.0
                build_token_file(stories, tokenizer, path, fingerprint, show_progress, fresh)
                found, reason = open_token_file(path, fingerprint)
                for check in found.checks if found and data.check_quality else ():
                    if check["number"]:
                        print(f"quality: {split}: {describe_check(check)}")
        if found is None:
            raise UserError(f"{path}: {reason} right after it was built: check this disk")
    else:
        print(f"tokens: {path.name}: reused")
    print(f"tokens: {split}: {describe_tokens(found.counts)}, from {stories.name}")
    held_out = "held out for validation" if split == "train" else "that are in the training split"
    notes = describe_counts(found.counts, found.examples, held_out)
    if found.counts.get("limited"):
        notes += f"{'; ' * bool(notes)}only the first {data.max_stories:,} (data.max_stories), and there are more"
    if notes:
        print(f"tokens: {split}: {notes}")
    for check in found.checks:
        if check["name"].endswith(NOTED):
            print(f"note: {split}: {describe_check(check)}; data.deduplicate: true leaves them out")
    bytes_per_token = found.counts["bytes"] / found.counts["tokens"]
    if bytes_per_token < MISFIT * found.fresh:
        print(f"warning: the tokenizer was made from other text: {bytes_per_token:.2f} bytes per token, where one made "
              f"from this text has {found.fresh:.2f}; for a new model, set data.tokenizer_path to a new folder")
    return found


def describe_tokens(counts: dict[str, int]) -> str:
    """Stories, tokens, bytes per token, and for English text the percentage of articles among the tokens."""
    stories, tokens = counted(counts["stories"], "story"), max(1, counts["tokens"])
    line = f"{stories}, {counts['tokens']:,} tokens, {counts['bytes'] / tokens:.2f} bytes per token"
    if not has_english(counts):
        return line
    return f"{line}, articles {100 * counts['article_tokens'] / tokens:.1f}% of tokens"


def has_english(counts: dict[str, int]) -> bool:
    """Whether the text is English, as is_english() does, by the counts of its token file."""
    return counts.get("the_tokens", counts["article_tokens"]) > 0.01 * counts["tokens"]


def fresh_bytes_per_token(stories: Stories, tokenizer: Tokenizer) -> float:
    """Bytes per token that a tokenizer of the same size reaches on the beginning of these stories, trained on it."""
    total, start = 0, []
    for story in stories:
        start.append(story)
        total += len(story)
        if total > FRESH_CHARACTERS:
            break
    fresh = train_tokenizer(start, tokenizer.get_vocab_size(), show_progress=False)
    tokens = sum(len(encoding.ids) for encoding in fresh.encode_batch(start, add_special_tokens=False))
    return sum(len(story.encode("utf-8")) for story in start) / max(1, tokens)


def make_fingerprint(stories: Stories, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a token file is made from. Files with equal fingerprints hold the same tokens."""
    return {"format": FORMAT, "tokenizer": hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest(),
            "source": stories.identity, "separator": END_OF_STORY, "dtype": _dtype(tokenizer).name}


def open_token_file(path: Path, fingerprint: dict[str, Any]) -> tuple[TokenFile | None, str]:
    """The token file if it is complete and has this fingerprint, else None and the reason."""
    try:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        counts = {key: int(count) for key, count in header["counts"].items()} | {
            key: int(header["counts"][key]) for key in COUNTS}
        examples, fresh = dict(header.get("examples", {})), float(header.get("fresh", 0))
        checks = list(header.get("checks", []))
        found, digest = header["fingerprint"], str(header["digest"])
        if header.pop("checksum", None) not in (None, checksum(header)):  # None: of an earlier version
            raise ValueError
    except FileNotFoundError:
        return None, "missing" if not path.exists() else "half-written"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None, "its .json is damaged"
    changed = [key for key in fingerprint if not isinstance(found, dict) or found.get(key) != fingerprint[key]]
    if changed:
        return None, f"stale ({' and '.join(changed)} changed)"
    dtype = np.dtype(fingerprint["dtype"]).newbyteorder("<")
    if not path.is_file() or path.stat().st_size != counts["tokens"] * dtype.itemsize or not counts["tokens"]:
        return None, "damaged (its size is not what its .json says)"
    if digest != make_digest(path, counts):  # 2 GB/s: half a second for all of TinyStories
        return None, "damaged (its checksum is not what its .json says)"
    return TokenFile(path, np.memmap(path, dtype=dtype, mode="r"), counts, digest, examples, fresh, checks), ""


def make_digest(path: Path, counts: dict[str, int]) -> str:
    """sha256 of a token file's counts and its bytes, read in pieces: mapped, they would take a gigabyte of memory."""
    digest = hashlib.sha256(json.dumps([counts[key] for key in COUNTS]).encode("utf-8"))
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def checksum(header: dict[str, Any]) -> str:
    """sha256 of the content of a .json."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8")).hexdigest()


def build_token_file(stories: Stories, tokenizer: Tokenizer, path: Path, fingerprint: dict[str, Any],
                     show_progress: bool = True, fresh: float = 0.0) -> None:
    """Encode all stories into `path`, in bounded memory. If it is interrupted, no usable file remains."""
    header, checks = path.with_suffix(".json"), StoryChecks(stories)
    stories = replace(stories, watch=checks.add)
    for name in (path.name, header.name):
        remove_partial_files(path.parent, name)
    with atomic_write(path) as file:
        counts = _encode_all(stories, tokenizer, file, show_progress)
        file.flush()
        digest = make_digest(Path(file.name), counts)
        header.unlink(missing_ok=True)  # so that there is never an old .json beside a new .bin
    made = {"fingerprint": fingerprint, "counts": counts, "examples": stories.counts.examples, "fresh": fresh,
            "digest": digest, "checks": checks.results(stories.counts)}
    with atomic_write(header) as file:
        file.write(json.dumps({**made, "checksum": checksum(made)}, indent=1).encode("utf-8"))


def _encode_all(stories: Stories, tokenizer: Tokenizer, file: BinaryIO, show_progress: bool) -> dict[str, int]:
    dtype, used = _dtype(tokenizer).newbyteorder("<"), np.zeros(tokenizer.get_vocab_size(), np.int64)
    separator = np.array(tokenizer.token_to_id(END_OF_STORY), dtype).tobytes()

    def write(ids: bytes) -> None:
        used[:] += np.bincount(np.frombuffer(ids, dtype), minlength=len(used))
        file.write(ids)

    with tqdm(total=stories.total_bytes, unit="B", unit_scale=True, desc="tokenize", leave=False,
              disable=None if show_progress else True) as progress:
        processes = count_processes(stories.total_bytes)
        for ids, num_bytes in encode_chunks(tokenizer, dtype, separator, _chunks(stories), processes):
            write(ids)
            progress.update(num_bytes)
    write(separator)
    counts = {"tokens": used.sum(), "article_tokens": used[article_mask(tokenizer)].sum(),
              "the_tokens": used[article_mask(tokenizer, ["the"])].sum(), **stories.counts}
    return {key: int(count) for key, count in counts.items()}


def _chunks(stories: Stories) -> Iterator[tuple[list[str], int]]:
    """Lists of stories, each of about CHUNK_BYTES, with its size in UTF-8 bytes."""
    chunk, start = [], 0
    for story in stories:
        chunk.append(story)
        if stories.counts["bytes"] - start >= CHUNK_BYTES:
            yield chunk, stories.counts["bytes"] - start
            chunk, start = [], stories.counts["bytes"]
    if chunk:
        yield chunk, stories.counts["bytes"] - start


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 65_536 else np.uint32)
