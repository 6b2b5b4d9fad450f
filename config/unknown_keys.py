"""Unknown keys: the nearest known one, or this project's name for a key of another trainer (llama2.c, nanoGPT, ...)."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from config.errors import UserError
from config.wording import one_line, show

OTHER_NAMES = {
    "dim": "model.d_model", "hidden_size": "model.d_model", "n_embd": "model.d_model", "n_layer": "model.n_layers",
    "n_head": "model.n_heads", "block_size": "model.max_seq_len", "tokenizer.path": "data.tokenizer_path",
    "max_iters": "training.max_steps", "compile": "training.use_compile", "dtype": "training.use_bf16",
    "beta1": "optimizer.adam_beta1", "beta2": "optimizer.adam_beta2", "gradient_clip": "optimizer.max_grad_norm",
    "grad_clip": "optimizer.max_grad_norm", "warmup_iters": "scheduler.warmup_steps",
}


def check_names(values: Mapping[str, Any], sections: Mapping[str, Sequence[str]], source: str,
                origins: Mapping[str, str]) -> None:
    """Raise UserError that names all unknown sections and keys of a file at once, each with the key to use instead.

    sections: the known keys of each section. origins: for a key path, the --set it came from, if not from `source`.
    """
    unknown = []  # where, key path, the noun, advice, what is known
    for name, section in values.items():
        if name not in sections:
            unknown.append((origins.get(name, source), str(name), "section", suggest("", name, sections), sections))
        elif isinstance(section, dict):
            unknown += [(origins.get(f"{name}.{key}", source), f"{name}.{key}", f"key in {name}",
                         suggest(name, key, sections), sections[name])
                        for key in section if key not in sections[name]]
    if len(unknown) == 1:
        where, path, noun, advice, known = unknown[0]
        raise UserError(f"{where}: {one_line(path)}: unknown {noun}; {advice or 'known: ' + ', '.join(known)}")
    if unknown:
        keys = ", ".join(f"{one_line(path)} ({advice or 'there is no such key'})" for _, path, _, advice, _ in unknown)
        places = ", ".join(dict.fromkeys(where for where, *_ in unknown))
        raise UserError(f"{places}: {len(unknown)} unknown keys: {keys}; docs/TRAINING_GUIDE.md lists all keys")


def suggest(section: str, key: Any, sections: Mapping[str, Sequence[str]]) -> str:
    """Advice on an unknown key of a section ("" for the top level): the key to use instead, or "" if none is near."""
    elsewhere = [f"{other}.{key}" for other, keys in sections.items() if key in keys]
    if name := OTHER_NAMES.get(f"{section}.{key}", OTHER_NAMES.get(key, elsewhere[0] if elsewhere else None)):
        return f"use {name}"
    near = difflib.get_close_matches(str(key), sections[section] if section else list(sections), 1, 0.6)
    return f"did you mean {near[0]}?" if near else ""


def accept_use_wandb(training: Any, source: str, origins: dict[str, str]) -> None:
    """Replace `use_wandb: true` in the training section, as other trainers have it, by `logger: wandb`."""
    if not isinstance(training, dict) or "use_wandb" not in training:
        return
    wanted, logger = training.pop("use_wandb"), training.get("logger")
    where = origins.pop("training.use_wandb", source)
    if not isinstance(wanted, bool):
        raise UserError(f"{where}: training.use_wandb: found {show(wanted)}, expected true or false")
    if wanted and logger not in (None, "wandb"):
        raise UserError(f"{where}: training.use_wandb is true, but training.logger is {show(logger)}: keep one of them")
    if wanted:
        training["logger"] = "wandb"
