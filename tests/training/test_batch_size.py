"""batch_size auto: the step that was asked for, in micro-batches that fit; and it stays so over a restart."""

import gc

import pytest
import torch
from conftest import REPO
from torch import nn

from config import UserError, load_config
from config.command_line import MAIN_CONFIG
from model import Transformer
from train import start_run
from training.batch_size import choose_batch_size, estimate_memory
from training.checkpoints import load_checkpoint
from training.distributed import SINGLE_PROCESS, DistributedContext

SHAPE = (3, 977)  # of a weight that nothing else has
CPU = torch.device("cpu")
AUTO = ["training.batch_size=auto", "training.gradient_accumulation_steps=null"]


def step_of(sequences_per_epoch, *more):
    return [*AUTO, "model.max_seq_len=64", f"training.tokens_per_step={64 * sequences_per_epoch}", *more]


def quickstart(*overrides):
    return load_config(REPO / "config" / "quickstart.yaml", overrides)


@pytest.mark.parametrize(("overrides", "part"), [
    (AUTO, "batch_size auto follows from training.tokens_per_step: set that"),
    (["training.batch_size=auto"], "set that, such as 32768, and gradient_accumulation_steps to null"),
    (["training.batch_size=auto", "training.tokens_per_step=2048"], "gradient_accumulation_steps 1 with batch_size"),
    ([*AUTO, "training.tokens_per_step=1000"], "not a multiple of 256, model.max_seq_len 256: it could be 1024"),
    (["training.gradient_accumulation_steps=null"], "gradient_accumulation_steps null follows from training."),
    (["training.gradient_accumulation_steps=null", "training.tokens_per_step=3000"], "it could be 4096"),
    (["training.tokens_per_step=4096"], "4096 is not batch_size 8 * gradient_accumulation_steps 1"),
    (["training.batch_size=many"], "auto or a whole number, at least 1"),
])
def test_a_step_that_does_not_work_out_is_one_line(overrides, part):
    with pytest.raises(UserError) as caught:
        quickstart(*overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_per_step_says_how_often_to_accumulate():
    config = quickstart("training.gradient_accumulation_steps=null", "training.tokens_per_step=8192")
    assert (config.training.gradient_accumulation_steps, config.sequences_per_step) == (4, 32)
    assert quickstart("training.tokens_per_step=2048").sequences_per_step == 8  # both given, and equal


def found(config, fits, ranks=SINGLE_PROCESS, estimate=lambda size: 0.0,
          message="CUDA out of memory. Tried to allocate 2 GiB"):
    """The batch size and the sizes that were tried on a device where only `fits` sequences fit."""
    model, tried = nn.Linear(*SHAPE[::-1], bias=False), []

    def try_it(size):
        assert model.weight.grad is None  # nothing of the try before is left
        # what a step holds besides is held: gradients of the micro-batch before, two moments
        assert sum(type(o) is torch.Tensor and o.shape == SHAPE for o in gc.get_objects()) == 3
        tried.append(size)
        model(torch.ones(1, SHAPE[1])).sum().backward()
        if size > fits:
            raise RuntimeError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.batch_size.estimate_memory", lambda model, size, *how: estimate(size))
        config = choose_batch_size(config, model, CPU, ranks, False, try_it)
    assert model.weight.grad is None
    return config.training.batch_size, config.training.gradient_accumulation_steps, tried


def test_the_largest_divisor_of_the_step_that_fits_is_found():
    assert found(quickstart(*step_of(32)), fits=100) == (32, 1, [32])
    assert found(quickstart(*step_of(32)), fits=9) == (8, 4, [32, 16, 8])
    assert found(quickstart(*step_of(30)), fits=9) == (6, 5, [30, 15, 10, 6])
    assert found(quickstart(*step_of(32)), 100, estimate=lambda size: size * 1e18)[2] == [1]
    with pytest.raises(UserError, match="not even one sequence fits"):
        found(quickstart(*step_of(32)), fits=0)
    with pytest.raises(RuntimeError, match="another fault"):
        found(quickstart(*step_of(32)), fits=0, message="another fault")
    fixed = quickstart("training.batch_size=4")
    assert choose_batch_size(fixed, None, CPU, SINGLE_PROCESS, False, None) is fixed


@pytest.mark.parametrize("message", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "std::bad_alloc",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "Storage size calculation overflowed with sizes=[10000000000, 10000000000]"])
def test_whatever_a_library_says_of_too_little_memory_it_is_understood(message):
    assert found(quickstart(*step_of(32)), fits=9, message=message) == (8, 4, [32, 16, 8])


@pytest.mark.parametrize(("size", "measured"), [(128, 10.3), (256, 20.1)])
def test_the_estimate_for_a_gpu_is_near_what_was_measured(size, measured):
    """GiB, one H200, 2026-11-28: the main shape in bf16, compiled, dropout 0.1, sequences of 512."""
    with torch.device("meta"):
        model = Transformer(load_config(MAIN_CONFIG).model)
    assert estimate_memory(model, size, True) / 2**30 == pytest.approx(measured, rel=0.1)


class Pair(DistributedContext):
    """Two processes, the other of which has memory for only 4 sequences."""

    tried = 0

    def any_process(self, flag):
        Pair.tried += 1
        return flag or Pair.tried in (2, 4)  # for each size: is it too large by the estimate; did it fail (16 and 8 do)


def test_all_ranks_take_what_fits_on_each():
    Pair.tried = 0
    assert found(quickstart(*step_of(32)), fits=100, ranks=Pair(world_size=2)) == (4, 8, [16, 8, 4])
    with pytest.raises(UserError, match="cannot be divided among 2 processes"):
        DistributedContext(world_size=2).check_divisible(quickstart(*step_of(31)))


def test_a_resumed_run_on_more_ranks_finds_a_size_that_goes_round():
    auto = quickstart(*step_of(32))
    for processes, kept in ((1, 16), (2, 16), (4, "auto")):  # the run before had 2 micro-batches
        config = auto.keep_batch_size(auto.with_batch_size(16), processes)
        assert config.training.batch_size == kept
        DistributedContext(world_size=processes).check_divisible(config)


def test_a_resumed_run_keeps_the_batch_size_that_was_found(tiny_config, tmp_path, monkeypatch, capsys):
    """Bit for bit, dropout included, even where another size would be found now."""
    settings = step_of(8, "scheduler.lr_decay_iters=6")
    whole = tiny_config(*settings, "training.max_steps=6", "training.output_dir=whole")
    half = tiny_config(*settings, "training.max_steps=3", "training.output_dir=half")
    rest = tiny_config(*settings, "training.max_steps=6", "training.output_dir=half")
    monkeypatch.setattr("training.batch_size.CPU_BATCH_TOKENS", 4 * 64)
    assert start_run(whole, None, None) == start_run(half, None, None) == 0
    assert "512 tokens a step (4 sequences of 64, chosen by auto, x 2)" in capsys.readouterr().out
    monkeypatch.setattr("training.batch_size.CPU_BATCH_TOKENS", 2 * 64)
    assert start_run(rest, None, tmp_path / "half" / "checkpoint_latest.pth") == 0
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint_latest.pth") for name in ("half", "whole"))
    assert ours["config"]["training"]["batch_size"] == 4 and ours["iter_num"] == 6
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, theirs["model"][name]), name
    assert "changed since the checkpoint: training.max_steps 3 -> 6\n" in capsys.readouterr().out
