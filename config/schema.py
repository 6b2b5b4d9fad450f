"""The schema of the YAML files: one frozen dataclass for each section, and load_config(), which checks a file.

A field's type is its check, so each key is declared once. `null` in the YAML means "work it out"; it is allowed only
where the type has `| None`. docs/TRAINING_GUIDE.md has a table of all keys, which a test compares with this file.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from config.combinations import check_combinations
from config.errors import UserError
from config.unknown_keys import accept_use_wandb, check_names, suggest
from config.values import Bounds, build_section, parse_yaml
from config.wording import one_line, show

Positive = Annotated[int, Bounds(1)]
Count = Annotated[int, Bounds(0)]
PositiveReal = Annotated[float, Bounds(0, above=True)]
NonNegativeReal = Annotated[float, Bounds(0)]
Beta = Annotated[float, Bounds(0, 0.999999)]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape. The defaults are the main model: 22.75M parameters."""

    vocab_size: Annotated[int, Bounds(259, 1_000_000)] = 10_000  # at least 256 bytes and three special tokens
    d_model: Positive = 448
    n_layers: Positive = 7
    n_heads: Positive = 7
    n_kv_heads: Positive | None = None  # null: as many as n_heads (no grouped-query attention)
    d_ffn: Positive = 1344
    max_seq_len: Positive = 512
    dropout: Annotated[float, Bounds(0, 0.95)] = 0.1  # on the embedding and the residual branches
    rope_percentage: Annotated[float, Bounds(0, 1)] = 0.5  # fraction of each head's dimensions that is rotated
    rope_base: PositiveReal = 10_000.0
    rms_norm_eps: PositiveReal = 1e-6
    tie_embeddings: bool = True
    use_flash_attention: bool = True  # false: softmax(QK^T)V written out, for comparison
    mask_stories: bool = False  # true: no attention across stories of a sequence

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        return round(self.head_dim * self.rope_percentage)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop. A step is batch_size * gradient_accumulation_steps sequences of max_seq_len tokens."""

    batch_size: Positive | Literal["auto"] = 64  # sequences in a micro-batch; auto: the most that fit
    gradient_accumulation_steps: Positive | None = 4  # null: what tokens_per_step needs
    tokens_per_step: Positive | None = None  # null: as the two keys above give
    num_epochs: Positive = 5
    max_steps: Positive | None = None  # null: as many as num_epochs needs
    use_bf16: bool = True  # where bf16 is faster on the device; else float32
    use_gradient_checkpointing: bool = False
    use_compile: Literal["auto"] | bool = "auto"
    eval_steps: Positive = 1000
    eval_samples: Count = 0  # validation sequences per evaluation, spread evenly; 0: all
    early_stopping_patience: Positive | None = None  # evaluations without a better loss; null: off
    save_steps: Positive = 500
    keep_checkpoints: Count = 5  # how many checkpoint_epoch_N.pth to keep, the newest ones
    logging_steps: Positive = 10
    loss_spike: PositiveReal | None = 5.0  # report gradient norms this many times their running median; null: off
    logger: Literal["tensorboard", "wandb"] | None = None  # logs beside metrics.jsonl, if installed
    show_progress: bool = True
    output_dir: str = "./checkpoints"
    seed: Count = 42


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019); weight decay acts on matrices only."""

    type: Literal["adamw", "muon"] = "adamw"  # muon (Jordan et al., 2024): for the layers' matrices
    learning_rate: PositiveReal = 5e-4
    muon_learning_rate: PositiveReal | None = None  # null: learning_rate
    adam_beta1: Beta = 0.9  # also the momentum of Muon
    adam_beta2: Beta = 0.95
    adam_epsilon: PositiveReal = 1e-8
    weight_decay: NonNegativeReal = 0.1
    max_grad_norm: PositiveReal = 1.0


@dataclass(frozen=True)
class SchedulerConfig:
    """Linear warm-up from 0, then `type` down to min_lr over lr_decay_iters steps (null: the real number of steps)."""

    type: Literal["cosine", "constant", "linear"] = "cosine"
    warmup_steps: Count = 500
    lr_decay_iters: Positive | None = None
    min_lr: NonNegativeReal = 5e-5


@dataclass(frozen=True)
class DataConfig:
    """Where stories come from (data/stories.py) and where their token files go (data/token_files.py)."""

    dataset: str = "tinystories"  # tinystories, tinystories-v2, sample, a hub id, a file, a folder or a glob
    validation: str | None = None  # null: the data set's own split, or else a held-out fraction
    validation_fraction: Annotated[float, Bounds(0, 0.5, above=True)] = 0.01  # that fraction
    separator: str = "<|endoftext|>"  # what separates the stories of a .txt file, such as a newline
    text_column: str | None = None  # null: text or story
    template: str | None = None  # makes a text of several fields, such as "Q: {question}\nA: {answer}"
    max_stories: Positive | None = None  # train on only the first of them; null: all (sample: 20,000)
    clean: bool = True  # repair encodings, leave out texts that are empty, cut off or damaged
    deduplicate: bool = False  # leave out exact duplicates and, from training, what is in validation
    check_quality: bool = False  # look at stories before training and print what is wrong with them
    quality_sample_size: Count = 10_000  # how many stories are searched for faults; 0: all
    quality_strict: bool = False  # end the run if check_quality finds a fault
    tokenizer_path: str = "./tokenizer/tinystories_10k"
    cache_dir: str = "./data/cache"
    max_seq_len: Positive | None = None  # only checked: must equal model.max_seq_len


@dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained when data.tokenizer_path has none; its size is model.vocab_size."""

    max_samples: Positive = 100_000  # stories to train on
    min_frequency: Positive = 2  # pairs that occur less often are not merged


@dataclass(frozen=True)
class SamplingConfig:
    """The sample stories at each evaluation, and the defaults of generate.py."""

    prompts: tuple[str, ...] = ("Once upon a time there was", "One day, a little girl named Lily", "Tom and his dog")
    temperature: NonNegativeReal = 0.8  # 0: always the most likely token
    top_k: Count = 0  # sample from the k most likely tokens; 0: from all
    top_p: Annotated[float, Bounds(0, 1, above=True)] = 0.95  # sample from the most likely tokens with this total
    min_p: Annotated[float, Bounds(0, 1)] = 0.0  # drop tokens below this fraction of the top probability
    repetition_penalty: PositiveReal = 1.0  # above 1: makes tokens that occurred before less likely
    max_new_tokens: Positive = 400
    seed: Count = 42


SAMPLING_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingConfig) if field.name != "prompts")


@dataclass(frozen=True)
class HardwareConfig:
    """Where to run."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    num_gpus: Positive | None = None  # only checked: how many processes torchrun should have started


@dataclass(frozen=True)
class Config:
    """A whole YAML file, checked."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    hardware: HardwareConfig = HardwareConfig()

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step, over all processes."""
        training = self.training
        if training.batch_size == "auto":
            return training.tokens_per_step // self.model.max_seq_len
        return training.batch_size * training.gradient_accumulation_steps

    @property
    def evaluation_batch(self) -> int:
        """Sequences in a batch of an evaluation."""
        size = self.training.batch_size
        return max(1, 8192 // self.model.max_seq_len) if size == "auto" else size

    def with_batch_size(self, batch_size: int) -> "Config":
        """The same step in micro-batches of `batch_size` sequences."""
        training = dataclasses.replace(self.training, batch_size=batch_size,
                                       gradient_accumulation_steps=self.sequences_per_step // batch_size)
        return dataclasses.replace(self, training=training)

    def keep_batch_size(self, before: "Config", processes: int) -> "Config":
        """With batch_size auto, reuse the size that `before` found for the same step, so that dropout stays the same.

        If the micro-batches cannot be divided among the processes, the size is left to be found again.
        """
        same = self.training.batch_size == "auto" and self.sequences_per_step == before.sequences_per_step
        keeps = same and before.training.gradient_accumulation_steps % processes == 0
        return self.with_batch_size(before.training.batch_size) if keeps else self

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values, as a checkpoint stores them; config_from_dict() is the inverse."""
        values = dataclasses.asdict(self)
        del values["data"]["max_seq_len"]  # it says nothing that model.max_seq_len does not
        return values


SECTIONS = {section.name: [key.name for key in dataclasses.fields(section.default)]
            for section in dataclasses.fields(Config)}


def load_config(path: str | Path, overrides: Sequence[str] = (), model: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    model: values for keys of the model section that the file leaves out, instead of the defaults.
    Raises UserError, one line: the file, the key path, what was found, what is allowed, the nearest known name.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        raise UserError(f"--config {path}: a folder; name a YAML file in it"
                        + (f": {one_line(', '.join(files))}" if files else ", there is none yet"))
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in Path(__file__).parent.glob("*.yaml")], 1, 0.5)
        raise UserError(f"--config {path}: no such file" + (f"; did you mean config/{near[0]}.yaml?" if near else ""))
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start}); a YAML file is expected") from None
    values = {} if values is None else values
    if model and isinstance(values, dict) and isinstance(values.get("model") or {}, dict):
        values["model"] = {**model, **(values.get("model") or {})}
    return config_from_dict(values, str(path), overrides)


def config_from_dict(values: Any, source: str, overrides: Sequence[str] = ()) -> Config:
    """Build a Config from plain values, as a YAML file or a checkpoint holds them. `source` names them in errors."""
    config, origins = _build(values, source, overrides)
    check_combinations(config, source, origins)
    training = config.training
    if training.gradient_accumulation_steps is None and training.batch_size != "auto":
        accumulation = training.tokens_per_step // (training.batch_size * config.model.max_seq_len)
        training = dataclasses.replace(training, gradient_accumulation_steps=accumulation)
        config = dataclasses.replace(config, training=training)
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for an override that is wrong whatever config it is applied to."""
    _build({}, "", overrides)


def _build(values: Any, source: str, overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """The config, with each value checked by itself, and for each overridden key path its --set."""
    sections = {field.name: field.default for field in dataclasses.fields(Config)}
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections ({', '.join(sections)}), found {show(values)}")
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
    origins = {}
    for override in overrides:
        _apply_override(values, override, origins)
    accept_use_wandb(values.get("training"), source, origins)
    check_names(values, SECTIONS, source, origins)
    return Config(**{name: build_section(type(sections[name]), name, section, source, origins)
                     for name, section in values.items()}), origins


def change_settings(sampling: SamplingConfig, texts: dict[str, str], origin: str) -> SamplingConfig:
    """Parse texts and replace those settings; an error begins with `origin`, formatted with the name and the text."""
    origins = {name: origin.format(name, text) for name, text in texts.items()}
    values = {name: parse_yaml(text, origins[name]) for name, text in texts.items()}
    settings, origins = dataclasses.asdict(sampling), {f"sampling.{name}": where for name, where in origins.items()}
    check_names({"sampling": values}, {"sampling": list(settings)}, "", origins)
    return build_section(SamplingConfig, "sampling", {**settings, **values}, "", origins)


def _apply_override(values: dict, override: str, origins: dict[str, str]) -> None:
    key_path, equals, text = override.partition("=")
    section, dot, key = key_path.strip().partition(".")
    name = f"--set {one_line(override)}"
    if not (equals and dot and section and key):
        advice = suggest("", section, SECTIONS) if equals and section not in SECTIONS else ""
        raise UserError(f"{name}: expected section.key=value, "
                        + (advice.replace("use", "did you mean") + "?" if advice.startswith("use ") else
                           "such as training.batch_size=32"))
    value = parse_yaml(text, name)
    target = values.get(section)
    if target is None:
        target = values[section] = {}
        origins[section] = name
    if isinstance(target, dict):  # if it is not, building the section says what is wrong with it
        target[key] = value
        origins[f"{section}.{key}"] = name
