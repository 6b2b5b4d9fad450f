"""A run cannot be lost: stopped anyhow, shared out anyhow, it ends where the uninterrupted one does."""

import json
import os
import random
import signal
import socket
import sys

import pytest
import torch

import train
from training.checkpoints import BEST, LATEST, load_checkpoint
from training.interruptions import deferred_interrupts
from training.run_folder import lock_output_dir

ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent signals there")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def finish(process, status=0):
    out, error = process.communicate()
    assert process.returncode == status, out + error
    return out, error


def wait_for_step(process, step):
    """Read what it prints until it has done that many steps. False if it ended before."""
    for line in process.stdout:
        if line.startswith("step ") and " of " in line and int(line.split()[1].replace(",", "")) >= step:
            return True
    return False


def metrics(folder):
    """All lines, without the speeds, which no two runs share, and without the plan, which every start has."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries
            if entry["type"] != "plan"]


def weights(folder):
    return load_checkpoint(folder / LATEST)["model"]


# One process, interrupted

def test_fewer_steps_than_are_done_end_the_run_with_its_evaluation(tiny_config, tmp_path, monkeypatch, capsys):
    """A resumed run that is to be shorter than it is already has a best model, and names no loss of infinity."""
    step, settings = train.train_step, ["training.output_dir=run", "training.eval_steps=1000", "data.max_stories=100"]

    def interrupted(run, *rest):
        if run.iter_num == 4:
            signal.raise_signal(signal.SIGINT)
        step(run, *rest)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert train.start_run(tiny_config(*settings, "training.max_steps=60"), None, None) == 130
    capsys.readouterr()
    assert train.start_run(tiny_config(*settings, "training.max_steps=3"), None, tmp_path / "run" / LATEST) == 0
    best, out = load_checkpoint(tmp_path / "run" / BEST), capsys.readouterr().out
    assert best["iter_num"] == 5 and f"best validation loss {best['best_val_loss']:.4f}" in out and " inf" not in out


@ON_POSIX
def test_a_run_stopped_at_random_steps_ends_as_if_nothing_had_happened(start_script, train_here, tmp_path, monkeypatch):
    """Ctrl-C and SIGTERM, and kill -9 in another process, with dropout and accumulation: the same weights bit for bit,
    the same metrics."""
    settings = ["--set", "training.max_steps=60", "--set", "training.save_steps=7", "--set", "training.eval_steps=13",
                "--set", "training.logging_steps=3", "--set", "training.eval_samples=5"]
    assert train_here(*settings, "--set", "training.output_dir=whole")[0] == 0
    settings += ["--resume", "--set", "training.output_dir=stopped"]
    draw, stopped, train_step = random.Random(), [], train.train_step
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    draw.shuffle(signals)
    for number, step in zip(signals, sorted(draw.sample(range(3, 55), 4)), strict=True):
        if number == signal.SIGKILL:
            process = start_script(*settings)
            if wait_for_step(process, step):
                process.kill()
                stopped.append((number.name, step))
            out, error = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), out + error
        else:
            def stopped_step(run, *rest, number=number, step=step, due=stopped):
                if run.iter_num >= step and (number.name, step) not in due:
                    due.append((number.name, step))
                    signal.raise_signal(number)
                train_step(run, *rest)

            monkeypatch.setattr(train, "train_step", stopped_step)
            status, out, error = train_here(*settings)
            assert status == (128 + number if (number.name, step) in stopped else 0), out + error
            monkeypatch.setattr(train, "train_step", train_step)
    assert train_here(*settings)[0] == 0
    assert len(stopped) >= 2, stopped  # a fast machine may have been done before the last signals
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), stopped
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole"), stopped
    assert "has already finished its 60 steps" in train_here(*settings)[1]  # once more


@ON_POSIX
@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)])  # SIGINT, SIGTERM, SIGHUP
def test_an_interrupted_run_saves_the_current_step_and_says_how_to_resume(start_script, tmp_path, number, status):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("under nohup")
    process = start_script("--num_epochs", "1000", "--set", "training.eval_steps=100000", "--set",
                           "training.save_steps=100000")
    assert wait_for_step(process, 6)
    process.send_signal(number)
    out, error = finish(process, status)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "quickstart" / LATEST)
    assert f"Stopped at step {checkpoint['iter_num']:,} of" in out and "--checkpoint" in out
    assert checkpoint["iter_num"] >= 6 and "stopping after this step" in error


@ON_POSIX
def test_a_closed_terminal_may_send_two_signals(monkeypatch):
    """By the shell and by the system: the step at hand is still saved."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with deferred_interrupts() as received:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP] * 2
    finally:
        signal.signal(signal.SIGHUP, before)


@ON_POSIX
def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_interrupts() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(second, status, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)  # so that it can be caught here
    before = signal.getsignal(signal.SIGTERM)
    with deferred_interrupts() as received:
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]  # and nothing was raised
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(second)
        assert caught.value.code == status
    assert signal.getsignal(signal.SIGTERM) is before


@ON_POSIX
def test_a_disk_that_refuses_the_checkpoint_does_not_end_the_run(start_script, train_here, tmp_path):
    import resource
    assert train_here("--set", "training.max_steps=5")[0] == 0
    latest = tmp_path / "checkpoints" / "quickstart" / LATEST
    before = latest.read_bytes()
    limit = 200_000  # bytes: more than the metrics have, less than a checkpoint
    process = start_script("--resume", "--set", "training.max_steps=12", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    out, error = finish(process, 2)
    assert out.count(f"{LATEST}: not saved (File too large)") == 1 and "step 12 of 12" in out
    assert error.startswith("error: ") and error.count("\n") == 1 and "the last save failed" in error
    assert latest.read_bytes() == before and not list(latest.parent.glob("*.part"))


@ON_POSIX
def test_a_reader_that_leaves_does_not_end_the_run(start_script, tmp_path, drawn):
    process = start_script("--set", "training.max_steps=30", "--set", "training.save_steps=100")
    assert wait_for_step(process, 2)
    process.stdout.close()  # as `| head` does, or a tee that dies
    assert process.wait() == 0 and process.stderr.read() == ""
    folder = tmp_path / "checkpoints" / "quickstart"
    assert load_checkpoint(folder / LATEST)["iter_num"] == 30 and (folder / "report.html").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_a_full_disk_under_the_log_does_not_end_the_run(start_script, tmp_path):
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start_script("--set", "training.max_steps=10", stdout=full)
        assert process.wait() == 0, process.stderr.read()
    assert load_checkpoint(tmp_path / "checkpoints" / "quickstart" / LATEST)["iter_num"] == 10


# The same from within

def test_a_higher_patience_resumes_a_run_that_stopped_early(tiny_config, tmp_path):
    from config import UserError
    config = tiny_config("training.output_dir=run", "training.eval_steps=2", "training.early_stopping_patience=1",
                         "optimizer.learning_rate=1e-12", "scheduler.min_lr=0", "training.num_epochs=3")
    assert train.start_run(config, None, None) == 0
    latest = tmp_path / "run" / LATEST
    with pytest.raises(UserError, match=r"raise --set training\.early_stopping_patience to continue"):
        train.start_run(config, None, latest)
    more = tiny_config("training.output_dir=run", "training.eval_steps=2", "training.early_stopping_patience=3",
                       "optimizer.learning_rate=1e-12", "scheduler.min_lr=0", "training.num_epochs=3")
    assert train.start_run(more, None, latest) == 0
    assert [entry["step"] for entry in metrics(tmp_path / "run") if entry["type"] == "evaluation"] == [2, 4, 6, 8]


def test_a_checkpoint_without_its_best_gets_a_new_one(tiny_config, tmp_path):
    """best_model.pth is there after a run, wherever the checkpoint came from."""
    config = tiny_config("training.output_dir=run", "training.max_steps=10")
    assert train.start_run(config, None, None) == 0
    (tmp_path / "alone.pth").write_bytes((tmp_path / "run" / LATEST).read_bytes())
    worse = tiny_config("training.output_dir=other", "training.max_steps=12", "optimizer.learning_rate=1",
                        "scheduler.min_lr=1")
    assert train.start_run(worse, None, tmp_path / "alone.pth") == 0
    assert load_checkpoint(tmp_path / "other" / BEST)["iter_num"] == 12


def test_an_evaluation_without_gain_is_drawn_and_takes_no_training_time(tiny_config, tmp_path, monkeypatch):
    drawn, evaluate_and_log = [], train.evaluate_and_log

    def watched(run, validation):
        before, spent = run.clock[1], sum(run.spent.values())
        evaluate_and_log(run, validation)
        assert run.clock[1] - before == pytest.approx(sum(run.spent.values()) - spent) and run.clock[1] > before

    monkeypatch.setattr(train, "evaluate_and_log", watched)
    monkeypatch.setattr("train.update_report", drawn.append)
    config = tiny_config("training.output_dir=run", "training.eval_steps=3", "training.max_steps=7",
                         "optimizer.learning_rate=1e-12", "scheduler.min_lr=0")
    assert train.start_run(config, None, None) == 0
    looks = [entry for entry in metrics(tmp_path / "run") if entry["type"] in ("evaluation", "final")]
    assert len(drawn) == len(looks) == 4 and load_checkpoint(tmp_path / "run" / BEST)["iter_num"] == 3


def test_a_prompt_that_is_too_long_is_refused_before_training(tiny_config, tmp_path):
    from config import UserError
    with pytest.raises(UserError, match=r"the prompt .* shorten it"):
        train.start_run(tiny_config(f"sampling.prompts=[{'Once upon a time ' * 40}]"), None, None)
    assert not list(tmp_path.rglob("*.pth"))


def test_more_epochs_stretch_the_schedule_and_say_so(tiny_config, tmp_path, capsys):
    settings = ["data.max_stories=100", "training.output_dir=run"]
    config = tiny_config(*settings, "training.num_epochs=1")
    assert train.start_run(config, None, None) == 0
    steps = load_checkpoint(tmp_path / "run" / LATEST)["iter_num"]
    longer = tiny_config(*settings, "training.num_epochs=2", "optimizer.weight_decay=0.3")
    capsys.readouterr()
    assert train.start_run(longer, None, tmp_path / "run" / LATEST) == 0
    out = capsys.readouterr().out
    total = load_checkpoint(tmp_path / "run" / LATEST)["iter_num"]
    assert f"Finished at step {total} ({total - steps} steps in " in out
    assert "changed since the checkpoint: training.num_epochs 1 -> 2, optimizer.weight_decay 0.1 -> 0.3" in out
    assert "the schedule now spans" in out and "goes up from 3.0e-04" in out
    checkpoint = load_checkpoint(tmp_path / "run" / LATEST)
    assert 2 * steps - 2 <= checkpoint["iter_num"] <= 2 * steps and checkpoint["epoch"] >= 2
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and groups[0]["lr"] == pytest.approx(3e-4)


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_evaluation_that_was_interrupted_is_made_up_for(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("training.max_steps=12", "training.output_dir=run", "training.save_steps=100")
    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_stories", lambda *args: interrupt)
        patch.setattr(train, "EARLY_STEPS", ())
        with pytest.raises(KeyboardInterrupt):
            train.start_run(config, None, None)
    assert load_checkpoint(tmp_path / "run" / LATEST)["iter_num"] == 10  # saved before the evaluation began
    assert train.start_run(config, None, tmp_path / "run" / LATEST) == 0
    kinds = [(entry["type"], entry["step"]) for entry in metrics(tmp_path / "run") if entry["type"] != "step"]
    assert kinds == [("evaluation", 10), ("evaluation", 12), ("final", 12)]


def test_a_run_killed_after_an_evaluation_does_it_again_and_saves_no_more_than_it_needs(tiny_config, tmp_path,
                                                                                         monkeypatch):
    """What is saved before an evaluation is enough: the same metrics, the same best model, the same weights."""
    saves, save, step = [], train.Run.save, train.train_step
    monkeypatch.setattr(train.Run, "save", lambda run, name: saves.append((name, run.iter_num)) or save(run, name))
    settings = ["training.max_steps=22", "training.save_steps=5", "training.keep_checkpoints=0"]
    assert train.start_run(tiny_config(*settings, "training.output_dir=whole"), None, None) == 0
    assert saves == [(LATEST, 5), (LATEST, 10), (BEST, 10), (LATEST, 15), (LATEST, 20), (BEST, 20), (LATEST, 22),
                     (BEST, 22), (LATEST, 22)]
    killed = tiny_config(*settings, "training.output_dir=killed")
    monkeypatch.setattr(train, "train_step", lambda run, *rest: interrupt() if run.iter_num == 10 else step(run, *rest))
    with pytest.raises(KeyboardInterrupt):
        train.start_run(killed, None, None)
    assert metrics(tmp_path / "killed")[-1]["type"] == "evaluation"
    monkeypatch.setattr(train, "train_step", step)
    assert train.start_run(killed, None, tmp_path / "killed" / LATEST) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for name in (LATEST, BEST):
        expected, found = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert found["best_val_loss"] == expected["best_val_loss"] and found["iter_num"] == expected["iter_num"]
        assert all(torch.equal(tensor, expected["model"][key]) for key, tensor in found["model"].items())


def test_other_training_tokens_are_refused(tiny_config, tmp_path, stories):
    from config import UserError

    def write(*texts):
        (tmp_path / "mine.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")

    write(*stories)
    settings = ["data.dataset=mine.txt", "training.output_dir=run", "data.max_stories=null"]
    assert train.start_run(tiny_config(*settings, "training.max_steps=1"), None, None) == 0
    before = (tmp_path / "run" / LATEST).read_bytes()
    cache = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "cache").iterdir()}
    for change, part in (("data.max_stories=200", r"data\.max_stories is null there, but 200 in the config"),
                         ("data.dataset=sample", r'data\.dataset is "mine.txt" there, but "sample" in the config')):
        with pytest.raises(UserError, match=part):  # before any work, and what the work would have replaced is there
            train.start_run(tiny_config(*settings, change), None, tmp_path / "run" / LATEST)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "cache").iterdir()} == cache
    write(*stories[1:])
    with pytest.raises(UserError, match="was trained on other stories"):
        train.start_run(tiny_config(*settings), None, tmp_path / "run" / LATEST)
    assert (tmp_path / "run" / LATEST).read_bytes() == before


# Several processes

@ON_POSIX  # torchrun needs a torch built with libuv on Windows
def test_two_processes_train_as_one_and_one_resumes_where_two_stopped(start_script, train_here, tmp_path):
    """Dropout included: 20 steps by one, by two, and by one, two, one in turn."""
    settings = ["--set", "training.logging_steps=1", "--set", "scheduler.lr_decay_iters=20", "--resume"]

    def train(folder, steps, processes):
        arguments = *settings, "--set", f"training.output_dir={folder}", "--set", f"training.max_steps={steps}"
        status, out, error = train_here(*arguments) if processes == 1 else (
            0, *finish(start_script(*arguments, before=TORCHRUN)))
        assert status == 0, error
        assert out.count("plan: cpu") == 1 and out.count("Finished at step ") == 1  # one of them speaks
        assert f"cpu x {processes}" in out

    train("one", 20, 1)
    train("two", 20, 2)
    train("turns", 7, 1)
    train("turns", 13, 2)
    train("turns", 20, 1)
    curves, tokens = {}, set()
    for folder in ("one", "two", "turns"):
        entries = metrics(tmp_path / folder)
        steps = [entry for entry in entries if entry["type"] == "step"]
        assert [entry["step"] for entry in steps] == list(range(1, 21))
        curves[folder] = [entry["loss"] for entry in steps]
        assert [entry["step"] for entry in entries if entry["type"] == "evaluation"][-1] == 20
        final = [entry for entry in entries if entry["type"] == "final"][-1]
        curves[folder].append(final["val_loss"])
        tokens.add(final["val_tokens"])
    assert curves["two"] == pytest.approx(curves["one"], abs=1e-5)
    assert curves["turns"] == pytest.approx(curves["one"], abs=1e-5)
    assert len(tokens) == 1  # each took its share of the evaluation
    assert curves["one"][0] - curves["one"][-2] > 0.3  # it did learn


@ON_POSIX
def test_batches_that_cannot_be_shared_out_are_one_line(start_script, tmp_path):
    _, error = finish(start_script("--set", "training.gradient_accumulation_steps=3", before=TORCHRUN), 1)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "3 cannot be divided among 2 processes" in lines[0]


@ON_POSIX
def test_machines_with_different_stories_do_not_train_together(start_script):
    """As two machines with a process each, which have another number of stories."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [start_script("--set", f"data.max_stories={300 + rank}", "--set", f"data.cache_dir=cache{rank}",
                              "--set", f"training.output_dir=run{rank}", "--set", "training.max_steps=1",
                              environment={**meeting, "RANK": str(rank)})
                 for rank in range(2)]
    for process in processes:
        out, error = finish(process, 2)
        assert "rank 1 has other data or checkpoints than rank 0" in error and "plan: " not in out


@ON_POSIX
def test_only_one_of_several_processes_evaluates(start_script, train_here):
    assert train_here("--set", "training.max_steps=2")[0] == 0
    out, _ = finish(start_script("--eval_only", before=TORCHRUN))
    assert out.count("label alignment: ") == 1 and out.count("articles per 100 words") == 1


def test_two_programs_that_pretokenize_at_once_do_not_harm_each_other(start_script, tmp_path):
    processes = [start_script("--set", "training.max_steps=1", "--set", f"training.output_dir=run{i}") for i in (1, 2)]
    counts = [[line for line in finish(process)[0].splitlines() if "stories, " in line] for process in processes]
    assert counts[0] == counts[1] and len(counts[0]) == 2
    assert torch.equal(weights(tmp_path / "run1")["norm.weight"], weights(tmp_path / "run2")["norm.weight"])
    assert not list((tmp_path / "data" / "cache").glob("*.part"))


# Wrong input

def test_eval_only_and_wrong_input(start_script, train_here, tmp_path):
    assert train_here("--set", "training.max_steps=2")[0] == 0
    status, out, _ = train_here("--eval_only")
    assert status == 0 and "validation loss" in out and "Once upon a time there was" in out
    (tmp_path / "file.txt").write_text("a file", encoding="utf-8")
    with lock_output_dir(tmp_path / "busy"):
        for arguments, part in ((["--set", "model.d_modle=3"], "d_model"),
                                (["--checkpoint", "no.pth"], "no such checkpoint"),
                                (["--config", "no.yaml"], "no such file"),
                                (["--num_epochs", "0"], "at least 1"),
                                (["--resume", "--checkpoint", "x.pth"], "not allowed with argument"),
                                (["--set", "model.d_ffn=10000000000"], "out of memory"),
                                (["--checkpoint", "checkpoints"], "a folder; train.py writes "),
                                (["--set", "training.output_dir=busy"], "another program is training"),
                                (["--set", "training.output_dir=file.txt/run"], "file.txt"),
                                (["--set", "data.dataset=no/such/place.txt"], "no such file")):
            status, _, error = train_here(*arguments)
            assert status == 2 and error.startswith("error: ") and part in error and error.count("\n") == 1
    _, error = finish(start_script("--checkpoint", "no.pth"), 2)
    assert error.startswith("error: no.pth: no such checkpoint") and error.count("\n") == 1
