"""Metrics of story texts: numbers for grammar, variety and repetition. They need no model.

    learned = learn(training_texts)          # the words of the training text, and its count nouns
    per_story = [measure(text, learned, ended) for text in texts]

measure() returns each metric as a pair (numerator, denominator). The ratio over many stories is the sum of the
numerators over the sum of the denominators, so that a story counts in proportion to its length.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ARTICLES = frozenset(("a", "an", "the"))
DETERMINERS = ARTICLES | set(
    "this that these those my your his her its our their some any no each every another either neither much many more "
    "most several few all both enough such what which whose one two three four five six seven eight nine ten".split())
# words that no noun phrase contains; the search for a noun's determiner, from the noun backwards, stops at them
OUTSIDE = frozenset(
    "i you he she it we they me him us them who there here of in on at to from with by for about into onto over under "
    "near behind between through across around up down out off inside outside like as than and or but so because if "
    "when while then is was are were be been am do does did has have had can could will would should must may might "
    "not very too just said asked saw went had got".split())
# Python's \w has no combining marks, which are the vowels of Hindi and many other scripts
MARKS = "".join(chr(code) for code in range(0x300, 0xAC00) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
LETTERS = rf"[^\W\d_](?:[^\W\d_]|[{MARKS}])*"
TOKEN = re.compile(rf"{LETTERS}(?:['’-]{LETTERS})*|\d+|[^\w\s]")
# scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, Chinese and Japanese
WITHOUT_SPACES = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# spelled with a vowel but pronounced with a consonant ("a unicorn", "a one-eyed cat"), and the reverse ("an hour")
SAID_WITH_CONSONANT = re.compile(r"(?:uni(?!n|m)|us(?:e|u)|eu|ewe|one(?![a-z])|once|ufo|ukulele|utensil)")
SAID_WITH_VOWEL = re.compile(r"(?:hour|honest|honou?r|heir|herb)")


SENTENCE_ENDS = frozenset(".!?…\"”'’)»।۔؟")
SHARE = 0.95  # of the occurrences of a word that make it a count noun or a name
FILTER_BITS = 27  # of the filter of trigrams: 128 MB; some 6 million trigrams fill 4% of it


class Learned(NamedTuple):
    """What learn() found in the training text.

    words: an id for each. nouns: those that nearly always have a determiner. names: words nearly always capitalized
    inside a sentence. trigrams: bool, (2**FILTER_BITS,), true at the hash of each trigram of words.
    """

    words: dict[str, int]
    nouns: frozenset[str]
    names: frozenset[str]
    trigrams: np.ndarray


def split_words(text: str) -> list[str]:
    """The words and the punctuation marks of a text, in order."""
    return TOKEN.findall(text.replace("’", "'"))


def has_words(texts: Iterable[str]) -> bool:
    """Whether spaces separate the words of these texts, as they do not in Chinese, Japanese and Thai."""
    text = "".join(texts)
    return 2 * len(WITHOUT_SPACES.findall(text)) < sum(map(str.isalpha, text))


def is_word(token: str) -> bool:
    return token[0].isalpha()


def has_determiner(tokens: Sequence[str], index: int) -> bool:
    """Whether the noun at `index` has a determiner: the, her, two, Tom's ...

    At most three words may stand between the two, as in "a big, red rubber ball".
    """
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


def learn(texts: Iterable[str], min_count: int = 20) -> Learned:
    """The words of the training text, its trigrams, its names, and its nouns that seldom lack a determiner.

    A word counts as such a noun if it occurs at least min_count times, has a determiner in SHARE of its occurrences,
    and is followed by a word outside of the noun phrase in most: "park" is one, "big" is not. Names, plurals and verbs
    often occur without a determiner, so they are not in the list.
    """
    seen, with_determiner, ends_phrase = Counter(), Counter(), Counter()
    named, lower, words, trigrams = Counter(), Counter(), {}, np.zeros(1 << FILTER_BITS, dtype=bool)
    for text in texts:
        tokens = split_words(text)
        for word in (in_story := [token.lower() for token in tokens if is_word(token)]):
            words.setdefault(word, len(words))
        trigrams[_hash_trigrams(in_story, words)] = True
        for index, token in enumerate(tokens):
            word = token.lower()
            if not is_word(token) or word in OUTSIDE or word in DETERMINERS:
                continue
            if is_name(tokens, index):
                named[word.removesuffix("'s")] += 1
                continue
            seen[word] += 1
            with_determiner[word] += has_determiner(tokens, index)
            after = tokens[index + 1].lower() if index + 1 < len(tokens) else "."
            ends_phrase[word] += after in OUTSIDE or not is_word(after)
            lower[word] += token[0].islower()
    nouns = {word for word, count in seen.items() if count >= min_count and "'" not in word
             and with_determiner[word] >= SHARE * count and ends_phrase[word] >= 0.6 * count}
    names = {word for word, count in named.items() if count >= min_count / 4 and lower[word] <= (1 - SHARE) * count
             and not word.startswith("i'")}
    return Learned(words, frozenset(nouns), frozenset(names), trigrams)


def _hash_trigrams(words: Sequence[str], ids: dict[str, int]) -> np.ndarray:
    """A place in the filter for each trigram of the words, int64, (number of words - 2,)."""
    known = np.array([ids.get(word, -1) for word in words], dtype=np.int64).astype(np.uint64)
    base = np.uint64(0x9E3779B97F4A7C15)  # odd, for a polynomial hash modulo 2**64
    hashes = ((known[:-2] * base + known[1:-1]) * base + known[2:]) * base
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def is_name(tokens: Sequence[str], index: int) -> bool:
    """Whether the word is capitalized inside a sentence."""
    return tokens[index][0].isupper() and index > 0 and (is_word(tokens[index - 1]) or tokens[index - 1] == ",")


def begins_with_vowel_sound(word: str) -> bool:
    """Whether "an" is right before the word: by its spelling, with exceptions such as an hour and a unicorn."""
    word = word.lower().split("-")[0]
    if len(word) == 1:  # the name of a letter: an X, an x-ray
        return word in "aefhilmnorsx"
    if SAID_WITH_VOWEL.match(word):
        return True
    return word[0] in "aeiou" and not SAID_WITH_CONSONANT.match(word)


def right_a_an(tokens: Sequence[str]) -> tuple[int, int]:
    """How many of the a and an before a word are right, and how many there are."""
    right = total = 0
    for article, after in pairwise(tokens):
        if article.lower() in ("a", "an") and is_word(after):
            total += 1
            right += (article.lower() == "an") == begins_with_vowel_sound(after)
    return right, total


def bare_nouns(tokens: Sequence[str], nouns: frozenset[str]) -> tuple[int, int]:
    """How many of the learned nouns lack a determiner, and how many of these nouns there are."""
    bare = total = 0
    for index, token in enumerate(tokens):
        if token.lower() in nouns and not is_name(tokens, index):
            total += 1
            bare += not has_determiner(tokens, index)
    return bare, total


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repeated_4grams(words: Sequence[str]) -> tuple[int, int]:
    """How many 4-grams occurred earlier in the story, and how many there are (seq-rep-4: Welleck et al., 2020)."""
    grams = ngrams(words, 4)
    return len(grams) - len(set(grams)), len(grams)


def closed_quotes(text: str, ended: bool = True) -> tuple[int, int]:
    """How many quotes close before their paragraph ends, and how many there are; “ ” and straight marks.

    A closing mark without an opening one counts as a quote that does not close. If the story was cut off
    (ended: False), the quote at its end does not count.
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


def unfinished(text: str, ended: bool = True) -> bool:
    """Whether the story ends inside a sentence, unless it was cut off (ended: False), or a quote stays open."""
    closed, quotes = closed_quotes(text, ended)
    return closed < quotes or (ended and text.rstrip()[-1:] not in SENTENCE_ENDS)


def names_change(tokens: Sequence[str], names: frozenset[str]) -> tuple[int, int]:
    """1 of 1 if the second half of the story has a name that the first has not, or lost the first's commonest name.

    0 of 0 if the story has no names.
    """
    mentions = [word if token[0].isupper() and (word := token.lower().removesuffix("'s")) in names else ""
                for token in tokens]
    half = len(tokens) // 2
    first, second = (Counter(filter(None, part)) for part in (mentions[:half], mentions[half:]))
    lost = bool(first) and first.most_common(1)[0][0] not in second
    return int(lost or bool(set(second) - set(first))), int(bool(first or second))


def measure(text: str, learned: Learned, ended: bool = True, prompt: str = "") -> dict[str, tuple[float, float]]:
    """Each metric of one story as (numerator, denominator). ended: false if the story was cut off.

    articles: of all words. a_an: right ones. bare_nouns: of the learned nouns in
    the story. words: of 1 story. ended: 1 of 1. repeated: 4-grams that occurred before. unknown: words that the
    training text does not have. unseen: trigrams that it does not have. unfinished, names: 1 of 1 at fault; for the
    names alone the prompt counts as a part of the story.
    """
    tokens = split_words(text)
    words = [token.lower() for token in tokens if is_word(token)]
    articles = sum(word in ARTICLES for word in words)
    places = _hash_trigrams(words, learned.words)
    return {"articles": (articles, len(words)), "a_an": right_a_an(tokens), "words": (len(words), 1),
            "bare_nouns": bare_nouns(tokens, learned.nouns), "ended": (int(ended), 1),
            "repeated": repeated_4grams(words),
            "unknown": (sum(word not in learned.words for word in words), len(words)),
            "unseen": (len(places) - int(learned.trigrams[places].sum()), len(places)),
            "unfinished": (int(unfinished(text, ended)), 1),
            "names": names_change([*split_words(prompt), *tokens], learned.names)}


def distinct(texts: Sequence[str], n: int, num_words: int) -> tuple[int, int]:
    """How many different n-grams the stories have, and how many n-grams (distinct-n: Li et al., 2016).

    The ratio falls with the length of the text, so only the first num_words words count; both sides of a comparison
    need the same num_words.
    """
    grams = []
    for text in texts:
        words = [token.lower() for token in split_words(text) if is_word(token)][:num_words]
        num_words -= len(words)
        grams += ngrams(words, n)
    return len(set(grams)), len(grams)
