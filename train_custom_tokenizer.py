"""Train a byte-level BPE tokenizer on stories.

    python train_custom_tokenizer.py --vocab_size 10000 --output_dir ./tokenizer/tinystories_10k --max_samples 100000
    python train_custom_tokenizer.py --from gpt2 --vocab_size 10000 --output_dir ./tokenizer/gpt2_10k    trim GPT-2's

train.py does this by itself if data.tokenizer_path has no tokenizer. The folder holds tokenizer.json, which is all
that this project reads, and tokenizer_config.json, with which transformers.AutoTokenizer opens the folder too.
"""

import json
from pathlib import Path

from config import Config, UserError, add_config_arguments, load_config, run_script
from config.command_line import MAIN_CONFIG, Parser, parse_before_imports, positive


def parse_arguments() -> tuple[Config, str | None]:
    """The config, with the flags of the command line applied, and --from."""
    parser = Parser(description="Train a byte-level BPE tokenizer on stories.")
    add_config_arguments(parser, MAIN_CONFIG)
    parser.add_argument("--vocab_size", type=lambda text: positive(text, low=259),
                        help="all tokens, with the 256 bytes and 3 special tokens (model.vocab_size)")
    parser.add_argument("--output_dir", help="where to write the tokenizer (data.tokenizer_path)")
    parser.add_argument("--max_samples", type=positive, help="how many stories to train on (tokenizer.max_samples)")
    parser.add_argument("--min_frequency", type=positive,
                        help="pairs that occur less often are not merged (tokenizer.min_frequency)")
    parser.add_argument("--from", dest="source", metavar="FOLDER_OR_HUB_ID", help="trim this byte-level BPE, such as "
                        "gpt2, to the tokens that the stories use most, instead of training one")
    parser.add_argument("--dataset", help="tinystories, sample, a hub id, a file or a folder (data.dataset)")
    args = parser.parse_args()
    flags = {"model.vocab_size": args.vocab_size, "data.tokenizer_path": args.output_dir,
             "tokenizer.max_samples": args.max_samples, "tokenizer.min_frequency": args.min_frequency,
             "data.dataset": args.dataset}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]  # JSON is quoted YAML
    return load_config(args.config or MAIN_CONFIG, args.overrides + given), args.source


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

from data.tokenizer import make_tokenizer
from data.trimmed_tokenizer import compare_with_trained, read_bpe, trim_tokenizer


def main(arguments: tuple[Config, str | None]) -> None:
    config, source = arguments
    path = Path(config.data.tokenizer_path).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file: name a folder with --output_dir")
    if (path / "tokenizer.json").exists():  # token files and runs may depend on it
        raise UserError(f"{path}: holds a tokenizer already, which is kept: name another folder with --output_dir")
    if source is None:
        make_tokenizer(config, path)
        return
    bpe = read_bpe(source)
    tokenizer = make_tokenizer(config, path, lambda stories: trim_tokenizer(bpe, stories, config.model.vocab_size))
    print(f"tokenizer: {compare_with_trained(tokenizer, config)}")


if __name__ == "__main__":
    run_script(main, arguments)
