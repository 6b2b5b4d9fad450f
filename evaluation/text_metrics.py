"""Measures of story texts: what grammar, variety and copying look like in numbers. No model, no torch.

    nouns = learn(training_texts)            # what the training text teaches: its words, its nouns
    per_story = [measure(text, nouns, ended) for text in texts]

measure() gives every figure as a pair (numerator, denominator), so that a share over many stories is the sum of the one
over the sum of the other: long stories count for as much as they are long.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

ARTICLES = frozenset(("a", "an", "the"))
DETERMINERS = ARTICLES | set(
    "this that these those my your his her its our their some any no each every another either neither much many more "
    "most several few all both enough such what which whose one two three four five six seven eight nine ten".split())
# words that no noun phrase contains: from a noun backwards, its determiner stands before the first of them or nowhere
OUTSIDE = frozenset(
    "i you he she it we they me him us them who there here of in on at to from with by for about into onto over under "
    "near behind between through across around up down out off inside outside like as than and or but so because if "
    "when while then is was are were be been am do does did has have had can could will would should must may might "
    "not very too just said asked saw went had got".split())
LETTERS = r"[^\W\d_]+"
TOKEN = re.compile(rf"{LETTERS}(?:['’-]{LETTERS})*|\d+|[^\w\s]")
# spelled with a vowel and said with a consonant ("a unicorn", "a one-eyed cat"), and the other way round ("an hour")
SAID_WITH_CONSONANT = re.compile(r"(?:uni(?!n|m)|us(?:e|u)|eu|ewe|one(?![a-z])|once|ufo|ukulele|utensil)")
SAID_WITH_VOWEL = re.compile(r"(?:hour|honest|honou?r|heir|herb)")


class Learned(NamedTuple):
    """What learn() took from the training text: its words, and the nouns that nearly always carry a determiner."""

    words: frozenset[str]
    nouns: frozenset[str]
    num_stories: int


def split_words(text: str) -> list[str]:
    """Words as they are written, and each punctuation mark as one more."""
    return TOKEN.findall(text.replace("’", "'"))


def is_word(token: str) -> bool:
    return token[0].isalpha()


def has_determiner(tokens: Sequence[str], index: int) -> bool:
    """Does the noun at `index` carry one: the, her, two, Tom's ..., with at most three words between, as in "a big,
    red rubber ball"?"""
    steps = 0
    for token in reversed(tokens[max(0, index - 7):index]):
        if token == ",":
            continue
        word = token.lower()
        if word in DETERMINERS or word.endswith("'s") or word.isdigit():
            return True
        steps += 1
        if steps > 3 or word in OUTSIDE or not is_word(token):
            return False
    return False


def learn(texts: Iterable[str], min_count: int = 20, share: float = 0.95) -> Learned:
    """The words of the training text, and its nouns that seldom stand bare.

    A noun here is a word seen min_count times or more that in `share` of its places has a determiner before it and in
    most is followed by something that is outside of a noun phrase: so "park" is one, and "big" is not. No part of
    speech is given; names, plurals and verbs fall out since they often stand without a determiner.
    """
    seen, with_determiner, ends_phrase, words, num_stories = Counter(), Counter(), Counter(), set(), 0
    for text in texts:
        num_stories += 1
        tokens = split_words(text)
        for index, token in enumerate(tokens):
            if not is_word(token):
                continue
            word = token.lower()
            words.add(word)
            if word in OUTSIDE or word in DETERMINERS or is_name(tokens, index):
                continue
            seen[word] += 1
            with_determiner[word] += has_determiner(tokens, index)
            after = tokens[index + 1].lower() if index + 1 < len(tokens) else "."
            ends_phrase[word] += after in OUTSIDE or not is_word(after)
    nouns = {word for word, count in seen.items() if count >= min_count and "'" not in word
             and with_determiner[word] >= share * count and ends_phrase[word] >= 0.6 * count}
    return Learned(frozenset(words), frozenset(nouns), num_stories)


def is_name(tokens: Sequence[str], index: int) -> bool:
    """Is the word capitalised in the midst of a sentence?"""
    return tokens[index][0].isupper() and index > 0 and (is_word(tokens[index - 1]) or tokens[index - 1] == ",")


def begins_with_vowel_sound(word: str) -> bool:
    """Is "an" right before it? By spelling, with the exceptions of stories: an hour, a unicorn, a one-eyed cat."""
    word = word.lower().split("-")[0]
    if len(word) == 1:  # the name of a letter: an X, an x-ray
        return word in "aefhilmnorsx"
    if SAID_WITH_VOWEL.match(word):
        return True
    return word[0] in "aeiou" and not SAID_WITH_CONSONANT.match(word)


def right_a_an(tokens: Sequence[str]) -> tuple[int, int]:
    """How many of the a and an before a word are the right one, and how many there are."""
    right = total = 0
    for article, after in pairwise(tokens):
        if article.lower() in ("a", "an") and is_word(after):
            total += 1
            right += (article.lower() == "an") == begins_with_vowel_sound(after)
    return right, total


def bare_nouns(tokens: Sequence[str], nouns: frozenset[str]) -> tuple[int, int]:
    """How many of the learned nouns stand without a determiner, and how many there are."""
    bare = total = 0
    for index, token in enumerate(tokens):
        if token.lower() in nouns and not is_name(tokens, index):
            total += 1
            bare += not has_determiner(tokens, index)
    return bare, total


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repeated_4grams(words: Sequence[str]) -> tuple[int, int]:
    """How many runs of four words stood earlier in the story (seq-rep-4: Welleck et al., 2020), and all of them."""
    grams = ngrams(words, 4)
    return len(grams) - len(set(grams)), len(grams)


def closed_quotes(text: str, ended: bool = True) -> tuple[int, int]:
    """How many quotes close before their paragraph ends, and how many open. “ ” and the straight mark are both known.

    A closing mark that nothing opened counts as a quote that does not close. The quote in which a story was cut off
    (ended: False) does not count.
    """
    closed = total = 0
    paragraphs = text.split("\n")
    for number, paragraph in enumerate(paragraphs):
        inside = False
        for mark in re.findall('["“”]', paragraph):
            if inside and mark != "“":
                closed, inside = closed + 1, False
            else:
                total, inside = total + 1, mark != "”"
        if inside and not ended and number == len(paragraphs) - 1:
            total -= 1
    return closed, total


def measure(text: str, learned: Learned, ended: bool = True) -> dict[str, tuple[float, float]]:
    """Every measure of one story as (numerator, denominator). ended: false if the story was cut off.

    articles: of all words. has_article: 1 of 1 if there is any. a_an: right ones. bare_nouns: of the learned nouns that
    are there. words: of 1 story. ended: 1 of 1. repeated: 4-grams that stood before. unknown: words that the training
    text does not have. quotes: those that close.
    """
    tokens = split_words(text)
    words = [token.lower() for token in tokens if is_word(token)]
    articles = sum(word in ARTICLES for word in words)
    return {"articles": (articles, len(words)), "has_article": (int(articles > 0), 1),
            "a_an": right_a_an(tokens), "bare_nouns": bare_nouns(tokens, learned.nouns), "words": (len(words), 1),
            "ended": (int(ended), 1), "repeated": repeated_4grams(words),
            "unknown": (sum(word not in learned.words for word in words), len(words)),
            "quotes": closed_quotes(text, ended)}


def distinct(texts: Sequence[str], n: int, num_words: int) -> tuple[int, int]:
    """How many different runs of n words the stories have, and how many runs (distinct-n: Li et al., 2016).

    The share falls as text grows, so only the first num_words words count: give both sides of a comparison the same.
    """
    grams = []
    for text in texts:
        words = [token.lower() for token in split_words(text) if is_word(token)][:num_words]
        num_words -= len(words)
        grams += ngrams(words, n)
    return len(set(grams)), len(grams)
