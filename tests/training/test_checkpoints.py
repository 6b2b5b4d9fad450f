"""A checkpoint is whole or refused in one line, whatever happened to the disk, the process or the file."""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import Config, UserError, config_from_dict
from config.schema import ModelConfig
from data.cleaning import CLEANING_VERSION
from model import Transformer
from training import run_folder
from training.checkpoints import (
    BEST,
    LATEST,
    check_resumable,
    load_checkpoint,
    model_from_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from training.run_folder import RunFolder, lock_output_dir

SHAPE = ModelConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=48, max_seq_len=32)


def make_checkpoint(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    config = Config(model=SHAPE).to_dict()
    return {"model": Transformer(SHAPE).state_dict(), "config": config, "tokenizer": "{}", "iter_num": 3, "epoch": 0.5,
            "best_val_loss": 1.5, "optimizer": {}, "position": 6, "train_digest": "abc", "metrics_size": 0,
            "evaluations_without_gain": 0, "evaluated": 0, "completed": 0, "unlogged": [], "norms": [],
            "cleaning_version": CLEANING_VERSION}


def test_another_context_is_refused_for_its_own_reason_in_checkpoints_of_any_age(tmp_path):
    """Earlier versions stored data.max_seq_len too, which the user never set."""
    checkpoint = make_checkpoint()
    checkpoint["config"]["data"]["max_seq_len"] = SHAPE.max_seq_len
    save_checkpoint(tmp_path / "old.pth", checkpoint)
    found = load_checkpoint(tmp_path / "old.pth")
    config = config_from_dict(found["config"], "old.pth", ["model.max_seq_len=64"])
    message = refusal(check_resumable, found, tmp_path / "old.pth", config)
    assert f"model.max_seq_len is {SHAPE.max_seq_len} there, but 64" in message and "data." not in message


def refusal(function, *arguments) -> str:
    """The one line with which it is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The file

def test_a_checkpoint_comes_back_whole(tmp_path):
    path, checkpoint = tmp_path / "deep er" / "größe.pth", make_checkpoint()
    save_checkpoint(path, checkpoint)
    found = load_checkpoint(path)
    model, tokens = Transformer(SHAPE).eval(), torch.arange(30)[None]
    model.load_state_dict(checkpoint["model"])
    assert torch.equal(model_from_checkpoint(found, path, "cpu")(tokens), model(tokens)) and found["iter_num"] == 3
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in found["model"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, make_checkpoint())
    before = path.read_bytes()

    def torn(value, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, make_checkpoint())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("refusals", [2, 1000])
def test_a_file_that_another_program_has_open_for_a_moment_is_replaced_afterwards(tmp_path, monkeypatch, refusals):
    """On Windows a virus scanner may have; os.replace() then raises PermissionError."""
    path, replace, waited = tmp_path / "a.pth", os.replace, []
    save_checkpoint(path, make_checkpoint(1))
    before = path.read_bytes()

    def refuse(*paths):
        if len(waited) < refusals:
            raise PermissionError(13, "used by another process")
        replace(*paths)

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr("time.sleep", waited.append)
    if refusals == 2:
        save_checkpoint(path, make_checkpoint())
    else:
        with pytest.raises(PermissionError, match="used by another"):
            save_checkpoint(path, make_checkpoint())
    assert (path.read_bytes() == before) == (refusals == 1000) and load_checkpoint(path) and sum(waited) < 5
    assert len(list(tmp_path.iterdir())) == 1


class Dangerous:
    def __reduce__(self):
        return (print, ("code from a file was run",))


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys):
    good, path = tmp_path / "good.pth", tmp_path / "bad.pth"
    save_checkpoint(good, make_checkpoint())
    whole, wrong_shape = good.read_bytes(), make_checkpoint()
    wrong_shape["config"]["model"]["d_ffn"] = 96
    assert refusal(load_checkpoint, tmp_path) == f"{tmp_path}: a folder; there is {tmp_path / 'good.pth'}"
    cases = [
        (lambda: None, f"no such checkpoint; there is {tmp_path / 'good.pth'}"),
        (lambda: (path.mkdir(), refusal(load_checkpoint, path), path.rmdir()), "no such checkpoint"),
        (lambda: path.write_bytes(whole[:5000]), "damaged"),
        (lambda: path.write_bytes(whole[:-1]), "damaged"),
        (lambda: path.write_bytes(b""), "damaged"),
        (lambda: path.write_text("not a checkpoint", encoding="utf-8"), "damaged"),
        (lambda: torch.save({"model": {}, "model_args": {}}, path), "lacks config, tokenizer"),
        (lambda: torch.save([1, 2], path), "lacks model, config"),
        (lambda: torch.save({"model": Dangerous()}, path), "damaged, or not a checkpoint"),
        (lambda: torch.save({**make_checkpoint(), "format": 0}, path), "format 0, but this program reads 2"),
        (lambda: torch.save({**make_checkpoint(), "format": 2, "iter_num": "3"}, path), "lacks iter_num"),
        (lambda: torch.save({**make_checkpoint(), "format": 2, "digest": "0" * 64}, path), "damaged"),
        (lambda: save_checkpoint(path, wrong_shape), "do not fit the model"),
    ]
    for make, part in cases:
        make()
        line = refusal(lambda: model_from_checkpoint(load_checkpoint(path), path, "cpu"))
        assert line.startswith(str(path)) and part in line
    assert "was run" not in capsys.readouterr().out


def test_no_flipped_byte_is_believed(tmp_path):
    """Wherever it is: the file is refused, or the byte carried nothing and all comes back as it was."""
    path, original = tmp_path / "a.pth", make_checkpoint()
    original = {"model": original.pop("model"), **original}  # its last tensors are the last in the file
    save_checkpoint(path, original)
    whole, refused = path.read_bytes(), 0
    draw = random.Random(0)
    # anywhere, and the bit by which an entry of the zip's directory is called a folder: torch.load then gives garbage
    entries = [8 * (found.start() + 38) + 4 for found in re.finditer(rb"PK\x01\x02", whole)]
    for place in [draw.randrange(8 * len(whole)) for _ in range(200)] + entries:
        place, bit = divmod(place, 8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        try:
            found = load_checkpoint(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert {key: found[key] for key in original if key != "model"} == {k: v for k, v in original.items()
                                                                          if k != "model"}
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in original["model"].items())
    assert refused > 150  # nearly all of the file is weights


# A process that is killed

def save_for_ever(path, pipe):
    for number in itertools.count(1):
        save_checkpoint(path, make_checkpoint() | {"model": {"w": torch.full((30_000,), float(number))},
                                                   "iter_num": number})
        if number == 1:
            pipe.send("saved")


def test_fifty_kills_while_saving_leave_fifty_whole_checkpoints(tmp_path):
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context, draw, path = multiprocessing.get_context(method), random.Random(), tmp_path / LATEST
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "training.run_folder", "model", "pytest"])
    parts = 0
    for number in range(50):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(path, sender), daemon=True)
        process.start()
        receiver.recv()
        if number % 2:  # in the middle of a save, on a machine that is busy, too
            while not any(tmp_path.glob("*.part")):
                assert process.is_alive()
        else:
            process.join(timeout=draw.uniform(0, 0.01))  # a random moment; about 5 saves long
        process.kill()
        process.join()
        found = load_checkpoint(path)
        assert found["model"]["w"].eq(found["iter_num"]).all()
        parts += any(tmp_path.glob("*.part"))
        with lock_output_dir(tmp_path):
            assert not list(tmp_path.glob("*.part"))  # what the killed one left is tidied up
    assert parts  # some were killed in the middle of a save


# The folder of a run

def test_a_checkpoint_is_written_beside_what_comes_next_and_holds_what_was(tmp_path, monkeypatch):
    go_on, original, weight = threading.Event(), run_folder.save_checkpoint, torch.zeros(100)
    monkeypatch.setattr(run_folder, "save_checkpoint",
                        lambda path, checkpoint: go_on.wait(60) and original(path, checkpoint))
    with lock_output_dir(tmp_path) as folder:
        folder.save(LATEST, lambda: make_checkpoint() | {"model": {"embedding": weight, "output": weight.detach()},
                                                         "optimizer": {"state": [(weight * 2).view(10, 10)]}})
        assert not (tmp_path / LATEST).exists()
        weight += 1  # the next step
        go_on.set()
    found = load_checkpoint(tmp_path / LATEST)  # leaving the folder has waited
    assert not found["model"]["embedding"].any() and found["optimizer"]["state"][0].shape == (10, 10)
    assert found["model"]["embedding"].data_ptr() == found["model"]["output"].data_ptr()  # tied: once


def test_an_error_is_reported_and_the_save_in_progress_kept_whatever_signal_comes(tmp_path, monkeypatch):
    """As under torchrun, which sends SIGTERM to the process that writes as soon as another one has left."""
    leaving, original = threading.Event(), run_folder.save_checkpoint

    def write_when_interrupted(path, checkpoint):
        assert leaving.wait(20)
        signal.raise_signal(signal.SIGINT)
        original(path, checkpoint)

    monkeypatch.setattr(run_folder, "save_checkpoint", write_when_interrupted)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught, lock_output_dir(tmp_path) as folder:
        shutdown = folder._thread.shutdown
        monkeypatch.setattr(folder._thread, "shutdown", lambda: leaving.set() or shutdown())
        folder.save(LATEST, make_checkpoint)
        raise UserError("not finite")
    assert caught.type is UserError
    assert load_checkpoint(tmp_path / LATEST)["iter_num"] == 3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at inline_container.cc:672]")])
def test_too_little_memory_for_a_file_costs_no_later_one(tmp_path, monkeypatch, capsys, error):
    """torch.save makes the second of the first."""
    def refuse(*args):
        raise error

    with lock_output_dir(tmp_path) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", refuse)
            folder.save(LATEST, make_checkpoint)
            assert not folder.wait_for_save()
        folder.save(LATEST, make_checkpoint)
        assert folder.wait_for_save()
    assert f"not saved ({str(error) or 'out of memory'})" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / LATEST)["iter_num"] == 3


def test_a_full_disk_costs_a_line_and_nothing_else(tmp_path, monkeypatch, capsys):
    with lock_output_dir(tmp_path) as folder:
        folder.record({"step": 1})
        folder.save(LATEST, make_checkpoint)
        assert folder.wait_for_save()
        before = (tmp_path / LATEST).read_bytes()
        full = OSError(28, "No space left on device")

        def refuse(*args):
            raise full

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", refuse)
            for _ in range(2):
                folder.save(LATEST, lambda: make_checkpoint(1))
                assert not folder.wait_for_save()
            patch.setattr("pathlib.Path.open", refuse)
            folder.record({"step": 2})
            folder.record({"step": 3})
        out = capsys.readouterr().out
        assert out.count("warning: ") == 2 and out.count("No space left") == 2 and LATEST in out
        assert (tmp_path / LATEST).read_bytes() == before and not list(tmp_path.glob("*.part"))
        folder.record({"step": 4})  # there is room again: nothing was lost
        folder.save(LATEST, lambda: make_checkpoint(1))
        assert folder.wait_for_save()
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", refuse)
            folder.save(LATEST, make_checkpoint)
            assert not folder.wait_for_save() and LATEST in capsys.readouterr().out  # reported each time
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / LATEST).read_bytes() != before


def test_only_the_newest_epochs_stay(tmp_path):
    with lock_output_dir(tmp_path) as folder:
        for epoch in range(8, 13):  # 10 comes after 9
            folder.save(f"checkpoint_epoch_{epoch}.pth", make_checkpoint)
            assert folder.wait_for_save()
            folder.keep_newest(2)
        folder.save(BEST, make_checkpoint)
        assert folder.wait_for_save()
        folder.keep_newest(2)
    kept = {"checkpoint_epoch_11.pth", "checkpoint_epoch_12.pth", BEST}
    assert {path.name for path in tmp_path.glob("*.pth")} == kept


def test_a_folder_is_held_by_one_run(tmp_path):
    with lock_output_dir(tmp_path):
        def enter():
            with lock_output_dir(tmp_path):
                pass
        assert "another program is training" in refusal(enter)
    with lock_output_dir(tmp_path):
        pass
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be written to .*training\.output_dir"), \
            lock_output_dir(tmp_path / "file" / "run"):
        pass


def test_what_a_killed_drawing_left_is_tidied_up(tmp_path):
    for name in ("report.html", "report.html.1234.part", "loss.png.1234.part", "mine.html.part"):
        (tmp_path / name).write_text("half of it", encoding="utf-8")
    with lock_output_dir(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "report.html", "mine.html.part"}


def run_in(path, number, checkpoint=None, metrics_size=0):
    """Leave a run's files there, whose number says which run it was."""
    with lock_output_dir(path) as folder:
        folder.begin(checkpoint, metrics_size)
        folder.record({"run": number})
        folder.save(LATEST, lambda: make_checkpoint() | {"iter_num": number, "metrics_size": folder.metrics_size})
    return folder.metrics_size


def runs(path):
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return load_checkpoint(path / LATEST)["iter_num"], [json.loads(line)["run"] for line in lines]


def test_a_new_run_keeps_every_earlier_one_and_an_earlier_one_can_be_resumed(tmp_path, capsys):
    size = run_in(tmp_path, 1)
    run_in(tmp_path, 2)
    first = tmp_path / "previous" / "1"
    assert runs(tmp_path) == (2, [2]) and runs(first) == (1, [1])
    line, = capsys.readouterr().out.splitlines()
    assert f"is now in {first} (1 MiB)" in line
    run_in(tmp_path, 3, first / LATEST, size)  # the new run was a mistake: resume the first one
    assert runs(tmp_path) == (3, [1, 3]) and runs(tmp_path / "previous" / "2") == (2, [2]) and runs(first) == (1, [1])
    shutil.rmtree(tmp_path / "previous" / "1")  # a number is not used again while a later one is there
    run_in(tmp_path, 4)
    assert runs(tmp_path / "previous" / "3") == (3, [1, 3]) and not first.exists()


def test_an_earlier_run_that_cannot_be_moved_stays_whole(tmp_path, monkeypatch):
    """As on Windows, where another program has one of its files open."""
    run_in(tmp_path, 1)
    (tmp_path / "report.html").write_text("1", encoding="utf-8")
    before, move = {path: path.read_bytes() for path in tmp_path.iterdir()}, Path.replace

    def refuse(path, target):
        if len(list(Path(target).parent.iterdir())) == 2 and "previous" in Path(target).parts:
            raise PermissionError(13, "used by another process")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot be moved to .*previous.1.*used by another process.*output_dir"):
        run_in(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    monkeypatch.undo()
    run_in(tmp_path, 2)
    assert runs(tmp_path) == (2, [2]) and runs(tmp_path / "previous" / "1") == (1, [1])


def test_a_run_that_never_saved_is_not_kept(tmp_path):
    run_in(tmp_path, 1)
    for _ in range(2):  # each starts, records, and is killed
        with lock_output_dir(tmp_path) as folder:
            folder.begin()
            folder.record({"run": 9})
    assert runs(tmp_path / "previous" / "1") == (1, [1]) and len(list((tmp_path / "previous").iterdir())) == 1


def test_a_run_kept_by_an_earlier_version_stays_where_it_is(tmp_path):
    """That version moved one run to previous/ itself; it can be resumed, and is not the newest checkpoint."""
    size = run_in(tmp_path / "run" / "previous", 200)
    run_in(tmp_path / "run", 10)
    run_in(tmp_path / "run", 11)
    os.utime(tmp_path / "run" / "previous" / LATEST, (2**32, 2**32))
    os.utime(tmp_path / "run" / "previous" / "1" / LATEST, (2**32, 2**32))
    assert newest_checkpoint(tmp_path) == tmp_path / "run" / LATEST
    run_in(tmp_path / "run", 201, tmp_path / "run" / "previous" / LATEST, size)
    assert runs(tmp_path / "run") == (201, [200, 201]) and runs(tmp_path / "run" / "previous") == (200, [200])


def test_only_files_of_runs_are_moved_or_removed(tmp_path):
    """What a user puts there stays there."""
    for name in ("mine.pth", "film.mp4.part", "previous/mine/notes.txt", "previous/mine.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for number in (1, 2, 3):
        run_in(tmp_path, number)
    assert runs(tmp_path) == (3, [3]) and runs(tmp_path / "previous" / "2") == (2, [2])
    for name in ("mine.pth", "film.mp4.part", "previous/mine/notes.txt", "previous/mine.pth"):
        assert (tmp_path / name).read_text(encoding="utf-8") == name


def test_resuming_from_an_older_checkpoint_makes_it_the_latest(tmp_path):
    """So that a kill before the next save leaves a latest checkpoint and metrics that belong together."""
    size = run_in(tmp_path, 1)
    (tmp_path / LATEST).rename(tmp_path / "checkpoint_epoch_1.pth")
    run_in(tmp_path, 2, tmp_path / "checkpoint_epoch_1.pth", size)
    assert runs(tmp_path) == (2, [1, 2])
    epoch = tmp_path / "previous" / "1" / "checkpoint_epoch_1.pth"
    (tmp_path / epoch.name).write_bytes(epoch.read_bytes())
    save_checkpoint(tmp_path / BEST, make_checkpoint() | {"iter_num": 7})
    with lock_output_dir(tmp_path) as folder:
        folder.begin(tmp_path / "checkpoint_epoch_1.pth", size)
    assert runs(tmp_path) == (1, [1]) and load_checkpoint(tmp_path / BEST)["iter_num"] == 7
    assert runs(tmp_path / "previous" / "2") == (2, [1, 2])  # what came after it is not lost
    (tmp_path / "mine.pth").write_bytes((tmp_path / LATEST).read_bytes())
    with lock_output_dir(tmp_path) as folder:
        folder.begin(tmp_path / "mine.pth", size)  # a copy under a name of the user's, which stays where it is
    assert runs(tmp_path) == (1, [1]) and load_checkpoint(tmp_path / BEST)["iter_num"] == 7


def test_resuming_in_another_folder_copies_the_metrics_and_the_best_model(tmp_path):
    size = run_in(tmp_path / "a", 1)
    save_checkpoint(tmp_path / "a" / BEST, make_checkpoint() | {"iter_num": 7})
    run_in(tmp_path / "b", 2)
    run_in(tmp_path / "b", 3, tmp_path / "a" / LATEST, size)
    assert runs(tmp_path / "b") == (3, [1, 3]) and runs(tmp_path / "b" / "previous" / "1") == (2, [2])
    assert runs(tmp_path / "a") == (1, [1]) and load_checkpoint(tmp_path / "b" / BEST)["iter_num"] == 7


@pytest.mark.parametrize("tail", [b'{"run": 2}\n{"run": 3}\n', b'{"run"', b"\xff\x00 garbage"])
def test_metrics_are_cut_where_the_checkpoint_was(tmp_path, tail):
    size = run_in(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    run_in(tmp_path, 5, tmp_path / LATEST, size)
    assert runs(tmp_path) == (5, [1, 5])


def test_without_writing_nothing_is_written(tmp_path):
    with lock_output_dir(tmp_path / "run", writes=False) as folder:
        folder.begin()
        folder.record({"step": 1})
        folder.save(LATEST, make_checkpoint)
        assert folder.wait_for_save()
        folder.keep_newest(0)
    assert isinstance(folder, RunFolder) and not (tmp_path / "run").exists()


def test_what_cannot_be_resumed_is_refused_in_one_line(tmp_path):
    path, checkpoint = tmp_path / "a.pth", make_checkpoint()
    config = Config(model=SHAPE)
    assert check_resumable(checkpoint, path, config, "abc") == []
    warmer = replace(config, sampling=replace(config.sampling, temperature=0.9))
    note, = check_resumable(checkpoint, path, warmer)
    assert note == "changed since the checkpoint: sampling.temperature 0.8 -> 0.9"
    old = {key: value for key, value in checkpoint.items() if key not in ("position", "train_digest")}
    assert "lacks train_digest, position" in refusal(check_resumable, old, path, config)
    assert "trained on other stories" in refusal(check_resumable, checkpoint, path, config, "abd")
    earlier = {key: value for key, value in checkpoint.items() if key != "cleaning_version"}
    assert "this version cleans them differently" in refusal(check_resumable, earlier, path, config, "abd")
    assert check_resumable(earlier, path, config, "abc") == []  # the same stories, cleaned either way
    assert "model.vocab_size is 300 there, but 10000" in refusal(check_resumable, checkpoint, path, Config())
