"""Every source gives the same stories, splits never mix, and errors are one clear line."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import UserError
from config.command_line import REPO
from config.schema import DataConfig
from data import readers, sources
from data.stories import describe_counts, open_stories

STORIES = [
    "Once there was a cat.\nIt sat on the mat, and it was happy.",
    "“Hello,” said Zoë — naïve as ever.\n\nShe drank a café crème with Ñandú 😀.",
    "Tom said, \"I see <|end of|> it!\"",
    "مرحبا بالعالم. Привет, мир! 日本語…",
]


def write_txt(path: Path, texts: list[str], newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "".join(f"{text}\n<|endoftext|>\n" for text in texts).replace("\n", newline)
    path.write_bytes(layout.encode("utf-8"))
    return path


def write_jsonl(path: Path, records: list) -> Path:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode("utf-8"))
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def corpus(tmp_path: Path, kind: str, texts: list[str]) -> Path:
    """The texts in a file (or saved data set) of the kind, with other fields beside them where it can have any."""
    path = tmp_path / f"corpus.{kind}"
    if kind == "txt":
        return write_txt(path, texts)
    if kind == "jsonl":
        return write_jsonl(path, [{"summary": "x", "text": text} for text in texts])
    if kind == "json":
        others = {"instruction": {"words": ["a", "]"]}, "summary": "", "source": "GPT-4"}
        records = [{"story": text, **others} for text in texts]
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        return path
    if kind == "parquet":
        return write_parquet(path, number=list(range(len(texts))), text=texts)
    from datasets import Dataset

    Dataset.from_dict({"number": list(range(len(texts))), "text": texts}).save_to_disk(str(path))
    return path


def train(path: Path | str, **options) -> list[str]:
    """All stories: validation is elsewhere, so that none is held out."""
    return list(open_stories(DataConfig(dataset=str(path), validation="sample", **options), "train"))


def opened(path: Path | str, split: str = "train", **options):
    return open_stories(DataConfig(dataset=str(path), **options), split)


def error_of(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- formats


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet", "saved"])
def test_every_format_gives_the_same_stories(tmp_path, kind, clean):
    path = corpus(tmp_path, kind, STORIES)
    source = open_stories(DataConfig(dataset=str(path), validation="sample", clean=clean), "train")
    assert list(source) == STORIES
    assert list(source) == STORIES, "a second pass reads it again"
    assert source.counts["stories"] == len(STORIES)
    assert source.counts["bytes"] == sum(len(text.encode("utf-8")) for text in STORIES)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 64, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_chunk_borders_do_not_show(tmp_path, monkeypatch, chunk, newline):
    """Some border falls inside every separator, every character of several bytes and every JSON escape."""
    monkeypatch.setattr(readers, "CHUNK", chunk)
    txt = write_txt(tmp_path / "a.txt", STORIES, newline)
    assert train(txt, clean=False) == [text.replace("\n", newline) for text in STORIES]
    for kind in ("json", "jsonl"):
        assert train(corpus(tmp_path, kind, STORIES), clean=False) == STORIES


def test_only_the_layouts_own_newlines_are_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\nA.\n\n<|endoftext|>\r\n\r\n B. \r\n\r\n<|endoftext|>C.<|endoftext|>D.\n")
    assert train(path, clean=False) == ["\n\nA.\n", "\r\n B. \r\n", "C.", "D."]
    assert train(path) == ["A.", "B.", "C.", "D."]


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_story(tmp_path, kind):
    path = corpus(tmp_path, kind, STORIES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert train(path, clean=False) == STORIES


def test_json_lines_may_have_any_line_ends_and_hold_line_separators(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\n{"text": "A\u2028b."}\r\n\r\n{"text": "C\\r\\nd."}'.encode())
    assert train(path, clean=False) == ["A\u2028b.", "C\r\nd."]


def test_the_column_can_be_chosen(tmp_path):
    records = [{"text": "The text.", "story": "The story.", "tale": "The tale."}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert train(path) == ["The text."]
    assert train(path, text_column="tale") == ["The tale."]
    parquet = write_parquet(tmp_path / "a.parquet", story=["The story."], tale=["The tale."])
    assert train(parquet) == ["The story."]
    assert train(parquet, text_column="tale") == ["The tale."]


def test_a_column_of_a_source_without_columns_is_reported_once(tmp_path, capsys):
    """Reported, not refused: data.validation may be of another kind, and a checkpoint's config may name other files."""
    sources.say_once.cache_clear()
    for source in (str(write_txt(tmp_path / "a.txt", STORIES)), "sample"):
        for split in ("train", "validation"):
            opened(source, split, text_column="tale")
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "data.text_column is tale" in printed and source in printed
        opened(source)
    opened(write_jsonl(tmp_path / "a.jsonl", [{"tale": "The tale."}]), text_column="tale")
    assert capsys.readouterr().out == ""


def test_a_big_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    """All that is small: so is what is read at once, and the file is still many times what may be held."""
    assert readers.CHUNK <= 1 << 20
    monkeypatch.setattr(readers, "CHUNK", readers.CHUNK // 8)
    text = "Lily had a red ball, and she said “hello” to it. " * 20
    jsonl, txt = tmp_path / "big.jsonl", tmp_path / "big.txt"
    line, piece = json.dumps({"text": text}) + "\n", f"{text}\n<|endoftext|>\n"
    jsonl.write_bytes(line.encode("utf-8") * (3_000_000 // len(line)))
    txt.write_bytes(piece.encode("utf-8") * (3_000_000 // len(piece)))
    for path in (jsonl, txt):
        source = opened(path, validation="sample")
        next(iter(source))  # what is imported on first use is not counted
        tracemalloc.start()
        try:
            number = sum(1 for _ in source)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert number > 2_500
        assert peak < 500_000, f"{path.name}: {peak:,} bytes"


# ---- errors are one line


def test_bad_bytes_name_file_and_line(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"A.\n<|endoftext|>\nB.\nIt was caf\xe9.\n<|endoftext|>\n")
    message = error_of(lambda: train(path))
    assert f"{path}, line 4:" in message and "0xe9" in message
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "A."}\n\n{"text": "caf\xe9"}\n')
    assert f"{path}, line 3:" in error_of(lambda: train(path))
    path = tmp_path / "cut.txt"
    path.write_bytes("A.\n<|endoftext|>\nThe end…".encode()[:-1])
    assert f"{path}, line 3:" in error_of(lambda: train(path))


@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize("bad", ['{"text": "A.", }', '{"text": "A.', "{'text': 'A.'}", "text"])
def test_bad_json_names_file_and_line(tmp_path, monkeypatch, chunk, bad):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "First."}}\n\n{bad}\n{{"text": "Last."}}\n', encoding="utf-8")
    message = error_of(lambda: train(path))
    assert f"{path}, line 3, object 2:" in message and "not valid JSON" in message


def test_a_json_array_that_ends_early_is_an_error(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text('[{"story": "A."},\n {"story": "B', encoding="utf-8")
    assert f"{path}, line 2, object 2:" in error_of(lambda: train(path))


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "A."}, {"title": "B", "body": "B."}]', encoding="utf-8")
    assert train(path) == ["A."]  # a record without the field is an empty one
    path.write_text('[{"title": "A", "body": "A."}, {"title": "B", "body": "B."}]', encoding="utf-8")
    message = error_of(lambda: train(path))
    assert all(part in message for part in (str(path), "object 1", "text or story", "title, body", "data.text_column"))
    path = write_parquet(tmp_path / "a.parquet", title=["A"], body=["A."])
    message = error_of(lambda: train(path, text_column="tale"))
    assert all(part in message for part in (str(path), "no field tale", "title, body", "data.text_column"))


def test_a_value_that_is_no_text_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "A."}, {"text": 7}])
    message = error_of(lambda: train(path))
    assert f"{path}, line 2" in message and "text is 7" in message
    path = write_parquet(tmp_path / "a.parquet", text=[1, 2, 3])
    assert f"{path}, row 1: text is 1" in error_of(lambda: train(path))
    path = tmp_path / "b.json"
    path.write_text('["A story.", "Another."]', encoding="utf-8")
    assert "expected an object" in error_of(lambda: train(path))


def test_a_file_that_is_no_parquet_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    assert f"{path}: cannot be read as parquet" in error_of(lambda: train(path))


def test_an_object_that_is_too_large_is_reported_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 100)
    monkeypatch.setattr(readers, "MAX_OBJECT", 1000)
    path = tmp_path / "a.json"
    path.write_text('{"text": "' + "A cat. " * 1000 + '"}', encoding="utf-8")
    message = error_of(lambda: next(iter(opened(path, validation="sample"))))
    assert str(path) in message and "larger than 1 MiB" in message


def test_missing_sources_are_reported(tmp_path):
    for spec in (tmp_path / "none.txt", tmp_path / "none", tmp_path / "*.txt", "C:\\none", "C:/none", "none.jsonl",
                 "~/none/x"):
        message = error_of(lambda spec=spec: opened(spec))
        assert f"data.dataset {spec}: no such file or folder" in message
    message = error_of(lambda: opened("sample", "validation", validation="./none.txt"))
    assert message.startswith("data.validation ./none.txt:")
    (tmp_path / "a.doc").write_text("text\nA.\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "a.doc"):
        message = error_of(lambda path=path: opened(path))
        assert str(path) in message and ".txt, .jsonl, .json, .csv, .tsv, .parquet, each also as .gz" in message


@pytest.mark.parametrize(("spec", "meant"), [("tinystorys", "did you mean tinystories?"),
                                             ("TinyStories", "did you mean tinystories?"),
                                             ("samples", "did you mean sample?"), ("shakespeare", "known:")])
def test_a_misspelt_name_is_reported(spec, meant):
    message = error_of(lambda: opened(spec))
    assert spec in message and meant in message


def test_nothing_left_is_reported_with_the_reasons(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [" "] * 10 + ["half \ufffd \ufffd"] * 2])
    message = error_of(lambda: train(path))
    assert f"{path}, train: no story in it (left out: 10 empty or null; 2 with lost characters, such as" in message
    path = tmp_path / "b.txt"
    path.write_bytes(b"")
    assert str(path) in error_of(lambda: train(path))
    path = write_txt(tmp_path / "c.txt", ["The only story."])
    message = error_of(lambda: list(opened(path, "validation", validation_fraction=1e-9)))
    assert "one document" in message and "data.validation" in message and "data.separator" in message


# ---- the hub


def test_a_data_set_that_cannot_be_loaded_is_reported(tmp_path):
    """In another process, since `datasets` reads these variables once; it must not reach for the network."""
    code = ("from config.command_line import run_script; from config.schema import DataConfig;"
            "from data.stories import open_stories;"
            "run_script(lambda name: open_stories(DataConfig(dataset=name), 'train'), 'nobody/nothing')")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.dataset nobody/nothing:") and done.stderr.count("\n") == 1
    assert "connection" in done.stderr and "folder" in done.stderr


def hub(monkeypatch, **splits):
    """Let load_dataset() give these splits (or raise one that is an error), as if from the cache of revision abc."""
    import datasets

    def load(dataset_id, configuration=None):
        if isinstance(splits.get("error"), Exception):
            raise splits["error"]
        tables = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
        for name in tables:
            files = property(lambda self: [{"filename": "/home/me/.cache/abc/rows.arrow"}])
            tables[name].__class__ = type("Cached", (datasets.Dataset,), {"cache_files": files})
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_hub_data_set_has_its_own_validation_split(monkeypatch):
    hub(monkeypatch, train={"id": [1, 2], "text": ["A.", "B."]}, validation={"id": [3], "text": ["C."]})
    for spec, name in (("tinystories", "roneneldan/TinyStories"), ("owner/name", "owner/name")):
        assert list(opened(spec)) == ["A.", "B."]
        assert list(opened(spec, "validation")) == ["C."]
        assert opened(spec).name == f"{name}, train"
    first, second = opened("tinystories").identity, opened("tinystories").identity
    assert first == second and "abc/rows.arrow" in first["files"] and "/home" not in json.dumps(first)
    assert list(opened("sample", "validation", validation="owner/name")) == ["C."]


def test_a_hub_data_set_without_validation_has_stories_held_out(monkeypatch):
    texts = [f"Story {i} ends." for i in range(200)]
    hub(monkeypatch, train={"text": texts})
    kept, held = (list(opened("owner/name", split, validation_fraction=0.2)) for split in ("train", "validation"))
    assert held and sorted(kept + held) == sorted(texts)
    hub(monkeypatch, test={"text": texts})
    message = error_of(lambda: opened("owner/name"))
    assert "owner/name" in message and "train" in message and "test" in message


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("BuilderConfig?\n['a', 'b']"),
                                   FileNotFoundError("does not exist"), RuntimeError("scripts are not supported")])
def test_whatever_the_hub_says_is_one_line(monkeypatch, error):
    hub(monkeypatch, error=error)
    assert str(error).split("\n")[0] in error_of(lambda: opened("owner/name"))


@pytest.mark.parametrize(("offline", "times"), [(False, 1), (True, 0)])
def test_what_may_take_a_while_is_said_before_it_is_done_and_once(monkeypatch, capsys, offline, times):
    import datasets
    hub(monkeypatch, train={"text": ["A."]}, validation={"text": ["B."]})
    load, printed = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: printed.append(capsys.readouterr().out) or load(name))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    for split in ("train", "validation"):
        opened(f"somebody/{offline}", split)
    assert printed[0].count(f"stories: asking the hub for somebody/{offline} (") == times and printed[1] == ""


# ---- splits


def test_a_folders_validation_files_are_its_validation_split(tmp_path):
    write_txt(tmp_path / "TinyStoriesV2-GPT4-train.txt", ["A."])
    write_txt(tmp_path / "TinyStoriesV2-GPT4-valid.txt", ["V."])
    write_txt(tmp_path / "b" / "more.txt", ["B."])
    write_txt(tmp_path / "validation" / "part.txt", ["W."])
    write_txt(tmp_path / ".git" / "hidden.txt", ["Hidden."])
    (tmp_path / "README.md").write_text("Not a story.", encoding="utf-8")
    for spec in (tmp_path, tmp_path / "**" / "*.txt"):
        assert list(opened(spec)) == ["A.", "B."]
        assert list(opened(spec, "validation")) == ["V.", "W."]


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    write_txt(tmp_path / "tales" / "a.txt", ["A."])
    corpus(tmp_path, "saved", ["A."])
    for spec in ("~/tales", "~/tales/a.txt", "~/tales/*.txt", "~/corpus.saved"):
        assert train(spec) == ["A."]


def test_files_that_are_all_named_valid_are_no_split(tmp_path):
    write_txt(tmp_path / "valid.txt", [f"Story {i} ends." for i in range(100)])
    for spec in (tmp_path, tmp_path / "valid.txt"):
        assert 0 < len(list(opened(spec, "validation", validation_fraction=0.5))) < 100


def test_validation_from_elsewhere_is_never_trained_on(tmp_path):
    write_txt(tmp_path / "a.txt", ["A."])
    write_txt(tmp_path / "b.txt", ["B."])
    held = write_txt(tmp_path / "held.txt", ["H."])
    options = {"validation": str(held)}
    assert list(opened(tmp_path, **options)) == ["A.", "B."]
    assert list(opened(tmp_path, "validation", **options)) == ["H."]
    assert "data.validation" in error_of(lambda: opened(held, validation=str(tmp_path)))


def test_a_saved_data_set_with_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"train": ["A.", "B."], "validation": ["C."]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(
        str(tmp_path / "saved"))
    for name, texts in splits.items():
        assert list(opened(tmp_path / "saved", name)) == texts


def test_held_out_stories_are_a_stable_share(tmp_path):
    texts = [f"Story number {i} ends here." for i in range(4000)]

    def split(name: str, texts: list[str]) -> tuple[list[str], list[str]]:
        path = write_txt(tmp_path / name, texts)
        return tuple(list(opened(path, side, validation_fraction=0.1)) for side in ("train", "validation"))

    kept, held = split("a.txt", texts)
    assert sorted(kept + held) == sorted(texts) and not set(kept) & set(held)
    assert 320 < len(held) < 480  # 400 and four standard deviations
    again = split("b.txt", [f"New {i}." for i in range(500)] + texts[::-1] + texts)
    assert set(held) == set(again[1]) & set(texts), "a story's side depends on its text alone"
    assert not set(again[0]) & set(again[1]), "duplicates stay on one side"
    source = opened(tmp_path / "a.txt", "train", validation_fraction=0.1)
    list(source)
    assert source.counts["held_out"] == len(held)


def test_max_stories_limits_train_only_and_after_holding_out(tmp_path):
    path = write_txt(tmp_path / "a.txt", [f"Story number {i} ends here." for i in range(1000)])
    everything = list(opened(path, validation_fraction=0.2))
    limited = opened(path, validation_fraction=0.2, max_stories=50)
    assert list(limited) == everything[:50] and limited.counts["stories"] == 50
    sides = [list(opened(path, "validation", validation_fraction=0.2, max_stories=n)) for n in (50, None)]
    assert sides[0] == sides[1] and len(sides[0]) > 100


def test_deduplicate_leaves_out_duplicates_and_from_training_what_stands_in_validation(tmp_path):
    def data(**settings):
        return DataConfig(dataset=str(tmp_path / "train.txt"), validation=str(tmp_path / "valid.txt"), **settings)

    write_txt(tmp_path / "train.txt", ["One.", "Two.", "One.", "Three.", "Two.", "Four.", "one."])
    write_txt(tmp_path / "valid.txt", ["Three.", "Five.", "Five."])
    train, validation = (open_stories(data(deduplicate=True, clean=False), split) for split in ("train", "validation"))
    for _ in range(2):  # each iteration is a new one
        assert list(train) == ["One.", "Two.", "Four.", "one."] and list(validation) == ["Three.", "Five."]
    assert (train.counts["duplicate"], train.counts["in_validation"]) == (2, 1)
    assert validation.counts["duplicate"] == 1 and not validation.counts["in_validation"]
    noted = describe_counts(train.counts, train.counts.examples)
    assert noted == "left out: 2 exact duplicates, such as 'One.'; 1 that are in validation, such as 'Three.'"
    assert list(open_stories(data(deduplicate=True, clean=False, max_stories=3), "train")) == ["One.", "Two.", "Four."]
    assert len(list(open_stories(data(clean=False), "train"))) == 7
    write_txt(tmp_path / "train.txt", ["Three.", "Five."])
    with pytest.raises(UserError, match=r"no story in it .*2 that are in validation"):
        list(open_stories(data(deduplicate=True, clean=False), "train"))


def test_identity_differs_with_deduplicate_and_then_with_the_validation_split(tmp_path):
    for name in ("train", "valid", "other"):
        write_txt(tmp_path / f"{name}.txt", [f"The {name} story.", "Another."])

    def identity(validation, split="train", **settings):
        data = DataConfig(dataset=str(tmp_path / "train.txt"), validation=str(tmp_path / validation), **settings)
        return open_stories(data, split).identity

    assert identity("valid.txt") == identity("other.txt") and "deduplicate" not in identity("valid.txt")
    unlike = [identity("valid.txt"), identity("valid.txt", deduplicate=True), identity("other.txt", deduplicate=True),
              identity("valid.txt", "validation"), identity("valid.txt", "validation", deduplicate=True)]
    assert all(one != other for one, other in itertools.combinations(unlike, 2))


@pytest.mark.parametrize("dataset", ["sample", "own.txt"])
def test_splits_that_share_no_story_are_not_compared(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    write_txt(tmp_path / "own.txt", [f"Story {number}." for number in range(300)])
    stories = open_stories(DataConfig(dataset=dataset, deduplicate=True), "train")
    monkeypatch.setattr("data.stories.open_stories", None)
    assert stories.validation_hashes == set() and next(iter(stories))


def test_sample_splits_share_no_story():
    kept, held = (list(opened("sample", split, max_stories=300)) for split in ("train", "validation"))
    assert (len(kept), len(held)) == (300, 200)
    assert not set(kept) & set(held)
    assert list(islice(opened("sample"), 300)) == kept


def test_sample_validation_leaves_out_what_train_has(tmp_path, monkeypatch):
    source = tmp_path / "maker.py"
    source.write_text("made", encoding="utf-8")
    maker = SimpleNamespace(__file__=str(source), TEXTS=source, synthetic_stories=lambda seed, start=0: (
        f"Story {i % 5 if i % 2 else i} ends." for i in range(start, start + 10**6)))
    monkeypatch.setitem(sys.modules, "data.synthetic_stories", maker)
    monkeypatch.setattr(sys.modules["data"], "synthetic_stories", maker, raising=False)
    kept, held = (list(opened("sample", split, max_stories=20)) for split in ("train", "validation"))
    assert len(held) == 200 and not set(kept) & set(held)
    before = opened("sample").identity
    source.write_text("edited", encoding="utf-8")
    assert opened("sample").identity != before, "an edited generator makes other stories"


# ---- identity


def test_identity_differs_where_the_stories_do(tmp_path):
    path = corpus(tmp_path, "jsonl", STORIES)
    config = {"dataset": str(path)}
    variants = [{}, {"clean": False}, {"max_stories": 2}, {"max_stories": 3}, {"validation_fraction": 0.5},
                {"text_column": "text"}, {"validation": "sample"}]
    identities = [open_stories(DataConfig(**config, **variant), "train").identity for variant in variants]
    identities.append(open_stories(DataConfig(**config), "validation").identity)
    os.utime(path, ns=(1, 1))
    identities.append(open_stories(DataConfig(**config), "train").identity)
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(1, 1))
    identities.append(open_stories(DataConfig(**config), "train").identity)
    texts = [json.dumps(identity, sort_keys=True) for identity in identities]
    assert len(set(texts)) == len(texts)
    assert [json.loads(json.dumps(identity)) for identity in identities] == identities, "plain JSON values"


def test_identity_is_equal_where_the_stories_are(tmp_path):
    path = write_txt(tmp_path / "a.txt", STORIES)
    same = [{"tokenizer_path": "x", "max_seq_len": 9}, {"text_column": "text"}]
    assert all(opened(path, **options).identity == opened(path).identity for options in same)
    whole = [opened(path, validation="sample", validation_fraction=share).identity for share in (0.1, 0.2)]
    assert whole[0] == whole[1], "a share that is not used does not count"
    assert opened(path, "validation", max_stories=3).identity == opened(path, "validation").identity


@pytest.mark.parametrize("spec", ["sample", "file"])
def test_identity_is_equal_in_another_process(tmp_path, spec):
    spec = str(write_txt(tmp_path / "a.txt", STORIES)) if spec == "file" else spec
    code = ("import json; from config.schema import DataConfig; from data.stories import open_stories;"
            f"data = DataConfig(dataset={spec!r});"
            "print(json.dumps([open_stories(data, split).identity for split in ('train', 'validation')]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [opened(spec, split).identity for split in ("train", "validation")]


# ---- the rest


def test_total_bytes_is_about_what_a_pass_yields(tmp_path):
    texts = [f"Story number {i} ends here, and it was a long one. " * 20 + "Bye." for i in range(1000)]
    path = write_txt(tmp_path / "a.txt", texts)
    for split in ("train", "validation"):
        source = opened(path, split, validation_fraction=0.2)
        list(source)
        assert source.counts["bytes"] == pytest.approx(source.total_bytes, rel=0.2)


def test_importing_is_light():
    code = "import sys, data.stories; print(*({'torch', 'datasets', 'pyarrow', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
