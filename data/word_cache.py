"""Stories to token ids, many times as fast as with the tokenizer library alone, by caching words.

A byte-level BPE (Radford et al., 2019) splits a text into words by a pattern, then merges bytes within each word. A few
thousand words make up nearly all of TinyStories, so each word is encoded once and then looked up.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tokenizers import Tokenizer

from config import UserError

# GPT-2's pattern, for texts without UNKNOWN: in ASCII, Python's re has the same letters, digits and white space as the
# library's regex engine, and for both the punctuation marks that UNKNOWN excepts are none of these
WORD = re.compile(r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
UNKNOWN = re.compile("[^\x00-\x7f‘’“”–—…]")
MANY_BYTES, MOST_PROCESSES = 200_000_000, 8  # of text, from which on it pays to start processes; and how many
MAX_WORDS, MAX_LENGTH = 200_000, 100  # of the cache (about 30 MB), and of a word that is cached


class WordCache(dict):
    """A dict from a word to its ids, as the bytes of a token file. Missing words are encoded."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self.encode(word)
        if len(word) <= MAX_LENGTH:
            if len(self) == MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def splits_like_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer splits texts by the pattern of WORD alone and always encodes a word the same way."""
    parts = json.loads(tokenizer.to_str())
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    return (all(parts[name] is None for name in ("normalizer", "truncation", "padding"))
            and model["type"] == "BPE" and not model["dropout"]
            and {**splitter, "trim_offsets": None} == {"type": "ByteLevel", "add_prefix_space": False,
                                                       "use_regex": True, "trim_offsets": None}
            and tokenizer.encode_special_tokens and all(token["special"] for token in parts["added_tokens"]))


def make_encoder(tokenizer: Tokenizer, dtype: np.dtype) -> Callable[[Sequence[str]], Iterator[bytes]]:
    """A function from stories to the ids of each, as bytes of `dtype`, exactly those of the library.

    Stories that WORD cannot split go to the library, which uses all cores.
    """
    def pack(ids: list[int]) -> bytes:
        return np.array(ids, dtype=dtype).tobytes()

    cache = WordCache(lambda word: pack(tokenizer.encode(word, add_special_tokens=False).ids))
    by_words = splits_like_gpt2(tokenizer)

    def encode(stories: Sequence[str]) -> Iterator[bytes]:
        splittable = [by_words and (story.isascii() or not UNKNOWN.search(story)) for story in stories]
        others = [story for story, by_cache in zip(stories, splittable, strict=True) if not by_cache]
        encoded = iter(tokenizer.encode_batch_fast(others, add_special_tokens=False))
        for story, by_cache in zip(stories, splittable, strict=True):
            yield b"".join(map(cache.__getitem__, WORD.findall(story))) if by_cache else pack(next(encoded).ids)

    return encode


# Several processes

def count_processes(num_bytes: int | None) -> int:
    """How many processes are to encode a text of this size (None: unknown): as many as there are cores, or one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES) if (num_bytes or 0) >= MANY_BYTES else 1


def encode_chunks(tokenizer: Tokenizer, dtype: np.dtype, separator: bytes, chunks: Iterator[tuple[list[str], int]],
                  processes: int) -> Iterator[tuple[bytes, int]]:
    """The ids of each chunk of stories, each story after the separator, with the chunk's number, in order.

    Few chunks are in memory at once. Raises UserError if a process dies.
    """
    if processes == 1:
        encode = make_encoder(tokenizer, dtype)
        yield from ((b"".join(separator + ids for ids in encode(chunk)), number) for chunk, number in chunks)
        return
    # spawn, which works on all systems
    pool, pending = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process, (
        tokenizer.to_str(), tokenizer.encode_special_tokens, dtype, separator)), deque()
    try:
        for chunk, number in chunks:
            with _hidden_script():  # a process is started here if all others are busy
                pending.append((pool.submit(_encode_chunk, chunk), number))
            if len(pending) > 2 * processes:
                future, number = pending.popleft()
                yield future.result(), number
        yield from ((future.result(), number) for future, number in pending)
    except BrokenProcessPool:
        raise UserError("tokens: a process that encodes stories was ended from outside: is the memory full?") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _hidden_script() -> Iterator[None]:
    """Processes that are started meanwhile do not import the script that runs, which multiprocessing would let them do.

    The scripts import torch, which takes seconds and more than 500 MB of memory in each process.
    """
    main = vars(sys.modules["__main__"])
    script = main.pop("__file__", None)
    try:
        yield
    finally:
        if script is not None:
            main["__file__"] = script


def _start_process(tokenizer: str, encode_special_tokens: bool, dtype: np.dtype, separator: bytes) -> None:
    global _encode, _separator
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other processes have the other cores
    loaded = Tokenizer.from_str(tokenizer)
    loaded.encode_special_tokens = encode_special_tokens  # is not in its JSON
    _encode, _separator = make_encoder(loaded, dtype), separator


def _encode_chunk(stories: Sequence[str]) -> bytes:
    return b"".join(_separator + ids for ids in _encode(stories))
