"""Train a Llama-2 model: stories -> tokenizer -> token files -> batches -> model -> checkpoint -> stories.

    python train.py                                                          a few minutes on a CPU
    python train.py --config config/train_config_tinystories_33M_TOP10K.yaml  the real model, on a GPU

Start reading at train(), the loop, just below the imports.
"""

import argparse
import contextlib
import functools
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config, UserError, add_config_arguments, check_overrides, config_from_dict, load_config, run_script
from config.command_line import MAIN_CONFIG, QUICKSTART, Parser, file_path, parse_before_imports, positive


def parse_arguments() -> tuple[argparse.Namespace, Config | None]:
    """The command line and its config; None for the config of the checkpoint, which needs torch to be read."""
    parser = Parser(description="Train a Llama-2 model on stories.")
    add_config_arguments(parser, QUICKSTART)
    parser.add_argument("--num_epochs", type=positive, help="instead of training.num_epochs")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), help="instead of hardware.device")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=file_path, metavar="FILE", help="resume from this file; without --config, "
                        "with its own config")
    source.add_argument("--resume", action="store_true", help="resume from the latest checkpoint in training.output_"
                        "dir, or start if there is none yet: the same command starts a run and continues it")
    parser.add_argument("--init_from", type=file_path, metavar="FILE_OR_FOLDER", help="start a new run with the "
                        "weights and the tokenizer of a checkpoint, or of a folder of transformers (fine-tuning); "
                        "without --config, with the checkpoint's own config")
    parser.add_argument("--eval_only", action="store_true", help="only evaluate --checkpoint (default: the best)")
    args = parser.parse_args()
    if args.num_epochs:  # it replaces max_steps of the YAML, too
        args.overrides = ["training.max_steps=null", *args.overrides, f"training.num_epochs={args.num_epochs}"]
    if args.device:
        args.overrides.append(f"hardware.device={args.device}")
    if args.init_from and (args.checkpoint or args.eval_only):
        parser.error(f"--init_from starts a new run, {'--checkpoint' if args.checkpoint else '--eval_only'} does not: "
                     "give one of them")
    if args.init_from or (args.checkpoint and not args.config):
        return args, check_overrides(args.overrides)
    return args, load_config(args.config or QUICKSTART, args.overrides)


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.wording import counted, format_bytes, shell_argument
from data.batches import dropout_seed
from data.quality import check_quality
from data.token_files import TokenFile, prepare_tokens
from data.tokenizer import ensure_tokenizer
from device import (
    choose_compile,
    choose_device,
    choose_precision,
    describe_machine,
    explain_out_of_memory,
    keep_freed_memory,
    peak_flops,
    unused_gpu,
)
from evaluation.full_evaluation import evaluate_checkpoint
from evaluation.report import update_report
from evaluation.validation import describe_evaluation, evaluate
from inference.generation import encode_prompts, generate_stories, sample_stories
from model import Transformer, count_parameters, flops_per_token
from training.batch_size import choose_batch_size, estimate_memory
from training.checkpoints import BEST, LATEST, check_resumable, config_of_new_run, load_checkpoint, load_weights
from training.distributed import DistributedContext, init_distributed
from training.interruptions import FaultTolerantStream, deferred_interrupts
from training.optimizer import describe_optimizer, make_optimizer
from training.run import Run, micro_batch, read_losses
from training.run_folder import REPORT, RunFolder, lock_output_dir
from training.schedule import learning_rate, schedule_notes
from training.terminal import announce_duration, bold, open_bar, show_figures, wrapped

EARLY_STEPS, EARLY_TOKENS = (1, 10, 20, 50, 100, 200), 60  # where one story is shown, and of how many new tokens


def accumulate_gradients(forward: Callable[[Tensor, Tensor], Tensor], precision: Callable[[], Any],
                         batches: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int] = ()) -> Tensor:
    """Backward over equal micro-batches, so that .grad is that of their mean loss. Returns that loss, float32, ().

    seeds: of each micro-batch's dropout. Under DistributedDataParallel, only the last backward pass averages gradients.
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


# The loop

def train(run: Run, validation: TokenFile, total_steps: int) -> int:
    """Train to total_steps, or until Ctrl-C or early stopping. Returns the exit status: 0, or 128 + the signal."""
    training = run.config.training
    forward = prepare_device(run, validation, total_steps)
    bar = open_bar(total_steps, run.iter_num, training.show_progress)
    run.clock = run.iter_num, time.perf_counter()
    first_step, begun = run.iter_num + 1, run.clock[1]
    with bar, deferred_interrupts() as signals:
        while not (stopping := run.distributed.any_process(bool(signals))):
            if is_evaluation_due(run, total_steps):
                evaluate_and_log(run, validation)
                continue  # a signal may have arrived meanwhile
            if is_finished(run, total_steps):
                break
            epochs_done = int(run.epoch)
            start = time.perf_counter()
            train_step(run, forward, total_steps)
            bar.update()
            if run.iter_num - first_step < 2:
                announce_duration(run, run.iter_num == first_step, start, total_steps)
            if run.iter_num in EARLY_STEPS and not is_evaluation_due(run, total_steps):
                show_early_story(run)
            if run.iter_num % training.logging_steps == 0 or run.iter_num == total_steps:
                log_steps(run, bar)
            if int(run.epoch) > epochs_done and training.keep_checkpoints and is_epoch_saved(run, epochs_done):
                run.save(f"checkpoint_epoch_{int(run.epoch)}.pth")
            # save before an evaluation, which may fail; a run resumed from there only repeats the evaluation
            if run.iter_num % training.save_steps == 0 or is_evaluation_due(run, total_steps):
                run.save(LATEST)
        if not stopping and training.eval_samples:  # the evaluations so far were on a part of the validation split
            with run.timed("evaluation"):
                result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, run.precision, 0,
                                  run.distributed)
            tqdm.write(f"whole validation split: {describe_evaluation(result)}")
            run.folder.record({"type": "final", "step": run.iter_num, "epoch": run.epoch, **result})
        run.completed = 0 if stopping else run.iter_num
        run.save(LATEST)
        saved = run.finish_save()
        run.spent["whole"] = time.perf_counter() - begun
    if not saved:
        raise UserError(f"{training.output_dir}: the last save failed (see the warning above): {LATEST} is missing or "
                        "from an earlier step")
    if stopping:
        print(f"Stopped at step {run.iter_num:,} of {total_steps:,}, saved. To resume:\n"
              f"  python train.py --checkpoint {shell_argument(run.folder.path / LATEST)}")
        return 128 + (signals or [signal.SIGTERM])[0]
    if run.iter_num < total_steps:
        print(f"Stopped early: {counted(run.evaluations_without_gain, 'evaluation')} without a better loss")
    return 0


def train_step(run: Run, forward: Callable, total_steps: int) -> None:
    """One optimizer step on the next sequences, whose micro-batches are divided among the processes."""
    config, training, distributed = run.config, run.config.training, run.distributed
    rate = learning_rate(run.iter_num + 1, config.optimizer.learning_rate, total_steps, config.scheduler)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    starts = range(run.position, run.position + config.sequences_per_step, training.batch_size)
    starts = starts[distributed.rank::distributed.world_size]
    loss = accumulate_gradients(forward, run.precision, [micro_batch(run, start)[1] for start in starts],
                                [dropout_seed(training.seed, start) for start in starts])
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    # the fused optimizer reads found_inf on the device and then changes nothing, without synchronizing
    not_finite = (~norm.isfinite()).float()
    run.found_inf = not_finite if run.found_inf is None else torch.maximum(run.found_inf, not_finite)
    run.optimizer.found_inf = run.found_inf
    with run.precision():
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.iter_num += 1
    run.pending.append((run.iter_num, run.position, loss, norm))
    run.position += config.sequences_per_step


def evaluate_and_log(run: Run, validation: TokenFile) -> None:
    """Evaluate, generate the sample stories, print and record both, and save the model if it is the best so far."""
    with run.timed("evaluation"):
        result = evaluate(run.model, validation, run.tokenizer, run.config, run.device, run.precision,
                          run.config.training.eval_samples, run.distributed)
    with run.timed("samples"):
        stories = run.sample(run.config.sampling)
    if not math.isfinite(result["val_loss"]):
        raise UserError(f"step {run.iter_num:,}: the validation loss is not finite; {BEST} is unchanged")
    tqdm.write(bold(f"step {run.iter_num:,}, epoch {run.epoch:.2f}: {describe_evaluation(result)}"))
    for story in stories:
        tqdm.write(wrapped(story))
    run.folder.record({"type": "evaluation", "step": run.iter_num, "epoch": run.epoch, **result, "samples": stories})
    run.evaluated = run.iter_num
    run.evaluations_without_gain += 1
    if result["val_loss"] < run.best_val_loss:
        run.best_before, run.best_val_loss, run.evaluations_without_gain = run.best_val_loss, result["val_loss"], 0
        run.save(BEST)
    with run.timed("report"):
        run.folder.draw()


def show_early_story(run: Run) -> None:
    """Generate, print and record the beginning of one story, so that grammar is seen to arrive."""
    sampling = run.config.sampling
    short = replace(sampling, prompts=sampling.prompts[:1], max_new_tokens=min(EARLY_TOKENS, sampling.max_new_tokens))
    with run.timed("samples"):
        stories = run.sample(short)
    for story in stories:
        tqdm.write(f"step {run.iter_num:,}:\n{wrapped(story)}")
    run.folder.record({"type": "early", "step": run.iter_num, "epoch": run.epoch, "samples": stories})


def log_steps(run: Run, bar: tqdm) -> None:
    """Show and record the steps since the last call."""
    read_losses(run)
    steps, seconds = run.iter_num - run.clock[0], time.perf_counter() - run.clock[1]
    for step, _, norm in run.unlogged:
        median = statistics.median(run.norms) if len(run.norms) >= 20 else math.inf
        if run.config.training.loss_spike and norm > run.config.training.loss_spike * median:
            tqdm.write(f"note: step {step:,}: gradient norm {norm:.2f}, the median of the last ones is {median:.2f}")
            run.folder.record({"type": "spike", "step": step, "gradient_norm": norm, "median": median})
        run.norms = [*run.norms[-99:], norm]
    loss = statistics.fmean(loss for _, loss, _ in run.unlogged)
    speed = steps * run.config.sequences_per_step * run.config.model.max_seq_len / seconds
    entry = {"type": "step", "step": run.iter_num, "epoch": run.epoch, "loss": loss, "gradient_norm": run.norms[-1],
             "learning_rate": run.optimizer.param_groups[0]["lr"], "tokens_per_second": speed}
    run.unlogged.clear()
    shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}", "lr": f"{entry['learning_rate']:.1e}"}
    if peak := peak_flops(run.device):
        entry["peak_share"] = speed * flops_per_token(run.model) / peak / run.distributed.world_size
        shown["peak"] = f"{entry['peak_share']:.0%}"
    run.folder.record(entry)
    run.clock = run.iter_num, time.perf_counter()
    show_figures(bar, run.iter_num, shown)


def is_evaluation_due(run: Run, total_steps: int) -> bool:
    """Whether this step is to be evaluated, and has not been yet."""
    at_end = run.iter_num == total_steps
    return run.iter_num > run.evaluated and (at_end or run.iter_num % run.config.training.eval_steps == 0)


def is_epoch_saved(run: Run, epochs_before: int) -> bool:
    """Whether the epoch that ends at this step gets a file: at most one epoch in save_steps steps does."""
    last_end = math.ceil(epochs_before * run.sequences_per_epoch / run.config.sequences_per_step)
    return run.iter_num // run.config.training.save_steps > last_end // run.config.training.save_steps


def is_finished(run: Run, total_steps: int) -> bool:
    """Whether all steps are done, or early stopping ended the run."""
    patience = run.config.training.early_stopping_patience
    return run.iter_num >= total_steps or (patience is not None and run.evaluations_without_gain >= patience)


# Before and after the loop

def prepare_device(run: Run, validation: TokenFile, total_steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Choose precision, batch size and compilation, and print the plan. Returns the forward to train with."""
    keep_freed_memory()
    run.precision, precision_note = choose_precision(run.device, run.config.training.use_bf16,
                                                     run.distributed.from_main)
    bf16, auto = run.precision is not contextlib.nullcontext, run.config.training.batch_size == "auto"
    if run.distributed.is_main:  # before the batch size is chosen, since it takes memory
        run.sample = sample_stories(run.model, run.tokenizer, run.config.sampling, "bf16" if bf16 else "float32")
        if run.device.type == "cuda":
            run.sample(run.config.sampling)  # its graphs, too, take memory
    seq_len, per_step, flops = run.config.model.max_seq_len, run.config.sequences_per_step, flops_per_token(run.model)
    run_flops = (total_steps - run.iter_num) * per_step * seq_len * flops / run.distributed.world_size

    @functools.cache
    def compile_for(size: int) -> tuple[Callable, str]:
        return choose_compile(run.model, lambda compiled: probe_batch(run, compiled, size), run.device,
                              run.config.training.use_compile, run_flops)

    def probe(size: int) -> None:
        if (forward := compile_for(size)[0]) is run.model:  # else compiling has probed it
            probe_batch(run, forward, size)

    run.config = choose_batch_size(run.config, run.model, run.device, run.distributed, bf16, probe)
    training = run.config.training
    memory = estimate_memory(run.model, training.batch_size, bf16, training.use_compile)
    plan = [f"{count_parameters(run.model):,} parameters, {flops / 1e6:.1f} MFLOP per training token, about "
            f"{format_bytes(memory)} of memory",
            f"{per_step * seq_len:,} tokens a step ({counted(training.batch_size, 'sequence')} of {seq_len}"
            f"{', chosen by auto,' if auto else ''} x {training.gradient_accumulation_steps}), "
            f"{run.sequences_per_epoch / per_step:,.1f} steps an epoch, {counted(total_steps, 'step')} in all "
            f"({total_steps * per_step / run.sequences_per_epoch:.2f} epochs), {describe_optimizer(run.config)}"]
    notes = schedule_notes(run.config, total_steps, run.iter_num, run.optimizer.param_groups[0]["lr"])
    if run.sequences_per_epoch < per_step * min(training.save_steps, total_steps) and training.keep_checkpoints:
        notes.append(f"an epoch is shorter than training.save_steps ({training.save_steps}): not every epoch gets a "
                     "checkpoint_epoch_N.pth")
    print(*(f"plan: {line}" for line in plan), *(f"note: {note}" for note in notes), sep="\n")
    forward, compile_note = compile_for(training.batch_size)
    plan.append(f"{run.device.type} x {run.distributed.world_size}, {precision_note}, {compile_note}")
    print(f"plan: {plan[-1]}")
    run.folder.record({"type": "plan", "step": run.iter_num, "plan": plan + notes, "config": run.config.to_dict(),
                       "machine": describe_machine(run.device), "date": time.strftime("%Y-%m-%d %H:%M"),
                       "checks": {"training": run.train_file.checks, "validation": validation.checks}})
    return run.distributed.data_parallel(forward, run.device)


def probe_batch(run: Run, forward: Callable, batch_size: int) -> None:
    """A forward and a backward pass of the real shape. Inputs and targets are two tensors, since torch.compile
    specializes on arguments that are the same object."""
    example = tuple(torch.zeros(batch_size, run.config.model.max_seq_len, dtype=int).to(run.device) for _ in range(2))
    accumulate_gradients(forward, run.precision, [example])


def prepare_run(config: Config, checkpoint: dict[str, Any] | None, source: Path | None, device: torch.device,
                folder: RunFolder, distributed: DistributedContext, initial: dict[str, Any] | None = None,
                ) -> tuple[Run, TokenFile]:
    """Tokenizer, token files, model, optimizer, and the state of the checkpoint. Returns the validation split too.

    initial: a checkpoint whose weights and tokenizer a new run begins with.
    """
    with distributed.main_process_first():
        if config.data.check_quality and not checkpoint and distributed.is_main:
            print(f"quality: {check_quality(config.data)}")
        tokenizer = ensure_tokenizer(config, (checkpoint or initial or {}).get("tokenizer"), source)
        train_file, validation = (prepare_tokens(config.data, tokenizer, split, config.training.show_progress)
                                  for split in ("train", "validation"))
    encode_prompts(tokenizer, config.sampling.prompts, config.model.max_seq_len)  # raises if one is too long
    torch.manual_seed(config.training.seed)
    torch.set_float32_matmul_precision("high")  # allows tf32 on a GPU for what stays float32
    model = Transformer(config.model, config.training.use_gradient_checkpointing).to(device)
    if initial and not checkpoint:
        load_weights(model, initial, "--init_from")
        print("init_from: a new run with the weights and the tokenizer of the checkpoint")
        before, now = initial["config"]["model"]["max_seq_len"], config.model.max_seq_len
        if now != before:
            print(f"note: model.max_seq_len is {now}, but {before} in the checkpoint"
                  + (": the model has to learn the later positions" if now > before else ""))
    run = Run(config, tokenizer, model, make_optimizer(model, config), device, train_file, folder, distributed)
    if not run.sequences_per_epoch:
        raise UserError(f"{config.data.dataset}: {len(train_file.tokens):,} training tokens are fewer than one "
                        f"sequence of {config.model.max_seq_len}: add stories, or lower model.max_seq_len")
    if checkpoint:
        for note in check_resumable(checkpoint, source, config, train_file.digest):
            print(f"note: {note}")
        run.restore(checkpoint, source)
        if distributed.from_main(not (source.parent / BEST).exists()):  # the next evaluation then writes one
            run.best_val_loss = math.inf
        print(f"resumed: {source}, step {run.iter_num:,}, epoch {run.epoch:.2f}")
    distributed.check_equal(f"{train_file.digest} {validation.digest} {run.iter_num} {config.model}",
                            "data or checkpoints")
    return run, validation


def start_run(config: Config, config_path: Path | None, checkpoint_path: Path | None, resume: bool = False,
              initial: dict[str, Any] | None = None) -> int:
    """From a config to a trained model and a story. Returns the exit status.

    resume: a run that has already finished is no error (--resume). initial: a checkpoint whose weights and tokenizer a
    new run begins with.
    """
    device, training = choose_device(config.hardware.device), config.training
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
    if checkpoint:  # fail before any work is done
        check_resumable(checkpoint, checkpoint_path, config)
    with (init_distributed(device) as distributed,
          lock_output_dir(Path(training.output_dir).expanduser(), distributed.is_main, update_report) as folder):
        if checkpoint:
            before = config_from_dict(checkpoint["config"], str(checkpoint_path))
            config = config.keep_batch_size(before, distributed.world_size)
        distributed.check_divisible(config)
        if config.hardware.device == "auto" and (warning := unused_gpu(device)):
            print(warning)
        if not distributed.is_main:
            config = replace(config, training=replace(config.training, show_progress=False))
        if config.hardware.num_gpus not in (None, distributed.world_size):
            wanted = config.hardware.num_gpus
            print(f"note: hardware.num_gpus is {wanted}, but the number of processes is {distributed.world_size}; for "
                  f"{wanted}: torchrun --nproc_per_node={wanted} {shlex.join(sys.argv)}")
        run, validation = prepare_run(config, checkpoint, checkpoint_path, device, folder, distributed, initial)
        remaining = training.num_epochs * run.sequences_per_epoch - run.position
        wanted = training.max_steps or run.iter_num + math.ceil(remaining / run.config.sequences_per_step)
        total_steps = max(run.iter_num, wanted)  # if fewer are asked for than are done, only evaluate
        if run.iter_num and is_finished(run, total_steps) and run.completed == run.iter_num:
            message = (f"{checkpoint_path}: has already finished its {counted(run.iter_num, 'step')}: raise "
                       f"{flag_to_extend(run, total_steps)} to continue, or generate stories with generate.py")
            if resume:
                print(message)
                return 0
            raise UserError(message)
        folder.begin(checkpoint_path, checkpoint["metrics_size"] if checkpoint else 0, training.logger)
        start, before = time.perf_counter(), run.iter_num
        status = train(run, validation, total_steps)
        if status == 0 and distributed.is_main:
            print_summary(run, before, time.perf_counter() - start, flag_to_extend(run, total_steps), config_path)
        return status


def flag_to_extend(run: Run, total_steps: int) -> str:
    """The setting to raise so that a finished run continues."""
    steps = "--set training.max_steps" if run.config.training.max_steps else "--num_epochs"
    return steps if run.iter_num >= total_steps else "--set training.early_stopping_patience"


def print_summary(run: Run, before: int, seconds: float, to_extend: str, config_path: Path | None) -> None:
    """Print the result, a whole story, and what to do next. before: the step at which this program started."""
    sampling, seeds = run.config.sampling, range(run.config.sampling.seed + 1, run.config.sampling.seed + 5)
    stories = sorted(generate_stories(run.model.eval(), run.tokenizer, [sampling.prompts[0]] * 4, sampling, seeds))
    story = next((story for story in stories if story.ended), stories[0])
    best, latest, report = (shell_argument(run.folder.path / name) for name in (BEST, LATEST, REPORT))
    finished = (f"Finished at step {run.iter_num:,} ({counted(run.iter_num - before, 'step')} in {seconds / 60:.1f} "
                f"min), best validation loss {run.best_val_loss:.4f}")
    whole = run.spent.pop("whole")
    shares = {"steps": whole - sum(run.spent.values()), **run.spent}
    times = ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in shares.items())
    print(f"\n{bold(finished)}\nTime: {times}\n\n{wrapped(story.text)}\nNext:\n"
          f"  look at {report}: curves and stories\n"
          f"  python evaluate.py --checkpoint {best}  # did it work?\n"
          f"  python generate.py --checkpoint {best} --num_samples 3  # more stories")
    if to_extend == "--num_epochs":
        print(f"  python train.py --checkpoint {latest} --num_epochs {run.config.training.num_epochs + 1}")
    if config_path in (None, QUICKSTART):
        print(f"  python train.py --config config/{MAIN_CONFIG.name}  # the real model, on a GPU")


@explain_out_of_memory("lower training.batch_size and raise training.gradient_accumulation_steps by the same factor, "
                       "or set training.use_gradient_checkpointing: true, or make the model smaller")
def main(arguments: tuple[argparse.Namespace, Config | None]) -> int:
    args, config = arguments
    initial = load_checkpoint(args.init_from) if args.init_from else None
    if initial:
        config = config_of_new_run(initial, args.init_from, args.config, args.overrides)
    elif config is None:
        config = config_from_dict(load_checkpoint(args.checkpoint)["config"], str(args.checkpoint), args.overrides)
    folder, checkpoint = Path(config.training.output_dir).expanduser(), args.checkpoint
    if args.eval_only:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one evaluates
            evaluate_checkpoint(config, checkpoint or folder / (LATEST if args.resume else BEST), print)
        return 0
    if args.resume and (folder / LATEST).exists():
        checkpoint = folder / LATEST
    elif args.resume:
        print(f"resume: no {LATEST} in {folder} yet: starting a new run")
    sys.stdout, sys.stderr = FaultTolerantStream(sys.stdout), FaultTolerantStream(sys.stderr)
    return start_run(config, args.config, checkpoint, args.resume, initial)


if __name__ == "__main__":
    run_script(main, arguments)
