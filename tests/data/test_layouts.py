"""Text in any layout: the guide's table, and how files, records and splits become stories."""

import csv
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from config import UserError
from config.command_line import REPO
from config.schema import DataConfig
from config.values import parse_yaml
from data import readers, sources
from data.stories import open_stories

ROW = re.compile(r"\| [^|]+ \| `([\w.]+)` \| `((?:\\\||[^|])+)` \| (?:`data\.(\w+)=(.+?)`)? ?\| (.+) \|")


def opened(path, split="train", **options):
    return open_stories(DataConfig(dataset=str(path), **options), split)


def read(path, **options):
    """All stories: validation is elsewhere, so that none is held out."""
    return list(opened(path, validation="sample", **options))


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def write_lines(path: Path, texts: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def numbered(count: int, word: str = "Story") -> list[str]:
    return [f"{word} number {index} ends here." for index in range(count)]


@pytest.fixture
def notes(capsys):
    """A function that returns what was printed since, each note once a test."""
    sources.say_once.cache_clear()
    return lambda: capsys.readouterr().out


# The guide's table

def guide_rows():
    text = (REPO / "docs" / "TRAINING_GUIDE.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if row := ROW.fullmatch(line):
            yield pytest.param(*row.groups(), id=row[1])


def unescape(text: str) -> str:
    return text.replace("\\|", "|").replace("\\n", "\n").replace("\\t", "\t")


def test_the_guide_has_a_table_of_layouts():
    assert {Path(row.values[0]).suffix for row in guide_rows()} == {".txt", ".jsonl", ".json", ".csv", ".tsv"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "content", "key", "value", "stories"), list(guide_rows()))
def test_each_layout_of_the_guide_gives_its_stories(tmp_path, name, content, key, value, stories, packed):
    path = write(tmp_path / name, unescape(content))
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(unescape(content).encode("utf-8")))
    options = {key: parse_yaml(value, "the guide")} if key else {}
    assert read(path, **options) == [unescape(story) for story in re.findall("`(.+?)`", stories)]


# Separators and single documents

@pytest.mark.parametrize("separator", ["\n", "\\n"])  # the second is what some shells leave of "\n"
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_separator_of_newlines_works_with_both_line_ends(tmp_path, separator, newline):
    path = write(tmp_path / "a.txt", newline.join(["One.", "Two.", "", "Three.", ""]))
    assert read(path, separator=separator) == ["One.", "Two.", "Three."]
    assert read(path, separator=2 * separator) == [f"One.{chr(10)}Two.", "Three."]


def test_another_separator_is_any_text(tmp_path):
    path = write(tmp_path / "a.txt", "One.\n---\nTwo -- two! <|endoftext|>\n---\nThree.")
    assert read(path, separator="---") == ["One.", "Two -- two!", "Three."]


def test_the_end_of_a_single_long_document_is_held_out(tmp_path, notes):
    book = "\n".join(f"Line {number} of the only book." for number in range(1000))
    path = write(tmp_path / "novel.txt", book)
    (train,), (validation,) = opened(path), opened(path, "validation")
    assert train + validation == book and 0.009 < len(validation) / len(book) < 0.02
    out = notes()
    assert out.count("\n") == 1 and "no '<|endoftext|>'" in out and f"{len(validation):,} characters" in out
    (train,), (validation,) = opened(path, validation_fraction=0.3), opened(path, "validation", validation_fraction=0.3)
    assert train + validation == book and 0.29 < len(validation) / len(book) < 0.32


def test_a_single_short_document_is_refused_with_what_to_set(tmp_path):
    path = write(tmp_path / "short.txt", "A cat sat.\nA dog ran.")
    assert list(opened(path)) == ["A cat sat.\nA dog ran."]  # the tokenizer is trained in any case
    message = error_of(lambda: list(opened(path, "validation")))
    assert all(part in message for part in (str(path), "no '<|endoftext|>' stands in it", "data.separator"))


def test_a_document_of_one_piece_is_read_in_linear_time(tmp_path, monkeypatch):
    """Counted in bytes that are copied or parsed: a small multiple of the text, which has a thousand chunks."""
    text, work = "It was a long day, and they went home. " * 5000, []

    class Chunk(bytes):
        def __radd__(self, other):
            work.append(len(other) + len(self))
            return bytes(other) + bytes(self)

    chunks = [text.encode("utf-8")[start:start + 200] for start in range(0, len(text), 200)]
    assert list(readers._split(map(Chunk, chunks), b"<|endoftext|>")) == [text.encode("utf-8")]
    assert sum(work) < 2 * len(text) and len(work) == len(chunks)

    work.clear()
    decode = json.JSONDecoder.raw_decode
    monkeypatch.setattr(readers, "CHUNK", 200)
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda self, buffer, start: (
        work.append(len(buffer) - start) or decode(self, buffer, start)))
    assert read(write_lines(tmp_path / "a.jsonl", [text])) == [text.strip()]
    assert len(work) > 5 and sum(work) < 4 * len(text)


# Records

def test_separators_in_a_record_are_layout(tmp_path):
    texts = ["<|endoftext|>One.<|endoftext|>", "Two.\n<|endoftext|>\nThree.\n", "Four."]
    path = write_lines(tmp_path / "a.jsonl", texts)
    for clean in (True, False):
        assert [text.strip() for text in read(path, clean=clean)] == ["One.", "Two.", "Three.", "Four."]


def test_null_and_missing_texts_are_empty_and_counted(tmp_path):
    records = [{"text": "One."}, {"text": None}, {"other": 1}, {"text": "  "}, {"text": "Two."}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    for clean in (True, False):
        stories = opened(path, validation="sample", clean=clean)
        assert list(stories) == ["One.", "Two."] and stories.counts["empty"] == 3
    for wrong in (7, ["One."], {"a": 1}, True):
        write(path, json.dumps({"text": "One."}) + "\n" + json.dumps({"text": wrong}))
        assert f"{path}, line 2, object 2: text is" in error_of(lambda: read(path))


def test_a_template_names_a_missing_field_and_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "Who?", "answer": 7, "id": 1}\n{"question": null, "answer": "x"}')
    stories = opened(path, validation="sample", template="Q: {question}\nA: {answer}")
    assert list(stories) == ["Q: Who?\nA: 7"] and stories.counts["empty"] == 1
    message = error_of(lambda: read(path, template="{question} {reply}"))
    assert "no field reply" in message and "question, answer, id" in message and "data.template" in message


def test_csv_fields_may_be_long_and_hold_commas_quotes_and_lines(tmp_path):
    story = 'He said, "Hi," and\nleft; then 1,2. ' * 10_000
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, story], [2, "Short."]])
    assert read(path) == [story.strip(), "Short."]
    assert "no field tale, only id, text" in error_of(lambda: read(path, text_column="tale"))
    path.write_bytes(b"text\ncaf\xe9\n")
    assert f"{path}, line 2: byte 0xe9 is not UTF-8" in error_of(lambda: read(path))


def test_a_damaged_gz_file_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "A cat sat."}\n' * 1000)
    for content in (whole[:-20], b"no gzip"):
        path.write_bytes(content)
        assert f"{path}: cannot be read as gzip" in error_of(lambda: read(path))


# Splits

def test_files_are_divided_by_the_words_of_their_names(tmp_path, notes):
    for name in ("train", "val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [f"In {name}."])
    assert list(opened(tmp_path)) == ["In train."] and list(opened(tmp_path, "validation")) == ["In val."]
    assert notes() == "stories: train: train.jsonl; validation: val.jsonl; test: test.jsonl (not used)\n"


@pytest.mark.parametrize(("name", "split"), [
    ("valid.txt", "validation"), ("a-valid-2.txt", "validation"), ("dev_1.txt", "validation"),
    ("x.validation.txt", "validation"), ("val/0.txt", "validation"), ("Test.txt", "test"), ("b/test/1.txt", "test"),
    ("validated.txt", "train"), ("invalid.txt", "train"), ("contest.txt", "train"), ("device.txt", "train"),
    ("train/valid.txt", "validation"), ("test/train-0001.txt", "train"), ("tales.txt", "train")])
def test_only_whole_words_name_a_split(name, split):
    assert sources.split_of(Path(name)) == split


def test_a_file_that_is_named_itself_is_used_whatever_its_name(tmp_path):
    for name in ("test.jsonl", "valid.jsonl"):
        path = write_lines(tmp_path / name, numbered(50))
        assert sorted([*opened(path), *opened(path, "validation")]) == sorted(numbered(50))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_entered_once(tmp_path):
    write_lines(tmp_path / "elsewhere" / "a.jsonl", ["A cat sat."])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data") == ["A cat sat."]


@pytest.mark.parametrize("count", [2, 3, 60])
def test_two_stories_are_enough_for_a_validation_split(tmp_path, notes, count):
    texts = numbered(count)
    path = write_lines(tmp_path / "a.jsonl", texts)
    options = {"validation_fraction": 1e-9}
    train, validation = list(opened(path, **options)), list(opened(path, "validation", **options))
    assert len(validation) == 1 and sorted(train + validation) == sorted(texts)
    write_lines(path, texts[::-1] + texts)
    assert set(opened(path, "validation", **options)) == set(validation), "the same in any order, and with duplicates"
    assert "so few stories are held out" in notes()


# The hub

def test_a_hub_data_set_of_several_configurations(monkeypatch):
    import datasets

    def load(name, configuration=None):
        if configuration is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a-v1', 'b']\n")
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [f"{configuration} ends."] * 3})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of(lambda: opened("owner/name"))
    assert "2 configurations: a-v1, b" in message and "data.dataset=owner/name:a-v1" in message
    stories = opened("owner/name:b", validation="sample")
    assert list(stories) == ["b ends."] * 3 and "owner/name:b" in stories.name
    assert stories.identity != opened("owner/name:a-v1", validation="sample").identity


def test_tinystories_v2_comes_from_the_hubs_cache(tmp_path, monkeypatch):
    """Offline, from a cache folder as huggingface_hub lays it out."""
    import huggingface_hub

    home = tmp_path / "datasets--roneneldan--TinyStories"
    write(home / "refs" / "main", "0123abc")
    snapshot = home / "snapshots" / "0123abc"
    for split, text in (("train", "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n"), ("valid", "Three.\n<|endoftext|>\n")):
        write(snapshot / f"TinyStoriesV2-GPT4-{split}.txt", text)
    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: download(
        *arguments, **options, cache_dir=tmp_path, local_files_only=True))
    train, validation = opened("tinystories-v2"), opened("tinystories-v2", "validation")
    assert list(train) == ["One.", "Two."] and list(validation) == ["Three."]
    assert train.identity["revision"] == "0123abc" and str(tmp_path) not in json.dumps(train.identity)
    (snapshot / "TinyStoriesV2-GPT4-valid.txt").unlink()
    message = error_of(lambda: opened("tinystories-v2"))
    assert "roneneldan/TinyStories" in message and "connection" in message
