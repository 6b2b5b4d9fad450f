"""The synthetic story generator: stories in the manner of TinyStories, for the quickstart and the tests.

It needs no download, never ends, and repeats no story. The texts it combines are in synthetic_stories.yaml.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

TEXTS = Path(__file__).with_suffix(".yaml")
_TEXTS = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
WORDS: dict[str, str] = _TEXTS["words"]
OPENINGS: list[dict] = _TEXTS["openings"]
PLOTS: dict[str, str] = _TEXTS["plots"]
CLOSINGS = ("",) * 10 + (" The end.", " And they all lived happily ever after.")


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by the sound of its first word rather than by its first letter."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "one"))
    return ("an " if vowel or phrase.startswith(("honest", "hour")) else "a ") + phrase


def _parse(text: str) -> list[tuple[str, list[str]]]:
    """Turn an opening or a plot into its beats: the mark, and the phrasings with the white space before them."""
    beats: list[tuple[str, list[str]]] = []
    for line in text.strip().replace("\n|", " |").splitlines():
        mark = line[0] if line[0] in ">?&" else ""
        space = "\n" if mark == ">" else " "
        beats.append((mark, [space + phrasing.strip() for phrasing in line[len(mark):].split(" | ")]))
    return beats


_WORDS = [[tuple({slot + twin: word for slot, word in zip(slots.split(":"), row.strip().split(":"), strict=True)}
                 for twin in ("", "2")) for row in rows.split(",")] for slots, rows in WORDS.items()]
_OPENINGS = [(opening["with_pet"], _TEXTS[opening["begins"]], _parse(opening["text"]))
             for opening in OPENINGS for _ in range(opening["weight"])]
_PLOTS = [_parse(text) for text in PLOTS.values()]


def _cast(pick: Callable, with_pet: bool) -> dict[str, str]:
    """Choose the people and things of a story: the words for all slots, the same in all its sentences."""
    cast = {}
    for rows in _WORDS:
        words, others = pick(rows), pick(rows)
        while others is words:
            others = pick(rows)
        cast |= words[0] | others[1]  # two of everything: {color} and {color2} differ
    hero, friend = pick(("girl", "boy")), pick(("girl", "boy"))
    cast |= {"name": cast[hero], "friend": cast[friend + "2"]}
    he, him, his = ("she", "her", "her") if hero == "girl" else ("he", "him", "his")
    cast |= {"he": he, "him": him, "his": his, "self": him + "self"}
    if not with_pet and pick((True, False, False)):  # a hero with a pet is always a child
        hero, friend = pick((cast["wild"], cast["pet"])), cast["wild2"]
    cast |= {"hero": f"{cast['trait']} {hero}", "stranger": friend}
    counted = ("hero", "stranger", "home", "color", "color2", "food", "gift")
    cast |= {f"a_{slot}": with_article(cast[slot]) for slot in counted}
    return cast | {slot.capitalize(): cast[slot].capitalize() for slot in ("he", "his", "p_he", "noise")}


def make_story(seed: int, index: int) -> str:
    """Write story number `index` of a seed: 2 to 5 paragraphs, a line each, the same on every machine and Python."""
    # only random(): the one method whose numbers Python promises to keep from version to version
    draw = random.Random(f"{seed} {index}").random

    def pick(options):
        return options[int(draw() * len(options))]

    with_pet, days, opening = pick(_OPENINGS)
    chance = {"?": 0.5, "&": float(with_pet)}
    used = [pick(phrasings) for mark, phrasings in opening + pick(_PLOTS) if draw() < chance.get(mark, 1.0)]
    return ("".join(used) + pick(CLOSINGS)).lstrip().format_map(_cast(pick, with_pet) | {"When": pick(days)})


def synthetic_stories(seed: int, start: int = 0) -> Iterator[str]:
    """The endless stories of a seed, from number `start` on; each depends only on the seed and its number."""
    return (make_story(seed, index) for index in itertools.count(start))
