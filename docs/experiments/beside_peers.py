"""This project beside the models and the recipes of llama2.c and nanoGPT, at equal times of training on this machine.

    python docs/experiments/beside_peers.py --peers FOLDER --dataset train.txt --validation valid.txt --minutes 5 15

FOLDER has llama2.c/model.py and nanoGPT/model.py, which run from there. "ours" is --config. The others have its text,
tokenizer, shape, tokens per step, order of the sequences, bf16, torch.compile and loop; and the AdamW, clipping and
schedule of their own train.py, at its learning rate and at two, four and eight times that. The warm-up of all is a
twentieth of the steps. Starting, compiling and evaluating do not count: first the speed of each is measured, in turns,
and its product with the minutes is the number of tokens that each trains on.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import digest, parse_arguments, read_result, tokenizer_folder, write_result  # finds the project, too
from fixed_hour import measure_speeds, start_training
from tqdm import tqdm

from config import Config, UserError, config_from_dict, run_script
from config.command_line import Parser
from data.stories import open_stories
from data.token_files import prepare_tokens
from data.tokenizer import ensure_tokenizer
from device import keep_freed_memory
from evaluation.validation import evaluate
from model import Transformer, count_parameters
from tests.benchmarks.training import peers
from training.run import Run

CONFIG = Path(__file__).resolve().parents[2] / "config" / "tinystories_cpu.yaml"
OURS = "ours"
RECIPES = {"llama2.c": (5e-4, 0.0), "nanoGPT": (6e-4, 0.1)}  # the rate of its train.py, and the share of it at the end
FACTORS = (1, 2, 4, 8)
TITLES = {OURS: (OURS, 1)} | {f"{name}, rate {factor * rate:g}": (name, factor)
                              for name, (rate, _) in RECIPES.items() for factor in FACTORS}


def configure(config: Config, title: str, seed: int = 0, steps: int = 0) -> Config:
    """The config of a run of so many steps: ours, or with the optimizer and the schedule of a peer."""
    name, factor = TITLES[title]
    overrides = [f"training.seed={config.training.seed + seed}", f"scheduler.warmup_steps={steps // 20}"]
    if name != OURS:
        rate, end = RECIPES[name]
        overrides += ["optimizer.type=adamw", f"optimizer.learning_rate={factor * rate}", "scheduler.type=cosine",
                      "optimizer.muon_learning_rate=null", f"scheduler.min_lr={factor * rate * end}",
                      "optimizer.adam_beta1=0.9", "optimizer.adam_beta2=0.95", "optimizer.weight_decay=0.1",
                      "optimizer.max_grad_norm=1.0", "model.mask_stories=false"]
    return config_from_dict(config.to_dict(), title, overrides)


def table(results: Sequence[dict[str, Any]]) -> str:
    """For each time, a line for each title: the mean of its seeds, and the lowest and the highest."""
    lines = []
    for minutes in sorted({result["minutes"] for result in results}):
        lines += [f"At {minutes:g} minutes of this machine:", "",
                  "| | parameters | tokens/s | tokens trained | runs | nats per token | bits per byte |",
                  "|---|---|---|---|---|---|---|"]
        for title in TITLES:
            if of := [result for result in results if (result["minutes"], result["title"]) == (minutes, title)]:
                bits, nats = ([result[key] for result in of] for key in ("bits_per_byte", "val_loss"))
                spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(of) > 1 else ""
                lines.append(f"| {title} | {of[0]['parameters'] / 1e6:.2f}M | {of[0]['speed']:,.0f} | "
                             f"{of[0]['tokens'] / 1e6:.2f}M | {len(of)} | {sum(nats) / len(of):.4f} | "
                             f"{sum(bits) / len(of):.4f}{spread} |")
        lines.append("")
    return "\n".join(lines)


def main(nothing: None = None) -> int:
    parser = Parser(description="This project beside llama2.c and nanoGPT, at equal times of training.")
    parser.add_argument("--peers", type=Path, required=True, help="has llama2.c/model.py and nanoGPT/model.py")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0, 45.0], help="of training (5 15 45)")
    args, config = parse_arguments(parser, CONFIG, TITLES, seeds=3)
    if not all(0 < minutes < math.inf for minutes in args.minutes):
        raise UserError("--minutes: more than 0")
    if config.training.batch_size == "auto" or config.model.dropout:
        raise UserError("training.batch_size must be a number and model.dropout 0, since the peers have the same")
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 64  # all models are compiled in this one process
    out, text = args.out, [open_stories(config.data, split).identity for split in ("train", "validation")]
    config = config_from_dict(config.to_dict(), "tokenizer", [
        f'data.tokenizer_path="{Path(tokenizer_folder(out, config, text)).as_posix()}"'])
    tokenizer = ensure_tokenizer(config)
    train_file, validation = (prepare_tokens(config.data, tokenizer, split) for split in ("train", "validation"))
    makers = {OURS: lambda: Transformer(config.model), **peers(args.peers, config)}
    if absent := sorted({TITLES[title][0] for title in args.variants} - set(makers)):
        raise UserError(f"--peers {args.peers}: has no {absent[0]}/model.py")

    def start(title: str, varied: Config) -> tuple[Run, Callable[[int], float]]:
        return start_training(varied, makers[TITLES[title][0]], train_file)

    identities = {title: digest([configure(config, title).to_dict(), text]) for title in TITLES}
    configs = {title: configure(config, title) for title in args.variants}
    speeds = measure_speeds(configs, out / "speeds.json", lambda title: functools.partial(
        start(title, configs[title])[1], 10**9), {title: name for title, (name, _) in TITLES.items()})
    step_tokens = config.sequences_per_step * config.model.max_seq_len
    for minutes in sorted(args.minutes):
        for seed in range(args.seeds):
            for title in args.variants:
                path = out / f"{title.replace(', rate ', '-')}-{identities[title]}-{minutes:g}-{seed}.run.json"
                if path.exists():
                    continue
                torch.compiler.reset()
                steps = max(1, round(speeds[title] * minutes * 60 / step_tokens))
                run, step = start(title, configure(config, title, seed, steps))
                for _ in tqdm(range(steps), desc=f"{title}, {minutes:g} minutes, seed {seed}", unit="step"):
                    step(steps)
                result = evaluate(run.model, validation, tokenizer, run.config, run.device, run.precision)
                write_result(path, {"title": title, "minutes": minutes, "seed": run.config.training.seed,
                                    "speed": speeds[title], "tokens": steps * step_tokens,
                                    "parameters": count_parameters(run.model), **result})
    found = [read_result(path) for title in TITLES for path in sorted(out.glob(f"*-{identities[title]}-*.run.json"))]
    print(f"\n{table(found)}")
    return 0


if __name__ == "__main__":
    run_script(main, None)
