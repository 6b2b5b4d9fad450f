"""docs/experiments/fixed_hour.py: each variant has the same time, runs are kept, and the table shows the outcome."""

from __future__ import annotations

import itertools
import json
import signal
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "docs" / "experiments"))

import fixed_hour

import train
from config import load_config
from data.synthetic_stories import synthetic_stories
from training.checkpoints import LATEST, load_checkpoint

SETTINGS = ["data.max_stories=200", "model.vocab_size=512", "model.d_model=32", "model.n_layers=1", "model.n_heads=1",
            "model.d_ffn=64", "training.use_bf16=false", "training.use_compile=false", "training.show_progress=false",
            "sampling.max_new_tokens=4", "hardware.device=cpu", "data.max_seq_len=256",
            "training.batch_size=4"]  # the base has steps of a quarter of the size
STEP_TOKENS = 4096


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: arguments -> exit status, in a fresh folder, with 4,096 and 8,192 tokens a second for the speeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fixed_hour, "TURN_SECONDS", 0.0)
    clock = {"base": 4096.0, "context 128": 8192.0}
    monkeypatch.setattr(fixed_hour, "measure_speeds", lambda configs, path: {title: clock[title] for title in configs})

    def start(*arguments: str, variants: tuple[str, ...] = ("base", "context 128")) -> int:
        overrides = [part for value in SETTINGS for part in ("--set", value)]
        monkeypatch.setattr(sys, "argv", ["fixed_hour.py", "--dataset", "sample", "--out", "out", "--minutes", "0.05",
                                          "--variants", *variants, *overrides, *arguments])
        return fixed_hour.main()
    return start


def kept(folder):
    return {of["variant"]: of for of in (json.loads(path.read_bytes()) for path in folder.glob("*.run.json"))}


def tokens_trained_on(folder, title):
    """By the checkpoint that the run left."""
    (path,) = folder.glob(f"{title.replace(' ', '-')}-*/{LATEST}")
    checkpoint = load_checkpoint(path)
    return checkpoint["position"] * checkpoint["config"]["model"]["max_seq_len"]


def test_each_variant_trains_for_the_same_time_and_only_once(run, tmp_path, monkeypatch, capsys):
    assert run() == 0
    results = kept(tmp_path / "out")
    for title, tokens in {"base": 3 * 4096, "context 128": 3 * 8192}.items():  # 0.05 minutes are 3 seconds
        assert results[title]["tokens"] == tokens_trained_on(tmp_path / "out", title) == tokens
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert all(f"{of['bits_per_byte']:.4f}" in table for of in results.values())

    def never(*_, **__):
        raise AssertionError("a finished run was trained again")
    monkeypatch.setattr(fixed_hour, "start_run", never)
    assert run() == 0
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == table
    with pytest.raises(AssertionError):
        run("--set", "optimizer.learning_rate=2e-3")


def test_a_stopped_run_resumes_where_it_was(run, tmp_path, monkeypatch, capsys):
    """By Ctrl-C in its third step: what comes of it is what comes of a run that nobody stopped."""
    step, steps = train.train_step, []

    def interrupted(of, *rest):
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        steps.append(of.iter_num)
        step(of, *rest)
    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(variants=("base",)) == 130
    assert "the same command continues" in capsys.readouterr().out
    assert steps == [0, 1, 2] and not kept(tmp_path / "out")
    assert run(variants=("base",)) == 0
    assert steps == list(range(12))
    assert run("--out", "whole", variants=("base",)) == 0
    assert kept(tmp_path / "out") == kept(tmp_path / "whole") != {}


def test_the_table_has_means_spreads_and_differences():
    common = {"minutes": 4, "parameters": 1_000_000, "tokens": 2_000_000, "speed": 1000.0}
    values = [("base", 1.0), ("base", 1.1), ("dropout 0.1", 1.2), ("tied embeddings", 0.9)]
    lines = fixed_hour.table([{"variant": title, "bits_per_byte": bits, **common} for title, bits in values])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines() if "1,000" in line]
    assert [row[0] for row in rows] == ["tied embeddings", "base", "dropout 0.1"]  # the best first
    assert [row[5] for row in rows] == ["0.9000", "1.0500 (1.0000 to 1.1000)", "1.2000"]
    assert [row[6] for row in rows] == ["-0.1500", "", "+0.1500"]


def test_another_text_of_the_same_name_has_a_tokenizer_and_a_run_of_its_own(run, tmp_path):
    for number in (60, 80):
        text = "\n<|endoftext|>\n".join(itertools.islice(synthetic_stories(seed=1), number))
        (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
        assert run("--dataset", "mine.txt", "--validation", "sample", "--minutes", "0.001", variants=("base",)) == 0
    first, second = ((path / "tokenizer.json").read_bytes() for path in (tmp_path / "out").glob("tokenizer-*"))
    assert first != second and len(list((tmp_path / "out").glob("*.run.json"))) == 2


def test_speeds_are_measured_once_for_each_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(fixed_hour, "TURN_SECONDS", 0.0)
    timed, make_step = [], fixed_hour.make_step
    monkeypatch.setattr(fixed_hour, "make_step", lambda config: timed.append(config) or make_step(config))

    def measure(*overrides):
        config = load_config(fixed_hour.CONFIG, [*SETTINGS, *overrides])
        configs = {title: fixed_hour.configure(config, title, [], tmp_path) for title in ("base", "dropout 0.1")}
        return fixed_hour.measure_speeds(configs, tmp_path / "speeds.json")

    measured = measure()
    assert all(speed > 0 for speed in measured.values()) and len(timed) == 2
    assert measure("optimizer.learning_rate=2e-3", "training.seed=7") == measured and len(timed) == 2
    assert measure("model.d_ffn=128") != measured and len(timed) == 4


@pytest.mark.parametrize("title", fixed_hour.VARIANTS)
def test_variants_are_sound_and_differ_from_the_base(title, tmp_path):
    config = load_config(fixed_hour.CONFIG)
    varied = fixed_hour.configure(config, title, [], tmp_path)
    if "steps of" not in title:
        assert varied.sequences_per_step * varied.model.max_seq_len == STEP_TOKENS
    same = fixed_hour.name_of("", varied) == fixed_hour.name_of("", fixed_hour.configure(config, "base", [], tmp_path))
    assert same == (title == "base")


@pytest.mark.parametrize(("flag", "value", "part"), [
    ("--variants", "wider", "invalid choice: 'wider'"), ("--minutes", "0", "more than 0"),
    ("--seeds", "0", "a whole number, at least 1"), ("--out", "file", "is a file: name a folder")])
def test_bad_arguments_are_one_line(run, tmp_path, flag, value, part):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(fixed_hour.UserError) as caught:
        run(flag, value)
    line = str(caught.value)
    assert flag in line and value in line and part in line and "\n" not in line
