"""The schema of the YAML files: one frozen dataclass a section, load_config(), and every check.

The field types below are the rules: load_config() reads them, so a key is declared once. `null` in the YAML stands for
"work it out" and is allowed only where the type says `| None`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from config.cli import REPO, UserError
from config.combinations import check_combinations
from config.values import Bounds, build_section, one_line, parse_yaml, show, unknown

Positive = Annotated[int, Bounds(1)]
Count = Annotated[int, Bounds(0)]
PositiveReal = Annotated[float, Bounds(0, above=True)]
NonNegativeReal = Annotated[float, Bounds(0)]
Beta = Annotated[float, Bounds(0, 0.999999)]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape. The defaults are the main model: 22.75M parameters."""

    vocab_size: Annotated[int, Bounds(259, 1_000_000)] = 10_000  # 256 bytes and three special tokens at the least
    d_model: Positive = 448
    n_layers: Positive = 7
    n_heads: Positive = 7
    n_kv_heads: Positive | None = None  # null: as many as n_heads (no grouped-query attention)
    d_ffn: Positive = 1344
    max_seq_len: Positive = 512
    dropout: Annotated[float, Bounds(0, 0.95)] = 0.1  # on the embedding and the residual branches
    rope_percentage: Annotated[float, Bounds(0, 1)] = 0.5  # the share of each head's dimensions that is rotated
    rope_base: PositiveReal = 10_000.0
    rms_norm_eps: PositiveReal = 1e-6
    tie_embeddings: bool = True
    use_flash_attention: bool = True  # false: the plain softmax(QK^T)V, for comparison
    mask_stories: bool = False  # true: no attention from one story to another

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
    """The loop. One step is batch_size * gradient_accumulation_steps windows of max_seq_len tokens: tokens_per_step."""

    batch_size: Positive | Literal["auto"] = 64  # windows of a micro-batch; auto: found out, from tokens_per_step
    gradient_accumulation_steps: Positive | None = 4  # null: what tokens_per_step needs
    tokens_per_step: Positive | None = None  # null: what the two above make
    num_epochs: Positive = 5
    max_steps: Positive | None = None  # null: as many as num_epochs needs; else stop there
    use_bf16: bool = True  # where the device is faster with it; float32 elsewhere
    use_gradient_checkpointing: bool = False
    use_compile: Literal["auto"] | bool = "auto"
    eval_steps: Positive = 1000
    eval_samples: Count = 0  # validation windows per evaluation, evenly spread; 0 = all
    early_stopping_patience: Positive | None = None  # evaluations without a better loss; null: never stop early
    save_steps: Positive = 500
    keep_checkpoints: Count = 5  # so many checkpoint_epoch_N.pth, the newest, stay on the disk
    logging_steps: Positive = 10
    loss_spike: PositiveReal | None = 5.0  # report a gradient norm so many times its running median; null: never
    logger: Literal["tensorboard", "wandb"] | None = None  # told what metrics.jsonl is, where it is installed
    show_progress: bool = True
    output_dir: str = "./checkpoints"
    seed: Count = 42


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019); weight decay acts on matrices only."""

    type: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices (Jordan et al., 2024), AdamW for the rest
    learning_rate: PositiveReal = 5e-4
    muon_learning_rate: PositiveReal | None = None  # of Muon's matrices; null: learning_rate
    adam_beta1: Beta = 0.9  # and the momentum of Muon
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
    """Where stories come from (see data/stories.py) and where their token files go."""

    dataset: str = "tinystories"  # tinystories, sample, a hub id, a file, a folder or a glob
    validation: str | None = None  # null: the data set's own split, or else a held-out share of the stories
    validation_fraction: Annotated[float, Bounds(0, 0.5, above=True)] = 0.01  # that share
    text_column: str | None = None  # null: text or story
    max_stories: Positive | None = None  # train on the first so many; null: all (sample: 20,000)
    clean: bool = True
    tokenizer_path: str = "./tokenizer/tinystories_10k"
    cache_dir: str = "./data/cache"
    max_seq_len: Positive | None = None  # null: model.max_seq_len, which it must equal


@dataclass(frozen=True)
class TokenizerConfig:
    """How data.tokenizer_path is trained when it is not there; its size is model.vocab_size."""

    max_samples: Positive = 100_000  # stories to learn the merges from
    min_frequency: Positive = 2  # a pair seen less often is never merged


@dataclass(frozen=True)
class SamplingConfig:
    """The sample stories that training shows, and the defaults of generate.py."""

    prompts: tuple[str, ...] = ("Once upon a time there was", "One day, a little girl named Lily", "Tom and his dog")
    temperature: NonNegativeReal = 0.8  # 0: always the likeliest token
    top_k: Count = 0  # draw from the k likeliest tokens; 0: from all
    top_p: Annotated[float, Bounds(0, 1, above=True)] = 0.95  # draw from the likeliest tokens that make up this share
    min_p: Annotated[float, Bounds(0, 1)] = 0.0  # draw from tokens at least this share as likely as the likeliest
    repetition_penalty: PositiveReal = 1.0  # above 1: tokens that are there already become less likely
    max_new_tokens: Positive = 400
    seed: Count = 42


@dataclass(frozen=True)
class HardwareConfig:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


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
    def step_windows(self) -> int:
        """Of one optimizer step, on all ranks together."""
        training = self.training
        if training.batch_size == "auto":
            return training.tokens_per_step // self.model.max_seq_len
        return training.batch_size * training.gradient_accumulation_steps

    @property
    def evaluation_batch(self) -> int:
        """Windows of a batch without gradients."""
        size = self.training.batch_size
        return max(1, 8192 // self.model.max_seq_len) if size == "auto" else size

    def with_batch_size(self, batch_size: int) -> Config:
        """The same step in micro-batches of so many windows."""
        training = dataclasses.replace(self.training, batch_size=batch_size,
                                       gradient_accumulation_steps=self.step_windows // batch_size)
        return dataclasses.replace(self, training=training)

    def keep_batch_size(self, before: Config, processes: int) -> Config:
        """With batch_size auto and the same step, the numbers found before, so that dropout stays the same.

        Not if the micro-batches do not go round to the processes: then a size is found anew.
        """
        same = self.training.batch_size == "auto" and self.step_windows == before.step_windows
        keeps = same and before.training.gradient_accumulation_steps % processes == 0
        return self.with_batch_size(before.training.batch_size) if keeps else self

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values only, as a checkpoint stores them; config_from_dict() is the way back."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything.

    Raises UserError, one line: the file, the key path, what was found, what is allowed, the nearest known name.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        raise UserError(f"--config {path}: a folder; name a YAML file in it"
                        + (f": {one_line(', '.join(files))}" if files else ", there is none yet"))
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in (REPO / "config").glob("*.yaml")], 1, 0.5)
        raise UserError(f"--config {path}: no such file" + (f"; did you mean config/{near[0]}.yaml?" if near else ""))
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start}); a YAML file is expected") from None
    return config_from_dict({} if values is None else values, str(path), overrides)


def config_from_dict(values: Any, source: str, overrides: Sequence[str] = ()) -> Config:
    """Check nested plain values, as a YAML file or a checkpoint holds them. `source` names them in errors."""
    config, origins = _build(values, source, overrides)
    check_combinations(config, source, origins)
    training, window = config.training, config.model.max_seq_len
    if training.gradient_accumulation_steps is None and training.batch_size != "auto":
        accumulation = training.tokens_per_step // (training.batch_size * window)
        training = dataclasses.replace(training, gradient_accumulation_steps=accumulation)
        config = dataclasses.replace(config, training=training)
    if config.data.max_seq_len is None:
        data = dataclasses.replace(config.data, max_seq_len=config.model.max_seq_len)
        config = dataclasses.replace(config, data=data)
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError if one is wrong in itself, whatever config it may be applied to."""
    _build({}, "", overrides)


def _build(values: Any, source: str, overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """The config, each value checked by itself, and by key path the override that a value came from."""
    sections = {field.name: field.default for field in dataclasses.fields(Config)}
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections ({', '.join(sections)}), found {show(values)}")
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
    origins = {}
    for override in overrides:
        _apply_override(values, override, origins)
    built = {}
    for name, section_values in values.items():
        if name not in sections:
            raise UserError(f"{origins.get(name, source)}: {unknown(name, sections, 'section')}")
        built[name] = build_section(type(sections[name]), name, section_values, source, origins)
    return Config(**built), origins


def change_settings(sampling: SamplingConfig, texts: dict[str, str], origin: str) -> SamplingConfig:
    """Replace some settings by what their texts say; an error begins with `origin`, filled with name and text."""
    origins = {name: origin.format(name, text) for name, text in texts.items()}
    values = {name: parse_yaml(text, origins[name]) for name, text in texts.items()}
    return build_section(SamplingConfig, "sampling", {**dataclasses.asdict(sampling), **values}, "",
                         {f"sampling.{name}": where for name, where in origins.items()})


def _apply_override(values: dict, override: str, origins: dict[str, str]) -> None:
    key_path, equals, text = override.partition("=")
    section, dot, key = key_path.strip().partition(".")
    name = f"--set {one_line(override)}"
    if not (equals and dot and section and key):
        raise UserError(f"{name}: expected section.key=value, such as training.batch_size=32")
    value = parse_yaml(text, name)
    target = values.get(section)
    if target is None:
        target = values[section] = {}
        origins[section] = name
    if isinstance(target, dict):  # if it is not, building the section says what is wrong with it
        target[key] = value
        origins[f"{section}.{key}"] = name
