"""What the users of the offline story generator rely on: it is repeatable, never repeats itself, and writes English."""
from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from string import Formatter

import pytest

from data import synthetic_stories as sample
from data.synthetic_stories import OPENINGS, PLOTS, WORDS, make_story, synthetic_stories

# The rule of a and an, written out again: a vowel letter takes "an", but for the words that sound otherwise.
SILENT_H = {"hour", "honest"}
CONSONANT_SOUND = {"unicorn", "useful", "one", "once", "used", "uniform", "university"}
DETERMINERS = set("a an the his her their my your our this that one each every another no some any".split())
COUNT_NOUNS = ("pet", "wild", "young", "parent", "seller", "place", "landmark", "home", "toy", "garment", "food",
               "fragile", "holder", "gift")
PLOT_NOUNS = set("tree room table door story rope race market picnic kitchen house friend candle blanket girl boy "
                 "ribbon basket garden leaf gate monster bag pot foot knee prize rainbow barn cave".split())
MANNERS = (r"Once upon a time there was an? ", r"Once upon a time, there was an? ", r"One day, an? ",
           r"[A-Z]\w+ and (his|her) ", r"In an? ", r"There once was an? ", r"[A-Z]\w+ was an? ")
NAMES = {name: pronoun for slot, pronoun in (("girl", "she"), ("boy", "he")) for name in WORDS[slot].split(", ")}


def names_in(text: str) -> list[str]:
    """The names of a text, in the order of their first appearance."""
    return list(dict.fromkeys(word for word in re.findall(r"[A-Z]\w+", text) if word in NAMES))


def words_of(slot: str) -> list[str]:
    """The last word of everything that can fill a slot: a "small house" is a house, an "apple pie" is a pie."""
    rows = next(rows for slots, rows in WORDS.items() if slots.split(":")[0] == slot)
    return [row.split(":")[0].split()[-1] for row in rows.split(", ")]


def beats(text: str) -> list[list[str]]:
    """The beats of an opening or a plot, each a list of its phrasings, slots and all."""
    return [[phrasing.strip() for phrasing in phrasings] for _, phrasings in sample._parse(text)]


def pattern(phrasings: list[str]) -> re.Pattern[str]:
    """What finds a beat in a story, in any of its phrasings and whatever their slots hold."""
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", r"[\\w' ]+", re.escape(phrasing)) for phrasing in phrasings))


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(islice(synthetic_stories(seed=3), 20_000))


def test_a_story_depends_on_seed_and_index_alone(stories):
    assert list(islice(synthetic_stories(3, start=777), 5)) == stories[777:782]
    assert [make_story(3, index) for index in (9_999, 0, 782)] == [stories[9_999], stories[0], stories[782]]
    far = 10**9  # where the validation stories begin
    assert next(synthetic_stories(3, far)) == make_story(3, far)


def test_stories_are_the_same_in_every_process():
    """Python hashes strings differently in every process: no story may depend on it."""
    code = "from data.synthetic_stories import make_story; print([make_story(5, index) for index in range(50)])"
    printed = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."}).stdout
               for seed in ("1", "2")}
    assert printed == {f"{[make_story(5, index) for index in range(50)]}\n"}


def test_other_seeds_give_other_stories(stories):
    assert not set(stories) & set(islice(synthetic_stories(4), 5_000))
    assert make_story(1, 11) != make_story(11, 1) and make_story(1, 0) != make_story(-1, 0)


def test_no_story_comes_twice_in_100_000():
    count = 100_000
    assert len({hash(story) for story in islice(synthetic_stories(0), count)}) == count


def test_every_slot_of_every_phrasing_is_filled():
    """Render every phrasing, also those that are rare."""
    cast = sample._cast(random.Random(0).choice, with_pet=False) | {"When": "One day"}
    for text in (*PLOTS.values(), *(opening["text"] for opening in OPENINGS)):
        for phrasing in (phrasing for phrasings in beats(text) for phrasing in phrasings):
            assert {slot for _, slot, _, _ in Formatter().parse(phrasing) if slot is not None} <= set(cast), phrasing
            assert re.fullmatch(r"""["A-Z][^{}|<>&]+[.!?]"?""", phrasing.format_map(cast)), phrasing


def test_text_is_clean(stories):
    for story in stories:
        assert story.isascii() and re.search(r"""[.!?]"?\Z""", story), story
        assert 60 <= len(story.split()) <= 260, story
        assert 2 <= len(story.split("\n")) <= 5, story
        assert not re.search(r"[^\w\s.,!?\"']|\s[.,!?\s]|[.,!?](?![\s\"]|$)|^\s|\s$", story, re.MULTILINE), story
        assert not re.search(r"\b(\w+) \1\b", story), story  # a word twice: "the the"
        assert not re.search(r"^[a-z]|[.!?] [a-z]", story, re.MULTILINE), story  # a sentence begins with a capital


def test_quotes_close_within_their_paragraph(stories):
    for story in stories:
        for paragraph in story.split("\n"):
            outside, inside = paragraph.split('"')[::2], paragraph.split('"')[1::2]
            assert len(outside) == len(inside) + 1, paragraph
            assert all(re.fullmatch(r"[A-Z].*[.,!?]", speech) for speech in inside), paragraph
            assert all(text[-1:] in ("", " ") for text in outside[:-1]), paragraph
            assert all(text[:1] in ("", " ") for text in outside[1:]), paragraph


def test_a_and_an_go_by_sound(stories):
    seen = Counter()
    for story in stories:
        for article, word in re.findall(r"\b(an?) (\w+)", story, re.IGNORECASE):
            says_vowel = word in SILENT_H or (word[0] in "aeiou" and word not in CONSONANT_SOUND)
            assert (article.lower() == "an") == says_vowel, (article, word, story)
            seen[word] += 1
    assert all(seen[word] for word in ("honest", "hour", "unicorn", "old", "apple", "orange")), "never put to the test"


def test_no_count_noun_goes_bare(stories):
    """Every singular count noun has a determiner or a possessive among the three words before it."""
    nouns = PLOT_NOUNS.union(*map(words_of, COUNT_NOUNS))
    seen = Counter()
    for story in stories[:5_000]:
        for clause in re.split(r"[^\w ']+", story.lower()):  # a determiner does not reach over a comma or full stop
            words = clause.split()
            for position, word in enumerate(words):
                if word.removesuffix("'s") in nouns:
                    before = words[max(0, position - 3):position]
                    assert any(w in DETERMINERS or w.endswith("'s") for w in before), (word, clause, story)
                    seen[word.removesuffix("'s")] += 1
    assert len(seen) > 100, "too few of the nouns were put to the test"


def test_who_is_in_a_story_stays_who_they_are(stories):
    """At most two names; no friend of the hero's own name; no second animal of a kind; the hero's own pronoun."""
    animals = "|".join(word for slot in ("pet", "wild", "young") for word in words_of(slot))
    for story in stories:
        hero, *others = names_in(story)
        assert len(others) <= 1, story
        assert hero not in re.findall(r"friend (\w+)", story), story
        kinds = re.findall(rf"\b(?:an?|his|her) (?:\w+ )?({animals})", story)
        pet = re.match(rf"\w+ and (?:his|her) ({animals})\b", story)
        if not pet:  # the pet is "his dog" again and again, and the same dog
            assert len(kinds) == len(set(kinds)), (kinds, story)
        else:
            assert set(kinds) <= {pet[1], *words_of("young")}, (kinds, story)
        opening = re.findall(r"\b(she|her|he|him|his)\b", story.split("\n")[0].lower())
        assert all((word in ("she", "her")) == (NAMES[hero] == "she") for word in opening), story


def test_every_plot_follows_every_opening(stories):
    ways = {name: (pattern(beats(text)[0]), pattern(beats(text)[-1])) for name, text in PLOTS.items()}
    assert len(ways) >= 12
    seen = Counter()
    for story in stories[:4_000]:
        manner, = (manner for manner in MANNERS if re.match(manner, story))
        plot, = (plot for plot, (first, last) in ways.items() if last.search(story) and first.search(story))
        seen[manner, plot] += 1
    assert len(seen) == len(MANNERS) * len(PLOTS)
    for once in MANNERS[:2]:  # half of all stories begin "Once upon a time", with and without a comma
        assert 0.22 < sum(n for (manner, _), n in seen.items() if manner == once) / 4_000 < 0.28


def test_the_vocabulary_is_large_enough_to_learn_a_tokenizer_from(stories):
    vocabulary = {word for story in stories for word in re.findall(r"[a-z]+(?:'s)?", story.lower())}
    assert len({word.removesuffix("'s") for word in vocabulary}) >= 600
