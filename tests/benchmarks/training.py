"""Where the time of training goes: tokens per second beside transformers, operations, and what is not a step.

    python tests/benchmarks/training.py                              each config: eager, compiled, float32, bf16
    python tests/benchmarks/training.py --against transformers       its LlamaForCausalLM with the same step around it
    python tests/benchmarks/training.py --profile                    a step by operation, and what each should cost
    python tests/benchmarks/training.py --outside                    a short real run: the shares of its time
    python tests/benchmarks/training.py --variants                   other models, recipes and ways to compute, each
                                                                     beside the main config
    python tests/benchmarks/training.py --everything --minutes 6     all of it, as far as the time goes
    python tests/benchmarks/training.py --variants --peers FOLDER    and llama2.c and nanoGPT, if FOLDER has them

Steps are train.py's train_step on random tokens: reading the batch, clipping and fused AdamW are in them. What is
compared takes turns; the table has medians over the repeats. First step and peak memory are those of a fresh process
with an empty compiler cache. transformers' model has no dropout, so beside it ours has none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import model as model_module  # noqa: E402
import train  # noqa: E402
from config import Config, load_config  # noqa: E402
from data.batches import IGNORED  # noqa: E402
from data.token_files import TokenFile  # noqa: E402
from device import choose_device, compiler_options, keep_freed_memory, peak_flops  # noqa: E402
from model import Transformer, count_parameters, flops_per_token  # noqa: E402

CONFIGS = ["quickstart", "tinystories_cpu", "train_config_tinystories_33M_TOP10K"]
WAYS = ["eager float32", "eager bf16", "compiled float32", "compiled bf16"]
BASE = "compiled bf16"
CPU_TOKENS = 2048  # of a micro-batch on the CPU, if the config's has more
OTHERS = "norms, elementwise"
# a profiler's name -> group; the first that matches counts, the rest is OTHERS
GROUPS = {
    "attention": r"attention|flash|fmha|sdpa|sdp_|::_softmax|bmm",
    "optimizer, clipping": r"adam|foreach|multi_tensor|clip|vector_norm|linalg|lpnorm",
    "loss": r"softmax|nll|cross_entropy",
    "matrix products": r"mm|matmul|linear|gemm|nvjet|cutlass|xmma|convolution",
    "casts and copies": r"copy|memcpy|memset|fill_|zero_",
    "embedding": r"embedding|index_select",
}


def make_theirs(config: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    m = config.model
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ffn, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads, max_position_embeddings=m.max_seq_len,
        tie_word_embeddings=m.tie_embeddings, bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False))


def make_step(config: Config, way: str, device: torch.device, compiler: dict[str, Any] | None = None,
              model: nn.Module | None = None) -> tuple[Callable[[], None], nn.Module]:
    """One call is one optimizer step. `way`: as in WAYS, perhaps with "transformers" before it.

    compiler: other arguments of torch.compile than train.py's. model: one whose forward(tokens, targets) is the loss.
    """
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 5_000_000).astype(np.uint16)
    model = model or (make_theirs(config) if "transformers" in way else Transformer(config.model))
    model = model.to(device).train()
    bf16 = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    run = train.Run(config, None, model, train.make_optimizer(model, config), device, TokenFile(None, tokens, {}, ""),
                    precision=bf16 if "bf16" in way else contextlib.nullcontext)
    compute, compiler = model, {"options": compiler_options(device) or None} if compiler is None else compiler
    if "compiled" in way:
        compute = torch.compile(model, dynamic=False, **compiler)
    forward = (lambda x, y: compute(input_ids=x, labels=x).loss) if "transformers" in way else compute  # it shifts

    def step() -> None:
        train.train_step(run, forward, total_steps=10**9)
        run.pending.clear()
    return step, model


def seconds_of(step: Callable[[], None], device: torch.device, at_least: float) -> float:
    """Seconds a step, over as many as take at_least; below 0: of the processor's time, for a machine that is shared."""
    clock = time.process_time if at_least < 0 else time.perf_counter
    count, start = 0, clock()
    while not count or clock() - start < abs(at_least):
        step()
        count += 1
        if device.type == "cuda" and (count % 8 == 0 or count == 1):  # the host may run ahead, but not for ever
            torch.cuda.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / count


def measure_first(config: Config, way: str, device: torch.device) -> tuple[float, float]:
    """In a process of its own: seconds to the end of the first step, and the MiB that training adds at its peak."""
    keep_freed_memory()
    start, before = time.perf_counter(), resident()
    step, _ = make_step(config, way, device)
    seconds_of(step, device, 0)
    first = time.perf_counter() - start
    seconds_of(step, device, 0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    return first, peak / 2**20


def resident() -> float:
    """The most memory that this process ever held, bytes; nan where the system does not report it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found[1]) * 1024 if found else float("nan")


def measure_speed(name: str, config: Config, ways: list[str], args: argparse.Namespace, peak: float) -> None:
    device = choose_device(args.device)
    firsts = {}
    if not args.no_first:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            for way in ways:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    firsts[way] = pool.apply(measure_first, (config, way, device))
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    steps, times = {}, {way: [] for way in ways}
    for way in ways:
        steps[way], model = make_step(config, way, device)
        seconds_of(steps[way], device, 0)
        if way in WAYS:
            flops = flops_per_token(model)
    if device.type == "cuda":  # a step of ours that waits for the device is an error; transformers' do
        torch.cuda.set_sync_debug_mode("error")
        for way in set(ways) & {*WAYS}:
            steps[way]()
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(args.repeats):
        for way, step in steps.items():
            times[way].append(seconds_of(step, device, args.seconds))
    rates = {way: config.sequences_per_step * config.model.max_seq_len / statistics.median(times[way]) for way in ways}
    for way, rate in rates.items():
        first, memory = firsts.get(way, (float("nan"), float("nan")))
        ratios = [f"{rate / rates[other]:.2f}" if other in rates else "" for other in
                  ("transformers eager float32", "transformers compiled bf16")] if args.against else []
        cells = [name, way, f"{rate:,.0f}", f"{rate * flops / peak:.1%}", f"{first:.1f}", f"{memory:,.0f}", *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)


# Variants

@contextlib.contextmanager
def patched(owner: object, **values: object) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def multiply_as_stored(x: Tensor, *layers: nn.Linear) -> Tensor:
    """model.multiply() without transposing the weights, which may pay on one kind of GPU and not on another."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


class JoinedLoss(Transformer):
    """Output matrix and loss in one function of torch, which need not keep the logits."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.norm(self.hidden_states(tokens)).flatten(0, 1)  # (batch * seq_len, d_model)
        return F.linear_cross_entropy(hidden, self.output.weight, targets.flatten())


class Peer(nn.Module):
    """A model of another repository, whose forward() then returns the loss as ours does.

    outputs: from the model and what its forward() returns to the logits and the mean loss.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        logits, loss = self.outputs(self.model, self.model(tokens, targets.clamp(min=0)))
        if reduction == "mean":
            return loss
        return F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction=reduction)


def peers(folder: Path, config: Config) -> dict[str, Callable[[], nn.Module]]:
    """The models of llama2.c and nanoGPT, from folders of these names, in this config's shape and without dropout."""
    m = config.model

    def module_of(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name.replace(".", "_"), folder / name / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def llama2_c() -> nn.Module:
        theirs = module_of("llama2.c")
        return Peer(theirs.Transformer(theirs.ModelArgs(
            dim=m.d_model, n_layers=m.n_layers, n_heads=m.n_heads, n_kv_heads=m.kv_heads, vocab_size=m.vocab_size,
            hidden_dim=m.d_ffn, multiple_of=32, max_seq_len=m.max_seq_len, dropout=0.0)),
            lambda model, out: (out, model.last_loss))

    def nano_gpt() -> nn.Module:
        theirs = module_of("nanoGPT")
        return Peer(theirs.GPT(theirs.GPTConfig(
            block_size=m.max_seq_len, vocab_size=m.vocab_size, n_layer=m.n_layers, n_head=m.n_heads, n_embd=m.d_model,
            dropout=0.0, bias=False)), lambda model, out: out)

    return {name: make for name, make in {"llama2.c": llama2_c, "nanoGPT": nano_gpt}.items()
            if (folder / name / "model.py").exists()}


def variants_of(config: Config, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is compared with the config, the most important first. Each makes a step."""
    def change(section: str, **values: Any) -> Config:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})

    def variant(changed: Config = config, way: str = BASE, compiler: dict[str, Any] | None = None,
                model: Callable[[], nn.Module] | None = None, context: Callable[[], Any] = contextlib.nullcontext,
                ) -> Callable[[], Callable[[], None]]:
        def make() -> Callable[[], None]:
            step, _ = make_step(changed, way, device, compiler, model and model())

            def step_in_context() -> None:  # the config's own steps, in turn with these, are outside of it
                with context():
                    step()
            return step_in_context
        return make

    plain = change("model", dropout=0.0)
    masked = dataclasses.replace(plain, model=dataclasses.replace(plain.model, mask_stories=True),
                                 optimizer=dataclasses.replace(config.optimizer, type="muon"))
    found = {"dropout 0": variant(plain)}
    found |= {f"{name}, dropout 0": variant(plain, model=make) for name, make in
              (peers(args.peers, plain) if args.peers else {}).items()}
    return found | {
        "transformers, dropout 0": variant(plain, f"transformers {BASE}"),
        "speedrun: Muon, masked stories, dropout 0": variant(masked),
        "Muon, dropout 0": variant(dataclasses.replace(masked, model=plain.model)),
        "weights not transposed": variant(context=lambda: patched(model_module, multiply=multiply_as_stored)),
        "torch.compile without train.py's options": variant(compiler={}),
        "F.linear_cross_entropy": variant(model=lambda: JoinedLoss(config.model)),
    }


def measure_variants(name: str, config: Config, args: argparse.Namespace, peak: float, check_time: Callable[[], None],
                     ) -> None:
    """Each variant takes turns with the config as it is; it prints its row at once, and a failure ends only its own."""
    device = choose_device(args.device)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 100)  # else the ninth model of one class would run uncompiled
    base, model = make_step(config, BASE, device)
    seconds_of(base, device, 0)
    tokens, flops = config.sequences_per_step * config.model.max_seq_len, flops_per_token(model)
    print(f"\n{name}, {config.training.batch_size} x {config.training.gradient_accumulation_steps} sequences, {BASE}; "
          "each row beside the config as it is, in turns\n\n| variant | tokens/s | share of peak | times the config | "
          "first step, s | peak memory, MiB |\n|---|---|---|---|---|---|")
    for variant, make in variants_of(config, args, device).items():
        check_time()
        try:
            start = time.perf_counter()
            step = make()
            seconds_of(step, device, 0)
            seconds_of(step, device, 0)
            first = time.perf_counter() - start
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [(seconds_of(step, device, args.seconds), seconds_of(base, device, args.seconds))
                     for _ in range(args.repeats)]
            memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else math.nan
            own, beside = (tokens / statistics.median(of) for of in zip(*times, strict=True))
            print(f"| {variant} | {own:,.0f} | {own * flops / peak:.1%} | {own / beside:.3f} | {first:.0f} | "
                  f"{memory:,.0f} |", flush=True)
        except Exception as error:
            print(f"| {variant} | failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]} |",
                  flush=True)


# By operation

def should_cost(config: Config, bf16: bool) -> dict[str, tuple[float, float]]:
    """For each group the FLOPs and the bytes of memory traffic of one training token that cannot be avoided.

    Bytes: what a forward and a backward pass must read and write if each group's operations are fused and no more.
    """
    m, training, width = config.model, config.training, 2 if bf16 else 4
    d, kv, f, layers, vocab = m.d_model, m.kv_heads * m.head_dim, m.d_ffn, m.n_layers, m.vocab_size
    products = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)] * layers + [(d, vocab)]
    weights, parameters = sum(a * b for a, b in products), count_parameters(Transformer(m))
    micro, step = training.batch_size * m.max_seq_len, config.sequences_per_step * m.max_seq_len  # tokens
    residual = 2 * layers + 1  # norms; before each but the last one a branch was added
    return {
        # forward: input, output; backward: output's gradient twice, input again, input's gradient; and the weights
        "matrix products": (6 * weights, width * sum(3 * a + 3 * b for a, b in products) + 3 * 4 * weights / micro),
        # forward: q, k, v, output; backward: these, the output's gradient and three gradients
        "attention": (6 * layers * d * m.max_seq_len, layers * width * (6 * d + 6 * kv)),
        # norm: 4 x float32 stream, 2 x its output; rotation: q, k read and written, twice; SwiGLU: 8 times its width
        OTHERS: (0, residual * d * (4 * 4 + 2 * width) + layers * width * (4 * (d + kv) + 8 * f)),
        "loss": (0, 3 * width * vocab),  # logits read, and read again and replaced by their gradient
        "optimizer, clipping": (0, 40 * parameters / step),  # weight, two moments, gradient; gradient clipped
        "casts and copies": (0, 6 * parameters / micro if bf16 else 0),
        "embedding": (0, 12 * d),
    }


def profile(name: str, config: Config, way: str, args: argparse.Namespace, peak: float, bandwidth: float) -> None:
    device = choose_device(args.device)
    if device.type == "cpu" and "compiled" in way:  # gives each fused kernel its name in the profile
        from torch._inductor import config as inductor
        inductor.cpp.enable_kernel_profile = True
    step, _ = make_step(config, way, device)
    seconds_of(step, device, 0)
    seconds_of(step, device, 0)
    with torch.profiler.profile(acc_events=True) as profiler:
        seconds_of(step, device, 0)
    tokens = config.sequences_per_step * config.model.max_seq_len
    found, names = dict.fromkeys([*GROUPS, OTHERS], 0.0), {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if device.type == "cuda" and event.device_type == torch.autograd.DeviceType.CPU:
            continue  # the launch of a kernel, which is an event of its own
        group = next((name for name, words in GROUPS.items() if re.search(words, event.key, re.IGNORECASE)), OTHERS)
        found[group] += micros
        names.setdefault(group, []).append((micros, event.key))
    whole, costs = sum(found.values()), should_cost(config, "bf16" in way)
    print(f"\n{name}, {way}: {whole / tokens:,.2f} microseconds a token\n\n"
          "| group | share | microseconds a token | FLOP a token | bytes a token | should take | largest |\n"
          "|---|---|---|---|---|---|---|")
    for group, micros in sorted(found.items(), key=lambda of: -of[1]):
        flops, num_bytes = costs[group]
        largest = ", ".join(f"{key[:60]} {one / whole:.0%}" for one, key in sorted(names.get(group, []))[:-4:-1])
        print(f"| {group} | {micros / whole:.1%} | {micros / tokens:.2f} | {flops:,.0f} | {num_bytes:,.0f} | "
              f"{1e6 * max(flops / peak, num_bytes / bandwidth):.2f} | {largest.replace('|', '/')} |", flush=True)


# Outside the step

def outside(name: str, overrides: list[str], args: argparse.Namespace) -> None:
    """A real run of train.py with the offline stories in a folder of its own: the shares of its training time."""
    spent = dict.fromkeys(["data", "logging", "evaluation and samples", "saving", "compiling, plan", "whole"], 0.0)

    def timed(owner: object, attribute: str, label: str) -> None:
        original = getattr(owner, attribute)

        def call(*args, **kwargs):
            start, before = time.perf_counter(), sum(spent.values()) - spent["whole"]
            try:
                return original(*args, **kwargs)
            finally:  # what is inside another one counts only once
                inner = sum(spent.values()) - spent["whole"] - before if label != "whole" else 0
                spent[label] += time.perf_counter() - start - inner
        setattr(owner, attribute, call)

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(REPO / "config" / f"{name}.yaml", [
            "data.dataset=sample", "data.validation=null", f"data.cache_dir={folder}/cache",
            f"data.tokenizer_path={folder}/tokenizer", f"training.output_dir={folder}/run", *overrides])
        timed(train, "micro_batch", "data")
        timed(train, "log_steps", "logging")
        timed(train, "evaluate_and_log", "evaluation and samples")
        timed(train.Run, "save", "saving")
        timed(train, "prepare_device", "compiling, plan")
        timed(train, "train", "whole")
        with contextlib.redirect_stdout(sys.stderr):
            train.start_run(config, None, None)
    spent["the steps themselves"] = 2 * spent["whole"] - sum(spent.values())
    print(f"\n{name}, {' '.join(overrides)}: {spent['whole']:.1f} s of training\n\n"
          "| part | seconds | share | share without compiling |\n|---|---|---|---|")
    steady = spent["whole"] - spent["compiling, plan"]
    for label, seconds in spent.items():
        share = "" if label in ("compiling, plan", "whole") else f"{seconds / steady:.2%}"
        print(f"| {label} | {seconds:.2f} | {seconds / spent['whole']:.2%} | {share} |", flush=True)


# The machine

def measure_machine(device: torch.device) -> tuple[dict[str, float], float]:
    """FLOP/s of a large product in float32 and bf16, and bytes a second of copying: the best of 5 tries each."""
    def best(work: Callable[[], object]) -> float:
        return min(seconds_of(work, device, 0) for _ in range(6))

    torch.set_float32_matmul_precision("high")  # as train.py sets it
    size, products = 8192 if device.type == "cuda" else 1024, {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device).to(dtype)
        products[name] = 2 * size ** 3 / best(lambda a=a: a @ a)
    big = torch.zeros(2**28, dtype=torch.uint8, device=device)
    into = torch.empty_like(big)
    return products, 2 * big.numel() / best(lambda: into.copy_(big))


def load(name: str, args: argparse.Namespace, device: torch.device) -> Config:
    config = load_config(REPO / "config" / f"{name}.yaml", args.overrides)
    batch, accumulate = config.training.batch_size, config.training.gradient_accumulation_steps
    if batch == "auto":
        batch, accumulate = config.sequences_per_step, 1
    if device.type == "cpu":  # as much as a comparison needs: steps of many micro-batches would take minutes
        batch, accumulate = min(batch, max(1, CPU_TOKENS // config.model.max_seq_len)), 1
    training = dataclasses.replace(config.training, batch_size=args.batch or batch,
                                   gradient_accumulation_steps=args.accumulate or accumulate, tokens_per_step=None)
    model = dataclasses.replace(config.model, dropout=0.0) if args.against else config.model
    return dataclasses.replace(config, training=training, model=model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of training goes.")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names of files in config/ (%(default)s)")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="%(default)s")
    parser.add_argument("--against", choices=["transformers"], help="as it comes, and under bf16 and compile")
    parser.add_argument("--profile", action="store_true", help="a step by operation, in each of --ways")
    parser.add_argument("--outside", action="store_true", help="the shares of a short real run (see --set)")
    parser.add_argument("--variants", action="store_true", help="options and kernels, each beside the config as it is")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="has llama2.c/model.py or nanoGPT/model.py")
    parser.add_argument("--everything", action="store_true", help="all of these, of the main config first")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so much time")
    parser.add_argument("--batch", type=int, help="sequences of a micro-batch (the config's; on a CPU 2,048 tokens)")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a step (the config's; on a CPU 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="at the least for each repeat (%(default)s); below "
                        "0: of the processor's time, which with OMP_NUM_THREADS=1 other programs hardly change")
    parser.add_argument("--no_first", action="store_true", help="leave out the first step and the memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def check_time() -> None:
        if time.monotonic() > deadline:
            sys.exit(f"\nstopped after {args.minutes:g} minutes: what is missing was not measured")

    device = choose_device(args.device)
    keep_freed_memory()  # as train.py does: transformers' steps gain by it too
    products, bandwidth = measure_machine(device)
    peak = peak_flops(device) or max(products.values())
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}; a large product runs at {products['float32'] / 1e12:,.3f} TFLOP/s in "
          f"float32 and {products['bf16'] / 1e12:,.3f} in bf16, copying at {bandwidth / 1e9:,.0f} GB/s; shares are of "
          f"{peak / 1e12:,.3f} TFLOP/s\n", flush=True)
    if args.variants or args.everything:
        for name in args.configs if args.variants else args.configs[-1:]:
            measure_variants(name, load(name, args, device), args, peak, check_time)
    args.against = "transformers" if args.everything else args.against
    ways = [*args.ways, *(f"transformers {way}" for way in WAYS if way in args.ways and args.against)]
    if not (args.profile or args.outside or args.variants) or args.everything:
        print(f"\nmedians of {args.repeats}\n\n"
              "| config | way | tokens/s | share of peak | first step, s | peak memory, MiB |"
              + (" times transformers eager float32 | times transformers compiled bf16 |" if args.against else "")
              + "\n|---|---|---|---|---|---|" + "---|---|" * bool(args.against))
        for name in reversed(args.configs):
            check_time()
            measure_speed(name, load(name, args, device), ways, args, peak)
    if args.profile or args.everything:
        for name in reversed(args.configs):
            for way in args.ways:
                check_time()
                profile(name, load(name, args, device), way, args, peak if "bf16" in way else products["float32"],
                        bandwidth)
    if args.outside or args.everything:
        for name in reversed(args.configs):
            check_time()
            outside(name, args.overrides, args)


if __name__ == "__main__":
    main()
