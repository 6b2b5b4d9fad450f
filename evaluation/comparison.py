"""The comparison of generated stories with references: a table of text metrics, each with a verdict."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from evaluation.memorization import longest_runs
from evaluation.references import Passage
from evaluation.text_metrics import Learned, distinct, measure
from evaluation.verdict import ENGLISH as ENGLISH_FAULTS
from evaluation.verdict import FAULTS, Finding


class Row(NamedTuple):
    """A row of the table.

    tolerance: differences up to this size are ignored; in the row's unit, or relative to the reference.
    low, high: what a lower or a higher figure of the model means; "" where it is not a fault, or verdict.py says it.
    """

    key: str
    title: str
    scale: float
    tolerance: float
    relative: bool
    low: str = ""
    high: str = ""


ROWS = (
    Row("articles", "articles per 100 words", 100, 0.1, True, "articles are missing", "too many articles"),
    Row("a_an", "right a or an, by the next sound, %", 100, 1, False, "wrong before some sounds"),
    Row("bare_nouns", "count nouns left bare, %", 100, 0, False),
    Row("names", "stories whose names change, %", 100, 0, False),
    Row("unseen", "trigrams not in the training text, %", 100, 0, False),
    Row("words", "words a story", 1, 0.2, True, "shorter stories", "longer stories"),
    Row("ended", "ended by <|endoftext|>, %", 100, 5, False, "many were cut off"),
    Row("distinct_2", "distinct-2, %", 100, 0.15, True, "less varied", "more varied"),
    Row("repeated", "repeated 4-grams in a story, %", 100, 0, False),
    Row("unknown", "words not in the training text, %", 100, 0, False),
    Row("run", "longest run copied, tokens", 1, 3, False, "", "copies more than real stories do"),
    Row("copied", "share of the story in that run, %", 100, 5, False, "", "partly memorized"),
    Row("unfinished", "unfinished sentences or quotes, %", 100, 0, False),
)
ENGLISH = ("articles", "a_an", *ENGLISH_FAULTS)  # what only English text has


def measure_passages(passages: Sequence[Passage], learned: Learned, tokenizer: Tokenizer, training: np.ndarray,
                     show_progress: bool = True) -> list[dict[str, tuple[float, float]]]:
    """Each metric of each passage, as (numerator, denominator); see evaluation/text_metrics.py."""
    encodings = tokenizer.encode_batch([passage.text for passage in passages], add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    runs = longest_runs(ids, training, show_progress).tolist()
    return [{**measure(passage.text, learned, passage.ended, passage.prompt), "run": (run, 1),
             "copied": (run, len(tokens))}
            for passage, run, tokens in zip(passages, runs, ids, strict=True)]


def compare(passages: Sequence[Passage], references: Sequence[Passage], of_passages: Sequence[dict],
            of_references: Sequence[dict], findings: dict[str, Finding], english: bool = True) -> list[dict[str, Any]]:
    """The rows of the table: title, model, reference (numbers, or None where there is nothing to measure), verdict.

    of_passages, of_references: the metrics from measure_passages(); findings: from find_differences(), the verdict
    on the measures of fluency. Another verdict differs from "ok" if the difference exceeds the row's tolerance and,
    for ratios over stories, two standard errors. The rows of ENGLISH are left out if the text is not English.
    """
    num_words = int(min(sum(figures["words"][0] for figures in side) for side in (of_passages, of_references)))
    table = []
    for row in (row for row in ROWS if english or row.key not in ENGLISH):
        if row.key.startswith("distinct"):
            n = int(row.key[-1])
            (found, error), (expected, spread) = (
                (_share([distinct([passage.text for passage in side], n, num_words)])[0], 0.0)
                for side in (passages, references))
        else:
            (found, error), (expected, spread) = (
                _share([figures[row.key] for figures in side]) for side in (of_passages, of_references))
        verdict = _verdict(row, found, expected, 2 * math.hypot(error, spread))
        if row.key in findings:
            verdict = FAULTS[row.key][0] if findings[row.key].is_fault else "ok"
        table.append({"key": row.key, "title": row.title, "model": None if found is None else row.scale * found,
                      "reference": None if expected is None else row.scale * expected, "verdict": verdict})
    return table


def _share(pairs: Iterable[tuple[float, float]]) -> tuple[float | None, float]:
    """The ratio of the sums, and its standard error (of a ratio estimator: Cochran, 1977, eq. 2.46)."""
    parts, wholes = np.array(list(pairs), dtype=float).reshape(-1, 2).T
    if not wholes.sum():
        return None, 0.0
    ratio = parts.sum() / wholes.sum()
    return float(ratio), float(np.sqrt(((parts - ratio * wholes) ** 2).sum()) / wholes.sum())


def _verdict(row: Row, found: float | None, expected: float | None, noise: float) -> str:
    if found is None or expected is None:
        return "nothing to measure"
    difference = row.scale * (found - expected)
    tolerance = row.tolerance * row.scale * expected if row.relative else row.tolerance
    if abs(difference) <= max(tolerance, row.scale * noise):
        return "ok"
    return (row.low if difference < 0 else row.high) or "ok"


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The table as aligned text."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    width = max(len(line["title"]) for line in table)
    lines = [f"{'':{width}}  {'model':>7}  {'reference':>9}  verdict"]
    lines += [f"{line['title']:{width}}  {number(line['model']):>7}  {number(line['reference']):>9}  {line['verdict']}"
              for line in table]
    return "\n".join(lines)
