"""The recipe does what it says, and the labels are the next tokens."""

import contextlib
import json
import math
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO

from config import UserError
from config.schema import ModelConfig, SamplingConfig, SchedulerConfig
from data.batches import count_sequences, read_batch, training_sequences
from data.token_files import TokenFile, prepare_tokens
from data.tokenizer import load_tokenizer
from device import choose_compile, choose_precision
from evaluation.validation import evaluate
from inference.engine import generate_tokens
from model import Transformer
from train import Run, accumulate_gradients, start_run, train_step
from training.checkpoints import LATEST, load_checkpoint
from training.non_finite import find_non_finite
from training.optimizer import make_optimizer, orthogonalize
from training.schedule import learning_rate, schedule_notes
from training.terminal import wrapped

CPU = torch.device("cpu")
FLOAT32 = choose_precision(CPU, use_bf16=False)[0]


def token_file(tokens):
    return TokenFile(None, tokens, {}, "")


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
    run = Run(config, None, model, make_optimizer(model, config), CPU, token_file(tokens))
    for _ in range(60):
        train_step(run, model, total_steps=60)
    return model.eval()


def test_a_learned_cycle_is_continued(cyclic_model):
    for start in range(10):
        prompt = [(start + i) % 10 for i in range(4)]
        greedy = SamplingConfig(temperature=0, max_new_tokens=6)
        running = next(generate_tokens(cyclic_model, [prompt], [0], 299, 300, greedy))
        assert running[0].new == [(start + 4 + i) % 10 for i in range(6)]


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
        inputs, targets = read_batch(tokens, training_sequences(position, 10, 100, seed=3), 10, CPU)
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


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


@OPTIMIZERS
def test_weight_decay_acts_on_matrices_only(tiny_config, optimizer):
    """A step of AdamW or Muon with no gradient is the decay alone."""
    config = tiny_config("optimizer.weight_decay=0.5", "optimizer.learning_rate=0.1", f"optimizer.type={optimizer}")
    model = Transformer(config.model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if "norm" in name else 0.95), msg=name)


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


@OPTIMIZERS
def test_the_steps_are_torchs_own_with_clipping(tiny_config, optimizer):
    """Against torch's own, fed by hand: clipped gradient of the whole step's mean loss, rates of steps 1 and 2."""
    config = tiny_config("model.dropout=0", "optimizer.max_grad_norm=0.1", "optimizer.weight_decay=0.3",
                         "optimizer.adam_beta1=0.8", f"optimizer.type={optimizer}",
                         *["optimizer.muon_learning_rate=1e-3"] * (optimizer == "muon"))
    tokens = np.random.default_rng(1).integers(0, 512, 3000).astype(np.uint16)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Transformer(config.model))
    run = Run(config, None, models[0], make_optimizer(models[0], config), CPU, token_file(tokens))
    if optimizer == "muon":  # torch's own always computes in bf16
        run.optimizer.step = torch.autocast("cpu", dtype=torch.bfloat16)(run.optimizer.step)
    hidden = [p for p in models[1].layers.parameters() if p.dim() == 2 and optimizer == "muon"]
    rest = [p for p in models[1].parameters() if all(p is not matrix for matrix in hidden)]
    theirs = [torch.optim.AdamW([{"params": [p], "weight_decay": 0.3 if p.dim() == 2 else 0.0} for p in rest],
                                betas=(0.8, 0.95))]
    if hidden:
        theirs.append(torch.optim.Muon(hidden, momentum=0.8, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for step in range(2):
        train_step(run, models[0], total_steps=50)
        inputs, targets = read_batch(tokens, training_sequences(8 * step, 8, 46, config.training.seed), 64, CPU)
        models[1](inputs, targets).backward()
        assert torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.1) > 0.1
        for own, peak in zip(theirs, (3e-3, 1e-3), strict=False):
            for group in own.param_groups:
                group["lr"] = peak * (step + 1) / config.scheduler.warmup_steps
            own.step()
            own.zero_grad()
    assert run.position == 16 and run.iter_num == 2
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=4e-5, rtol=0)  # of updates of 1.8e-3


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 16)])
def test_muon_keeps_the_singular_vectors_and_evens_out_the_singular_values(shape):
    """By torch's singular value decomposition in float64. Without autocast in float32, for a CPU without fast bf16."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = (left * values[:, None]) @ right
    found = orthogonalize(matrices.float())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = orthogonalize(matrices.float())
    assert rounded.dtype == torch.bfloat16 and 1e-4 < (rounded - expected).abs().max() < 0.1


def test_another_optimizer_than_the_checkpoints_is_one_line(tiny_config, tmp_path):
    assert start_run(tiny_config("training.max_steps=1", "training.output_dir=run"), None, None) == 0
    config = tiny_config("training.max_steps=2", "training.output_dir=run", "optimizer.type=muon")
    with pytest.raises(UserError, match=r"optimizer\.type is adamw there, but muon in the config") as caught:
        start_run(config, None, tmp_path / "run" / LATEST)
    assert "\n" not in str(caught.value)


def test_muon_continues_from_the_state_of_torchs_own(tiny_config):
    """Earlier checkpoints hold that; and a non-finite gradient changes no weight."""
    config = tiny_config("optimizer.type=muon", "optimizer.adam_beta1=0.8")
    torch.manual_seed(1)
    model = Transformer(config.model)
    hidden = [parameter for parameter in model.layers.parameters() if parameter.dim() == 2]
    theirs, states = torch.optim.Muon(hidden, momentum=0.8, adjust_lr_fn="match_rms_adamw"), []
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    theirs.step()
    ours = make_optimizer(model, config)
    ours.load_state_dict({**ours.state_dict(), "muon": theirs.state_dict()})
    for optimizer in (theirs, ours):
        states.append(optimizer.state_dict()["muon" if optimizer is ours else "state"])
    states[1] = states[1]["state"]
    assert states[0].keys() == states[1].keys() == set(range(len(hidden)))
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[0])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    hidden[3].grad[0, 0] = float("nan")
    ours.found_inf = torch.tensor(1.0)
    ours.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_compilation_that_fails_falls_back_and_says_so():
    model = torch.nn.Linear(2, 2)

    def fail(compiled):
        raise RuntimeError("no compiler\nsecond line")

    forward, note = choose_compile(model, fail, CPU, "auto", run_flops=1e18)
    assert forward is model and "no compiler" in note and "\n" not in note
    with pytest.raises(UserError, match="use_compile is true"):
        choose_compile(model, fail, CPU, True, run_flops=0)
    assert choose_compile(model, fail, CPU, "auto", run_flops=1.0)[0] is model  # too short a run: never tried


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_not_returned_only_to_be_zeroed_again():
    """In a process of its own: the page faults of 20 buffers of 64 MiB, more than glibc keeps by itself, after as many
    in which their places settle."""
    code = """
import resource, torch
from device import keep_freed_memory
keep_freed_memory()
faults = []
for _ in range(41):
    buffer = torch.empty(2**24).fill_(1.0)
    del buffer
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[40] - faults[20])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) < 20 * 64 / 2 / 2  # half of what there would be even with pages of 2 MiB


# Evaluation

def test_evaluation_is_the_exact_mean_over_the_whole_split(tiny_config, tokenizer, stories):
    from data.token_files import prepare_tokens
    from data.tokenizer import article_mask
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
    config = tiny_config("training.num_epochs=3", "training.output_dir=my run/Märchen 故事", "model.dropout=0",
                         "data.cache_dir=der Speicher", "data.tokenizer_path=größe/tiny", "training.keep_checkpoints=2",
                         "training.eval_steps=60", "training.save_steps=50", "data.max_stories=120",
                         "data.validation=null")
    assert start_run(config, None, None) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "my run" / "Märchen 故事"
    steps, evaluations = metrics(folder, "step"), metrics(folder, "evaluation")
    assert steps[0]["loss"] > 5.5  # about ln 512 = 6.24 at first
    assert evaluations[-1]["val_loss"] < 4.0
    final = metrics(folder, "final")[0]
    assert final["val_tokens"] > evaluations[-1]["val_tokens"] and final["val_loss"] < 4.0
    assert [len(entry["samples"]) for entry in evaluations] == [3] * len(evaluations)
    assert all(text.startswith("Once upon a time there was") for text in (e["samples"][0] for e in evaluations))
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoint_latest.pth", "best_model.pth", "checkpoint_epoch_2.pth", "checkpoint_epoch_3.pth",
                    "metrics.jsonl", ".lock"}
    latest = load_checkpoint(folder / "checkpoint_latest.pth")
    assert latest["iter_num"] == steps[-1]["step"] and latest["epoch"] >= 3
    assert latest["best_val_loss"] == min(entry["val_loss"] for entry in evaluations)
    assert "plan: " in out and "python generate.py" in out and "Once upon a time there was" in out

    assert start_run(config, None, None) == 0  # again: reuses the files, and keeps the earlier run
    out = capsys.readouterr().out
    assert "größe/tiny: reused" in out.replace("\\", "/") and "train.tiny.bin: reused" in out
    assert "the earlier run in" in out and (folder / "previous" / "1" / "best_model.pth").exists()
    assert [entry["loss"] for entry in metrics(folder, "step")] == [entry["loss"] for entry in steps]


def test_a_story_of_each_early_step_shows_grammar_arriving(tiny_config, tmp_path, monkeypatch, capsys):
    """At steps 1, 10 and 20, but 20 has the stories of an evaluation; resumed in between; and the weights stay as
    they are without."""
    settings = ["training.eval_steps=20", "training.save_steps=3", "sampling.max_new_tokens=70"]
    monkeypatch.setattr("train.EARLY_TOKENS", 15)
    for steps, checkpoint in ((11, None), (25, tmp_path / "run" / LATEST)):
        config = tiny_config(*settings, f"training.max_steps={steps}", "training.output_dir=run")
        assert start_run(config, None, checkpoint) == 0
    early = metrics(tmp_path / "run", "early")
    assert [entry["step"] for entry in early] == [1, 10] and all(len(entry["samples"]) == 1 for entry in early)
    prompt, out = config.sampling.prompts[0], capsys.readouterr().out
    for entry in early:
        story = entry["samples"][0]
        assert story.startswith(prompt) and len(story) < len(prompt) + 15 * 10
        assert f"step {entry['step']}:\n{wrapped(story)}" in out
    assert all(entry["tokens_per_second"] > 0 for entry in metrics(tmp_path / "run", "step"))
    monkeypatch.setattr("train.EARLY_STEPS", ())
    config = tiny_config(*settings, "training.max_steps=11", "training.output_dir=without",
                         "scheduler.lr_decay_iters=25")
    config_with = tiny_config(*settings, "training.max_steps=11", "training.output_dir=with",
                              "scheduler.lr_decay_iters=25")
    assert start_run(config, None, None) == 0 and not metrics(tmp_path / "without", "early")
    monkeypatch.setattr("train.EARLY_STEPS", range(30))
    assert start_run(config_with, None, None) == 0 and len(metrics(tmp_path / "with", "early")) == 10
    theirs = weights(tmp_path / "without" / LATEST)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(tmp_path / "with" / LATEST).items())


def test_the_end_of_a_run_says_where_its_time_went(tiny_config, capsys):
    assert start_run(tiny_config("training.max_steps=12"), None, None) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Time: "))
    shares = dict(re.findall(r"(\w+) ([\d.]+)%", line))
    assert set(shares) == {"steps", "evaluation", "samples", "saves", "report"}
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.3)
    assert min(float(shares[part]) for part in ("steps", "evaluation", "samples", "saves")) > 0


@pytest.mark.parametrize(("settings", "phrase"), [
    (["optimizer.learning_rate=7e-3"], "adamw, learning rate 0.007"),
    (["optimizer.type=muon", "optimizer.learning_rate=7e-3"], "muon, learning rate 0.007"),
    (["optimizer.type=muon", "optimizer.muon_learning_rate=0.02"], "muon, learning rate 0.02 (0.003 for adamw's")])
def test_a_run_of_one_step_says_so_and_what_takes_it(tiny_config, capsys, settings, phrase):
    config = tiny_config("training.max_steps=1", "training.batch_size=1", *settings)
    assert start_run(config, None, None) == 0
    out = capsys.readouterr().out
    plan = [line for line in out.splitlines() if line.startswith("plan: ")]
    assert "(1 sequence of 64 x 2)" in plan[1] and "1 step in all" in plan[1] and plan[1].count(phrase) == 1
    assert "Finished at step 1 (1 step in" in out and "this run has 1 step, so" in out  # the warm-up would take 5
    assert not re.search(r"\b1 (?:steps|sequences|stories|evaluations)\b", out)
    with pytest.raises(UserError, match="has already finished its 1 step"):
        start_run(config, None, Path(config.training.output_dir) / LATEST)


def weights(path):
    return {name: tensor.clone() for name, tensor in load_checkpoint(path)["model"].items()}


@OPTIMIZERS
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny_config, tmp_path, optimizer):
    """Bit for bit in float32 on the CPU, with dropout and accumulation, from the middle of an epoch."""
    chosen = f"optimizer.type={optimizer}"
    whole = tiny_config("training.max_steps=12", "training.output_dir=whole", chosen)
    assert start_run(whole, None, None) == 0
    half = tiny_config("training.max_steps=5", "training.output_dir=half", "scheduler.lr_decay_iters=12", chosen)
    assert start_run(half, None, None) == 0
    rest = tiny_config("training.max_steps=12", "training.output_dir=half", chosen)
    assert start_run(rest, None, tmp_path / "half" / "checkpoint_latest.pth") == 0
    expected = weights(tmp_path / "whole" / "checkpoint_latest.pth")
    for name, tensor in weights(tmp_path / "half" / "checkpoint_latest.pth").items():
        assert torch.equal(tensor, expected[name]), name
    steps = [entry["step"] for entry in metrics(tmp_path / "half", "step")]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    with pytest.raises(UserError, match="has already finished its 12 steps"):
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
    assert not (tmp_path / "tokenizer" / "tiny" / "tokenizer.json").exists()  # so it was not trained again
    assert "the learning rate goes up from 6.0e-04" in capsys.readouterr().out


# Numbers that go wrong

def poison(monkeypatch, at, change):
    """Let the gradients of one step be what change(gradient) makes of them."""
    import train
    original, count = train.accumulate_gradients, []

    def poisoned(forward, precision, batches, seeds=()):
        loss = original(forward, precision, batches, seeds)
        count.append(1)
        if len(count) == at:
            for parameter in forward.parameters():
                parameter.grad.copy_(change(parameter.grad))
        return loss

    monkeypatch.setattr(train, "accumulate_gradients", poisoned)


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_config, tmp_path, monkeypatch):
    poison(monkeypatch, 7, lambda gradient: gradient * math.nan)
    with pytest.raises(UserError) as caught:
        start_run(tiny_config("training.output_dir=run"), None, None)
    assert "step 7: loss 6." in str(caught.value) and "gradient norm nan" in str(caught.value)
    assert "was finite when it was repeated" in str(caught.value) and "\n" not in str(caught.value)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint_latest.pth")
    assert checkpoint["iter_num"] == 5 and all(t.isfinite().all() for t in checkpoint["model"].values())
    assert not (tmp_path / "run" / "best_model.pth").exists()


def test_a_run_that_breaks_while_it_saves_says_that_it_saved(tiny_config, tmp_path, monkeypatch):
    """The first checkpoint is only written when someone waits for it."""
    from training import run_folder
    write, saved, awaited = run_folder.save_checkpoint, run_folder.RunFolder.wait_for_save, threading.Event()
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *args: awaited.wait(20) and write(*args))
    monkeypatch.setattr(run_folder.RunFolder, "wait_for_save", lambda own: (own.saving and awaited.set()) or saved(own))
    poison(monkeypatch, 7, lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"checkpoint_latest\.pth is from an earlier step"):
        start_run(tiny_config("training.output_dir=run"), None, None)
    assert load_checkpoint(tmp_path / "run" / "checkpoint_latest.pth")["iter_num"] == 5


@OPTIMIZERS
def test_a_bad_gradient_changes_no_weight_nor_does_any_step_after_it(tiny_config, optimizer):
    """So that the step can be repeated and looked at, without a wait for the device at every step."""
    config = tiny_config(f"optimizer.type={optimizer}")
    model = Transformer(config.model)
    run = Run(config, None, model, make_optimizer(model, config), CPU, token_file(np.arange(900, dtype=np.uint16) % 50))
    train_step(run, model, total_steps=20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    train_step(run, model, total_steps=20)
    handle.remove()
    train_step(run, model, total_steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {group["lr"] for group in run.optimizer.param_groups} != {0.0}


def test_the_layer_that_went_wrong_first_is_named_and_its_story_printed(tiny_config, capsys):
    """A learning rate so large that the second step's numbers overflow."""
    config = tiny_config("optimizer.learning_rate=1e15", "scheduler.warmup_steps=0", "model.dropout=0")
    with pytest.raises(UserError) as caught:
        start_run(config, None, None)
    line, out = str(caught.value), capsys.readouterr().out
    assert "step 2: loss nan" in line and "first to go wrong was the output of layers.0.attention.w" in line
    assert "nothing was saved" in line and "optimizer.learning_rate" in line and "\n" not in line
    sequence = int(out.partition("\nsequence ")[2].partition(" ")[0])
    printed = out.partition("the worst of its batch:\n  | ")[2].replace("\n  | ", "\n").strip("\n")
    tokenizer = load_tokenizer("tokenizer/tiny")
    tokens = prepare_tokens(config.data, tokenizer, "train", show_progress=False).tokens
    text = tokenizer.decode(tokens[64 * sequence:64 * sequence + 64].tolist(), skip_special_tokens=False)
    assert printed == text.strip("\n") and sequence in training_sequences(8, 8, count_sequences(len(tokens), 64), 42)


@pytest.mark.parametrize(("where", "expected"), [("layers.1.feed_forward.w2", "output"), ("layers.1", "gradient")])
def test_the_first_fault_is_found_forwards_and_backwards(where, expected):
    model = Transformer(ModelConfig(vocab_size=300, d_model=32, n_layers=3, n_heads=2, d_ffn=64, dropout=0))
    module, tokens = model.get_submodule(where), torch.arange(20)[None]

    def spoil(module, inputs, output):
        if expected == "output":
            return output * math.inf
        output.register_hook(lambda gradient: gradient * math.nan)

    module.register_forward_hook(spoil)
    with find_non_finite(model) as faults:
        model(tokens, tokens).backward()
    wrong = f"the output of {where}" if expected == "output" else f"the gradient of {where}'s output"
    assert faults[0] == wrong
    number = len(faults)
    with contextlib.suppress(ArithmeticError), find_non_finite(model) as others:
        raise ArithmeticError
    model(tokens, tokens).backward()  # nobody watches any more
    assert len(faults) == number and others == []
    with find_non_finite(Transformer(model.config)) as faults:
        model(tokens, tokens)
    assert faults == []


def test_a_spike_of_the_gradient_norm_is_reported(tiny_config, tmp_path, monkeypatch, capsys):
    settings = ["training.output_dir=run", "scheduler.lr_decay_iters=40"]
    assert start_run(tiny_config(*settings, "training.max_steps=30"), None, None) == 0
    poison(monkeypatch, 3, lambda gradient: gradient * 100)  # soon after a resume, which remembers the usual norms
    assert start_run(tiny_config(*settings, "training.max_steps=40"), None, tmp_path / "run" / LATEST) == 0
    spikes = metrics(tmp_path / "run", "spike")
    assert [entry["step"] for entry in spikes] == [33] and "step 33: gradient norm" in capsys.readouterr().out
    assert spikes[0]["gradient_norm"] > 20 * spikes[0]["median"]


def test_a_best_that_could_not_be_saved_is_not_taken_for_saved(tiny_config, tmp_path, monkeypatch):
    """best_model.pth and the loss that is noted for it belong together: the next evaluation tries again."""
    from training import run_folder
    original, refused = run_folder.save_checkpoint, []

    def refuse_first_best(path, checkpoint):
        if path.name == "best_model.pth" and not refused:
            refused.append(path)
            raise OSError(28, "No space left on device")
        original(path, checkpoint)

    monkeypatch.setattr(run_folder, "save_checkpoint", refuse_first_best)
    config = tiny_config("training.output_dir=run", "training.max_steps=11", "optimizer.learning_rate=1e-12",
                         "scheduler.min_lr=0")  # so that no later evaluation is better than the one that was refused
    assert start_run(config, None, None) == 0
    assert refused and load_checkpoint(tmp_path / "run" / "best_model.pth")["iter_num"] == 11


def test_training_does_not_wait_for_a_checkpoint(tiny_config, tmp_path, monkeypatch):
    """The file of step 5 is only written once step 7 is done, and holds the weights of step 5."""
    import train
    from training import run_folder
    write, step, done, written, weights = run_folder.save_checkpoint, train.train_step, threading.Event(), [], {}

    def write_later(path, checkpoint):
        if checkpoint["iter_num"] == 5:
            assert done.wait(20)
        written.append((checkpoint["iter_num"], checkpoint["model"]["tok_embeddings.weight"]))
        write(path, checkpoint)

    def watched(run, *rest):
        step(run, *rest)
        weights[run.iter_num] = run.model.tok_embeddings.weight.detach().clone()
        if run.iter_num == 7:
            done.set()

    monkeypatch.setattr(run_folder, "save_checkpoint", write_later)
    monkeypatch.setattr(train, "train_step", watched)
    assert start_run(tiny_config("training.output_dir=run", "training.max_steps=12"), None, None) == 0
    assert [number for number, _ in written][:2] == [5, 10]
    assert all(torch.equal(weight, weights[number]) for number, weight in written)


def test_early_stopping_ends_the_run(tiny_config, tmp_path, capsys):
    config = tiny_config("training.output_dir=run", "training.eval_steps=1", "training.early_stopping_patience=2",
                         "optimizer.learning_rate=1e-9", "scheduler.min_lr=0", "optimizer.weight_decay=0",
                         "training.eval_samples=1", "sampling.max_new_tokens=2", "model.dropout=0.9")
    assert start_run(config, None, None) == 0
    latest = tmp_path / "run" / "checkpoint_latest.pth"
    steps = load_checkpoint(latest)["iter_num"]
    assert steps < 60 and "Stopped early: 2 evaluations" in capsys.readouterr().out
    assert start_run(config, None, latest, resume=True) == 0  # over is over
    assert load_checkpoint(latest)["iter_num"] == steps and len(metrics(tmp_path / "run", "final")) == 1


def test_a_run_shorter_than_its_warm_up_says_how_to_train_longer(tiny_config):
    """A small text, as a newcomer's first one is, has a step or two in an epoch."""
    for epochs, steps in ((1, 1), (4, 30)):
        config = tiny_config("scheduler.warmup_steps=40", f"training.num_epochs={epochs}")
        note, = schedule_notes(config, steps)
        longer = int(re.search(r"--num_epochs ([\d,]+), or", note)[1].replace(",", ""))
        assert 400 <= longer * steps / epochs < 400 + steps  # then the warm-up is a tenth
    note, = schedule_notes(tiny_config("scheduler.warmup_steps=40", "training.max_steps=30"), 30)
    assert "--num_epochs" not in note
