"""Train a story-telling Llama: stories -> tokenizer -> token files -> batches -> model -> checkpoint -> stories.

    python train.py                                                          two minutes on a CPU
    python train.py --config config/train_config_tinystories_33M_TOP10K.yaml  the real model, on a GPU

Read it from train(), near the end, where all of it comes together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, UserError, add_config_arguments, config_from_dict, load_config, run_script
from config.cli import MAIN_CONFIG, QUICKSTART
from config.hardware import choose_compile, choose_device, choose_precision, peak_flops
from config.schema import SchedulerConfig
from data.tokens import TokenFile, count_windows, prepare_tokens, read_batch, tokenizer_from_json, training_windows
from evaluate import describe_evaluation, evaluate, evaluate_checkpoint, sample_stories
from generate import tell_stories
from model import (
    Transformer,
    count_parameters,
    estimate_memory,
    flops_per_token,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from train_custom_tokenizer import ensure_tokenizer

# The recipe

def learning_rate(step: int, peak: float, total_steps: int, scheduler: SchedulerConfig) -> float:
    """The rate of step 1 .. total_steps: linear warm-up to `peak`, then the schedule, min_lr from its last step on."""
    decay_steps = scheduler.lr_decay_iters or total_steps
    if step <= scheduler.warmup_steps:
        return peak * step / scheduler.warmup_steps
    if scheduler.type == "constant":
        return peak
    progress = min(1.0, (step - scheduler.warmup_steps) / max(1, decay_steps - scheduler.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if scheduler.type == "cosine" else 1 - progress
    return scheduler.min_lr + share * (peak - scheduler.min_lr)


def make_optimizer(model: Transformer, config: Config) -> torch.optim.AdamW:
    """AdamW, fused where torch has it for the device. Weight decay acts on matrices only: a norm's gain has none."""
    opt = config.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": opt.learning_rate, "betas": (opt.adam_beta1, opt.adam_beta2), "eps": opt.adam_epsilon}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except RuntimeError:  # no fused kernel for this device
        return torch.optim.AdamW(groups, **settings)


def accumulate_gradients(loss_function: Callable[[Tensor, Tensor], Tensor], precision: Callable[[], Any],
                         batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Backward over equal micro-batches so that .grad is that of their mean loss. Returns that loss, float32, ()."""
    total = torch.zeros((), device=batches[0][0].device)
    for inputs, targets in batches:
        with precision():
            loss = loss_function(inputs, targets) / len(batches)
        loss.backward()
        total += loss.detach()
    return total


# The run and its files

@dataclass
class Run:
    """All that changes while training; state() and restore() carry it across a restart."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    device: torch.device
    num_windows: int  # of one epoch
    iter_num: int = 0  # steps done
    position: int = 0  # windows trained on, all epochs counted
    best_val_loss: float = math.inf
    evaluations_without_gain: int = 0
    pending: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # step, loss, gradient norm; not yet read

    @property
    def epoch(self) -> float:
        """Passes over the training split so far; 1.0 is one."""
        return self.position / self.num_windows

    @property
    def folder(self) -> Path:
        return Path(self.config.training.output_dir).expanduser()

    def state(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"model": self.model.state_dict(), "config": self.config.to_dict(), "tokenizer": self.tokenizer.to_str(),
                "iter_num": self.iter_num, "epoch": self.epoch, "best_val_loss": self.best_val_loss,
                "optimizer": self.optimizer.state_dict(), "position": self.position,
                "evaluations_without_gain": self.evaluations_without_gain, "rng": rng}

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Continue where the checkpoint stopped. Raises UserError if that cannot be."""
        load_weights(self.model, checkpoint, source)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.iter_num, self.position = checkpoint["iter_num"], checkpoint["position"]
            self.best_val_loss = checkpoint["best_val_loss"]
            self.evaluations_without_gain = checkpoint["evaluations_without_gain"]
            torch.set_rng_state(checkpoint["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
        except (KeyError, ValueError) as error:
            raise UserError(f"{source}: cannot be resumed from ({error}); it still works with generate.py") from None

    def save(self, name: str) -> None:
        save_checkpoint(self.folder / name, self.state())


def record(run: Run, entry: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl."""
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def open_output_folder(run: Run) -> None:
    """Make the folder ready: on a resume cut metrics.jsonl back to the checkpoint's step, else clear the way.

    The files of an earlier run go to previous/, which holds one run: starting anew by mistake loses nothing.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    metrics = run.folder / "metrics.jsonl"
    if run.iter_num:
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is half a line
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= run.iter_num]
            metrics.write_text("".join(kept), encoding="utf-8")
        return
    earlier = [*run.folder.glob("*.pth"), *([metrics] if metrics.exists() else [])]
    if earlier:
        previous = run.folder / "previous"
        previous.mkdir(exist_ok=True)
        for path in previous.iterdir():
            path.unlink()
        for path in earlier:
            path.replace(previous / path.name)
        print(f"output: {run.folder} held an earlier run: moved to {previous} (to go on with one, use --checkpoint)")


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM wait: the list holds the signal once one came. A second one leaves at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        tqdm.write("stopping after this step (once more: at once, without saving)")

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The loop

def read_pending(run: Run) -> float:
    """Mean loss of the steps since the last call. One wait for the device; raises UserError if one is not finite."""
    steps, losses, norms = zip(*run.pending, strict=True)
    values = torch.stack([torch.stack(losses), torch.stack(norms)]).tolist()  # (2, steps)
    run.pending.clear()
    for step, loss, norm in zip(steps, *values, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            latest = run.folder / "checkpoint_latest.pth"
            saved = f"{latest} holds the last good step saved" if latest.exists() else "nothing was saved yet"
            raise UserError(f"step {step:,}: loss {loss:g}, gradient norm {norm:g}: not finite, so training stopped; "
                            f"{saved}. Try a lower optimizer.learning_rate or a longer scheduler.warmup_steps")
    return statistics.fmean(values[0])


def train_step(run: Run, forward: Callable, precision: Callable[[], Any], tokens: np.ndarray, total_steps: int) -> None:
    """One optimizer step on the next batch_size * gradient_accumulation_steps windows."""
    config, training = run.config, run.config.training
    rate = learning_rate(run.iter_num + 1, config.optimizer.learning_rate, total_steps, config.scheduler)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batches = []
    for _ in range(training.gradient_accumulation_steps):
        windows = training_windows(run.position, training.batch_size, run.num_windows, training.seed)
        batches.append(read_batch(tokens, windows, config.model.max_seq_len, run.device))
        run.position += training.batch_size
    loss = accumulate_gradients(forward, precision, batches)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.iter_num += 1
    run.pending.append((run.iter_num, loss, norm))


def look(run: Run, validation: TokenFile, precision: Callable[[], Any]) -> None:
    """Evaluate, tell the sample stories, print and record both, and keep the best model."""
    result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, precision,
                      run.config.training.eval_samples)
    if not math.isfinite(result["val_loss"]):
        raise UserError(f"step {run.iter_num:,}: the validation loss is not finite; the last checkpoint is untouched")
    stories = sample_stories(run.model, run.tokenizer, run.config)
    tqdm.write(f"step {run.iter_num:,}, epoch {run.epoch:.2f}: {describe_evaluation(result)}")
    for story in stories:
        tqdm.write("  | " + story.replace("\n", "\n  | "))
    record(run, {"type": "evaluation", "step": run.iter_num, "epoch": run.epoch, **result, "samples": stories})
    run.evaluations_without_gain += 1
    if result["val_loss"] < run.best_val_loss:
        run.best_val_loss, run.evaluations_without_gain = result["val_loss"], 0
        run.save("best_model.pth")


def log_steps(run: Run, bar: tqdm, seconds: float, peak: float | None) -> None:
    """Show and record the steps since the last call, which took so many seconds. The one wait for the device."""
    training = run.config.training
    windows = len(run.pending) * training.batch_size * training.gradient_accumulation_steps
    norm = run.pending[-1][2]
    loss = read_pending(run)
    speed = windows * run.config.model.max_seq_len / seconds
    entry = {"type": "step", "step": run.iter_num, "epoch": run.epoch, "loss": loss, "gradient_norm": norm.item(),
             "learning_rate": run.optimizer.param_groups[0]["lr"], "tokens_per_second": speed}
    shown = {"loss": f"{loss:.3f}", "lr": f"{entry['learning_rate']:.1e}", "tok/s": f"{speed:,.0f}"}
    if peak:
        entry["peak_share"] = speed * flops_per_token(run.model) / peak
        shown["peak"] = f"{entry['peak_share']:.0%}"
    record(run, entry)
    bar.set_postfix(shown)
    if bar.disable:
        print(f"step {run.iter_num:,} of {bar.total:,}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


def train(run: Run, train_file: TokenFile, validation: TokenFile, total_steps: int) -> int:
    """Train to total_steps, or until Ctrl-C or early stopping. Returns the exit status: 0, or 128 + the signal."""
    training, peak = run.config.training, peak_flops(run.device)
    precision, forward = prepare_device(run, total_steps)
    bar = tqdm(total=total_steps, initial=run.iter_num, unit="step", desc="train", dynamic_ncols=True, smoothing=0.05,
               disable=not (training.show_progress and sys.stderr.isatty()))
    clock = time.perf_counter()
    with bar, deferred_interrupts() as signals:
        while run.iter_num < total_steps and not signals:
            epochs_before = int(run.epoch)
            train_step(run, forward, precision, train_file.tokens, total_steps)
            bar.update()
            finished, new_epoch = run.iter_num == total_steps, int(run.epoch) > epochs_before
            evaluate_now = finished or (run.iter_num % training.eval_steps == 0 and not signals)
            save_now = evaluate_now or new_epoch or run.iter_num % training.save_steps == 0
            if save_now or run.iter_num % training.logging_steps == 0:
                log_steps(run, bar, time.perf_counter() - clock, peak)
                clock = time.perf_counter()
            if save_now:  # before the evaluation, which takes a while and may fail
                run.save("checkpoint_latest.pth")
            if new_epoch:
                run.save(f"checkpoint_epoch_{int(run.epoch)}.pth")
            if evaluate_now:
                look(run, validation, precision)
                run.save("checkpoint_latest.pth")
                if 0 < (training.early_stopping_patience or 0) <= run.evaluations_without_gain and not finished:
                    tqdm.write(f"stopped early: {run.evaluations_without_gain} evaluations without a better loss")
                    break
            if save_now:  # the time of saving and evaluating is not training's
                clock = time.perf_counter()
    if signals and run.iter_num < total_steps:
        if run.pending:
            log_steps(run, bar, time.perf_counter() - clock, peak)
        run.save("checkpoint_latest.pth")
        print(f"stopped at step {run.iter_num:,} of {total_steps:,} and saved. To go on:\n"
              f"  python train.py --checkpoint {run.folder / 'checkpoint_latest.pth'}")
        return 128 + signals[0]
    if training.eval_samples:  # until here only a part of the validation split was looked at
        result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, precision)
        print(f"all of the validation split: {describe_evaluation(result)}")
        record(run, {"type": "final", "step": run.iter_num, "epoch": run.epoch, **result})
    return 0


def prepare_device(run: Run, total_steps: int) -> tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor]]:
    """Choose precision and compilation, and print the plan. Returns the precision's context factory and the forward."""
    training, m = run.config.training, run.config.model
    precision, precision_note = choose_precision(run.device, training.use_bf16)
    windows = training.batch_size * training.gradient_accumulation_steps
    flops, remaining = flops_per_token(run.model), total_steps - run.iter_num
    memory = estimate_memory(run.model, training.batch_size, precision is not contextlib.nullcontext)
    print(f"plan: {count_parameters(run.model):,} parameters, {flops / 1e6:.1f} MFLOP per training token, "
          f"about {memory / 2**30:.1f} GiB of memory")
    print(f"plan: {windows * m.max_seq_len:,} tokens a step ({training.batch_size} windows of {m.max_seq_len} x "
          f"{training.gradient_accumulation_steps}), {run.num_windows / windows:,.1f} steps an epoch, {total_steps:,} "
          f"steps in all ({total_steps * windows / run.num_windows:.2f} epochs)")
    for note in schedule_notes(run.config, total_steps):
        print(f"note: {note}")
    before = run.optimizer.param_groups[0]["lr"]
    after = learning_rate(run.iter_num + 1, run.config.optimizer.learning_rate, total_steps, run.config.scheduler)
    if run.iter_num and after > 1.1 * before:
        print(f"note: the schedule now spans {total_steps:,} steps, so the learning rate goes up from {before:.1e} to "
              f"{after:.1e}: the loss rises at first")
    shape = (training.batch_size, m.max_seq_len)
    # two tensors: torch.compile would make a special case of targets that are the inputs, and compile again afterwards
    example = tuple(torch.zeros(shape, dtype=torch.int64, device=run.device) for _ in range(2))
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):  # the trial draws dropout
        forward, compile_note = choose_compile(
            run.model, lambda compiled: accumulate_gradients(compiled, precision, [example]), run.device,
            training.use_compile, remaining * windows * m.max_seq_len * flops)
    print(f"plan: {run.device.type}, {precision_note}, {compile_note}")
    return precision, forward


def schedule_notes(config: Config, total_steps: int) -> list[str]:
    """What of the schedule does not fit the real number of steps, said out loud."""
    scheduler, notes = config.scheduler, []
    if scheduler.warmup_steps >= total_steps:
        notes.append(f"scheduler.warmup_steps is {scheduler.warmup_steps:,}, but this run has {total_steps:,} steps: "
                     "the learning rate only rises")
    if scheduler.lr_decay_iters and scheduler.lr_decay_iters != total_steps and scheduler.type != "constant":
        end = learning_rate(total_steps, config.optimizer.learning_rate, total_steps, scheduler)
        notes.append(f"scheduler.lr_decay_iters is {scheduler.lr_decay_iters:,}, but this run has {total_steps:,} steps"
                     f" and ends at a rate of {end:.1e} (min_lr is {scheduler.min_lr:.1e}); null fits it to the run")
    return notes


def start_run(config: Config, config_path: Path | None, checkpoint_path: Path | None) -> int:
    """From a config to a trained model: tokenizer, token files, model, training, and a story at the end."""
    device = choose_device(config.hardware.device)
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
    if checkpoint:  # it brings its own tokenizer, whatever became of the folder
        check_same_model(config, checkpoint, checkpoint_path)
        tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(checkpoint_path))
    else:
        tokenizer = ensure_tokenizer(config)
    files = [prepare_tokens(config.data, tokenizer, split, config.training.show_progress)
             for split in ("train", "validation")]
    num_windows = count_windows(len(files[0].tokens), config.model.max_seq_len)
    if not num_windows:
        raise UserError(f"{config.data.dataset}: {len(files[0].tokens):,} training tokens are less than one window of "
                        f"{config.model.max_seq_len}: add stories, or lower model.max_seq_len")
    torch.manual_seed(config.training.seed)
    torch.set_float32_matmul_precision("high")  # what stays float32 may use tf32 on a GPU
    model = Transformer(config.model, config.training.use_gradient_checkpointing).to(device)
    run = Run(config, tokenizer, model, make_optimizer(model, config), device, num_windows)
    if checkpoint:
        run.restore(checkpoint, checkpoint_path)
        print(f"resumed: {checkpoint_path}, step {run.iter_num:,}, epoch {run.epoch:.2f}")
    windows = config.training.batch_size * config.training.gradient_accumulation_steps
    remaining = config.training.num_epochs * num_windows - run.position
    total_steps = config.training.max_steps or run.iter_num + max(0, math.ceil(remaining / windows))
    if run.iter_num >= total_steps:
        longer = "--set training.max_steps" if config.training.max_steps else "--num_epochs"
        raise UserError(f"{checkpoint_path}: has done its {run.iter_num:,} steps already: raise {longer} to go on, or "
                        "tell stories with generate.py")
    open_output_folder(run)
    start = time.perf_counter()
    status = train(run, *files, total_steps)
    if status == 0:
        say_goodbye(run, time.perf_counter() - start, config_path)
    return status


def check_same_model(config: Config, checkpoint: dict[str, Any], source: Path) -> None:
    """Raise UserError, before any work is done, if the checkpoint's model is not the config's."""
    theirs = config_from_dict(checkpoint["config"], str(source)).model
    for key, value in config.to_dict()["model"].items():
        free = key in ("dropout", "max_seq_len", "use_flash_attention")  # no weight depends on these
        if not free and getattr(theirs, key) != value:
            raise UserError(f"{source}: model.{key} is {getattr(theirs, key)} there, but {value} in the config: "
                            "without --config, the checkpoint's own is used")


def say_goodbye(run: Run, seconds: float, config_path: Path | None) -> None:
    """The result, a whole story, and what to try next."""
    sampling, seeds = run.config.sampling, range(run.config.sampling.seed, run.config.sampling.seed + 4)
    stories = sorted(tell_stories(run.model.eval(), run.tokenizer, [sampling.prompts[0]] * 4, sampling, seeds))
    story = next((story for story in stories if story.ended), stories[0])
    best = run.folder / "best_model.pth"
    print(f"\ndone: {run.iter_num:,} steps in {seconds / 60:.1f} minutes, best validation loss {run.best_val_loss:.4f}"
          f"\n\n{story.text}\n\nnext:\n  python generate.py --checkpoint {best} --num_samples 3")
    if not run.config.training.max_steps:
        print(f"  python train.py --checkpoint {run.folder / 'checkpoint_latest.pth'} "
              f"--num_epochs {run.config.training.num_epochs + 1}")
    if config_path in (None, QUICKSTART):
        print(f"  python train.py --config {MAIN_CONFIG.relative_to(MAIN_CONFIG.parent.parent).as_posix()}   "
              "(the real model: wants a GPU)")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a story-telling Llama.")
    add_config_arguments(parser, QUICKSTART)
    parser.add_argument("--num_epochs", type=int, help="instead of training.num_epochs")
    parser.add_argument("--checkpoint", type=Path, help="go on from this file; without --config, with its own config")
    parser.add_argument("--eval_only", action="store_true", help="only evaluate --checkpoint (default: the best)")
    args = parser.parse_args()
    overrides = args.overrides + ([f"training.num_epochs={args.num_epochs}"] if args.num_epochs is not None else [])
    if args.checkpoint and not args.config:
        config = config_from_dict(load_checkpoint(args.checkpoint)["config"], str(args.checkpoint), overrides)
    else:
        config = load_config(args.config or QUICKSTART, overrides)
    if args.eval_only:
        evaluate_checkpoint(config, args.checkpoint or Path(config.training.output_dir) / "best_model.pth")
        return 0
    return start_run(config, args.config, args.checkpoint)


if __name__ == "__main__":
    run_script(main)
