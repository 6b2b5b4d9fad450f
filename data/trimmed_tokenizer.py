"""An existing byte-level BPE, such as GPT-2's, trimmed to the tokens that the stories use most.

The authors of TinyStories kept the 10,000 most used tokens of GPT-Neo's tokenizer (Eldan & Li, 2023). Here this loses
no text: all 256 bytes stay, and the merges that made a removed token go with it, so a rare word becomes several tokens.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from config import Config, UserError
from config.wording import one_line
from data.stories import open_stories
from data.tokenizer import SPECIAL_TOKENS, tokenizer_from_json, train_tokenizer

FILES = ("vocab.json", "merges.txt")  # a byte-level BPE before there was tokenizer.json
BATCH = 1000  # stories encoded at once


def read_bpe(name: str) -> dict[str, Any]:
    """The content of the tokenizer.json in a folder, or in a repository of the Hugging Face hub; or one made of FILES.

    Raises UserError if there is none, or if it is no byte-level BPE.
    """
    folder = Path(name).expanduser()
    where = folder if folder.is_dir() else None
    if (file := _find(name, where, "tokenizer.json")) is not None:
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"--from {name}: not a tokenizer.json ({one_line(error)})") from None
    elif None not in (files := [_find(name, where, file) for file in FILES]):
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise UserError(f"--from {name}: no tokenizer.json, and no {' and '.join(FILES)}: name a folder or a hub id "
                        "with a byte-level BPE, such as gpt2")
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or not set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"]):
        raise UserError(f"--from {name}: a tokenizer of type {model['type']}, but only a byte-level BPE, such as that "
                        "of GPT-2, can be trimmed")
    # a token must be what its merges make of the bytes of a text that nothing has changed before
    content |= {"normalizer": None, "post_processor": None, "added_tokens": [], "truncation": None, "padding": None}
    model |= {"ignore_merges": False, "unk_token": None, "dropout": None}
    return content


def _find(name: str, folder: Path | None, file: str) -> Path | None:
    """A file of a folder, or of the hub's repository `name`; None if there is no such file."""
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:  # no connection; a kind of EntryNotFoundError
        raise UserError(f"--from {name}: no such folder, and the Hugging Face hub did not return it ({one_line(error)})"
                        ) from None
    except EntryNotFoundError:
        return None
    except Exception as error:  # OSError, ValueError, httpx's: no other common base
        raise UserError(f"--from {name}: no such folder, and the Hugging Face hub did not return it ({one_line(error)})"
                        ) from None


def trim_tokenizer(content: dict[str, Any], stories: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer with the tokens that the stories use most, at most vocab_size with bytes and special tokens.

    content: of a tokenizer.json, from read_bpe(). A token that is a part of a longer one counts wherever the longer one
    occurs. So it has at least the count of that one, and what is kept can be made of what is kept.
    """
    model, alphabet = content["model"], sorted(pre_tokenizers.ByteLevel.alphabet())
    full = Tokenizer.from_str(json.dumps(content))
    of_id = count_tokens(full, stories)
    counts = {token: int(of_id[index]) for token, index in model["vocab"].items()}
    parts: dict[str, tuple[str, str]] = {}  # of each token, by the first merge that makes it; parts come before wholes
    for left, right in model["merges"]:
        parts.setdefault(left + right, (left, right))
    for token, pair in reversed(parts.items()):
        for part in pair:
            counts[part] = counts.get(part, 0) + counts.get(token, 0)
    longer = [token for token in parts if len(token) > 1]
    used = sorted((token for token in longer if counts[token]), key=lambda token: -counts[token])  # a stable sort
    kept = set(used[:vocab_size - len(alphabet) - len(SPECIAL_TOKENS)]) | set(alphabet)
    tokens = [*SPECIAL_TOKENS, *alphabet, *(token for token in longer if token in kept)]
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept]
    model = {**model, "vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}
    trimmed = Tokenizer.from_str(json.dumps({**content, "model": model}))
    trimmed.add_special_tokens(list(SPECIAL_TOKENS))
    trimmed.decoder = decoders.ByteLevel()
    return tokenizer_from_json(trimmed.to_str(), "the trimmed tokenizer")


def compare_with_trained(tokenizer: Tokenizer, config: Config) -> str:
    """A line about a tokenizer and one of the same size that is trained on the config's stories."""
    stories = list(islice(open_stories(config.data, "train"), config.tokenizer.max_samples))
    trained = train_tokenizer(stories, tokenizer.get_vocab_size(), config.tokenizer.min_frequency, show_progress=False)
    num_bytes = sum(len(story.encode("utf-8")) for story in stories)
    found = [(num_bytes / counts.sum(), (counts == 0).sum(), len(counts))
             for counts in (count_tokens(tokenizer, stories), count_tokens(trained, stories))]
    this, other = (f"{ratio:.2f} bytes per token, {unused:,} of {size:,} tokens never used"
                   for ratio, unused, size in found)
    return f"on the stories above: {this}; one trained on them: {other}"


def count_tokens(tokenizer: Tokenizer, stories: Iterable[str]) -> np.ndarray:
    """How often each token id occurs in the stories, int64, shape (vocabulary size,)."""
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for batch in _batches(stories):
        ids = [index for encoding in tokenizer.encode_batch(batch, add_special_tokens=False) for index in encoding.ids]
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def _batches(stories: Iterable[str]) -> Iterator[list[str]]:
    stories = iter(stories)
    while batch := list(islice(stories, BATCH)):
        yield batch
