"""A language model's marks for stories, as in the TinyStories paper (Eldan & Li, 2023, section 3: GPT-Eval).

A judge behind any OpenAI-compatible address marks the model's stories and as many real ones with the same beginnings,
in mixed order and without knowing which is which. Its prompt is judge_prompt.txt.
"""

import contextlib
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import UserError
from config.wording import counted, one_line
from data.atomic_files import atomic_write

PROMPT = Path(__file__).parent / "judge_prompt.txt"
MARKS = ("grammar", "creativity", "consistency", "plot")
AGES = ("3 or under", "4-5", "6-7", "8-9", "10-12", "13-16")
TIMEOUT, TRIES, LONGEST_WAIT = 60.0, 5, 60.0  # seconds; tries of a call; seconds between two of them at the most
ANSWER_TOKENS, CHARACTERS_PER_TOKEN = 100, 4  # about so many, for the estimate of the cost


class BadAnswer(Exception):
    """The judge answered something else than marks."""


class Judge:
    """An OpenAI-compatible endpoint. url: its address, or None for OpenAI's; the key is OPENAI_API_KEY alone.

    wait: sleeps for so many seconds. temperature: 0, or None (the endpoint's default) once it has refused 0.
    """

    def __init__(self, model: str, url: str | None, wait: Callable[[float], object] = time.sleep,
                 timeout: float = TIMEOUT) -> None:
        import openai  # optional
        self.model, self.url, self.wait, self.temperature = model, url, wait, 0
        self.errors, self.key = openai, os.environ.get("OPENAI_API_KEY", "")
        self.client = openai.OpenAI(api_key=self.key or "none", base_url=url, timeout=timeout, max_retries=0)

    def mark(self, beginning: str, completion: str) -> dict[str, Any]:
        """The marks, the age and the comment. Raises BadAnswer after TRIES bad answers, UserError if none comes."""
        text = PROMPT.read_text(encoding="utf-8").replace("{beginning}", beginning).replace("{completion}", completion)
        failure: Exception = BadAnswer("no answer")
        for number in range(TRIES):
            pause = min(LONGEST_WAIT, 2.0 ** number)
            try:
                return parse_marks(self.ask(text))
            except BadAnswer as error:
                failure, pause = error, 0.0
            except self.errors.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise self.explain(error, "its quota is used up") from None
                failure, pause = error, retry_after(error.response.headers, pause)
            except (self.errors.APIConnectionError, self.errors.InternalServerError) as error:  # a timeout, too
                failure = error
            except self.errors.BadRequestError as error:
                if self.temperature is None or "temperature" not in str(error):
                    raise self.explain(error, "refuses the request") from None
                self.temperature, pause = None, 0.0
            except (self.errors.AuthenticationError, self.errors.PermissionDeniedError) as error:
                raise self.explain(error, "refuses the key: set OPENAI_API_KEY to a valid one", False) from None
            except self.errors.APIError as error:
                raise self.explain(error, "refuses the request") from None
            if number < TRIES - 1 and pause:
                self.wait(pause)
        if isinstance(failure, BadAnswer):
            raise failure
        raise self.explain(failure, f"gives no answer, after {TRIES} tries") from None

    def ask(self, text: str) -> str:
        """The judge's answer to a prompt."""
        more = {} if self.temperature is None else {"temperature": self.temperature}
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": text}], **more)
            return answer.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError, ValueError):  # a web page, say, or another protocol's JSON
            raise BadAnswer("not an answer of the chat protocol") from None

    def explain(self, error: Exception, what: str, quote: bool = True) -> UserError:
        """One line without the key, which an endpoint may quote in part: then quote is False."""
        said = one_line(str(error).replace(self.key, "[key]") if self.key else str(error))[:200]
        return UserError(f"--judge {self.model}: {self.url or 'the endpoint'} {what}" + (f" ({said})" if quote else ""))


def retry_after(headers: Any, otherwise: float) -> float:
    """The seconds that an endpoint asks to wait, at most LONGEST_WAIT."""
    with contextlib.suppress(ValueError):
        return min(LONGEST_WAIT, max(0.0, float(headers.get("retry-after", ""))))
    return otherwise


def parse_marks(answer: str) -> dict[str, Any]:
    """The marks of a judge's answer: a JSON object, perhaps between other words. Raises BadAnswer."""
    try:
        found = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
        marks = {name: found[name] for name in MARKS}
    except (ValueError, KeyError, RecursionError):
        raise BadAnswer(f"no marks in the answer: {one_line(answer)[:80]}") from None
    for name, mark in marks.items():
        if isinstance(mark, bool) or not isinstance(mark, (int, float)) or not 1 <= mark <= 10:
            raise BadAnswer(f"{name} is {one_line(str(mark))[:20]}, not from 1 to 10")
    age, comment = found.get("age"), found.get("comment", "")
    return {**marks, "age": age if age in AGES else None, "comment": one_line(str(comment))[:300]}


def judge_stories(judge: Judge, stories: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]], path: Path,
                  confirm: Callable[[str], None], show_progress: bool = True) -> dict[str, Any]:
    """Have the model's stories and the real ones judged, and write the result to `path` after each answer.

    stories, references: with "prompt" and "text", in pairs. confirm: takes the cost as text and raises UserError if it
    is too much. What `path` has of the same judge, prompt and story is not asked for again. Returns what `path` then
    holds: model, url, temperature, prompt_sha256, answers (by the hash of a story: marks, age, comment, or error) and
    summary, see summarize(). Raises UserError and KeyboardInterrupt; the answers so far are kept.
    """
    prompt_hash = hashlib.sha256(PROMPT.read_bytes()).hexdigest()
    old = read_answers(path)
    answers = {key: answer for key, answer in old.items() if "error" not in answer}
    keys = [[hashlib.sha256("\0".join((prompt_hash, judge.model, judge.url or "", one["prompt"], one["text"]))
                            .encode("utf-8", "replace")).hexdigest() for one in side] for side in (stories, references)]
    todo = {key: one for of_side, side in zip(keys, (stories, references), strict=True)
            for key, one in zip(of_side, side, strict=True) if key not in answers}
    order = sorted(todo)
    random.Random(0).shuffle(order)  # mixed, so that a judge that changes with time does so for both
    size = len(PROMPT.read_text(encoding="utf-8"))
    tokens = sum(size + len(one["prompt"]) + len(one["text"]) for one in todo.values()) // CHARACTERS_PER_TOKEN
    if todo:
        confirm(f"{counted(len(todo), 'call')} of {judge.model}, about {tokens + ANSWER_TOKENS * len(todo):,} tokens")

    def result() -> dict[str, Any]:
        return {"model": judge.model, "url": judge.url, "temperature": judge.temperature, "prompt_sha256": prompt_hash,
                "answers": answers, "summary": summarize(*([answers.get(key) for key in side] for side in keys),
                                                         stories)}

    for key in tqdm(order, desc="judge", unit="story", leave=False, disable=None if show_progress else True):
        try:
            answers[key] = judge.mark(todo[key]["prompt"], todo[key]["text"])
        except BadAnswer as error:
            answers[key] = {"error": str(error)}
        write_result(path, result())
    write_result(path, found := result())
    return found


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The answers in an earlier judge.json; none if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
        return {key: answer for key, answer in answers.items() if "error" in answer or all(
            isinstance(answer[name], (int, float)) for name in MARKS)}
    return {}


def write_result(path: Path, result: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))


def summarize(own: Sequence[dict[str, Any] | None], real: Sequence[dict[str, Any] | None],
              stories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The marks of both sides, over the pairs that are judged whole.

    marks: by name the two means, their difference, and its 95% interval (percentile bootstrap over pairs, 10,000
    resamples, fixed seed). ages: of both sides, by age. worst: the three stories with the fewest marks in all.
    """
    pairs = [(a, b, story) for a, b, story in zip(own, real, stories, strict=True)
             if a and b and "error" not in a and "error" not in b]
    if not pairs:
        return {"pairs": 0}
    draws = np.random.default_rng(0).integers(0, len(pairs), (10_000, len(pairs)))
    marks = {}
    for name in MARKS:
        both = np.array([[a[name], b[name]] for a, b, _ in pairs], dtype=float)  # (pairs, 2)
        differences = both[:, 0] - both[:, 1]  # (pairs,)
        low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
        marks[name] = {"model": both[:, 0].mean(), "real": both[:, 1].mean(), "difference": differences.mean(),
                       "low": float(low), "high": float(high)}
    worst = sorted(pairs, key=lambda pair: sum(pair[0][name] for name in MARKS))[:3]
    return {"pairs": len(pairs), "marks": marks,
            "ages": {side: dict(Counter(pair[place]["age"] for pair in pairs if pair[place]["age"]))
                     for place, side in enumerate(("model", "real"))},
            "worst": [{"prompt": story["prompt"], "text": story["text"], **answer} for answer, _, story in worst]}


def describe(result: dict[str, Any]) -> Iterator[str]:
    """The lines to show."""
    summary, failed = result["summary"], sum("error" in answer for answer in result["answers"].values())
    how = "" if result["temperature"] == 0 else ", at its default temperature, since it refuses 0"
    yield f"Marks by {result['model']} for {counted(summary['pairs'], 'pair')} of a generated and a real story{how}"
    if failed:
        yield f"({counted(failed, 'story')} not judged: the answers had no marks; the same command asks again)"
    for name, mark in summary.get("marks", {}).items():
        yield (f"  {name:<12} {mark['model']:4.1f}  real stories {mark['real']:4.1f}  difference "
               f"{mark['difference']:+.1f} (95% interval {mark['low']:+.1f} to {mark['high']:+.1f})")
    for side, ages in summary.get("ages", {}).items():
        if ages:
            spread = ", ".join(f"{age}: {ages[age]}" for age in AGES if age in ages)
            yield f"  age of the writer, {'the model' if side == 'model' else 'real stories'}: {spread}"
    for one in summary.get("worst", []):
        yield (f"\n  {'/'.join(str(one[name]) for name in MARKS)}: {one['comment']}\n"
               f"  {one_line(one['prompt'] + one['text'])[:300]}")
