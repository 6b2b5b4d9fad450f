"""This project beside the models and the recipes of llama2.c and nanoGPT, at equal times of training on this machine.

    python docs/experiments/beside_peers.py --peers FOLDER --dataset train.txt --validation valid.txt --minutes 5 15

FOLDER has llama2.c/model.py and nanoGPT/model.py, which run from there. "ours" is --config. The others have its text,
tokenizer, shape, tokens per step, order of the sequences, bf16, torch.compile and loop; and the AdamW, clipping and
schedule of their own train.py, at its learning rate and at two, four and eight times that. The warm-up of all is a
twentieth of the steps. Starting, compiling and evaluating do not count: first the speed of each is measured, in turns,
and its product with the minutes is the number of tokens that each trains on.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import digest, parse_arguments, read_result, tokenizer_folder, write_result  # finds the project, too
from fixed_hour import shape_of, time_in_turns
from torch import nn
from tqdm import tqdm

from config import Config, UserError, config_from_dict, run_script
from config.command_line import Parser
from data.batches import count_sequences, read_batch, training_sequences
from data.stories import open_stories
from data.token_files import TokenFile, prepare_tokens
from data.tokenizer import ensure_tokenizer
from device import choose_compile, choose_device, choose_precision, keep_freed_memory
from evaluation.validation import evaluate
from model import Transformer, count_parameters
from tests.benchmarks.training import peers
from train import accumulate_gradients
from training.optimizer import make_optimizer
from training.schedule import learning_rate

CONFIG = Path(__file__).resolve().parents[2] / "config" / "tinystories_cpu.yaml"
OURS = "ours"
RECIPES = {"llama2.c": (5e-4, 0.0), "nanoGPT": (6e-4, 0.1)}  # the rate of its train.py, and the share of it at the end
FACTORS = (1, 2, 4, 8)
TITLES = {OURS: (OURS, 1)} | {f"{name}, rate {factor * rate:g}": (name, factor)
                              for name, (rate, _) in RECIPES.items() for factor in FACTORS}


def configure(config: Config, title: str, seed: int) -> Config:
    """The config of a run: ours, or with the optimizer and the schedule of a peer."""
    name, factor = TITLES[title]
    overrides = [f"training.seed={config.training.seed + seed}"]
    if name != OURS:
        rate, end = RECIPES[name]
        overrides += ["optimizer.type=adamw", f"optimizer.learning_rate={factor * rate}", "scheduler.type=cosine",
                      "optimizer.muon_learning_rate=null", f"scheduler.min_lr={factor * rate * end}",
                      "optimizer.adam_beta1=0.9", f"optimizer.adam_beta2={0.95}", "optimizer.weight_decay=0.1",
                      "optimizer.max_grad_norm=1.0", "model.mask_stories=false"]
    return config_from_dict(config.to_dict(), title, overrides)


class Training:
    """A model in training on the sequences of `train_file`."""

    def __init__(self, config: Config, make_model: Callable[[], nn.Module], train_file: TokenFile) -> None:
        self.config, self.train_file, self.steps = config, train_file, 0
        self.device = choose_device(config.hardware.device)
        self.precision, _ = choose_precision(self.device, config.training.use_bf16)
        torch.manual_seed(config.training.seed)
        self.model = make_model().to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.forward, _ = choose_compile(self.model, lambda compiled: accumulate_gradients(
            compiled, self.precision, [self.batch(0)]), self.device, config.training.use_compile, math.inf)

    def batch(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequences at position `start` of all epochs in a row: inputs and targets, (batch, seq_len)."""
        seq_len, tokens = self.config.model.max_seq_len, self.train_file.tokens
        sequences = training_sequences(start, self.config.training.batch_size, count_sequences(len(tokens), seq_len),
                                       self.config.training.seed)
        return read_batch(tokens, sequences, seq_len, self.device)

    def step(self, rate: float = 0.0) -> float:
        """One optimizer step at this rate, as train.py's. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        first, per_step = self.steps * self.config.sequences_per_step, self.config.training.batch_size
        loss = accumulate_gradients(self.forward, self.precision, [
            self.batch(start) for start in range(first, first + self.config.sequences_per_step, per_step)])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        with self.precision():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.item()


def train(training: Training, steps: int, title: str) -> None:
    """All steps of a run, with the config's schedule."""
    config = config_from_dict(training.config.to_dict(), title, [f"scheduler.warmup_steps={steps // 20}"])
    bar = tqdm(range(1, steps + 1), desc=title, unit="step")
    for step in bar:
        loss = training.step(learning_rate(step, config.optimizer.learning_rate, steps, config.scheduler))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def table(results: Sequence[dict[str, Any]]) -> str:
    """For each time, a line for each title: the mean of its seeds, and the lowest and the highest."""
    lines = []
    for minutes in sorted({result["minutes"] for result in results}):
        lines += [f"At {minutes:g} minutes of this machine:", "",
                  "| | parameters | tokens/s | tokens trained | runs | nats per token | bits per byte |",
                  "|---|---|---|---|---|---|---|"]
        for title in TITLES:
            if of := [result for result in results if (result["minutes"], result["title"]) == (minutes, title)]:
                bits, nats = ([result[key] for result in of] for key in ("bits_per_byte", "val_loss"))
                spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(of) > 1 else ""
                lines.append(f"| {title} | {of[0]['parameters'] / 1e6:.2f}M | {of[0]['speed']:,.0f} | "
                             f"{of[0]['tokens'] / 1e6:.2f}M | {len(of)} | {sum(nats) / len(of):.4f} | "
                             f"{sum(bits) / len(of):.4f}{spread} |")
        lines.append("")
    return "\n".join(lines)


def measure_speeds(make: Callable[[str], Training], config: Config, path: Path) -> dict[str, float]:
    """Tokens per second of each title: from the file at `path`, or of the median step of all turns."""
    shapes = {title: f"{TITLES[title][0]}, {shape_of(configure(config, title, 0))}" for title in TITLES}
    known = read_result(path) if path.exists() else {}
    missing = {shape: make(title) for title, shape in reversed(shapes.items()) if shape not in known}
    step_tokens = config.sequences_per_step * config.model.max_seq_len
    for shape, seconds in time_in_turns({shape: training.step for shape, training in missing.items()}).items():
        known[shape] = step_tokens / seconds
    write_result(path, known)
    return {title: known[shape] for title, shape in shapes.items()}


def main(nothing: None = None) -> int:
    parser = Parser(description="This project beside llama2.c and nanoGPT, at equal times of training.")
    parser.add_argument("--peers", type=Path, required=True, help="has llama2.c/model.py and nanoGPT/model.py")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0, 45.0], help="of training (5 15 45)")
    args, config = parse_arguments(parser, CONFIG, TITLES, seeds=3)
    if not all(0 < minutes < math.inf for minutes in args.minutes):
        raise UserError("--minutes: more than 0")
    if config.training.batch_size == "auto" or config.model.dropout:
        raise UserError("training.batch_size must be a number and model.dropout 0, since the peers have the same")
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 64  # all models are compiled in this one process
    out, text = args.out, [open_stories(config.data, split).identity for split in ("train", "validation")]
    config = config_from_dict(config.to_dict(), "tokenizer", [
        f'data.tokenizer_path="{Path(tokenizer_folder(out, config, text)).as_posix()}"'])
    tokenizer = ensure_tokenizer(config)
    train_file, validation = (prepare_tokens(config.data, tokenizer, split) for split in ("train", "validation"))
    makers = {OURS: lambda: Transformer(config.model), **peers(args.peers, config)}
    if absent := sorted({TITLES[title][0] for title in args.variants} - set(makers)):
        raise UserError(f"--peers {args.peers}: has no {absent[0]}/model.py")

    def make(title: str, seed: int = 0) -> Training:
        return Training(configure(config, title, seed), makers[TITLES[title][0]], train_file)

    identities = {title: digest([configure(config, title, 0).to_dict(), text]) for title in TITLES}
    speeds = measure_speeds(make, config, out / "speeds.json")
    for minutes in sorted(args.minutes):
        for seed in range(args.seeds):
            for title in args.variants:
                path = out / f"{title.replace(', rate ', '-')}-{identities[title]}-{minutes:g}-{seed}.run.json"
                if path.exists():
                    continue
                torch.compiler.reset()
                training = make(title, seed)
                step_tokens = training.config.sequences_per_step * training.config.model.max_seq_len
                steps = max(1, round(speeds[title] * minutes * 60 / step_tokens))
                train(training, steps, f"{title}, {minutes:g} minutes, seed {training.config.training.seed}")
                result = evaluate(training.model, validation, tokenizer, training.config, training.device,
                                  training.precision)
                write_result(path, {"title": title, "minutes": minutes, "seed": training.config.training.seed,
                                    "speed": speeds[title], "tokens": steps * step_tokens,
                                    "parameters": count_parameters(training.model), **result})
    found = [read_result(path) for title in TITLES for path in sorted(out.glob(f"*-{identities[title]}-*.run.json"))]
    print(f"\n{table(found)}")
    return 0


if __name__ == "__main__":
    run_script(main, None)
