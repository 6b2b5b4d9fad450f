"""Files written for other trainers: all unknown keys are named at once, with the keys to use instead."""

import pytest
import yaml
from conftest import REPO

from config import UserError, load_config

# the keys and values of a user's own file for Windows and an RTX 5090, as DESIGN.md's contract has them
OWN = """
model: {vocab_size: 10000, d_model: 448, n_layers: 7, n_heads: 7, d_ffn: 1344, max_seq_len: 512, dropout: 0.1,
  rope_percentage: 0.5, rope_base: 10000, rms_norm_eps: 1e-6, tie_embeddings: true, use_flash_attention: true}
training: {batch_size: 64, num_epochs: 5, gradient_accumulation_steps: 4, use_bf16: true,
  use_gradient_checkpointing: false, use_compile: false, eval_steps: 200, eval_samples: 1000,
  early_stopping_patience: 3, save_steps: 1000, logging_steps: 10, show_progress: true, use_wandb: false,
  output_dir: "./checkpoints"}
optimizer: {learning_rate: 0.0005, adam_beta1: 0.9, adam_beta2: 0.95, adam_epsilon: 0.00000001, weight_decay: 0.1,
  max_grad_norm: 1.0}
scheduler: {type: cosine, warmup_steps: 100, lr_decay_iters: 35000, min_lr: 0.00005}
data: {dataset: "tinystories", tokenizer_path: "./tokenizer/tinystories_10k", cache_dir: "./data/cache",
  max_seq_len: 512, check_quality: true, quality_sample_size: 10000, quality_strict: false}
hardware: {device: "cuda", num_gpus: 1}
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refused(tmp_path, text, *overrides):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_users_own_yaml_loads_as_it_is(tmp_path):
    config, given = load(tmp_path, OWN), yaml.safe_load(OWN)
    stored = config.to_dict()
    accepted = {("training", "use_wandb"), ("data", "max_seq_len")}  # read and checked, but not stored
    for section, keys in given.items():
        for key, value in keys.items():
            if (section, key) in accepted:
                assert key not in stored[section]
            else:
                assert stored[section][key] == (float(value) if key == "rms_norm_eps" else value), key
    assert config.training.logger is None and config.data.check_quality


def test_use_wandb_is_the_logger_wandb(tmp_path):
    assert load(tmp_path, OWN, "training.use_wandb=true").training.logger == "wandb"
    assert load(tmp_path, "training: {use_wandb: true, logger: wandb}").training.logger == "wandb"
    assert load(tmp_path, "training: {use_wandb: false, logger: tensorboard}").training.logger == "tensorboard"
    line = refused(tmp_path, "training: {use_wandb: true, logger: tensorboard}")
    assert "training.use_wandb is true, but training.logger is 'tensorboard'" in line
    assert "training.use_wandb: found 'yes please', expected true or false" in refused(
        tmp_path, "training: {use_wandb: yes please}")
    assert refused(tmp_path, "", "training.use_wandb=3").startswith("--set training.use_wandb=3: ")


def test_all_unknown_keys_are_named_at_once(tmp_path):
    line = refused(tmp_path, "model: {dim: 288, d_modle: 4}\ntraining: {frobnicate: 1}\nteacher: {a: 1}")
    assert line.startswith(f"{tmp_path / 'own.yaml'}: 4 unknown keys: ")
    for part in ("model.dim (use model.d_model)", "model.d_modle (did you mean d_model?)",
                 "training.frobnicate (there is no such key)", "teacher (there is no such key)", "TRAINING_GUIDE"):
        assert part in line


def test_an_unknown_override_is_named_with_the_file(tmp_path):
    line = refused(tmp_path, "model: {dim: 288}", "training.batch_sze=3")
    assert "own.yaml" in line and "--set training.batch_sze=3" in line and "batch_size" in line


@pytest.mark.parametrize(("key", "ours"), [
    ("model.dim", "model.d_model"), ("tokenizer.path", "data.tokenizer_path"),
    ("training.max_iters", "training.max_steps"),
    ("training.learning_rate", "optimizer.learning_rate"), ("training.min_lr", "scheduler.min_lr"),
    ("training.lr_decay_iters", "scheduler.lr_decay_iters"), ("training.beta1", "optimizer.adam_beta1"),
    ("optimizer.beta2", "optimizer.adam_beta2"), ("training.gradient_clip", "optimizer.max_grad_norm"),
    ("training.weight_decay", "optimizer.weight_decay"), ("training.compile", "training.use_compile"),
    ("training.dtype", "training.use_bf16"), ("model.block_size", "model.max_seq_len"),
    ("model.n_embd", "model.d_model"),
    ("model.n_layer", "model.n_layers"), ("model.n_head", "model.n_heads")])
def test_keys_of_other_trainers_are_answered_with_ours(tmp_path, key, ours):
    section, _, name = key.partition(".")
    assert f"{key}: unknown key in {section}; use {ours}" in refused(tmp_path, f"{section}: {{{name}: 1}}")
    load_config(REPO / "config" / "quickstart.yaml")  # ours is a key: the default config has it or may have it
    ours_section, _, ours_name = ours.partition(".")
    assert ours_name in load(tmp_path, "").to_dict()[ours_section]


def test_a_file_without_sections_is_answered_key_by_key(tmp_path):
    line = refused(tmp_path, "block_size: 256\nn_layer: 6\nlearning_rate: 1e-3\nbatch_size: 12\nbeta1: 0.9")
    for part in ("block_size (use model.max_seq_len)", "n_layer (use model.n_layers)",
                 "learning_rate (use optimizer.learning_rate)", "batch_size (use training.batch_size)",
                 "beta1 (use optimizer.adam_beta1)"):
        assert part in line
