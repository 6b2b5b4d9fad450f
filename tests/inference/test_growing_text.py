"""The text of a growing story: the same in the end as decoded at once, whole characters, no part of a stop text."""

import random

import pytest

from data.tokenizer import token_byte_lengths, token_bytes
from inference.growing_text import GrowingText


def test_token_bytes_are_what_the_tokenizer_decodes(tokenizer):
    pieces = token_bytes(tokenizer)
    for text in ("Once upon a time", "Mädchen 李 🦊\n\n\"x\"", "\x00\x7f"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(pieces[token] for token in ids) == text.encode("utf-8")
    assert pieces[:3] == [b"", b"", b""] and list(map(len, pieces)) == token_byte_lengths(tokenizer).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_any_tokens_in_any_groups_give_the_text_of_all_at_once(tokenizer, seed):
    """Most of these bytes are no valid UTF-8."""
    draw, pieces = random.Random(seed), token_bytes(tokenizer)
    ids = [draw.randrange(259 if seed % 2 else 1500) for _ in range(draw.randrange(40))]
    growing, text, rest = GrowingText(pieces), "", list(ids)
    while rest:
        count = draw.randrange(1, 4)
        peeked = growing.peek(rest[0])
        new = growing.add(rest[:count])
        assert new.startswith(peeked)
        text, rest = text + new, rest[count:]
    assert text + growing.add([], last=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_appears_when_its_last_byte_has_come(tokenizer):
    pieces = token_bytes(tokenizer)
    ids = [tokenizer.encode("x", add_special_tokens=False).ids[0], *(3 + byte for byte in "🦊".encode())]
    ids = [ids[0], *(pieces.index(bytes([byte])) for byte in "🦊".encode())]
    growing = GrowingText(pieces)
    assert [growing.add([token]) for token in ids] == ["x", "", "", "", "🦊"]
    growing = GrowingText(pieces, prompt=ids[:3])  # the prompt ends inside it
    assert growing.peek(ids[3]) == "" and growing.add(ids[3:]) == "🦊"


def test_a_stop_text_and_what_may_become_one_is_held_back(tokenizer):
    pieces = token_bytes(tokenizer)
    letters = {letter: pieces.index(letter.encode()) for letter in "abcde"}

    def grow(text, *stops):
        growing = GrowingText(pieces, stops)
        return [growing.add([letters[letter]]) for letter in text], growing.stopped, growing.add([], last=True)

    assert grow("abcd", "cd") == (["a", "b", "", ""], True, "")
    assert grow("abce", "cd") == (["a", "b", "", "ce"], False, "")
    assert grow("abc", "cd") == (["a", "b", ""], False, "c")
    assert grow("abab", "bc", "aa") == (["", "a", "", "ba"][:0] or ["", "a", "b", "a"], False, "b")
