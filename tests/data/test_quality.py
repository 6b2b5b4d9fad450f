"""data.check_quality: what is wrong with the stories is printed before training, or ends the run. And the checks in a
token file: each fault of the stories with its number and an example."""

import json

import pytest

from config import UserError
from config.schema import DataConfig
from data.quality import DUPLICATE, LONG, NOT_ASCII, PATTERNS, SHORT, check_quality
from data.stories import open_stories
from data.token_files import checksum, make_fingerprint, open_token_file, prepare_tokens
from train import start_run

GOOD = "Once upon a time there was a cat. The cat had a hat. An owl saw the cat, and they were happy all day long."


def corpus(tmp_path, *texts):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_faults_are_counted(tmp_path):
    texts = [f"{GOOD} {number}." for number in range(40)] + ["", "It was cut", "â€œHiâ€\u009d said the cat. " + GOOD,
             *(f"{GOOD} <br> {number}." for number in (1, 2)), f"{GOOD} <unk>."]
    data = DataConfig(dataset=corpus(tmp_path, *texts), quality_sample_size=0, validation_fraction=0.001)
    line = check_quality(data)
    assert "\n" not in line and "43 good stories" in line  # one of 44 is held out
    assert "faults: left out: 1 empty or null; 1 cut off (" in line
    assert line.endswith("; 1 kept with a repaired encoding; 2 with HTML; 1 that spell a special token")


def test_only_the_sample_is_read(tmp_path):
    data = DataConfig(dataset=corpus(tmp_path, *(f"{GOOD} {number}." for number in range(40)), "It was cut"),
                      quality_sample_size=10, validation_fraction=0.001)
    assert "10 good stories" in check_quality(data) and "faults: none" in check_quality(data)


@pytest.mark.parametrize("clean", [True, False])
def test_strict_ends_the_run_if_something_was_found(tmp_path, clean):
    def data(*texts):
        return DataConfig(dataset=corpus(tmp_path, *texts), quality_strict=True, validation_fraction=0.001, clean=clean)

    good = [f"{GOOD} {number}." for number in range(40)]
    assert "faults: none" in check_quality(data(*good))
    with pytest.raises(UserError, match=r"1 cut off .* data\.quality_strict is true"):
        check_quality(data(*good, "It was cut"))
    with pytest.raises(UserError, match=r"[23] with HTML\. data\.quality_strict is true"):
        check_quality(data(*good, f"<p>{GOOD} 41.</p>", *(f"{GOOD} {number}.<br/>" for number in (42, 43))))


def test_training_prints_the_check_before_any_work(tiny_config, tmp_path, capsys):
    texts = [f"{GOOD} {number}." for number in range(40)] + ["It was cut"]
    settings = [f"data.dataset={corpus(tmp_path, *texts)}", "data.check_quality=true", "data.max_stories=null"]
    with pytest.raises(UserError, match="quality: "):
        start_run(tiny_config(*settings, "data.quality_strict=true"), None, None)
    assert not (tmp_path / "tokenizer").exists() and "tokenizer: " not in capsys.readouterr().out
    assert start_run(tiny_config(*settings, "training.max_steps=1", "sampling.prompts=[A cat]"), None, None) == 0
    out = capsys.readouterr().out
    assert out.startswith("quality: 40 good stories") and "1 cut off" in out.splitlines()[0]


def checks_of(file):
    """Number and example of each check by its name."""
    assert all(set(check) == {"name", "number", "example"} for check in file.checks)
    return {check["name"]: (check["number"], check["example"]) for check in reversed(file.checks)}  # the commonest


@pytest.fixture
def build(tmp_path, tokenizer, monkeypatch):
    """A function: training texts, validation texts, settings -> the token file of a split."""
    monkeypatch.chdir(tmp_path)

    def build(texts, validation, split="train", **settings):
        for name, stories in (("train", texts), ("valid", validation)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories),
                                                    encoding="utf-8")
        data = DataConfig(dataset="train.jsonl", validation="valid.jsonl", cache_dir="cache", **settings)
        return prepare_tokens(data, tokenizer, split, show_progress=False)
    return build


HTML, LINK, CONTROL, RUN, SPECIAL = PATTERNS


@pytest.mark.parametrize(("name", "faulty"), [
    (HTML, "He said <b>no</b>."), (HTML, '<a href="x">Read</A> it.'), (HTML, "A cat &amp; a dog. " + GOOD),
    (HTML, "It&#39;s late."), (LINK, "See https://x.org now."), (LINK, "See www.cats.com now."),
    (LINK, "Ask tom@x.org."),
    (CONTROL, "A\x0bcat."), (CONTROL, "A cat\x9d."), (CONTROL, "A cat \ue001."), (RUN, "Wait.........."),
    (RUN, "Brrrrrrrrrrr!"), (RUN, "ああああああああああ。"),
    (SPECIAL, "The end.<|im_end|>"), (SPECIAL, "An <unk> sat.")])
def test_each_fault_is_counted_with_its_place_as_the_example(build, name, faulty):
    texts = [f"{GOOD} {number}." for number in range(5)]
    checks = checks_of(build([*texts, f"{GOOD} {faulty} {GOOD}", *texts], [GOOD], quality_sample_size=0))
    assert checks[name][0] == 1 and max(faulty.split(), key=len)[:7] in checks[name][1]
    assert not any(checks[other][0] for other in PATTERNS if other != name)


def test_healthy_text_has_no_fault(build, stories):
    healthy = ["I <3 you, and 2 < 3, and R&D.", "Zzzzz... he slept -- a lot!!!", "Meet me @ noon.\nOr\tlater.",
               "“Größe,” said Zoë — 👩‍👩‍👧‍👦 故事", "[laughs] The INST is <here>: it cost 1000000 coins."]
    checks = checks_of(build([*stories, *(f"{GOOD} {text} {GOOD}" for text in healthy)], [GOOD]))
    assert not [name for name in PATTERNS if checks[name][0]]


def test_a_token_file_says_what_its_stories_are_like(build):
    texts = [f"{GOOD} {number}." for number in range(20)]
    damaged = ["", "It was cut", "â€œHiâ€\u009d said the cat. " + GOOD, "A short one.", "Café. " + GOOD, GOOD * 101]
    checks = checks_of(build([*texts, *damaged, texts[3], texts[3], texts[5]], [texts[3], texts[7], "Other. " + GOOD]))
    assert checks[DUPLICATE] == (3, texts[3][:59])
    assert checks["of 3 validation stories are in this split as well (more than 0.1%)"] == (2, texts[3][:59])
    assert checks[SHORT] == (1, "A short one.") and checks[LONG][0] == 1
    assert checks[NOT_ASCII][0] == 2 and "Café" not in checks[NOT_ASCII][1] and "“Hi”" in checks[NOT_ASCII][1]
    assert checks["characters in the shortest"] == (12, "A short one.")
    assert checks["characters in the longest"] == (len(GOOD) * 101, GOOD[:59])
    assert checks["of the searched begin alike"][0] == 24
    assert checks["kept with a repaired encoding"][0] == 1 and checks["left out: empty or null"][0] == 1
    assert [number for name, (number, _) in checks.items() if name.startswith("left out: cut off")] == [1]


def test_the_searched_stories_are_spread_evenly_and_no_more_than_asked_for(build):
    texts = [f"{GOOD} {number}." + " See www.cats.com." * (number >= 50) for number in range(100)]
    for size, searched, found in ((0, 100, 50), (100, 100, 50), (99, 50, 25), (12, 7, 3)):
        checks = checks_of(build(texts, [GOOD], quality_sample_size=size, max_stories=100 + size))
        assert checks["searched for the next five"][0] == searched and checks[LINK][0] == found


def test_stories_that_stand_in_both_splits_are_a_note_above_a_thousandth(build, capsys):
    validation = [f"{GOOD} {number}." for number in range(2000)]
    for both, noted in ((2, False), (3, True)):
        for _ in range(2):  # built, and reused
            build([*validation[:both], validation[0], "Other. " + GOOD], validation)
            note = f"note: train: {both} of 2,000 validation stories are in this split as well (more than 0.1%): "
            assert (note in capsys.readouterr().out) == noted
    build(validation, validation[:3], "validation")
    assert "in this split as well" not in capsys.readouterr().out


def test_check_quality_prints_what_was_found_while_the_file_is_built(build, capsys):
    texts = [GOOD, GOOD, f"{GOOD} <br> 1."]
    build(texts, [GOOD + " 2."])
    assert "quality: " not in capsys.readouterr().out
    build(texts, [GOOD + " 2."], max_stories=3, check_quality=True)
    out = capsys.readouterr().out
    assert f"quality: train: 1 {DUPLICATE}: {GOOD[:59]!r}\n" in out and "1 with HTML: " in out and " 0 " not in out


def test_a_token_file_without_checks_is_opened(build, tokenizer):
    file = build([GOOD, GOOD], [GOOD])
    path, header = file.path, json.loads(file.path.with_suffix(".json").read_text(encoding="utf-8"))
    del header["checks"], header["checksum"]
    header["checksum"] = checksum(header)
    path.with_suffix(".json").write_text(json.dumps(header), encoding="utf-8")
    data = DataConfig(dataset="train.jsonl", validation="valid.jsonl", cache_dir="cache")
    opened, _ = open_token_file(path, make_fingerprint(open_stories(data, "train"), tokenizer))
    assert opened.checks == [] and opened.tokens.tolist() == file.tokens.tolist()
    assert build([GOOD, GOOD], [GOOD]).checks  # other times of the files: rebuilt
