"""How often the verdict is wrong on real stories, and how much damage it sees.

    python tests/benchmarks/verdict.py --train train.txt --valid valid.txt     texts with <|endoftext|> between stories

Draws random splits of the validation stories, 200 against 200. One side may be damaged: in every story a share of the
words, by kind. Prints how often the verdict is "Not yet", and how often the measure of that kind is among its reasons.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from evaluation.text_metrics import Learned, learn, measure
from evaluation.verdict import find_differences, give_verdict

BEGINNING = 30  # characters of a story that are its prompt
WORD = re.compile(r"[^\W\d_][\w'’-]*")


def swap_names(text: str, share: float, chance: random.Random, names: list[str]) -> str:
    """Other names in the place of this share of the names."""
    def swap(match: re.Match) -> str:
        word = match.group().removesuffix("'s")
        if word.lower() not in known or not word[0].isupper() or chance.random() >= share:
            return match.group()
        return chance.choice(names).title() + match.group()[len(word):]
    known = set(names)
    return WORD.sub(swap, text)


def shuffle_words(text: str, share: float, chance: random.Random, names: list[str] = ()) -> str:
    """This share of the words of each sentence in another order."""
    def shuffle(match: re.Match) -> str:
        words = match.group().split(" ")
        places = [place for place in range(len(words)) if chance.random() < share]
        moved = places.copy()
        chance.shuffle(moved)
        changed = dict(zip(places, moved, strict=True))
        return " ".join(words[changed.get(place, place)] for place in range(len(words)))
    return re.sub(r"[^.!?\n]+", shuffle, text)


def repeat_phrases(text: str, share: float, chance: random.Random, names: list[str] = ()) -> str:
    """One phrase of five words of the story, repeated in it until it is this share of the words."""
    words = text.split(" ")
    start = chance.randrange(max(1, len(words) - 5))
    phrase, place = words[start:start + 5], 0
    for _ in range(round(share * len(words) / 5)):
        place = chance.randrange(len(words))
        words[place:place + 5] = phrase
    return " ".join(words)


def delete_articles(text: str, share: float, chance: random.Random, names: list[str] = ()) -> str:
    return re.sub(r"\b(?:an?|the) ", lambda match: "" if chance.random() < share else match.group(), text, flags=re.I)


DAMAGE: dict[str, tuple[Callable, str]] = {
    "names swapped": (swap_names, "names"), "words shuffled within sentences": (shuffle_words, "unseen"),
    "a phrase repeated": (repeat_phrases, "repeated"), "articles deleted": (delete_articles, "bare_nouns")}


def measure_all(texts: Iterable[str], learned: Learned) -> list[dict]:
    return [measure(text[BEGINNING:], learned, True, text[:BEGINNING]) for text in texts]


def found_in_splits(real: list[dict], changed: list[dict], key: str, splits: int, chance: random.Random,
                    count: int = 200) -> tuple[float, float]:
    """Shares of random splits in which the verdict is "not fluent", and in which `key` is a reason for that."""
    wrong = by_key = 0
    for _ in range(splits):
        places = chance.sample(range(len(real)), 2 * count)
        findings = find_differences([changed[place] for place in places[:count]],
                                    [real[place] for place in places[count:]])
        wrong += give_verdict(findings, count)["fluent"] is False
        by_key += key in findings and findings[key].is_fault
    return wrong / splits, by_key / splits


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the verdict is wrong, and how much damage it sees.")
    parser.add_argument("--train", type=Path, required=True, help="what words and names are learned from")
    parser.add_argument("--valid", type=Path, required=True, help="the stories that are compared and damaged")
    parser.add_argument("--splits", type=int, default=200)
    args = parser.parse_args()
    train, valid = ([text for part in path.read_text(encoding="utf-8").split("<|endoftext|>") if (text := part.strip())]
                    for path in (args.train, args.valid))
    learned, chance = learn(train), random.Random(0)
    real, names = measure_all(valid, learned), sorted(learned.names)
    print(f"{len(train):,} training and {len(valid):,} validation stories, {args.splits} splits, 200 against 200")
    print(f"undamaged: {found_in_splits(real, real, '', args.splits, chance)[0]:.1%} not fluent")
    for name, (damage, key) in DAMAGE.items():
        for share in (0.05, 0.1, 0.25):
            changed = measure_all((damage(text, share, chance, names) for text in valid), learned)
            wrong, by_key = found_in_splits(real, changed, key, args.splits, chance)
            print(f"{name}, {share:.0%}: found by {key} {by_key:.1%}, not fluent {wrong:.1%}", flush=True)


if __name__ == "__main__":
    main()
