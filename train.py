"""Train a story-telling Llama: stories -> tokenizer -> token files -> batches -> model -> checkpoint -> stories.

    python train.py                                                          a few minutes on a CPU
    python train.py --config config/train_config_tinystories_33M_TOP10K.yaml  the real model, on a GPU

Read it from train(), near the end, where all of it comes together.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import Config, UserError, add_config_arguments, check_overrides, config_from_dict, load_config, run_script
from config.cli import MAIN_CONFIG, QUICKSTART, Parser, Unfailing, check_first, deferred_interrupts, positive


def parse_arguments() -> tuple[argparse.Namespace, Config | None]:
    """The command line and its config; None if that is the checkpoint's own, which takes torch to read."""
    parser = Parser(description="Train a story-telling Llama.")
    add_config_arguments(parser, QUICKSTART)
    parser.add_argument("--num_epochs", type=positive, help="instead of training.num_epochs")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, help="go on from this file; without --config, with its own config")
    source.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in training.output_"
                        "dir; where there is none yet, begin: the same command starts a run and continues it")
    parser.add_argument("--eval_only", action="store_true", help="only evaluate --checkpoint (default: the best)")
    args = parser.parse_args()
    if args.num_epochs:  # and so not the max_steps of the YAML
        args.overrides = ["training.max_steps=null", *args.overrides, f"training.num_epochs={args.num_epochs}"]
    if args.checkpoint and not args.config:
        return args, check_overrides(args.overrides)
    return args, load_config(args.config or QUICKSTART, args.overrides)


if __name__ == "__main__":
    check_first(parse_arguments)  # a mistake is told at once, before seconds of importing what follows

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from config import hardware
from config.optimizer import describe_optimizer, load_optimizer, make_optimizer
from config.ranks import ALONE, Ranks, join_ranks
from config.schedule import learning_rate, schedule_notes
from config.values import counted
from data.checkpoints import BEST, CARRIED, LATEST, check_resumable, load_checkpoint
from data.run_folder import RunFolder, hold_folder
from data.tokens import TokenFile, count_windows, dropout_seed, prepare_tokens, read_batch, training_windows
from evaluate import describe_evaluation, evaluate, evaluate_checkpoint, sample_stories
from generate import encode_prompts, tell_stories
from model import Transformer, count_parameters, find_non_finite, flops_per_token, load_weights
from train_custom_tokenizer import ensure_tokenizer


def accumulate_gradients(forward: Callable[[Tensor, Tensor], Tensor], precision: Callable[[], Any],
                         batches: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int] = ()) -> Tensor:
    """Backward over equal micro-batches so that .grad is that of their mean loss. Returns that loss, float32, ().

    seeds: one for each micro-batch, for its dropout. A DistributedDataParallel forward averages over the ranks, once.
    """
    total = torch.zeros((), device=batches[0][0].device)
    for index, (inputs, targets) in enumerate(batches):
        if seeds:
            torch.manual_seed(seeds[index])
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync():
            with precision():
                loss = forward(inputs, targets) / len(batches)
            loss.backward()
        total += loss.detach()
    return total


# The run

@dataclass
class Run:
    """All that changes while training; state() and restore() carry it across a restart."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    device: torch.device
    train_file: TokenFile
    folder: RunFolder | None = None
    ranks: Ranks = ALONE
    precision: Callable[[], Any] = contextlib.nullcontext
    iter_num: int = 0  # steps done
    position: int = 0  # windows trained on, all epochs counted
    best_val_loss: float = math.inf
    evaluations_without_gain: int = 0
    evaluated: int = 0  # the step of the last evaluation
    completed: int = 0  # the step at which the whole run was done
    unread: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)  # step, position, loss, gradient norm
    unlogged: list[tuple[int, float, float]] = field(default_factory=list)  # step, loss, gradient norm
    norms: list[float] = field(default_factory=list)  # the last gradient norms
    broken: Tensor | None = None  # float32, (): 1 once a gradient was not finite; from then on no step changes a weight
    best_before: float = math.inf  # best_val_loss, should BEST not be written
    clock: tuple[int, float] = (0, 0.0)  # a step and the time when it was done; since then only training took time

    @property
    def num_windows(self) -> int:
        """Of one epoch."""
        return count_windows(len(self.train_file.tokens), self.config.model.max_seq_len)

    @property
    def epoch(self) -> float:
        """Passes over the training split so far; 1.0 is one."""
        return self.position / self.num_windows

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "config": self.config.to_dict(), "tokenizer": self.tokenizer.to_str(),
                "epoch": self.epoch, "optimizer": self.optimizer.state_dict(), "train_digest": self.train_file.digest,
                "metrics_size": self.folder.metrics_size, **{name: getattr(self, name) for name in CARRIED}}

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Continue where the checkpoint stopped. Raises UserError if that cannot be."""
        load_weights(self.model, checkpoint, source)
        load_optimizer(self.optimizer, checkpoint["optimizer"], source)
        for name in CARRIED:
            setattr(self, name, checkpoint[name])

    def save(self, name: str) -> None:
        """Have a checkpoint file written while the run goes on. All ranks call it, the first one writes."""
        read_losses(self)  # what is saved is known to be sound
        self.finish_save()
        self.folder.save(name, self.state)
        self.clock = self.iter_num, time.perf_counter()

    def finish_save(self) -> bool:
        """Wait for the save under way. False, on all ranks, if it failed: the run then goes on from what is on disk."""
        worked = bool(self.ranks.of_first(self.folder.saved()))
        if not worked and self.folder.saving == BEST:
            self.best_val_loss = self.best_before
        self.folder.keep_newest(self.config.training.keep_checkpoints)
        return worked


# The loop

def train_step(run: Run, forward: Callable, total_steps: int) -> None:
    """One optimizer step on the next batch_size * gradient_accumulation_steps windows, shared out among the ranks."""
    config, training, ranks = run.config, run.config.training, run.ranks
    rate = learning_rate(run.iter_num + 1, config.optimizer.learning_rate, total_steps, config.scheduler)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    starts = range(run.position, run.position + run.config.step_windows, training.batch_size)[ranks.rank::ranks.count]
    loss = accumulate_gradients(forward, run.precision, [micro_batch(run, start)[1] for start in starts],
                                [dropout_seed(training.seed, start) for start in starts])
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    # the fused optimizer looks at found_inf on the device and leaves all as it is, without any wait for the device
    bad = (~norm.isfinite()).float()
    run.broken = bad if run.broken is None else torch.maximum(run.broken, bad)
    run.optimizer.found_inf = run.broken
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.iter_num += 1
    run.unread.append((run.iter_num, run.position, loss, norm))
    run.position += run.config.step_windows


def micro_batch(run: Run, start: int) -> tuple[np.ndarray, tuple[Tensor, Tensor]]:
    """The batch_size windows from position `start` on: their indices, and their inputs and targets on the device."""
    windows = training_windows(start, run.config.training.batch_size, run.num_windows, run.config.training.seed)
    return windows, read_batch(run.train_file.tokens, windows, run.config.model.max_seq_len, run.device)


def read_losses(run: Run) -> None:
    """Move run.unread to run.unlogged: the one wait for the device. Raises UserError if one is not finite."""
    if not run.unread:
        return
    steps, positions, losses, norms = zip(*run.unread, strict=True)
    run.unread.clear()
    mean = run.ranks.sum(torch.stack(losses)) / run.ranks.count  # (steps,)
    values = torch.stack([mean, torch.stack(norms)]).tolist()  # (2, steps)
    for step, position, loss, norm in zip(steps, positions, *values, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            run.folder.saved()  # waits: what is being written counts
            kept = f"{LATEST} is from an earlier step" if (run.folder.path / LATEST).exists() else "nothing was saved"
            raise UserError(f"step {step:,}: loss {loss:g}, gradient norm {norm:g}: not finite, so training stopped; "
                            f"{find_fault(run, position)}; {kept}. Try a lower optimizer.learning_rate, a longer "
                            "scheduler.warmup_steps or a lower optimizer.max_grad_norm")
        run.unlogged.append((step, loss, norm))


def find_fault(run: Run, position: int) -> str:
    """Repeat the step that began at `position`: its weights are still there, since no bad gradient changes them.

    Prints the story text that went wrong and returns, as words, the first layer whose output or gradient did.
    """
    training = run.config.training
    with find_non_finite(run.model) as faults:
        for start in range(position, position + run.config.step_windows, training.batch_size):
            windows, (inputs, targets) = micro_batch(run, start)
            torch.manual_seed(dropout_seed(training.seed, start))
            with run.precision():
                losses = run.model(inputs, targets, reduction="none")  # (batch, seq_len)
            (losses.mean() / training.gradient_accumulation_steps).backward()
            if faults:
                worst = int(losses.sum(dim=1).nan_to_num(nan=math.inf).argmax())
                text = run.tokenizer.decode(inputs[worst].tolist(), skip_special_tokens=False)
                tqdm.write(f"window {windows[worst]} of the training tokens, the worst of its batch:\n  | "
                           + text.replace("\n", "\n  | "))
                return f"first wrong was {faults[0]}"
    return "the same step went well when it was repeated"


def look(run: Run, validation: TokenFile) -> None:
    """Evaluate, tell the sample stories, print and record both, and keep the best model."""
    result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, run.precision,
                      run.config.training.eval_samples, run.ranks)
    stories = sample_stories(run.model, run.tokenizer, run.config) if run.ranks.first else []
    if not math.isfinite(result["val_loss"]):
        raise UserError(f"step {run.iter_num:,}: the validation loss is not finite; {BEST} is untouched")
    tqdm.write(f"step {run.iter_num:,}, epoch {run.epoch:.2f}: {describe_evaluation(result)}")
    for story in stories:
        tqdm.write("  | " + story.replace("\n", "\n  | "))
    run.folder.record({"type": "evaluation", "step": run.iter_num, "epoch": run.epoch, **result, "samples": stories})
    run.evaluated = run.iter_num
    run.evaluations_without_gain += 1
    if result["val_loss"] < run.best_val_loss:
        run.best_before, run.best_val_loss, run.evaluations_without_gain = run.best_val_loss, result["val_loss"], 0
        run.save(BEST)
    run.folder.draw()
    run.clock = run.iter_num, time.perf_counter()


def log_steps(run: Run, bar: tqdm) -> None:
    """Show and record what the steps since the last call did."""
    read_losses(run)
    steps, seconds = run.iter_num - run.clock[0], time.perf_counter() - run.clock[1]
    for step, _, norm in run.unlogged:
        median = statistics.median(run.norms) if len(run.norms) >= 20 else math.inf
        if run.config.training.loss_spike and norm > run.config.training.loss_spike * median:
            tqdm.write(f"note: step {step:,}: gradient norm {norm:.2f}, the median of the last ones is {median:.2f}")
            run.folder.record({"type": "spike", "step": step, "gradient_norm": norm, "median": median})
        run.norms = [*run.norms[-99:], norm]
    loss = statistics.fmean(loss for _, loss, _ in run.unlogged)
    speed = steps * run.config.step_windows * run.config.model.max_seq_len / seconds
    entry = {"type": "step", "step": run.iter_num, "epoch": run.epoch, "loss": loss, "gradient_norm": run.norms[-1],
             "learning_rate": run.optimizer.param_groups[0]["lr"], "tokens_per_second": speed}
    run.unlogged.clear()
    shown = {"loss": f"{loss:.3f}", "lr": f"{entry['learning_rate']:.1e}", "tok/s": f"{speed:,.0f}"}
    if peak := hardware.peak_flops(run.device):
        entry["peak_share"] = speed * flops_per_token(run.model) / peak / run.ranks.count
        shown["peak"] = f"{entry['peak_share']:.0%}"
    run.folder.record(entry)
    run.clock = run.iter_num, time.perf_counter()
    bar.set_postfix(shown)
    if bar.disable:
        print(f"step {run.iter_num:,} of {bar.total:,}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


def is_due(run: Run, total_steps: int) -> bool:
    """Is this step to be evaluated, and has not been?"""
    at_end = run.iter_num == total_steps
    return run.iter_num > run.evaluated and (at_end or run.iter_num % run.config.training.eval_steps == 0)


def is_over(run: Run, total_steps: int) -> bool:
    """All steps are done, or early stopping ended the run."""
    patience = run.config.training.early_stopping_patience
    return run.iter_num >= total_steps or (patience is not None and run.evaluations_without_gain >= patience)


def train(run: Run, validation: TokenFile, total_steps: int) -> int:
    """Train to total_steps, or until Ctrl-C or early stopping. Returns the exit status: 0, or 128 + the signal."""
    training = run.config.training
    forward = prepare_device(run, total_steps)
    bar = tqdm(total=total_steps, initial=run.iter_num, unit="step", desc="train", dynamic_ncols=True, smoothing=0.05,
               disable=not (training.show_progress and sys.stderr.isatty()))
    run.clock = run.iter_num, time.perf_counter()
    with bar, deferred_interrupts() as signals:
        while not (stopping := run.ranks.any(bool(signals))):
            if is_due(run, total_steps):
                look(run, validation)
                continue  # a signal may have come meanwhile
            if is_over(run, total_steps):
                break
            epochs_done = int(run.epoch)
            train_step(run, forward, total_steps)
            bar.update()
            if run.iter_num % training.logging_steps == 0 or run.iter_num == total_steps:
                log_steps(run, bar)
            if int(run.epoch) > epochs_done and training.keep_checkpoints:
                run.save(f"checkpoint_epoch_{int(run.epoch)}.pth")
            if run.iter_num % training.save_steps == 0 or is_due(run, total_steps):  # before an evaluation, which may
                run.save(LATEST)  # fail; not after it, since whoever goes on from here only has to do it again
        if not stopping and training.eval_samples:  # until here only a part of the validation split was looked at
            result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, run.precision, 0, run.ranks)
            print(f"all of the validation split: {describe_evaluation(result)}")
            run.folder.record({"type": "final", "step": run.iter_num, "epoch": run.epoch, **result})
        run.completed = 0 if stopping else run.iter_num
        run.save(LATEST)
        saved = run.finish_save()
    if not saved:
        raise UserError(f"{training.output_dir}: the last save failed, see above: there is no {LATEST} or an older one")
    if stopping:
        print(f"stopped at step {run.iter_num:,} of {total_steps:,} and saved. To go on:\n"
              f"  python train.py --checkpoint {shlex.quote(str(run.folder.path / LATEST))}")
        return 128 + (signals or [signal.SIGTERM])[0]
    if run.iter_num < total_steps:
        print(f"stopped early: {counted(run.evaluations_without_gain, 'evaluation')} without a better loss")
    return 0


def prepare_device(run: Run, total_steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Choose precision, batch size and compilation, and print the plan. Returns the forward to train with."""
    hardware.keep_freed_memory()
    run.precision, precision_note = hardware.choose_precision(run.device, run.config.training.use_bf16, run.ranks)
    bf16, found = run.precision is not contextlib.nullcontext, run.config.training.batch_size == "auto"
    run.config = hardware.choose_batch_size(run.config, run.model, run.device, run.ranks, bf16,
                                            lambda size: try_batch(run, run.model, size))
    training, m, windows = run.config.training, run.config.model, run.config.step_windows
    flops, remaining = flops_per_token(run.model), total_steps - run.iter_num
    plan = [f"{count_parameters(run.model):,} parameters, {flops / 1e6:.1f} MFLOP per training token, about "
            f"{hardware.estimate_memory(run.model, training.batch_size, bf16) / 2**30:.1f} GiB of memory",
            f"{windows * m.max_seq_len:,} tokens a step ({counted(training.batch_size, 'window')} of {m.max_seq_len}"
            f"{', found by auto,' if found else ''} x {training.gradient_accumulation_steps}), "
            f"{run.num_windows / windows:,.1f} steps an epoch, {counted(total_steps, 'step')} in all "
            f"({total_steps * windows / run.num_windows:.2f} epochs), {describe_optimizer(run.config)}"]
    notes = schedule_notes(run.config, total_steps, run.iter_num, run.optimizer.param_groups[0]["lr"])
    print(*(f"plan: {line}" for line in plan), *(f"note: {note}" for note in notes), sep="\n")
    forward, compile_note = hardware.choose_compile(
        run.model, lambda compiled: try_batch(run, compiled, training.batch_size), run.device, training.use_compile,
        remaining * windows * m.max_seq_len * flops / run.ranks.count)
    plan.append(f"{run.device.type} x {run.ranks.count}, {precision_note}, {compile_note}")
    print(f"plan: {plan[-1]}")
    run.folder.record({"type": "plan", "step": run.iter_num, "plan": plan + notes, "config": run.config.to_dict()})
    return run.ranks.parallel(forward, run.device)


def try_batch(run: Run, forward: Callable, batch_size: int) -> None:
    """A forward and backward pass of the real shape, of two tensors: torch.compile makes a special case of one."""
    example = tuple(torch.zeros(batch_size, run.config.model.max_seq_len, dtype=int).to(run.device) for _ in range(2))
    accumulate_gradients(forward, run.precision, [example])


def prepare_run(config: Config, checkpoint: dict[str, Any] | None, source: Path | None, device: torch.device,
                folder: RunFolder, ranks: Ranks) -> tuple[Run, TokenFile]:
    """Tokenizer, token files, model, optimizer, and the state of the checkpoint. Returns the validation split too."""
    with ranks.first_goes_ahead():
        tokenizer = ensure_tokenizer(config, checkpoint and checkpoint["tokenizer"], source)
        train_file, validation = (prepare_tokens(config.data, tokenizer, split, config.training.show_progress)
                                  for split in ("train", "validation"))
    encode_prompts(tokenizer, config.sampling.prompts, config.model.max_seq_len)  # too long a one is told now
    torch.manual_seed(config.training.seed)
    torch.set_float32_matmul_precision("high")  # what stays float32 may use tf32 on a GPU
    model = Transformer(config.model, config.training.use_gradient_checkpointing).to(device)
    run = Run(config, tokenizer, model, make_optimizer(model, config), device, train_file, folder, ranks)
    if not run.num_windows:
        raise UserError(f"{config.data.dataset}: {len(train_file.tokens):,} training tokens are less than one window "
                        f"of {config.model.max_seq_len}: add stories, or lower model.max_seq_len")
    if checkpoint:
        for note in check_resumable(checkpoint, source, config, train_file.digest):
            print(f"note: {note}")
        run.restore(checkpoint, source)
        if ranks.of_first(not (source.parent / BEST).exists()):  # the next evaluation then writes one
            run.best_val_loss = math.inf
        print(f"resumed: {source}, step {run.iter_num:,}, epoch {run.epoch:.2f}")
    ranks.check_same(f"{train_file.digest} {validation.digest} {run.iter_num} {config.model}", "data or checkpoints")
    return run, validation


def start_run(config: Config, config_path: Path | None, checkpoint_path: Path | None, resume: bool = False) -> int:
    """From a config to a trained model, and a story. Returns the exit status; with `resume`, being over is no error."""
    device, training = hardware.choose_device(config.hardware.device), config.training
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
    if checkpoint:  # before any work is done
        check_resumable(checkpoint, checkpoint_path, config)
    with join_ranks(device) as ranks, hold_folder(Path(training.output_dir).expanduser(), ranks.first) as folder:
        if checkpoint:
            before = config_from_dict(checkpoint["config"], str(checkpoint_path))
            config = config.keep_batch_size(before, ranks.count)
        ranks.check_shares(config)
        if not ranks.first:
            config = replace(config, training=replace(config.training, show_progress=False))
        run, validation = prepare_run(config, checkpoint, checkpoint_path, device, folder, ranks)
        remaining = training.num_epochs * run.num_windows - run.position
        total_steps = training.max_steps or run.iter_num + max(0, math.ceil(remaining / run.config.step_windows))
        if run.iter_num and is_over(run, total_steps) and run.completed == run.iter_num:
            message = (f"{checkpoint_path}: has done its {counted(run.iter_num, 'step')} already: raise "
                       f"{longer_by(run, total_steps)} to go on, or tell stories with generate.py")
            if resume:
                print(message)
                return 0
            raise UserError(message)
        folder.begin(checkpoint_path, checkpoint["metrics_size"] if checkpoint else 0, training.logger)
        start, before = time.perf_counter(), run.iter_num
        status = train(run, validation, total_steps)
        if status == 0 and ranks.first:
            say_goodbye(run, before, time.perf_counter() - start, longer_by(run, total_steps), config_path)
        return status


def longer_by(run: Run, total_steps: int) -> str:
    """What to raise if a run that is over is to go on."""
    steps = "--set training.max_steps" if run.config.training.max_steps else "--num_epochs"
    return steps if run.iter_num >= total_steps else "--set training.early_stopping_patience"


def say_goodbye(run: Run, before: int, seconds: float, longer: str, config_path: Path | None) -> None:
    """The result, a whole story, and what to try next. before: the step at which this program began; its seconds."""
    sampling, seeds = run.config.sampling, range(run.config.sampling.seed, run.config.sampling.seed + 4)
    stories = sorted(tell_stories(run.model.eval(), run.tokenizer, [sampling.prompts[0]] * 4, sampling, seeds))
    story = next((story for story in stories if story.ended), stories[0])
    best, latest = (shlex.quote(str(run.folder.path / name)) for name in (BEST, LATEST))
    done = counted(run.iter_num - before, "step") + (f" more, {run.iter_num:,} in all," if before else "")
    print(f"\ndone: {done} in {seconds / 60:.1f} minutes, best validation loss {run.best_val_loss:.4f}\n\n"
          f"{story.text}\n\nnext:\n  python generate.py --checkpoint {best} --num_samples 3")
    if longer == "--num_epochs":
        print(f"  python train.py --checkpoint {latest} --num_epochs {run.config.training.num_epochs + 1}")
    if config_path in (None, QUICKSTART):
        print(f"  python train.py --config config/{MAIN_CONFIG.name}   (the real model: wants a GPU)")


def main() -> int:
    args, config = parse_arguments()
    if config is None:
        config = config_from_dict(load_checkpoint(args.checkpoint)["config"], str(args.checkpoint), args.overrides)
    folder, checkpoint = Path(config.training.output_dir).expanduser(), args.checkpoint
    if args.eval_only:
        evaluate_checkpoint(config, checkpoint or folder / (LATEST if args.resume else BEST))
        return 0
    if args.resume and (folder / LATEST).exists():
        checkpoint = folder / LATEST
    elif args.resume:
        print(f"resume: no {LATEST} in {folder} yet: a new run")
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    with hardware.memory_is_told():
        return start_run(config, args.config, checkpoint, args.resume)


if __name__ == "__main__":
    run_script(main)
