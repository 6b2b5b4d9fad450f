"""The learning rate of each step, and notes where the schedule does not fit the run."""

import math

from config.schema import Config, SchedulerConfig
from config.wording import counted


def learning_rate(step: int, peak: float, total_steps: int, scheduler: SchedulerConfig) -> float:
    """The rate of step 1 .. total_steps: linear warm-up to `peak`, then the schedule down to min_lr."""
    decay_steps = scheduler.lr_decay_iters or total_steps
    if step <= scheduler.warmup_steps:
        return peak * step / scheduler.warmup_steps
    if scheduler.type == "constant":
        return peak
    progress = min(1.0, (step - scheduler.warmup_steps) / max(1, decay_steps - scheduler.warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if scheduler.type == "cosine" else 1 - progress
    return scheduler.min_lr + remaining * (peak - scheduler.min_lr)


def schedule_notes(config: Config, total_steps: int, step: int = 0, rate: float = 0.0) -> list[str]:
    """Notes on where the schedule does not fit the real number of steps.

    step and rate: of the last step done, if the run is resumed.
    """
    scheduler, peak, notes = config.scheduler, config.optimizer.learning_rate, []
    steps = counted(total_steps, "step")
    if scheduler.warmup_steps >= total_steps:
        epochs = math.ceil(10 * scheduler.warmup_steps * config.training.num_epochs / total_steps)
        longer = "" if config.training.max_steps else f"train for longer, such as --num_epochs {epochs:,}, or "
        notes.append(f"scheduler.warmup_steps is {scheduler.warmup_steps:,}, but this run has {steps}, so the learning "
                     f"rate never reaches its peak: {longer}set it to a tenth of the steps or less")
    if scheduler.lr_decay_iters and scheduler.lr_decay_iters != total_steps and scheduler.type != "constant":
        end = learning_rate(total_steps, peak, total_steps, scheduler)
        notes.append(f"scheduler.lr_decay_iters is {scheduler.lr_decay_iters:,}, but this run has {steps} and "
                     f"ends at a rate of {end:.1e} (min_lr is {scheduler.min_lr:.1e}); null fits it to the run")
    now = learning_rate(step + 1, peak, total_steps, scheduler)
    if step > scheduler.warmup_steps and now > 1.1 * rate:
        notes.append(f"the schedule now spans {steps}, so the learning rate goes up from {rate:.1e} to {now:.1e}: "
                     "expect the loss to rise at first")
    return notes
