"""Text to token files to batches.

A token file is `<name>.bin`, the ids of all stories in a row, each after one `<|endoftext|>` and one more at the very
end, as little-endian uint16 (uint32 for vocabularies past 65,536), beside `<name>.json` with what it was made from,
what it holds, and a checksum of it all. The JSON is written last, so a half-written .bin is never believed.

A batch is cut from it in windows of seq_len + 1 tokens: the first seq_len are the inputs, the last seq_len the targets.
That is the one place where targets are shifted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tqdm import tqdm

from config import UserError
from config.files import only_one, remove_leftovers, replacing
from config.schema import DataConfig
from config.values import counted
from data.encoding import make_encoder
from data.stories import Stories, open_stories

if TYPE_CHECKING:
    import torch

END_OF_STORY = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_STORY, "<|padding|>", "<unk>")  # in this order from id 0
ARTICLES = ("a", "an", "the")
IGNORED = -100  # a target that counts for nothing: torch's default for cross_entropy
FORMAT = 2
COUNTS = ("stories", "tokens", "bytes", "article_tokens")
CHUNK_BYTES = 2_000_000  # of text handed to the tokenizer library at once: it shares a chunk out over all cores


# The tokenizer

def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer folder, or its tokenizer.json. Raises UserError."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer; train one with python train_custom_tokenizer.py")
    return tokenizer_from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def tokenizer_from_json(text: str, source: str) -> Tokenizer:
    """Build the tokenizer from the text of a tokenizer.json and check that it can be used here. Raises UserError.

    It must be able to encode every byte, and must know END_OF_STORY. Saved truncation and padding are dropped: they
    would cut stories without a word.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{source}: not a tokenizer.json ({str(error).splitlines()[0]}); train it anew") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a story or a prompt that spells "<|endoftext|>" is text like any other
    vocabulary = tokenizer.get_vocab()
    if END_OF_STORY not in vocabulary:
        raise UserError(f"{source}: has no {END_OF_STORY} token, which separates stories; train it anew")
    missing = sum(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    if missing:
        raise UserError(f"{source}: lacks {missing} of the 256 bytes, so it would lose text; train it anew")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{source}: its ids are not 0 to {len(vocabulary) - 1}, each once; train it anew")
    return tokenizer


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token id stands for, int64, shape (tokenizer's vocabulary size,). Special tokens have 0.

    A byte-level BPE spells one byte as one character, so a token's length is its number of bytes.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in SPECIAL_TOKENS else len(token)
    return lengths


def article_mask(tokenizer: Tokenizer) -> np.ndarray:
    """True for each token id that is the word a, an or the by itself, bool, shape (tokenizer's vocabulary size,).

    That is " a" with its space before it, or a capital at the start of a text or after a quotation mark ("The"). A
    bare "a" is left out: it is mostly a piece of a rarer word. (In a vocabulary too small for the text's common words,
    " a" begins some of them, and counts all the same.)
    """
    words = {"Ġ" + word for article in ARTICLES for word in (article, article.capitalize())}
    words |= {article.capitalize() for article in ARTICLES}
    mask = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for token, index in tokenizer.get_vocab().items():
        mask[index] = token in words
    return mask


# Token files

@dataclass(frozen=True)
class TokenFile:
    """A split, tokenized. tokens: memmap of shape (counts["tokens"],)."""

    path: Path
    tokens: np.ndarray
    counts: dict[str, int]  # stories, tokens, bytes (of text), article_tokens
    digest: str  # equal only for equal tokens and counts


def prepare_tokens(data: DataConfig, tokenizer: Tokenizer, split: str, show_progress: bool = True) -> TokenFile:
    """Open the token file of a split ("train" or "validation"); build it first if it is missing, stale or damaged."""
    stories = open_stories(data, split)
    corpus = data.validation if split == "validation" and data.validation else data.dataset
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(corpus).parts[-2:])).strip("-.")[-60:]
    path = Path(data.cache_dir).expanduser() / f"{name}.{split}.{Path(data.tokenizer_path).name}.bin"
    fingerprint = make_fingerprint(stories, tokenizer)
    found, reason = open_token_file(path, fingerprint)
    if found is None:
        busy = f"tokens: {path.name}: another program is building it: waiting"
        with only_one(path.with_suffix(".lock"), busy, wait=True):
            found, reason = open_token_file(path, fingerprint)  # again: by now it may be there
            if found is None:
                print(f"tokens: {path.name}: {reason}, building it from {stories.name}")
                build_token_file(stories, tokenizer, path, fingerprint, show_progress)
                found, reason = open_token_file(path, fingerprint)
        if found is None:
            raise UserError(f"{path}: {reason} right after it was built: is this disk in order?")
    else:
        print(f"tokens: {path.name}: reused")
    print("tokens: " + describe_counts(found.counts))
    return found


def describe_counts(counts: dict[str, int]) -> str:
    """One line: stories, tokens, bytes per token, and the share of articles among the tokens."""
    stories, tokens = counted(counts["stories"], "story"), max(1, counts["tokens"])
    return (f"{stories}, {counts['tokens']:,} tokens, {counts['bytes'] / tokens:.2f} bytes per token, "
            f"articles {100 * counts['article_tokens'] / tokens:.1f}% of tokens (5-9% is healthy)")


def make_fingerprint(stories: Stories, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a token file was made from; two files with equal fingerprints hold the same tokens."""
    return {"format": FORMAT, "tokenizer": hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest(),
            "source": stories.identity, "separator": END_OF_STORY, "dtype": _dtype(tokenizer).name}


def open_token_file(path: Path, fingerprint: dict[str, Any]) -> tuple[TokenFile | None, str]:
    """The token file if it is whole and made from just that, else None and the reason."""
    try:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        counts = {key: int(header["counts"][key]) for key in COUNTS}
        found, digest = header["fingerprint"], str(header["digest"])
    except FileNotFoundError:
        return None, "not there yet" if not path.exists() else "half-written"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None, "its .json is damaged"
    changed = [key for key in fingerprint if not isinstance(found, dict) or found.get(key) != fingerprint[key]]
    if changed:
        return None, f"stale ({' and '.join(changed)} changed)"
    dtype = np.dtype(fingerprint["dtype"]).newbyteorder("<")
    if not path.is_file() or path.stat().st_size != counts["tokens"] * dtype.itemsize or not counts["tokens"]:
        return None, "damaged (its size is not what its .json says)"
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if digest != make_digest(tokens, counts):  # 2 GB/s: half a second for all of TinyStories
        return None, "damaged (its checksum is not what its .json says)"
    return TokenFile(path, tokens, counts, digest), ""


def make_digest(tokens: np.ndarray, counts: dict[str, int]) -> str:
    """sha256 of the token file's bytes and of its counts."""
    digest = hashlib.sha256(json.dumps([counts[key] for key in COUNTS]).encode("utf-8"))
    digest.update(tokens.view(np.uint8))
    return digest.hexdigest()


def build_token_file(stories: Stories, tokenizer: Tokenizer, path: Path, fingerprint: dict[str, Any],
                     show_progress: bool = True) -> None:
    """Encode all stories into path, in bounded memory. Whatever stops it, no file that would be believed is left."""
    header = path.with_suffix(".json")
    for name in (path.name, header.name):
        remove_leftovers(path.parent, name)
    with replacing(path) as file:
        counts = _encode_all(stories, tokenizer, file, show_progress)
        file.flush()
        digest = make_digest(np.memmap(file.name, dtype=np.uint8, mode="r"), counts)
        header.unlink(missing_ok=True)  # so that an old header never stands beside a new .bin
    made = {"fingerprint": fingerprint, "counts": counts, "digest": digest}
    with replacing(header) as file:
        file.write(json.dumps(made, indent=1).encode("utf-8"))


def _encode_all(stories: Stories, tokenizer: Tokenizer, file: BinaryIO, show_progress: bool) -> dict[str, int]:
    articles, dtype = article_mask(tokenizer), _dtype(tokenizer).newbyteorder("<")
    encode, separator = make_encoder(tokenizer, dtype), np.array(tokenizer.token_to_id(END_OF_STORY), dtype).tobytes()
    counts = {"tokens": 0, "article_tokens": 0}

    def write(ids: bytes) -> None:
        array = np.frombuffer(ids, dtype)
        counts["tokens"] += len(array)
        counts["article_tokens"] += int(articles[array].sum())
        file.write(ids)

    with tqdm(total=stories.total_bytes, unit="B", unit_scale=True, desc="tokenize", leave=False,
              disable=None if show_progress else True) as progress:
        for chunk, num_bytes in _chunks(stories):
            write(b"".join(separator + ids for ids in encode(chunk)))
            progress.update(num_bytes)
    write(separator)
    return {**counts, **{key: int(count) for key, count in stories.counts.items()}}


def _chunks(stories: Stories) -> Iterator[tuple[list[str], int]]:
    """Lists of stories of about CHUNK_BYTES, each with its size in UTF-8 bytes."""
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


# Batches

def count_windows(num_tokens: int, seq_len: int) -> int:
    """How many windows of seq_len targets a file of num_tokens has; the incomplete one at its end is not counted."""
    return max(0, (num_tokens - 1) // seq_len)


@functools.lru_cache(maxsize=2)
def epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of the window indices, int64, shape (num_windows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def training_windows(position: int, count: int, num_windows: int, seed: int) -> np.ndarray:
    """Indices of the windows at position .. position + count - 1 of the endless row of epochs, int64, shape (count,).

    Every epoch is each window once. A batch may begin in one epoch and end in the next, so that all are of one size.
    """
    epochs, offsets = np.divmod(np.arange(position, position + count), num_windows)
    windows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = epoch_order(num_windows, seed, int(epoch))[offsets[here]]
    return windows


def dropout_seed(seed: int, position: int) -> int:
    """The seed of the micro-batch that begins at `position`: the same however often a run is stopped or shared out."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0])


def read_batch(tokens: np.ndarray, windows: np.ndarray, seq_len: int, device: torch.device,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the given windows, both int64, shape (len(windows), seq_len): targets[t] is inputs[t + 1].

    A window that reaches past the end of the file is filled up: inputs with 0, targets with IGNORED.
    """
    import torch  # here, so that the tokenizer script need not load it

    positions = windows[:, None] * seq_len + np.arange(seq_len + 1)  # (batch, seq_len + 1)
    beyond = positions >= len(tokens)
    block = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)  # (batch, seq_len + 1)
    inputs = np.where(beyond, 0, block)[:, :-1]
    targets = np.where(beyond, IGNORED, block)[:, 1:]  # the one shift

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return move(inputs), move(targets)


def validation_windows(num_tokens: int, seq_len: int, limit: int = 0) -> np.ndarray:
    """Window indices of a full pass, the incomplete last one included, or `limit` of them evenly spread; int64."""
    total = -(-(num_tokens - 1) // seq_len)  # rounded up: every token but the first is predicted once
    if 0 < limit < total:
        return np.linspace(0, total - 1, limit).astype(np.int64)
    return np.arange(total)
