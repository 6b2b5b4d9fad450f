"""report.html shows what metrics.jsonl says, loads nothing from anywhere, and never ends a run."""

import html
import json
import math
import re
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest

from evaluation.report import FIGURES, update_report, write_report
from train import start_run
from training.loggers import open_logger
from training.metrics_file import read_metrics
from training.run_folder import EVALUATION, PICTURE, REPORT, lock_output_dir

EVIL = '<script>alert("a")</script> & the <b>end</b> 故事'


def made_up_metrics(num_steps=300):
    chance = np.random.default_rng(0)
    entries = [{"type": "plan", "step": 0, "plan": ["1 parameter", EVIL], "machine": "an H100", "date": "2026-01-02",
                "checks": {"training": [{"name": "e-mail addresses", "number": 1234, "example": EVIL},
                                        {"name": "URLs", "number": 0, "example": ""}]},
                "config": {"data": {"dataset": EVIL}, "model": {"max_seq_len": 50},
                           "training": {"batch_size": 2, "gradient_accumulation_steps": 1}}}]
    for step in range(10, num_steps + 1, 10):
        entries.append({"type": "step", "step": step, "epoch": step / 100, "loss": 2 + 5 * math.exp(-step / 80),
                        "gradient_norm": float(chance.uniform(0.5, 2)), "learning_rate": 1e-3 * (1 - step / 400),
                        "tokens_per_second": float(chance.uniform(900, 1100))})
        if step % 50 == 0:
            entries.append({"type": "evaluation", "step": step, "epoch": step / 100, "val_loss": 2.1 + 100 / step,
                            "perplexity": 9.0, "bits_per_byte": 0.8 + 1 / step, "article_loss": 1.2 + 10 / step,
                            "other_loss": 2.5, "val_tokens": 100, "samples": [f"{EVIL} {step}", "She saw a cat."]})
    final = dict(entries[-1], type="final", val_loss=2.345678)
    del final["samples"]
    return [*entries, {"type": "spike", "step": 33, "gradient_norm": 9.0, "median": 1.0}, final]


def write_metrics(folder, entries):
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_metrics(folder, made_up_metrics())
    (folder / EVALUATION).write_text(json.dumps({"step": 300, "stories": [1, 2], "verdict": {
        "fluent": False, "line": f"Not yet: {EVIL}"}, "checks": [
            {"mark": "check", "name": "steps", "found": "5 of 9", "meaning": EVIL}], "table": [
        {"key": "articles", "title": "articles per 100 words", "model": 7.25, "reference": 9.5, "verdict": "few"},
        {"key": "quotes", "title": "quotes", "model": None, "reference": 99.0, "verdict": "-"}]}), encoding="utf-8")
    write_report(folder)
    return folder, (folder / REPORT).read_text(encoding="utf-8")


def curve_points(page, name):
    """The points of the path that is drawn for a curve, (number of points, 2), in the picture's own units."""
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', page).group(1)
    return np.array([float(number) for number in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)


@pytest.mark.parametrize(("curve", "kind", "key", "log"), [
    ("loss-train", "step", "loss", True), ("loss-validation", "evaluation", "val_loss", True),
    ("loss-articles", "evaluation", "article_loss", True), ("loss-other-tokens", "evaluation", "other_loss", True),
    ("rate-rate", "step", "learning_rate", False), ("norm-norm", "step", "gradient_norm", True),
    ("speed-speed", "step", "tokens_per_second", False)])
def test_each_curve_is_drawn_through_the_figures_of_metrics_jsonl(page, curve, kind, key, log):
    entries = [entry for entry in read_metrics(page[0] / "metrics.jsonl") if entry["type"] == kind]
    steps, values = (np.array([entry[name] for entry in entries], dtype=float) for name in ("step", key))
    points = curve_points(page[1], curve)
    assert len(points) == len(entries)
    for drawn, meant, sign in ((points[:, 0], steps, 1), (points[:, 1], np.log(values) if log else values, -1)):
        if np.ptp(meant) == 0:
            assert np.ptp(drawn) < 1e-6
            continue
        slope, offset = np.polyfit(meant, drawn, 1)
        assert slope * sign > 0 and np.abs(drawn - (slope * meant + offset)).max() < 1e-3


def test_curves_of_one_picture_share_its_axes(page):
    """Loss 4 of training and loss 4 of validation are drawn at one height."""
    entries = read_metrics(page[0] / "metrics.jsonl")
    heights = {}
    for curve, kind, key in (("train", "step", "loss"), ("validation", "evaluation", "val_loss"),
                             ("articles", "evaluation", "article_loss")):
        values = [entry[key] for entry in entries if entry["type"] == kind]
        heights[curve] = np.polyfit(np.log(values), curve_points(page[1], f"loss-{curve}")[:, 1], 1)
    np.testing.assert_allclose(heights["validation"], heights["train"], rtol=1e-4)
    np.testing.assert_allclose(heights["articles"], heights["train"], rtol=1e-4)


def table(page, name):
    rows = re.search(rf'<table id="{name}">(.*?)</table>', page, re.S).group(1).split("</tr>")
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows if row]


def test_the_tables_hold_the_figures(page):
    entries = read_metrics(page[0] / "metrics.jsonl")
    columns = [[entry for entry in entries if entry["type"] == "evaluation"][-1], entries[-1]]
    heads, steps, *rows = table(page[1], "figures")
    assert heads == ["", "best and last evaluation", "whole validation split"]
    assert steps[1:] == [str(entry["step"]) for entry in columns]
    assert [row[0] for row in rows] == [title for _, title in FIGURES]
    for (key, _), row in zip(FIGURES, rows, strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx([entry[key] for entry in columns], abs=0.006)
    assert table(page[1], "verdicts")[1:] == [["articles per 100 words", "7.2", "9.5", "few"],
                                              ["quotes", "-", "99.0", "-"]]
    assert table(page[1], "checks")[1:] == [["check", "steps", f"5 of 9: {EVIL}"]]
    assert table(page[1], "data-training")[1:] == [["e-mail addresses", "1,234", EVIL], ["URLs", "0", ""]]


def test_an_evaluation_that_is_best_but_not_last_has_its_own_column(tmp_path):
    entries = made_up_metrics()
    next(entry for entry in entries if entry["type"] == "evaluation" and entry["step"] == 100)["val_loss"] = 0.5
    write_metrics(tmp_path, entries)
    write_report(tmp_path)
    heads, steps, losses, *_ = table((tmp_path / REPORT).read_text(encoding="utf-8"), "figures")
    assert heads[1:3] == ["best evaluation", "last evaluation"] and steps[1:3] == ["100", "300"]
    assert losses[1] == "0.500"


def test_the_verdict_stands_first_and_then_the_run(page, tmp_path):
    top = page[1][page[1].index("</h1>"):]
    assert top.startswith(f'</h1>\n<p class="verdict bad">Not yet: {html.escape(EVIL)}.</p>')
    assert "an H100" in top and "2026-01-02" in top and "0.0 M tokens" in top and " of training" in top
    write_metrics(tmp_path, made_up_metrics())
    write_report(tmp_path)
    young = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert '<p class="verdict check">No verdict yet.' in young and "python evaluate.py --checkpoint" in young
    assert young.index("No verdict yet") < young.index('id="figures"')


def test_axes_have_units_and_say_that_they_are_logarithmic(page):
    for words in ("nats per token, log scale", "norm before clipping, log scale", "tokens per second",
                  "loss on articles"):
        assert f">{words}</text>" in page[1], words


def test_the_samples_are_a_time_line(page):
    entries = [entry for entry in read_metrics(page[0] / "metrics.jsonl") if entry["type"] == "evaluation"]
    moments = re.findall(r'<section class="moment">(.*?)</section>', page[1], re.S)
    assert len(moments) == len(entries)
    for moment, entry in zip(moments, entries, strict=True):
        stories = re.findall(r'<div class="story">(.*?)</div>', moment, re.S)
        shown = [html.unescape(re.sub("</?mark>", "", story)) for story in stories]
        assert shown == entry["samples"] and f"<b>step {entry['step']}</b>" in moment
        assert f"validation loss {entry['val_loss']:.3f}" in moment and stories[1] == "She saw <mark>a</mark> cat."


def test_the_stories_of_the_first_steps_come_before_those_of_the_evaluations(tmp_path):
    early = [{"type": "early", "step": step, "epoch": 0.0, "samples": [f"Once {step} <b>"]} for step in (1, 10)]
    write_metrics(tmp_path, [*early, *made_up_metrics()])
    write_report(tmp_path)
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    moments = re.findall(r'<section class="moment">(.*?)</section>', text, re.S)
    assert [re.search(r"step (\d+)", moment)[1] for moment in moments[:3]] == ["1", "10", "50"]
    assert '<div class="story">Once 10 &lt;b&gt;</div>' in moments[1] and "loss" not in moments[1]


class Reader(HTMLParser):
    VOID = frozenset(("meta", "br", "path", "use", "rect", "line"))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [tag] if tag not in self.VOID else []
        for key, value in attributes:
            self.ids += [value] if key == "id" else []
            self.links += [value] if key in ("src", "href", "xlink:href", "action", "data") else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_safe_and_loads_nothing(page):
    reader = Reader(page[1])
    assert reader.open == [] and "svg" in reader.tags
    assert not reader.tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    assert all(link.startswith("#") for link in reader.links) and {link[1:] for link in reader.links} <= {*reader.ids}
    assert len(reader.ids) == len(set(reader.ids))
    assert "@import" not in page[1] and not re.search(r"url\((?!#)", page[1])
    assert "prefers-color-scheme: dark" in page[1] and 'name="viewport"' in page[1]
    assert (page[0] / PICTURE).read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("keep", [0, 1, 2, 7])
def test_a_young_run_has_a_page_too(tmp_path, keep):
    entries = made_up_metrics()[:keep]
    write_metrics(tmp_path, entries)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"type": "step", "st')  # cut off by a crash
    write_report(tmp_path)
    assert (tmp_path / REPORT).exists() == (keep > 1)


def test_a_long_run_is_thinned_but_keeps_its_end(tmp_path):
    write_metrics(tmp_path, made_up_metrics(num_steps=50_000))
    write_report(tmp_path)
    page = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert 1000 < len(curve_points(page, "loss-train")) <= 2000
    assert 30 < page.count('class="moment"') <= 60 and "<b>step 50,000</b>" in page


def test_training_draws_the_report_and_continues_without_it(tiny_config, tmp_path, monkeypatch, capsys, drawn):
    settings = ["training.max_steps=20", "training.eval_steps=20", "training.eval_samples=3"]
    assert start_run(tiny_config(*settings, "training.output_dir=run"), None, None) == 0
    folder = tmp_path / "run"
    entries = read_metrics(folder / "metrics.jsonl")
    assert [entry["type"] for entry in entries if entry["type"] != "step"] == [
        "plan", "early", "early", "evaluation", "final"]
    page = (folder / REPORT).read_text(encoding="utf-8")
    assert f"{entries[-1]['val_loss']:.3f}" in page and "tokens a step" in page and "learning_rate: 0.003" in page
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails now
    assert start_run(tiny_config(*settings, "training.output_dir=run"), None, None) == 0
    out = capsys.readouterr().out
    assert out.count("pip install matplotlib") == 1 and "Finished at step 20 " in out
    assert not (folder / REPORT).exists()  # that of the earlier run went with it:
    assert (folder / "previous" / "1" / REPORT).read_text(encoding="utf-8") == page
    assert (folder / "previous" / "1" / PICTURE).exists()


def test_an_error_in_drawing_is_one_line(tmp_path, capsys):
    write_metrics(tmp_path, [{"type": "evaluation", "step": 1, "val_loss": "two"}])
    with lock_output_dir(tmp_path, draw=update_report) as folder:
        for step in (2, 3):
            folder.metrics_size = folder.metrics.stat().st_size
            folder.record({"type": "evaluation", "step": step, "val_loss": 2.0})
            folder.draw()
    assert capsys.readouterr().out.count("not drawn") == 1


# The loggers

def test_a_logger_that_is_not_installed_costs_one_line(tiny_config, monkeypatch, capsys):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
        config = tiny_config(f"training.logger={name}", "training.max_steps=1", "sampling.max_new_tokens=2")
        assert start_run(config, None, None) == 0
        out = capsys.readouterr().out
        assert out.count("note: training.logger") == 1 and f"pip install {name}" in out
        assert "Finished at step 1 (1 step in" in out


def test_tensorboard_gets_every_figure(tmp_path, monkeypatch):
    logged = []

    class SummaryWriter:
        def __init__(self, folder):
            logged.append(folder)

        def add_scalar(self, name, value, step):
            logged.append((name, value, step))

        def add_text(self, name, text, step):
            logged.append((name, text, step))

        def flush(self):
            logged.append("flush")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = open_logger("tensorboard", tmp_path)
    log({"type": "evaluation", "step": 7, "val_loss": 2.5, "samples": ["Once."]})
    assert logged[1:] == [("evaluation/val_loss", 2.5, 7), ("story 1", "Once.", 7), "flush"]


def test_a_logger_that_breaks_is_left_alone(tmp_path, monkeypatch, capsys):
    class Run:
        def log(self, values, step):
            raise ConnectionError("gone")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: Run(), Html=str))
    log = open_logger("wandb", tmp_path)
    log({"type": "step", "step": 1, "loss": 1.0})
    log({"type": "step", "step": 2, "loss": 1.0})
    assert capsys.readouterr().out.count("gone") == 1
