"""Stories to token ids, many times as fast as by the tokenizer library alone.

A byte-level BPE (Radford et al., 2019) first splits a text into words by a pattern, then merges within each word. The
same few thousand words make up nearly all of TinyStories, so each is given to the library once and then looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

# GPT-2's pattern for texts without UNKNOWN: Python's re knows letters, digits and white space as the library's regex
# engine does in ASCII, and the punctuation marks of UNKNOWN are neither for both
WORD = re.compile(r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
UNKNOWN = re.compile("[^\x00-\x7f‘’“”–—…]")
MAX_WORDS, MAX_LENGTH = 200_000, 100  # remembered: 30 MB of usual words, and no word of more characters


class WordCache(dict):
    """A word's ids, as the bytes of a token file, by the word; one that is not there yet is encoded."""

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
    """Does it encode a text word by word, by the pattern of WORD alone, and each word always alike?"""
    parts = json.loads(tokenizer.to_str())
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    return (all(parts[name] is None for name in ("normalizer", "truncation", "padding"))
            and model["type"] == "BPE" and not model["dropout"]
            and {**splitter, "trim_offsets": None} == {"type": "ByteLevel", "add_prefix_space": False,
                                                       "use_regex": True, "trim_offsets": None}
            and tokenizer.encode_special_tokens and all(token["special"] for token in parts["added_tokens"]))


def make_encoder(tokenizer: Tokenizer, dtype: np.dtype) -> Callable[[Sequence[str]], Iterator[bytes]]:
    """A function: stories -> the ids of each, as bytes of `dtype`, exactly those that the library gives.

    What the cache does not know how to split goes to the library, which shares it out over all cores.
    """
    def pack(ids: list[int]) -> bytes:
        return np.array(ids, dtype=dtype).tobytes()

    cache = WordCache(lambda word: pack(tokenizer.encode(word, add_special_tokens=False).ids))
    by_words = splits_like_gpt2(tokenizer)

    def encode(stories: Sequence[str]) -> Iterator[bytes]:
        known = [by_words and (story.isascii() or not UNKNOWN.search(story)) for story in stories]
        others = [story for story, is_known in zip(stories, known, strict=True) if not is_known]
        encoded = iter(tokenizer.encode_batch_fast(others, add_special_tokens=False))
        for story, is_known in zip(stories, known, strict=True):
            yield b"".join(map(cache.__getitem__, WORD.findall(story))) if is_known else pack(next(encoded).ids)

    return encode
