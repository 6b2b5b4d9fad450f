"""Why did the articles go missing? Each theory is trained by itself, with all else as it should be.

    python docs/experiments/articles.py --dataset train.txt --validation valid.txt
    python docs/experiments/articles.py --variants "labels shifted twice" "as it should be" --seeds 1

A finished run is a file in --out and is not trained again, so that Ctrl-C loses no more than the run under way; after
each run results.md and why_articles.png there are made anew. The faults live here only, derived from the batches of
data/tokens.py: the project itself knows neither a weighted loss nor a second shift.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from articles_look import AT_THE_END, STORIES, Text, Yardstick, look, make_yardstick, prepare  # noqa: E402
from articles_report import RESULTS, report  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from config import Config, UserError, add_config_arguments, config_from_dict, load_config, run_script  # noqa: E402
from config.cli import Parser, deferred_interrupts  # noqa: E402
from config.files import replacing  # noqa: E402
from config.hardware import choose_compile, choose_device, choose_precision  # noqa: E402
from config.schedule import learning_rate  # noqa: E402
from data.tokens import END_OF_STORY, IGNORED, article_mask, count_windows, read_batch, training_windows  # noqa: E402
from model import Transformer, flops_per_token  # noqa: E402
from train import make_optimizer  # noqa: E402

CONFIG = Path(__file__).with_suffix(".yaml")
POINTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the steps: where a run is looked at
RIGHT, TWICE, NOT = "right", "shifted twice", "not shifted"


class Variant(NamedTuple):
    """One departure from what should be. settings: of the config. weight: of articles in the loss."""

    title: str
    theory: str
    settings: tuple[str, ...] = ()
    labels: str = RIGHT
    weight: float = 1.0
    separators: bool = True


BASE = Variant("as it should be", "")
VARIANTS = (
    BASE,
    Variant("labels shifted twice", "labels", labels=TWICE),
    Variant("labels not shifted", "labels", labels=NOT),
    Variant("vocabulary 2,000", "vocabulary", ("model.vocab_size=2000",)),
    Variant("vocabulary 4,000", "vocabulary", ("model.vocab_size=4000",)),
    Variant("vocabulary 32,000", "vocabulary", ("model.vocab_size=32000",)),
    Variant("articles weigh 2 times", "weight", weight=2),
    Variant("articles weigh 5 times", "weight", weight=5),
    Variant("articles weigh 10 times", "weight", weight=10),
    Variant("learning rate 5e-5", "learning rate", ("optimizer.learning_rate=5e-5",)),
    Variant("learning rate 5e-4", "learning rate", ("optimizer.learning_rate=5e-4",)),
    Variant("learning rate 5e-3", "learning rate", ("optimizer.learning_rate=5e-3",)),
    Variant("no <|endoftext|>", "separator", separators=False),
)


# The faults

def faulty_targets(labels: str, inputs: Tensor, targets: Tensor) -> Tensor:
    """What a program with this fault takes for the targets, int64, (batch, seq_len).

    inputs, targets: of read_batch, so that targets[t] is token t + 1. Shifted twice, by the data set and once more by
    the model, it is token t + 2, and the last place has none. Not shifted, it is token t.
    """
    if labels == TWICE:
        return F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return inputs.clone() if labels == NOT else targets


def weighted_mean(losses: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean as F.cross_entropy(weight=weights) takes it, (). losses, targets: (batch, seq_len)."""
    share = weights[targets.clamp(min=0)] * (targets != IGNORED)  # (batch, seq_len)
    return (losses * share).sum() / share.sum()


def article_weights(tokenizer: Tokenizer, weight: float) -> Tensor:
    """1 for each token and `weight` for articles, float32, (tokenizer's vocabulary size,)."""
    return torch.from_numpy(np.where(article_mask(tokenizer), weight, 1.0).astype(np.float32))


# A run

def configure(config: Config, variant: Variant, seed: int) -> Config:
    """The config of a run. Each size of vocabulary has its own tokenizer; the rate falls to a tenth in all of them."""
    values = config.to_dict()
    values["scheduler"]["min_lr"] = 0.0  # so that no variant's rate is below it
    varied = config_from_dict(values, variant.title, variant.settings)
    changes = [f"scheduler.min_lr={varied.optimizer.learning_rate / 10}", "training.show_progress=false",
               f"data.tokenizer_path={json.dumps(f'{config.data.tokenizer_path}_{varied.model.vocab_size}')}",
               f"training.seed={config.training.seed + seed}"]
    return config_from_dict(varied.to_dict(), variant.title, changes)


def train_variant(variant: Variant, config: Config, text: Text, yardstick: Yardstick, total_flops: float, bar: tqdm,
                  signals: Sequence[int]) -> dict[str, Any] | None:
    """Train and look at POINTS. Returns what is kept of the run, plain values; None once there is a signal to stop.

    total_flops: of all runs to do.
    """
    device, training, start = choose_device(config.hardware.device), config.training, time.perf_counter()
    tokens, seq_len = text.train_file.tokens, config.model.max_seq_len
    if not variant.separators:
        tokens = tokens[tokens != text.tokenizer.token_to_id(END_OF_STORY)]
    num_windows = count_windows(len(tokens), seq_len)
    if not num_windows:
        raise UserError(f"{config.data.dataset}: {len(tokens):,} tokens are less than one window of {seq_len}")
    torch.manual_seed(training.seed)
    torch.compiler.reset()  # or the models of earlier runs use up the number of compilations that a function may have
    model = Transformer(config.model).to(device)
    optimizer, weights = make_optimizer(model, config), article_weights(text.tokenizer, variant.weight).to(device)
    precision, _ = choose_precision(device, training.use_bf16)

    def loss_of(forward: Callable, windows: np.ndarray) -> Tensor:
        inputs, targets = read_batch(tokens, windows, seq_len, device)
        targets = faulty_targets(variant.labels, inputs, targets)
        with precision():
            losses = forward(inputs, targets, reduction="none")  # (batch, seq_len)
        return weighted_mean(losses, targets, weights)

    first = np.zeros(training.batch_size, dtype=int)
    forward, _ = choose_compile(model, lambda compiled: loss_of(compiled, first).backward(), device,
                                training.use_compile, total_flops)
    optimizer.zero_grad()
    micro, points, losses, position = training.gradient_accumulation_steps, [], [], 0
    shares = {max(1, round(share * training.max_steps)): share for share in POINTS}
    for step in range(1, training.max_steps + 1):
        if signals:
            return None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimizer.learning_rate, training.max_steps, config.scheduler)
        for _ in range(micro):
            loss = loss_of(forward, training_windows(position, training.batch_size, num_windows, training.seed))
            (loss / micro).backward()
            losses.append(loss.detach())
            position += training.batch_size
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step in shares:
            point, passages = look(model.eval(), text, config, yardstick, precision, variant.separators,
                                   step == training.max_steps)
            model.train()
            recent = torch.stack(losses[-50 * micro:]).mean().item()
            points.append({"step": step, "share": shares[step], "own_loss": recent, **point})
    return {"variant": variant.title, "seed": training.seed, "points": points, "counts": text.train_file.counts,
            "vocabulary": text.tokenizer.get_vocab_size(), "trained_tokens": position * seq_len,
            "seconds": time.perf_counter() - start, "stories": [passage._asdict() for passage in passages]}


# All of them

def result_path(out: Path, variant: Variant, config: Config) -> Path:
    """Where the run is kept: other settings have another name, so that nothing is taken for what it is not."""
    values = config.to_dict()
    for key in ("cache_dir", "tokenizer_path"):
        del values["data"][key]
    made_from = json.dumps([variant, values, POINTS, STORIES, AT_THE_END], sort_keys=True)
    name = "-".join("".join(c if c.isalnum() else " " for c in variant.title).split())
    return out / f"{name}-{config.training.seed}-{hashlib.sha256(made_from.encode('utf-8')).hexdigest()[:8]}.json"


def experiment(config: Config, variants: Sequence[Variant], seeds: int, out: Path) -> int:
    """Train what is not in `out` yet: all variants with one seed, then with the next. Then the report of all.

    Returns the exit status: 0, or 128 + the signal that stopped it.
    """
    if not config.training.max_steps:
        raise UserError("training.max_steps null: give a number, which is then the same for all variants")
    runs = [(variant, made, result_path(out, variant, made))
            for seed in range(seeds) for variant in variants for made in [configure(config, variant, seed)]]
    missing, theories = [run for run in runs if not run[2].exists()], {of.title: of.theory for of in variants}
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before; results in {out}", flush=True)
    if missing:
        by_tokenizer = {made.data.tokenizer_path: made for _, made, _ in [runs[0], *missing]}
        texts = {path: prepare(made) for path, made in by_tokenizer.items()}
        yardstick = make_yardstick(texts[runs[0][1].data.tokenizer_path], config.sampling)
    training, steps = config.training, config.training.max_steps * len(missing)
    step_tokens = training.batch_size * training.gradient_accumulation_steps * config.model.max_seq_len
    flops = flops_per_token(Transformer(config.model)) * step_tokens * steps  # together: they share what is compiled
    bar = tqdm(total=steps, unit="step", dynamic_ncols=True,
               disable=None if missing and training.show_progress else True)
    with bar, deferred_interrupts() as signals:
        for variant, made, path in missing:
            name = f"{variant.title}, seed {made.training.seed}"
            bar.set_description(name)
            result = train_variant(variant, made, texts[made.data.tokenizer_path], yardstick, flops, bar, signals)
            if result is None:
                break
            with replacing(path) as file:
                file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
            last = result["points"][-1]
            tqdm.write(f"{name}: {last['bits_per_byte']:.3f} bits per byte, {last['articles'] or math.nan:.1f} "
                       f"articles in 100 words, {result['seconds']:.0f} seconds")
            report([path for _, _, path in runs if path.exists()], theories, out)
    if not missing:
        report([path for _, _, path in runs], theories, out)
    if signals:
        print(f"stopped: the finished runs are in {out}, and the same command goes on from there")
        return 128 + signals[0]
    print((out / RESULTS).read_text(encoding="utf-8"))
    return 0


def main() -> int:
    parser = Parser(description="Why did the articles go missing? Each theory trained by itself.")
    add_config_arguments(parser, CONFIG)
    parser.add_argument("--dataset", help="data.dataset: tinystories, sample, a hub id, a file or a folder")
    parser.add_argument("--validation", help="data.validation: another such source, for the validation stories")
    parser.add_argument("--variants", nargs="+", default=[variant.title for variant in VARIANTS], metavar="TITLE",
                        help=f'only these beside "{BASE.title}": ' + ", ".join(f'"{of.title}"' for of in VARIANTS[1:]))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, with another seed each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/articles"), metavar="FOLDER",
                        help="where finished runs, results.md and the picture are kept (%(default)s)")
    args = parser.parse_args()
    known = {variant.title: variant for variant in VARIANTS}
    if unknown := [title for title in args.variants if title not in known]:
        raise UserError(f"--variants {json.dumps(unknown[0])}: one of {', '.join(map(json.dumps, known))}")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: 1 or more")
    given = {"data.dataset": args.dataset, "data.validation": args.validation}
    overrides = args.overrides + [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    config = load_config(args.config or CONFIG, overrides)
    chosen = [variant for variant in VARIANTS if variant.title in (BASE.title, *args.variants)]
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file: name a folder")
    return experiment(config, chosen, args.seeds, args.out)


if __name__ == "__main__":
    run_script(main)
