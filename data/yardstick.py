"""What told stories are held against: real stories with the same beginnings, and the table that compares the two.

Texts are read back from token files, which hold them byte for byte, and of long files from places evenly spread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.measures import Learned, distinct, measure
from data.memorised import longest_runs
from data.tokens import END_OF_STORY, TokenFile

NUM_PROMPTS = 10  # beginnings that stories are told from
BEGINNING = 5  # words of a beginning that is taken from the validation stories


class Passage(NamedTuple):
    """A story without its beginning: what is measured. ended: by itself, it was not cut off."""

    prompt: str
    text: str
    ended: bool


def read_stories(file: TokenFile, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The texts of `count` stories of a token file, evenly spread over it; all of them if it has no more."""
    separator, tokens = tokenizer.token_to_id(END_OF_STORY), file.tokens
    if file.counts["stories"] <= count:
        ends = np.flatnonzero(tokens == separator)
        pieces = (tokens[start + 1:end] for start, end in pairwise(ends))
    else:
        pieces = (_story_after(tokens, int(place), separator) for place in np.linspace(0, len(tokens), count + 1)[:-1])
    while chunk := list(islice((piece.tolist() for piece in pieces if len(piece)), 1000)):
        yield from tokenizer.decode_batch(chunk)


def _story_after(tokens: np.ndarray, place: int, separator: int, reach: int = 4096) -> np.ndarray:
    """The first whole story from a place on; nothing, if there is none."""
    while True:
        ends = np.flatnonzero(tokens[place:place + reach] == separator)
        if len(ends) > 1:
            return tokens[place + ends[0] + 1:place + ends[1]]
        if place + reach >= len(tokens):
            return tokens[:0]
        reach *= 2


def choose_references(stories: Sequence[str], prompts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Pairs of a beginning and a story that begins so, `count` of them or as many as there are.

    The beginnings are those of `prompts` that any story begins with, and then, up to NUM_PROMPTS, the commonest first
    BEGINNING words of the stories. Each is used as often as any other, as long as there are stories for it.
    """
    common = Counter(" ".join(words) for story in stories if len(words := story.split(" ")[:BEGINNING]) == BEGINNING)
    chosen = [prompt for prompt in prompts if any(story.startswith(prompt) for story in stories)]
    for beginning, _ in common.most_common():
        beginning = beginning.rstrip(",.;:!?")
        if len(chosen) < NUM_PROMPTS and "\n" not in beginning and not any(
                prompt.startswith(beginning) or beginning.startswith(prompt) for prompt in chosen):
            chosen.append(beginning)
    by_prompt = {prompt: [] for prompt in chosen}
    for story in stories:
        for prompt in chosen:
            if story.startswith(prompt) and len(story) > len(prompt):
                by_prompt[prompt].append(story)
                break
    pairs, rest = [], {prompt: iter(found) for prompt, found in by_prompt.items()}
    for prompt in cycle(chosen):
        if len(pairs) == count or not rest:
            break
        if prompt in rest:
            story = next(rest[prompt], None)
            if story is None:
                del rest[prompt]
            else:
                pairs.append((prompt, story))
    return pairs


def cut_reference(prompt: str, story: str, tokenizer: Tokenizer, limit: int) -> Passage:
    """The story without its beginning, and cut off after `limit` tokens, where the model would be."""
    ids = tokenizer.encode(story[len(prompt):], add_special_tokens=False).ids
    return Passage(prompt, tokenizer.decode(ids[:limit]), len(ids) < limit)  # a model must also have room for the end


# The table

class Row(NamedTuple):
    """A line of the table. tolerance: a difference of less is none, in the row's unit, or relative to the reference.

    low, high: what it means that the model's figure is lower or higher; "" where that is no fault.
    """

    key: str
    title: str
    scale: float
    tolerance: float
    relative: bool
    low: str = ""
    high: str = ""


ROWS = (
    Row("articles", "articles per 100 words", 100, 0.1, True, "articles are missing", "too many articles"),
    Row("has_article", "stories with an article, %", 100, 1, False, "some stories have none"),
    Row("a_an", "right a or an, by the next sound, %", 100, 1, False, "wrong before some sounds"),
    Row("bare_nouns", "count nouns left bare, %", 100, 1, False, "", "nouns lack their article"),
    Row("words", "words a story", 1, 0.2, True, "shorter stories", "longer stories"),
    Row("ended", "ended by <|endoftext|>, %", 100, 5, False, "many were cut off"),
    Row("distinct_1", "distinct-1, %", 100, 0.15, True, "fewer words", "more words"),
    Row("distinct_2", "distinct-2, %", 100, 0.15, True, "less varied", "more varied"),
    Row("distinct_3", "distinct-3, %", 100, 0.15, True, "less varied", "more varied"),
    Row("repeated", "repeated 4-grams in a story, %", 100, 1, False, "", "repeats itself"),
    Row("unknown", "words not in the training text, %", 100, 0.5, False, "", "makes up words"),
    Row("run", "longest run copied, tokens", 1, 3, False, "", "copies more than stories share"),
    Row("copied", "share of the story in that run, %", 100, 5, False, "", "partly memorised"),
    Row("quotes", "quotes that close, %", 100, 2, False, "quotes stay open"),
)


def measure_passages(passages: Sequence[Passage], learned: Learned, tokenizer: Tokenizer, training: np.ndarray,
                     show_progress: bool = True) -> list[dict[str, tuple[float, float]]]:
    """Each measure of each passage, as (numerator, denominator); see data/measures.py."""
    encodings = tokenizer.encode_batch([passage.text for passage in passages], add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    runs = longest_runs(ids, training, show_progress).tolist()
    return [{**measure(passage.text, learned, passage.ended), "run": (run, 1), "copied": (run, len(tokens))}
            for passage, run, tokens in zip(passages, runs, ids, strict=True)]


def compare(model: Sequence[Passage], reference: Sequence[Passage], measured: Sequence[dict],
            yardstick: Sequence[dict]) -> list[dict[str, Any]]:
    """The rows of the table: title, model, reference (numbers, or None where there is nothing to measure), verdict.

    A verdict is more than "ok" if the difference is above the row's tolerance and, for means over stories, above two
    standard errors.
    """
    num_words = int(min(sum(of["words"][0] for of in side) for side in (measured, yardstick)))
    table = []
    for row in ROWS:
        if row.key.startswith("distinct"):
            n = int(row.key[-1])
            (found, error), (expected, spread) = (
                (_share([distinct([passage.text for passage in side], n, num_words)])[0], 0.0)
                for side in (model, reference))
        else:
            (found, error), (expected, spread) = (
                _share([of[row.key] for of in side]) for side in (measured, yardstick))
        verdict = _verdict(row, found, expected, 2 * math.hypot(error, spread))
        table.append({"key": row.key, "title": row.title, "model": None if found is None else row.scale * found,
                      "reference": None if expected is None else row.scale * expected, "verdict": verdict})
    return table


def _share(pairs: Iterable[tuple[float, float]]) -> tuple[float | None, float]:
    """The ratio of the sums, and its standard error (of a ratio estimator: Cochran, 1977, eq. 2.46)."""
    parts, wholes = np.array(list(pairs), dtype=float).reshape(-1, 2).T
    if not wholes.sum():
        return None, 0.0
    ratio = parts.sum() / wholes.sum()
    return float(ratio), float(np.sqrt(((parts - ratio * wholes) ** 2).sum()) / wholes.sum())


def _verdict(row: Row, found: float | None, expected: float | None, noise: float) -> str:
    if found is None or expected is None:
        return "nothing to measure"
    difference = row.scale * (found - expected)
    tolerance = row.tolerance * row.scale * expected if row.relative else row.tolerance
    if abs(difference) <= max(tolerance, row.scale * noise):
        return "ok"
    return (row.low if difference < 0 else row.high) or "ok"


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The table as aligned text."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    width = max(len(line["title"]) for line in table)
    lines = [f"{'':{width}}  {'model':>7}  {'reference':>9}  verdict"]
    lines += [f"{line['title']:{width}}  {number(line['model']):>7}  {number(line['reference']):>9}  {line['verdict']}"
              for line in table]
    return "\n".join(lines)
