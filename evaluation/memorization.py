"""How much of a story was copied: its longest run of tokens that occurs in the training text.

The training text may be large, so the stories are indexed instead: one pass over the token file, a memmap, looks up
each of its runs in that index. Memory does not grow with the training text.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

SHORTEST = 8  # tokens; shorter runs occur in any text of the kind, and are reported as 0
CHUNK = 1 << 20  # training tokens searched at once
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost from a product modulo 2**64
TABLE_BITS = 22


def longest_runs(stories: Sequence[np.ndarray], training: np.ndarray, show_progress: bool = True) -> np.ndarray:
    """The longest run of each story that occurs in the training tokens, in tokens, int64, shape (len(stories),).

    stories, training: token ids of one tokenizer, integers, 1-D. Runs shorter than SHORTEST count as 0. Runs are found
    by a polynomial hash modulo 2**64 (Karp & Rabin, 1987), then compared token by token.
    """
    longest = np.zeros(len(stories), dtype=np.int64)
    queries = _Queries([np.asarray(story).astype(np.uint64) for story in stories])
    if queries.longest_story < SHORTEST:
        return longest
    hashes, _ = queries.of_length(SHORTEST)
    table = np.zeros(1 << TABLE_BITS, dtype=bool)  # a filter: the leading bits of each hash of the stories
    table[hashes >> np.uint64(64 - TABLE_BITS)] = True
    starts = range(0, max(0, len(training) - SHORTEST + 1), CHUNK)
    for start in tqdm(starts, desc="memorized", unit="M tokens", leave=False, disable=None if show_progress else True):
        # a run that begins in this chunk may end after it
        tokens = np.asarray(training[start:start + CHUNK + queries.longest_story - 1]).astype(np.uint64)
        rolling = _hash_runs(tokens[:CHUNK + SHORTEST - 1], SHORTEST)
        places = np.flatnonzero(table[rolling >> np.uint64(64 - TABLE_BITS)])
        _lengthen(tokens, places, rolling[places], queries, longest)
    return longest


def _hash_runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """The hash of the `length` tokens (a power of two) from each place on, uint64: h(xy) = h(x) BASE**len(y) + h(y)."""
    hashes, done = tokens + np.uint64(1), 1
    while done < length:
        hashes = hashes[:-done] * np.uint64(pow(int(BASE), done, 2**64)) + hashes[done:]
        done *= 2
    return hashes


class _Queries:
    """The stories, concatenated, and the sorted hashes of all their runs of a given length."""

    def __init__(self, stories: list[np.ndarray]) -> None:
        self.flat = np.concatenate([*stories, np.zeros(0, np.uint64)])
        self.story = np.repeat(np.arange(len(stories)), [len(story) for story in stories])  # of each place in flat
        self.left = np.concatenate([np.arange(len(story), 0, -1) for story in stories] + [np.zeros(0, np.int64)])
        self.longest_story = max(map(len, stories), default=0)
        self._by_length: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of_length(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The sorted hashes of the runs of this length, each within one story, and the place in `flat` of each."""
        if length not in self._by_length:
            if length == SHORTEST:
                places = np.flatnonzero(self.left >= SHORTEST)
                hashes = _hash_runs(self.flat, SHORTEST)[places]
            else:
                hashes, places = self.of_length(length - 1)
                keep = self.left[places] >= length
                places = places[keep]
                hashes = hashes[keep] * BASE + self.flat[places + length - 1] + np.uint64(1)
            order = np.argsort(hashes, kind="stable")
            self._by_length[length] = hashes[order], places[order]
        return self._by_length[length]


def _lengthen(tokens: np.ndarray, places: np.ndarray, hashes: np.ndarray, queries: _Queries, longest: np.ndarray,
              ) -> None:
    """Extend the runs that begin at `places` of the tokens while a story contains them; update `longest`."""
    length = SHORTEST
    while len(places):
        known, known_places = queries.of_length(length)
        if not len(known):
            return
        found = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        keep = known[found] == hashes
        places, hashes = places[keep], hashes[keep]
        unique, first = np.unique(hashes, return_index=True)
        low, high = np.searchsorted(known, unique, "left"), np.searchsorted(known, unique, "right")
        for place, begin, end in zip(places[first].tolist(), low.tolist(), high.tolist(), strict=True):
            for query in known_places[begin:end].tolist():
                story = queries.story[query]
                if longest[story] < length and np.array_equal(queries.flat[query:query + length],
                                                              tokens[place:place + length]):
                    longest[story] = length
        inside = places + length < len(tokens)
        places = places[inside]
        hashes = hashes[inside] * BASE + tokens[places + length] + np.uint64(1)
        length += 1
