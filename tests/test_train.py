"""The recipe does what it says, and the labels are the next tokens."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, TINY

from config import UserError
from config.hardware import choose_compile, choose_precision
from config.schema import ModelConfig, SamplingConfig, SchedulerConfig
from data.tokens import read_batch, training_windows
from engine import generate_tokens
from evaluate import evaluate
from model import Transformer, load_checkpoint
from train import Run, accumulate_gradients, learning_rate, make_optimizer, schedule_notes, start_run, train_step

CPU = torch.device("cpu")
FLOAT32 = choose_precision(CPU, wanted=False)[0]


# Label alignment: the fault that cost the earlier program its articles

@pytest.fixture(scope="module")
def cyclic_model():
    """A model trained through the real batches and the real step on 0 1 2 ... 9 0 1 2 ..."""
    from conftest import TINY as tiny

    from config import load_config
    config = load_config(REPO / "config" / "quickstart.yaml", [
        *tiny, "model.max_seq_len=16", "model.dropout=0", "model.vocab_size=300", "training.batch_size=8",
        "training.gradient_accumulation_steps=1", "optimizer.learning_rate=1e-2"])
    tokens = np.arange(2000, dtype=np.uint16) % 10
    torch.manual_seed(0)
    model = Transformer(config.model)
    run = Run(config, None, model, make_optimizer(model, config), CPU, num_windows=len(tokens) // 16 - 1)
    for _ in range(60):
        train_step(run, model, FLOAT32, tokens, total_steps=60)
    return model.eval()


def test_a_learned_cycle_is_continued(cyclic_model):
    for start in range(10):
        prompt = [(start + i) % 10 for i in range(4)]
        greedy = SamplingConfig(temperature=0, max_new_tokens=6)
        told = next(generate_tokens(cyclic_model, [prompt], [0], 299, 300, greedy))
        assert told[0].new == [(start + 4 + i) % 10 for i in range(6)]


def test_the_model_predicts_the_next_token_not_the_one_after_nor_the_present_one(cyclic_model):
    """Fails for an off-by-one in either direction, wherever it is: in the batch, the model or the loss."""
    cycle = torch.arange(16)[None] % 10
    losses = {}
    with torch.no_grad():
        for offset in (-1, 0, 1, 2, 3):
            losses[offset] = cyclic_model(cycle, (cycle + offset) % 10).item()
    assert losses[1] < 0.1
    assert min(loss for offset, loss in losses.items() if offset != 1) > 2.0


def test_a_batch_holds_every_pair_of_neighbours_once():
    tokens = np.random.default_rng(0).integers(0, 300, 1001).astype(np.uint16)
    pairs = []
    for position in range(0, 100, 10):
        inputs, targets = read_batch(tokens, training_windows(position, 10, 100, seed=3), 10, CPU)
        pairs += list(zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True))
    assert sorted(pairs) == sorted(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


# The recipe

def test_the_schedule_is_the_hand_computed_one():
    cosine = SchedulerConfig(type="cosine", warmup_steps=10, min_lr=1e-4)
    rates = [learning_rate(step, 1e-3, 110, cosine) for step in (1, 5, 9, 10, 35, 60, 85, 110, 150)]
    half = math.cos(math.pi / 4)
    expected = [1e-4, 5e-4, 9e-4, 1e-3, 1e-4 + 9e-4 * (1 + half) / 2, 5.5e-4, 1e-4 + 9e-4 * (1 - half) / 2, 1e-4, 1e-4]
    assert rates == pytest.approx(expected)
    linear = SchedulerConfig(type="linear", warmup_steps=10, min_lr=1e-4)
    rates = [learning_rate(step, 1e-3, 110, linear) for step in (5, 10, 60, 110)]
    assert rates == pytest.approx([5e-4, 1e-3, 5.5e-4, 1e-4])
    constant = SchedulerConfig(type="constant", warmup_steps=0, min_lr=1e-4)
    assert [learning_rate(step, 1e-3, 110, constant) for step in (1, 60, 110)] == [1e-3] * 3
    fixed = SchedulerConfig(type="cosine", warmup_steps=0, min_lr=0.0, lr_decay_iters=50)
    assert learning_rate(25, 1e-3, 110, fixed) == pytest.approx(5e-4) and learning_rate(110, 1e-3, 110, fixed) == 0.0


def test_a_schedule_that_does_not_fit_the_run_is_said_out_loud(tiny_config):
    notes = schedule_notes(tiny_config("scheduler.lr_decay_iters=35000"), 18_000)
    assert len(notes) == 1 and "35,000" in notes[0] and "18,000" in notes[0] and "null" in notes[0]
    assert "warmup_steps is 5" in schedule_notes(tiny_config(), 4)[0]
    assert schedule_notes(tiny_config(), 100) == []


def test_weight_decay_acts_on_matrices_only(tiny_config):
    config = tiny_config("optimizer.weight_decay=0.5")
    model = Transformer(config.model)
    decayed = {id(p): g["weight_decay"] for g in make_optimizer(model, config).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decayed[id(parameter)] == (0.0 if "norm" in name else 0.5), name
    assert len(decayed) == len(list(model.parameters()))


def test_accumulated_gradients_are_those_of_the_big_batch():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=2, d_ffn=64, dropout=0))
    tokens = torch.randint(0, 300, (8, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    gradients, losses = [], []
    for pieces in (1, 4):
        model.zero_grad()
        batches = list(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True))
        losses.append(accumulate_gradients(model, FLOAT32, batches).item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-4)


def test_one_step_is_adamw_with_clipping(tiny_config):
    """Against torch's own AdamW fed by hand: clipped gradient of the whole step's mean loss, rate of step 1."""
    config = tiny_config("model.dropout=0", "optimizer.max_grad_norm=0.1")
    tokens = np.random.default_rng(1).integers(0, 512, 3000).astype(np.uint16)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Transformer(config.model))
    run = Run(config, None, models[0], make_optimizer(models[0], config), CPU, num_windows=40)
    train_step(run, models[0], FLOAT32, tokens, total_steps=50)
    inputs, targets = read_batch(tokens, training_windows(0, 8, 40, config.training.seed), 64, CPU)
    models[1](inputs, targets).backward()
    norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
    optimizer = make_optimizer(models[1], config)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.learning_rate / config.scheduler.warmup_steps
    optimizer.step()
    assert norm > 0.1 and run.position == 8 and run.iter_num == 1
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)  # of an update of 6e-4


def test_compilation_that_fails_falls_back_and_says_so():
    model = torch.nn.Linear(2, 2)

    def fail(compiled):
        raise RuntimeError("no compiler\nsecond line")

    forward, note = choose_compile(model, fail, CPU, "auto", run_flops=1e18)
    assert forward is model and "no compiler" in note and "\n" not in note
    with pytest.raises(UserError, match="use_compile is true"):
        choose_compile(model, fail, CPU, True, run_flops=0)
    assert choose_compile(model, fail, CPU, "auto", run_flops=1.0)[0] is model  # too short a run: never tried


# Evaluation

def test_evaluation_is_the_exact_mean_over_the_whole_split(tiny_config, tokenizer, stories):
    from data.tokens import article_mask, prepare_tokens
    config = tiny_config("model.vocab_size=1500", "model.dropout=0.1")
    validation = prepare_tokens(config.data, tokenizer, "validation", show_progress=False)
    torch.manual_seed(1)
    model = Transformer(config.model)
    result = evaluate(model, validation, tokenizer, config, CPU, FLOAT32)
    assert model.training  # and dropout was off:
    tokens, nats = torch.from_numpy(validation.tokens.astype(np.int64)), []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64):
            piece = tokens[start:start + 65]
            logits = model(piece[None, :-1])[0].double()
            nats += (-logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]]).tolist()
    assert result["val_tokens"] == len(nats) == len(tokens) - 1
    assert result["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / validation.counts["bytes"], rel=1e-5)
    articles = article_mask(tokenizer)[validation.tokens[1:]]
    assert result["article_loss"] == pytest.approx(np.mean(np.array(nats)[articles]), rel=1e-5)
    assert result["other_loss"] == pytest.approx(np.mean(np.array(nats)[~articles]), rel=1e-5)


# The whole road

def metrics(folder, kind):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return [entry for entry in map(json.loads, lines) if entry["type"] == kind]


def test_from_stories_to_a_story(tiny_config, tmp_path, capsys):
    config = tiny_config("training.num_epochs=3", "training.output_dir=my run", "model.dropout=0")
    assert start_run(config, None, None) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "my run"
    steps, evaluations = metrics(folder, "step"), metrics(folder, "evaluation")
    assert steps[0]["loss"] > 5.5  # about ln 512 = 6.24 at first
    assert evaluations[-1]["val_loss"] < 4.0
    final = metrics(folder, "final")[0]
    assert final["val_tokens"] > evaluations[-1]["val_tokens"] and final["val_loss"] < 4.0
    assert [len(entry["samples"]) for entry in evaluations] == [3] * len(evaluations)
    assert all(text.startswith("Once upon a time there was") for text in (e["samples"][0] for e in evaluations))
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoint_latest.pth", "best_model.pth", "checkpoint_epoch_1.pth", "checkpoint_epoch_2.pth",
                     "checkpoint_epoch_3.pth", "metrics.jsonl"}
    latest = load_checkpoint(folder / "checkpoint_latest.pth")
    assert latest["iter_num"] == steps[-1]["step"] and latest["epoch"] >= 3
    assert latest["best_val_loss"] == min(entry["val_loss"] for entry in evaluations)
    assert "plan: " in out and "python generate.py" in out and "Once upon a time there was" in out

    assert start_run(config, None, None) == 0  # again: reuses the files, and keeps the earlier run
    out = capsys.readouterr().out
    assert "tokenizer/tiny: reused" in out.replace("\\", "/") and "train.tiny.bin: reused" in out
    assert "held an earlier run" in out and (folder / "previous" / "best_model.pth").exists()
    assert [entry["loss"] for entry in metrics(folder, "step")] == [entry["loss"] for entry in steps]


def weights(path):
    return {name: tensor.clone() for name, tensor in load_checkpoint(path)["model"].items()}


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny_config, tmp_path):
    """Bit for bit in float32 on the CPU, with dropout and accumulation, from the middle of an epoch."""
    whole = tiny_config("training.max_steps=12", "training.output_dir=whole")
    assert start_run(whole, None, None) == 0
    half = tiny_config("training.max_steps=5", "training.output_dir=half", "scheduler.lr_decay_iters=12")
    assert start_run(half, None, None) == 0
    rest = tiny_config("training.max_steps=12", "training.output_dir=half")
    assert start_run(rest, None, tmp_path / "half" / "checkpoint_latest.pth") == 0
    expected = weights(tmp_path / "whole" / "checkpoint_latest.pth")
    for name, tensor in weights(tmp_path / "half" / "checkpoint_latest.pth").items():
        assert torch.equal(tensor, expected[name]), name
    steps = [entry["step"] for entry in metrics(tmp_path / "half", "step")]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    with pytest.raises(UserError, match="has done its 12 steps already"):
        start_run(rest, None, tmp_path / "half" / "checkpoint_latest.pth")


def test_a_checkpoint_of_another_shape_or_tokenizer_is_refused(tiny_config, tmp_path):
    assert start_run(tiny_config("training.max_steps=1", "training.output_dir=a"), None, None) == 0
    other = ["data.tokenizer_path=tokenizer/other", "model.vocab_size=400"]
    for changes, part in ((["model.d_ffn=96"], "model.d_ffn is 64 there, but 96"),
                          (other, "model.vocab_size is 512 there, but 400")):
        config = tiny_config(*changes, "training.output_dir=b")
        with pytest.raises(UserError) as caught:
            start_run(config, None, tmp_path / "a" / "checkpoint_latest.pth")
        assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists() and not (tmp_path / "tokenizer" / "other").exists()


def test_a_resumed_run_keeps_its_own_tokenizer(tiny_config, tmp_path, capsys):
    assert start_run(tiny_config("training.max_steps=1", "training.output_dir=a"), None, None) == 0
    (tmp_path / "tokenizer" / "tiny" / "tokenizer.json").unlink()
    latest = tmp_path / "a" / "checkpoint_latest.pth"
    own = load_checkpoint(latest)["tokenizer"]
    config = tiny_config("training.max_steps=3", "training.output_dir=a", "scheduler.warmup_steps=0")
    assert start_run(config, None, latest) == 0
    assert load_checkpoint(latest)["tokenizer"] == own
    assert not (tmp_path / "tokenizer" / "tiny" / "tokenizer.json").exists()  # so it was not trained anew
    assert "the learning rate goes up from 6.0e-04" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_config, tmp_path, monkeypatch):
    import train
    original, count = train.accumulate_gradients, []

    def poisoned(*args):
        count.append(1)
        return original(*args) * (math.nan if len(count) == 8 else 1.0)

    monkeypatch.setattr(train, "accumulate_gradients", poisoned)
    with pytest.raises(UserError) as caught:
        start_run(tiny_config("training.output_dir=run"), None, None)
    assert "step 8: loss nan" in str(caught.value) and "\n" not in str(caught.value)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint_latest.pth")
    assert checkpoint["iter_num"] == 5 and all(t.isfinite().all() for t in checkpoint["model"].values())
    assert not (tmp_path / "run" / "best_model.pth").exists()


def test_early_stopping_ends_the_run(tiny_config, tmp_path, capsys):
    config = tiny_config("training.output_dir=run", "training.eval_steps=1", "training.early_stopping_patience=2",
                         "optimizer.learning_rate=1e-9", "scheduler.min_lr=0", "optimizer.weight_decay=0",
                         "training.eval_samples=1", "sampling.max_new_tokens=2", "model.dropout=0.9")
    config_steps = start_run(config, None, None)
    assert config_steps == 0 and load_checkpoint(tmp_path / "run" / "checkpoint_latest.pth")["iter_num"] < 60


# The script

def start_script(tmp_path, *arguments):
    settings = [part for value in TINY for part in ("--set", value)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
    return subprocess.Popen([sys.executable, str(REPO / "train.py"), *settings, *arguments], cwd=tmp_path,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                            env=environment, **flags)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent SIGTERM there")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_the_step_at_hand_and_says_how_to_go_on(tmp_path, number, status):
    process = start_script(tmp_path, "--num_epochs", "1000", "--set", "training.eval_steps=100000", "--set",
                           "training.save_steps=100000")
    for line in process.stdout:  # wait until it trains
        if line.startswith("step 6 of"):
            break
    process.send_signal(number)
    out, error = process.communicate()
    assert process.returncode == status, error
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "quickstart" / "checkpoint_latest.pth")
    assert f"stopped at step {checkpoint['iter_num']:,} of" in out and "--checkpoint" in out
    assert checkpoint["iter_num"] >= 6


def test_eval_only_and_wrong_input(tmp_path):
    trained = start_script(tmp_path, "--set", "training.max_steps=2")
    out, error = trained.communicate()
    assert trained.returncode == 0, error
    looked = start_script(tmp_path, "--eval_only")
    out, error = looked.communicate()
    assert looked.returncode == 0 and "validation loss" in out and "Once upon a time there was" in out, error
    for arguments, part in ((["--set", "model.d_modle=3"], "d_model"),
                            (["--checkpoint", "no.pth"], "no such checkpoint"),
                            (["--config", "no.yaml"], "no such file"),
                            (["--num_epochs", "0"], "at least 1"),
                            (["--set", "data.dataset=no/such/place.txt"], "no such file")):
        wrong = start_script(tmp_path, *arguments)
        out, error = wrong.communicate()
        assert wrong.returncode == 2 and error.startswith("error: ") and part in error and error.count("\n") == 1
