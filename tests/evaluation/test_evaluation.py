"""What evaluate.py says of a checkpoint is so: every byte counted once, labels looked at, stories beside real ones."""

import dataclasses
import json
import math
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from torch import nn

import evaluate as evaluate_script
from config import UserError, load_config
from data.token_files import TokenFile, prepare_tokens
from device import choose_precision
from evaluation.checklist import check_likelihood, check_run, count_used
from evaluation.comparison import compare, measure_passages
from evaluation.full_evaluation import evaluate_checkpoint
from evaluation.likelihood import POSITIONS, measure_likelihood, position_in_story, token_char_lengths
from evaluation.references import NUM_PROMPTS, Passage, choose_references, cut_reference, read_stories
from evaluation.text_metrics import learn
from evaluation.validation import evaluate
from evaluation.verdict import find_differences
from model import Transformer
from train import start_run
from training.checkpoints import load_checkpoint

CPU = torch.device("cpu")
FLOAT32 = choose_precision(CPU, use_bf16=False)[0]
ODD_TEXTS = ["Once upon a time.", "Zoë said “hi” – naïve café 故事 🎈, the end!", "  An old\n\nman  ", "a"]


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, self.vocab_size)


class Foreteller(nn.Module):
    """Puts all its weight on the token `ahead` of each input; it knows the text."""

    def __init__(self, tokens, ahead, vocab_size, seq_len):
        super().__init__()
        padded = np.concatenate([tokens, np.zeros(seq_len + 2)]).astype(np.int64)
        self.targets = torch.from_numpy(np.stack([padded[start + ahead:start + ahead + seq_len]
                                                  for start in range(0, len(tokens) - 1, seq_len)]))
        self.vocab_size, self.at = vocab_size, 0

    def forward(self, tokens):
        part = self.targets[self.at:self.at + len(tokens)]
        self.at += len(tokens)
        return 20.0 * nn.functional.one_hot(part, self.vocab_size).float()


def pack(texts, tokenizer):
    ids = [0]
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
    return np.array(ids, dtype=np.uint16)


def likelihood(model, tokens, tokenizer, seq_len=16, batch_size=3):
    return measure_likelihood(model, tokens, tokenizer, seq_len, batch_size, CPU, FLOAT32, show_progress=False)


# Likelihood

@pytest.mark.parametrize("seq_len", [5, 16, 1000])
def test_every_byte_and_character_counts_once(tokenizer, seq_len):
    """A model for which each of V tokens is as likely spends log2 V bits on each, and they spell the text."""
    size, tokens = tokenizer.get_vocab_size(), pack(ODD_TEXTS, tokenizer)
    found = likelihood(Uniform(size), tokens, tokenizer, seq_len)
    num_bytes, characters = (sum(map(len, texts)) for texts in ([text.encode() for text in ODD_TEXTS], ODD_TEXTS))
    assert num_bytes > characters  # so that the two cannot be mixed up
    assert (found["tokens"], found["bytes"], found["characters"]) == (len(tokens) - 1, num_bytes, characters)
    bits = math.log2(size) * (len(tokens) - 1)
    assert found["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-6)
    assert found["bits_per_character"] == pytest.approx(bits / characters, rel=1e-6)
    assert found["val_loss"] == pytest.approx(math.log(size)) and found["perplexity"] == pytest.approx(size, rel=1e-4)


def test_characters_are_counted_where_they_begin(tokenizer):
    lengths = token_char_lengths(tokenizer)
    for text in ODD_TEXTS:
        assert lengths[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(text)


def test_figures_are_those_of_a_computation_of_ones_own(tokenizer, stories, tiny_config):
    """Token by token in float64 with torch's own log_softmax, without batches, sequences or masks."""
    config = tiny_config("model.vocab_size=1600")  # larger than the tokenizer
    torch.manual_seed(3)
    model, tokens = Transformer(config.model).eval(), pack([*stories[:12], *ODD_TEXTS], tokenizer)
    found = likelihood(model, tokens, tokenizer, seq_len=64, batch_size=4)
    names = {tokenizer.token_to_id(name) for name in ("Ġa", "Ġan", "Ġthe", "ĠA", "ĠAn", "ĠThe", "A", "An", "The")}
    nats, article_nats, hits, offsets, by_row, articles = [], [], 0, {0: [], 1: [], 2: []}, {}, 0
    for start in range(0, len(tokens) - 1, 64):
        piece = torch.from_numpy(tokens[start:start + 65].astype(np.int64))
        with torch.no_grad():
            log_p = model(piece[None, :-1])[0].double().log_softmax(-1)
        place = None
        for t in range(len(piece) - 1):
            truth, place = int(piece[t + 1]), 1 if piece[t] == 0 else place and place + 1
            nats.append(-log_p[t, truth].item())
            if truth in names:
                articles += 1
                article_nats.append(nats[-1])
                hits += int(log_p[t].argmax()) == truth
            if t + 2 < len(piece):
                for offset, losses in offsets.items():
                    losses.append(-log_p[t, int(piece[t + offset])].item())
            if place:
                by_row.setdefault(sum(place > last for last in POSITIONS), []).append(nats[-1])
    assert found["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5) and found["tokens"] == len(nats)
    text_bytes = len("".join([*stories[:12], *ODD_TEXTS]).encode("utf-8"))
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-5)
    assert found["articles"] == articles and found["article_accuracy"] == pytest.approx(hits / articles)
    assert found["article_loss"] == pytest.approx(np.mean(article_nats), rel=1e-5)
    for offset, key in enumerate(("present_loss", "next_loss", "after_next_loss")):
        assert found[key] == pytest.approx(np.mean(offsets[offset]), rel=1e-5)
    assert [row["tokens"] for row in found["by_position"]] == [len(by_row[row]) for row in sorted(by_row)]
    assert [row["loss"] for row in found["by_position"]] == pytest.approx(
        [np.mean(by_row[row]) for row in sorted(by_row)], rel=1e-5)


def test_it_is_the_loss_that_training_reports(tiny_config, tokenizer):
    config = tiny_config("model.vocab_size=1500")
    validation = prepare_tokens(config.data, tokenizer, "validation", show_progress=False)
    model = Transformer(config.model).eval()
    found = likelihood(model, validation.tokens, tokenizer, seq_len=64, batch_size=7)
    for key, value in evaluate(model, validation, tokenizer, config, CPU, FLOAT32).items():
        assert found["tokens" if key == "val_tokens" else key] == pytest.approx(value, rel=1e-5)


def test_the_position_in_a_story_is_known_only_where_it_began_in_the_sequence():
    inputs = torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert position_in_story(inputs, 0).tolist() == [[0, 0, 1, 2, 3, 1, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(("ahead", "mark", "words"), [
    (1, "ok", "the next token, as it should"), (2, "bad", "shifted twice"), (0, "bad", "not shifted")])
def test_labels_that_are_off_by_one_are_named(tokenizer, stories, ahead, mark, words):
    tokens = pack(stories[:20], tokenizer)
    found = likelihood(Foreteller(tokens, ahead, tokenizer.get_vocab_size(), 16), tokens, tokenizer)
    assert found["articles"] > 50 and found["article_accuracy"] == (1.0 if ahead == 1 else 0.0)
    check = check_likelihood(found, 10, [], 1500)[1]
    assert (check.name, check.mark) == ("label alignment", mark) and words in check.meaning


# The checklist

def checks_of(checkpoint, config, file, metrics=(), **changes):
    checks = check_run({**checkpoint, **changes}, Path("a run/best.pth"), config, file, metrics)
    return {check.name: check for check in checks}


def test_the_checklist_recognizes_a_finished_run(tiny_config):
    tokens = np.arange(6401, dtype=np.uint16) % 300  # 100 sequences of 64: 13 steps of 8
    file = TokenFile(REPO / "x.bin", tokens, {"article_tokens": 400, "tokens": 6401}, "digest")
    config = tiny_config()
    rate = 3e-4  # min_lr, at the last step
    done = {"iter_num": 13, "epoch": 1.04, "best_val_loss": 1.0, "position": 104, "completed": 13,
            "train_digest": "digest", "optimizer": {"param_groups": [{"lr": rate}]}}
    checks = checks_of(done, config, file)
    assert {check.mark for name, check in checks.items() if name != "vocabulary"} == {"ok"}
    assert "finished" in checks["checkpoint"].found and "13 done of 13 planned" in checks["steps"].found
    assert "512 tokens, of which the training text uses 300" in checks["vocabulary"].found
    halfway = checks_of(done, config, file, iter_num=6, position=48, completed=0)
    assert {halfway[name].mark for name in ("checkpoint", "steps", "learning rate")} == {"check"}
    assert "6 done of 13 planned" in halfway["steps"].found
    meaning = halfway["checkpoint"].meaning
    assert "train.py --checkpoint" in meaning and str(Path("a run", "checkpoint_latest.pth")) in meaning
    ended = [{"type": "evaluation", "step": 6}, {"type": "final", "step": 9}]  # its best was not its last
    best = checks_of(done, config, file, ended, iter_num=6, position=48, completed=0)
    assert best["checkpoint"].mark == best["steps"].mark == "ok" and "ended at step 9" in best["steps"].found
    later = [*ended, {"type": "step", "step": 10}]
    resumed = checks_of(done, config, file, later, iter_num=6, position=48, completed=0)
    assert resumed["checkpoint"].mark == "check"
    early = checks_of(done, config, file, iter_num=6, position=48, completed=0, best_val_loss=math.inf)["checkpoint"]
    assert "not evaluated before" in early.found and "inf" not in early.found
    assert checks_of(done, config, file, train_digest="other")["tokenizer"].mark == "bad"
    slow = tiny_config("scheduler.lr_decay_iters=35000")
    assert "35,000" in checks_of(done, slow, file)["learning rate"].meaning


def test_a_loss_that_still_falls_is_recognized(tokenizer):
    found = likelihood(Uniform(1500), pack(ODD_TEXTS, tokenizer), tokenizer)

    def curve(*losses):
        return [{"type": "evaluation", "step": 100 * (i + 1), "val_loss": loss} for i, loss in enumerate(losses)]

    falling = check_likelihood(found, 1000, curve(9, 9, 8, 8, 7, 7, 6, 4, 3, 2), 1500)[0]
    assert "fell by 50.0%" in falling.found and "still falling" in falling.meaning  # from step 800, a fifth before
    rising = check_likelihood(found, 1000, curve(9, 9, 8, 8, 7, 7, 6, 2, 1, 3), 1500)[0]
    assert "rose by 50.0%" in rising.found and "still falling" not in rising.meaning
    of_then = check_likelihood(found, 500, curve(9, 9, 8, 4, 2, 1, 1, 1, 1, 1), 1500)[0]  # an earlier checkpoint
    assert "fell by 50.0%" in of_then.found
    for loss, dataset, mark in ((1.9, "tinystories", "ok"), (2.1, "tinystories", "check"), (2.1, "mine.txt", "ok")):
        assert check_likelihood({**found, "val_loss": loss}, 500, [], 1500, dataset)[0].mark == mark


def test_used_tokens_are_counted_across_chunks():
    assert count_used(np.array([1, 5, 5, 2, 9, 1], dtype=np.uint16), 12, chunk=2) == 4


# Stories

def test_stories_come_back_from_a_token_file_evenly_spread(tokenizer, stories):
    texts = [f"{index} {text}" for index, text in enumerate(stories)]
    file = TokenFile(None, pack(texts, tokenizer), {"stories": len(texts)}, "")
    assert list(read_stories(file, tokenizer, 1000)) == texts
    some = list(read_stories(file, tokenizer, 40))
    assert set(some) <= set(texts) and len(some) >= 39
    places = [texts.index(text) for text in some]
    assert places == sorted(places) and max(np.diff(places)) < 40 and places[-1] > 360


def test_references_begin_as_the_stories_do_and_are_cut_there(tokenizer):
    real = ["Tom and his dog ran. " + str(i) for i in range(3)] + ["Once upon a time there was " + str(i)
                                                                   for i in range(50)] + ["No"]
    pairs = choose_references(real, ("Once upon a time", "Nobody begins so", "Tom and his dog"), 10)
    prompts = [prompt for prompt, _ in pairs]
    assert prompts.count("Tom and his dog") == 3 and prompts.count("Once upon a time") == 7 and len(pairs) == 10
    assert all(story.startswith(prompt) for prompt, story in pairs) and len({story for _, story in pairs}) == 10
    assert len(choose_references(real, ("Once upon a time",), 1000)) == 53
    many = [f"Story {i % 30} continues like this {i}" for i in range(300)]
    assert len({prompt for prompt, _ in choose_references(many, ("x",), 100)}) == NUM_PROMPTS
    passage = cut_reference("Once upon", "Once upon a time there was a cat.", tokenizer, 100)
    assert passage == Passage("Once upon", " a time there was a cat.", True)
    short = cut_reference("Once upon", "Once upon a time there was a cat.", tokenizer, 3)
    assert not short.ended and " a time there was a cat.".startswith(short.text)
    assert len(tokenizer.encode(short.text, add_special_tokens=False).ids) == 3


def verdicts(model, reference, tokenizer, stories):
    learned, training = learn(stories[:300], min_count=10), pack(stories[:300], tokenizer)
    sides = [[Passage("", text, True) for text in side] for side in (model, reference)]
    measured = [measure_passages(side, learned, tokenizer, training, show_progress=False) for side in sides]
    return {row["key"]: row for row in compare(*sides, *measured, find_differences(*measured))}


def test_real_stories_beside_real_ones_are_ok_and_broken_ones_are_named(tokenizer, stories):
    fresh = [text for text in stories[300:] if text not in stories[:300]]
    same = verdicts(fresh[::2], fresh[1::2], tokenizer, stories)
    assert {row["verdict"] for row in same.values()} <= {"ok", "nothing to measure"}, same
    bare = verdicts([re.sub(r"\b(?:an?|the) ", "", text, flags=re.I) for text in fresh], fresh, tokenizer, stories)
    assert bare["articles"]["verdict"] == "articles are missing" and bare["articles"]["model"] == 0
    assert bare["bare_nouns"]["verdict"] == "nouns lack their article"
    assert bare["unfinished"]["verdict"] == "ok"
    copied = verdicts(stories[:80], fresh, tokenizer, stories)
    assert copied["copied"]["verdict"] == "partly memorized" and copied["copied"]["model"] == pytest.approx(100)
    assert verdicts(fresh[:1] * 50, fresh, tokenizer, stories)["distinct_2"]["verdict"] == "less varied"


# All of it

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from conftest import TINY as tiny
    folder = tmp_path_factory.mktemp("trained")
    settings = [*tiny, f"training.output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}",
                f"data.tokenizer_path={folder / 'tokenizer'}", "training.max_steps=30", "training.eval_steps=15",
                "data.validation=null"]
    assert start_run(load_config(REPO / "config" / "quickstart.yaml", settings), None, None) == 0
    return folder / "run" / "checkpoint_latest.pth"


def config_of(path):
    from config import config_from_dict
    return config_from_dict(load_checkpoint(path)["config"], "", ["training.show_progress=false"])


def evaluated(config, path, **more):
    """The result as JSON has it; its text is printed."""
    return json.loads(json.dumps(evaluate_checkpoint(config, path, print, **more)))


def test_a_checkpoint_is_looked_at_from_all_sides(trained, capsys):
    result = evaluated(config_of(trained), trained, num_stories=12)
    printed = capsys.readouterr().out
    line = result["verdict"]["line"]  # comes first
    assert set(result["verdict"]["measures"]["repeated"]) == {"model", "reference", "margin"}
    assert "too few stories for a verdict" in line and printed.index(line) < printed.index("checkpoint: ")
    names = [check["name"] for check in result["checks"]]
    assert names == ["checkpoint", "steps", "vocabulary", "tokenizer", "articles in the data", "learning rate", "loss",
                     "label alignment"] and all(f"{name}: " in printed for name in names)
    assert "finished" in result["checks"][0]["found"] and result["checks"][5]["mark"] == "ok"
    lines = (trained.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    final = json.loads(lines[-1])
    assert result["likelihood"]["val_loss"] == pytest.approx(final["val_loss"], rel=1e-5)
    assert len(result["stories"]) == len(result["references"]) <= 12
    for story, reference in zip(result["stories"], result["references"], strict=True):
        assert story["prompt"] == reference["prompt"] and not story["text"].startswith(story["prompt"])
    for row in result["table"]:
        assert row["title"] in printed and row["verdict"] in printed
    articles = [story["articles"] for story in result["stories"]]
    assert result["table"][0]["model"] == pytest.approx(
        100 * sum(part for part, _ in articles) / sum(whole for _, whole in articles))


def test_what_was_measured_before_ctrl_c_is_printed(trained, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.full_evaluation.generate_passages", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(config_of(trained), trained, print, num_stories=12)
    assert "label alignment: " in capsys.readouterr().out


@pytest.mark.parametrize(("shape", "part"), [({"max_seq_len": 128}, "model.max_seq_len is 64 there, but 128"),
                                             ({"d_model": 64}, "model.d_model is 32 there, but 64")])
def test_a_config_of_another_model_is_one_line(trained, shape, part):
    """As train.py --eval_only with another --config has it."""
    config = config_of(trained)
    with pytest.raises(UserError, match=part):
        evaluated(dataclasses.replace(config, model=dataclasses.replace(config.model, **shape)), trained)


def test_fewer_stories_than_asked_for_are_explained(trained, capsys):
    evaluated(config_of(trained), trained, num_stories=8)
    assert "note: " not in capsys.readouterr().out
    evaluated(config_of(trained), trained, num_stories=5000)
    lines = capsys.readouterr().out.splitlines()
    number = next(line.split()[0] for line in lines if " stories, compared with as many of the validation" in line)
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 1 and f"{number} stories, not 5,000" in notes[0] and 8 < int(number) < 5000


def test_any_text_is_scored_on_its_own_bytes(trained, tmp_path, capsys):
    for name, texts in (("plain.txt", "\n<|endoftext|>\n".join(ODD_TEXTS)), ("lines.jsonl", "".join(
            json.dumps({"text": text}) + "\n" for text in ODD_TEXTS))):
        file = tmp_path / name
        file.write_text(texts, encoding="utf-8")
        result = evaluated(config_of(trained), trained, data=str(file))
        assert result["likelihood"]["bytes"] == sum(len(text.encode()) for text in ODD_TEXTS)  # nothing was cleaned off
        score = f"{result['likelihood']['bits_per_byte']:.4f} bits per byte"
        assert "table" not in result and score in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--data .*: no such file"):
        evaluated(config_of(trained), trained, data=str(tmp_path / "none.txt"))


def test_scoring_a_text_leaves_the_training_cache_alone(trained, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("A cat sat on the mat.  ", encoding="utf-8")
    config = config_of(trained)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=str(file)))
    evaluated(config, trained, num_stories=0)
    cache = trained.parent.parent / "cache"
    before = {path: path.read_bytes() for path in cache.glob("*mine.txt*")}
    evaluated(config, trained, data=str(file))  # uncleaned, so other tokens of the same name
    assert len(before) >= 2 and {path: path.read_bytes() for path in cache.glob("*mine.txt*")} == before


def test_out_overwrites_nothing_but_evaluation_json(tmp_path, monkeypatch):
    file = tmp_path / "mine.txt"
    file.write_text("Once upon a time.", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", str(file), "--out", str(file)])
    with pytest.raises(UserError, match="exists already"):
        evaluate_script.main(evaluate_script.parse_arguments())
    assert file.read_text(encoding="utf-8") == "Once upon a time."
    (tmp_path / "evaluation.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "none.pth", "--out",
                                      str(tmp_path / "evaluation.json")])
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate_script.main(evaluate_script.parse_arguments())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--set", "model.d_model=32"], "--set model.d_model=32: the model is the checkpoint's"),
    (["--out", "nowhere/evaluation.json"], "there is no folder nowhere")])
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "none.pth", *arguments])
    with pytest.raises(UserError, match=message):
        evaluate_script.main(evaluate_script.parse_arguments())
    assert not list(tmp_path.iterdir())
