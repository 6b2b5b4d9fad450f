"""The full evaluation of a checkpoint: verdict, checklist, likelihood, and generated stories beside real ones."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from config import Config, UserError
from config.wording import counted
from data.token_files import TokenFile, has_english, prepare_tokens
from data.tokenizer import tokenizer_from_json
from device import choose_device, choose_precision
from evaluation.checklist import check_likelihood, check_run
from evaluation.comparison import compare, format_table, measure_passages
from evaluation.likelihood import describe_likelihood, measure_likelihood
from evaluation.references import Passage, choose_references, cut_reference, read_stories
from evaluation.text_metrics import has_words, learn
from evaluation.verdict import find_differences, give_verdict
from inference.generation import generate_stories
from inference.packed_weights import choose_compute, pack
from model import Transformer
from training.checkpoints import check_model, load_checkpoint, model_from_checkpoint
from training.metrics_file import METRICS, read_metrics

LEARN_FROM = 30_000  # training stories from which words and nouns are learned
CHOOSE_FROM = 20_000  # validation stories from which references are chosen


def evaluate_checkpoint(config: Config, checkpoint_path: Path, show: Callable[[str], object], data: str | None = None,
                        num_stories: int = 200) -> dict[str, Any]:
    """Evaluate a checkpoint from all sides; with `data`, only how likely the model finds that text.

    show: takes the result as text, the verdict first. Returns the result as plain values.
    """
    said: list[str] = []
    try:
        result = _evaluate(config, checkpoint_path, said.append, data, num_stories)
        if "verdict" in result:
            said.insert(0, result["verdict"]["line"])
        return result
    finally:  # what was measured before an error or Ctrl-C is not lost
        for part in said:
            show(part)


def _evaluate(config: Config, checkpoint_path: Path, show: Callable[[str], object], data: str | None,
              num_stories: int) -> dict[str, Any]:
    device, checkpoint = choose_device(config.hardware.device), load_checkpoint(checkpoint_path)
    check_model(checkpoint, checkpoint_path, config)
    model = model_from_checkpoint(checkpoint, checkpoint_path, device)
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"], str(checkpoint_path))
    validation = _validation_tokens(config, tokenizer, data)
    train_file = prepare_tokens(config.data, tokenizer, "train", config.training.show_progress) if not data else None
    precision, _ = choose_precision(device, config.training.use_bf16)
    likelihood = measure_likelihood(model, validation.tokens, tokenizer, config.model.max_seq_len,
                                    config.evaluation_batch, device, precision, config.training.show_progress)
    if likelihood["bytes"] != validation.counts["bytes"]:  # a foreign tokenizer that normalizes its input
        show(f"warning: {validation.path.name}: its tokens spell {likelihood['bytes']:,} bytes, the text has "
             f"{validation.counts['bytes']:,}: bits per byte are of the former")
    result = {"checkpoint": str(checkpoint_path), "step": checkpoint["iter_num"], "epoch": checkpoint["epoch"],
              "data": data or "validation", "likelihood": likelihood}
    if train_file:
        metrics = read_metrics(checkpoint_path.parent / METRICS)
        of_run = check_run(checkpoint, checkpoint_path, config, train_file, metrics) if checkpoint["iter_num"] else []
        checks = [*of_run,
                  *check_likelihood(likelihood, checkpoint["iter_num"], metrics, config.model.vocab_size,
                                     config.data.dataset)]
        result["checks"] = [check._asdict() for check in checks]
        show("\n".join(["", str(checkpoint_path), *map(str, checks)]))
    show("\n" + describe_likelihood(likelihood, data or "validation split", has_english(validation.counts)))
    if train_file and num_stories:
        compute, _ = choose_compute("auto", device)
        try:
            compared = compare_stories(pack(model, compute), tokenizer, config, train_file, validation, num_stories,
                                       show)
        except UserError as error:  # what was measured so far is not lost
            show(f"\nnote: stories were not compared: {error}")
            return result
        result |= compared
        stories = result["stories"]
        show(f"\n{counted(len(stories), 'story')}, compared with as many of the validation split that begin the same "
             f"way; the beginnings are not measured\n\n{format_table(result['table'])}")
        show("".join(f"\n{story['prompt']}{story['text']}\n" for story in stories[:3]).rstrip("\n"))
    return result


def _validation_tokens(config: Config, tokenizer: Tokenizer, data: str | None) -> TokenFile:
    """The token file of the validation split, or of the text `data`, which is not cleaned, so that its bytes are the
    same for every model."""
    if not data:
        return prepare_tokens(config.data, tokenizer, "validation", config.training.show_progress)
    source = dataclasses.replace(config.data, dataset="sample", validation=data, clean=False,
                                 cache_dir=str(Path(config.data.cache_dir) / "evaluate"))
    try:
        return prepare_tokens(source, tokenizer, "validation", config.training.show_progress)
    except UserError as error:
        raise UserError(str(error).replace("data.validation", "--data", 1)) from None


def compare_stories(model: Transformer, tokenizer: Tokenizer, config: Config, train_file: TokenFile,
                    validation: TokenFile, num_stories: int, show: Callable[[str], object]) -> dict[str, Any]:
    """Generate num_stories stories, or as many as there are references, and compare them with those references.

    Raises UserError if the text has no words or no references.
    """
    real = list(read_stories(validation, tokenizer, CHOOSE_FROM))
    if not has_words(real[:1000]):
        raise UserError("the text has no spaces between its words, which the comparison counts")
    pairs = choose_references(real, config.sampling.prompts, num_stories)
    if not pairs:
        raise UserError(f"none of the {counted(len(real), 'validation story')} is long enough to be a reference")
    if len(pairs) < num_stories:
        show(f"\nnote: {counted(len(pairs), 'story')}, not {num_stories:,}: each is compared with a real story of the "
             f"same beginning, and {len(real):,} validation stories have no more of these beginnings")
    references = [cut_reference(prompt, story, tokenizer, config.sampling.max_new_tokens) for prompt, story in pairs]
    passages = generate_passages(model, tokenizer, config, [prompt for prompt, _ in pairs])
    learned = learn(read_stories(train_file, tokenizer, LEARN_FROM))
    measured, expected = (measure_passages(side, learned, tokenizer, train_file.tokens, config.training.show_progress)
                          for side in (passages, references))
    described = [[{**passage._asdict(), **{key: list(value) for key, value in figures.items()}}
                  for passage, figures in zip(side, of_side, strict=True)]
                 for side, of_side in ((passages, measured), (references, expected))]
    english = has_english(validation.counts)
    findings = find_differences(measured, expected, english)
    measures = {key: found._asdict() for key, found in findings.items()}
    return {"verdict": {**give_verdict(findings, len(pairs)), "measures": measures},
            "table": compare(passages, references, measured, expected, findings, english),
            "stories": described[0], "references": described[1]}


def generate_passages(model: Transformer, tokenizer: Tokenizer, config: Config, prompts: Sequence[str],
                      ) -> list[Passage]:
    """A story for each prompt, each with a seed of its own, without the prompt."""
    seeds = [config.sampling.seed + place for place in range(len(prompts))]
    stories = tqdm(generate_stories(model, tokenizer, prompts, config.sampling, seeds), total=len(prompts),
                   desc="stories", unit="story", leave=False, disable=None if config.training.show_progress else True)
    return [Passage(prompt, story.text[len(prompt):], story.ended)
            for prompt, story in zip(prompts, sorted(stories), strict=True)]
