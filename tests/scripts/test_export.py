"""Export to transformers, gguf and llama2c, and what comes back: the same tensors, logits and stories; --init_from."""

import json
import shlex
import shutil
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import export
import generate
import train
from config import Config, load_config
from config.command_line import MAIN_CONFIG, QUICKSTART, REPO
from config.schema import ModelConfig, SamplingConfig
from data.tokenizer import byte_characters
from inference.engine import generate_tokens
from inference.gguf_format import read_gguf
from inference.llama2c_format import new_order, read_llama2c, rotate_neighbours
from model import Transformer
from training.checkpoints import load_checkpoint, save_checkpoint

TINY = ModelConfig(vocab_size=1500, d_model=48, n_layers=2, n_heads=4, d_ffn=96, max_seq_len=128, rope_percentage=1.0)
SHAPES = {
    "quickstart": replace(load_config(QUICKSTART).model, n_layers=2), "main": replace(load_config(MAIN_CONFIG).model,
                                                                                      n_layers=2),
    "untied, grouped": replace(TINY, tie_embeddings=False, n_kv_heads=2),
    "grouped, a third rotated": replace(TINY, n_kv_heads=1, rope_percentage=1 / 3, rms_norm_eps=1e-5),
    "untied, none rotated": replace(TINY, tie_embeddings=False, rope_percentage=0.0),
    "another base": replace(TINY, rope_base=500.0, rope_percentage=0.5)}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=100)


@pytest.fixture
def make(tokenizer, tmp_path, monkeypatch):
    """A function: shape -> the path of a checkpoint with random weights, in the current directory."""
    monkeypatch.chdir(tmp_path)

    def save(shape=TINY, name="best_model.pth", **changes):
        torch.manual_seed(1)
        config = Config(model=shape)
        save_checkpoint(tmp_path / name, {
            "model": Transformer(shape).state_dict(), "config": config.to_dict(), "tokenizer": tokenizer.to_str(),
            "iter_num": 7, "epoch": 0.5, "best_val_loss": 3.25, **changes})
        return name
    return save


@pytest.fixture
def run_export(run_main):
    """A function: arguments -> output of an export that succeeds."""
    def run(*arguments):
        status, out, error = run_main(export, *arguments)
        assert status == 0, error
        return out
    return run


def error_of(run_main, *arguments, script=export):
    status, _, error = run_main(script, *arguments)
    assert status == 2 and error.count("\n") == 1
    return error


# hf

@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_the_folder_and_computes_the_same(make, run_export, shape, tokenizer):
    """Logits and a greedy story; the tokenizer puts the separator before a prompt by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_export("--checkpoint", make(SHAPES[shape]), "--format", "hf", "--out", "hf")
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained("hf"), AutoTokenizer.from_pretrained("hf")
    full = SHAPES[shape].rotary_dim == SHAPES[shape].head_dim
    assert type(theirs).__name__ == ("LlamaForCausalLM" if full else "Phi3ForCausalLM")
    ours = Transformer(SHAPES[shape])
    ours.load_state_dict(load_checkpoint("best_model.pth")["model"])
    ours.eval()
    tokens = torch.randint(0, 1500, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4
    prompt = their_tokenizer("Once upon a time", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == [0, *tokenizer.encode("Once upon a time").ids]
    story = theirs.generate(**prompt, do_sample=False, max_new_tokens=100)[0].tolist()
    rows = {}
    for running in generate_tokens(ours, [story[:prompt["input_ids"].shape[1]]], [0], 0, 1500, GREEDY):
        rows = {row.index: row.new for row in running}
    assert story[prompt["input_ids"].shape[1]:] == rows[0]
    assert theirs.generation_config.eos_token_id == 0 and theirs.generation_config.top_p == 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_comes_back_bit_for_bit(make, run_export, shape):
    run_export("--checkpoint", make(SHAPES[shape]), "--format", "hf", "--out", "hf")
    original, back = load_checkpoint("best_model.pth"), load_checkpoint("hf")
    assert back["model"].keys() == original["model"].keys()
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in original["model"].items())
    assert back["config"]["sampling"]["top_p"] == 0.95
    run_export("--checkpoint", "hf", "--format", "hf", "--out", "again")
    first, second = load_file("hf/model.safetensors"), load_file("again/model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert ("lm_head.weight" in first) != SHAPES[shape].tie_embeddings


def test_phi3_with_full_rotation_and_weights_in_several_files_are_read(make, run_export):
    """As transformers itself saves them."""
    from transformers import Phi3Config, Phi3ForCausalLM

    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf")
    torch.manual_seed(0)
    theirs = Phi3ForCausalLM(Phi3Config(
        vocab_size=1500, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=1, eos_token_id=0, bos_token_id=0))
    theirs.save_pretrained("phi", max_shard_size="100KB")
    shutil.copyfile("hf/tokenizer.json", "phi/tokenizer.json")
    found = load_checkpoint("phi")
    ours = Transformer(ModelConfig(**found["config"]["model"]))
    ours.load_state_dict(found["model"])
    tokens = torch.randint(0, 1500, (1, 60))
    with torch.no_grad():
        assert (theirs.eval()(tokens).logits - ours.eval()(tokens)).abs().max() < 1e-4


def test_the_model_card_has_loss_story_and_use(make, run_export, tmp_path):
    entry = {"type": "evaluation", "step": 7, "bits_per_byte": 0.123}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    run_export("--checkpoint", make(), "--format", "hf", "--out", "my model")
    card = (tmp_path / "my model" / "README.md").read_text(encoding="utf-8")
    for part in ("3.2500 nats per token, 0.1230 bits per byte", "> Once upon a time there was", "CDLA-Sharing-1.0",
                 'from_pretrained("my model")', "1,500 tokens"):
        assert part in card


@pytest.mark.parametrize(("key", "value", "part"), [
    ("architectures", ["MistralForCausalLM"], "architecture MistralForCausalLM"),
    ("attention_bias", True, "attention_bias"), ("mlp_bias", True, "mlp_bias"), ("head_dim", 32, "head_dim is 32"),
    ("hidden_act", "gelu", "hidden_act is gelu"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8}, "rope_scaling"), ("sliding_window", 2047, "sliding_window"),
    ("vocab_size", 1400, "tokenizer of another model"), ("hidden_size", None, "config.json"),
    ("num_hidden_layers", 3, "lacks the tensor model.layers.2"),
    ("num_hidden_layers", 1, "does not have: model.layers.1"),
    ("intermediate_size", 64, "has the shape"), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("quantization_config", {"bits": 4}, "quantization_config")])
def test_a_folder_of_another_model_is_refused_in_one_line(make, run_export, run_main, tmp_path, key, value, part):
    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    assert part in error_of(run_main, "--checkpoint", "hf", script=generate)


def test_a_folder_that_is_not_whole_is_refused_in_one_line(make, run_export, run_main, tmp_path):
    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "cannot be read as safetensors" in error_of(run_main, "--checkpoint", "hf", script=generate)
    weights.unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
    assert "is a pickle, which is not opened" in error_of(run_main, "--checkpoint", "hf", script=generate)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part1.safetensors"}}), encoding="utf-8")
    assert "the file part1.safetensors" in error_of(run_main, "--checkpoint", "hf", script=generate)
    weights.write_bytes(whole)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in error_of(run_main, "--checkpoint", "hf", script=generate)
    (tmp_path / "hf" / "config.json").write_text("{", encoding="utf-8")
    assert "not valid JSON" in error_of(run_main, "--checkpoint", "hf", script=generate)


def test_bf16_weights_are_rounded_and_nothing_else(make, run_export):
    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf", "--dtype", "bf16")
    stored = load_file("hf/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    original, back = load_checkpoint("best_model.pth")["model"], load_checkpoint("hf")["model"]
    assert all(torch.equal(back[name], tensor.bfloat16().float()) for name, tensor in original.items())


# gguf

@pytest.mark.parametrize(("dtype", "largest"), [("float32", 0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_a_gguf_file_holds_the_weights_and_the_tokenizer(make, run_export, tmp_path, dtype, largest, tokenizer):
    gguf = pytest.importorskip("gguf")
    shape = SHAPES["main"]
    run_export("--checkpoint", make(shape), "--format", "gguf", "--out", "m.gguf", "--dtype", dtype)
    original = load_checkpoint("best_model.pth")["model"]
    for name, (tensor, error) in read_gguf(tmp_path / "m.gguf", shape).items():
        difference = (tensor - original[name]).abs()
        assert (difference <= error).all() and difference.max() <= largest * original[name].abs().max()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, parts in (("attn_qkv", ["attention.wq", "attention.wk", "attention.wv"]),  # as llama.cpp reads them
                        ("ffn_up", ["feed_forward.w1", "feed_forward.w3"])):
        tensor = stored[f"blk.1.{name}.weight"]
        joined = torch.cat([original[f"layers.1.{part}.weight"] for part in parts])
        found = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert (found - joined).abs().max() <= largest * joined.abs().max()
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "phi3" and values["phi3.rope.dimension_count"] == shape.rotary_dim
    assert values["phi3.attention.head_count_kv"] == shape.kv_heads
    assert values["phi3.rope.scaling.original_context_length"] == values["phi3.context_length"] == shape.max_seq_len
    assert values["tokenizer.ggml.bos_token_id"] == values["tokenizer.ggml.eos_token_id"] == 0
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == shape.vocab_size == len(set(tokens))
    assert tokens[:1500] == [tokenizer.id_to_token(index) for index in range(1500)]
    assert values["tokenizer.ggml.merges"][0].replace(" ", "") in tokens


def test_rows_that_are_no_multiple_of_32_stay_f16(make, run_export, tmp_path):
    gguf = pytest.importorskip("gguf")
    run_export("--checkpoint", make(replace(TINY, d_model=48, d_ffn=96)), "--format", "gguf", "--out", "m.gguf",
               "--dtype", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


# llama2c

def read_pieces(path):
    """The score and the text of each id, as run.c reads them."""
    data = path.read_bytes()
    (longest,), place, pieces = struct.unpack_from("<i", data), 4, []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        pieces.append((score, data[place + 8:place + 8 + length]))
        place += 8 + length
    assert longest == max(len(text) for _, text in pieces)
    return pieces


@pytest.mark.parametrize("shape", [TINY, SHAPES["untied, grouped"], replace(TINY, vocab_size=1600)])
def test_run_c_finds_weights_and_ids_where_it_looks(make, run_export, tmp_path, tokenizer, shape):
    run_export("--checkpoint", make(shape), "--format", "llama2c", "--out", "rc")
    original = load_checkpoint("best_model.pth")["model"]
    back = read_llama2c(tmp_path / "rc", shape, tokenizer)
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in back)
    pieces, order = read_pieces(tmp_path / "rc" / "tokenizer.bin"), new_order(tokenizer, shape.vocab_size)
    assert len(pieces) == shape.vocab_size == len(set(order)) and all(text for _, text in pieces)
    assert pieces[1][1] == b"<|endoftext|>" and order[1] == 0
    for byte in range(256):
        text = pieces[3 + byte][1]
        assert text == (bytes([byte]) if 0 < byte < 128 else f"<0x{byte:02X}>".encode())
        assert tokenizer.id_to_token(order[3 + byte]) == byte_characters()[byte]
    # the file's first row of the embedding is that of id 0 of run.c
    values = np.frombuffer((tmp_path / "rc" / "model.bin").read_bytes(), "<f4", offset=28)
    assert values[:shape.d_model].tolist() == original["tok_embeddings.weight"][order[0]].tolist()
    width, layers, kv_rows = shape.d_model, shape.n_layers, shape.kv_heads * shape.head_dim
    place = shape.vocab_size * width + layers * width  # run.c: embedding, norms, wq, wk, wv, wo, ...
    assert values[place:place + width].tolist() == original["layers.0.attention.wq.weight"][0].tolist()
    place += layers * (2 * width * width + 2 * kv_rows * width + width)
    assert values[place:place + width].tolist() == original["layers.0.feed_forward.w1.weight"][0].tolist()
    place += layers * 2 * width * shape.d_ffn
    assert values[place:place + width].tolist() == original["layers.0.feed_forward.w3.weight"][0].tolist()
    # merging by score gives our tokens: the pair of highest score first, as run.c does
    scores = {text: score for score, text in pieces}
    for text in ("Once upon a time there was a little girl named Lily.", "The dog said, \"I don't know!\""):
        parts = [bytes([byte]) for byte in text.encode()]
        while pairs := [(scores[a + b], -place, place) for place, (a, b) in enumerate(pairwise(parts))
                        if a + b in scores]:
            place = max(pairs)[2]
            parts[place:place + 2] = [parts[place] + parts[place + 1]]
        assert [tokenizer.decode([index]).encode() for index in tokenizer.encode(text).ids] == parts


def test_rotated_pairs_become_neighbours():
    rows = torch.arange(16.0)[:, None]  # two heads of 8 dimensions: i is paired with i + 4
    mixed = rotate_neighbours(rows, 8)
    assert mixed.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(rotate_neighbours(mixed, 8, undo=True), rows)


# The script

@pytest.mark.parametrize(("arguments", "part"), [
    (["--format", "hf", "--dtype", "q8_0"], "--format hf has float32, bf16, f16"),
    (["--format", "llama2c", "--dtype", "bf16"], "--format llama2c has float32"),
    (["--format", "onnx"], "invalid choice"), (["--format", "hf", "--out", "there"], "--force"),
    (["--format", "gguf", "--out", "there", "--force"], "is a folder"),
    (["--format", "hf", "--out", "no/such/x"], "there is no folder")])
def test_what_cannot_be_is_one_line(make, run_main, tmp_path, arguments, part):
    (tmp_path / "there").mkdir()
    assert part in error_of(run_main, "--checkpoint", make(), "--out", "new", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.pth", "there"]


def test_a_model_that_another_program_cannot_compute_is_one_line(make, run_main, tmp_path):
    half = make(replace(TINY, rope_percentage=0.5))
    message = error_of(run_main, "--checkpoint", half, "--format", "llama2c", "--out", "new")
    assert "rope_percentage 0.5" in message and "train with model.rope_percentage 1.0" in message
    none = make(replace(TINY, rope_percentage=0.0))
    assert "without rotation" in error_of(run_main, "--checkpoint", none, "--format", "gguf", "--out", "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.part").exists()


@pytest.mark.parametrize("kind", ["hf", "gguf", "llama2c"])
def test_what_was_not_stored_as_it_is_leaves_no_file(make, run_main, monkeypatch, tmp_path, kind):
    """A disk that changes a value, or a mistake in the format: the difference is an error."""
    names = {"hf": "read_hf_folder", "gguf": "read_gguf", "llama2c": "read_llama2c"}
    original = getattr(export, names[kind])

    def damaged(*arguments):
        found = original(*arguments)
        weights = found["model"] if kind == "hf" else found
        tensor = weights["layers.1.attention.wo.weight"]
        (tensor[0] if kind == "gguf" else tensor)[3, 3] += 1e-3
        return found

    monkeypatch.setattr(export, names[kind], damaged)
    message = error_of(run_main, "--checkpoint", make(), "--format", kind, "--out", "new")
    assert "layers.1.attention.wo.weight, read back, is not what was written" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.pth"]


def test_force_replaces_its_own_files_only(make, run_export, tmp_path):
    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine", encoding="utf-8")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    torch.manual_seed(5)
    changed = {name: tensor + 1 for name, tensor in load_checkpoint("best_model.pth")["model"].items()}
    run_export("--checkpoint", make(model=changed), "--format", "hf", "--out", "hf", "--force")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "hf" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_generate_and_evaluate_open_the_folder(make, run_export, run_main, tmp_path, stories):
    checkpoint = make()
    run_export("--checkpoint", checkpoint, "--format", "hf", "--out", "hf")
    ours = run_main(generate, "--device", "cpu", "--checkpoint", checkpoint, "--compute", "float32")[1]
    status, theirs, error = run_main(generate, "--device", "cpu", "--checkpoint", "hf", "--compute", "float32")
    assert status == 0 and theirs == ours and ours.startswith("Once upon a time"), error
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories[:20]), encoding="utf-8")
    lines = [run_main(evaluate, "--checkpoint", name, "--data", "a.txt")[1] for name in (checkpoint, "hf")]
    assert "nats per token" in lines[0] and lines[0].splitlines()[-4:] == lines[1].splitlines()[-4:]
    status, out, error = run_main(evaluate, "--checkpoint", "hf", "--num_stories", "0", "--set", "data.dataset=sample",
                                  "--set", "data.max_stories=200")
    assert status == 0 and "label alignment" in out and "learning rate" not in out, error


# --init_from

@pytest.fixture
def base(train_here, workplace):
    """A tiny run of 40 steps in base/."""
    status, _, error = train_here("--set", "training.output_dir=base", "--set", "training.max_steps=40")
    assert status == 0, error
    return "base/best_model.pth"


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["val_loss"] for entry in map(json.loads, lines) if entry["type"] == "evaluation"]


def test_fine_tuning_is_better_than_the_same_steps_from_scratch(base, train_here, run_export, workplace):
    """On other text, from a checkpoint and from an hf folder, with the same result; and it can be resumed."""
    text = "\n<|endoftext|>\n".join(f"Pip the robot went to {place}. Pip was happy, and he sang all day long."
                                    for place in ("town", "sea", "the moon", "the park", "school") for _ in range(40))
    (workplace / "robots.txt").write_text(text, encoding="utf-8")
    run_export("--checkpoint", base, "--format", "hf", "--out", "hf")
    settings = ["--set", "data.dataset=robots.txt", "--set", "data.validation=robots.txt", "--set",
                "training.max_steps=10", "--set", "data.max_stories=null"]
    for name, more in (("tuned", ["--init_from", base]), ("from hf", ["--init_from", "hf"]), ("scratch", [])):
        status, out, error = train_here(*settings, "--set", f"training.output_dir={name}", *more)
        assert status == 0, error
        assert ("init_from: a new run with the weights" in out) == bool(more)
    assert losses_of(workplace / "tuned")[-1] < losses_of(workplace / "scratch")[-1] - 0.3
    assert losses_of(workplace / "from hf") == losses_of(workplace / "tuned")
    # stopped after 5 steps and resumed, it is the same run
    common = ["--set", "scheduler.lr_decay_iters=10", "--init_from", base, "--resume"]
    half, whole = (["--set", f"training.output_dir={name}", *common] for name in ("half", "whole"))
    assert train_here(*settings, *half, "--set", "training.max_steps=5")[0] == 0
    status, out, error = train_here(*settings, *half)
    assert status == 0 and "resumed: half" in out and "init_from:" not in out, error
    assert train_here(*settings, *whole)[0] == 0
    weights = [load_checkpoint(f"{name}/checkpoint_latest.pth")["model"] for name in ("half", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_shape_comes_from_the_source(base, run_main, workplace):
    """A YAML that leaves the model out gets it; one that says otherwise is one line; the context may grow."""
    (workplace / "own.yaml").write_text(
        "training: {max_steps: 2, batch_size: 4, gradient_accumulation_steps: 1, output_dir: new, eval_samples: 5}\n"
        "data: {dataset: sample, max_stories: 300, validation: validation.txt, tokenizer_path: tokenizer/tiny}\n"
        "sampling: {max_new_tokens: 5}\nhardware: {device: cpu}\n", encoding="utf-8")
    status, out, error = run_main(train, "--config", "own.yaml", "--init_from", base, "--set", "model.max_seq_len=96")
    assert status == 0, error
    assert "note: model.max_seq_len is 96, but 64 in" in out
    found = load_checkpoint("new/checkpoint_latest.pth")
    assert found["config"]["model"]["d_model"] == 32 and found["config"]["model"]["max_seq_len"] == 96
    assert found["iter_num"] == 2
    for key, value in (("d_model", 64), ("n_kv_heads", 1), ("rope_percentage", 0.5), ("tie_embeddings", "true")):
        status, _, error = run_main(train, "--config", "own.yaml", "--init_from", base, "--set", f"model.{key}={value}")
        assert status == 2 and error.count("\n") == 1 and f"model.{key} is" in error
    status, _, error = run_main(train, "--config", "own.yaml", "--init_from", base, "--set", "training.output_dir=base")
    assert status == 2 and "set training.output_dir to another folder" in error
    status, _, error = run_main(train, "--init_from", base, "--checkpoint", base)
    assert status == 2 and "give one of them" in error
    status, _, error = run_main(train, "--init_from", "nothing.pth", "--set", "training.output_dir=x")
    assert status == 2 and "nothing.pth: no such checkpoint" in error


def test_a_tokenizer_that_is_missing_tokens_is_refused(make, run_export, run_main, tmp_path, tokenizer):
    run_export("--checkpoint", make(), "--format", "hf", "--out", "hf")
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][1:]
    del content["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "<|endoftext|>" in error_of(run_main, "--checkpoint", "hf", script=generate)


def test_the_guides_commands_work(train_here, run_main, workplace, stories):
    """Those of "Take it elsewhere", "Bring one in" and "Fine-tune", in their order, on a tiny model."""
    guide = (REPO / "docs" / "TRAINING_GUIDE.md").read_text(encoding="utf-8")
    part = guide[guide.index("## 7. Take it elsewhere"):guide.index("## All config keys")]
    commands = [shlex.split(line.strip()) for line in part.splitlines() if line.startswith("    python ")]
    assert train_here("--set", "training.output_dir=checkpoints", "--set", "training.max_steps=4")[0] == 0
    (workplace / "my_stories.txt").write_text("\n<|endoftext|>\n".join(stories[:20]), encoding="utf-8")
    scripts = {"export.py": export, "generate.py": generate, "evaluate.py": evaluate, "train.py": train}
    assert {command[1] for command in commands} == set(scripts) and len(commands) == 6
    for _, script, *arguments in commands:
        status, out, error = run_main(scripts[script], *arguments)
        assert status == 0, (script, arguments, error)
    assert {"my_model", "my_model.gguf", "my_model_run.c"} <= {path.name for path in workplace.iterdir()}
    assert "step" in out and (workplace / "checkpoints" / "tuned" / "best_model.pth").exists()
