"""The finished runs of articles.py as a table, the same prompt's story under each variant, and a picture."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from config.files import replacing

RESULTS, PICTURE = "results.md", "why_articles.png"
COLUMNS = (  # key, title, digits
    ("bits_per_byte", "bits per byte", 3), ("own_loss", "loss that it reports", 2),
    ("articles", "articles in 100 words", 1), ("misplaced", "of these where none can stand, %", 1),
    ("bare_nouns", "nouns without one, %", 1), ("a_an", "a or an right, %", 0), ("ended", "stories that end, %", 0),
    ("repeated", "repeated 4-grams, %", 1), ("article_accuracy", "articles foreseen, %", 0))
ROWS = (("bits_per_byte", "bits per byte"), ("articles", "articles in 100 words"),
        ("bare_nouns", "nouns without their article, %"))
STOPS = (0.05, 0.25)  # of the steps: rows of their own
STORY_WORDS = 70  # of a quoted story
# colours that the colour-blind can tell apart (Okabe & Ito, 2008), each with a marker of its own
LOOKS = (("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"))
BASE_LOOK, INK, GRID = ("#202124", "o"), "#202124", "#dadce0"

Runs = dict[str, list[dict[str, Any]]]  # by the variant's title: a run for each seed


def report(paths: Iterable[Path], theories: dict[str, str], out: Path) -> None:
    """Write results.md and the picture. paths: of finished runs. theories: of each variant's title; "" of the base."""
    runs: Runs = {title: [] for title in theories}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        runs[result["variant"]].append(result)
    runs = {title: of for title, of in runs.items() if of}
    with replacing(out / RESULTS) as file:
        file.write(f"{table(runs)}\n\n{stories(runs)}\n".encode())
    try:
        picture = draw(runs, theories)
    except ImportError as error:
        print(f"warning: no picture ({error}); pip install matplotlib")
        return
    with replacing(out / PICTURE) as file:
        file.write(picture)


def points_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**point, "article_accuracy": 100 * point["article_accuracy"]} for point in run["points"]]


def spread(values: Sequence[float | None], digits: int) -> str:
    """The mean, and of several values the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def table(runs: Runs) -> str:
    """A row for each variant, one for each early stop of the base, and the validation stories' own."""
    rows = [(title, [points_of(run)[-1] for run in of]) for title, of in runs.items()]
    base = next(iter(runs.values()))
    for share in STOPS:
        title = f"{next(iter(runs))}, stopped at {share:.0%} of its steps"
        rows.append((title, [point for run in base for point in points_of(run) if point["share"] == share]))
    lines = ["| variant | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2)
             + "|"]
    for title, points in rows:
        cells = [spread([point[key] for point in points], digits) for key, _, digits in COLUMNS]
        lines.append(f"| {escape(title)} | {len(points)} | {' | '.join(cells)} |")
    real = base[0]["points"][-1]["reference"]
    cells = [spread([real.get(key)], digits) for key, _, digits in COLUMNS]
    return "\n".join([*lines, f"| the validation stories | | {' | '.join(cells)} |"])


def stories(runs: Runs) -> str:
    """The beginning of the first story of each variant, all from the same prompt."""
    parts = []
    for title, of in runs.items():
        story = of[0]["stories"][0]
        words = re.findall(r"\S+\s*", story["text"])
        text = "".join(words[:STORY_WORDS]).strip() + (" ..." if len(words) > STORY_WORDS else "")
        joint = " " if story["text"][:1].isspace() else ""
        parts.append(f"**{escape(title)}**\n\n> {escape(story['prompt'])}{joint}"
                     + escape(text).replace("\n", "  \n> "))
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """As Markdown that shows just this text."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def draw(runs: Runs, theories: dict[str, str]) -> bytes:
    """A column for each theory, a row for each figure, by the share of the steps. Returns a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no global state, and no window is ever opened
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
    from PIL import Image  # which matplotlib brings

    base = next(iter(runs))
    columns = list(dict.fromkeys(theories[title] for title in runs if theories[title])) or [""]
    settings = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
                "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                "grid.color": GRID, "grid.linewidth": 0.6}
    with rc_context(settings):
        figure = Figure(figsize=(3.1 * len(columns) + 0.4, 7.2), layout="constrained")
        grid = figure.subplots(len(ROWS), len(columns), sharex=True, sharey="row", squeeze=False)
        for axes_row, (key, name) in zip(grid, ROWS, strict=True):
            axes_row[0].set_ylabel(name)
            if key == "bits_per_byte":
                axes_row[0].set_yscale("log")
                axes_row[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes_row[0].yaxis.set_minor_formatter(NullFormatter())
                axes_row[0].yaxis.set_minor_locator(NullLocator())
            real = runs[base][0]["points"][-1]["reference"].get(key)
            for axes, theory in zip(axes_row, columns, strict=True):
                shown = [base, *(title for title in runs if theory and theories[title] == theory)]
                for title, (colour, marker) in zip(shown, [BASE_LOOK, *LOOKS], strict=False):
                    draw_curve(axes, runs[title], key, title, colour, marker)
                if real is not None:
                    axes.axhline(real, color=INK, linewidth=1, linestyle=":", label="_real")
            axes_row[0].set_xlim(0, 100)
            top = axes_row[0].get_ylim()[1]
            if key == "bits_per_byte":
                axes_row[0].set_yticks([y for y in (1, 1.5, 2, 3, 5, 10, 20, 30) if y < top])
            else:  # the first steps of one variant must not flatten all the others
                axes_row[0].set_ylim(0, min(top, 4 * real) if key == "articles" and real else top)
            for axes in axes_row:
                label_curves(axes)
        for axes, theory in zip(grid[0], columns, strict=True):
            axes.set_title(theory, fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("% of the steps")
        whole, small = io.BytesIO(), io.BytesIO()
        figure.savefig(whole, format="png", dpi=90)
    Image.open(whole).convert("RGB").quantize(64).save(small, format="png", optimize=True)  # a third of its size
    return small.getvalue()


def draw_curve(axes: Any, of: list[dict[str, Any]], key: str, title: str, colour: str, marker: str) -> None:
    """The mean over the seeds, and a band from the smallest to the largest."""
    values: dict[float, list[float]] = {}
    for point in (point for run in of for point in run["points"] if point[key] is not None):
        values.setdefault(100 * point["share"], []).append(point[key])
    if values:
        means, low, high = ([what(some) for some in values.values()] for what in (statistics.fmean, min, max))
        axes.plot(list(values), means, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=title)
        axes.fill_between(list(values), low, high, color=colour, alpha=0.25, linewidth=0)


def label_curves(axes: Any, gap: float = 0.085) -> None:
    """Name each curve beside its end. Names stand `gap` of the height apart or more, so that all can be read."""
    ends = []
    for line in axes.get_lines():
        y = axes.transAxes.inverted().transform(axes.transData.transform((0, line.get_ydata()[-1])))[1]
        name = "real stories" if line.get_label() == "_real" else line.get_label()
        ends.append((y, name, line.get_color()))
    ends.sort()
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    for index in range(len(places) - 2, -1, -1):  # what went over the top comes down again
        places[-1] = min(places[-1], 1.0)
        places[index] = min(places[index], places[index + 1] - gap)
    for (_, name, colour), place in zip(ends, places, strict=True):
        axes.text(1.03, place, name, transform=axes.transAxes, color=colour, fontsize=7.5, va="center")
