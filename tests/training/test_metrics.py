"""metrics.jsonl: no step occurs twice, and none is from beyond the checkpoint."""

import json
import signal

import pytest

import train
from training.checkpoints import LATEST, load_checkpoint
from training.metrics_file import read_metrics


def test_a_story_with_separators_of_lines_is_read_back(tmp_path):
    entry = {"type": "evaluation", "step": 1, "samples": ["a\u2028b\u2029c\u0085d\x0be"]}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metrics(path) == [entry]


def test_a_run_resumed_and_stopped_again_early_has_no_metrics_beyond_its_checkpoint(tiny_config, tmp_path, monkeypatch):
    """The lines of a killed run are cut off, even if there are more of them than the resumed run writes."""
    settings = ["training.output_dir=run", "training.logging_steps=1", "training.eval_steps=1000",
                "data.max_stories=100", "training.save_steps=1000", "training.max_steps=60"]
    step, latest = train.train_step, tmp_path / "run" / LATEST

    def step_until(last, stop):
        def one_step(run, *rest):
            if run.iter_num == last:
                stop()
            step(run, *rest)
        monkeypatch.setattr(train, "train_step", one_step)

    def kill():
        raise KeyboardInterrupt

    step_until(4, lambda: signal.raise_signal(signal.SIGINT))  # stops after step 5
    assert train.start_run(tiny_config(*settings), None, None) == 130
    step_until(45, kill)
    with pytest.raises(KeyboardInterrupt):
        train.start_run(tiny_config(*settings), None, latest)
    assert load_checkpoint(latest)["iter_num"] == 5
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 45
    step_until(6, lambda: signal.raise_signal(signal.SIGINT))
    assert train.start_run(tiny_config(*settings), None, latest) == 130
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]  # each line is whole
    assert load_checkpoint(latest)["iter_num"] == 7
    assert [entry["step"] for entry in entries if entry["type"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert load_checkpoint(latest)["metrics_size"] == (tmp_path / "run" / "metrics.jsonl").stat().st_size


def test_lines_that_are_no_entries_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"type": "step", "step": 1}\n[1]\n{"step": 2}\n{"type": "step", "st', encoding="utf-8")
    assert read_metrics(path) == [{"type": "step", "step": 1}]
