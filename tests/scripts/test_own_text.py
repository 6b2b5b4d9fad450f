"""Training on somebody's own text, from the command line: languages, messages, notes, and what is never lost."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import REPO
from tokenizers import normalizers

import evaluate
import generate
import train
import train_custom_tokenizer
from data import sources
from data.synthetic_stories import synthetic_stories

STORIES = {  # sentences of which a test makes stories
    "Hindi": ["एक लड़की थी।", "उसका नाम मीरा था।", "वह बाग में गई।", "उसने एक लाल फूल देखा!", "“कितना सुंदर!” उसने कहा।"],
    "Marathi": ["एक मुलगा होता.", "त्याचे नाव राम होते.", "तो बागेत गेला.", "त्याने एक चेंडू पाहिला!", "“चला खेळूया,” तो म्हणाला."],
    "Bengali": ["একটি মেয়ে ছিল।", "তার নাম মিতা।", "সে বাগানে গেল।", "সে একটি ফুল দেখল!", "“কী সুন্দর!” সে বলল।"],
    "Arabic": ["كانت هناك فتاة صغيرة.", "اسمها ليلى.", "ذهبت إلى الحديقة.", "هل رأت زهرة؟", "قالت: «ما أجملها!»"],
    "Japanese": ["女の子がいました。", "名前はさくらです。", "公園へ行きました。", "赤い花を見ました！",
                 "「きれいだね」と言いました。"],
}

CPU = ("--device", "cpu", "--compute", "float32")


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make_stories(sentences, count=150):
    draw, space = random.Random(0), "" if sentences is STORIES["Japanese"] else " "
    return [space.join(draw.choice(sentences) for _ in range(draw.randrange(8, 20))) for _ in range(count)]


@pytest.fixture
def run_train(workplace, train_here):
    """A function: arguments -> exit status, output, errors of train.py with the tiny model; all validation held out."""
    sources.say_once.cache_clear()
    return lambda *arguments: train_here("--set", "data.validation=null", "--set", "training.max_steps=4", *arguments)


@pytest.mark.parametrize("language", STORIES)
def test_a_language_goes_all_the_way(run_train, run_main, workplace, language):
    """Cleaning, tokenizer, training, generation and evaluation; no word about English articles."""
    stories = make_stories(STORIES[language])
    path = write_jsonl(workplace / "stories.jsonl", stories)
    beginning = STORIES[language][0]
    status, out, error = run_train("--set", f"data.dataset={path}", "--set", f"sampling.prompts=['{beginning}']",
                                   "--set", "data.validation_fraction=0.2")
    assert status == 0, error
    kept = [int(line.split(" stories, ")[0].split()[-1]) for line in out.splitlines() if " stories, " in line]
    assert sum(kept) == len(stories) and "cut off" not in out and "repaired" not in out and "lost" not in out
    status, story, error = run_main(generate, "--device", "cpu")
    assert status == 0 and story.startswith(beginning), error
    status, evaluated, error = run_main(evaluate, "--checkpoint", "checkpoints/quickstart/best_model.pth",
                                        "--num_stories", "5", "--out", "result.json")
    assert status == 0, error
    result = json.loads((workplace / "result.json").read_text(encoding="utf-8"))
    assert result["likelihood"]["val_loss"] > 0 and ("table" in result) == (language != "Japanese")
    assert ("the text has no spaces between its words" in evaluated) == (language == "Japanese")
    assert "article" not in out + evaluated


def test_the_comparison_is_left_out_where_stories_are_too_few(run_train, run_main, workplace):
    path = write_jsonl(workplace / "stories.jsonl", [f"Tale{index}." * 30 for index in range(40)])
    assert run_train("--set", f"data.dataset={path}")[0] == 0
    status, out, error = run_main(evaluate, "--checkpoint", "checkpoints/quickstart/best_model.pth", "--out", "e.json")
    assert status == 0, error
    assert "note: stories were not compared: none of the" in out
    assert json.loads((workplace / "e.json").read_text(encoding="utf-8"))["likelihood"]["tokens"] > 0


def test_each_split_says_what_it_kept_and_what_it_left_out(run_train, workplace, stories):
    texts = [*stories[:200], "Once upon a time there was a", "", "It was cafÃ©. " * 9, "lost \ufffd \ufffd."]
    path = write_jsonl(workplace / "stories.jsonl", texts)
    status, out, error = run_train("--set", f"data.dataset={path}", "--set", "data.max_stories=100",
                                   "--set", "data.validation_fraction=0.2")
    assert status == 0, error
    lines = {line.split(":")[1].strip(): line for line in out.splitlines() if "left out" in line}
    for part in ("1 empty or null", "1 cut off (under 100 characters, without an end mark; data.clean: false keeps "
                 "them), such as 'Once upon a time there was a'", "1 with lost characters, such as",
                 "such as 'It was cafÃ©"):
        assert part in lines["validation"], part
    assert "held out for validation" in lines["train"] and "in the training split" in lines["validation"]
    assert "only the first 100 (data.max_stories), and there are more" in lines["train"] and "dropped" not in out
    assert "tokens: train: 100 stories, " in out and f"from {path}, train" in out
    again = run_train("--set", f"data.dataset={path}", "--set", "data.max_stories=100",
                      "--set", "data.validation_fraction=0.2")[1]
    assert lines["train"] in again and lines["validation"] in again, "reused token files say it too"


# The tokenizer belongs to the text

@pytest.mark.parametrize("names", [["tokenizer.model", "tokenizer_config.json"], ["vocab.json", "merges.txt"],
                                   ["tokenizer_config.json"], ["notes.txt"]])
def test_a_folder_with_another_tokenizer_is_never_written_into(run_train, run_main, workplace, names):
    (workplace / "theirs").mkdir()
    for name in names:
        (workplace / "theirs" / name).write_text("{}", encoding="utf-8")
    for status, out, error in (run_train("--set", "data.tokenizer_path=theirs"),
                               run_main(train_custom_tokenizer, "--dataset", "sample", "--output_dir", "theirs")):
        assert status == 2 and error.count("\n") == 1 and "tokenizer: training" not in out
        assert names[0] in error and "no tokenizer.json" in error and "new folder" in error
    assert sorted(path.name for path in (workplace / "theirs").iterdir() if path.name != ".lock") == sorted(names)
    assert all((workplace / "theirs" / name).read_text(encoding="utf-8") == "{}" for name in names)


def test_the_tokenizer_of_other_text_is_a_warning(run_train, workplace):
    fits = run_train()[1]
    assert "warning" not in fits
    path = write_jsonl(workplace / "hindi.jsonl", make_stories(STORIES["Hindi"]))
    options = ["--set", f"data.dataset={path}", "--set", "training.output_dir=other"]
    for _ in range(2):  # when the token file is built, and when it is reused
        out = run_train(*options)[1]
        assert "warning: the tokenizer was made from other text: 1.0" in out and "data.tokenizer_path" in out
    assert "warning" not in run_train(*options, "--set", "data.tokenizer_path=tokenizer/hindi")[1]


def test_the_tokenizer_needs_no_validation_split(run_main, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "play.txt").write_text("A short play. Enter a cat.", encoding="utf-8")
    status, out, error = run_main(train_custom_tokenizer, "--dataset", "play.txt", "--vocab_size", "300",
                                  "--output_dir", "tok")
    assert status == 0 and (workplace / "tok" / "tokenizer.json").exists(), error
    assert "note: no held-out stories" in out


def test_a_run_that_cannot_be_leaves_no_tokenizer(run_train, workplace):
    (workplace / "short.txt").write_text("A short play. Enter a cat.", encoding="utf-8")
    status, out, error = run_train("--set", "data.dataset=short.txt", "--set", "data.tokenizer_path=tokenizer/short")
    assert status == 2 and "too short to hold out its end" in error and "tokenizer: training" not in out
    assert not (workplace / "tokenizer" / "short" / "tokenizer.json").exists()


# Messages and habits

@pytest.mark.parametrize(("arguments", "advice"), [
    (["--batch_size", "32"], "use --set training.batch_size=32"), (["--max_iters=9"], "use --set training.max_steps=9"),
    (["--learning-rate", "1e-3"], "use --set optimizer.learning_rate=1e-3"),
    (["--n_embd"], "use --set model.d_model=VALUE"), (["config/x.yaml"], "use --config config/x.yaml"),
    (["a/b.pth"], "use --checkpoint a/b.pth"), (["--nonsense"], "--help lists the flags"),
    (["--set", "learning_rate=1e-3"], "did you mean optimizer.learning_rate?"),
    (["--set", "max_iters=3"], "did you mean training.max_steps?"),
    (["--set", "training.max_steps", "5"], "use --set training.max_steps=5"),
    (["--set", "training.max_steps", "=", "5"], "use --set training.max_steps=5"),
    (["--set", "training.max_steps=5", "6"], "arguments: 6; --help lists the flags")])
def test_arguments_of_other_trainers_are_answered(run_main, arguments, advice):
    status, _, error = run_main(train, *arguments)
    assert status == 2 and error.count("\n") == 1 and advice in error


def test_the_device_can_be_chosen_by_a_flag(run_train, run_main):
    assert run_train("--device", "cpu")[0] == 0
    status, _, error = run_main(train, "--device", "gpu")
    assert status == 2 and "invalid choice: 'gpu'" in error


def test_short_epochs_write_a_checkpoint_in_save_steps_steps_at_most(run_train, workplace, stories):
    path = write_jsonl(workplace / "three.jsonl", stories[:3])
    status, out, error = run_train("--set", f"data.dataset={path}", "--set", "training.max_steps=40",
                                   "--set", "training.save_steps=10", "--set", "training.keep_checkpoints=100")
    assert status == 0, error
    assert len(list((workplace / "checkpoints" / "quickstart").glob("checkpoint_epoch_*.pth"))) == 4
    assert "an epoch is shorter than training.save_steps (10)" in out


@pytest.fixture
def trained(run_train):
    """A tiny run; its folder is in the current directory."""
    assert run_train()[0] == 0


def test_a_story_ends_before_the_first_stop_text(trained, run_main):
    status, whole, _ = run_main(generate, *CPU, "--max_new_tokens", "60")
    assert status == 0
    prompt = "Once upon a time there was"
    new = whole.strip("\n").removeprefix(prompt)
    stop = new[len(new) // 2:][:4]
    for several in ([], ["--num_samples", "2"]):  # as it grows, and in a batch
        _, out, error = run_main(generate, *CPU, "--max_new_tokens", "60", "--stop", "never so", "--stop",
                                 stop, *several)
        assert out.split("\n\n")[0] == prompt + new[:new.index(stop)], error
    status, _, error = run_main(generate, "--stop", "")
    assert status == 2 and "--stop" in error


def test_what_a_model_cannot_continue_is_noted(trained, run_main):
    _, plain, error = run_main(generate, *CPU, "--prompt", "Tom and")
    assert "note" not in error
    _, spaced, error = run_main(generate, *CPU, "--prompt", "Tom and  ")
    assert spaced == plain and "spaces at the end of a prompt" in error
    _, _, error = run_main(generate, *CPU, "--prompt", "<|endoftext|>Tom")
    assert "<|endoftext|> in a prompt is text" in error


def test_the_default_checkpoint_is_the_best_model_of_the_newest_run(trained, run_main, workplace):
    folder = workplace / "checkpoints" / "quickstart"
    assert (folder / "checkpoint_latest.pth").exists()
    os.utime(folder / "best_model.pth", (1e9, 1e9))
    assert "best_model.pth: step 4" in run_main(generate, "--device", "cpu")[2]


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_tokenizers_training_at_once(number):
    """While the library merges, which takes it seconds, and during which it looks at no signal."""
    code = """
import random
from data.tokenizer import train_tokenizer
draw = random.Random(0)
def stories():
    for _ in range(4000):
        yield " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(40))
    print("merging", flush=True)
train_tokenizer(stories(), 60000, show_progress=False)
print("done", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "merging\n"
    process.send_signal(number)
    out, error = process.communicate()
    assert (process.returncode, out, error) == (-number, "", "")


def test_very_long_words_are_cut_for_the_tokenizers_training_only():
    from data import tokenizer as module

    draw = random.Random(0)
    dna = ["".join(draw.choice("ACGT") for _ in range(2000)) + f" {'=' * 300} {'7' * 300} the end." for _ in range(8)]
    pieces = [piece for story in map(module._cut_long_words, dna) for piece in story.split()]
    assert max(map(len, pieces)) <= 101 and "".join(pieces) == "".join("".join(story.split()) for story in dna)
    assert module._cut_long_words("A healthy story, with “words”.") == "A healthy story, with “words”."
    made = module.train_tokenizer(dna, 300, show_progress=False)
    assert made.decode(made.encode(dna[0]).ids) == dna[0]


# --from

def test_a_tokenizer_is_trimmed_to_what_the_stories_use(run_main, workplace, monkeypatch, stories):
    from data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
    from data.trimmed_tokenizer import count_tokens

    monkeypatch.chdir(workplace)
    texts = list(itertools.islice(synthetic_stories(seed=3), 300)) + make_stories(STORIES["Hindi"], 300)
    whole = train_tokenizer(texts, 3000, show_progress=False)
    whole.normalizer = normalizers.Lowercase()  # it would lose text, so it is left out
    save_tokenizer(whole, "whole")
    content = json.loads(whole.to_str())
    (workplace / "old").mkdir()
    (workplace / "old" / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
    (workplace / "old" / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["model"]["merges"]), encoding="utf-8")
    path = write_jsonl(workplace / "stories.jsonl", stories)
    for source in ("whole", "old"):
        status, out, error = run_main(train_custom_tokenizer, "--from", source, "--vocab_size", "700", "--dataset",
                                      str(path), "--output_dir", f"from {source}")
        assert status == 0, error
        assert "bytes per token" in out and "tokens never used; one trained on them:" in out
    trimmed = load_tokenizer("from whole")
    assert trimmed.get_vocab() == load_tokenizer("from old").get_vocab() and trimmed.get_vocab_size() == 700
    assert set(trimmed.get_vocab()) <= set(whole.get_vocab())
    for text in (*stories[:50], *texts[-5:], "漢字 🦊 \x00\ufffd <|endoftext|>"):
        assert trimmed.decode(trimmed.encode(text).ids, skip_special_tokens=False) == text
    # the tokens most used stay whole, Hindi ones go, and what stays is what merges can make
    whole.normalizer = normalizers.Sequence([])
    counts = count_tokens(whole, stories)
    top = sorted(range(len(counts)), key=lambda index: -counts[index])[:150]
    assert {whole.id_to_token(index) for index in top} <= set(trimmed.get_vocab())
    hindi = trimmed.encode(texts[-1]).ids
    assert len(hindi) > 1.9 * len(whole.encode(texts[-1]).ids)
    made = {"".join(pair) for pair in json.loads(trimmed.to_str())["model"]["merges"]}
    assert {token for token in trimmed.get_vocab() if len(token) > 1 and not token.startswith("<")} <= made


@pytest.mark.parametrize(("content", "part"), [
    (None, "no tokenizer.json, and no vocab.json and merges.txt"), ("{", "not a tokenizer.json"),
    ('{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": '
     'null, "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": '
     '"a"}}', "a tokenizer of type WordLevel")])
def test_what_cannot_be_trimmed_is_one_line(run_main, workplace, monkeypatch, content, part):
    monkeypatch.chdir(workplace)
    (workplace / "source").mkdir()
    if content is not None:
        (workplace / "source" / "tokenizer.json").write_text(content, encoding="utf-8")
    status, _, error = run_main(train_custom_tokenizer, "--from", "source", "--dataset", "sample", "--output_dir",
                                "new")
    assert status == 2 and error.count("\n") == 1 and part in error and not (workplace / "new").exists()
