"""The tokenizer keeps every byte, and its folder opens elsewhere too."""

import json
import subprocess
import sys

import pytest
from conftest import REPO
from tokenizers import Tokenizer, models

from config import UserError
from data.tokenizer import (
    END_OF_STORY,
    SPECIAL_TOKENS,
    ensure_tokenizer,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
    tokenizer_report,
    train_tokenizer,
)
from model import SEPARATOR

STRANGE = ["", " ", "\n\n  \t", "a\r\nb", "Zoë’s naïve café — “Ñandú”", "🦊🏳️‍🌈", "שלום עולם", "\x00\x01\x7f", "<unk>",
           "\ufeffx", "She said <|endoftext|> aloud.", "<|padding|>", "the" * 500, "".join(map(chr, range(1, 0x250)))]


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", STRANGE)
def test_every_string_round_trips(tokenizer, text):
    encoded = ids(tokenizer, text)
    assert tokenizer.decode(encoded) == text
    assert not set(encoded) & {0, 1, 2}  # text that spells a special token is text


def test_special_tokens_come_first_and_all_bytes_follow(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert SPECIAL_TOKENS == ("<|endoftext|>", "<|padding|>", "<unk>")
    assert tokenizer.get_vocab_size() == 1500


def test_articles_are_one_token_each(tokenizer):
    assert [len(ids(tokenizer, article)) for article in (" a", " the", " an")] == [1, 1, 1]


def test_neither_truncation_nor_padding_is_saved_or_obeyed(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(5)
    cutting.enable_padding(length=5)
    text = "Once upon a time there was a dog. " * 50
    assert ids(tokenizer_from_json(cutting.to_str(), "x"), text) == ids(tokenizer, text)


def test_the_folder_opens_here_and_in_transformers(tokenizer, tmp_path, stories):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path / "töken izer")
    ours = load_tokenizer(tmp_path / "töken izer")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "töken izer"))
    for story in stories[:50]:
        assert ids(ours, story) == ids(tokenizer, story) == theirs(story, add_special_tokens=False)["input_ids"]
        assert theirs.decode(ids(ours, story)) == story
    assert theirs.eos_token == END_OF_STORY and theirs.eos_token_id == 0 and theirs.pad_token_id == 1


def test_training_is_reproducible(stories):
    assert train_tokenizer(stories, 400, show_progress=False).to_str() == \
        train_tokenizer(stories, 400, show_progress=False).to_str()


def test_the_report_says_what_the_corpus_could_not_fill(stories):
    small = train_tokenizer(stories[:3], 5000, show_progress=False)
    lines = "\n".join(tokenizer_report(small, 5000, stories[100:150]))
    assert f"{small.get_vocab_size():,} tokens of 5,000:" in lines
    assert "50 of 50 held-out stories are decoded" in lines
    full = train_tokenizer(stories, 500, show_progress=False)
    assert "asked for" not in "\n".join(tokenizer_report(full, 500, stories))


def test_unfit_tokenizers_are_refused_in_one_line(tokenizer, tmp_path):
    no_separator = json.loads(tokenizer.to_str())
    no_separator["added_tokens"] = no_separator["added_tokens"][1:]
    no_separator["model"]["vocab"] = {k: v for k, v in no_separator["model"]["vocab"].items() if v != 0}
    partial = Tokenizer(models.BPE())
    partial.add_special_tokens([END_OF_STORY])
    far = json.loads(tokenizer.to_str())
    far["model"]["vocab"] = {k: v + 5000 * (v == 900) for k, v in far["model"]["vocab"].items()}
    for text, part in (("{", "not a tokenizer.json"), (json.dumps(far), "its ids are not 0 to"),
                       (json.dumps(no_separator), "<|endoftext|>"),
                       (partial.to_str(), "lacks 256 of the 256 bytes")):
        with pytest.raises(UserError) as caught:
            tokenizer_from_json(text, "some/tokenizer.json")
        assert str(caught.value).startswith("some/tokenizer.json: ") and part in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_train_py_trains_it_once_and_then_reuses_it(tiny_config, capsys):
    first = ensure_tokenizer(tiny_config())
    assert "training 512 tokens" in capsys.readouterr().out
    again = ensure_tokenizer(tiny_config())
    assert "reused" in capsys.readouterr().out and again.to_str() == first.to_str()
    with pytest.raises(UserError, match=r"has 512 tokens, but model.vocab_size is 300"):
        ensure_tokenizer(tiny_config("model.vocab_size=300"))


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setattr("data.tokenizer.train_tokenizer", lambda *args: pytest.fail("the work began"))
    with pytest.raises(UserError, match=r"tok: cannot be written to .*--output_dir"):
        make_tokenizer(tiny_config(), tmp_path / "file" / "tok")


def test_a_separator_that_the_model_would_not_find_is_refused(tiny_config, tmp_path):
    """model.mask_stories looks for one id; a tokenizer from elsewhere may have another."""
    made = json.loads(ensure_tokenizer(tiny_config("model.mask_stories=true")).to_str())
    assert SPECIAL_TOKENS[SEPARATOR] == END_OF_STORY
    swapped = {0: 1, 1: 0}
    made["model"]["vocab"] = {token: swapped.get(i, i) for token, i in made["model"]["vocab"].items()}
    made["added_tokens"] = sorted(({**of, "id": swapped.get(of["id"], of["id"])} for of in made["added_tokens"]),
                                  key=lambda of: of["id"])
    (tmp_path / "tokenizer" / "tiny" / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    assert ensure_tokenizer(tiny_config()).token_to_id(END_OF_STORY) == 1
    with pytest.raises(UserError, match=r"is its token 1, but model\.mask_stories needs token 0: .*false"):
        ensure_tokenizer(tiny_config("model.mask_stories=true"))


def test_the_script_as_the_user_calls_it(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPO / "train_custom_tokenizer.py"), "--vocab_size", "400", "--output_dir",
         "./my tokenizer", "--max_samples", "200", "--dataset", "sample", "--min_frequency", "3"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "my tokenizer").get_vocab_size() == 400
    assert "vocabulary: 400 tokens" in done.stdout and "are decoded byte for byte" in done.stdout
    again = subprocess.run([sys.executable, str(REPO / "train_custom_tokenizer.py"), "--output_dir", "my tokenizer"],
                           cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert again.returncode == 2 and "holds a tokenizer already" in again.stderr and again.stderr.count("\n") == 1
    wrong = subprocess.run([sys.executable, str(REPO / "train_custom_tokenizer.py"), "--vocab_size", "12"],
                           cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
