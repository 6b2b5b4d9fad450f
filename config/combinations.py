"""Checks that concern several keys of a config at once; the check of a single key is its type in schema.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import Config, ModelConfig


def check_combinations(config: Config, source: str, origins: Mapping[str, str]) -> None:
    """Raise UserError if keys contradict each other: the keys, what was found, what must hold, what to do.

    origins: for a key path, the --set that its value came from. The message begins with those of the keys concerned.
    """
    for holds, message in (*_general_rules(config), *_step_rules(config)):
        if not holds:
            named = set(re.findall(r"[\w.]+", message))
            given = [origin for path, origin in origins.items() if {path, path.partition(".")[2]} & named]
            where = f"{', '.join(given)} with {source}" if given else source
            raise UserError(f"{where}: {message}")


def _general_rules(config: Config) -> list[tuple[bool, str]]:
    """Pairs of a condition that must hold and the message if it does not."""
    m, opt, sched = config.model, config.optimizer, config.scheduler
    return [
        (m.d_model % m.n_heads == 0,
         f"model.d_model {m.d_model} is not divisible by model.n_heads {m.n_heads}: "
         f"d_model could be {divisible_width(m)}"),
        (m.n_heads % m.kv_heads == 0,
         f"model.n_heads {m.n_heads} is not divisible by model.n_kv_heads {m.kv_heads}: "
         f"n_kv_heads can be {', '.join(str(k) for k in range(1, min(m.n_heads, 1000) + 1) if m.n_heads % k == 0)}"),
        (m.rotary_dim % 2 == 0,
         f"model.rope_percentage {m.rope_percentage:g} of a head of {m.head_dim} dimensions (model.d_model {m.d_model} "
         f"/ model.n_heads {m.n_heads}) rotates {m.rotary_dim}, an odd number, but rotation works on pairs: choose a "
         "percentage that gives an even number"),
        (config.data.max_seq_len in (None, m.max_seq_len),
         f"data.max_seq_len {config.data.max_seq_len} differs from model.max_seq_len {m.max_seq_len}: make them "
         "equal, or leave data.max_seq_len out"),
        (sched.min_lr <= opt.learning_rate,
         f"scheduler.min_lr {sched.min_lr:g} is above optimizer.learning_rate {opt.learning_rate:g}: the rate falls to "
         "min_lr, so make it the smaller one (a tenth is usual)"),
        (opt.type == "muon" or opt.muon_learning_rate is None,
         f"optimizer.muon_learning_rate is {opt.muon_learning_rate}, but optimizer.type is adamw: set the "
         "type to muon, or the rate to null"),
        (sched.lr_decay_iters is None or sched.lr_decay_iters > sched.warmup_steps,
         f"scheduler.lr_decay_iters {sched.lr_decay_iters} is not above scheduler.warmup_steps {sched.warmup_steps}: "
         "make it larger, or null for the real number of steps"),
    ]


def _step_rules(config: Config) -> list[tuple[bool, str]]:
    """The same for the size of a step."""
    m, t = config.model, config.training
    auto = t.batch_size == "auto"
    micro_batch, steps = m.max_seq_len * (1 if auto else t.batch_size), t.gradient_accumulation_steps
    return [
        (t.tokens_per_step is not None or not (auto or steps is None),
         f"training.{'batch_size auto' if auto else 'gradient_accumulation_steps null'} follows from training."
         f"tokens_per_step: set that, such as {128 * micro_batch if auto else 4 * micro_batch}"
         + (", and gradient_accumulation_steps to null" if steps is not None else "")),
        (steps is None or not auto,
         f"training.gradient_accumulation_steps {steps} with batch_size auto: it follows from the batch size that is "
         "found, so make it null"),
        ((t.tokens_per_step or micro_batch) % micro_batch == 0,
         f"training.tokens_per_step {t.tokens_per_step} is not a multiple of {micro_batch}, "
         + ("" if auto else f"training.batch_size {t.batch_size} sequences of ") + f"model.max_seq_len {m.max_seq_len}"
         + f": it could be {-(-(t.tokens_per_step or 0) // micro_batch) * micro_batch}"),
        (None in (t.tokens_per_step, steps) or t.tokens_per_step == micro_batch * (steps or 0),
         f"training.tokens_per_step {t.tokens_per_step} is not batch_size {t.batch_size} * gradient_accumulation_steps "
         f"{steps} * model.max_seq_len {m.max_seq_len}, {micro_batch * (steps or 0)}: make gradient_accumulation_steps "
         "null"),
    ]


def divisible_width(m: ModelConfig) -> int:
    """The next d_model that n_heads divides and whose heads have an even number of rotated dimensions."""
    head = -(-m.d_model // m.n_heads)  # rounded up
    passes = (width for width in range(head, head + 1000) if round(width * m.rope_percentage) % 2 == 0)
    return next(passes, head) * m.n_heads
