"""The verdict: whether generated stories can be told from real ones, by at most six measures of fluency.

Variety and copying are reported beside it, not judged.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

MIN_STORIES = 100  # with fewer, only gross faults differ from chance
FALSE_ALARMS = 0.025  # by design; somewhat more in fact, as the shares of rare faults are skewed
FAULTS = {"repeated": ("stories repeat themselves", "of phrases"), "names": ("names change", "of stories"),
          "unseen": ("words are jumbled", "of word trigrams are not in the training text"),
          "bare_nouns": ("nouns lack their article", "of nouns"),
          "unfinished": ("sentences or quotes stay unfinished", "of stories"),
          "unknown": ("words are made up", "of words")}
ENGLISH = frozenset(("names", "bare_nouns"))  # measures that need English: its articles, its capitals for names only
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


class Finding(NamedTuple):
    """Shares of the model's stories and of the references, and the difference that chance explains."""

    model: float
    reference: float
    margin: float

    @property
    def is_fault(self) -> bool:
        return self.model - self.reference > self.margin


def find_differences(of_passages: Sequence[dict], of_references: Sequence[dict], english: bool = True,
                     ) -> dict[str, Finding]:
    """Each measure that both sides have, from the metrics of measure(): only a higher share is a fault.

    The margin is that of a one-sided z-test on a ratio over stories with the pooled ratio (Cochran, 1977, eq. 2.46),
    corrected for the number of measures (Bonferroni).
    """
    sides = {key: [np.array([story[key] for story in side], dtype=float).reshape(-1, 2)
                   for side in (of_passages, of_references)] for key in FAULTS if english or key not in ENGLISH}
    sides = {key: pair for key, pair in sides.items() if all(side[:, 1].sum() for side in pair)}
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / max(1, len(sides)))
    findings = {}
    for key, pair in sides.items():
        parts, wholes = np.concatenate(pair).sum(axis=0)
        variance = sum((((side[:, 0] - parts / wholes * side[:, 1]) / side[:, 1].sum()) ** 2).sum() for side in pair)
        findings[key] = Finding(*(float(side[:, 0].sum() / side[:, 1].sum()) for side in pair),
                                z * math.sqrt(variance))
    return findings


def give_verdict(findings: dict[str, Finding], num_stories: int) -> dict[str, Any]:
    """fluent: True, False, or None with too few stories or nothing to measure; line: the same in a sentence."""
    if num_stories < MIN_STORIES or not findings:
        return {"fluent": None, "line": f"No verdict: too few stories for a verdict ({num_stories}, at least "
                                        f"{MIN_STORIES})" if findings else "No verdict: nothing to measure"}
    faults = sorted((key for key, found in findings.items() if found.is_fault), reverse=True,
                    key=lambda key: (findings[key].model - findings[key].reference) / findings[key].margin)
    if not faults:
        return {"fluent": True, "line": f"Fluent: on {NUMBERS[len(findings)]} measures its stories cannot be told from "
                                        "real ones"}
    words = [f"{FAULTS[key][0]} ({_percent(findings[key].model)} {FAULTS[key][1]}, "
             f"{'' if place else 'real ones '}{_percent(findings[key].reference)})" for place, key in enumerate(faults)]
    return {"fluent": False, "line": "Not yet: " + " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))}


def _percent(share: float) -> str:
    return f"{share:.{0 if share >= 0.1 else 1}%}"
