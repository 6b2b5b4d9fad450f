"""What several test files need: a small corpus of sample stories, a tokenizer trained on it, a tiny model's config."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

# before torch is loaded: in a tiny model threads mostly wait for each other, and on a busy machine for very long
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from tokenizers import Tokenizer

from config import load_config
from data.sample import sample_stories
from train_custom_tokenizer import train_tokenizer

# a suite started in the background or under nohup ignores these, and so would the programs that it starts and stops
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)

REPO = Path(__file__).resolve().parent.parent

# a model of 0.05M parameters on 300 sample stories: an epoch takes seconds
TINY = ["model.vocab_size=512", "model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ffn=64",
        "model.max_seq_len=64", "model.dropout=0.1", "training.batch_size=4", "training.gradient_accumulation_steps=2",
        "training.num_epochs=1", "training.use_bf16=false", "training.use_compile=false", "training.eval_steps=10",
        "training.eval_samples=20", "training.save_steps=5", "training.logging_steps=2", "scheduler.warmup_steps=5",
        "optimizer.learning_rate=3e-3", "scheduler.min_lr=3e-4", "data.dataset=sample", "data.max_stories=300",
        "data.tokenizer_path=tokenizer/tiny", "sampling.max_new_tokens=20", "hardware.device=cpu"]


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return list(itertools.islice(sample_stories(seed=7), 400))


@pytest.fixture(scope="session")
def tokenizer(stories) -> Tokenizer:
    return train_tokenizer(stories, 1500, show_progress=False)  # enough for every common word to be a token


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """No report.html at every evaluation of every run here: it would take longer than the tiny model's training."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("data.run_folder.update_report", lambda folder: None)


@pytest.fixture
def drawn():
    """For tests that want it after all."""


@pytest.fixture
def tiny_config(tmp_path, monkeypatch):
    """A function: overrides -> Config of the tiny model; all its files go to a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load_config(REPO / "config" / "quickstart.yaml", [*TINY, *overrides])


@pytest.fixture
def start_script(tmp_path):
    """A function: arguments of train.py -> its process, in tmp_path, with the tiny model; `before` starts Python."""
    def start(*arguments, before=(), stdout=subprocess.PIPE, environment=None, **more):
        settings = [part for value in TINY for part in ("--set", value)]
        flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        return subprocess.Popen([sys.executable, *before, str(REPO / "train.py"), *settings, *arguments], cwd=tmp_path,
                                stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}, **flags, **more)
    return start
