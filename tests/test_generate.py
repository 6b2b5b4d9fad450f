"""Sampling draws what it should, the cache changes nothing, and stories start and stop at the separator."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import REPO

from config import Config, UserError
from config.schema import ModelConfig, SamplingConfig
from data.checkpoints import save_checkpoint
from data.tokens import END_OF_STORY
from generate import generate_tokens, newest_checkpoint, sample_next, tell_stories
from model import Transformer

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=1500, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64,
                                    max_seq_len=48, tie_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


def frequencies(logits: list[float], sampling: SamplingConfig, draws: int = 20_000) -> torch.Tensor:
    uniform = (torch.arange(draws) + 0.5) / draws  # evenly spread luck gives the exact shares
    tokens = sample_next(torch.tensor([logits]).expand(draws, -1), uniform, sampling)
    return torch.bincount(tokens, minlength=len(logits)) / draws


def reference_shares(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """The same distribution by plain Python: temperature, then top_k, then top_p."""
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    order = order[:sampling.top_k] if sampling.top_k else order
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if reached < sampling.top_p:
            kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 3, "top_p": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 99}])
def test_sampling_draws_the_reference_distribution(settings):
    logits, sampling = [1.0, -2.0, 0.5, 3.0, 2.5, -50.0], SamplingConfig(**settings)
    torch.testing.assert_close(frequencies(logits, sampling), torch.tensor(reference_shares(logits, sampling)),
                               atol=2e-4, rtol=0)


def test_kept_tokens_equal_those_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(16, 200, generator=torch.Generator().manual_seed(3)) * 3
    for top_k, top_p in ((0, 0.9), (20, 1.0), (20, 0.8)):
        theirs = processors.TemperatureLogitsWarper(0.7)(None, logits.clone())
        if top_k:
            theirs = processors.TopKLogitsWarper(top_k)(None, theirs)
        if top_p < 1:
            theirs = processors.TopPLogitsWarper(top_p)(None, theirs)
        for row in range(16):
            ours = frequencies(logits[row].tolist(), SamplingConfig(temperature=0.7, top_k=top_k, top_p=top_p))
            torch.testing.assert_close(ours, theirs[row].softmax(-1), atol=2e-4, rtol=0)


def test_temperature_zero_is_the_likeliest_token():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 4.9, 4.8]])
    assert sample_next(logits, torch.tensor([0.99, 0.99]), GREEDY).tolist() == [1, 0]


def test_extreme_logits_and_luck_stay_in_range():
    logits = torch.tensor([[-math.inf, 1e4, -1e4], [0.0, -math.inf, -math.inf]])
    for luck in (0.0, 1 - 2**-24):
        assert sample_next(logits, torch.full((2,), luck), SamplingConfig(temperature=0.01)).tolist() == [1, 0]


def test_cached_generation_equals_recomputing_every_prefix(model):
    prompt, end = [0, 5, 9, 200], 0
    cached = generate_tokens(model, prompt, end, 1500, GREEDY, [1])[0]
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(len(cached)):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert cached == tokens[len(prompt):] and len(set(cached)) > 3


def test_a_story_depends_on_its_own_seed_and_not_on_its_batch(model):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=30)
    together = generate_tokens(model, [0, 7], 0, 50, sampling, [3, 4, 5])
    alone = [generate_tokens(model, [0, 7], 0, 50, sampling, [seed])[0] for seed in (3, 4, 5)]
    assert together == alone and together[0] != together[1]


def test_it_stops_at_the_separator_at_max_new_tokens_and_at_the_context(model):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=1000)
    rows = generate_tokens(model, [0, 7], 0, 4, sampling, list(range(20)))  # of 4 tokens, one is the separator
    assert all(row.count(0) == 1 and row[-1] == 0 for row in rows if 0 in row)
    assert any(0 in row for row in rows)
    assert max(token for row in rows for token in row) < 4  # only ids that the tokenizer has
    never = generate_tokens(model, [0, 7], 1499, 1400, sampling, [1])[0]
    assert len(never) == 48 - 2
    assert len(generate_tokens(model, [0, 7], 1499, 1400, SamplingConfig(max_new_tokens=5), [1])[0]) == 5


def test_stories_begin_after_a_separator_and_with_the_prompt(model, tokenizer, monkeypatch):
    seen = []
    original = Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda self, tokens, **kwargs: seen.append(tokens) or original(self, tokens, **kwargs))
    story = tell_stories(model, tokenizer, "Once upon a time", GREEDY, [1])[0]
    assert seen[0][0].tolist() == [0, *tokenizer.encode("Once upon a time").ids]
    assert story.text.startswith("Once upon a time") and END_OF_STORY not in story.text
    assert story.num_new_tokens == 40 and not story.ended


def test_a_prompt_that_fills_the_context_is_refused_in_one_line(model, tokenizer):
    with pytest.raises(UserError) as caught:
        tell_stories(model, tokenizer, "dog " * 100, GREEDY, [1])
    assert "context holds 48" in str(caught.value) and "\n" not in str(caught.value)


# The script

@pytest.fixture
def run_generate(model, tokenizer, tmp_path):
    config = Config(model=model.config).to_dict()
    config["data"]["max_seq_len"] = 48
    config["sampling"]["max_new_tokens"] = 12
    save_checkpoint(tmp_path / "checkpoints" / "my run" / "best_model.pth", {
        "model": model.state_dict(), "config": config, "tokenizer": tokenizer.to_str(), "iter_num": 1234, "epoch": 2.5,
        "best_val_loss": 2.75})
    return lambda *args: subprocess.run([sys.executable, str(REPO / "generate.py"), *args], cwd=tmp_path,
                                        capture_output=True, encoding="utf-8", errors="replace")


def test_the_script_takes_the_newest_checkpoint_and_says_what_it_is(run_generate):
    done = run_generate("--device", "cpu", "--num_samples", "2", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Once upon a time there was") == 2
    assert "step 1,234, epoch 2.50, best validation loss 2.750" in done.stderr
    assert "above 2.0" in done.stderr and "cut after 12 new tokens" in done.stderr
    again = run_generate("--device", "cpu", "--num_samples", "2", "--seed", "5")
    assert again.stdout == done.stdout
    other = run_generate("--device", "cpu", "--num_samples", "2", "--seed", "50")
    assert other.stdout != done.stdout


@pytest.mark.parametrize(("arguments", "part"), [
    (["--temperature", "-1"], "sampling.temperature"), (["--top_p", "0"], "sampling.top_p"),
    (["--top_k", "-3"], "at least 0"),
    (["--num_samples", "0"], "--num_samples"), (["--checkpoint", "none.pth"], "no such checkpoint"),
    (["--prompt", "dog " * 100], "context holds 48")])
def test_bad_flags_are_one_line_and_status_2(run_generate, arguments, part):
    done = run_generate("--device", "cpu", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and part in line


def test_the_newest_checkpoint_is_not_one_of_a_replaced_run(tmp_path):
    import os
    for name, age in (("a/best_model.pth", 30), ("b/checkpoint_latest.pth", 20), ("b/previous/best_model.pth", 10)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "checkpoint_latest.pth"
    with pytest.raises(UserError, match="train one with"):
        newest_checkpoint(tmp_path / "empty")


