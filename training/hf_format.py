"""Checkpoints as a folder of Hugging Face transformers: LlamaForCausalLM, or Phi3ForCausalLM for partial rotation.

Phi-3 is this project's model: RMSNorm, SwiGLU, grouped queries and `partial_rotary_factor`, with two joined matrices a
layer. Both pair the rotated dimensions as model.py does. Nothing runs code from a folder: weights are safetensors.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, UserError, config_from_dict
from config.schema import ModelConfig
from config.wording import one_line, show
from data.tokenizer import END_OF_STORY, SPECIAL_TOKENS, tokenizer_from_json
from model import Transformer

CONFIG, WEIGHTS, TOKENIZER, GENERATION = ("config.json", "model.safetensors", "tokenizer.json",
                                          "generation_config.json")
INDEX = WEIGHTS + ".index.json"  # of weights in several files
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
OUTER = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
LAYER = {"input_layernorm": ("attention_norm",), "post_attention_layernorm": ("ffn_norm",),
         "self_attn.o_proj": ("attention.wo",), "mlp.down_proj": ("feed_forward.w2",)}
SEPARATE = {"self_attn.q_proj": ("attention.wq",), "self_attn.k_proj": ("attention.wk",),
            "self_attn.v_proj": ("attention.wv",), "mlp.gate_proj": ("feed_forward.w1",),
            "mlp.up_proj": ("feed_forward.w3",)}
JOINED = {"self_attn.qkv_proj": ("attention.wq", "attention.wk", "attention.wv"),
          "mlp.gate_up_proj": ("feed_forward.w1", "feed_forward.w3")}


# Out

def tensor_names(model: ModelConfig, joined: bool) -> dict[str, tuple[str, ...]]:
    """Their name of each tensor, and ours that it joins; a tied output matrix is the embedding. joined: as in Phi-3."""
    names = {theirs: (ours,) for ours, theirs in OUTER.items()
             if not (model.tie_embeddings and ours == "output.weight")}
    for layer in range(model.n_layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": tuple(f"layers.{layer}.{part}.weight" for part in parts)
                  for theirs, parts in (LAYER | (JOINED if joined else SEPARATE)).items()}
    return names


def write_hf_folder(folder: Path, checkpoint: dict[str, Any], config: Config, dtype: str) -> None:
    """Write a checkpoint as a folder that transformers opens: weights, configs and tokenizer; no model card."""
    from safetensors.torch import save

    model, torch_dtype = config.model, DTYPES[dtype]
    names = tensor_names(model, joined=model.rotary_dim != model.head_dim)
    tensors = {theirs: torch.cat([checkpoint["model"][part] for part in ours]).to(torch_dtype)
               for theirs, ours in names.items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    tokenizer = json.loads(checkpoint["tokenizer"])
    vocabulary = tokenizer_from_json(checkpoint["tokenizer"], "the checkpoint").get_vocab()
    unused = list(range(len(vocabulary), model.vocab_size))  # rows above the tokenizer's, which are never generated
    end = vocabulary[END_OF_STORY]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": vocabulary.get(SPECIAL_TOKENS[1], end)}
    full = model.rotary_dim == model.head_dim
    values = {
        "architectures": ["LlamaForCausalLM" if full else "Phi3ForCausalLM"], "model_type": "llama" if full else "phi3",
        "vocab_size": model.vocab_size, "hidden_size": model.d_model, "intermediate_size": model.d_ffn,
        "num_hidden_layers": model.n_layers, "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads, "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.rms_norm_eps, "rope_theta": model.rope_base, "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu", "torch_dtype": str(torch_dtype).removeprefix("torch."), **special}
    if full:
        values |= {"attention_bias": False, "mlp_bias": False}
    else:  # transformers rounds the product with head_dim down
        values |= {"partial_rotary_factor": (model.rotary_dim + 0.5) / model.head_dim, "sliding_window": None,
                   "original_max_position_embeddings": model.max_seq_len}
    sampling = config.sampling
    generation = {name: getattr(sampling, name) for name in SAMPLING} | special | {
        "do_sample": sampling.temperature > 0} | ({"suppress_tokens": unused} if unused else {})
    if not sampling.temperature:
        generation = {name: value for name, value in generation.items() if name not in SAMPLING[:4]}
    # each story begins after a separator, so each prompt does: as in training
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": END_OF_STORY, "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_STORY: {"id": END_OF_STORY, "ids": [end], "tokens": [END_OF_STORY]}}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_STORY, "eos_token": END_OF_STORY,
                "pad_token": SPECIAL_TOKENS[1] if SPECIAL_TOKENS[1] in vocabulary else END_OF_STORY,
                "model_max_length": model.max_seq_len, "clean_up_tokenization_spaces": False}
    for name, content in ((CONFIG, values), (GENERATION, generation), (TOKENIZER, tokenizer),
                          ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# In

def is_hf_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_hf_folder(folder: Path) -> dict[str, Any]:
    """A folder of transformers as a checkpoint: model, config, tokenizer; step and epoch are 0. Raises UserError."""
    model = _read_config(folder)
    file = folder / TOKENIZER
    if not file.is_file():
        raise UserError(f"{folder}: has no {TOKENIZER}; save the tokenizer there with transformers "
                        "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))")
    tokenizer = tokenizer_from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    size = tokenizer.get_vocab_size()
    if size > model.vocab_size:
        raise UserError(f"{file}: has {size:,} tokens, but the model's vocab_size is {model.vocab_size:,}: it is the "
                        "tokenizer of another model")
    generation = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    sampling = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        sampling["temperature"] = 0
    config = config_from_dict({"model": dataclasses.asdict(model), "sampling": sampling}, str(folder)).to_dict()
    return {"model": _read_weights(folder, model), "config": config, "tokenizer": tokenizer.to_str(), "iter_num": 0,
            "epoch": 0.0, "best_val_loss": math.inf}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {show(found)}, expected an object")
    return found


def _read_config(folder: Path) -> ModelConfig:
    """The model of a config.json. Raises UserError for what model.py does not have."""
    found, where = _read_json(folder / CONFIG), folder / CONFIG
    names = found.get("architectures") or [str(found.get("model_type"))]
    kinds = {"LlamaForCausalLM": "llama", "Phi3ForCausalLM": "phi3", "llama": "llama", "phi3": "phi3"}
    kind = kinds.get(str(names[0]))
    if kind is None:
        raise UserError(f"{where}: architecture {one_line(names[0])}; only LlamaForCausalLM and Phi3ForCausalLM can be "
                        "read")
    try:
        heads, width = int(found["num_attention_heads"]), int(found["hidden_size"])
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
        share = float(rope.get("partial_rotary_factor", found.get("partial_rotary_factor") or 1.0))
        rotated = int(width // heads * share)
        values = {
            "vocab_size": found["vocab_size"], "d_model": width, "n_layers": found["num_hidden_layers"],
            "n_heads": heads, "n_kv_heads": found.get("num_key_value_heads"), "d_ffn": found["intermediate_size"],
            "max_seq_len": found["max_position_embeddings"], "rope_percentage": rotated / (width // heads),
            "rope_base": rope.get("rope_theta", found.get("rope_theta", 10_000.0)),
            "rms_norm_eps": found.get("rms_norm_eps", 1e-6), "tie_embeddings": found.get("tie_word_embeddings", False)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{where}: lacks a usable {one_line(error)}") from None
    refused = {"attention_bias": found.get("attention_bias"), "mlp_bias": found.get("mlp_bias"),
               "sliding_window": found.get("sliding_window"),
               "head_dim": found.get("head_dim") not in (None, width // heads) and found["head_dim"],
               "hidden_act": found.get("hidden_act", "silu") != "silu" and found["hidden_act"],
               "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default" and rope,
               "quantization_config": found.get("quantization_config"),
               "partial_rotary_factor": kind == "llama" and share != 1.0 and share}
    for key, value in refused.items():
        if value:
            raise UserError(f"{where}: {key} is {one_line(value)}, which this project's model does not have")
    return config_from_dict({"model": values}, str(where)).model


def _read_weights(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The weights as model.py names them, float32. Raises UserError if a tensor is missing, extra, or of another shape.
    """
    found, weights = _read_tensors(folder), {}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(model).state_dict().items()}
    # Phi-3 joins them with full rotation, too
    names = tensor_names(model, joined=any(name.endswith("qkv_proj.weight") for name in found))
    for theirs, ours in names.items():
        rows = [shapes[name][0] for name in ours]
        shape = (sum(rows), *shapes[ours[0]][1:])
        if theirs not in found:
            raise UserError(f"{folder}: lacks the tensor {theirs}")
        if tuple(found[theirs].shape) != shape:
            raise UserError(f"{folder}: {theirs} has the shape {tuple(found[theirs].shape)}, but by {CONFIG} it is "
                            f"{shape}")
        weights |= dict(zip(ours, found[theirs].float().split(rows), strict=True))
    if model.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    extra = [name for name in found if name not in names and name != OUTER["output.weight"]  # a tied one may be there
             and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{folder}: has a tensor that this project's model does not have: {extra[0]}")
    return weights


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        files = sorted({Path(str(name)).name for name in _read_json(folder / INDEX).get("weight_map", {}).values()})
    else:
        other = next(folder.glob("*.bin"), None)
        raise UserError(f"{folder}: has no {WEIGHTS}" + (
            f"; {other.name} is a pickle, which is not opened: save the model with safe_serialization=True"
            if other else ""))
    tensors = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: the file {name}, which {INDEX} names, is missing")
        try:
            tensors |= load_file(str(folder / name))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder / name}: cannot be read as safetensors ({one_line(error)})") from None
    return tensors
