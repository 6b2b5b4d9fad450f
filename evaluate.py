"""Did it work? A checklist, the likelihood of the validation split, and generated stories compared with real ones.

    python evaluate.py --checkpoint checkpoints/quickstart/best_model.pth
    python evaluate.py --checkpoint X --data some.txt      only how likely the model finds that text, byte for byte
"""

import argparse
import json
import os
from pathlib import Path

from config import UserError, check_overrides, config_from_dict, run_script
from config.command_line import Parser, not_negative, parse_before_imports


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Did it work? Checks, likelihood and stories of a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file (default: the newest under checkpoints/)")
    parser.add_argument("--data", metavar="FILE", help="only score this text, a file, folder or glob, byte for byte: "
                        "models with different tokenizers compare in bits per byte")
    parser.add_argument("--num_stories", type=not_negative, default=200, help="how many stories to generate and "
                        "compare with as many real ones; 0: none (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the whole result, with the stories, as JSON")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the checkpoint's config; may be given many times")
    args = parser.parse_args()
    check_overrides(args.overrides)
    for override in args.overrides:
        if override.strip().startswith("model."):
            raise UserError(f"--set {override}: the model is the checkpoint's, and cannot be changed here")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}: create it, or name another file")
    if args.out and not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: the folder {args.out.parent} cannot be written to: name another file")
    return args


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

from data.atomic_files import atomic_write
from evaluation.full_evaluation import evaluate_checkpoint
from evaluation.report import update_report
from training.checkpoints import load_checkpoint, newest_checkpoint
from training.run_folder import EVALUATION


def main(args: argparse.Namespace) -> None:
    if args.out and (args.out.is_dir() or (args.out.exists() and args.out.name != EVALUATION)):
        raise UserError(f"--out {args.out}: exists already; name another file, or remove it (only {EVALUATION} is "
                        "replaced)")
    path = args.checkpoint or newest_checkpoint()
    config = config_from_dict(load_checkpoint(path)["config"], str(path), args.overrides)
    result = evaluate_checkpoint(config, path, print, args.data, args.num_stories)
    if args.out:
        with atomic_write(args.out) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
        print(f"\nwritten: {args.out}")
        if args.out.name == EVALUATION and "table" in result and (warning := update_report(args.out.parent)):
            print(warning)


if __name__ == "__main__":
    run_script(main, arguments)
