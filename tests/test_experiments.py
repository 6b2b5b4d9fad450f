"""docs/experiments: the faults are what they claim to be, runs are kept, and all of it works on a small scale."""

from __future__ import annotations

import json
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO

sys.path.insert(0, str(REPO / "docs" / "experiments"))

import articles
import articles_look
from articles_look import misplaced_articles, words_after_articles

from data.tokens import ARTICLES, IGNORED, read_batch

TINY = ["--dataset", "sample", "--seeds", "1", "--out", "out", "--variants", articles.VARIANTS[1].title,
        "no <|endoftext|>"]
for value in ("data.max_stories=200", "model.vocab_size=512", "model.d_model=32", "model.n_layers=1",
              "model.n_heads=1", "model.d_ffn=64", "model.max_seq_len=64", "training.max_steps=20",
              "scheduler.warmup_steps=2", "training.eval_samples=1", "training.use_bf16=false",
              "training.use_compile=false", "sampling.max_new_tokens=8", "hardware.device=cpu"):
    TINY += ["--set", value]


def batch(tokens: range, seq_len: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return read_batch(np.array(tokens), np.arange(2), seq_len, torch.device("cpu"))


@pytest.mark.parametrize(("labels", "distance"), [("right", 1), ("shifted twice", 2), ("not shifted", 0)])
def test_targets_are_so_many_tokens_ahead(labels, distance):
    inputs, targets = batch(range(100, 113))  # token t is 100 + t, so that a difference of tokens is one of places
    faulty = articles.faulty_targets(labels, inputs, targets)
    counted = faulty != IGNORED
    assert (faulty - inputs)[counted].unique().tolist() == [distance]
    assert counted.sum(dim=1).tolist() == [6 - max(0, distance - 1)] * 2  # beyond the window nothing is known


def test_weights_act_on_articles_alone(tokenizer):
    weights = articles.article_weights(tokenizer, 10)
    heavy = {tokenizer.decode([index]).strip().lower() for index in (weights == 10).nonzero().flatten().tolist()}
    assert heavy == set(ARTICLES)
    assert (weights[weights != 10] == 1).all()
    assert (articles.article_weights(tokenizer, 1) == 1).all()


def test_the_weighted_mean_is_that_of_torch():
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.rand(7)
    targets[0, 3] = IGNORED
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    expected = F.cross_entropy(logits.transpose(1, 2), targets, weight=weights)
    torch.testing.assert_close(articles.weighted_mean(losses, targets, weights), expected)


def test_articles_where_none_can_stand(stories):
    follows = words_after_articles([*stories, "A was."])  # a slip of the pen does not make "was" one of them
    assert misplaced_articles("The little dog saw a bird.", follows) == (0, 2)
    assert misplaced_articles("Little the was happy a. The a dog", follows) == (3, 4)
    real = [misplaced_articles(story, follows) for story in stories]
    assert sum(wrong for wrong, _ in real) < 0.01 * sum(count for _, count in real)


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["articles.py", *TINY, *arguments])
    return articles.main()


def test_the_whole_experiment_and_that_nothing_is_trained_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch) == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    results = {of["variant"]: of for of in map(json.loads, kept.values())}
    assert set(results) == {"as it should be", "labels shifted twice", "no <|endoftext|>"}
    for of in results.values():
        assert [point["step"] for point in of["points"]] == [1, 2, 5, 10, 20]
        assert of["points"][-2]["bits_per_byte"] < of["points"][0]["bits_per_byte"]  # of the same stories
        assert of["trained_tokens"] == 20 * 4 * 64
        assert len(of["stories"]) == articles.STORIES
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
    assert first["points"] == second["points"] and first["stories"] == second["stories"]


def test_without_separators_none_is_trained_on_scored_or_begun_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {"train": [], "score": [], "begin": []}
    spied = ((articles, "read_batch", "train", 0), (articles_look, "measure_likelihood", "score", 1),
             (articles_look, "generate_tokens", "begin", 1))
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
    assert run(monkeypatch) == 128 + signal.SIGINT
    assert "the same command goes on" in capsys.readouterr().out
    assert [json.loads(path.read_bytes())["variant"] for path in (tmp_path / "out").glob("*.json")] == [
        articles.BASE.title]


def test_an_unknown_variant_is_one_line(monkeypatch):
    with pytest.raises(articles.UserError, match="labels shifted thrice"):
        run(monkeypatch, "--variants", "labels shifted thrice")
