"""Checkpoint files: a dict of tensors and plain values, saved by torch, with a checksum that is verified on reading.

model_from_checkpoint() rebuilds the model. training/run_folder.py writes the checkpoints of a run.
"""

import dataclasses
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, UserError, config_from_dict, load_config
from data.atomic_files import atomic_write
from data.cleaning import CLEANING_VERSION
from model import Transformer
from training.hf_format import is_hf_folder, read_hf_folder

FORMAT = 2
KEYS = {"model": dict, "config": dict, "tokenizer": str, "iter_num": int, "epoch": float, "best_val_loss": float}
LATEST, BEST = "checkpoint_latest.pth", "best_model.pth"
PREVIOUS = "previous"  # the folder in an output_dir that earlier runs move to
CHECKPOINT_NAME = re.compile(r"checkpoint_latest\.pth|best_model\.pth|checkpoint_epoch_\d+\.pth")
# the attributes of Run (training/run.py) that a checkpoint holds beside the weights and the optimizer
RUN_STATE = ("iter_num", "position", "best_val_loss", "evaluations_without_gain", "evaluated", "completed", "unlogged",
             "norms")
SHAPE = ("vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "d_ffn", "rotary_dim", "rope_base",
         "rms_norm_eps", "tie_embeddings")  # what the weights of a model depend on
OWN_CONFIG = "its own config is taken by --checkpoint {} without --config and --set"


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values. Whatever interrupts it, `path` holds the old file or the new one."""
    buffer = io.BytesIO()  # torch.save crashes if writing its file fails (a full disk, a signal)
    torch.save({"format": FORMAT, "digest": content_digest(checkpoint), **checkpoint}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it; also a folder of Hugging Face transformers (hf_format.py).

    Raises UserError if it is missing, damaged or of another kind.
    """
    path = Path(path)
    if is_hf_folder(path):
        return read_hf_folder(path)
    if not path.is_file():
        folder, what = (path, "a folder") if path.is_dir() else (path.parent, "no such checkpoint")
        there = sorted(str(file) for file in folder.glob("*.pth") if file.is_file())
        raise UserError(f"{path}: {what}; " + (f"there is {', '.join(there)}" if there else
                                               f"train.py writes {LATEST} to training.output_dir (the quickstart's is "
                                               "checkpoints/quickstart)"))
    damaged = f"{path}: damaged, or not a checkpoint; use another one, such as {BEST}"
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's guesses at what is wrong with the file
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # for a bad file torch raises nearly every type, even OSError
            raise UserError(damaged) from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key, kind in KEYS.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project: it lacks {', '.join(missing)}")
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {found.get('format')}, but this program reads {FORMAT}: use the "
                        "version of this project that wrote it")
    content = {key: value for key, value in checkpoint.items() if key not in ("format", "digest")}
    if checkpoint.get("digest") != content_digest(content):  # torch does not notice a damaged directory of the zip file
        raise UserError(damaged)
    if isinstance(data := checkpoint["config"].get("data"), dict):  # earlier versions stored it; model has the same key
        data.pop("max_seq_len", None)
    return checkpoint


def content_digest(content: Any) -> str:
    """sha256 of nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(content)
    return digest.hexdigest()


def newest_checkpoint(folder: Path = Path("checkpoints")) -> Path:
    """The best model of the newest run under `folder`, except in previous/; a run without one has its last checkpoint.
    """
    files = [path for path in folder.rglob("*.pth") if PREVIOUS not in path.relative_to(folder).parts]
    if not files:
        raise UserError(f"{folder}: no checkpoint here; train one with python train.py, or name one with --checkpoint")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    best = newest.with_name(BEST)
    return best if best in files else newest


def describe_checkpoint(checkpoint: dict[str, Any], path: Path) -> str:
    """How far the model was trained and how good it is."""
    finished = checkpoint.get("completed") == checkpoint["iter_num"]
    loss, of_run = checkpoint["best_val_loss"], "" if finished else " so far"
    known = f"validation loss {loss:.3f}" if loss < math.inf else "not evaluated yet"
    known = known if path.name == BEST or loss == math.inf else f"best of its run{of_run}: {known}"
    return f"{path}: step {checkpoint['iter_num']:,}, epoch {checkpoint['epoch']:.2f}, {known}"


def model_from_checkpoint(checkpoint: dict[str, Any], source: str | Path, device: torch.device | str) -> Transformer:
    """Build the model of a checkpoint, with its weights, in eval mode. Raises UserError."""
    model = Transformer(config_from_dict(checkpoint["config"], str(source)).model)
    load_weights(model, checkpoint, source)
    return model.to(device).eval()


def load_weights(model: Transformer, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape. Raises UserError if the shapes differ."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        why = str(error).splitlines()[:2][-1].strip()
        raise UserError(f"{source}: its weights do not fit the model of the config: {why}") from None


def config_of_new_run(initial: dict[str, Any], source: Path, config_path: Path | None,
                      overrides: Sequence[str]) -> Config:
    """The config of a new run that begins with the weights of a checkpoint. Raises UserError.

    The model's shape is the checkpoint's, the rest is that of the YAML file; without one, the checkpoint's own.
    """
    own = config_from_dict(initial["config"], str(source))
    if config_path is None:
        config = config_from_dict(initial["config"], str(source), overrides)
    else:
        config = load_config(config_path, overrides, dataclasses.asdict(own.model))
    for key in SHAPE:
        before, now = getattr(own.model, key), getattr(config.model, key)
        if before != now:
            key = {"kv_heads": "n_kv_heads", "rotary_dim": "rope_percentage"}.get(key, key)
            raise UserError(f"--init_from {source}: model.{key} is {getattr(own.model, key)} there, but "
                            f"{getattr(config.model, key)} in the config: leave it out, since the weights determine it")
    if Path(config.training.output_dir).expanduser().resolve() in source.resolve().parents:
        raise UserError(f"--init_from {source}: is in training.output_dir, and a new run moves what is there to "
                        f"{PREVIOUS}/: set training.output_dir to another folder")
    return config


def check_model(checkpoint: dict[str, Any], source: Path, config: Config) -> None:
    """Raise UserError if the config's model differs from the checkpoint's."""
    saved = config_from_dict(checkpoint["config"], str(source)).to_dict()["model"]
    for key, value in config.to_dict()["model"].items():
        if key not in ("dropout", "use_flash_attention") and saved[key] != value:  # no weight depends on these two
            raise UserError(f"{source}: model.{key} is {saved[key]} there, but {value} in the config: "
                            + OWN_CONFIG.format(source))


def check_resumable(checkpoint: dict[str, Any], source: Path, config: Config, train_digest: str | None = None,
                    ) -> list[str]:
    """Raise UserError if a run with this config cannot resume from the checkpoint. Returns a note on changed settings.

    train_digest: of the training tokens, once they are prepared.
    """
    missing = [key for key in ("optimizer", "train_digest", "metrics_size", *RUN_STATE) if key not in checkpoint]
    if missing:
        raise UserError(f"{source}: cannot be resumed, since it lacks {', '.join(missing)}: a folder of Hugging Face "
                        "transformers, or written by an early version of this project; --init_from starts a new run "
                        "with its weights")
    if train_digest not in (None, checkpoint["train_digest"]):
        if config.data.clean and checkpoint.get("cleaning_version", 1) != CLEANING_VERSION:
            raise UserError(f"{source}: was trained on stories as an earlier version of this project cleaned them, and "
                            "this version cleans them differently: finish the run with the version that started it, or "
                            "train a new model")
        raise UserError(f"{source}: was trained on other stories than the training tokens hold now: restore its "
                        "data.dataset and its files, or train a new model on these")
    check_model(checkpoint, source, config)
    before, now, changed = config_from_dict(checkpoint["config"], str(source)).to_dict(), config.to_dict(), []
    old_type, new_type = before["optimizer"]["type"], now["optimizer"]["type"]
    if old_type != new_type:
        raise UserError(f"{source}: optimizer.type is {old_type} there, but {new_type} in the config, and their states "
                        f"differ: {OWN_CONFIG.format(source)}")
    for key in ("dataset", "max_stories"):
        was, new = before["data"][key], now["data"][key]
        # two paths may hold the same stories; once the tokens are prepared, train_digest decides that
        if was != new and (key == "max_stories" or "sample" in (was, new)):
            raise UserError(f"{source}: data.{key} is {json.dumps(was)} there, but {json.dumps(new)} in the config: a "
                            f"run resumes with the stories that it started with: {OWN_CONFIG.format(source)}")
    for section, values in now.items():
        changed += [f"{section}.{key} {json.dumps(before[section][key])} -> {json.dumps(value)}"
                    for key, value in values.items()
                    if before[section][key] != value and key not in ("show_progress", "output_dir")]
    return ["changed since the checkpoint: " + ", ".join(changed)] if changed else []
