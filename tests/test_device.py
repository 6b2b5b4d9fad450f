"""The CUDA path without a GPU: real tensors, some of which claim to be on one, and all that is done with them here.

The kernels are the CPU's and the numbers real; memory, streams, torch.compile and what autocast does on CUDA alone are
not seen. (torch's own FakeTensorMode has no numbers, and no backward pass in a torch that was built without CUDA.)
"""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, TINY
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

import device as device_module
import train
from config import UserError, load_config
from config.command_line import MAIN_CONFIG
from data.token_files import TokenFile
from device import choose_device, choose_precision, explain_out_of_memory, peak_flops
from evaluation.likelihood import measure_likelihood
from evaluation.validation import evaluate
from inference import captured_steps
from inference import engine as engine_module
from inference.engine import Engine, generate_tokens
from inference.packed_weights import choose_compute, pack, refresh
from model import Transformer
from training import terminal
from training.batch_size import choose_batch_size
from training.checkpoints import LATEST
from training.distributed import SINGLE_PROCESS
from training.optimizer import make_optimizer

GPU, MPS, CPU = torch.device("cuda", 0), torch.device("mps", 0), torch.device("cpu")
READS = {"item", "tolist", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero",
         "bincount", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__"}


class FakeGPU(TorchFunctionMode):
    """Within it device=GPU works. Tensors of both devices in one operation raise, as they do on a real one.

    waits: the names of what made the host wait for the GPU: what reads a value, and copies that are not non_blocking.
    With MPS instead such copies raise: they read memory that may be free by then (pytorch issue 189690).
    """

    def __init__(self, device=GPU):
        super().__init__()
        self.device = device
        self.there, self.waits = WeakTensorKeyDictionary(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        name = func.__self__.__name__ if name == "__get__" else name
        leaves = flat([args, *kwargs.values()])
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor in self.there for tensor in tensors]
        if name == "device" and there:
            return self.device if there[0] else CPU
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):  # of Module.to
            return func(*args, **kwargs)
        asked = [leaf.type != "cpu" for leaf in leaves if isinstance(leaf, torch.device)]
        to_gpu = asked[0] if asked else name != "cpu" and any(there)
        wait, moved = name in READS and any(there), False
        if name in ("to", "cpu", "copy_", "type_as", "__set__", "tensor", "as_tensor"):
            if len(there) > 1:  # the other tensor has the device
                to_gpu = there[name != "copy_"]
            moved = to_gpu != (bool(there) and there[name == "copy_"])
            if self.device == MPS and moved and kwargs.get("non_blocking"):
                raise RuntimeError(f"{name}: not safe on mps")
            wait = moved and not kwargs.get("non_blocking") and name != "__set__"
        elif name in ("__getitem__", "__setitem__") and there[0]:  # lists and tensors of the CPU are copied, masks read
            indices = args[1] if isinstance(args[1], tuple) else [args[1]]
            wait = not all(there) or any(isinstance(index, list) or getattr(index, "dtype", None) == torch.bool
                                         for index in indices)
        elif any(there) and (name in ("numpy", "pin_memory") or any(
                not on and tensor.dim() for tensor, on in zip(tensors, there, strict=True))):
            raise RuntimeError(f"{name}: not on a GPU, and not with tensors of two devices")
        if name == "scaled_dot_product_attention":  # fused kernels have no mask where heads share keys
            assert kwargs.get("attn_mask") is None or not kwargs.get("enable_gqa")
        self.waits += [name] * wait
        if name == "pin_memory":
            return args[0].clone()
        if asked:
            args = [CPU if isinstance(value, torch.device) else value for value in args]
            kwargs = {key: CPU if isinstance(value, torch.device) else value for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        out = out.clone() if moved and name in ("to", "cpu", "type_as") and out is args[0] else out
        for tensor in [args[0]] if name == "__set__" else flat([out]):
            if isinstance(tensor, torch.Tensor):
                self.there.pop(tensor, None)
                if to_gpu:
                    self.there[tensor] = True
        return out


def flat(values):
    """What is in nested lists and tuples."""
    return [leaf for value in values for leaf in (flat(value) if isinstance(value, (list, tuple)) else [value])]


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGPU, and what torch.cuda and autocast say of it."""
    autocast, group = torch.autocast, torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
    monkeypatch.setattr("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", lambda lists: {
        (lists[0][0].device, dtype): found for (_, dtype), found in group(lists).items()})  # in C++, which knows better
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: autocast("cpu", dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 32 * 2**30))
    monkeypatch.setattr(captured_steps, "capture", record)
    return FakeGPU()


def record(step, earlier):
    """What captured_steps.capture() does: the same operations on the same memory, with all that Python decided as it is
    now. Like a CUDA graph, recording computes nothing: what it changed is put back."""
    _, cache, batch, _ = inspect.getclosurevars(step).nonlocals["arguments"]
    tensors = [*batch, *flat(cache.layers)]
    before = [tensor.clone() for tensor in tensors]
    graph = make_fx(step)()
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)

    def replay():
        with torch._C.DisableTorchFunction():  # what makes a FakeGPU
            graph()

    return SimpleNamespace(replay=replay)


def tiny(*overrides):
    return load_config(REPO / "config" / "quickstart.yaml", [*TINY, "model.n_heads=4", *overrides])


def start(config, device):
    torch.manual_seed(0)
    model, tokens = Transformer(config.model).to(device), np.random.default_rng(0).integers(0, 512, 9000, np.uint16)
    precision = choose_precision(GPU, config.training.use_bf16)[0]
    return train.Run(config, None, model, make_optimizer(model, config), device, TokenFile(None, tokens, {}, ""),
                     precision=precision)


@pytest.mark.parametrize(("overrides", "close"), [
    ([], 1e-5), (["optimizer.type=muon"], 1e-3), (["model.n_kv_heads=2", "model.mask_stories=true"], 1e-5),
    (["model.use_flash_attention=false"], 1e-5), (["training.use_bf16=true"], 0.05)])
def test_steps_train_as_on_the_cpu_without_a_wait(gpu, overrides, close):
    config = tiny(*overrides)
    here = start(config, CPU)
    for _ in range(3):
        train.train_step(here, here.model, 10)
    with gpu:
        run = start(config, GPU)
        gpu.waits.clear()
        for _ in range(3):
            train.train_step(run, run.model, 10)
        assert gpu.waits == []
        train.read_losses(run)
        assert gpu.waits == ["tolist"]
    train.read_losses(here)
    assert torch.tensor(run.unlogged).sub(torch.tensor(here.unlogged)).abs().max() < close


@pytest.fixture(scope="module")
def evaluated(tokenizer, stories):
    """Validation tokens of that tokenizer."""
    ids = [token for story in stories[:20] for token in (0, *tokenizer.encode(story).ids)]
    return TokenFile(None, np.array([*ids, 0], np.uint16), {"tokens": len(ids), "article_tokens": len(ids)}, "")


def test_evaluation_is_the_cpus_and_does_not_wait_for_batches(gpu, tokenizer, evaluated):
    config = tiny("model.vocab_size=1500", "model.mask_stories=true")
    torch.manual_seed(0)
    model, rest = Transformer(config.model).eval(), (tokenizer, config)
    here = evaluate(model, evaluated, *rest, CPU, torch.no_grad)
    likelihood = measure_likelihood(model.eval(), evaluated.tokens, tokenizer, 64, 4, CPU, torch.no_grad, False)
    with gpu:
        model.to(GPU)
        waits = []
        for limit in (4, 0):
            gpu.waits.clear()
            there = evaluate(model, evaluated, *rest, GPU, torch.no_grad, limit)
            waits.append([*gpu.waits])
        assert waits[0] == waits[1] == ["to", "to", "cpu"]  # two tables beforehand, the sums at the end
        assert there == pytest.approx(here, rel=1e-5)
        found = measure_likelihood(model.eval(), evaluated.tokens, tokenizer, 64, 4, GPU, torch.no_grad, False)
    assert found.pop("by_position") and likelihood.pop("by_position")
    assert found == pytest.approx(likelihood, rel=1e-5)


@pytest.mark.parametrize(("compute", "settings"), [
    ("float32", {"temperature": 0.0}), ("float32", {"top_p": 1.0}),
    ("float32", {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2})])
def test_stories_are_the_cpus_with_one_wait_in_eight_tokens(gpu, compute, settings):
    """In rows of unequal length, some of which end and are filled by others, and past the context."""
    config = tiny("model.max_seq_len=40", "data.max_seq_len=40", "model.n_kv_heads=2")
    sampling = replace(config.sampling, max_new_tokens=44, **settings)
    prompts, seeds = [[0], [0, 5, 9], [0, 5, 9], [0, *range(20, 35)], [0, 3], [0, 3, 8, 1]], range(6)

    def generate_on(device):
        torch.manual_seed(0)
        model = pack(Transformer(config.model).to(device).eval(), compute)
        gpu.waits.clear()
        looks = [list(running) for running in generate_tokens(model, prompts, seeds, 0, 100, sampling)]
        return {row.index: row.new for row in flat(looks)}, len(looks)

    here, _ = generate_on(CPU)
    with gpu:
        there, looks = generate_on(GPU)
    assert gpu.waits == ["tolist"] * 2 * looks  # the ids, and their log-probabilities, which are there by then
    with FakeGPU(MPS):
        assert generate_on(MPS)[0] == here
    assert there == here
    lengths = {len(new) for new in here.values()}
    assert sampling.temperature == 0 or (len(lengths) > 2 and max(lengths) > 40)


@pytest.mark.parametrize("compiler", ["none", "works", "fails"])
def test_replayed_rows_give_their_place_to_waiting_prompts(gpu, monkeypatch, compiler):
    """With a graph for each number of rows and slots that occurs; the compiled step is for full batches."""
    config = tiny("model.max_seq_len=128", "data.max_seq_len=128")
    sampling = replace(config.sampling, max_new_tokens=70, top_p=1.0)
    prompts, compiled = [[0, *range(5, 5 + i % 7)] for i in range(20)], []

    def fake_compile(step, dynamic):
        def run(model, cache, batch, used):
            if compiler == "fails":
                raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)
            compiled.append(len(batch.tokens))
            step(model, cache, batch, used)
        return run

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setitem(engine_module.MAX_ROWS, "cuda", 6)

    def generate_on(device):
        torch.manual_seed(0)
        model = pack(Transformer(config.model).to(device), "float32")
        engine = Engine(model, 0, 60, 20, compiled=compiler != "none")
        rows = [list(running) for running in generate_tokens(model, prompts, range(20), 0, 60, sampling, engine=engine)]
        return {row.index: row.new for row in flat(rows)}, engine, list(map(len, rows))

    here, *_ = generate_on(CPU)
    with gpu:
        there, engine, rows = generate_on(GPU)
    assert there == here and len({len(new) for new in here.values()}) > 4
    assert rows[:3] == [6, 6, 6] and rows[-1] < 6
    assert {key[0] for key in engine.captured.graphs} <= {1, 2, 4, 6} and 1 < len(engine.captured.graphs) <= 8
    assert set(compiled) == ({6} if compiler == "works" else set())


def test_where_no_graph_can_be_captured_the_stories_are_the_same(gpu, monkeypatch):
    def refuse(step, earlier):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured_steps, "capture", refuse)
    config = tiny()
    sampling = replace(config.sampling, max_new_tokens=40, top_p=1.0)

    def generate_on(device):
        torch.manual_seed(0)
        model = pack(Transformer(config.model).to(device), "float32")
        rows = flat([list(running) for running in generate_tokens(model, [[0], [0, 5]], [1, 2], 0, 100, sampling)])
        return {row.index: row.new for row in rows}

    here = generate_on(CPU)
    with gpu, pytest.warns(UserWarning, match="without CUDA graphs: .* not permitted when stream is capturing"):
        assert generate_on(GPU) == here


def test_a_replayed_step_speaks_with_the_weights_of_the_last_training_step(gpu):
    config = tiny()
    sampling = replace(config.sampling, temperature=0.0, max_new_tokens=30)
    with gpu:
        run = start(config, GPU)
        packed = pack(run.model, "float32")
        engine = Engine(packed, -1, 512, 1)

        def greedy(engine):
            return list(generate_tokens(engine.model, [[0, 5]], [1], -1, 512, sampling, engine=engine))[-1][0].new

        before, graphs = greedy(engine), dict(engine.captured.graphs)
        for _ in range(3):
            train.train_step(run, run.model, 3)
        refresh(packed, run.model)
        after = greedy(engine)
        assert engine.captured.graphs == graphs  # nothing was captured again
        assert before != after == greedy(Engine(pack(run.model, "float32"), -1, 512, 1))


def test_a_whole_run_goes_as_on_the_cpu(gpu, tiny_config, tmp_path, monkeypatch):
    """Plan, batch_size auto, steps, evaluations with their stories, checkpoints, and resuming from one."""
    settings = ["training.batch_size=auto", "training.gradient_accumulation_steps=null", "scheduler.lr_decay_iters=6",
                "training.tokens_per_step=512", "training.eval_steps=2", "sampling.max_new_tokens=5"]

    def run(folder, *stops):
        for steps in stops:
            config = tiny_config(*settings, f"training.output_dir={folder}", f"training.max_steps={steps}")
            latest = tmp_path / folder / LATEST
            assert train.start_run(config, None, latest if latest.exists() else None) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["type"] not in ("plan", "final")]

    expected = run("here", 6)
    monkeypatch.setattr(train, "choose_device", lambda name: GPU)
    with gpu:
        found = run("there", 4, 6)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.get("samples") == theirs.get("samples")
        if mine["type"] == "early":
            continue
        assert mine.get("loss", mine.get("val_loss")) == pytest.approx(theirs.get("loss", theirs.get("val_loss")), 1e-4)
        assert ("peak_share" in mine) == (mine["type"] == "step")


def test_what_a_gpu_has_room_for_is_tried(gpu, monkeypatch):
    config = load_config(MAIN_CONFIG)
    with torch.device("meta"):
        model = Transformer(config.model)
    tried = []

    def try_it(size):
        tried.append(size)
        if size > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.44 GiB. GPU 0 has")

    chosen = choose_batch_size(config, model, GPU, SINGLE_PROCESS, True, try_it).training
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (32, 8)
    assert tried == [256, 128, 64, 32]  # an RTX 5090 has room for the whole step
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 2**30, 16 * 2**30))
    tried.clear()
    choose_batch_size(config, model, GPU, SINGLE_PROCESS, True, try_it)
    assert tried == [128, 64, 32]  # its memory was looked at


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.44 GiB"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # Windows, Linux
def test_too_little_memory_is_one_line(error):
    with pytest.raises(UserError, match=r"^out of memory \(.+\): use less$"), explain_out_of_memory("use less"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("use less"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_what_torch_says_of_a_gpu_is_what_is_used(gpu, monkeypatch):
    assert peak_flops(GPU) == 209.5e12
    precision, why = choose_precision(GPU, True)
    with precision():
        assert why == "bf16 autocast" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert choose_compute("auto", GPU) == choose_compute("auto", GPU, rows=1) == ("bf16", "")
    with pytest.raises(UserError, match="only on the cpu, not on cuda"):
        choose_compute("int8", GPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_precision(GPU, True)[1] == "float32 (this GPU has no bf16)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [choose_device("cuda")] == used == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes on this machine, but it has 2 GPUs"):
        choose_device("cuda")


@pytest.mark.parametrize(("driver", "device", "cuda", "part"), [
    (True, "cpu", None, "has no CUDA: install torch"), (True, "cpu", "13.0", "cannot use its driver"),
    (False, "cpu", None, ""), (True, "cuda", "13.0", "")])
def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch, driver, device, cuda, part):
    """Windows' default torch has no CUDA, and the CPU would need weeks."""
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    warning = device_module.unused_gpu(torch.device(device))
    assert (part in warning and warning.startswith("warning: ") and "pytorch.org" in warning) if part else not warning
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert not device_module.unused_gpu(torch.device("cpu"))


@pytest.mark.parametrize(("seconds", "first", "second"), [
    (0.1, "", "2.8 hours"), (25.0, "29 days", ""), (1e-4, "", "")])
def test_the_first_steps_say_how_long_a_run_takes(monkeypatch, capsys, seconds, first, second):
    """And a run of more than a day is a warning at its first step."""
    now, run = [0.0], SimpleNamespace(iter_num=1, device=torch.device("cpu"))
    monkeypatch.setattr(terminal, "read_losses", lambda run: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    for is_first, duration in ((True, first), (False, second)):
        terminal.announce_duration(run, is_first, now[0], 100_001)
        out = capsys.readouterr().out
        assert (f"plan: about {duration} for 100,000 more steps" in out) if duration else not out
        assert ("warning: that is more than a day, on the cpu" in out) == ("days" in duration)


def test_a_speedup_is_that_of_the_fastest_calls_and_soon_known(monkeypatch):
    """Not that of a busy moment; and a CPU that is very slow in the one does not keep the user waiting."""
    now, calls = [0.0], []
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: now[0])

    def takes(*seconds):
        def work():
            now[0] += seconds[min(len(calls) // 2, len(seconds) - 1)]
            calls.append(work)
        return work

    assert device_module.speedup(takes(9e-3, 4e-3, 7e-3), takes(1e-3, 8e-3)) == pytest.approx(4)
    assert len(calls) == 20
    calls.clear()
    assert device_module.speedup(takes(1e-3), takes(2.0)) == pytest.approx(1 / 2000)
    assert len(calls) == 4
