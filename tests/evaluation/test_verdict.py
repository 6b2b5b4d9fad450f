"""The verdict sees broken stories, names what is broken, and seldom takes real stories for broken ones."""

import random
import sys
from itertools import islice

import pytest
from conftest import REPO

from data.synthetic_stories import synthetic_stories
from evaluation.text_metrics import learn, measure, names_change, split_words, unfinished
from evaluation.verdict import FAULTS, MIN_STORIES, Finding, find_differences, give_verdict

sys.path.insert(0, str(REPO / "tests"))
from benchmarks.verdict import BEGINNING, DAMAGE, found_in_splits, measure_all


@pytest.fixture(scope="module")
def world():
    """What was learned, and texts that were not seen."""
    texts = list(islice(synthetic_stories(seed=7), 900))
    return learn(texts[:400], min_count=10), texts[400:]


def test_real_stories_are_fluent_and_each_damage_is_found_by_its_own_measure(world):
    learned, texts = world
    chance, real = random.Random(0), measure_all(texts, learned)
    assert found_in_splits(real, real, "", 40, chance, MIN_STORIES)[0] <= 0.05
    for damage, key in DAMAGE.values():
        changed = measure_all((damage(text, 0.25, chance, sorted(learned.names)) for text in texts), learned)
        assert found_in_splits(real, changed, key, 10, chance, MIN_STORIES)[1] == 1.0, key


def test_text_without_english_is_judged_without_its_measures(world):
    real = measure_all(world[1], world[0])
    assert set(find_differences(real[:200], real[200:])) == set(FAULTS)
    some = find_differences(real[:200], real[200:], english=False)
    assert set(some) == set(FAULTS) - {"names", "bare_nouns"}
    assert give_verdict(some, 200)["line"].startswith("Fluent: on four measures")


def test_the_worst_comes_first_and_the_reference_stands_beside_it():
    findings = {"names": Finding(0.31, 0.06, 0.1), "repeated": Finding(0.041, 0.010, 0.004),
                "unknown": Finding(0.001, 0.03, 0.004)}  # fewer faults than real stories have are no fault
    verdict = give_verdict(findings, 200)
    assert verdict == {"fluent": False, "line": "Not yet: stories repeat themselves (4.1% of phrases, real ones 1.0%) "
                       "and names change (31% of stories, 6.0%)"}
    few = give_verdict(findings, MIN_STORIES - 1)
    assert few["fluent"] is None and f"({MIN_STORIES - 1}, at least {MIN_STORIES})" in few["line"]
    assert give_verdict({}, 200)["fluent"] is None


@pytest.mark.parametrize(("text", "expected"), [
    ("Lily saw Tom . She ran to Lily and Tom .", (0, 1)), ("Lily saw a cat . Then Tom saw a dog .", (1, 1)),
    ("Lily saw a cat . Then she saw a big dog .", (1, 1)), ("A girl saw a cat . Then Tom came home .", (1, 1)),
    ("Lily's cat was big . It was Lily's .", (0, 1)), ("A girl saw a cat . She was sad .", (0, 0))])
def test_names_that_change_halfway(text, expected):
    assert names_change(split_words(text), frozenset(("lily", "tom"))) == expected


@pytest.mark.parametrize(("text", "ended", "expected"), [
    ("She ran.", True, False), ("She ran", True, True), ("She ran", False, False), ('"Hi," she said.', True, False),
    ('"Hi, she said.', True, True), ('"Hi, she', False, False), ("वह गई।", True, False),
    ('She said "Hi!" \n', True, False)])
def test_sentences_and_quotes_that_stay_unfinished(text, ended, expected):
    assert unfinished(text, ended) == expected


def test_trigrams_of_the_training_text_are_known_and_others_are_not(world):
    learned = learn(["The cat sat on the mat. The dog ran."])
    for text, expected in (("the cat sat on the mat", (0, 4)), ("Sat on the dog!", (1, 2)), ("the zebra sat", (1, 1)),
                           ("the cat", (0, 0))):
        assert measure(text, learned)["unseen"] == expected


def test_the_beginning_counts_for_names_only(world):
    learned, texts = world
    with_prompt = measure(texts[0][BEGINNING:], learned, True, texts[0][:BEGINNING])
    alone = measure(texts[0][BEGINNING:], learned)
    assert {key: value for key, value in with_prompt.items() if key != "names"} == {
        key: value for key, value in alone.items() if key != "names"}
