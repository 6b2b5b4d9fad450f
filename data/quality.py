"""The quality check of data.check_quality: what cleaning finds in the first stories, before any work is done."""

import dataclasses
import re
from itertools import islice

from config import UserError
from config.schema import DataConfig
from config.wording import counted
from data.stories import open_stories
from data.tokenizer import is_english

FAULTS = {"empty": "empty", "cut_off": "cut off", "unreadable": "with lost characters",
          "repaired": "with a damaged encoding that cleaning repairs"}
ARTICLE = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)


def check_quality(data: DataConfig) -> str:
    """Look at data.quality_sample_size training stories (0: all) and describe what is wrong with them, in one line.

    Raises UserError if a fault was found and data.quality_strict is true.
    """
    stories = open_stories(dataclasses.replace(data, clean=True), "train")  # cleaning is what counts the faults
    words, articles, some = 0, 0, []
    for story in islice(stories, data.quality_sample_size or None):
        words += len(story.split())
        articles += len(ARTICLE.findall(story))
        if len(some) < 100:
            some.append(story)
    found = [f"{stories.counts[key]:,} {meaning}" for key, meaning in FAULTS.items() if stories.counts[key]]
    description = (f"{counted(stories.counts['stories'], 'good story')} looked at in {stories.name}; faults: "
                   f"{', '.join(found) or 'none'}"
                   + (f"; {articles / max(1, words):.1%} of words are articles" if is_english(some) else ""))
    if found and data.quality_strict:
        raise UserError(f"quality: {description}. data.quality_strict is true, so training does not start: mend the "
                        "stories, or set it to false, and cleaning (data.clean) leaves out or repairs those texts")
    return description
