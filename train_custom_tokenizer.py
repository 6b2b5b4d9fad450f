"""Train a byte-level BPE tokenizer on stories.

    python train_custom_tokenizer.py --vocab_size 10000 --output_dir ./tokenizer/tinystories_10k --max_samples 100000

train.py does this by itself when data.tokenizer_path is not there yet. The folder holds tokenizer.json, which is all
that this project reads, and tokenizer_config.json, with which transformers.AutoTokenizer opens it too.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from config import Config, UserError, add_config_arguments, load_config, run_script
from config.cli import MAIN_CONFIG, Parser, check_first, positive


def parse_arguments() -> Config:
    """The config, with what the command line changes in it."""
    parser = Parser(description="Train a byte-level BPE tokenizer on stories.")
    add_config_arguments(parser, MAIN_CONFIG)
    parser.add_argument("--vocab_size", type=lambda text: positive(text, low=259), help="all tokens, the 256 bytes and "
                        "3 special ones too (model.vocab_size)")
    parser.add_argument("--output_dir", help="where to write it (data.tokenizer_path)")
    parser.add_argument("--max_samples", type=positive, help="stories to learn from (tokenizer.max_samples)")
    parser.add_argument("--min_frequency", type=positive, help="a pair seen less often is not merged (tokenizer.min_"
                        "frequency)")
    parser.add_argument("--dataset", help="tinystories, sample, a hub id, a file or a folder (data.dataset)")
    args = parser.parse_args()
    flags = {"model.vocab_size": args.vocab_size, "data.tokenizer_path": args.output_dir,
             "tokenizer.max_samples": args.max_samples, "tokenizer.min_frequency": args.min_frequency,
             "data.dataset": args.dataset}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]  # JSON is YAML, quoted
    return load_config(args.config or MAIN_CONFIG, args.overrides + given)


if __name__ == "__main__":
    check_first(parse_arguments)  # a mistake is told at once, before seconds of importing what follows

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config.files import only_one, remove_leftovers, replacing
from data.stories import open_stories
from data.tokens import END_OF_STORY, SPECIAL_TOKENS, load_tokenizer, tokenizer_from_json

REPORT_STORIES = 1_000  # held-out stories that the report measures on


def train_tokenizer(stories: Iterable[str], vocab_size: int, min_frequency: int = 2,
                    show_progress: bool = True) -> Tokenizer:
    """Learn a byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) of at most vocab_size tokens.

    Ids: the special tokens from 0, then all 256 bytes, so that every text can be encoded, then merges by frequency.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size}: at least {256 + len(SPECIAL_TOKENS)} "
                        f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, show_progress=show_progress,
                                  special_tokens=list(SPECIAL_TOKENS),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer_from_json(tokenizer.to_str(), "the new tokenizer")


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the folder. tokenizer.json comes last and in one move: while it is missing, there is no tokenizer."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_STORY, "eos_token": END_OF_STORY,
                "pad_token": SPECIAL_TOKENS[1], "unk_token": SPECIAL_TOKENS[2], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))


def tokenizer_report(tokenizer: Tokenizer, vocab_size: int, held_out: list[str]) -> list[str]:
    """Lines to print: the size, bytes per token, the articles' ids, and the round trip of every held-out story."""
    actual = tokenizer.get_vocab_size()
    size = f"vocabulary: {actual:,} tokens"
    if actual < vocab_size:
        size += (f" of the {vocab_size:,} asked for: no pair of tokens was left that occurs min_frequency times; "
                 "more or more varied stories would fill it")
    encodings = tokenizer.encode_batch(held_out, add_special_tokens=False)
    num_bytes = sum(len(story.encode("utf-8")) for story in held_out)
    num_tokens = sum(len(encoding.ids) for encoding in encodings)
    wrong = sum(tokenizer.decode(encoding.ids) != story for encoding, story in zip(encodings, held_out, strict=True))
    articles = []
    for article in (" a", " the", " an"):
        ids = tokenizer.encode(article, add_special_tokens=False).ids
        articles.append(f"'{article}' {ids[0]}" if len(ids) == 1 else f"'{article}' takes {len(ids)} tokens")
    return [size, f"bytes per token: {num_bytes / max(1, num_tokens):.2f} on {len(held_out):,} held-out stories",
            f"articles (right: one token each): {', '.join(articles)}",
            f"round trip: {len(held_out) - wrong:,} of {len(held_out):,} held-out stories come back byte for byte"]


def make_tokenizer(config: Config, folder: str | Path) -> Tokenizer:
    """Train on the config's stories, save to folder, and print the report. Ctrl-C leaves nothing half-written."""
    folder = Path(folder).expanduser()
    try:  # now, not after the work
        tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}): set data.tokenizer_path (--output_dir) "
                        "to another folder") from None
    stories = open_stories(config.data, "train")
    print(f"tokenizer: training {config.model.vocab_size:,} tokens on up to {config.tokenizer.max_samples:,} stories "
          f"of {stories.name}")
    tokenizer = train_tokenizer(itertools.islice(stories, config.tokenizer.max_samples), config.model.vocab_size,
                                config.tokenizer.min_frequency,
                                config.training.show_progress and sys.stderr.isatty())
    held_out = list(itertools.islice(open_stories(config.data, "validation"), REPORT_STORIES))
    for line in tokenizer_report(tokenizer, config.model.vocab_size, held_out):
        print(f"tokenizer: {line}")
    save_tokenizer(tokenizer, folder)
    print(f"tokenizer: saved to {folder}")
    return tokenizer


def ensure_tokenizer(config: Config, saved: str | None = None, source: Path | None = None) -> Tokenizer:
    """The tokenizer of data.tokenizer_path; trained first if it is not there. Raises UserError if it does not fit.

    saved: the tokenizer.json that the checkpoint `source` holds, which is taken whatever became of the folder.
    """
    if saved:
        return tokenizer_from_json(saved, str(source))
    path = Path(config.data.tokenizer_path).expanduser()
    if not (path / "tokenizer.json").exists() and not path.is_file():
        with only_one(path / ".lock", f"tokenizer: {path}: another program is training it: waiting", wait=True):
            if not (path / "tokenizer.json").exists():
                remove_leftovers(path, "tokenizer.json")
                return make_tokenizer(config, path)
    tokenizer, wanted = load_tokenizer(path), config.model.vocab_size
    size = tokenizer.get_vocab_size()
    if size > wanted:
        raise UserError(f"{path}: has {size:,} tokens, but model.vocab_size is {wanted:,}: raise vocab_size, or set "
                        "data.tokenizer_path to a new folder, where a smaller one is then trained")
    separator = tokenizer.token_to_id(END_OF_STORY)
    if config.model.mask_stories and separator != SPECIAL_TOKENS.index(END_OF_STORY):  # where the model looks for it
        raise UserError(f"{path}: {END_OF_STORY} is its token {separator}, and model.mask_stories needs it at 0: set "
                        "that to false, or data.tokenizer_path to a new folder, where one is then trained")
    print(f"tokenizer: {path}: reused, {size:,} tokens"
          + (f"; model.vocab_size is {wanted:,}, the rows beyond stay unused" if size < wanted else ""))
    if size < wanted / 2:
        print(f"warning: that is less than half of model.vocab_size: if {path} was trained on other stories or for "
              "another size, set data.tokenizer_path to a new folder")
    return tokenizer


def main() -> None:
    config = parse_arguments()
    path = Path(config.data.tokenizer_path).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file: name a folder with --output_dir")
    if (path / "tokenizer.json").exists():  # token files and runs may rest on it
        raise UserError(f"{path}: holds a tokenizer already, which is kept: name another folder with --output_dir")
    make_tokenizer(config, path)


if __name__ == "__main__":
    run_script(main)
