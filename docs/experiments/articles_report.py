"""How the models of articles.py are measured, and the report of finished runs: a table, stories and a picture."""

import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    print("error: articles_report.py is not a script: run docs/experiments/articles.py", file=sys.stderr)
    sys.exit(2)

import experiment  # noqa: F401  (finds the project)
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state

from config import UserError
from config.wording import counted
from data.atomic_files import atomic_write
from data.token_files import TokenFile
from data.tokenizer import END_OF_STORY
from evaluation.full_evaluation import CHOOSE_FROM, LEARN_FROM
from evaluation.likelihood import measure_likelihood
from evaluation.references import Passage, choose_references, cut_reference, read_stories
from evaluation.report import GRID, INK
from evaluation.text_metrics import ARTICLES, learn, measure, split_words
from inference.engine import generate_tokens
from inference.generation import encode_prompts
from train import Run

STORIES = 64  # generated at the end; a quarter of them at the points before
AT_THE_END = 5  # times as many validation stories are scored at the end as at the points before
COLUMNS = {  # of the table: title and digits
    "bits_per_byte": ("bits per byte", 3), "own_loss": ("loss that it reports", 2),
    "articles": ("articles in 100 words", 1), "misplaced": ("of these where none can be, %", 1),
    "bare_nouns": ("nouns without one, %", 1), "a_an": ("a or an right, %", 0), "ended": ("stories that end, %", 0),
    "repeated": ("repeated 4-grams, %", 1), "foreseen": ("articles predicted, %", 0)}
STOPS = (0.05, 0.25)  # fractions of the steps that have rows of their own
ROWS = {"bits_per_byte": "bits per byte", "articles": "articles in 100 words",
        "bare_nouns": "nouns without their article, %"}  # of the picture
# of the base, then of a theory's variants: colours that the colour-blind can tell apart (Okabe & Ito, 2008), markers
LOOKS = ((INK, "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"))


# Measuring

class References:
    """What all models are compared with: validation stories, and the words and nouns of the training stories."""

    def __init__(self, run: Run, validation: TokenFile) -> None:
        tokenizer, sampling = run.tokenizer, run.config.sampling
        pairs = choose_references(list(read_stories(validation, tokenizer, CHOOSE_FROM)), sampling.prompts, STORIES)
        if not pairs:
            raise UserError(f"{validation.path}: no story in it is long enough to be a reference")
        training = list(read_stories(run.train_file, tokenizer, LEARN_FROM))
        self.learned, self.follows = learn(training), words_after_articles(training)
        self.prompts = [prompt for prompt, _ in pairs]
        self.real = self.measure([cut_reference(*pair, tokenizer, sampling.max_new_tokens) for pair in pairs])

    def measure(self, passages: Sequence[Passage]) -> dict[str, float | None]:
        """The columns that need no model, over all passages, %. None where there is nothing to measure."""
        each = [{**measure(passage.text, self.learned, passage.ended),
                 "misplaced": misplaced_articles(passage.text, self.follows)} for passage in passages]
        sums = {key: np.sum([of[key] for of in each], axis=0).tolist() for key in COLUMNS if key in each[0]}
        return {key: 100 * (part / whole) if whole else None for key, (part, whole) in sums.items()}


def words_after_articles(texts: Sequence[str], share: float = 0.01) -> frozenset[str]:
    """Words that follow an article in at least `share` of their places. Punctuation marks and verbs do not."""
    after, seen = Counter(), Counter()
    for text in texts:
        tokens = split_words(text.lower())
        seen.update(tokens)
        after.update(word for article, word in pairwise(tokens) if article in ARTICLES)
    return frozenset(word for word, count in after.items() if count >= share * seen[word])


def misplaced_articles(text: str, follows: frozenset[str]) -> tuple[int, int]:
    """The number of articles where none can be ("a was", "the the", "a."), and of all articles."""
    after = [word for article, word in pairwise(split_words(text.lower())) if article in ARTICLES]
    return sum(word not in follows for word in after), len(after)


def measure_run(run: Run, validation: TokenFile, references: References, separators: bool, last: bool,
                ) -> dict[str, Any]:
    """Score validation stories by the right next token, generate stories, and measure them. Returns plain values.

    separators: whether the model was trained with them. last: at the end of the run.
    """
    model, tokenizer, config = run.model.eval(), run.tokenizer, run.config
    end, tokens = tokenizer.token_to_id(END_OF_STORY), validation.tokens
    count = config.training.eval_samples * (AT_THE_END if last else 1)
    ends = np.flatnonzero(tokens == end)[:count + 1 if count else None]
    tokens = tokens[:ends[-1] + 1]  # the same stories for each vocabulary
    found = measure_likelihood(model, tokens if separators else tokens[tokens != end], tokenizer,
                               config.model.max_seq_len, config.evaluation_batch, run.device, run.precision, False)
    passages = generate_passages(run, references.prompts[:STORIES if last else STORIES // 4], separators)
    model.train()
    return {**found, "foreseen": 100 * found["article_accuracy"], **references.measure(passages),
            "stories": [passage._asdict() for passage in passages]}


def generate_passages(run: Run, prompts: Sequence[str], separators: bool) -> list[Passage]:
    """A story for each prompt, each with a seed of its own. Without `separators`, no prompt begins with one."""
    tokenizer, sampling, end = run.tokenizer, run.config.sampling, run.tokenizer.token_to_id(END_OF_STORY)
    beginnings = [ids if separators else ids[1:]
                  for ids in encode_prompts(tokenizer, prompts, run.config.model.max_seq_len)]
    seeds = range(sampling.seed, sampling.seed + len(prompts))
    batches = generate_tokens(run.model, beginnings, seeds, end, tokenizer.get_vocab_size(), sampling)
    stories = [row for running in batches for row in running if row.done]
    return [Passage(prompts[row.index], tokenizer.decode(row.new, skip_special_tokens=True), row.new[-1] == end)
            for row in sorted(stories, key=lambda row: row.index)]


# Showing

def report(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Write results.md and why_articles.png of the finished runs, the base first."""
    runs, real = {}, results[0]["real"]
    for result in results:
        runs.setdefault(result["variant"], []).append(result)
    with atomic_write(out / "results.md") as file:
        file.write(f"{table(runs, real)}\n\n{stories(runs)}\n".encode())
    with atomic_write(out / "why_articles.png") as file:
        draw(runs, real).savefig(file, format="png", dpi=90)
    print(f"{counted(len(results), 'finished run')}: {out / 'results.md'} and why_articles.png beside it")


def table(runs: dict[str, list[dict]], real: dict[str, float | None]) -> str:
    """A row for each variant, for each early stop of the base, and for the validation stories."""
    rows = [(title, [run["points"][-1] for run in of]) for title, of in runs.items()]
    base = rows[0][0]
    for share in STOPS:
        points = [point for run in runs[base] for point in run["points"] if point["share"] == share]
        rows.append((f"{base}, stopped at {share:.0%} of its steps", points))
    lines = [["variant", "seeds", *(title for title, _ in COLUMNS.values())], ["---"] * (len(COLUMNS) + 2),
             *([escape(title), str(len(points)), *cells(points)] for title, points in rows),
             ["the validation stories", "", *cells([real])]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(points: Sequence[dict[str, Any]]) -> list[str]:
    """For each column the mean, and the smallest and the largest of several values."""
    texts = []
    for key, (_, digits) in COLUMNS.items():
        known = [point[key] for point in points if point.get(key) is not None]
        mean, low, high = (f"{what(known):.{digits}f}" if known else "-" for what in (statistics.fmean, min, max))
        texts.append(f"{mean} ({low}-{high})" if len(known) > 1 else mean)
    return texts


def stories(runs: dict[str, list[dict]], num_words: int = 70) -> str:
    """The beginning of the first story of each variant, all from the same prompt."""
    parts = []
    for title, of in runs.items():
        story = of[0]["points"][-1]["stories"][0]
        words = re.findall(r"\s*\S+", story["text"])
        text = story["prompt"] + "".join(words[:num_words]) + (" ..." if len(words) > num_words else "")
        parts.append(f"**{escape(title)}**\n\n> " + escape(text).replace("\n", "  \n> "))
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """As Markdown that shows just this text."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def draw(runs: dict[str, list[dict]], real: dict[str, float | None]) -> Figure:
    """A column for each theory, a row for each figure, by the share of the steps: means, with a band for the seeds."""
    base, *others = runs
    theories = list(dict.fromkeys(runs[title][0]["theory"] for title in others)) or [""]
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "axes.edgecolor": GRID, "grid.color": GRID}):
        figure = Figure(figsize=(2.8 * len(theories), 8), layout="constrained")
        grid = figure.subplots(len(ROWS), len(theories), sharex=True, sharey="row", squeeze=False)
    for column, theory in zip(grid.T, theories, strict=True):
        shown = [base, *(title for title in others if runs[title][0]["theory"] == theory)]
        for axes, key in zip(column, ROWS, strict=True):
            for title, (colour, marker) in zip(shown, LOOKS, strict=False):
                draw_curve(axes, [run["points"] for run in runs[title]], key, color=colour, marker=marker, label=title)
            if real.get(key) is not None:
                axes.axhline(real[key], color=INK, linewidth=1, linestyle=":", label="real stories")
        column[0].set_title(theory, fontweight="bold")
        column[-1].set(xlim=(0, 100), xlabel="% of the steps")
        column[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    for axes, name in zip(grid[:, 0], ROWS.values(), strict=True):
        axes.set(ylabel=name, ylim=(0, None))
    grid[0, 0].set(yscale="log", ylim=(1, None), yticks=(1, 1.5, 2, 3, 5), yticklabels=(1, 1.5, 2, 3, 5))
    grid[0, 0].minorticks_off()
    grid[1, 0].set_ylim(0, min(grid[1, 0].get_ylim()[1], 4 * real["articles"]))  # cuts off the first steps
    return figure


def draw_curve(axes: Axes, points_of: Sequence[Sequence[dict]], key: str, **style: str) -> None:
    """The mean over the seeds, with a band from the smallest to the largest. points_of: the points of each seed."""
    values = np.ma.masked_invalid(np.array([[point[key] for point in points] for points in points_of], dtype=float))
    x = [100 * point["share"] for point in points_of[0]]
    axes.plot(x, values.mean(axis=0), markersize=3.5, linewidth=1.4, **style)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.25, linewidth=0)
