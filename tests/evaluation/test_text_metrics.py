"""Each measure of stories shows the fault it is named for, on text made to have that fault and on text that has not."""

import random
import re

import numpy as np
import pytest

from evaluation.memorization import SHORTEST, longest_runs
from evaluation.text_metrics import (
    begins_with_vowel_sound,
    closed_quotes,
    distinct,
    has_determiner,
    has_words,
    learn,
    measure,
    split_words,
)


@pytest.fixture(scope="module")
def learned(stories):
    return learn(stories[:300], min_count=10)


def totals(texts, learned, **more):
    """Each measure as a share over all texts."""
    sums = {}
    for text in texts:
        for name, (part, whole) in measure(text, learned, **more).items():
            before = sums.get(name, (0, 0))
            sums[name] = before[0] + part, before[1] + whole
    return {name: part / max(1, whole) for name, (part, whole) in sums.items()}


def without_articles(text, share, chance):
    return re.sub(r"\b(?:an?|the) ", lambda match: "" if chance.random() < share else match.group(), text, flags=re.I)


def test_articles_deleted_at_random_show_as_what_they_are(stories, learned):
    chance, texts = random.Random(0), stories[300:]
    before = totals(texts, learned)
    assert 0.04 < before["articles"] < 0.2 and before["bare_nouns"] < 0.05
    for share in (0.25, 0.5, 1.0):
        after = totals([without_articles(text, share, chance) for text in texts], learned)
        assert after["articles"] == pytest.approx((1 - share) * before["articles"], rel=0.12, abs=1e-9)
        assert after["bare_nouns"] > before["bare_nouns"] + 0.4 * share
        assert after["repeated"] == pytest.approx(before["repeated"], abs=0.05)  # and not as something else
        assert after["unknown"] == pytest.approx(before["unknown"], abs=0.01)


def test_the_nouns_are_nouns(learned):
    assert len(learned.nouns) > 10
    assert not learned.nouns & set("the a she he ran said was big happy little red and with to day. lily tom".split())


@pytest.mark.parametrize(("text", "noun", "expected"), [
    ("She saw a big red ball.", "ball", True), ("She saw big red ball.", "ball", False),
    ("She saw a big, red ball.", "ball", True), ("She went to park with her dog.", "park", False),
    ("They ate Tom's sandwich.", "sandwich", True), ("They had 2 cakes.", "cakes", True),
    ("The cat ran. Dog barked.", "Dog", False)])
def test_a_determiner_is_found_within_its_phrase(text, noun, expected):
    tokens = split_words(text)
    assert has_determiner(tokens, tokens.index(noun)) == expected


def test_a_or_an_goes_by_the_sound_of_the_next_word(stories, learned):
    vowels = "apple hour honest umbrella egg uncle usher x-ray F unhappy onion".split()
    consonants = "cat unicorn one-eyed useful European university yellow U house".split()
    assert all(map(begins_with_vowel_sound, vowels)) and not any(map(begins_with_vowel_sound, consonants))
    before = totals(stories[300:], learned)["a_an"]
    swapped = [re.sub(r"\b(an?) ", lambda m: "an " if m.group(1) == "a" else "a ", text) for text in stories[300:]]
    assert before > 0.98 and totals(swapped, learned)["a_an"] < 0.1
    assert measure("A hour. An cat. An apple, a dog and a", learned)["a_an"] == (2, 4)


def test_repetition_and_variety(stories, learned):
    text = stories[300]
    assert measure("one two three four five six", learned)["repeated"] == (0, 3)
    assert measure("go on and on. Go on and on.", learned)["repeated"] == (1, 5)
    assert totals([text + " " + text], learned)["repeated"] > 0.45 > totals([text], learned)["repeated"]
    assert distinct(["a b a b", "a b"], 1, 6) == (2, 6)
    assert distinct(["a b a b", "a b"], 2, 6) == (2, 4)  # no pair goes from one story into the next
    assert distinct(["a b c", "d e"], 1, 4) == (4, 4)  # the first four words
    same, varied = distinct([stories[0]] * 10, 3, 10_000), distinct(stories[:10], 3, 10_000)
    assert same[0] / same[1] < 0.11 < varied[0] / varied[1]


def test_unknown_words_are_those_that_the_training_text_lacks(stories, learned):
    assert totals(stories[:300], learned)["unknown"] == 0
    assert measure("The zorblax was Quibbly.", learned)["unknown"] == (2, 4)


@pytest.mark.parametrize(("text", "ended", "expected"), [
    ('"Hi," she said. "Bye."', True, (2, 2)), ('"Hi, she said.\n"Bye."', True, (1, 2)),
    ("“Hi,” he said, “Bye.", True, (1, 2)), ("“Hi,” he said, “Bye.", False, (1, 1)), ("Hi,” he said.", True, (0, 1)),
    ("“One. “Two.”", True, (1, 2)), ('"One.\nTwo', False, (0, 1)), ("None.", True, (0, 0))])
def test_quotes_that_close(text, ended, expected):
    assert closed_quotes(text, ended) == expected


def test_half_of_all_quotation_marks_deleted_shows(stories, learned):
    texts = [text for text in stories if '"' in text]
    broken = [re.sub(r'"(\s|$)', r"\1", text) for text in texts]  # every closing mark
    assert len(texts) > 50 and totals(texts, learned)["unfinished"] < 0.01
    assert totals(broken, learned)["unfinished"] > 0.8


# What was copied

def slow_longest_run(story, training):
    best = 0
    for start in range(len(story)):
        while any(np.array_equal(training[place:place + best + 1], story[start:start + best + 1])
                  for place in range(len(training) - best)) and start + best + 1 <= len(story):
            best += 1
    return best if best >= SHORTEST else 0


def test_the_longest_run_is_that_of_an_exhaustive_search(monkeypatch):
    monkeypatch.setattr("evaluation.memorization.CHUNK", 50)  # so that runs go across chunks
    random_numbers = np.random.default_rng(0)
    training = random_numbers.integers(0, 3, 300).astype(np.uint16)  # three words: many partial matches
    stories = [random_numbers.integers(0, 3, 40) for _ in range(8)]
    stories += [training[45:95], np.concatenate([training[:30], training[200:260]]), training[-9:], training[:5], [],
                np.full(20, 7)]
    found = longest_runs(stories, training, show_progress=False)
    assert found.tolist() == [slow_longest_run(np.asarray(story), training) for story in stories]
    assert found[8] == 50 and found[9] >= 60 and found[10] == 9 and found[-3:].tolist() == [0, 0, 0]


def test_a_hash_that_collides_is_not_believed(monkeypatch):
    monkeypatch.setattr("evaluation.memorization._hash_runs", lambda tokens, length: np.zeros(
        max(0, len(tokens) - length + 1), dtype=np.uint64))
    monkeypatch.setattr("evaluation.memorization.BASE", np.uint64(0))
    assert longest_runs([np.arange(30)], np.arange(100, 200), show_progress=False).tolist() == [0]


@pytest.mark.parametrize(("text", "words"), [
    ("एक लड़की थी।", ["एक", "लड़की", "थी", "।"]), ("সে বাগানে গেল!", ["সে", "বাগানে", "গেল", "!"]),
    ("ذَهَبَتْ لَيْلَى.", ["ذَهَبَتْ", "لَيْلَى", "."]), ("Zoë’s cafe\u0301", ["Zoë's", "cafe\u0301"])])
def test_words_of_other_scripts_are_whole(text, words):
    """Their vowels may be combining marks, which Python's regular expressions take for no letters."""
    assert split_words(text) == words


@pytest.mark.parametrize(("text", "has"), [
    ("A cat sat.", True), ("एक लड़की थी।", True), ("어디 있니?", True), ("从前有一只猫。", False),
    ("猫がいました。", False), ("แมวนั่ง", False)])
def test_scripts_without_spaces_have_no_words_to_count(text, has):
    assert has_words([text] * 3) == has
