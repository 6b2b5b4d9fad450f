"""The word cache in front of the tokenizer library gives the library's own ids, for every text and tokenizer."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from config import UserError
from data import word_cache as encoding
from data.word_cache import WordCache, encode_chunks, make_encoder, splits_like_gpt2

DTYPE = np.dtype("<u2")
# what the pattern must distinguish: contractions, white space of all kinds (also what only Python or only Unicode takes
# for it), digits and letters beyond ASCII, marks that the cache knows and marks that it does not
PIECES = st.lists(st.sampled_from([
    *"'s 't 're 've 'm 'll 'd 'S 'x ' '' a A the The cat don't _ - . , ! \" 7 42 <|endoftext|> <unk>".split(),
    *"² ½ ٣ é É ª ß 中 e\u0301 “ ” ‘ ’ – — … « ¡ 🦊 \u200d \ufeff \x00 \x01 \x7f".split(" "),
    *" ,  ,   ,\n,\r\n,\t,\x0b,\x0c,\x1c,\x1d,\x1e,\x1f,\x85,\xa0,\u2003,\u2028,\u3000,\u180e".split(","),
]), max_size=12).map("".join)


def by_library(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def by_cache(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(ids, DTYPE).tolist() for ids in make_encoder(tokenizer, DTYPE)(texts)]


def test_a_tokenizer_of_ours_is_cached_and_stories_keep_their_ids(tokenizer, stories):
    assert splits_like_gpt2(tokenizer)
    assert by_cache(tokenizer, stories) == by_library(tokenizer, stories)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=30) | st.text(st.characters(max_codepoint=255), max_size=30), max_size=5))
def test_any_text_keeps_its_ids(tokenizer, texts):
    assert by_cache(tokenizer, texts) == by_library(tokenizer, texts)


def test_every_character_alone_and_between_others_keeps_its_ids(tokenizer):
    """All of the basic plane but surrogates, which are no text."""
    characters = [chr(code) for code in range(2**16) if not 0xD800 <= code < 0xE000]
    texts = [f"{c} a{c}1 {c}{c}'s{c}" for c in characters]
    wrong = [c for c, one, other in zip(characters, by_cache(tokenizer, texts), by_library(tokenizer, texts),
                                        strict=True) if one != other]
    assert wrong == []


def changed(tokenizer: Tokenizer, how: str) -> Tokenizer:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.encode_special_tokens = how != "special tokens are found"
    if how == "normalizer":
        other.normalizer = normalizers.Lowercase()
    elif how == "prefix space":
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif how == "no pattern":
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif how == "digits apart":
        other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif how == "added word":
        other.add_tokens([AddedToken("her dog", single_word=False)])
    elif how == "truncation":
        other.enable_truncation(5)
    elif how == "dropout":
        other.model.dropout = 1.0  # no merge at all: the one dropout that is no chance
    return other


@pytest.mark.parametrize("how", ["normalizer", "prefix space", "no pattern", "digits apart", "added word", "truncation",
                                 "dropout", "special tokens are found"])
def test_tokenizers_of_another_make_are_left_to_the_library(tokenizer, stories, how):
    other = changed(tokenizer, how)
    assert not splits_like_gpt2(other)
    texts = [f"Lily and her dog saw 1234 birds. {story}<|endoftext|>" for story in stories[:20]]
    assert by_cache(other, texts) == by_library(other, texts)


def test_a_word_is_encoded_once_and_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(encoding, "MAX_WORDS", 50)
    asked = []
    cache = WordCache(lambda word: asked.append(word) or word.encode())
    for _ in range(3):
        assert [cache[str(i)] for i in range(50)] == [b"%d" % i for i in range(50)]
    assert len(asked) == 50
    for i in range(1000):
        assert cache[f"w{i}"] == b"w%d" % i and cache["a" * 10_000] == b"a" * 10_000
        assert len(cache) <= 50 and sum(map(len, cache)) < 500


class EndsTheProcess:
    """In the place of a story: who unpickles it is gone."""

    def __reduce__(self):
        return os._exit, (1,)


def test_processes_encode_as_one_does_in_order_and_without_hoarding(tokenizer, stories):
    """And where one of them dies, that is said in one line."""
    texts = [story + odd for story, odd in zip(stories[:60], ["", " 中 ²", "<|endoftext|>"] * 20, strict=True)]
    taken = []

    def chunks(numbers):
        for number in numbers:
            taken.append(number)
            yield texts[2 * number:2 * number + 2], number

    alone = list(encode_chunks(tokenizer, DTYPE, b"\0\0", chunks(range(30)), 1))
    assert b"".join(ids for ids, _ in alone) == b"".join(
        b"\0\0" + np.array(ids, DTYPE).tobytes() for ids in by_library(tokenizer, texts))
    taken.clear()
    together = []
    for result in encode_chunks(tokenizer, DTYPE, b"\0\0", chunks(range(30)), 2):
        together.append(result)
        assert len(taken) - len(together) <= 4
    assert together == alone
    with pytest.raises(UserError, match="ended from outside"):
        list(encode_chunks(tokenizer, DTYPE, b"\0\0", iter([([EndsTheProcess()], 0)]), 1 + 1))


SCRIPT = """
import sys
print("imported", __name__, file=sys.stderr)
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import torch
    from tokenizers import Tokenizer
    import numpy as np
    from data.word_cache import encode_chunks
    chunks = [(["A cat sat."], number) for number in range(8)]
    made = list(encode_chunks(Tokenizer.from_file("tokenizer.json"), np.dtype("<u2"), b"", iter(chunks), 2))
    print(len(made), __file__.endswith("script.py"))
"""


def test_processes_do_not_import_the_script_and_torch_with_it(tmp_path, tokenizer):
    """torch takes seconds, and more memory than all the rest, in each process."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py", str(REPO)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("8 True\n", "imported __main__\n")


def test_only_much_text_is_worth_processes():
    assert encoding.count_processes(None) == encoding.count_processes(encoding.MANY_BYTES - 1) == 1
    assert 1 <= encoding.count_processes(2 * encoding.MANY_BYTES) <= encoding.MOST_PROCESSES
