"""A model as a .gguf file for llama.cpp, Ollama and LM Studio; its architecture is phi3, which has partial rotation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from config.schema import ModelConfig
from data.tokenizer import END_OF_STORY, SPECIAL_TOKENS, tokenizer_from_json

try:
    import gguf
except ImportError:
    gguf = None

DTYPES = {"float32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
NAMES = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wo": "attn_output",
         "feed_forward.w2": "ffn_down"}
JOINED = {"attn_qkv": ("attention.wq", "attention.wk", "attention.wv"),
          "ffn_up": ("feed_forward.w1", "feed_forward.w3")}
OUTER = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
         "output.weight": "output.weight"}


def tensor_names(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The name of each tensor of the file, and ours that it joins; a tied output matrix is the embedding."""
    names = {theirs: (ours,) for ours, theirs in OUTER.items()}
    if model.tie_embeddings:
        del names["output.weight"]
    for layer in range(model.n_layers):
        names |= {f"blk.{layer}.{theirs}.weight": (f"layers.{layer}.{ours}.weight",) for ours, theirs in NAMES.items()}
        names |= {f"blk.{layer}.{theirs}.weight": tuple(f"layers.{layer}.{part}.weight" for part in parts)
                  for theirs, parts in JOINED.items()}
    return names


def write_gguf(path: Path, checkpoint: dict[str, Any], model: ModelConfig, dtype: str, name: str) -> None:
    """Write the file. Norms are float32; matrices whose rows cannot be divided into blocks of 32 stay f16 in q8_0.

    Raises UserError if the gguf package is missing, or if nothing is rotated, which llama.cpp does not have.
    """
    if gguf is None:
        raise UserError("--format gguf needs the gguf package: pip install gguf")
    if not model.rotary_dim:
        raise UserError("--format gguf: llama.cpp has no model without rotation (model.rope_percentage 0): use hf")
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{DTYPES[dtype]}"])
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_seq_len)
    writer.add_rope_scaling_orig_ctx_len(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ffn)
    writer.add_block_count(model.n_layers)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_dimension_count(model.rotary_dim)
    writer.add_rope_freq_base(model.rope_base)
    _add_tokenizer(writer, checkpoint["tokenizer"], model.vocab_size)
    for theirs, ours in tensor_names(model).items():
        array = torch.cat([checkpoint["model"][part].float() for part in ours]).numpy()
        stored = kind
        if array.ndim == 1:
            stored = gguf.GGMLQuantizationType.F32
        elif dtype == "q8_0" and array.shape[1] % 32:
            stored = gguf.GGMLQuantizationType.F16
        writer.add_tensor(theirs, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer_json: str, vocab_size: int) -> None:
    """The vocabulary and the merges as llama.cpp's `gpt2` reads them; rows above the tokenizer's are unused."""
    vocabulary, content = tokenizer_from_json(tokenizer_json, "the checkpoint").get_vocab(), json.loads(tokenizer_json)
    tokens = [f"[unused{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    special = {token["content"] for token in content["added_tokens"]} | {END_OF_STORY}
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
    end = vocabulary[END_OF_STORY]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(vocabulary.get(SPECIAL_TOKENS[1], end))
    writer.add_add_bos_token(True)


def read_gguf(path: Path, model: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Each of our weights in the file, dequantized, float32, and the largest rounding error of each of its values."""
    weights = {}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for theirs, ours in tensor_names(model).items():
        stored = tensors[theirs]
        whole = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32))
        rows = whole.shape[0] if len(ours) == 1 else _rows(ours, model)
        error = _rounding(whole, stored.tensor_type.name)
        weights |= dict(zip(ours, zip(whole.split(rows), error.split(rows), strict=True), strict=True))
    if model.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def _rows(ours: tuple[str, ...], model: ModelConfig) -> list[int]:
    kv_rows = model.kv_heads * model.head_dim
    return [model.d_model, kv_rows, kv_rows] if len(ours) == 3 else [model.d_ffn] * 2


def _rounding(weight: Tensor, kind: str) -> Tensor:
    """How far a value may be from what it was before it was stored."""
    if kind == "Q8_0":  # half a step of its block, whose scale is rounded to f16
        blocks = weight.view(weight.shape[0], -1, 32).abs().amax(dim=-1, keepdim=True)
        return (blocks * (0.5 / 127 + 2**-10) + 1e-7).expand(-1, -1, 32).reshape(weight.shape)
    share, smallest = {"F32": (0.0, 0.0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 1e-38)}[kind]
    return share * weight.abs() + smallest
