"""Token files say what they are made from, and batches are cut from them as the loss needs it."""

import dataclasses
import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from config import UserError
from data.stories import open_stories
from data.token_files import build_token_file, make_fingerprint, open_token_file, prepare_tokens
from data.tokenizer import (
    END_OF_STORY,
    article_mask,
    byte_characters,
    token_byte_lengths,
    tokenizer_from_json,
    train_tokenizer,
)

CPU = torch.device("cpu")


@pytest.fixture
def corpus(tmp_path, stories, tiny_config):
    """A function: overrides -> the data section of a config that reads a .txt file of 100 stories."""
    path = tmp_path / "my stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories[:100]), encoding="utf-8")
    return lambda *more: tiny_config("data.dataset=my stories.txt", "data.validation_fraction=0.2", *more).data


def test_the_file_is_every_story_after_a_separator_and_one_at_the_end(corpus, tokenizer):
    file = prepare_tokens(corpus(), tokenizer, "train")
    expected = []
    for story in open_stories(corpus(), "train"):
        expected += [0, *tokenizer.encode(story, add_special_tokens=False).ids]
    assert file.tokens.tolist() == [*expected, 0]
    assert file.tokens.dtype == np.dtype("<u2")
    assert file.path.read_bytes()[2:4] == expected[1].to_bytes(2, "little")


def test_the_counts_are_true(corpus, tokenizer):
    file = prepare_tokens(corpus(), tokenizer, "train")
    texts = list(open_stories(corpus(), "train"))
    assert file.counts["stories"] == len(texts) == file.tokens.tolist().count(0) - 1
    assert file.counts["bytes"] == sum(len(text.encode("utf-8")) for text in texts)
    assert file.counts["bytes"] == token_byte_lengths(tokenizer)[file.tokens].sum()
    words = Counter(word for text in texts for word in text.replace('"', " ").split())
    articles = sum(words[word] for word in ("a", "an", "the", "A", "An", "The"))
    assert file.counts["article_tokens"] == pytest.approx(articles, rel=0.02)
    assert 0.03 < file.counts["article_tokens"] / file.counts["tokens"] < 0.12


def test_a_tokenizer_of_bytes_alone_makes_token_files(corpus, tokenizer):
    """It has 257 tokens, fewer than any that this project trains, and comes from elsewhere."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    alphabet = byte_characters()
    vocabulary = {END_OF_STORY: 0, **{character: 1 + byte for byte, character in enumerate(alphabet)}}
    content["model"] |= {"vocab": vocabulary, "merges": []}
    bytes_alone = tokenizer_from_json(json.dumps(content), "elsewhere")
    file = prepare_tokens(corpus(), bytes_alone, "train")
    assert file.counts["tokens"] == file.counts["bytes"] + file.counts["stories"] + 1


def test_byte_lengths_add_up_for_any_text(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    for text in ("Zoë’s café 🦊", "a b  c\n", "\x00ÿ"):
        assert lengths[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(text.encode("utf-8"))
    assert lengths[:3].tolist() == [0, 0, 0]


def test_article_tokens_are_whole_words(tokenizer):
    found = {tokenizer.decode([i]).strip().lower() for i in np.flatnonzero(article_mask(tokenizer))}
    assert found == {"a", "an", "the"}
    assert not article_mask(tokenizer)[tokenizer.token_to_id("a")]  # a piece of a word, more often


def test_a_second_opening_reuses_the_file(corpus, tokenizer, capsys):
    first = prepare_tokens(corpus(), tokenizer, "train")
    stamp = first.path.stat().st_mtime_ns
    assert "missing" in capsys.readouterr().out
    second = prepare_tokens(corpus(), tokenizer, "train")
    assert second.path.stat().st_mtime_ns == stamp and "reused" in capsys.readouterr().out
    assert second.counts == first.counts


def test_a_new_tokenizer_makes_the_file_stale(corpus, tokenizer, stories, capsys):
    prepare_tokens(corpus(), tokenizer, "train")
    other = train_tokenizer(stories, 300, show_progress=False)
    file = prepare_tokens(corpus(), other, "train")
    assert "stale (tokenizer changed)" in capsys.readouterr().out
    assert file.tokens.max() < 300


def test_changed_stories_make_the_file_stale(corpus, tokenizer, tmp_path, capsys):
    before = prepare_tokens(corpus(), tokenizer, "train").counts["stories"]
    with (tmp_path / "my stories.txt").open("a", encoding="utf-8") as file:
        file.write("".join(f"\n<|endoftext|>\nThe fox found {i} old shoes.\n" for i in range(20)))
    after = prepare_tokens(corpus(), tokenizer, "train").counts["stories"]
    assert "stale (source changed)" in capsys.readouterr().out and after > before
    prepare_tokens(corpus("data.max_stories=3"), tokenizer, "train")
    assert "stale (source changed)" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no json", "cut json", "cut bin", "no bin", "longer bin", "empty json object",
                                    "huge count", "deep json"])
def test_a_damaged_file_is_rebuilt(corpus, tokenizer, damage):
    file = prepare_tokens(corpus(), tokenizer, "train")
    good, header = file.tokens.tolist(), file.path.with_suffix(".json")
    del file  # Windows cannot replace a file that is mapped
    path = header.with_suffix(".bin")
    if damage == "no json":
        header.unlink()
    elif damage == "cut json":
        header.write_text(header.read_text(encoding="utf-8")[:50], encoding="utf-8")
    elif damage == "empty json object":
        header.write_text("{}", encoding="utf-8")
    elif damage == "huge count":
        header.write_text(re.sub('"tokens": [0-9]', '"tokens": 2e3', header.read_text(encoding="utf-8")),
                          encoding="utf-8")
    elif damage == "deep json":
        header.write_text("[" * 100_000, encoding="utf-8")
    elif damage == "no bin":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] if damage == "cut bin" else path.read_bytes() + b"\0\0")
    fingerprint = make_fingerprint(open_stories(corpus(), "train"), tokenizer)
    assert open_token_file(path, fingerprint)[0] is None
    assert prepare_tokens(corpus(), tokenizer, "train").tokens.tolist() == good


def test_no_flipped_byte_is_believed(corpus, tokenizer):
    """In the tokens or in the header: the file is refused and rebuilt, or what was flipped carried nothing."""
    file = prepare_tokens(corpus(), tokenizer, "train")
    good, counts, bin_path = file.tokens.tolist(), file.counts, file.path
    del file  # Windows cannot write to a file that is mapped
    fingerprint, draw = make_fingerprint(open_stories(corpus(), "train"), tokenizer), random.Random(0)
    for path in (bin_path, bin_path.with_suffix(".json")):
        whole = path.read_bytes()
        counts_at = range(whole.find(b'"counts"') + 1, whole.find(b'"digest"'))  # none in the .bin
        for place in [*counts_at, *(draw.randrange(len(whole)) for _ in range(100))]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1:])
            found, reason = open_token_file(bin_path, fingerprint)
            if path == bin_path:
                assert found is None and "checksum" in reason
            elif found:  # white space, or the name of a count that nobody reads
                assert found.tokens.tolist() == good and found.counts == counts
            del found
        path.write_bytes(whole)
    assert open_token_file(bin_path, fingerprint)[0] is not None


ODD = {
    "CRLF": b"One day.\r\nThe end.<|endoftext|>Two.\r\n\r\nThree.",
    "byte order mark": b"\xef\xbb\xbfA cat sat.",
    "NUL and control characters": b"A\x00B\x01\x1b[31m\x7f<|endoftext|>\x00",
    "right to left": "היה היה ילד קטן. <|endoftext|>كان يا ما كان 12 قطة.".encode(),
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 é \u200d\ufeff 🦊".encode(),
    "noncharacters": "\uffff \U0010ffff \u2028 \x85".encode(),
    "one line of a million letters": b"a" * 1_000_000,
    "one story of 10 MB": b"The cat saw the red ball.\n" * 400_000 + b"The end.",
    "spelled tokens": b"<|padding|> <unk> <|endoftext |> Once",
    "blanks only around": b" \t x \t ",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_come_through_byte_for_byte(tiny_config, tokenizer, tmp_path, name):
    (tmp_path / "odd.txt").write_bytes(ODD[name])
    data = tiny_config("data.dataset=other.txt", "data.validation=odd.txt", "data.clean=false").data
    tokens = prepare_tokens(data, tokenizer, "validation", show_progress=False).tokens
    ends = np.flatnonzero(tokens == 0)
    stories = [tokenizer.decode(tokens[a + 1:b].tolist()).encode("utf-8") for a, b in itertools.pairwise(ends)]
    assert stories == ODD[name].removeprefix(b"\xef\xbb\xbf").split(b"<|endoftext|>")


@pytest.mark.parametrize(("file", "content", "part"), [
    ("odd.txt", b"", "no story in it"),
    ("odd.txt", b" \n\t \r\n", "no story in it"),
    ("odd.txt", bytes(range(256)) * 50, "not UTF-8"),
    ("odd.txt", "a story".encode("utf-16"), "not UTF-8"),
    ("odd.txt", b"half \xf0\x9f\xa6", "not UTF-8"),
    ("odd.jsonl", b'{"text": "half of \\ud83e"}', "half of a character"),
    ("odd.jsonl", b'{"text": "cut', "not valid JSON"),
    ("odd.parquet", b"PAR1 not really", "cannot be read as parquet"),
])
def test_what_no_story_can_be_made_of_is_one_line(tiny_config, tokenizer, tmp_path, file, content, part):
    (tmp_path / file).write_bytes(content)
    data = tiny_config("data.dataset=other.txt", f"data.validation={file}", "data.clean=false").data
    with pytest.raises(UserError) as caught:
        prepare_tokens(data, tokenizer, "validation", show_progress=False)
    assert file in str(caught.value) and part in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "data" / "cache").iterdir() if path.suffix != ".lock"]


def test_a_build_that_is_stopped_leaves_nothing_that_is_believed(corpus, tokenizer, tmp_path):
    stories = open_stories(corpus(), "train")
    fingerprint = make_fingerprint(stories, tokenizer)
    broken = dataclasses.replace(stories)
    path = tmp_path / "x.bin"

    def stop():
        yield "One story."
        raise KeyboardInterrupt

    broken._source = dataclasses.replace(stories._source, read=stop)
    with pytest.raises(KeyboardInterrupt):
        build_token_file(broken, tokenizer, path, fingerprint, show_progress=False)
    assert open_token_file(path, fingerprint)[0] is None
    assert not list(tmp_path.glob("x.*"))


def test_the_header_is_readable_json(corpus, tokenizer):
    file = prepare_tokens(corpus(), tokenizer, "validation")
    header = json.loads(file.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert header["fingerprint"]["separator"] == "<|endoftext|>" and header["fingerprint"]["dtype"] == "uint16"
    assert header["counts"]["tokens"] == len(file.tokens)


def test_ids_past_65535_get_four_bytes(stories):
    class Large:
        def get_vocab_size(self):
            return 70_000
    from data.token_files import _dtype
    assert _dtype(Large()) == np.uint32


def test_an_empty_source_is_one_line(tiny_config, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepare_tokens(tiny_config("data.dataset=empty.txt").data, tokenizer, "train")
    assert "empty.txt" in str(caught.value) and "\n" not in str(caught.value)
