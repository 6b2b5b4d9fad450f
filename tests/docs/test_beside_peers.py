"""docs/experiments/beside_peers.py: all train for the same time on the same tokens, and are measured alike."""

from __future__ import annotations

import json
import math
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "docs" / "experiments"))

import beside_peers

from config import UserError

# llama2.c's names; every token stays as likely as any other, whatever it is trained on
PEER = """
import torch
class ModelArgs:
    def __init__(self, **values):
        self.vocab_size = values["vocab_size"]
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = torch.nn.Embedding(args.vocab_size, 2)
        self.size = args.vocab_size
    def forward(self, tokens, targets):
        logits = self.embedding(tokens).sum(-1, keepdim=True).expand(-1, -1, self.size)
        self.last_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits
"""
SETTINGS = ["data.max_stories=200", "model.vocab_size=512", "model.d_model=32", "model.n_layers=1", "model.n_heads=1",
            "model.d_ffn=64", "model.max_seq_len=64", "training.use_bf16=false", "training.use_compile=false",
            "training.show_progress=false", "hardware.device=cpu"]
SPEEDS = {"ours": 4096.0, "llama2.c, rate 0.001": 8192.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: arguments -> exit status, in a fresh folder, with SPEEDS for the speeds and PEER for llama2.c."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peers" / "llama2.c").mkdir(parents=True)
    (tmp_path / "peers" / "llama2.c" / "model.py").write_text(PEER, encoding="utf-8")
    monkeypatch.setattr(beside_peers, "measure_speeds", lambda *_: SPEEDS)

    def start(*arguments: str, variants: tuple[str, ...] = tuple(SPEEDS)) -> int:
        overrides = [part for value in SETTINGS for part in ("--set", value)]
        monkeypatch.setattr(sys, "argv", ["beside_peers.py", "--dataset", "sample", "--out", "out", "--peers", "peers",
                                          "--minutes", "0.05", "--seeds", "1", "--variants", *variants, *overrides,
                                          *arguments])
        return beside_peers.main()
    return start


def kept(folder):
    return {of["title"]: of for of in (json.loads(path.read_bytes()) for path in folder.glob("*.run.json"))}


def test_all_train_for_the_same_time_and_only_once(run, tmp_path, monkeypatch, capsys):
    assert run() == 0
    results, table = kept(tmp_path / "out"), capsys.readouterr().out.partition("At 0.05 minutes")[2]
    assert {title: of["tokens"] for title, of in results.items()} == {
        title: 3 * speed for title, speed in SPEEDS.items()}  # 0.05 minutes are 3 seconds
    assert results["llama2.c, rate 0.001"]["val_loss"] == pytest.approx(math.log(512))
    assert 0 < results["ours"]["val_loss"] < math.log(512) - 0.1
    assert all(f"{of['bits_per_byte']:.4f}" in table for of in results.values())
    monkeypatch.setattr(beside_peers, "start_training", None)
    assert run() == 0
    assert capsys.readouterr().out.partition("At 0.05 minutes")[2] == table


def test_a_peer_has_its_own_recipe_and_else_ours(run, monkeypatch):
    begun, start = [], beside_peers.start_training
    monkeypatch.setattr(beside_peers, "start_training", lambda config, *rest: begun.append(config.to_dict()) or start(
        config, *rest))
    run()
    ours, theirs = begun
    assert theirs["optimizer"]["type"] == "adamw" and theirs["optimizer"]["learning_rate"] == 0.001
    assert ours["scheduler"]["warmup_steps"] == 0 and theirs["scheduler"]["warmup_steps"] == 1  # of 12 and 24 steps
    assert theirs["scheduler"]["min_lr"] == 0 and not theirs["model"]["mask_stories"]
    for section, values in ours.items():
        if section not in ("optimizer", "scheduler"):
            values.pop("mask_stories", None), theirs[section].pop("mask_stories", None)
            assert values == theirs[section]


@pytest.mark.parametrize(("arguments", "part"), [
    (["--minutes", "0"], "--minutes"), (["--variants", "nanoGPT, rate 0.0006"], "has no nanoGPT/model.py"),
    (["--set", "model.dropout=0.1"], "model.dropout")])
def test_bad_arguments_are_one_line(run, arguments, part):
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert part in str(caught.value) and "\n" not in str(caught.value)
