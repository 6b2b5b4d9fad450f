"""docs/experiments: the faults are what they claim to be, runs are kept, and all of it works on a small scale."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO

sys.path.insert(0, str(REPO / "docs" / "experiments"))

import articles
import articles_report
from articles_report import misplaced_articles, words_after_articles

import training.run
from data.batches import IGNORED, read_batch
from data.synthetic_stories import synthetic_stories

TINY = ["--dataset", "sample", "--seeds", "1", "--out", "out", "--variants", articles.VARIANTS[1].title,
        "no <|endoftext|>"]
for value in ("data.max_stories=200", "model.vocab_size=512", "model.d_model=32", "model.n_layers=1",
              "model.n_heads=1", "model.d_ffn=64", "model.max_seq_len=64", "training.max_steps=20",
              "scheduler.warmup_steps=2", "training.eval_samples=1", "training.use_bf16=false",
              "training.use_compile=false", "sampling.max_new_tokens=8", "hardware.device=cpu"):
    TINY += ["--set", value]


def batch(tokens: range, seq_len: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return read_batch(np.array(tokens), np.arange(2), seq_len, torch.device("cpu"))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_targets_are_so_many_tokens_ahead(ahead):
    inputs, targets = batch(range(100, 113))  # token t is 100 + t, so that a difference of tokens is one of places
    faulty = articles.faulty_targets(ahead, inputs, targets)
    counted = faulty != IGNORED
    assert (faulty - inputs)[counted].unique().tolist() == [ahead]
    assert counted.sum(dim=1).tolist() == [6 - max(0, ahead - 1)] * 2  # beyond the sequence nothing is known


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_the_weighted_mean_is_that_of_torch_with_a_weight_on_articles_alone(weight):
    torch.manual_seed(0)
    logits, targets, is_article = torch.randn(2, 7, 5), torch.randint(0, 7, (2, 5)), torch.arange(7) < 3
    targets[0, 3] = IGNORED
    weights = torch.tensor([weight, weight, weight, 1, 1, 1, 1])
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(articles.weighted_mean(losses, targets, is_article, weight),
                               F.cross_entropy(logits, targets, weight=weights))


def test_articles_where_none_can_occur(stories):
    follows = words_after_articles([*stories, "A was."])  # a slip of the pen does not make "was" one of them
    assert misplaced_articles("The little dog saw a bird.", follows) == (0, 2)
    assert misplaced_articles("Little the was happy a. The a dog", follows) == (3, 4)
    real = [misplaced_articles(story, follows) for story in stories]
    assert sum(wrong for wrong, _ in real) < 0.01 * sum(count for _, count in real)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["articles.py", *TINY, *arguments])
    articles.main()


def test_the_whole_experiment_and_that_nothing_is_trained_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    results = {of["variant"]: of for of in map(json.loads, kept.values())}
    assert set(results) == {"as it should be", "labels shifted twice", "no <|endoftext|>"}
    assert len({of["points"][0]["own_loss"] for of in results.values()}) == 3  # each fault reaches the training
    for of in results.values():
        assert [point["step"] for point in of["points"]] == [1, 2, 5, 10, 20]
        assert of["points"][-2]["bits_per_byte"] < of["points"][0]["bits_per_byte"]  # of the same stories
        assert len(of["points"][-1]["stories"]) == articles.STORIES
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert all(f"{of['points'][-1]['bits_per_byte']:.3f}" in table for of in results.values())
    assert (tmp_path / "out" / "why_articles.png").read_bytes().startswith(b"\x89PNG")

    def never(*_):
        raise AssertionError("a finished run was trained again")

    with monkeypatch.context() as patch:
        patch.setattr(articles, "train_variant", never)
        (tmp_path / "out" / "results.md").unlink()
        run(patch)
        assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == table
        with pytest.raises(AssertionError):  # with other settings it is another run
            run(patch, "--set", "training.max_steps=21")
    (gone,) = (path for path in (tmp_path / "out").glob("labels-shifted-twice-*.json"))
    gone.unlink()
    run(monkeypatch)
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    other = again.keys() - {gone.name}
    assert again.keys() == kept.keys() and all(again[name] == kept[name] for name in other)
    first, second = (json.loads(of[gone.name]) for of in (kept, again))
    assert first == second


def test_another_text_of_the_same_name_has_a_tokenizer_and_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (60, 80):
        text = "\n<|endoftext|>\n".join(itertools.islice(synthetic_stories(seed=1), number))
        (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
        run(monkeypatch, "--dataset", "mine.txt", "--validation", "sample", "--set", "training.max_steps=1",
            "--variants", articles.BASE.title)
    first, second = ((path / "tokenizer.json").read_bytes() for path in (tmp_path / "out").glob("tokenizer-*"))
    assert first != second and len(list((tmp_path / "out").glob("*.json"))) == 2


def test_without_separators_none_is_trained_on_scored_or_begun_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {"train": [], "score": [], "begin": []}
    spied = ((training.run, "read_batch", "train", 0), (articles_report, "measure_likelihood", "score", 1),
             (articles_report, "generate_tokens", "begin", 1))
    for module, name, kind, place in spied:
        whole = getattr(module, name)

        def spy(*arguments, whole=whole, kind=kind, place=place):
            seen[kind].append(0 in np.concatenate([np.ravel(part) for part in arguments[place]]))  # <|endoftext|> is 0
            return whole(*arguments)
        monkeypatch.setattr(module, name, spy)
    run(monkeypatch, "--variants", "no <|endoftext|>", "--set", "training.max_steps=1")
    assert seen == {"train": [True, False], "score": [True, False], "begin": [True, False]}


def test_stopped_by_ctrl_c_it_keeps_the_runs_that_were_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_variant = articles.train_variant

    def interrupted(variant, *rest):
        if variant is not articles.BASE:
            signal.raise_signal(signal.SIGINT)
        return train_variant(variant, *rest)

    monkeypatch.setattr(articles, "train_variant", interrupted)
    with pytest.raises(KeyboardInterrupt):  # which run_script makes status 130
        run(monkeypatch)
    (kept,) = (tmp_path / "out").glob("*.json")
    assert json.loads(kept.read_bytes())["variant"] == articles.BASE.title
    assert "1 finished run:" in capsys.readouterr().out and (tmp_path / "out" / "results.md").exists()


@pytest.mark.parametrize(("script", "status", "part"), [
    ("articles.py", 0, "--seeds"), ("fixed_hour.py", 0, "--minutes"),
    ("articles_report.py", 2, "error: articles_report.py is not a script: run docs/experiments/articles.py\n")])
def test_each_file_says_how_to_run_it(script, status, part):
    done = subprocess.run([sys.executable, str(REPO / "docs" / "experiments" / script), "--help"], encoding="utf-8",
                          capture_output=True)
    assert done.returncode == status and part in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_an_unknown_variant_is_one_line(monkeypatch):
    with pytest.raises(articles.UserError, match="labels shifted thrice"):
        run(monkeypatch, "--variants", "labels shifted thrice")
