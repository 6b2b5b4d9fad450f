"""Why did the articles go missing? Each theory is trained by itself, with all else as it should be.

    python docs/experiments/articles.py --dataset train.txt --validation valid.txt
    python docs/experiments/articles.py --variants "labels shifted twice" --seeds 1

A finished run is a file in --out and is not trained again, so Ctrl-C loses only the run in progress. results.md and
why_articles.png there show the finished runs. The faults exist only here, between train.py's own step and the model:
the project itself has neither a weighted loss nor a second shift. articles_report.py measures the models.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from articles_report import AT_THE_END, STORIES, References, measure_run, report
from experiment import digest, parse_arguments, read_result, tokenizer_folder, write_result  # finds the project, too
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, config_from_dict, run_script
from config.command_line import Parser
from config.wording import counted
from data.batches import IGNORED
from data.stories import open_stories
from data.token_files import TokenFile
from data.tokenizer import END_OF_STORY, article_mask
from device import choose_compile, choose_device, choose_precision
from train import Run, prepare_run, probe_batch, train_step
from training.distributed import SINGLE_PROCESS

CONFIG = Path(__file__).with_suffix(".yaml")
POINTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # fractions of the steps at which a run is measured


class Variant(NamedTuple):
    """One fault."""

    title: str
    theory: str
    settings: tuple[str, ...] = ()  # config overrides
    ahead: int = 1  # the target of token t is token t + ahead
    article_weight: float = 1.0  # in the loss
    separators: bool = True  # between the stories


BASE = Variant("as it should be", "")
VARIANTS = (
    BASE,
    Variant("labels shifted twice", "labels", ahead=2),
    Variant("labels not shifted", "labels", ahead=0),
    Variant("vocabulary 2,000", "vocabulary", ("model.vocab_size=2000",)),
    Variant("vocabulary 4,000", "vocabulary", ("model.vocab_size=4000",)),
    Variant("vocabulary 32,000", "vocabulary", ("model.vocab_size=32000",)),
    Variant("articles weigh 2 times", "weight", article_weight=2),
    Variant("articles weigh 5 times", "weight", article_weight=5),
    Variant("articles weigh 10 times", "weight", article_weight=10),
    Variant("learning rate 5e-5", "learning rate", ("optimizer.learning_rate=5e-5", "scheduler.min_lr=5e-6")),
    Variant("learning rate 5e-4", "learning rate", ("optimizer.learning_rate=5e-4", "scheduler.min_lr=5e-5")),
    Variant("learning rate 5e-3", "learning rate", ("optimizer.learning_rate=5e-3", "scheduler.min_lr=5e-4")),
    Variant("no <|endoftext|>", "separator", separators=False),
)


# The faults

def faulty_targets(ahead: int, inputs: Tensor, targets: Tensor) -> Tensor:
    """Targets `ahead` tokens from the inputs, 0, 1 or 2, int64, (batch, seq_len).

    inputs, targets: of read_batch, so that targets[t] is token t + 1. Shifted twice, by the data set and once more by
    the model, it is token t + 2, and the last place has none.
    """
    return (inputs, targets, F.pad(targets[:, 1:], (0, 1), value=IGNORED))[ahead]


def weighted_mean(losses: Tensor, targets: Tensor, is_article: Tensor, weight: float) -> Tensor:
    """The mean in which an article counts `weight` times, as F.cross_entropy takes it with weights, ().

    losses, targets: (batch, seq_len). is_article: bool, (tokenizer's vocabulary size,).
    """
    share = torch.where(is_article[targets.clamp(min=0)], weight, 1.0) * (targets != IGNORED)  # (batch, seq_len)
    return (losses * share).sum() / share.sum()


# The runs

def prepare(config: Config) -> tuple[Run, TokenFile]:
    """Prepare a run as train.py does, but without a folder of checkpoints. Returns the validation split too."""
    return prepare_run(config, None, None, choose_device(config.hardware.device), None, SINGLE_PROCESS)


def train_variant(variant: Variant, config: Config, references: References, name: str) -> dict[str, Any]:
    """Train with train.py's own step, and measure at POINTS. Returns the result of the run, plain values."""
    (run, validation), training = prepare(config), config.training
    if not variant.separators:
        tokens = run.train_file.tokens
        run.train_file = replace(run.train_file, tokens=tokens[tokens != run.tokenizer.token_to_id(END_OF_STORY)])
    is_article = torch.from_numpy(article_mask(run.tokenizer)).to(run.device)

    def with_fault(forward: Callable) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            targets = faulty_targets(variant.ahead, inputs, targets)
            losses = forward(inputs, targets, reduction="none")  # (batch, seq_len)
            return weighted_mean(losses, targets, is_article, variant.article_weight)
        return loss

    run.precision, _ = choose_precision(run.device, training.use_bf16)
    torch.compiler.reset()  # otherwise earlier runs use up the compilations that a function may have
    forward, _ = choose_compile(run.model, lambda compiled: probe_batch(run, with_fault(compiled), training.batch_size),
                                run.device, training.use_compile, math.inf)  # all runs share the compiled code
    points, measured_at = [], {max(1, round(share * training.max_steps)): share for share in POINTS}
    for step in tqdm(range(1, training.max_steps + 1), desc=name, unit="step", dynamic_ncols=True,
                     disable=None if training.show_progress else True):
        train_step(run, with_fault(forward), training.max_steps)
        if step in measured_at:
            if run.found_inf:
                raise UserError(f"{name}: a gradient was not finite: try a lower optimizer.learning_rate")
            own_loss = torch.stack([loss for _, _, loss, _ in run.pending[-50:]]).mean().item()
            found = measure_run(run, validation, references, variant.separators, step == training.max_steps)
            points.append({"step": step, "share": measured_at[step], "own_loss": own_loss, **found})
    return {"variant": variant.title, "theory": variant.theory, "seed": training.seed, "points": points,
            "real": references.real, "vocabulary": run.tokenizer.get_vocab_size(), "counts": run.train_file.counts}


def plan(config: Config, variant: Variant, seed: int, text: Any, out: Path) -> tuple[Config, Path]:
    """The config of a run, and the file of its result. text: plain values that differ where the stories do.

    The names of the file and of the tokenizer identify what they are made from.
    """
    config = config_from_dict(config.to_dict(), variant.title,
                              [*variant.settings, f"training.seed={config.training.seed + seed}"])
    values = config.to_dict() | {"data": text}
    name = re.sub(r"\W+", "-", variant.title).strip("-")
    path = out / f"{name}-{config.training.seed}-{digest([variant, values, POINTS, STORIES, AT_THE_END])}.json"
    return replace(config, data=replace(config.data, tokenizer_path=tokenizer_folder(out, config, text))), path


def experiment(config: Config, variants: Sequence[Variant], seeds: int, out: Path) -> None:
    """Train the runs that are not in `out` yet, all variants with one seed, then the next; report all."""
    if not config.training.max_steps or config.training.batch_size == "auto":
        raise UserError("training.max_steps and training.batch_size: give numbers, the same for all variants")
    text = [open_stories(config.data, split).identity for split in ("train", "validation")]
    runs = [(variant, *plan(config, variant, seed, text, out)) for seed in range(seeds) for variant in variants]
    missing = [run for run in runs if not run[2].exists()]
    print(f"{counted(len(runs), 'run')}, {len(runs) - len(missing)} of them done before", flush=True)
    references = References(*prepare(runs[0][1])) if missing else None
    try:
        for number, (variant, made, path) in enumerate(missing, 1):
            name = f"run {number} of {len(missing)}: {variant.title}, seed {made.training.seed}"
            write_result(path, train_variant(variant, made, references, name))
    finally:
        if runs[0][2].exists():  # the base, which all others are compared with
            report([read_result(path) for _, _, path in runs if path.exists()], out)


def main(nothing: None = None) -> None:
    titles = [variant.title for variant in VARIANTS]
    parser = Parser(description=f'Why did the articles go missing? Each theory compared with "{BASE.title}".')
    args, config = parse_arguments(parser, CONFIG, titles, seeds=2)
    experiment(config, [of for of in VARIANTS if of is BASE or of.title in args.variants], args.seeds, args.out)


if __name__ == "__main__":
    run_script(main, None)
