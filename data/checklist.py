"""What a checkpoint tells of its training, with what it means: the checklist of evaluate.py."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config
from config.schedule import learning_rate, schedule_notes
from data.checkpoints import LATEST
from data.tokens import TokenFile, count_windows


class Check(NamedTuple):
    """mark: ok, look (there may be a reason), or bad."""

    mark: str
    name: str
    found: str
    meaning: str = ""


def check_run(checkpoint: dict[str, Any], source: Path, config: Config, train_file: TokenFile) -> list[Check]:
    """What the checkpoint in the file `source` says of its training: finished or not, vocabulary, rate, steps, ..."""
    step, training = checkpoint["iter_num"], config.training
    windows = count_windows(len(train_file.tokens), config.model.max_seq_len)
    remaining = training.num_epochs * windows - checkpoint.get("position", 0)
    planned = training.max_steps or step + max(0, math.ceil(remaining / config.step_windows))
    loss = checkpoint["best_val_loss"]
    known = f"best validation loss {loss:.4f}" if loss < math.inf else "not evaluated before"
    where = f"step {step:,}, epoch {checkpoint['epoch']:.2f}, {known}"
    if checkpoint.get("completed") == step:
        checks = [Check("ok", "checkpoint", f"{where}; its run is finished")]
    elif step >= planned:
        checks = [Check("ok", "checkpoint", f"{where}; at the last step of its run")]
    else:
        checks = [Check("look", "checkpoint", f"{where}; not at the end of its run",
                        "the best or a saved model of an unfinished run, which goes on by\n"
                        f"       python train.py --checkpoint {shlex.quote(str(source.with_name(LATEST)))}")]
    over = checkpoint.get("completed") == step and step < planned
    checks.append(Check("ok" if step >= planned or over else "look", "steps", f"{step:,} done of {planned:,} planned"
                        + (" (stopped early, as the config allows)" if over else "")))

    used = count_used(train_file.tokens, config.model.vocab_size)
    checks.append(Check("ok" if used > 0.9 * config.model.vocab_size else "look", "vocabulary",
                        f"{config.model.vocab_size:,} tokens, of which the training text uses {used:,}",
                        "rows of the others are never trained" if used < config.model.vocab_size else ""))
    trained_on = checkpoint.get("train_digest")
    if trained_on in (None, train_file.digest):
        known = "the very tokens it was trained on" if trained_on else "(an old checkpoint: no checksum to compare)"
        checks.append(Check("ok", "tokenizer", f"the checkpoint's own made {train_file.path.name}: {known}"))
    else:
        checks.append(Check("bad", "tokenizer", f"{train_file.path.name} holds other tokens than it was trained on",
                            "what follows from the training text is of another text"))
    share = train_file.counts["article_tokens"] / len(train_file.tokens)
    checks.append(Check("ok" if 0.03 <= share <= 0.12 else "look", "articles in the data", f"{share:.1%} of the train"
                        "ing tokens", "" if 0.03 <= share <= 0.12 else "5-9% is healthy: a model learns what is there"))

    rate = learning_rate(max(1, step), config.optimizer.learning_rate, planned, config.scheduler)
    groups = checkpoint.get("optimizer", {}).get("param_groups", [{}])
    used_rate = groups[0].get("lr", math.nan)
    notes = schedule_notes(config, planned)
    on_schedule = math.isclose(used_rate, rate, rel_tol=1e-6)
    checks.append(Check("ok" if on_schedule and not notes else "look", "learning rate",
                        f"{used_rate:.2e}; the schedule ({config.scheduler.type}) says {rate:.2e} at this step",
                        "; ".join(notes) or ("" if on_schedule else "resumed with other steps, or another config")))
    return checks


def count_used(tokens: np.ndarray, vocab_size: int, chunk: int = 1 << 24) -> int:
    """How many ids of the vocabulary occur in the tokens, in bounded memory."""
    seen = np.zeros(vocab_size, dtype=bool)
    for start in range(0, len(tokens), chunk):
        seen |= np.bincount(tokens[start:start + chunk], minlength=vocab_size)[:vocab_size] > 0
    return int(seen.sum())


def check_likelihood(found: dict[str, Any], step: int, metrics: Sequence[dict], good_loss: float) -> list[Check]:
    """Loss, whether it still falls, and label alignment: which token the model's prediction is of."""
    loss, falling = found["val_loss"], ""
    curve = [(of["step"], of["val_loss"]) for of in metrics if of["type"] == "evaluation" and of["step"] <= step]
    if earlier := [value for at, value in curve if at <= 0.8 * step]:
        fell = 1 - curve[-1][1] / earlier[-1]
        falling = f"; over the last fifth of its steps it {'fell' if fell > 0 else 'rose'} by {abs(fell):.1%}"
    meaning = ("" if loss < good_loss else "still falling: more steps or epochs would help" if "fell" in falling
               else f"above {good_loss} grammar is unsteady: train longer, on more stories, or a larger model")
    checks = [Check("ok" if loss < good_loss else "look", "loss", f"{loss:.4f} nats per token, the aim is under "
                    f"{good_loss}{falling}", meaning)]
    against = {"next": found["next_loss"], "one after": found["after_next_loss"], "present": found["present_loss"]}
    best = min(against, key=against.get)
    meanings = {"next": "it predicts the next token, as it should",
                "one after": "its labels were shifted twice: it skips every second word, articles first",
                "present": "its labels were not shifted: it only repeats what it reads"}
    checks.append(Check("ok" if best == "next" else "bad", "label alignment", "loss against " + ", ".join(
        f"the {name} token {value:.2f}" for name, value in against.items()), meanings[best]))
    return checks
