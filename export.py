"""Export a checkpoint for other programs: Hugging Face transformers, llama.cpp (gguf), or run.c of llama2.c.

    python export.py --format hf --out my_model             a folder for AutoModelForCausalLM and AutoTokenizer
    python export.py --format gguf --out my_model.gguf --dtype q8_0
    python export.py --format llama2c --out my_model_run.c  a folder with model.bin and tokenizer.bin

What was written is read back and compared with the checkpoint, tensor by tensor, before it gets its name.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from config import Config, UserError, config_from_dict, run_script
from config.command_line import Parser, file_path, parse_before_imports

DTYPES = {"hf": ("float32", "bf16", "f16"), "gguf": ("float32", "bf16", "f16", "q8_0"), "llama2c": ("float32",)}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Export a checkpoint for other programs.")
    parser.add_argument("--checkpoint", type=file_path, help="a .pth file, or a folder of Hugging Face "
                        "transformers (default: the best model of the newest run under checkpoints/)")
    parser.add_argument("--format", choices=DTYPES, required=True, help="hf: a folder for Hugging Face transformers; "
                        "gguf: a file for llama.cpp; llama2c: a folder for run.c")
    parser.add_argument("--out", type=file_path, required=True, help="the folder (hf, llama2c) or file (gguf) to write")
    parser.add_argument("--dtype", choices=DTYPES["gguf"], default="float32", help="data type of the weight matrices "
                        "(%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")
    args = parser.parse_args()
    if args.dtype not in DTYPES[args.format]:
        raise UserError(f"--dtype {args.dtype}: --format {args.format} has {', '.join(DTYPES[args.format])}")
    if args.out.exists() and not args.force:
        raise UserError(f"--out {args.out}: exists already; name another one, or replace it with --force")
    if args.out.exists() and args.out.is_dir() != (args.format != "gguf"):
        raise UserError(f"--out {args.out}: is a {'folder' if args.out.is_dir() else 'file'}; name another one")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}: create it, or name another one")
    return args


if __name__ == "__main__":
    arguments = parse_before_imports(parse_arguments)

import torch

from config.wording import counted, format_bytes
from data.tokenizer import tokenizer_from_json
from inference.generation import generate_stories
from inference.gguf_format import read_gguf, write_gguf
from inference.llama2c_format import read_llama2c, write_llama2c
from model import count_parameters
from training.checkpoints import load_checkpoint, model_from_checkpoint, newest_checkpoint
from training.hf_format import DTYPES as TORCH_DTYPES
from training.hf_format import read_hf_folder, write_hf_folder
from training.metrics_file import METRICS, read_metrics

CARD = Path(__file__).parent / "inference" / "model_card.md"
LICENCE = "TinyStories (Eldan & Li, 2023, [arXiv:2305.07759](https://arxiv.org/abs/2305.07759)) is CDLA-Sharing-1.0."
OTHER_LICENCE = "The licence of the weights depends on that text."


def write_card(folder: Path, checkpoint: dict[str, Any], source: Path, config: Config, name: str) -> None:
    """The README.md of an hf folder: what the model is, its data, its loss, a story, and how to use it."""
    model = model_from_checkpoint(checkpoint, source, "cpu")
    tokenizer, sampling = tokenizer_from_json(checkpoint["tokenizer"], str(source)), config.sampling
    story = next(generate_stories(model, tokenizer, [sampling.prompts[0]], sampling, [sampling.seed]))
    entries = [entry for entry in read_metrics(source.parent / METRICS)
               if entry["type"] == "evaluation" and entry["step"] == checkpoint["iter_num"]]
    quality = "Its validation loss is not known."
    if checkpoint["best_val_loss"] < math.inf:
        quality = f"Validation loss: {checkpoint['best_val_loss']:.4f} nats per token"
        quality += f", {entries[-1]['bits_per_byte']:.4f} bits per byte." if entries else "."
    tiny = config.data.dataset.startswith("tinystories")
    data = {"sample": "synthetic stories", "tinystories": "[TinyStories](https://huggingface.co/datasets/roneneldan/"
            "TinyStories)", "tinystories-v2": "TinyStoriesV2"}.get(config.data.dataset, Path(config.data.dataset).name)
    (folder / "README.md").write_text(CARD.read_text(encoding="utf-8").format(
        name=name, parameters=count_parameters(model), data=data, layers=config.model.n_layers,
        width=config.model.d_model, heads=config.model.n_heads, context=config.model.max_seq_len,
        vocabulary=tokenizer.get_vocab_size(), quality=quality, prompt=sampling.prompts[0], separator="<|endoftext|>",
        seed=sampling.seed, temperature=sampling.temperature, licence=LICENCE if tiny else OTHER_LICENCE,
        story="\n".join(f"> {line}" for line in story.text.splitlines())), encoding="utf-8")


def compare(checkpoint: dict[str, Any], part: Path, config: Config, args: argparse.Namespace) -> None:
    """Read back what was written. Raises UserError if a tensor differs by more than the rounding of its dtype."""
    if args.format == "gguf":
        found = read_gguf(part, config.model)
    elif args.format == "hf":
        found = {name: (tensor, 0.0) for name, tensor in read_hf_folder(part)["model"].items()}
    else:
        tokenizer = tokenizer_from_json(checkpoint["tokenizer"], "the checkpoint")
        found = {name: (tensor, 0.0) for name, tensor in read_llama2c(part, config.model, tokenizer).items()}
    for name, tensor in checkpoint["model"].items():
        rounded = tensor.to(TORCH_DTYPES[args.dtype]) if args.format == "hf" else tensor
        stored, error = found[name]
        if stored.shape != rounded.shape or not ((stored - rounded.float()).abs() <= error).all():
            raise UserError(f"--out {args.out}: {name}, read back, is not what was written: it was removed; check this "
                            "disk")


def main(args: argparse.Namespace) -> None:
    source = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(source)
    config = config_from_dict(checkpoint["config"], str(source))
    checkpoint["model"] = {name: tensor.to(torch.float32) for name, tensor in checkpoint["model"].items()}
    part = args.out.with_name(f"{args.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        if args.format == "gguf":
            write_gguf(part, checkpoint, config.model, args.dtype, args.out.stem)
        else:
            part.mkdir()
        if args.format == "llama2c":
            write_llama2c(part, checkpoint, config.model)
        if args.format == "hf":
            write_hf_folder(part, checkpoint, config, args.dtype)
            write_card(part, checkpoint, source, config, args.out.name)
        compare(checkpoint, part, config, args)
        if args.out.is_dir():  # --force; files of others stay
            for file in part.iterdir():
                file.replace(args.out / file.name)
        else:
            part.replace(args.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
    files = [args.out] if args.out.is_file() else sorted(args.out.iterdir())
    print(f"{source}: step {checkpoint['iter_num']:,}\n{args.out}: {args.format}, {args.dtype}, "
          f"{format_bytes(sum(file.stat().st_size for file in files))}; "
          f"{counted(len(checkpoint['model']), 'tensor')} read back and compared")
    if args.format == "llama2c":
        print(f"note: run.c's RMSNorm has an epsilon of 1e-5, this model's is {config.model.rms_norm_eps:g}; and run.c "
              "puts a space before a prompt, with which no story began")


if __name__ == "__main__":
    run_script(main, arguments)
