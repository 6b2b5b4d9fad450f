"""Tokens are drawn as asked, cache and batch change nothing, stories start and stop where they should; the script."""

import copy
import io
import json
import math
import os
import select
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO

import generate
from config import Config, UserError
from config.schema import ModelConfig, SamplingConfig
from data.atomic_files import create_file, name_in_errors
from data.tokenizer import END_OF_STORY
from generate import generate_and_print, print_as_it_grows
from inference import engine, packed_weights
from inference import sampling as sampling_module
from inference.engine import Continuation, Engine, generate_tokens
from inference.generation import generate_stories
from inference.packed_weights import pack, refresh
from inference.sampling import lowest_kept, settings_in_use, settings_tensor, threshold
from model import Transformer
from training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=40)
FREE = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=30)
NEVER = 1499  # an id that no test draws: as `end`, no story ends


def make_model(**changes) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 1500, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 64,
             "max_seq_len": 48, "tie_embeddings": False}
    model = Transformer(ModelConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def continue_all(model, prompts, seeds, sampling, end=0, num_tokens=1500, **options) -> list[list[int]]:
    """The new tokens of each prompt, in the order of the prompts."""
    done = {}
    for running in generate_tokens(model, prompts, seeds, end, num_tokens, sampling, **options):
        done.update({row.index: row.new for row in running if row.done})
    return [done[index] for index in range(len(prompts))]


# Choosing a token

def sample_next(logits, uniforms, sampling: SamplingConfig, seen=None) -> torch.Tensor:
    """sampling.sample_next() with one setting for all rows."""
    rows = [sampling] * len(logits)
    return sampling_module.sample_next(logits, uniforms, settings_tensor(rows), settings_in_use(rows), seen)


def shares_drawn(logits: list[float], sampling: SamplingConfig, draws: int = 10_000, seen=None) -> torch.Tensor:
    uniforms = (torch.arange(draws) + 0.5) / draws  # evenly spread uniforms gives the exact shares
    seen = None if seen is None else torch.tensor([seen]).expand(draws, -1)
    tokens = sample_next(torch.tensor([logits]).expand(draws, -1), uniforms, sampling, seen)
    return torch.bincount(tokens, minlength=len(logits)) / draws


def reference_shares(logits: list[float], sampling: SamplingConfig, seen=None) -> list[float]:
    """The same distribution by plain Python: repetition_penalty, temperature, top_k, top_p, min_p."""
    seen = seen or [False] * len(logits)
    penalty = sampling.repetition_penalty
    logits = [(x / penalty if x > 0 else x * penalty) if old else x for x, old in zip(logits, seen, strict=True)]
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    order = order[:sampling.top_k] if sampling.top_k else order
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if reached < sampling.top_p:
            kept.append(i)
        reached += weights[i] / total
    kept = [i for i in kept if weights[i] >= sampling.min_p * max(weights)]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 3, "top_p": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 99}, {"temperature": 1.5, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.4}, {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.5},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2}])
def test_sampling_draws_the_reference_distribution(settings):
    logits, sampling = [1.0, -2.0, 0.5, 3.0, 2.5, -50.0], SamplingConfig(**settings)
    seen = [True, True, False, True, False, False] if "repetition_penalty" in settings else None
    torch.testing.assert_close(shares_drawn(logits, sampling, seen=seen),
                               torch.tensor(reference_shares(logits, sampling, seen)), atol=2e-4, rtol=0)


@pytest.mark.parametrize("spread", [3.0, 0.3])  # in the flat one 0.9 of the probability needs most of the tokens
@pytest.mark.parametrize("settings", [
    {"top_p": 0.9}, {"top_k": 20}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.2}, {"repetition_penalty": 1.3},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.7}])
def test_distributions_equal_those_of_transformers(settings, spread):
    processors = pytest.importorskip("transformers.generation.logits_process")
    sampling = SamplingConfig(**{"temperature": 0.7, "top_p": 1.0, **settings})
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 200, generator=generator) * spread
    ids = torch.randint(0, 200, (6, 40), generator=generator)
    chain = [processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),  # in generate()'s order
             processors.TemperatureLogitsWarper(0.7)]
    chain += [processors.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [processors.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    chain += [processors.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    theirs = logits.clone()
    for processor in chain:
        theirs = processor(ids, theirs)
    for row in range(6):
        seen = torch.zeros(200, dtype=torch.bool).index_fill(0, ids[row], True).tolist()
        ours = shares_drawn(logits[row].tolist(), sampling, seen=seen if sampling.repetition_penalty != 1 else None)
        torch.testing.assert_close(ours, theirs[row].softmax(-1), atol=2e-4, rtol=0)


def test_temperature_zero_is_the_likeliest_token():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 4.9, 4.8]])
    assert sample_next(logits, torch.tensor([0.99, 0.99]), GREEDY).tolist() == [1, 0]


def test_extreme_logits_and_uniforms_stay_in_range():
    logits = torch.tensor([[-math.inf, 1e4, -1e4], [0.0, -math.inf, -math.inf]])
    for uniforms in (0.0, 1 - 2**-24):
        for top_p in (0.95, 1.0):
            sampling = SamplingConfig(temperature=0.01, top_p=top_p)
            assert sample_next(logits, torch.full((2,), uniforms), sampling).tolist() == [1, 0]
    logits = torch.rand(50, 1000, generator=torch.Generator().manual_seed(1)).log()  # uneven totals are rounded
    logits[:, [0, 999]] = -math.inf
    last = sample_next(logits, torch.full((50,), 1 - 2**-24), FREE)  # 0 would be: nothing reached that much
    assert last.min() > 0 and last.max() < 999


def test_a_repetition_penalty_makes_no_token_likelier_whatever_the_sign_of_its_logit():
    logits = [2.0, -2.0, 0.0, 1.0, -1.0]
    before = shares_drawn(logits, FREE)
    for token in range(5):
        seen = [i == token for i in range(5)]
        after = shares_drawn(logits, SamplingConfig(temperature=1.0, top_p=1.0, repetition_penalty=1.8), seen=seen)
        assert after[token] < before[token] if logits[token] else after[token] == before[token]


def test_equally_likely_tokens_are_kept_together_however_many_are_looked_at(monkeypatch):
    logits = torch.zeros(1, 300).index_fill(1, torch.arange(0, 300, 3), 2.0)  # 100 equal ones above 200 equal ones
    uniforms = torch.linspace(0, 0.999, 500)
    drawn = []
    for candidates in (1, 64, 300):
        monkeypatch.setattr(sampling_module, "TOP_CANDIDATES", candidates)
        for settings in ({"top_k": 10, "top_p": 1.0}, {"top_p": 0.5}):
            drawn.append(sample_next(logits.expand(500, -1), uniforms, SamplingConfig(temperature=1.0, **settings)))
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)
    assert sorted(set(drawn[0].tolist())) == list(range(0, 300, 3))
    logits = torch.zeros(1, 300).index_fill(1, torch.arange(0, 300, 9), 9.0)  # 34 equal ones: 64 are enough to see all
    drawn = []
    for candidates in (64, 300):
        monkeypatch.setattr(sampling_module, "TOP_CANDIDATES", candidates)
        drawn.append(sample_next(logits.expand(500, -1), uniforms, SamplingConfig(temperature=1.0, top_p=0.5)))
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].tolist() == sorted(drawn[0].tolist())


SETTINGS = [{"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 200, "top_p": 0.5},
            {"min_p": 0.02}, {"top_k": 30, "top_p": 0.95, "min_p": 0.01}, {"top_p": 0.3, "min_p": 0.5}, {"top_k": 5000}]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_a_gpu_keeps_the_tokens_that_the_cpu_keeps(temperature):
    """Against a plain sort in float64, for peaked and flat logits, with ties (bf16) and without."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 3000, generator=generator) * torch.tensor([0.1, 1, 3, 3, 8, 20])[:, None]
    logits[3:] = logits[3:].bfloat16().float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    for changes in SETTINGS:
        sampling = SamplingConfig(**{"top_p": 1.0, **changes})
        rows = [sampling] * 6
        _, *limits, _ = settings_tensor(rows).split(1, dim=1)
        kept = logits >= lowest_kept(logits, limits, settings_in_use(rows))
        for row in range(6):
            values, order = logits[row].double().sort(descending=True, stable=True)
            in_k = values >= values[min(sampling.top_k or 3000, 3000) - 1]
            total = (values.exp() * in_k).sum()
            before = ((values.exp() * in_k).cumsum(0) - values.exp() * in_k) / total
            last = values[in_k & ((before < sampling.top_p) | (sampling.top_p == 1))][-1]
            expected = (values >= last) & (values >= math.log(sampling.min_p) if sampling.min_p else True)
            wrong = kept[row, order] != expected  # only where the sum meets top_p within the rounding of float32
            assert not (wrong & ((before - sampling.top_p).abs() > 1e-6)).any(), (changes, row)
            drawn = sample_next(logits[row:row + 1].expand(64, -1) * temperature, torch.arange(64) / 64,
                                SamplingConfig(**{"temperature": temperature, "top_p": 1.0, **changes}))
            assert kept[row, drawn].float().mean() > 0.98  # the CPU's own way


def test_the_threshold_is_exact_for_few_rows_and_for_many():
    values = -torch.rand(100, 50, generator=torch.Generator().manual_seed(1)) * 40
    values[:, :10] = values[:, 10:20].round()  # some equal ones, and zeros of both signs
    values[:, 20] = -math.inf
    for count in (1.0, 7.0, 49.0, 50.0):
        expected = values.sort(descending=True).values[:, int(count) - 1]
        target = torch.full((100, 1), count)
        for rows in (3, 100):
            found = threshold(values[:rows], torch.ones(rows, 50), target[:rows])
            assert torch.equal(found[:, 0], expected[:rows])
    assert (threshold(values, torch.ones(100, 50), torch.full((100, 1), 51.0)) == -math.inf).all()  # the lowest


def test_each_row_has_its_own_settings():
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = torch.randn(7, 500, generator=generator) * 2, torch.rand(7, generator=generator)
    seen = torch.rand(7, 500, generator=generator) < 0.3
    rows = [SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **changes}) for changes in (
        {}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2}, {"repetition_penalty": 1.5},
        {"temperature": 0.5, "top_k": 100, "top_p": 0.9})]
    together = sampling_module.sample_next(logits, uniforms, settings_tensor(rows), settings_in_use(rows), seen)
    alone = [sample_next(logits[i:i + 1], uniforms[i:i + 1], row, seen[i:i + 1]) for i, row in enumerate(rows)]
    assert together.tolist() == torch.cat(alone).tolist()


# The engine

def recompute(model, prompt: list[int], count: int) -> list[int]:
    """Greedy by the plain forward pass over all that is seen, for every token: no cache, no batch."""
    sequence, new, context = list(prompt), [], model.config.max_seq_len
    with torch.no_grad():
        for _ in range(count):
            sequence = sequence if len(sequence) <= context else sequence[-(context // 2):]
            new.append(model(torch.tensor([sequence]))[0, -1].argmax().item())
            sequence.append(new[-1])
    return new


PROMPTS = [[0, 5, 9, 200], [0], [0, 7, 7], [0, *range(300, 320)], [0, 5, 9, 200], [0, 1300]]


@pytest.mark.parametrize("changes", [
    {}, {"rope_percentage": 1.0}, {"n_kv_heads": 1, "rope_percentage": 0.25}, {"n_kv_heads": None},
    {"use_flash_attention": False}, {"rope_percentage": 0.0, "tie_embeddings": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_and_batched_greedy_tokens_equal_those_of_recomputing_everything(changes, packed):
    model = make_model(**changes)
    truth = [recompute(model, prompt, 40 - len(prompt) // 2) for prompt in PROMPTS]
    model = pack(model, "float32") if packed else model
    batched = continue_all(model, PROMPTS, [1] * 6, GREEDY, end=NEVER)
    assert [new[:len(known)] for new, known in zip(batched, truth, strict=True)] == truth
    for prompt, new in zip(PROMPTS, batched, strict=True):
        assert continue_all(model, [prompt], [1], GREEDY, end=NEVER) == [new]
    assert len({tuple(new) for new in batched}) > 3 and len(set(batched[0])) > 3


def test_beyond_the_context_each_row_continues_from_its_last_half(model):
    long = SamplingConfig(temperature=0.0, max_new_tokens=130)  # the context is 48: full twice, at different steps
    batched = continue_all(model, PROMPTS, [1] * 6, long, end=NEVER)
    assert batched == [recompute(model, prompt, 130) for prompt in PROMPTS]
    tiny = make_model(max_seq_len=2)
    assert continue_all(tiny, [[0]], [1], GREEDY, end=NEVER) == [recompute(tiny, [0], 40)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sampling", [
    FREE, SamplingConfig(temperature=1.2, top_k=40, max_new_tokens=70, repetition_penalty=1.3, min_p=0.01)])
def test_a_story_depends_on_its_own_seed_and_prompt_and_not_on_its_batch(model, sampling, packed, monkeypatch):
    """In float32, where what rounding changes from batch to batch is too little to draw another token."""
    model = pack(model, "float32") if packed else model
    prompts, seeds = [[token % 49 for token in PROMPTS[i % 6]] for i in range(40)], list(range(40))
    together = continue_all(model, prompts, seeds, sampling, num_tokens=50)  # some of 50 tokens end a story
    assert [continue_all(model, [p], [s], sampling, num_tokens=50)[0]
            for p, s in zip(prompts, seeds, strict=True)] == together
    monkeypatch.setitem(engine.MAX_ROWS, "cpu", 7)  # several batches, another interval
    assert continue_all(model, prompts, seeds, sampling, num_tokens=50, check_every=3) == together
    lengths = {len(new) for new in together}
    assert len(lengths) > 3 and len({tuple(new) for new in together}) > 30


def run_until_empty(engine: Engine, watch=lambda rows: None) -> dict[int, Continuation]:
    """All continuations that became done, by index."""
    done = {}
    while rows := engine.advance():
        watch(rows)
        done.update({row.index: row for row in rows if row.done})
    return done


def test_free_rows_are_taken_by_waiting_prompts_with_settings_of_their_own(model):
    """Each story is the one that it would be alone, whatever ran beside it."""
    settings = [FREE, GREEDY, SamplingConfig(temperature=0.9, top_k=9, repetition_penalty=1.4, max_new_tokens=55)]
    jobs = [(i, [token % 49 for token in PROMPTS[i % 6]], i, settings[i % 3]) for i in range(20)]
    busy = []
    shared = Engine(model, 0, 50, max_rows=4)
    for job in jobs[:15]:
        shared.add(Continuation(*job))
    done = {}

    def add_more(rows):
        busy.append(len(rows))
        for job in jobs[15:] if len(busy) == 2 else ():  # newcomers, while others run
            shared.add(Continuation(*job))

    done = run_until_empty(shared, add_more)
    assert sorted(done) == list(range(20)) and busy[:-4].count(4) == len(busy) - 4
    for job in jobs:
        alone = Engine(model, 0, 50)
        alone.add(Continuation(*job))
        assert run_until_empty(alone)[job[0]].new == done[job[0]].new


def test_a_row_that_is_given_up_is_free_at_once(model):
    shared = Engine(model, NEVER, 1500, max_rows=2, check_every=1)
    jobs = [Continuation(i, [0, 7, i], i, FREE) for i in range(4)]
    for job in jobs:
        shared.add(job)
    assert shared.advance() == jobs[:2]
    jobs[0].done = jobs[2].done = True  # one that runs, and one that waits
    assert {row.index for row in shared.advance()} == {1, 3}
    assert len(jobs[0].new) == 1 and not jobs[2].new
    done = run_until_empty(shared)
    assert [done[i].new for i in (1, 3)] == continue_all(model, [[0, 7, 1], [0, 7, 3]], [1, 3], FREE, end=NEVER)


def test_alternatives_are_the_likeliest_tokens_with_the_models_own_log_probabilities(model):
    engine = Engine(model, NEVER, 1500, alternatives=5)
    engine.add(Continuation(0, [0, 7], 3, SamplingConfig(temperature=0.5, top_k=3, max_new_tokens=20)))
    story = run_until_empty(engine)[0]
    with torch.no_grad():
        shares = model(torch.tensor([[0, 7, *story.new]]))[0, 1:-1].log_softmax(-1)  # (new tokens, vocab_size)
    values, ids = shares.topk(5)
    assert [[token for token, _ in of_token] for of_token in story.alternatives] == ids.tolist()
    found = torch.tensor([[log for _, log in of_token] for of_token in story.alternatives])
    torch.testing.assert_close(found, values, atol=1e-4, rtol=1e-4)


def test_packed_weights_are_refreshed(model):
    """A model in training uses its new weights through the same packed model and the same engine."""
    model = copy.deepcopy(model)
    for compute in ("float32", "bf16", "int8"):
        packed = pack(model, compute)
        engine = Engine(packed, NEVER, 1500, 1)
        before = list(generate_tokens(packed, [[0, 7]], [1], NEVER, 1500, GREEDY, engine=engine))[-1][0].new
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std())
        refresh(packed, model)
        after = list(generate_tokens(packed, [[0, 7]], [1], NEVER, 1500, GREEDY, engine=engine))[-1][0].new
        assert before != after == continue_all(pack(model, compute), [[0, 7]], [1], GREEDY, end=NEVER)[0]


def test_a_repetition_penalty_acts_on_prompt_and_story_but_never_on_the_end(model, monkeypatch):
    seen, original = [], engine.sample_next
    monkeypatch.setattr(engine, "sample_next", lambda *args: seen.append(args[4].clone()) or original(*args))
    generated = continue_all(model, [[0, 7, 9], [0]], [1, 2], SamplingConfig(repetition_penalty=1.1, max_new_tokens=9),
                        end=0, num_tokens=1500)
    for row, (prompt, new) in enumerate(zip([[7, 9], []], generated, strict=True)):
        for step in range(len(new)):
            assert set(seen[step][row].nonzero().flatten().tolist()) == {*prompt, *new[:step]} - {0}


def test_fewer_tokens_are_the_beginning_of_more(model):
    short, long = (continue_all(model, [[0, 7]], [3], SamplingConfig(max_new_tokens=n), end=NEVER)[0] for n in (9, 40))
    assert len(short) == 9 and long[:9] == short


def test_it_stops_at_the_separator_and_at_max_new_tokens_and_draws_only_ids_of_the_tokenizer(model):
    rows = continue_all(model, [[0, 7]] * 20, list(range(20)), FREE, num_tokens=4)
    assert all(row.count(0) == 1 and row[-1] == 0 for row in rows if 0 in row)
    assert any(0 in row for row in rows) and max(map(len, rows)) <= 30
    assert max(token for row in rows for token in row) < 4


def test_rows_that_have_ended_are_no_longer_computed(model, monkeypatch):
    rows, original = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda self, tokens, **kwargs: rows.append(len(tokens)) or original(self, tokens, **kwargs))
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=400)
    generated = continue_all(make_model(max_seq_len=512), [[0, 7]] * 60, list(range(60)), sampling, num_tokens=20)
    assert rows[0] == 60 and rows[-1] < 30 and rows == sorted(rows, reverse=True)
    assert sum(rows) < sum(map(len, generated)) + 60 * engine.CHECK_EVERY["cpu"]


def test_log_probabilities_are_the_models_own_at_temperature_1(model):
    sampling = SamplingConfig(temperature=0.6, top_k=5, max_new_tokens=20, repetition_penalty=1.2)
    done = [row for running in generate_tokens(model, [[0, 7], [0]], [1, 2], NEVER, 1500, sampling)
            for row in running if row.done]
    for one in done:
        tokens = torch.tensor([[*one.prompt, *one.new]])
        with torch.no_grad():
            shares = model(tokens)[0].log_softmax(-1)  # (seq_len, vocab_size)
        expected = shares[len(one.prompt) - 1:-1].gather(1, torch.tensor(one.new)[:, None]).sum()
        assert sum(one.log_probabilities) == pytest.approx(expected.item(), abs=1e-3)
    assert len(done) == 2


@pytest.mark.parametrize(("bf16", "int8", "chosen"), [
    (2.0, 1.5, ("int8", "bf16")), (0.1, 1.5, ("int8", "float32")), (0.1, 0.3, ("float32", "float32"))])
def test_auto_takes_what_is_fast_on_this_cpu(monkeypatch, bf16, int8, chosen):
    """For one story and for a hundred. bf16, int8: how many times faster than float32."""
    monkeypatch.setattr("device.bf16_speedup_on_cpu", lambda: bf16)
    monkeypatch.setattr(packed_weights, "speedup", lambda first, second: int8)
    cpu = torch.device("cpu")
    assert tuple(packed_weights.choose_compute("auto", cpu, rows)[0] for rows in (1, 100)) == chosen
    assert packed_weights.choose_compute("float32", cpu, 1) == ("float32", "")


def test_auto_does_without_int8_where_torch_has_none(monkeypatch):
    def missing(self: object, linears: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("device.bf16_speedup_on_cpu", lambda: 2.0)
    monkeypatch.setattr(packed_weights.PackedLinear, "load", missing)
    assert packed_weights.choose_compute("auto", torch.device("cpu"), 1) == ("bf16", "")


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-5), ("bf16", 0.02), ("int8", 0.03)])
def test_packed_weights_give_the_models_logits(compute, tolerance):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=300, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ffn=172)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        plain = model(tokens)
        packed = pack(model, compute)(tokens)
    error = (packed - plain).norm() / plain.norm()
    assert error < tolerance and (compute == "float32" or error > 1e-4)  # else bf16 and int8 would be float32


def test_packing_works_without_the_private_operators(model, monkeypatch):
    def refuse(weight):
        if weight.dtype in refused:
            raise RuntimeError("mkldnn_linear: bf16 path needs the cpu support avx512bw, avx512vl and avx512dq")
        return original(weight)

    original, refused = packed_weights.prepack, {torch.bfloat16}
    monkeypatch.setattr(packed_weights, "can_prepack", packed_weights.can_prepack.__wrapped__)  # no cache
    monkeypatch.setattr(packed_weights, "prepack", refuse)
    assert len(continue_all(pack(model, "bf16"), PROMPTS, [1] * 6, GREEDY)) == 6
    refused.add(torch.float32)
    unpacked = continue_all(pack(model, "float32"), PROMPTS, [1] * 6, GREEDY)
    assert unpacked == continue_all(model, PROMPTS, [1] * 6, GREEDY)


# Stories

def test_stories_begin_after_a_separator_and_with_the_prompt(model, tokenizer):
    seen = []
    stories = sorted(generate_stories(model, tokenizer, ["Once upon a time", ""], GREEDY, [1, 1],
                                  lambda running: seen.append([row.prompt for row in running])))
    assert seen[0] == [[0, *tokenizer.encode("Once upon a time").ids], [0]]
    assert stories[0].text.startswith("Once upon a time") and END_OF_STORY not in stories[0].text
    assert len(stories[0].tokens) == 40 and not stories[0].ended
    assert stories[1].text == tokenizer.decode(stories[1].tokens)


def test_a_prompt_that_fills_the_context_is_refused_in_one_line(model, tokenizer):
    with pytest.raises(UserError) as caught:
        next(generate_stories(model, tokenizer, ["dog", "dog " * 100], GREEDY, [1, 1]))
    assert "context holds 48" in str(caught.value) and "'dog dog" in str(caught.value) and "\n" not in str(caught.value)


def test_a_growing_story_is_printed_in_whole_characters(tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(generate, "FRAME", 0)
    text = "Lily said “naïve” 漢字 🐉🐉 and \ufffd left."
    ids = tokenizer.encode(text).ids
    generated = generate.Continuation(0, [0, *ids[:2]], 1, SamplingConfig(max_new_tokens=99))
    watch, pieces = print_as_it_grows(tokenizer), []
    for token in ids[2:]:
        generated.extend([token], [0.0], end=0)
        watch([generated])
        pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == text and "" in pieces  # a token ended inside a character, and nothing came of it yet
    assert sum("\ufffd" in piece for piece in pieces) == 1  # the one of the text
    cut = generate.Continuation(0, [0, *tokenizer.encode("🐉").ids[:1]], 1, FREE)
    watch = print_as_it_grows(tokenizer)
    cut.extend([0], [0.0], end=0)  # it ended inside a character: what is there is shown
    watch([cut])
    assert capsys.readouterr().out == "\ufffd"


def test_a_growing_story_is_printed_no_more_often_than_a_screen_shows_it(tokenizer, capsys, monkeypatch):
    """But to its end, at once when it is done."""
    now = [0.0]
    monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
    ids = tokenizer.encode("Lily had a red ball and she was happy all day long.").ids
    story = generate.Continuation(0, [0], 1, SamplingConfig(max_new_tokens=len(ids)))
    watch, prints = print_as_it_grows(tokenizer), []
    for token in ids:
        now[0] += generate.FRAME / 4
        story.extend([token], [0.0], end=0)
        watch([story])
        prints.append(capsys.readouterr().out)
    assert "".join(prints) == tokenizer.decode(ids) and prints[-1]
    assert sum(map(bool, prints)) <= len(ids) / 4 + 2


def test_what_is_done_is_printed_and_recorded_when_it_is_interrupted(model, tokenizer, capsys):
    recorded = []

    def record(prompt, seed, story):
        recorded.append(story.text)
        if len(recorded) == 5:
            raise KeyboardInterrupt

    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=400)
    with pytest.raises(KeyboardInterrupt):
        generate_and_print(model, tokenizer, ["One day"] * 30, sampling, list(range(30)), record)
    out, err = capsys.readouterr()
    assert all(text in out for text in recorded[:4]) and "of 30 stories generated" in err


@pytest.mark.parametrize(("count", "tokens"), [(1, 4), (3, 3 * 2 * engine.CHECK_EVERY["cpu"])])
def test_tokens_generated_before_ctrl_c_are_counted(model, tokenizer, monkeypatch, capsys, count, tokens):
    """In the third round. Alone a story grows by two tokens a round, else by CHECK_EVERY."""
    advance, rounds = Engine.advance, []

    def interrupted(self):
        rounds.append(self)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Engine, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_and_print(model, tokenizer, ["One day"] * count, FREE, range(count), lambda *args: None)
    assert f"{tokens} tokens, " in capsys.readouterr().err


def test_stories_are_printed_in_order_while_others_are_still_generated(model, tokenizer, monkeypatch, capsys):
    printed = []

    def run_engine(*args):
        for index in (1, 0, 3, 2):
            yield generate.Story(index, f"story {index}", [5], -1.0, True)
            printed.append(capsys.readouterr().out.split("\n\n")[:-1])

    monkeypatch.setattr(generate, "generate_stories", run_engine)
    generate_and_print(model, tokenizer, [""] * 4, GREEDY, range(4), lambda *args: None)
    assert printed == [[], ["story 0", "story 1"], [], ["story 2", "story 3"]]


# The script

@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = Config(model=model.config).to_dict()
    config["data"]["max_seq_len"] = 48
    config["sampling"]["max_new_tokens"] = 12
    del config["sampling"]["min_p"]  # as in a checkpoint of the time before it
    save_checkpoint(folder / "checkpoints" / "my run" / "best_model.pth", {
        "model": model.state_dict(), "config": config, "tokenizer": tokenizer.to_str(), "iter_num": 1234, "epoch": 2.5,
        "best_val_loss": 2.75})
    (folder / "prompts.txt").write_text("\ufeffTom and “his” dog\r\n\r\nOne day\n", encoding="utf-8")
    (folder / "bad.txt").write_bytes(b"One day\n\xff\xfe\n")
    (folder / "empty.txt").write_text("\n \n", encoding="utf-8")
    (folder / "taken.jsonl").write_text("mine\n", encoding="utf-8")
    return folder


COMMAND = [sys.executable, str(REPO / "generate.py"), "--device", "cpu"]


def generate_process(folder, *arguments, **options):
    return subprocess.run([*COMMAND, *arguments], cwd=folder, **{
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace", **options})


@pytest.fixture
def run_generate(folder, monkeypatch, run_main):
    """A function: arguments, input -> exit status, output, errors, in the test's own process."""
    monkeypatch.chdir(folder)
    return lambda *arguments, **options: run_main(generate, "--device", "cpu", *arguments, **options)


def test_the_script_takes_the_newest_checkpoint_and_says_what_it_is(run_generate, folder):
    done = generate_process(folder, "--num_samples", "2", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Once upon a time there was") == 2
    assert "step 1,234, epoch 2.50, validation loss 2.750" in done.stderr and "computing in " in done.stderr
    assert "above 2.0" in done.stderr and "2 cut after 12 new tokens" in done.stderr
    _, alone, _ = run_generate("--seed", "6")  # streamed, not batched
    assert alone.strip() == done.stdout.split("\n\n")[1].strip()
    assert run_generate("--seed", "50")[1] != alone


@pytest.mark.skipif(os.name == "nt", reason="there, HOME is not the home directory")
def test_a_path_in_the_home_directory_is_found(run_generate, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    status, out, error = run_generate("--checkpoint=~/checkpoints/my run/best_model.pth", "--out=~/home.jsonl")
    assert status == 0 and "Once upon" in out and (folder / "home.jsonl").exists(), error


def test_a_story_that_outgrows_the_context_by_its_prompt_says_so(run_generate):
    """The model's context is smaller than prompt and story together, but larger than the story."""
    short = run_generate("--prompt", "Tom", "--max_new_tokens", "40")[2]
    long = run_generate("--prompt", "Once upon a time there was a dog. " * 3, "--max_new_tokens", "40")[2]
    assert "beyond its context" not in short and "beyond its context of" in long


def test_a_device_without_enough_memory_is_one_line(run_generate, monkeypatch):
    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(generate, "pack", refuse)
    status, _, error = run_generate()
    assert status == 2 and "error: out of memory (CUDA out of memory" in error and "--device cpu" in error


def test_a_story_needs_no_import_of_torchs_compiler(folder):
    """Which takes as long as all the rest."""
    done = generate_process(folder, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "torch.nn" in imported and "torch._dynamo" not in imported


@pytest.mark.parametrize(("name", "completed", "part"), [
    ("best_model.pth", 0, "epoch 2.50, validation loss 2.750"), ("best_model.pth", 1234, ", validation loss 2.750"),
    ("checkpoint_latest.pth", 1234, "best of its run: validation loss 2.750"),
    ("checkpoint_latest.pth", 0, "best of its run so far: validation loss 2.750"),
    ("checkpoint_latest.pth", 1000, "best of its run so far: validation loss 2.750")])  # it was finished, then extended
def test_whose_loss_it_is_depends_on_whether_the_run_is_over(folder, tmp_path, monkeypatch, capsys, name, completed,
                                                             part):
    checkpoint = load_checkpoint(folder / "checkpoints" / "my run" / "best_model.pth")
    content = {key: value for key, value in checkpoint.items() if key not in ("format", "digest")}
    save_checkpoint(tmp_path / name, {**content, "completed": completed})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--checkpoint", str(tmp_path / name)])
    generate.main(generate.parse_arguments())
    assert part in capsys.readouterr().err


def test_a_checkpoint_from_before_the_first_evaluation_says_so(folder, tmp_path, monkeypatch, capsys):
    checkpoint = load_checkpoint(folder / "checkpoints" / "my run" / "best_model.pth")
    content = {key: value for key, value in checkpoint.items() if key not in ("format", "digest")}
    save_checkpoint(tmp_path / "latest.pth", {**content, "best_val_loss": math.inf})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--checkpoint", str(tmp_path / "latest.pth")])
    generate.main(generate.parse_arguments())
    generated = capsys.readouterr().err
    assert "epoch 2.50, not evaluated yet\n" in generated and "warning" not in generated and "inf" not in generated


@pytest.mark.parametrize(("dataset", "warned"), [("tinystories", True), ("my_stories.txt", False)])
def test_only_of_tinystories_is_it_known_which_loss_is_too_high(folder, tmp_path, monkeypatch, capsys, dataset, warned):
    checkpoint = load_checkpoint(folder / "checkpoints" / "my run" / "best_model.pth")
    content = {key: value for key, value in checkpoint.items() if key not in ("format", "digest")}
    content["config"]["data"]["dataset"] = dataset
    path = tmp_path / "best_model.pth"
    save_checkpoint(path, content)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--checkpoint", str(path)])
    generate.main(generate.parse_arguments())
    assert ("above 2.0" in capsys.readouterr().err) == warned


def test_a_full_disk_under_out_is_not_blamed_on_standard_output(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

        close = flush  # tries once more to write what is left

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^--out a\.jsonl: No space left"):
        patch.setattr("pathlib.Path.open", lambda *args, **kwargs: Full())
        with (name_in_errors("standard output"), create_file(tmp_path / "a.jsonl", "--out") as file,
              name_in_errors("--out a.jsonl")):
            print("{}", file=file, flush=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
@pytest.mark.parametrize(("room", "kept"), [(1000, 2), (100, 0)])
def test_a_full_disk_under_out_leaves_whole_lines(tmp_path, room, kept):
    import resource
    before, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "a.jsonl"
    try:
        with pytest.raises(UserError), create_file(path, "--out") as file, name_in_errors("--out"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            for number in range(4):
                print(json.dumps([number, "x" * 400]), file=file, flush=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    assert [json.loads(line)[0] for line in lines] == list(range(kept)) and path.exists() == bool(kept)


def test_prompts_come_from_a_file_and_stories_go_to_a_file(run_generate, folder):
    status, out, error = run_generate(
        "--prompts_file", "prompts.txt", "--num_samples", "2", "--seed", "5", "--out", "out.jsonl",
        "--temperature", "0.9", "--compute", "float32", "--max_new_tokens", "60")
    assert status == 0, error
    stories = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted((s["prompt"], s["seed"]) for s in stories) == [
        ("One day", 5), ("One day", 6), ("Tom and “his” dog", 5), ("Tom and “his” dog", 6)]
    for story in stories:
        assert story["text"].startswith(story["prompt"]) and story["text"] in out
        assert story["settings"]["temperature"] == 0.9 and story["settings"]["compute"] == "float32"
        assert story["mean_log_probability"] < 0 and 0 < len(story["tokens"]) <= 60
    assert out.index("Tom and") < out.index("One day")  # in the order asked for
    assert "its context of 48 tokens" in error  # 60 new tokens are more than fit
    assert run_generate("--out", "out.jsonl")[0] == 2
    assert len((folder / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.parametrize(("arguments", "part"), [
    (["--temperature=-1"], "error: --temperature -1: "), (["--top_p", "0"], "error: --top_p 0: "),
    (["--top_k", "-3"], "at least 0"), (["--min_p", "2"], "error: --min_p 2: "), (["--seed", "x"], "error: --seed x: "),
    (["--repetition_penalty", "0"], "error: --repetition_penalty 0: "),
    (["--num_samples", "0"], "--num_samples"), (["--checkpoint", "none.pth"], "no such checkpoint"),
    (["--prompt", "dog " * 100], "context holds 48"), (["--out", "taken.jsonl"], "error: --out taken.jsonl: exists"),
    (["--out", "no/such/folder.jsonl"], "--out"), (["--prompts_file", "none.txt"], "error: --prompts_file none.txt: "),
    (["--prompts_file", "bad.txt"], "--prompts_file bad.txt: not UTF-8"),
    (["--prompts_file", "empty.txt"], "no prompt"),
    (["--interactive", "--num_samples", "3"], "--num_samples 3")])
def test_bad_flags_are_one_line_and_status_2(run_generate, arguments, part):
    status, _, error = run_generate(*arguments)
    line = error.splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and part in line


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
def test_bytes_that_are_no_text_are_replaced(folder):
    for done in (generate_process(folder, "--prompt", os.fsdecode(b"One\xff day")),
                 generate_process(folder, "--interactive", input="One\udcff day\n", errors="surrogateescape")):
        assert done.returncode == 0 and done.stdout.startswith("One\ufffd day"), done.stderr


def test_interactive_mode_changes_settings_and_reports_mistakes_in_one_line(run_generate):
    lines = ["Tom", "/set temperature 0", "Lily was", "Lily was", "/set temperatur 3", "/set top_p 7", "/set seed",
             "/dance", "dog " * 100, "/help", "", "/quit", "never generated"]
    status, out, error = run_generate("--interactive", input="\n".join(lines))
    assert status == 0
    assert out.startswith("Tom") and out.count("Lily was") == 2 and "never generated" not in out
    generated = [part for part in out.split("\n\n") if part.startswith("Lily was")]
    assert generated[0].strip() == generated[1].strip()  # another seed, but no uniforms at temperature 0
    for part in ("did you mean temperature?", "error: /set top_p 7: ", "error: /set seed : ",
                 "error: /dance: unknown command", "context holds 48", "temperature 0"):
        assert part in error, part
    assert run_generate("--interactive", input="Tom\n")[0] == 0  # the end of the input ends it


def test_interactive_mode_without_a_story_leaves_no_file(run_generate, folder):
    assert run_generate("--interactive", "--out", "run_interactive.jsonl", input="/help\n")[0] == 0
    assert not (folder / "run_interactive.jsonl").exists()
    assert run_generate("--interactive", "--out", "run_interactive.jsonl", input="Tom\n")[0] == 0
    assert "Tom" in (folder / "run_interactive.jsonl").read_text(encoding="utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_output_is_one_line_that_names_it(folder):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = generate_process(folder, stdout=full)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: standard output: ")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_the_story_and_not_the_program(folder):
    import pty
    controller, terminal = pty.openpty()
    endless = ["--max_new_tokens", "1000000000000", "--temperature", "0", "--compute", "float32"]  # draws no end
    process = subprocess.Popen([*COMMAND, "--interactive", *endless], cwd=folder, stdin=terminal,
                               stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = b""

    def read_until(part: bytes) -> None:
        nonlocal seen
        while part not in seen:
            seen += os.read(controller, 1024)  # what never comes ends in an OSError when the program has ended

    try:
        read_until(b"> ")
        idle = b"/quit leaves)\r\n> "  # nothing is generated yet
        while idle not in seen:  # more than once: Python's readline misses a signal just before it begins to wait
            process.send_signal(signal.SIGINT)
            while idle not in seen and select.select([controller], [], [], 5)[0]:
                seen += os.read(controller, 1024)
        assert b"stopped" not in seen
        os.write(controller, b"Once upon a time\n")
        read_until(b"Once upon a time\r\n")  # the echo
        seen = b""
        read_until(b"Once upon a time")  # the story has begun, and has no end in sight
        process.send_signal(signal.SIGINT)
        read_until(b"stopped")
        seen = seen[seen.index(b"stopped"):]
        read_until(b"> ")
        os.write(controller, b"/quit\n")
        process.wait(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_the_newest_checkpoint_is_not_one_of_a_replaced_run(tmp_path):
    for name, age in (("a/best_model.pth", 30), ("b/checkpoint_latest.pth", 20), ("b/previous/best_model.pth", 10)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "checkpoint_latest.pth"
    with pytest.raises(UserError, match="train one with"):
        newest_checkpoint(tmp_path / "empty")


def test_a_prompt_that_is_too_long_opens_no_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--prompt", "dog " * 100, "--out", "new.jsonl"])
    with pytest.raises(UserError, match="context holds 48"):
        generate.main(generate.parse_arguments())
    assert not (folder / "new.jsonl").exists()
