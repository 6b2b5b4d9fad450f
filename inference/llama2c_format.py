"""A model as model.bin and tokenizer.bin for run.c of karpathy's llama2.c, in its first float32 layout."""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import UserError
from config.schema import ModelConfig
from data.tokenizer import END_OF_STORY, byte_characters, tokenizer_from_json
from model import rope_tables

HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
MODEL, TOKENIZER = "model.bin", "tokenizer.bin"
FIRST_BYTE = 3  # the id of byte 0 in run.c; 1 begins and ends a text
LAYERS = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
          "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")  # in the order of the file


def check_runnable(model: ModelConfig) -> None:
    """Raise UserError if run.c cannot compute this model."""
    if model.rotary_dim != model.head_dim or model.rope_base != 10_000:
        raise UserError(
            f"--format llama2c: run.c rotates all dimensions, by a base of 10,000, but this model has rope_percentage "
            f"{model.rope_percentage:g} and rope_base {model.rope_base:g}: train with model.rope_percentage 1.0 and "
            "rope_base 10000, or use --format gguf")


def new_order(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Our id of each id of run.c, which fixes those of the separator and of the 256 bytes."""
    vocabulary = tokenizer.get_vocab()
    fixed = [vocabulary[END_OF_STORY], *(vocabulary[character] for character in byte_characters())]
    taken = set(fixed)
    others = [index for index in range(vocab_size) if index not in taken]
    return [others[0], fixed[0], others[1], *fixed[1:], *others[2:]]


def rotate_neighbours(weight: Tensor, head_dim: int, undo: bool = False) -> Tensor:
    """The rows of wq or wk, reordered: run.c pairs dimensions 2 i and 2 i + 1, model.py i and i + head_dim / 2."""
    shape = (-1, head_dim // 2, 2, weight.shape[1]) if undo else (-1, 2, head_dim // 2, weight.shape[1])
    return weight.view(shape).transpose(1, 2).reshape(weight.shape)


def write_llama2c(folder: Path, checkpoint: dict[str, Any], model: ModelConfig) -> None:
    """Write model.bin and tokenizer.bin. Raises UserError if run.c cannot compute the model."""
    check_runnable(model)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], "the checkpoint")
    order = new_order(tokenizer, model.vocab_size)
    weights = checkpoint["model"]
    shape = (model.d_model, model.d_ffn, model.n_layers, model.n_heads, model.kv_heads,
             model.vocab_size if model.tie_embeddings else -model.vocab_size, model.max_seq_len)
    with (folder / MODEL).open("wb") as file:
        file.write(HEADER.pack(*shape))
        _write(file, weights["tok_embeddings.weight"][order])
        for name in LAYERS:
            for layer in range(model.n_layers):
                weight = weights[f"layers.{layer}.{name}.weight"]
                if name in ("attention.wq", "attention.wk"):
                    weight = rotate_neighbours(weight, model.head_dim)
                _write(file, weight)
        _write(file, weights["norm.weight"])
        for table in rope_tables(model):  # run.c skips them
            _write(file, table[:, model.rotary_dim // 2:])  # (max_seq_len, rotary_dim / 2)
        if not model.tie_embeddings:
            _write(file, weights["output.weight"][order])
    with (folder / TOKENIZER).open("wb") as file:
        _write_tokenizer(file, checkpoint["tokenizer"], tokenizer, order)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.float().contiguous().numpy().astype("<f4").tobytes())


def _write_tokenizer(file: BinaryIO, tokenizer_json: str, tokenizer: Tokenizer, order: list[int]) -> None:
    """The score and the text of each id. run.c merges by the highest score, so it is minus the rank of the merge.

    It looks whole characters up as text, and else takes the id FIRST_BYTE + b of each byte b. A text of the form <0xE2>
    is printed as that byte.
    """
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    merges = json.loads(tokenizer_json)["model"]["merges"]
    scores = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(merges)])}
    pieces = []
    for index, ours in enumerate(order):
        token = tokenizer.id_to_token(ours)
        if FIRST_BYTE <= index < FIRST_BYTE + 256:
            byte = index - FIRST_BYTE
            text = bytes([byte]) if 0 < byte < 128 else f"<0x{byte:02X}>".encode()
        elif token is None:  # a row above the tokenizer's; run.c allows no empty text
            text = f"<unused {ours}>".encode()
        elif set(token) <= set(bytes_of):
            text = bytes(bytes_of[character] for character in token)
        else:
            text = token.encode("utf-8")
        pieces.append((scores.get(token, 0.0), text))
    file.write(struct.pack("<i", max(len(text) for _, text in pieces)))
    for score, text in pieces:
        file.write(struct.pack("<fi", score, len(text)) + text)


def read_llama2c(folder: Path, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Our weights in model.bin, undone from its order; exact."""
    data = (folder / MODEL).read_bytes()
    dim, hidden, layers, heads, kv_heads, size, _ = HEADER.unpack_from(data)
    values = torch.from_numpy(np.frombuffer(data, "<f4", offset=HEADER.size).copy())
    kv_rows, vocab_size = kv_heads * dim // heads, abs(size)
    shapes = dict(zip(LAYERS, [(dim,), (dim, dim), (kv_rows, dim), (kv_rows, dim), (dim, dim), (dim,), (hidden, dim),
                               (dim, hidden), (hidden, dim)], strict=True))
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        place += int(np.prod(shape))
        return values[place - int(np.prod(shape)):place].view(shape)

    order = torch.tensor(new_order(tokenizer, vocab_size)).argsort()
    found = {"tok_embeddings.weight": take(vocab_size, dim)[order]}
    for name, shape in shapes.items():
        for layer in range(layers):
            weight = take(*shape)
            if name in ("attention.wq", "attention.wk"):
                weight = rotate_neighbours(weight, dim // heads, undo=True)
            found[f"layers.{layer}.{name}.weight"] = weight
    found["norm.weight"] = take(dim)
    take(2 * model.max_seq_len, dim // heads // 2)
    found["output.weight"] = found["tok_embeddings.weight"] if size > 0 else take(vocab_size, dim)[order]
    return found
