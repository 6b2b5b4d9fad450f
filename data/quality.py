"""What the stories are like and what is wrong with them: before any work (data.check_quality), and in each token file.

While a token file is built, every story is counted, and at most data.quality_sample_size of them, spread evenly, are
searched for PATTERNS. The results are stored in the token file's .json as `checks`: name, number and example of each.
"""

import dataclasses
import re
from collections import Counter
from itertools import islice
from typing import Any

from config import UserError
from config.schema import DataConfig
from config.wording import counted, one_line
from data.cleaning import Counts
from data.stories import LEFT_OUT, Stories, describe_counts, open_stories

TAGS = "a|b|blockquote|br|div|em|font|h[1-6]|hr|i|img|li|ol|p|script|span|strong|table|td|tr|u|ul"
PATTERNS = {  # faults that cleaning leaves in; each search takes time linear in the story's length
    "with HTML": re.compile(rf"</?(?:{TAGS})(?:\s[^<>]{{0,200}})?/?>|&(?:[lg]t|amp|nbsp|quot|#\d{{1,6}});", re.I),
    "with a URL or an e-mail address": re.compile(r"://\w|www\.\w|\w@[\w-]{1,60}\.\w"),
    "with control or private-use characters": re.compile(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\U000f0000-\U0010ffff]"),
    "with ten or more of one character in a row": re.compile(r"(\S)\1{9}"),
    "that spell a special token": re.compile(r"<\|[^|<>\s]{1,30}\|>|</?(?:s|unk|pad|bos|eos)>|\[/?INST\]"),
}
OUTSIDE = re.compile(r"[^\x00-\x7f]")
FEW, THOUSANDS = 50, 10_000  # characters: about ten and two thousand words
SEARCHED = 20_000  # characters of a story that are searched for PATTERNS
SHORT, LONG = f"of fewer than {FEW} characters", f"of more than {THOUSANDS:,} characters"
NOT_ASCII, DUPLICATE, OVERLAP = "with characters outside ASCII", "exact duplicates of an earlier story", "in validation"
MAX_OVERLAP, NOTED = 0.001, " (more than 0.1%)"


def describe_check(check: dict[str, Any]) -> str:
    """The finding in one phrase, such as "7 with HTML: 'She said <b>no'"."""
    return f"{check['number']:,} {check['name']}" + (f": {check['example']!r}" if check["example"] else "")


class StoryChecks:
    """The checks of one split, whose stories go through add() one after the other."""

    def __init__(self, stories: Stories) -> None:
        self.stories, self.size = stories, stories.data.quality_sample_size
        self.number, self.characters, self.shortest, self.longest = 0, 0, "", ""
        self.sample, self.stride = [], 1  # every stride-th story, at most `size`
        self.searched, self.openings = 0, Counter()
        self.seen: set[int] = set()  # hashes of 8 bytes, 130 MB for TinyStories
        self.found = Counts()

    def add(self, story: str) -> None:
        """Count the next story, and perhaps keep it to be searched. Takes a microsecond or two."""
        if not self.size:
            self.search(story)
        elif self.number % self.stride == 0:
            self.sample.append(story[:SEARCHED])
            if len(self.sample) > self.size:
                del self.sample[1::2]
                self.stride *= 2
        length, self.number = len(story), self.number + 1
        self.characters += length
        if length > len(self.longest):
            self.longest = story
        if length < len(self.shortest) or self.number == 1:
            self.shortest = story
        if not FEW <= length <= THOUSANDS:
            self.found.note(SHORT if length < FEW else LONG, story)
        if not story.isascii():
            self.found.note(NOT_ASCII, story[max(0, OUTSIDE.search(story).start() - 20):])
        if not self.stories.data.deduplicate:  # else there are none
            key = hash(story)
            if key in self.seen:
                self.found.note(DUPLICATE, story)
            elif key in self.stories.validation_hashes:
                self.found.note(OVERLAP, story)
            self.seen.add(key)

    def search(self, story: str) -> None:
        """Search for PATTERNS, and count the opening."""
        self.searched += 1
        self.openings[" ".join(story[:60].split()[:4])] += 1
        for name, pattern in PATTERNS.items():
            if match := pattern.search(story):
                self.found.note(name, story[max(0, match.start() - 20):match.end() + 20])

    def results(self, counts: Counts) -> list[dict[str, Any]]:
        """All checks, and by `counts` what cleaning did. To be called once, after the last story."""
        for story in self.sample:
            self.search(story)
        found, of = self.found, len(self.stories.validation_hashes)
        overlap = (f"of {of:,} validation stories are in this split as well"
                   + (NOTED if found[OVERLAP] > MAX_OVERLAP * of else ""))
        rows = [("searched for the next five", self.searched, ""),
                *((name, found[name], found.examples.get(name, ""))
                  for name in (*PATTERNS, SHORT, LONG, NOT_ASCII, DUPLICATE)),
                *[(overlap, found[OVERLAP], found.examples.get(OVERLAP, ""))] * bool(of),
                ("characters in the shortest", len(self.shortest), self.shortest[:60]),
                ("characters in the longest", len(self.longest), self.longest[:60]),
                ("characters on average", round(self.characters / max(1, self.number)), ""),
                *(("of the searched begin alike", number, words) for words, number in self.openings.most_common(3)),
                *((f"left out: {meaning}", counts[kind], counts.examples.get(kind, ""))
                  for kind, meaning in LEFT_OUT.items() if counts[kind] and meaning),
                ("kept with a repaired encoding", counts["repaired"], counts.examples.get("repaired", ""))]
        return [{"name": name, "number": number, "example": one_line(example)} for name, number, example in rows]


def check_quality(data: DataConfig) -> str:
    """Look at data.quality_sample_size training stories (0: all) and describe what is wrong with them, in one line.

    Raises UserError if a fault was found and data.quality_strict is true.
    """
    # cleaning is what counts some of the faults
    stories = open_stories(dataclasses.replace(data, clean=True, deduplicate=False), "train")
    checks = StoryChecks(stories)
    for story in islice(stories, data.quality_sample_size or None):
        checks.search(story)
    faults = [describe_counts({**stories.counts, "held_out": 0}, {}), *(f"{number:,} {name}" for name, number in
                                                                       checks.found.items())]
    found = "; ".join(filter(None, faults))
    description = (f"{counted(stories.counts['stories'], 'good story')} looked at in {stories.name}; faults: "
                   + (found or "none"))
    if found and data.quality_strict:
        raise UserError(f"quality: {description}. data.quality_strict is true, so training does not start: repair the "
                        "stories, or set it to false")
    return description
