"""The checklist of a trained checkpoint: what it says of its training and its predictions, each with a verdict."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config
from config.wording import shell_argument
from data.batches import count_sequences
from data.token_files import TokenFile, has_english
from training.checkpoints import LATEST
from training.schedule import learning_rate, schedule_notes

GOOD_LOSS = {"tinystories": 2.0}  # nats per token, of a data set's validation split; above it, grammar is unsteady
MARGIN = 0.2  # share of a loss; smaller differences say nothing about the alignment of the labels


class Check(NamedTuple):
    """mark: ok, check (there may be a reason), or bad."""

    mark: str
    name: str
    found: str
    meaning: str = ""

    def __str__(self) -> str:
        return f"{self.mark:>5}  {self.name}: {self.found}" + (f"\n       {self.meaning}" if self.meaning else "")


def check_run(checkpoint: dict[str, Any], source: Path, config: Config, train_file: TokenFile,
              metrics: Sequence[dict]) -> list[Check]:
    """Checks of the training that led to the checkpoint in the file `source`: finished, vocabulary, rate, ..."""
    step, training = checkpoint["iter_num"], config.training
    sequences = count_sequences(len(train_file.tokens), config.model.max_seq_len)
    remaining = training.num_epochs * sequences - checkpoint.get("position", 0)
    planned = training.max_steps or step + max(0, math.ceil(remaining / config.sequences_per_step))
    completed = checkpoint.get("completed") == step
    ended = metrics[-1]["step"] if metrics and metrics[-1]["type"] == "final" else 0  # the last step of its run
    if ended > step:  # the best model of a run that did not end with it
        steps = Check("ok", "steps", f"{step:,}; its run ended at step {ended:,}")
    else:
        steps = Check("ok" if step >= planned or completed else "check", "steps",
                      f"{step:,} done of {planned:,} planned"
                      + (" (stopped early, as the config allows)" if completed and step < planned else ""))
    return [_check_finished(checkpoint, source, completed or ended > step, planned), steps,
            *_check_data(checkpoint, config, train_file), _check_learning_rate(checkpoint, config, planned)]


def _check_finished(checkpoint: dict[str, Any], source: Path, completed: bool, planned: int) -> Check:
    loss = checkpoint["best_val_loss"]
    known = f"best validation loss {loss:.4f}" if loss < math.inf else "not evaluated before"
    where = f"step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}, {known}"
    if completed:
        return Check("ok", "checkpoint", f"{where}; its run is finished")
    if checkpoint["iter_num"] >= planned:
        return Check("ok", "checkpoint", f"{where}; at the last step of its run")
    return Check("check", "checkpoint", f"{where}; not at the end of its run",
                 "the best or a saved model of an unfinished run; to resume the run:\n"
                 f"       python train.py --checkpoint {shell_argument(source.with_name(LATEST))}")


def _check_data(checkpoint: dict[str, Any], config: Config, train_file: TokenFile) -> list[Check]:
    vocab_size = config.model.vocab_size
    used = count_used(train_file.tokens, vocab_size)
    checks = [Check("ok" if used > 0.9 * vocab_size else "check", "vocabulary",
                    f"{vocab_size:,} tokens, of which the training text uses {used:,}",
                    "rows of the others are never trained" if used < vocab_size else "")]
    trained_on = checkpoint.get("train_digest")
    if trained_on in (None, train_file.digest):
        known = "the same tokens it was trained on" if trained_on else "(an old checkpoint: no checksum to compare)"
        checks.append(Check("ok", "tokenizer", f"the checkpoint's own made {train_file.path.name}: {known}"))
    else:
        checks.append(Check("bad", "tokenizer", f"{train_file.path.name} holds other tokens than it was trained on",
                            "all that is derived from the training text is of another text"))
    if not has_english(train_file.counts):
        return checks
    share = train_file.counts["article_tokens"] / len(train_file.tokens)
    return [*checks, Check("ok", "articles in the data", f"{share:.1%} of the training tokens")]


def _check_learning_rate(checkpoint: dict[str, Any], config: Config, planned: int) -> Check:
    rate = learning_rate(max(1, checkpoint["iter_num"]), config.optimizer.learning_rate, planned, config.scheduler)
    groups = checkpoint.get("optimizer", {}).get("param_groups", [{}])
    used_rate = groups[0].get("lr", math.nan)
    notes = schedule_notes(config, planned)
    on_schedule = math.isclose(used_rate, rate, rel_tol=1e-6)
    return Check("ok" if on_schedule and not notes else "check", "learning rate",
                 f"{used_rate:.2e}; the schedule ({config.scheduler.type}) has {rate:.2e} at this step",
                 "; ".join(notes) or ("" if on_schedule else "resumed with other steps, or another config"))


def count_used(tokens: np.ndarray, vocab_size: int, chunk: int = 1 << 24) -> int:
    """How many ids of the vocabulary occur in the tokens, in bounded memory."""
    seen = np.zeros(vocab_size, dtype=bool)
    for start in range(0, len(tokens), chunk):
        seen |= np.bincount(tokens[start:start + chunk], minlength=vocab_size)[:vocab_size] > 0
    return int(seen.sum())


def check_likelihood(found: dict[str, Any], step: int, metrics: Sequence[dict], vocab_size: int,
                     dataset: str = "") -> list[Check]:
    """Checks of the loss, of whether it still falls, and of label alignment: which token the model predicts."""
    loss, trend, aim = found["val_loss"], "", GOOD_LOSS.get(dataset, math.inf)
    curve = [(entry["step"], entry["val_loss"]) for entry in metrics
             if entry["type"] == "evaluation" and entry["step"] <= step]
    if earlier := [value for at, value in curve if at <= 0.8 * step]:
        fell = 1 - curve[-1][1] / earlier[-1]
        trend = f"; over the last fifth of its steps it {'fell' if fell > 0 else 'rose'} by {abs(fell):.1%}"
    meaning = ("" if loss < aim < math.inf else "still falling: more steps or epochs would help" if "fell" in trend
               else f"above {aim} grammar is unsteady: train longer, on more stories, or a larger model"
               if aim < math.inf else "")
    against = {"next": found["next_loss"], "after-next": found["after_next_loss"], "current": found["present_loss"]}
    best = min(against, key=against.get)
    # a model that has learned nothing is near ln(vocab_size), and with tied embeddings it repeats its input
    if (best == "after-next" and against[best] > (1 - MARGIN) * against["next"]) or (
            best == "current" and against["next"] < (1 + MARGIN) * math.log(vocab_size)):
        best = "none"
    meanings = {"next": "it predicts the next token, as it should",
                "after-next": "its labels were shifted twice: it skips every second word, articles first",
                "current": "its labels were not shifted: it only repeats its input",
                "none": "no clear difference: it has not learned to predict this text"}
    mark = {"next": "ok", "none": "check"}.get(best, "bad")
    return [Check("ok" if loss < aim else "check", "loss", f"{loss:.4f} nats per token"
                  + (f", the aim is under {aim}" if aim < math.inf else "") + trend, meaning),
            Check(mark, "label alignment", "loss against " + ", ".join(
                  f"the {name} token {value:.2f}" for name, value in against.items()), meanings[best])]
