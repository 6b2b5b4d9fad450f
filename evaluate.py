"""Did it work? A verdict, a checklist, the validation split's likelihood, and stories compared with real ones.

    python evaluate.py --checkpoint checkpoints/quickstart/best_model.pth
    python evaluate.py --checkpoint X --data some.txt      only how likely the model finds that text, byte for byte
    python evaluate.py --checkpoint X --judge gpt-4o-mini  and have a language model mark the stories
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from config import UserError, check_overrides, config_from_dict, run_script
from config.command_line import Parser, file_path, not_negative, parse_before_imports, positive


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Evaluate a checkpoint: checks, likelihood, and generated stories beside "
                    "real ones.")
    parser.add_argument("--checkpoint", type=file_path, help="a .pth file, or a folder of Hugging Face "
                        "transformers (default: the best model of the newest run under checkpoints/)")
    parser.add_argument("--data", metavar="FILE", help="only score this text, a file, folder or glob, byte for byte: "
                        "models with different tokenizers compare in bits per byte")
    parser.add_argument("--num_stories", type=not_negative, default=200, help="how many stories to generate and "
                        "compare with as many real ones; 0: none (%(default)s)")
    parser.add_argument("--judge", metavar="MODEL", help="have this model mark stories; needs OPENAI_API_KEY or a "
                        "--judge_url, and costs what its calls cost")
    parser.add_argument("--judge_url", metavar="URL", help="an OpenAI-compatible address, such as that of a local "
                        "server: http://localhost:8080/v1")
    parser.add_argument("--judge_stories", type=positive, default=50, help="how many stories, and as many real ones, "
                        "to mark (%(default)s)")
    parser.add_argument("--yes", action="store_true", help="do not ask before --judge begins")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="write the result, with the stories, as JSON")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the checkpoint's config; may be given many times")
    args = parser.parse_args()
    check_overrides(args.overrides)
    check_judge(args)
    for override in args.overrides:
        if override.strip().startswith("model."):
            raise UserError(f"--set {override}: the model is the checkpoint's, and cannot be changed here")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}: create it, or name another file")
    if args.out and not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: the folder {args.out.parent} cannot be written to: name another file")
    return args


def check_judge(args: argparse.Namespace) -> None:
    """Raise UserError if the judge cannot be asked with these arguments."""
    if not args.judge:
        if args.judge_url:
            raise UserError("--judge_url: name the model, too: --judge MODEL")
        return
    if args.data or not args.num_stories:
        raise UserError("--judge: marks generated stories: leave out --data and --num_stories 0")
    if importlib.util.find_spec("openai") is None:
        raise UserError("--judge needs the package openai: pip install openai")
    if not args.judge_url and not os.environ.get("OPENAI_API_KEY"):
        raise UserError("--judge: set the environment variable OPENAI_API_KEY, or name a local server by --judge_url")
    if not args.yes and not sys.stdin.isatty():
        raise UserError("--judge: costs what its calls cost, and there is no terminal to ask on: confirm by --yes")


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

from data.atomic_files import atomic_write
from device import explain_out_of_memory
from evaluation.full_evaluation import evaluate_checkpoint
from evaluation.judge import Judge, describe, judge_stories
from evaluation.report import update_report
from training.checkpoints import load_checkpoint, newest_checkpoint
from training.run_folder import EVALUATION

JUDGE = "judge.json"  # beside the checkpoint


def confirm(yes: bool, cost: str) -> None:
    """Ask whether the judge is worth its cost. Raises UserError if not."""
    print(f"The judge: {cost}.")
    if yes:
        return
    with contextlib.suppress(EOFError):  # Ctrl-D
        if input("Continue? [y/N] ").strip().lower() in ("y", "yes"):
            return
    raise UserError("--judge: cancelled")


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write what --out asks for, and show it in the report if it is the run's own evaluation."""
    if path is None:
        return
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
    print(f"\nwritten: {path}")
    if path.name == EVALUATION and "table" in result and (warning := update_report(path.parent)):
        print(warning)


@explain_out_of_memory("close what else uses the device, or compute on the CPU with --set hardware.device=cpu")
def main(args: argparse.Namespace) -> None:
    if args.out and (args.out.is_dir() or (args.out.exists() and args.out.name != EVALUATION)):
        raise UserError(f"--out {args.out}: exists already; name another file, or remove it (only {EVALUATION} is "
                        "replaced)")
    path = args.checkpoint or newest_checkpoint()
    config = config_from_dict(load_checkpoint(path)["config"], str(path), args.overrides)
    result = evaluate_checkpoint(config, path, print, args.data, args.num_stories)
    write_result(args.out, result)  # before a judge, who may fail
    if args.judge and "stories" not in result:
        raise UserError("--judge: there are no stories to mark, as the note above says")
    if args.judge:
        judge, count = Judge(args.judge, args.judge_url), args.judge_stories
        print()
        result["judge"] = judge_stories(judge, result["stories"][:count], result["references"][:count],
                                        path.parent / JUDGE, functools.partial(confirm, args.yes),
                                        config.training.show_progress)
        print("\n".join(describe(result["judge"])), f"\nwritten: {path.parent / JUDGE}", sep="\n")
        write_result(args.out, result)


if __name__ == "__main__":
    run_script(main, arguments)
