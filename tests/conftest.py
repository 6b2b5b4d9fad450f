"""What several test files need: sample stories, a tokenizer trained on them, and a tiny model: its config and runs."""

from __future__ import annotations

import io
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

from config import load_config, run_script
from data.synthetic_stories import synthetic_stories
from data.tokenizer import train_tokenizer

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
        "data.validation=validation.txt", "data.tokenizer_path=tokenizer/tiny", "sampling.max_new_tokens=20",
        "hardware.device=cpu"]


def pytest_collection_modifyitems(items):
    """The file of the longest tests first: xdist hands out less and less, so no core waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_resume.py")


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return list(itertools.islice(synthetic_stories(seed=7), 400))


@pytest.fixture(scope="session")
def tokenizer(stories) -> Tokenizer:
    return train_tokenizer(stories, 1500, show_progress=False)  # enough for every common word to be a token


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """No report.html at every evaluation of every run here: it would take longer than the tiny model's training."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("train.update_report", lambda folder: None)


@pytest.fixture
def drawn():
    """For tests that want it after all."""


@pytest.fixture
def workplace(tmp_path, stories):
    """tmp_path, with the tiny model's validation stories: 30, since a pass over 200 takes longer than its training."""
    (tmp_path / "validation.txt").write_text("\n<|endoftext|>\n".join(stories[:30]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def tiny_config(workplace, monkeypatch):
    """A function: overrides -> Config of the tiny model; all its files go to a fresh working directory."""
    monkeypatch.chdir(workplace)
    return lambda *overrides: load_config(REPO / "config" / "quickstart.yaml", [*TINY, *overrides])


def tiny_arguments(*arguments):
    """Of train.py, for the tiny model."""
    return [*(part for value in TINY for part in ("--set", value)), *arguments]


@pytest.fixture
def start_script(workplace, request):
    """A function: arguments of train.py -> its process, in the workplace, with the tiny model; `before` starts Python.

    Without `drawn` it finds no matplotlib: to load that and draw takes as long as all the rest.
    """
    shadows = workplace / "shadows"
    if "drawn" not in request.fixturenames:
        shadows.mkdir()
        (shadows / "matplotlib.py").write_text("raise ImportError('not in this test')", encoding="utf-8")

    def start(*arguments, before=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, environment=None, **more):
        flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        path = os.pathsep.join(filter(None, (str(shadows), os.environ.get("PYTHONPATH"))))
        surroundings = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **(environment or {})}
        return subprocess.Popen([sys.executable, *before, str(REPO / "train.py"), *tiny_arguments(*arguments)],
                                cwd=workplace, stdout=stdout, stderr=stderr, encoding="utf-8",
                                errors="replace", env=surroundings, **flags, **more)
    return start


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A function: script module, arguments, input -> exit status, output, errors: a script in this process, which
    has torch already. What only a process has (bytes, signals, pipes, full disks) is not seen."""
    def run(script, *arguments, input=""):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
                patch.setattr(sys, "argv", ["script.py", *arguments])
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode("utf-8")), encoding="utf-8"))
                for name in ("stdout", "stderr"):  # main() may put others in their places
                    patch.setattr(sys, name, getattr(sys, name))
                run_script(lambda nothing: script.main(script.parse_arguments()), None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return left.value.code, *capsys.readouterr()
    return run


@pytest.fixture
def train_here(workplace, monkeypatch, run_main):
    """As start_script, in the test's own process: arguments of train.py -> exit status, output, errors."""
    import train

    monkeypatch.chdir(workplace)
    return lambda *arguments: run_main(train, *tiny_arguments(*arguments))
