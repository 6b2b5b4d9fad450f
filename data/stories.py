"""The training and the validation split of a data set, cleaned: streamed in bounded memory.

    for story in open_stories(config.data, "train"): ...

data/sources.py opens the sources; data/cleaning.py cleans their texts.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, Literal

from config import UserError
from config.schema import DataConfig
from data.cleaning import CLEANING_VERSION, SHORT, Counts, clean, is_cut_off, keep_as_is
from data.readers import SEPARATOR
from data.sources import Source, find_files, hash_to_unit, open_source, say_once

LOOKED_AT = 200  # texts by which a source is judged a list of short items
LONG_ENOUGH = 2_000  # characters of a single document whose end can be held out
LEFT_OUT = {  # why a text is not in this split
    "empty": "empty or null", "unreadable": "with lost characters", "cut_off":
    f"cut off (under {SHORT} characters, without an end mark; data.clean: false keeps them)",
    "duplicate": "exact duplicates", "in_validation": "that are in validation", "held_out": ""}


@dataclass
class Stories:
    """One split of a data set, streamed. Each iteration reads it from the start."""

    name: str  # for messages, such as "roneneldan/TinyStories, train"
    identity: dict[str, Any]  # plain JSON values, equal only if the stories are the same
    total_bytes: int | None  # estimated bytes of text; None: unknown
    _source: Source = field(repr=False)
    data: DataConfig = field(repr=False)
    _held_out: Literal["train", "validation"] | None = None  # this split of a source that is divided by the program
    _limit: int | None = None
    _open_validation: Callable[[], "Stories"] | None = None  # if the validation split may have stories of this one
    watch: Callable[[str], None] | None = None  # called with each story of an iteration
    # of the last iteration: stories and bytes (UTF-8) that it yielded; the keys of LEFT_OUT; repaired; limited (0 or 1)
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[str]:
        """The stories, cleaned. Raises UserError for a text that cannot be read, and at the end if there was none."""
        counts = self.counts = Counts()
        stories = self._cleaned(counts)
        if self._held_out:
            stories = self._divided(stories, counts)
        if self.data.deduplicate:
            stories = self._distinct(stories, counts)
        for story in stories:
            if counts["stories"] == self._limit:
                counts["limited"] = 1
                break
            counts["stories"] += 1
            counts["bytes"] += len(story) if story.isascii() else len(story.encode("utf-8"))
            if self.watch:
                self.watch(story)
            yield story
        if not counts["stories"]:
            found = describe_counts(counts, counts.examples)
            raise UserError(f"{self.name}: no story in it" + (f" ({found})" if found else ""))

    def _cleaned(self, counts: Counts) -> Iterator[str]:
        """The stories of the whole source."""
        texts = iter(self._source.read())
        if not self._source.plain or self.data.separator != SEPARATOR:  # else they were split when they were read
            texts = (piece for text in texts for piece in _pieces(text))
        if self.data.clean:
            first = _look_ahead(texts)
            short = [is_cut_off(text.strip()) for text in first if text.strip()]
            mostly_short = sum(short) > len(short) / 2  # a list of names, say, and not stories that were cut off
            texts = (clean(text, counts, not mostly_short) for text in chain(first, texts))
        else:
            texts = (keep_as_is(text, counts, self.name) for text in texts)
        return (text for text in texts if text)

    def _divided(self, stories: Iterator[str], counts: Counts) -> Iterator[str]:
        """The stories of one split, by a hash of their text, the same in every run."""
        wants_validation = self._held_out == "validation"
        is_validation, document = self._division()
        if document is not None:
            yield from self._divided_document(document, wants_validation)
            return
        for story in stories:
            if is_validation(story) == wants_validation:
                yield story
            else:
                counts["held_out"] += 1

    @cached_property
    def validation_hashes(self) -> set[int]:
        """hash() of each validation story, in this process; empty if the splits are made so that they share none."""
        return set(map(hash, self._open_validation())) if self._open_validation else set()

    def _distinct(self, stories: Iterator[str], counts: Counts) -> Iterator[str]:
        """The stories without exact duplicates and, in training, without those that are in validation."""
        seen: set[int] = set()  # hashes of 8 bytes: a false duplicate in ten million passes over TinyStories
        for story in stories:
            key = hash(story)
            if key in self.validation_hashes:
                counts.note("in_validation", story)
            elif key in seen:
                counts.note("duplicate", story)
            else:
                seen.add(key)
                yield story

    def _division(self) -> tuple[Callable[[str], bool] | None, str | None]:
        """Which stories are held out: a fraction by hash, but at least one, and not all; or the only document there is.

        Reads the source until it has seen a story for either split, which is soon in a large one.
        """
        fraction, lowest, highest, first = self.data.validation_fraction, 1.0, 0.0, None
        for story in self._cleaned(Counts()):
            first = story if first is None else first
            place = hash_to_unit(story)
            lowest, highest = min(lowest, place), max(highest, place)
            if lowest < fraction <= highest:
                return (lambda story: hash_to_unit(story) < fraction), None
        if first is None or lowest == highest:
            return (lambda story: False), first
        if lowest >= fraction:
            say_once(f"note: {self._source.name}: so few stories are held out that their loss says little; "
                     "set data.validation, or raise data.validation_fraction")
            return (lambda story: hash_to_unit(story) == lowest), None
        return (lambda story: hash_to_unit(story) != highest), None

    def _divided_document(self, text: str, wants_validation: bool) -> Iterator[str]:
        """The beginning of a single document for training, its end for validation, if it is long enough for both."""
        separator = "" if not self._source.plain else f", since no {self.data.separator!r} stands in it"
        if len(text) < LONG_ENOUGH:
            if wants_validation:
                raise UserError(
                    f"{self._source.name}: one document{separator}, and too short to hold out its end ({len(text):,} "
                    f"characters, at least {LONG_ENOUGH:,}): set data.validation, add stories, or set data.separator, "
                    "such as --set 'data.separator=\"\\n\"' for a story on each line")
            yield text
            return
        cut = len(text) - max(LONG_ENOUGH // 10, round(len(text) * self.data.validation_fraction))
        nearest = max(len(text) // 2, cut - len(text) // 10)
        cut = next((place + 1 for mark in "\n ." if (place := text.rfind(mark, nearest, cut)) >= 0), cut)
        say_once(f"note: {self._source.name}: one document{separator}; its last {len(text) - cut:,} characters are "
                 "held out for validation")
        yield text[cut:] if wants_validation else text[:cut]


def _look_ahead(texts: Iterator[str]) -> list[str]:
    """The first LOOKED_AT texts, or fewer if they are long."""
    first, size = [], 0
    for text in islice(texts, LOOKED_AT):
        first.append(text)
        size += len(text)
        if size > LOOKED_AT * SHORT:
            break
    return first


def _pieces(text: str | None) -> list[str]:
    """The stories in a text: a separator in a record is layout, as in a .txt file. A null text is an empty story."""
    if text is None:
        return [""]
    if SEPARATOR not in text:
        return [text]
    pieces = [re.sub(r"\A\r?\n|\r?\n\Z", "", piece) for piece in text.split(SEPARATOR)]
    return [piece for piece in pieces if piece.strip()]


def describe_counts(counts: dict[str, int], examples: dict[str, str], held_out: str = "in the other split") -> str:
    """Which texts were left out or repaired, in one phrase, with an example of each kind; "" if there are none."""
    def part(kind: str, meaning: str) -> str:
        return f"{counts[kind]:,} {meaning}" + (f", such as {examples[kind]!r}" if kind in examples else "")

    left_out = [part(kind, meaning or held_out) for kind, meaning in LEFT_OUT.items() if counts.get(kind)]
    repaired = [part("repaired", "kept with a repaired encoding")] if counts.get("repaired") else []
    return "; ".join([*(["left out: " + "; ".join(left_out)] if left_out else []), *repaired])


def open_stories(data: DataConfig, split: Literal["train", "validation"]) -> Stories:
    """The split that `data` describes. Raises UserError if there is no such source.

    Validation is data.validation if that is set (its validation split if it has one, else all of it), else the
    validation split of data.dataset if it has one, else a fraction of the stories, chosen by a hash of their text.
    """
    elsewhere = data.validation not in (None, data.dataset)
    if not elsewhere:
        sources = open_source("data.dataset", data.dataset, data)
    elif split == "train":
        named = data.validation in ("tinystories", "tinystories-v2", "sample")
        sources = open_source("data.dataset", data.dataset, data, [] if named else find_files(data.validation)[1])
    else:
        sources = open_source("data.validation", data.validation, data)
        sources.setdefault("validation", next(iter(sources.values())))
    hold_out = not elsewhere and "validation" not in sources
    wanted = "train" if hold_out else split
    if (source := sources.get(wanted)) is None:
        raise UserError(f"data.dataset {data.dataset}: has no {wanted} split, only {', '.join(sources)}")
    if data.text_column and source.plain:
        say_once(f"note: data.text_column is {data.text_column}, but {source.name} has no fields: all text is read")
    stories = Stories(f"{source.name}, {split}", dict(source.identity), source.total_bytes, source, data)
    stories.identity["clean"] = CLEANING_VERSION if data.clean else False
    if hold_out:
        fraction = data.validation_fraction
        stories._held_out = split
        stories.identity["held_out"] = [split, fraction]
        stories.name += f" ({100 * fraction:g}% of the stories held out)"
        if stories.total_bytes is not None:
            stories.total_bytes = round(stories.total_bytes * (fraction if split == "validation" else 1 - fraction))
    if split == "train" and not hold_out and (elsewhere or data.dataset != "sample"):
        stories._open_validation = partial(open_stories, data, "validation")
    if data.deduplicate:
        stories.identity["deduplicate"] = stories._open_validation().identity if stories._open_validation else True
    if split == "train" and data.max_stories is not None:
        stories.identity["max_stories"] = stories._limit = data.max_stories
        stories.total_bytes = None
    return stories
