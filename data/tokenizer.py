"""The byte-level BPE tokenizer: loading and checking, byte lengths, and training.

train_custom_tokenizer.py calls make_tokenizer(), which always trains one; train.py calls ensure_tokenizer().
"""

import contextlib
import itertools
import json
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from config import Config, UserError
from config.wording import counted, one_line
from data.atomic_files import atomic_write, file_lock, remove_partial_files
from data.stories import open_stories

END_OF_STORY = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_STORY, "<|padding|>", "<unk>")  # ids 0, 1, 2
ARTICLES = ("a", "an", "the")
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_STORY, "eos_token": END_OF_STORY,
            "pad_token": SPECIAL_TOKENS[1], "unk_token": SPECIAL_TOKENS[2], "clean_up_tokenization_spaces": False}
LONG_WORD = re.compile(r"(?:[^\W\d_]{100}|\d{100}|(?:[^\w\s]|_){100})(?=\S)")
REPORT_STORIES = 1_000  # held-out stories that tokenizer_report() measures
tqdm.set_lock(threading.RLock())  # of tqdm's own lock, Python reports a leaked semaphore if a signal ends the program


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer folder, or its tokenizer.json. Raises UserError."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer; train one with python train_custom_tokenizer.py")
    return tokenizer_from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def tokenizer_from_json(text: str, source: str) -> Tokenizer:
    """Build a tokenizer from the text of a tokenizer.json. Raises UserError if it is not usable here.

    It must encode every byte and have END_OF_STORY. Saved truncation and padding are removed, since they would cut
    stories silently.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{source}: not a tokenizer.json ({str(error).splitlines()[0]}); train it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a story or a prompt that spells "<|endoftext|>" is text like any other
    vocabulary = tokenizer.get_vocab()
    if END_OF_STORY not in vocabulary:
        raise UserError(f"{source}: has no {END_OF_STORY} token, which separates stories; train it again")
    missing = sum(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    if missing:
        raise UserError(f"{source}: lacks {missing} of the 256 bytes, so it would lose text; train it again")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{source}: its ids are not 0 to {len(vocabulary) - 1}, each once; train it again")
    return tokenizer


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes in a byte-level BPE (Radford et al., 2019)."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}  # these bytes stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token id; none of special tokens. A byte-level BPE writes each byte as one character."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    return [b"" if index in special else bytes(byte_of[character] for character in token)
            if byte_of.keys() >= set(token) else token.encode("utf-8") for index, token in enumerate(tokens)]


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The number of UTF-8 bytes of each token id, int64, shape (tokenizer's vocabulary size,); 0 for special tokens."""
    return np.array([len(of_token) for of_token in token_bytes(tokenizer)], dtype=np.int64)


def article_mask(tokenizer: Tokenizer, articles: Sequence[str] = ARTICLES) -> np.ndarray:
    """Which token ids are one of these words (a, an or the), bool, shape (tokenizer's vocabulary size,).

    These are " a" with the space before it, and a capital as at the start of a text or after a quotation mark ("The").
    A bare "a" does not count, since it is mostly a piece of a rarer word. In a vocabulary too small for the common
    words, " a" also begins some of those words, and counts there too.
    """
    words = {"Ġ" + word for article in articles for word in (article, article.capitalize())}
    words |= {article.capitalize() for article in articles}
    mask = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for token, index in tokenizer.get_vocab().items():
        mask[index] = token in words
    return mask


def is_english(texts: Sequence[str]) -> bool:
    """Whether texts are English, by the share of "the" among their words; "a" is a word of other languages, too."""
    words = " ".join(texts).lower().split()
    return words.count("the") > 0.01 * len(words)


def train_tokenizer(stories: Iterable[str], vocab_size: int, min_frequency: int = 2,
                    show_progress: bool = True) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) of at most vocab_size tokens.

    The ids are the special tokens, then all 256 bytes, so that every text can be encoded, then merges by frequency.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
                                  special_tokens=list(SPECIAL_TOKENS),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    stories = tqdm(stories, desc="tokenizer", unit=" stories", disable=None if show_progress else True)
    with _ending_at_once():
        tokenizer.train_from_iterator(map(_cut_long_words, stories), trainer)
    return tokenizer_from_json(tokenizer.to_str(), "the new tokenizer")


def _cut_long_words(story: str) -> str:
    """The story with line breaks in very long words (DNA, base64), which would make training quadratic."""
    return LONG_WORD.sub("\\g<0>\n", story)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the program at once, since the library does not look at signals until it is done."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may set them
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)
                  if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores them
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer's folder. tokenizer.json is written last and atomically; without it there is no tokenizer."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=1), encoding="utf-8")
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))


def tokenizer_report(tokenizer: Tokenizer, vocab_size: int, held_out: list[str]) -> list[str]:
    """Lines to print: vocabulary size; of held-out stories bytes per token, the round trip, and the articles' ids."""
    actual = tokenizer.get_vocab_size()
    size = f"vocabulary: {actual:,} tokens"
    if actual < vocab_size:
        size += (f" of {vocab_size:,}: the text has too few frequent words to fill it (tokenizer.min_frequency); "
                 "more, or more varied, stories would")
    encodings = tokenizer.encode_batch(held_out, add_special_tokens=False)
    num_bytes = sum(len(story.encode("utf-8")) for story in held_out)
    num_tokens = sum(len(encoding.ids) for encoding in encodings)
    wrong = sum(tokenizer.decode(encoding.ids) != story for encoding, story in zip(encodings, held_out, strict=True))
    if not held_out:
        return [size]
    number = counted(len(held_out), "held-out story")
    lines = [size, f"bytes per token: {num_bytes / max(1, num_tokens):.2f} on {number}",
             f"round trip: {len(held_out) - wrong:,} of {len(held_out):,} held-out stories are decoded byte for byte"]
    if not is_english(held_out):
        return lines
    articles = []
    for article in (" a", " the", " an"):
        ids = tokenizer.encode(article, add_special_tokens=False).ids
        articles.append(f"'{article}' {ids[0]}" if len(ids) == 1 else f"'{article}' takes {len(ids)} tokens")
    return [*lines, f"articles (good: one token each): {', '.join(articles)}"]


def check_empty(folder: Path) -> None:
    """Raise UserError if the folder has files other than those that an interrupted save_tokenizer() leaves."""
    found = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
    found = [name for name in found if not name.startswith(".") and not name.endswith(".part")]
    if found == ["tokenizer_config.json"]:
        text = (folder / "tokenizer_config.json").read_text(encoding="utf-8", errors="replace")
        found = [] if text == json.dumps(SETTINGS, indent=1) else found
    if found:
        raise UserError(f"{folder}: holds {one_line(', '.join(found))}, but no tokenizer.json, which is all that is "
                        "read: convert that tokenizer with transformers (AutoTokenizer.from_pretrained(folder)"
                        ".save_pretrained(new_folder)), or set data.tokenizer_path to a new folder")


def make_tokenizer(config: Config, folder: str | Path, make: Callable[[Iterable[str]], Tokenizer] | None = None,
                   ) -> Tokenizer:
    """Train a tokenizer on the config's stories, save it to the folder, and print a report.

    make: a function from the stories to the tokenizer, to use instead of train_tokenizer().
    """
    folder = Path(folder).expanduser()
    check_empty(folder)
    try:  # before the work, not after it
        tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}): set data.tokenizer_path (--output_dir) "
                        "to another folder") from None
    source = open_stories(config.data, "train")
    print(f"tokenizer: {'choosing' if make else 'training'} {config.model.vocab_size:,} tokens on at most "
          f"{config.tokenizer.max_samples:,} stories of {source.name}")
    stories = itertools.islice(source, config.tokenizer.max_samples)
    tokenizer = make(stories) if make else train_tokenizer(
        stories, config.model.vocab_size, config.tokenizer.min_frequency,
        config.training.show_progress)
    try:
        held_out = list(itertools.islice(open_stories(config.data, "validation"), REPORT_STORIES))
    except UserError as error:  # the tokenizer itself needs no validation split
        print(f"note: no held-out stories to measure the tokenizer on ({error})")
        held_out = []
    for line in tokenizer_report(tokenizer, config.model.vocab_size, held_out):
        print(f"tokenizer: {line}")
    save_tokenizer(tokenizer, folder)
    print(f"tokenizer: saved to {folder}")
    return tokenizer


def ensure_tokenizer(config: Config, saved: str | None = None, source: Path | None = None) -> Tokenizer:
    """The tokenizer of data.tokenizer_path; it is trained first if missing. Raises UserError if it does not fit.

    saved: the tokenizer.json in the checkpoint `source`; if given, it is used whatever the folder holds.
    """
    if saved:
        tokenizer = tokenizer_from_json(saved, str(source))
        _check_separator(tokenizer, config, "the checkpoint's tokenizer")
        return tokenizer
    path = Path(config.data.tokenizer_path).expanduser()
    if not (path / "tokenizer.json").exists() and not path.is_file():
        with file_lock(path / ".lock", f"tokenizer: {path}: another program is training it: waiting", wait=True):
            if not (path / "tokenizer.json").exists():
                remove_partial_files(path, "tokenizer.json")
                check_empty(path)
                next(iter(open_stories(config.data, "validation")))  # raises if the run could not use the tokenizer
                return make_tokenizer(config, path)
    tokenizer, wanted = load_tokenizer(path), config.model.vocab_size
    size = tokenizer.get_vocab_size()
    if size > wanted:
        raise UserError(f"{path}: has {size:,} tokens, but model.vocab_size is {wanted:,}: raise vocab_size, or set "
                        "data.tokenizer_path to a new folder, where a smaller one is then trained")
    _check_separator(tokenizer, config, str(path))
    print(f"tokenizer: {path}: reused, {size:,} tokens"
          + (f"; model.vocab_size is {wanted:,}, the rows above that stay unused" if size < wanted else ""))
    if size < wanted / 2:
        print(f"warning: that is less than half of model.vocab_size: if {path} was trained on other stories or for "
              "another size, set data.tokenizer_path to a new folder")
    return tokenizer


def _check_separator(tokenizer: Tokenizer, config: Config, source: str) -> None:
    separator = tokenizer.token_to_id(END_OF_STORY)
    if config.model.mask_stories and separator != SPECIAL_TOKENS.index(END_OF_STORY):
        raise UserError(f"{source}: {END_OF_STORY} is its token {separator}, but model.mask_stories needs token 0: set "
                        "mask_stories to false, or data.tokenizer_path to a new folder, where one is then trained")
