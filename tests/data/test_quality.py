"""data.check_quality: what is wrong with the stories is printed before training, or ends the run."""

import json

import pytest

from config import UserError
from config.schema import DataConfig
from data.quality import check_quality
from train import start_run

GOOD = "Once upon a time there was a cat. The cat had a hat. An owl saw the cat, and they were happy all day long."


def corpus(tmp_path, *texts):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_faults_are_counted(tmp_path):
    texts = [f"{GOOD} {number}." for number in range(40)] + ["", "It was cut", "â€œHiâ€\u009d said the cat. " + GOOD]
    data = DataConfig(dataset=corpus(tmp_path, *texts), quality_sample_size=0, validation_fraction=0.001)
    line = check_quality(data)
    assert "\n" not in line and "40 good stories" in line  # one of 41 is held out
    assert "1 empty, 1 cut off, 1 with a damaged encoding that cleaning repairs" in line
    assert "% of words are articles" in line and 20 < float(line.split("; ")[-1].split("%")[0]) < 30


def test_articles_are_counted_in_english_text_only(tmp_path):
    german = "Es war einmal eine Katze. Die Katze hatte einen Hut. A, an: das sah ein Uhu, und alle waren froh."
    data = DataConfig(dataset=corpus(tmp_path, *(f"{german} {number}." for number in range(40))))
    assert "good stories" in check_quality(data) and "words are articles" not in check_quality(data)


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
    with pytest.raises(UserError, match=r"1 cut off; .* data\.quality_strict is true"):
        check_quality(data(*good, "It was cut"))


def test_training_prints_the_check_before_any_work(tiny_config, tmp_path, capsys):
    texts = [f"{GOOD} {number}." for number in range(40)] + ["It was cut"]
    settings = [f"data.dataset={corpus(tmp_path, *texts)}", "data.check_quality=true", "data.max_stories=null"]
    with pytest.raises(UserError, match="quality: "):
        start_run(tiny_config(*settings, "data.quality_strict=true"), None, None)
    assert not (tmp_path / "tokenizer").exists() and "tokenizer: " not in capsys.readouterr().out
    assert start_run(tiny_config(*settings, "training.max_steps=1", "sampling.prompts=[A cat]"), None, None) == 0
    out = capsys.readouterr().out
    assert out.startswith("quality: 40 good stories") and "1 cut off" in out.splitlines()[0]
