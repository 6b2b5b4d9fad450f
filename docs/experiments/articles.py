"""Why did the articles go missing? Each theory is trained by itself, with all else as it should be.

    python docs/experiments/articles.py --dataset train.txt --validation valid.txt
    python docs/experiments/articles.py --variants "labels shifted twice" --seeds 1

A finished run is a file in --out and is not trained again: Ctrl-C loses no more than the run under way. results.md and
why_articles.png there show the finished ones. The faults live here only, between train.py's own step and the model: the
project itself knows neither a weighted loss nor a second shift. How a model is measured is in articles_report.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the project is

import torch
import torch.nn.functional as F
from articles_report import AT_THE_END, STORIES, Yardstick, look, report
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, add_config_arguments, config_from_dict, load_config, run_script
from config.cli import Parser, positive
from config.files import replacing
from config.hardware import choose_compile, choose_device, choose_precision
from config.ranks import ALONE
from config.values import counted
from data.stories import open_stories
from data.tokens import END_OF_STORY, IGNORED, TokenFile, article_mask
from train import Run, prepare_run, train_step, try_batch

CONFIG = Path(__file__).with_suffix(".yaml")
POINTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the steps: where a run is looked at


class Variant(NamedTuple):
    """One departure from what should be."""

    title: str
    theory: str
    settings: tuple[str, ...] = ()  # of the config
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
    """As train.py does, without its folder of checkpoints. Returns the validation split too."""
    return prepare_run(config, None, None, choose_device(config.hardware.device), None, ALONE)


def train_variant(variant: Variant, config: Config, yardstick: Yardstick, name: str) -> dict[str, Any]:
    """Train by train.py's own step, and look at POINTS. Returns what is kept of the run, plain values."""
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
    torch.compiler.reset()  # or the models of earlier runs use up the number of compilations that a function may have
    forward, _ = choose_compile(run.model, lambda compiled: try_batch(run, with_fault(compiled), training.batch_size),
                                run.device, training.use_compile, math.inf)  # it pays: all runs share what it makes
    points, shares = [], {max(1, round(share * training.max_steps)): share for share in POINTS}
    for step in tqdm(range(1, training.max_steps + 1), desc=name, unit="step", dynamic_ncols=True,
                     disable=None if training.show_progress else True):
        train_step(run, with_fault(forward), training.max_steps)
        if step in shares:
            if run.broken:
                raise UserError(f"{name}: a gradient was not finite: try a lower optimizer.learning_rate")
            own_loss = torch.stack([loss for _, _, loss, _ in run.unread[-50:]]).mean().item()
            seen = look(run, validation, yardstick, variant.separators, step == training.max_steps)
            points.append({"step": step, "share": shares[step], "own_loss": own_loss, **seen})
    return {"variant": variant.title, "theory": variant.theory, "seed": training.seed, "points": points,
            "real": yardstick.real, "vocabulary": run.tokenizer.get_vocab_size(), "counts": run.train_file.counts}


def plan(config: Config, variant: Variant, seed: int, text: Any, out: Path) -> tuple[Config, Path]:
    """The config of a run and the file that keeps it. text: plain values that differ where the stories do.

    The file and the tokenizer are named by what they are made from: nothing is taken for what it is not.
    """
    config = config_from_dict(config.to_dict(), variant.title,
                              [*variant.settings, f"training.seed={config.training.seed + seed}"])
    values = config.to_dict() | {"data": text}
    tokenizer = out / f"tokenizer-{config.model.vocab_size}-{digest([text, values['tokenizer']])}"
    name = re.sub(r"\W+", "-", variant.title).strip("-")
    path = out / f"{name}-{config.training.seed}-{digest([variant, values, POINTS, STORIES, AT_THE_END])}.json"
    return replace(config, data=replace(config.data, tokenizer_path=str(tokenizer))), path


def digest(values: Any) -> str:
    """Eight letters that other plain values do not have."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()[:8]


def experiment(config: Config, variants: Sequence[Variant], seeds: int, out: Path) -> None:
    """Train what is not in `out` yet, all variants with one seed, then with the next. Report on what is finished."""
    if not config.training.max_steps or config.training.batch_size == "auto":
        raise UserError("training.max_steps and training.batch_size: give numbers, the same for all variants")
    text = [open_stories(config.data, split).identity for split in ("train", "validation")]
    runs = [(variant, *plan(config, variant, seed, text, out)) for seed in range(seeds) for variant in variants]
    missing = [run for run in runs if not run[2].exists()]
    print(f"{counted(len(runs), 'run')}, {len(runs) - len(missing)} of them done before", flush=True)
    yardstick = Yardstick(*prepare(runs[0][1])) if missing else None
    try:
        for number, (variant, made, path) in enumerate(missing, 1):
            name = f"run {number} of {len(missing)}: {variant.title}, seed {made.training.seed}"
            result = train_variant(variant, made, yardstick, name)
            with replacing(path) as file:
                file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
    finally:
        if runs[0][2].exists():  # the base, which all others stand beside
            report([json.loads(path.read_text(encoding="utf-8")) for _, _, path in runs if path.exists()], out)


def parse_arguments(parser: Parser, config: Path, titles: Collection[str], seeds: int,
                    ) -> tuple[argparse.Namespace, Config]:
    """The command line of an experiment, which may have put flags of its own into `parser`, and the config it names.

    config: the default of --config. titles: of the variants. seeds: the default of --seeds.
    """
    add_config_arguments(parser, config)
    parser.add_argument("--dataset", help="data.dataset: tinystories, sample, a hub id, a file or a folder")
    parser.add_argument("--validation", help="data.validation: another such source, for the validation stories")
    parser.add_argument("--variants", nargs="+", default=list(titles), choices=titles, metavar="TITLE",
                        help="only these: " + ", ".join(f'"{title}"' for title in titles))
    parser.add_argument("--seeds", type=positive, default=seeds, help="runs of each, each with its own (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints", config.stem), metavar="FOLDER",
                        help="where finished runs, tokenizers and results.md are kept (%(default)s)")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file: name a folder")
    given = {"data.dataset": args.dataset, "data.validation": args.validation}
    overrides = args.overrides + [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return args, load_config(args.config or config, overrides)


def main() -> None:
    titles = [variant.title for variant in VARIANTS]
    parser = Parser(description=f'Why did the articles go missing? Each theory beside "{BASE.title}".')
    args, config = parse_arguments(parser, CONFIG, titles, seeds=2)
    experiment(config, [of for of in VARIANTS if of is BASE or of.title in args.variants], args.seeds, args.out)


if __name__ == "__main__":
    run_script(main)
