"""The report of a run: report.html, one file that opens anywhere, and loss.png, both drawn from metrics.jsonl.

The page has no script and loads nothing: matplotlib draws the curves, the page contains their SVG, and CSS sets the
colours for a light or a dark screen. If evaluate.py wrote an evaluation.json, the page shows its verdict first, and its
checklist and table.
"""

import html
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.wording import format_seconds
from data.atomic_files import atomic_write
from evaluation.text_metrics import ARTICLES
from training.checkpoints import BEST
from training.metrics_file import METRICS, read_metrics
from training.run_folder import EVALUATION, PICTURE, REPORT

STYLE = Path(__file__).with_name("report.css")
MAX_POINTS, MAX_SAMPLES = 2000, 60  # of a curve, and of evaluations in the time line; more are thinned out evenly
# in report.html, CSS replaces these colours by those of the screen's theme; loss.png keeps them
INK, GRID = "#202124", "#dadce0"
COLOURS = {"train": "#9aa0a6", "validation": "#1a66c2", "articles": "#d9730d", "other-tokens": "#1e8e4e"}
LINES = {"train": "-", "validation": "-", "articles": "--", "other-tokens": ":"}  # told apart without colours, too
LABELS = {"train": "training loss", "articles": "loss on articles", "other-tokens": "loss on other tokens"}
MARKS = {True: "ok", False: "bad", None: "check"}  # of a verdict, as those of the checklist
FIGURES = (("val_loss", "validation loss, nats per token"), ("perplexity", "perplexity"),
           ("bits_per_byte", "bits per byte"), ("article_loss", "loss on articles, nats per token"),
           ("other_loss", "loss on other tokens, nats per token"))


def update_report(folder: Path) -> str | None:
    """Write report.html and loss.png of the run in `folder`. Returns a warning if that failed: no run ends of it."""
    try:
        write_report(folder)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, ImportError):
            problem = f"{error}; pip install matplotlib"
        return f"warning: {folder / REPORT}: not drawn ({problem}); {METRICS} has the same figures"
    return None


def write_report(folder: Path) -> None:
    """Write report.html and loss.png from metrics.jsonl and evaluation.json. Without entries, write nothing."""
    entries = read_metrics(folder / METRICS)
    steps, evaluations, spikes = (_of(entries, kind) for kind in ("step", "evaluation", "spike"))
    if not steps and not evaluations:
        return
    losses = {"train": _curve(steps, "loss"), "validation": _curve(evaluations, "val_loss"),
              "articles": _curve(evaluations, "article_loss"), "other-tokens": _curve(evaluations, "other_loss")}
    charts = [("loss", "Loss", "nats per token", losses, True),
              ("rate", "Learning rate", "learning rate", {"rate": _curve(steps, "learning_rate")}, False),
              ("norm", "Gradient norm" + (f" ({len(spikes)} spikes noted)" if spikes else ""), "norm before clipping",
               {"norm": _curve(steps, "gradient_norm")}, True),
              ("speed", "Speed", "tokens per second", {"speed": _curve(steps, "tokens_per_second")}, False)]
    figures = [f"<figure>{draw(*chart)}</figure>" for chart in charts]
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.name)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body>\n<h1>{html.escape(folder.name)}</h1>\n"
            + _top(folder, entries)
            + '\n<h2>Curves</h2>\n<div class="charts">' + "\n".join(figures) + "</div>\n" + _time_line(entries)
            + _bottom(entries) + "\n</body></html>\n")
    with atomic_write(folder / REPORT) as file:
        file.write(page.encode("utf-8", errors="replace"))
    with atomic_write(folder / PICTURE) as file:
        file.write(draw(*charts[0], "png"))


def _of(entries: Sequence[dict], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["type"] == kind]


def _curve(entries: Sequence[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in _thin(entries, MAX_POINTS) if key in entry]


def _thin(entries: Sequence, count: int) -> Sequence:
    """At most `count` of the entries, spread evenly, with the last one."""
    stride = -(-len(entries) // count) or 1
    return entries[::-1][::stride][::-1]


# Pictures

def draw(name: str, title: str, unit: str, curves: dict[str, list[tuple[int, float]]], log: bool, kind: str = "svg",
         ) -> Any:
    """Curves of (step, value) as PNG bytes, or as inline SVG, in which each curve has the id `name`-`curve`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, and no window is opened
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False, "font.size": 9,
                "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
                "ytick.color": INK, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False,
                "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6}
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about curves without points yet
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for curve, points in curves.items():
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if 1 <= len(points) <= 40 and curve != "train" else None
                axes.plot(x, y, label=LABELS.get(curve, f"{curve} loss"),
                          color=COLOURS.get(curve, COLOURS["validation"]), linestyle=LINES.get(curve, "-"),
                          linewidth=1.0 if curve == "train" else 1.6, marker=marker, markersize=3, gid=curve)
        axes.set_title(title, loc="left", fontweight="bold", color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{unit}, log scale" if log else unit)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif name == "speed":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, transparent=kind == "svg")
    return _inline(buffer.getvalue().decode("utf-8"), name) if kind == "svg" else buffer.getvalue()


def _inline(svg: str, name: str) -> str:
    """An SVG file as a part of a page: with ids that no other picture has, and the colours of the page's theme."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    for colour, variable in ((INK, "ink"), (GRID, "grid"), *((value, key) for key, value in COLOURS.items())):
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


# Words and numbers

def _top(folder: Path, entries: Sequence[dict]) -> str:
    """The verdict, what was run, the figures of the best and the last evaluation, evaluate.py's checks and table."""
    parts = []
    if (evaluation := _read_evaluation(folder / EVALUATION)) is not None:
        verdict = evaluation.get("verdict", {"fluent": None, "line": "No verdict: of an older evaluate.py"})
        line = f"{verdict['line']}."
        parts.append(f'<p class="verdict {MARKS[verdict["fluent"]]}">{html.escape(line)}</p>'
                     f'<p class="soft">At step {evaluation["step"]:,}: {len(evaluation["stories"])} stories compared '
                     "with as many real ones of the same beginnings.</p>")
    else:
        command = f"python evaluate.py --checkpoint {folder / BEST} --out {folder / EVALUATION}"
        parts.append('<p class="verdict check">No verdict yet.</p><p class="soft">For one, run: '
                     f"<code>{html.escape(command)}</code></p>")
    parts += [_facts(entries), _figures(entries)]
    if evaluation is not None:
        parts.append("<h2>Did it work?</h2>" + _table("verdicts", ["", "model", "real stories", "verdict"], [
            [row["title"], *("-" if row[side] is None else f"{row[side]:.1f}" for side in ("model", "reference")),
             row["verdict"]] for row in evaluation["table"]],
            ["" if row["verdict"] in ("ok", "nothing to measure") else "bad" for row in evaluation["table"]]))
        checks = evaluation.get("checks", [])
        parts.append(_table("checks", ["", "check", "found"], [
            [check["mark"], check["name"], ": ".join(filter(None, (check["found"], check["meaning"])))]
            for check in checks], [check["mark"] for check in checks]))
    return "\n".join(parts)


def _facts(entries: Sequence[dict]) -> str:
    """How far the run is, how long it trained, on how many tokens, on what; and its plan."""
    last, plans, steps = entries[-1], _of(entries, "plan"), _of(entries, "step")
    facts = [f"step {last.get('step', 0):,}, epoch {last.get('epoch', 0):.2f}"]
    if not plans:
        return f"<p>{facts[0]}</p>"
    plan = plans[-1]
    if steps:
        training, seq_len = plan["config"]["training"], plan["config"]["model"]["max_seq_len"]
        per_step = training["batch_size"] * training["gradient_accumulation_steps"] * seq_len
        ends = [0, *(entry["step"] for entry in steps)]
        seconds = sum((end - start) * per_step / entry["tokens_per_second"] for start, end, entry
                      in zip(ends, ends[1:], steps, strict=False))
        facts[0] += f", {steps[-1]['step'] * per_step / 1e6:,.1f} M tokens in {format_seconds(seconds)} of training"
    facts += [f"{plan['date']}; {plan['machine']}"] if "machine" in plan else []
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in [*facts, *plan["plan"]]) + "</ul>"


def _figures(entries: Sequence[dict]) -> str:
    """The table of the best evaluation, of the last, if it is another, and of the whole validation split."""
    evaluations = _of(entries, "evaluation")
    rows = [("last evaluation", evaluations[-1])] if evaluations else []
    if rows and (best := min(evaluations, key=lambda entry: entry["val_loss"])) is not evaluations[-1]:
        rows.insert(0, ("best evaluation", best))
    elif rows:
        rows[0] = ("best and last evaluation", evaluations[-1])
    rows += [("whole validation split", entry) for entry in _of(entries, "final")[-1:]]
    return _table("figures", ["", *(title for title, _ in rows)], [
        ["step", *(f"{entry['step']:,}" for _, entry in rows)],
        *([title, *(f"{entry[key]:.{2 if key == 'perplexity' else 3}f}" for _, entry in rows)]
          for key, title in FIGURES if key in rows[0][1])]) if rows else ""


def _bottom(entries: Sequence[dict]) -> str:
    """What became of the data, and the config."""
    parts, plan = [], (_of(entries, "plan") or [{}])[-1]
    for split, checks in plan.get("checks", {}).items():
        if checks:
            parts.append(f"<h2>The {split} stories</h2>" + _table(f"data-{split}", ["", "", "example"], [
                [check["name"], f"{check['number']:,}", check["example"]] for check in checks]))
    if plan:
        config = "\n".join(f"{section}:\n" + "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}"
                                                       for key, value in values.items())
                           for section, values in plan["config"].items())
        parts.append(f"<details><summary>The config</summary><pre>{html.escape(config)}</pre></details>")
    return "\n".join(parts)


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    """What evaluate.py --out wrote, if it has the table of stories."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and "table" in found else None


def _table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """marks: a CSS class for each row, which colours it."""
    def line(tag: str, cells: Sequence[str], mark: str = "") -> str:
        return (f'<tr class="{mark}">' if mark else "<tr>") + "".join(
            f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return (f'<div class="scroll"><table id="{name}">' + line("th", heads)
            + "".join(map(line, ["td"] * len(rows), rows, marks or [""] * len(rows))) + "</table></div>")


def _time_line(entries: Sequence[dict]) -> str:
    """The story of each of the first steps and the stories of each evaluation, in order, with the articles marked."""
    moments = [entry for entry in entries if entry["type"] in ("early", "evaluation") and entry.get("samples")]
    shown = _thin(moments, MAX_SAMPLES)
    english = any("article_loss" in entry for entry in shown)
    parts = ["<h2>Stories as grammar arrives</h2>", '<p class="soft">Always from the same prompts and the same seed'
             + ("; <mark>articles</mark> are marked" if english else "")
             + f". {len(shown)} of {len(moments)} moments are shown.</p>"]
    words = re.compile(rf"\b({'|'.join(sorted(ARTICLES))})\b", re.I)
    for entry in shown:
        stories = [words.sub(r"<mark>\1</mark>" if english else r"\1", html.escape(text)) for text in entry["samples"]]
        boxes = "".join(f'<div class="story">{story}</div>' for story in stories)
        losses = f": validation loss {entry['val_loss']:.3f}" if "val_loss" in entry else ""
        if "article_loss" in entry:
            losses += f", on articles {entry['article_loss']:.3f}, other tokens {entry['other_loss']:.3f}"
        parts.append(f'<section class="moment"><p><b>step {entry["step"]:,}</b>, epoch {entry["epoch"]:.2f}{losses}'
                     f'</p><div class="stories">{boxes}</div></section>')
    return "\n".join(parts) if moments else ""
