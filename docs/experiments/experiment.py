"""What the experiments share: their command line, and files of finished runs, named by what they are made from."""

import argparse
import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the project is

from config import Config, UserError, add_config_arguments, load_config
from config.command_line import Parser, positive


def parse_arguments(parser: Parser, config: Path, titles: Collection[str], seeds: int,
                    ) -> tuple[argparse.Namespace, Config]:
    """The command line of an experiment, whose own flags `parser` has already, and the config that it names.

    config: the default of --config. titles: of the variants. seeds: the default of --seeds.
    """
    add_config_arguments(parser, config)
    parser.add_argument("--dataset", help="data.dataset: tinystories, sample, a hub id, a file or a folder")
    parser.add_argument("--validation", help="data.validation: another such source, for the validation stories")
    parser.add_argument("--variants", nargs="+", default=list(titles), choices=titles, metavar="TITLE",
                        help="only these: " + ", ".join(f'"{title}"' for title in titles))
    parser.add_argument("--seeds", type=positive, default=seeds, help="runs of each variant (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints", config.stem), metavar="FOLDER",
                        help="where finished runs, tokenizers and results.md are kept (%(default)s)")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file: name a folder")
    given = {"data.dataset": args.dataset, "data.validation": args.validation}
    overrides = args.overrides + [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return args, load_config(args.config or config, overrides)


def digest(values: Any) -> str:
    """Eight letters that identify plain values, for file names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()[:8]


def tokenizer_folder(out: Path, config: Config, text: Any) -> str:
    """The folder of a tokenizer, one for each size and text. text: plain values that differ where the stories do."""
    return str(out / f"tokenizer-{config.model.vocab_size}-{digest([text, config.to_dict()['tokenizer']])}")


def read_result(path: Path) -> dict[str, Any]:
    """The file of a finished run."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Keep a finished run, so that the same command does not train it again."""
    from data.atomic_files import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8"))
