"""What makes a story model better at a fixed time of training on this machine? One departure from a base at a time.

    python docs/experiments/fixed_hour.py --dataset train.txt --validation valid.txt
    python docs/experiments/fixed_hour.py --minutes 4 --seeds 1 --variants "dropout 0.1" "vocabulary 4,000"

First the speed of each variant is measured, in turns, on an otherwise idle machine. The speed times the minutes is the
number of tokens that the variant may train on, so that a busy machine later does not change the result. Then train.py's
own loop trains each. Speeds and finished runs are files in --out and are kept; Ctrl-C loses only the current step.
"""

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import digest, parse_arguments, read_result, tokenizer_folder, write_result  # finds the project, too
from torch import nn
from tqdm import tqdm

from config import Config, UserError, config_from_dict, run_script
from config.command_line import Parser
from data.atomic_files import atomic_write
from data.stories import open_stories
from data.token_files import TokenFile
from device import choose_compile, choose_device, choose_precision, keep_freed_memory
from model import Transformer, count_parameters
from train import accumulate_gradients, start_run, train_step
from training.checkpoints import LATEST
from training.metrics_file import read_metrics
from training.optimizer import make_optimizer
from training.run import Run, micro_batch

CONFIG = Path(__file__).with_suffix(".yaml")
BASE = "base"
TURNS, TURN_SECONDS = 5, 3.0  # in which the speed is measured
VARIANTS = {  # title: settings. A step is 4,096 tokens in all of them but those of the batch
    BASE: (),
    "AdamW, 4e-3, no story mask": ("optimizer.type=adamw", "optimizer.learning_rate=4e-3",
                                   "optimizer.muon_learning_rate=null", "model.mask_stories=false"),
    "no story mask": ("model.mask_stories=false",),
    "half the rates": ("optimizer.learning_rate=1.6e-2", "optimizer.muon_learning_rate=6e-3"),
    "twice the rates": ("optimizer.learning_rate=6.4e-2", "optimizer.muon_learning_rate=2.4e-2"),
    "half of Muon's rate": ("optimizer.muon_learning_rate=6e-3",),
    "twice Muon's rate": ("optimizer.muon_learning_rate=2.4e-2",),
    "cosine to a tenth": ("scheduler.type=cosine", "scheduler.min_lr=3.2e-3"),
    "cosine to a tenth, half the rates": ("optimizer.learning_rate=1.6e-2", "optimizer.muon_learning_rate=6e-3",
                                          "scheduler.type=cosine", "scheduler.min_lr=1.6e-3"),
    "no weight decay": ("optimizer.weight_decay=0",),
    "weight decay 0.3": ("optimizer.weight_decay=0.3",),
    "steps of 2,048 tokens": ("training.batch_size=8",),
    "steps of 8,192 tokens": ("training.batch_size=32",),
    "wider: 2 layers of 256": ("model.d_model=256", "model.n_layers=2", "model.n_heads=8", "model.d_ffn=688"),
    "deeper: 8 layers of 128": ("model.d_model=128", "model.n_layers=8", "model.n_heads=4", "model.d_ffn=344"),
    "smaller: 5 layers of 96": ("model.d_model=96", "model.n_heads=3", "model.d_ffn=256"),
    "larger: 5 layers of 256": ("model.d_model=256", "model.n_heads=8", "model.d_ffn=688"),
    "vocabulary 2,000": ("model.vocab_size=2000",),
    "vocabulary 8,000": ("model.vocab_size=8000",),
    "context 128": ("model.max_seq_len=128", "training.batch_size=32"),
    "context 512": ("model.max_seq_len=512", "training.batch_size=8"),
    "dropout 0.1": ("model.dropout=0.1",),
    "half of each head rotated": ("model.rope_percentage=0.5",),
    "tied embeddings": ("model.tie_embeddings=true",),
}


# How fast

def start_training(config: Config, make_model: Callable[[], nn.Module], train_file: TokenFile,
                   ) -> tuple[Run, Callable[[int], float]]:
    """A run without a folder, and a function: takes train.py's next step of so many, waits for its loss and returns it.

    make_model: of a model whose forward(tokens, targets) is the loss.
    """
    device = choose_device(config.hardware.device)
    precision, _ = choose_precision(device, config.training.use_bf16)
    torch.manual_seed(config.training.seed)
    model = make_model().to(device)
    run = Run(config, None, model, make_optimizer(model, config), device, train_file, precision=precision)
    forward, _ = choose_compile(model, lambda compiled: accumulate_gradients(
        compiled, precision, [micro_batch(run, 0)[1]]), device, config.training.use_compile, math.inf)

    def step(total_steps: int) -> float:
        train_step(run, forward, total_steps)
        return run.pending.pop()[2].item()
    return run, step


def make_step(config: Config) -> Callable[[], float]:
    """A training step on random tokens."""
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 200_000).astype(np.uint16)
    _, step = start_training(config, lambda: Transformer(config.model), TokenFile(None, tokens, {}, ""))
    return lambda: step(10**9)


def measure_speeds(configs: dict[str, Config], path: Path, step_of: Callable[[str], Callable[[], Any]] | None = None,
                   models: Mapping[str, str] | None = None) -> dict[str, float]:
    """Tokens per second of each title, from the file at `path`, or else from the median step of all turns.

    step_of: makes a title's step (default: make_step()). models: the names of the titles' models, where they differ.
    """
    shapes = {title: (f"{models[title]}, " if models else "") + shape_of(config) for title, config in configs.items()}
    known = read_result(path) if path.exists() else {}
    missing = {shape: title for title, shape in shapes.items() if shape not in known}
    steps = {shape: step_of(title) if step_of else make_step(configs[title])
             for shape, title in tqdm(missing.items(), desc="compile", unit="variant")}
    for shape, seconds in time_in_turns(steps).items():
        config = configs[missing[shape]]
        known[shape] = config.sequences_per_step * config.model.max_seq_len / seconds
    write_result(path, known)
    return {title: known[shape] for title, shape in shapes.items()}


def time_in_turns(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each step, all of which take turns, so that a busy while of the machine meets all."""
    times = {title: [] for title in steps}
    for _ in tqdm(range(TURNS if steps else 0), desc="speed", unit="turn"):
        for title, step in steps.items():
            step()  # untimed, since the other variants have filled the processor's caches
            start = time.perf_counter()
            while not times[title] or time.perf_counter() - start < TURN_SECONDS:
                before = time.perf_counter()
                step()
                times[title].append(time.perf_counter() - before)
    return {title: statistics.median(of) for title, of in times.items()}


def shape_of(config: Config) -> str:
    """A text that is equal for configs that are equally fast."""
    m, values = config.model, config.to_dict()
    training = [values["training"][key] for key in ("batch_size", "gradient_accumulation_steps", "use_bf16",
                                                    "use_gradient_checkpointing", "use_compile")]
    rest = digest([values["model"], training, values["optimizer"]["type"], values["hardware"]])
    return f"{m.n_layers} x {m.d_model}, {m.vocab_size} tokens, {training[0]} x {m.max_seq_len}, {rest}"


# A run

def configure(config: Config, title: str, text: Any, out: Path) -> Config:
    """The config of a variant. text: plain values that differ where the stories do."""
    varied = config_from_dict(config.to_dict(), title, VARIANTS[title])
    folder = json.dumps(tokenizer_folder(out, varied, text))
    return config_from_dict(varied.to_dict(), title, [f"data.tokenizer_path={folder}"])


def plan(config: Config, steps: int, seed: int) -> Config:
    """The config of a run, whose warm-up takes a twentieth of its steps."""
    return config_from_dict(config.to_dict(), "a run", [
        f"training.max_steps={steps}", f"scheduler.warmup_steps={steps // 20}",
        f"training.seed={config.training.seed + seed}"])


def name_of(title: str, config: Config) -> str:
    """A file name that identifies the settings and the stories of a run."""
    values = config.to_dict()
    values["data"] = Path(config.data.tokenizer_path).name
    del values["training"]["output_dir"]
    return "-".join(re.findall(r"\w+", f"{title} {config.training.seed} {digest(values)}"))


def run_variant(config: Config) -> int:
    """Train, or resume, in training.output_dir. Returns the exit status."""
    latest = Path(config.training.output_dir) / LATEST
    torch.compiler.reset()
    return start_run(config, CONFIG, latest if latest.exists() else None, resume=True)


def result_of(config: Config) -> dict[str, Any]:
    """The result of a finished run, plain values."""
    entries = read_metrics(Path(config.training.output_dir) / "metrics.jsonl")
    last = next(entry for entry in reversed(entries) if entry["type"] in ("evaluation", "final"))
    return {"seed": config.training.seed, "steps": last["step"],
            "tokens": last["step"] * config.sequences_per_step * config.model.max_seq_len,
            "parameters": count_parameters(Transformer(config.model)),
            "bits_per_byte": last["bits_per_byte"], "val_loss": last["val_loss"]}


# All of them

def table(results: Sequence[dict[str, Any]]) -> str:
    """For each time, a line for each variant: the mean and spread of its seeds, and the distance to the base."""
    lines = []
    for minutes in sorted({result["minutes"] for result in results}):
        runs = {title: [r for r in results if r["minutes"] == minutes and r["variant"] == title] for title in VARIANTS}
        means = {title: statistics.fmean(r["bits_per_byte"] for r in of) for title, of in runs.items() if of}
        lines += [f"At {minutes:g} minutes of this machine:", "",
                  "| variant | parameters | tokens/s | tokens trained | runs | bits per byte | against the base |",
                  "|---|---|---|---|---|---|---|"]
        for title in sorted(means, key=means.get):
            of, first = [r["bits_per_byte"] for r in runs[title]], runs[title][0]
            spread = f" ({min(of):.4f} to {max(of):.4f})" if len(of) > 1 else ""
            against = f"{means[title] - means[BASE]:+.4f}" if BASE in means and title != BASE else ""
            lines.append(f"| {title} | {first['parameters'] / 1e6:.2f}M | {first['speed']:,.0f} | "
                         f"{first['tokens'] / 1e6:.2f}M | {len(of)} | {means[title]:.4f}{spread} | {against} |")
        lines.append("")
    return "\n".join(lines)


def experiment(config: Config, titles: Sequence[str], minutes: float, seeds: int, out: Path) -> int:
    """Measure and train what `out` does not have yet. Returns the exit status: 0, or 128 + the signal."""
    if config.training.batch_size == "auto":
        raise UserError("training.batch_size: give a number, so that all runs of a variant have the same steps")
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 8 * len(titles)  # all their models are compiled in this one process
    text = [open_stories(config.data, split).identity for split in ("train", "validation")]
    configs = {title: configure(config, title, text, out) for title in titles}
    speeds = measure_speeds(configs, out / "speeds.json")
    for seed in range(seeds):
        for title in titles:
            made, step_tokens = configs[title], configs[title].sequences_per_step * configs[title].model.max_seq_len
            made = plan(made, max(1, round(speeds[title] * minutes * 60 / step_tokens)), seed)
            folder = out / name_of(title, made)
            path = folder.with_suffix(".run.json")
            if path.exists():
                continue
            made = config_from_dict(made.to_dict(), title, [f"training.output_dir={json.dumps(str(folder))}"])
            print(f"\n== {title}, seed {made.training.seed}: {made.training.max_steps:,} steps", flush=True)
            if status := run_variant(made):
                print(f"stopped: finished runs are in {out}; the same command continues")
                return status
            result = {"variant": title, "name": name_of(title, configs[title]), "minutes": minutes,
                      "speed": speeds[title], **result_of(made)}
            write_result(path, result)
    names = {name_of(title, configure(config, title, text, out)) for title in VARIANTS}
    finished = [read_result(path) for path in sorted(out.glob("*.run.json"))]
    results = table([result for result in finished if result["name"] in names])  # not those of other settings
    with atomic_write(out / "results.md") as file:
        file.write(results.encode("utf-8"))
    print(f"\n{results}")
    return 0


def main(nothing: None = None) -> int:
    parser = Parser(description="What makes a story model better at a fixed time of training?")
    parser.add_argument("--minutes", type=float, default=60, help="of training, for each run (%(default)s)")
    args, config = parse_arguments(parser, CONFIG, VARIANTS, seeds=1)
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes:g}: more than 0")
    return experiment(config, args.variants, args.minutes, args.seeds, args.out)


if __name__ == "__main__":
    run_script(main, None)
