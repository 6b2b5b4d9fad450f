"""The YAML files load, and any mistake in one is reported in one line."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError, add_config_arguments, config_from_dict, load_config
from model import Transformer, count_parameters

REPO = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((REPO / "config").glob("*.yaml"))
MAIN = REPO / "config" / "train_config_tinystories_33M_TOP10K.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_line(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("name", "millions"), [
    ("quickstart", 1.59), ("tinystories_cpu", 2.83), ("train_config_tinystories_33M_TOP10K", 22.75),
    ("train_config_tinystories_small_STANDARD", 64.32), ("tinystories_33M_constant", 22.75), ("speedrun", 22.75),
    ("stories260K", 0.26), ("stories15M", 8.86), ("stories42M", 30.43), ("stories110M", 92.63)])
def test_every_yaml_loads_and_has_the_size_its_note_says(name, millions):
    config = load_config(REPO / "config" / f"{name}.yaml")
    model = Transformer(config.model) if millions < 30 else None
    if model is not None:
        assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    note = (REPO / "config" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"{round(millions, 1)}" in note or f"{millions:.2f}" in note


def test_the_list_of_yaml_files_is_complete():
    assert {path.stem for path in CONFIGS} == {
        "quickstart", "tinystories_cpu", "train_config_tinystories_33M_TOP10K", "stories15M", "stories42M",
        "train_config_tinystories_small_STANDARD", "tinystories_33M_constant", "stories260K", "stories110M",
        "speedrun"}


def test_the_main_yaml_names_every_key_and_equals_the_defaults(tmp_path):
    """But for how a step of 131,072 tokens is divided: a YAML file that names one of the three keys needs no others."""
    import yaml
    named = yaml.safe_load(MAIN.read_text(encoding="utf-8"))
    config = load_config(MAIN).to_dict()
    assert {section: set(keys) for section, keys in named.items()} == {s: set(v) for s, v in config.items()}
    assert "max_seq_len" not in named["data"]  # only checked: one name for each thing
    numbers = ["training.batch_size=64", "training.gradient_accumulation_steps=4", "training.tokens_per_step=null"]
    defaults = load_config(write(tmp_path, ""))
    assert load_config(MAIN, numbers) == defaults
    assert load_config(MAIN).sequences_per_step == defaults.sequences_per_step


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "0.0005", "5.0e-4", "+5e-4", ".0005"])
def test_numbers_are_parsed_as_numbers(tmp_path, text):
    assert load_config(write(tmp_path, f"optimizer: {{learning_rate: {text}}}")).optimizer.learning_rate == 5e-4
    assert load_config(MAIN, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 5e-4


def test_the_users_sections_alone_are_enough(tmp_path):
    config = load_config(write(tmp_path, "model:\n  d_model: 448\n  n_kv_heads: null\nscheduler:\n"))
    assert config.model.kv_heads == 7 and config.model.max_seq_len == 512


@pytest.mark.parametrize(("text", "parts"), [
    ("model: {d_modle: 4}", ["model.d_modle", "unknown key", "did you mean d_model?"]),
    ("modle: {d_model: 4}", ["modle", "unknown section", "did you mean model?"]),
    ("model: {d_model: wide}", ["model.d_model", "'wide'", "a whole number"]),
    ("model: {d_model: true}", ["model.d_model", "true", "a whole number"]),
    ("model: {d_model: 448.5}", ["model.d_model", "448.5", "a whole number"]),
    ("model: {d_model: -448}", ["model.d_model", "-448", "at least 1"]),
    ("model: {dropout: 1.5}", ["model.dropout", "1.5", "at most 0.95"]),
    ("model: {d_model: 450}", ["model.d_model 450", "n_heads 7", "could be 455"]),
    ("model: {n_heads: 8, n_kv_heads: 3}", ["n_heads 8", "n_kv_heads 3", "1, 2, 4, 8"]),
    ("model: {rope_percentage: 0.3}", ["rope_percentage 0.3", "19", "odd"]),
    ("data: {max_seq_len: 256}", ["data.max_seq_len 256", "model.max_seq_len 512"]),
    ("scheduler: {min_lr: 1e-3}", ["scheduler.min_lr 0.001", "optimizer.learning_rate 0.0005"]),
    ("scheduler: {type: cosinus}", ["scheduler.type", "'cosinus'", "cosine, constant, linear"]),
    ("scheduler: {lr_decay_iters: 100}", ["lr_decay_iters 100", "warmup_steps 500"]),
    ("training: {use_compile: maybe}", ["training.use_compile", "'maybe'", "auto or true or false"]),
    ("training: {batch_size: .inf}", ["training.batch_size", "inf"]),
    ("optimizer: {muon_learning_rate: 1e-3}", ["optimizer.muon_learning_rate is 0.001", "optimizer.type is adamw"]),
    ("optimizer: {learning_rate: .nan}", ["optimizer.learning_rate", "nan"]),
    ("training: {batch_size: null}", ["training.batch_size", "nothing", "a whole number"]),
    ("sampling: {prompts: []}", ["sampling.prompts", "a list of texts"]),
    ("model: [1, 2]", ["model", "expected keys", "a list"]),
    ("- model", ["expected sections", "a list"]),
    ("model: {d_model: 4, d_model: 5}", ["line 1", "d_model", "twice"]),
    ("model:\n  d_model: [", ["line 2", "not valid YAML"]),
    ("model: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
])
def test_what_is_wrong_is_one_line_with_file_key_and_cure(tmp_path, text, parts):
    path = write(tmp_path, text)
    line = error_line(path)
    assert line.startswith(str(path))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(("override", "part"), [
    ("training.batch_sze=4", "batch_size"), ("training.batch_size=0", "at least 1"), ("batch_size=4", "section.key"),
    ("training.batch_size", "section.key"), ("training.batch_size=[", "not valid YAML"),
    ("hardware.device=gpu", "mps")])
def test_a_wrong_override_names_itself(override, part):
    line = error_line(MAIN, override)
    assert line.startswith(f"--set {override}") and part in line


@pytest.mark.parametrize(("overrides", "named", "part"), [
    (["model.d_model=450"], "--set model.d_model=450", "model.d_model 450 is not divisible"),
    (["model.n_heads=1000000000000"], "--set model.n_heads=1000000000000", "not divisible"),  # and quickly
    (["model.n_heads=5", "training.seed=1"], "--set model.n_heads=5", "model.n_heads 5"),
    (["scheduler.min_lr=1", "optimizer.learning_rate=5e-1"], "--set scheduler.min_lr=1, --set optimizer.learning_rate="
     "5e-1", "scheduler.min_lr 1"),
    (["model.d_model=154"], "--set model.d_model=154", "of a head of 22 dimensions"),
    (["training.tokens_per_step=4096", "optimizer.type=muon"], "--set training.tokens_per_step=4096", "is not"),
    (["model.max_seq_len=300", "data.max_seq_len=300", "training.tokens_per_step=1000"],
     "--set model.max_seq_len=300, --set training.tokens_per_step=1000", "64 sequences of model.max_seq_len 300: it"),
    (["model.max_seq_len=300", "data.max_seq_len=300", "training.tokens_per_step=19200"],
     "--set model.max_seq_len=300, --set training.tokens_per_step=19200", "* model.max_seq_len 300, 76800"),
    (["training.batch_size=auto", "training.gradient_accumulation_steps=null", "training.tokens_per_step=1000",
      "data.max_seq_len=300", "model.max_seq_len=300"], "--set training.tokens_per_step=1000, --set model.max_seq_len="
     "300", "not a multiple of 300, model.max_seq_len 300: it could be 1200"),
    (["training.batch_size=auto", "training.gradient_accumulation_steps=2", "training.tokens_per_step=4096"],
     "--set training.batch_size=auto, --set training.gradient_accumulation_steps=2", "with batch_size auto")])
def test_overrides_that_do_not_go_together_are_named_and_no_others(tmp_path, overrides, named, part):
    path = write(tmp_path, "")
    line = error_line(path, *overrides)
    assert line.startswith(f"{named} with {path}: ") and part in line


@pytest.mark.parametrize(("heads", "width", "share"), [
    (7, 64, 0.5), (4, 130, 0.5), (3, 97, 1.0), (6, 101, 0.3), (8, 4, 0.5), (5, 128, 0.05), (2, 77, 0.0)])
def test_the_width_that_is_suggested_is_not_refused_in_its_turn(heads, width, share):
    shape = [f"model.n_heads={heads}", f"model.rope_percentage={share}"]
    suggested = error_line(MAIN, *shape, f"model.d_model={width}").partition("d_model could be ")[2]
    assert load_config(MAIN, [*shape, f"model.d_model={suggested}"]).model.d_model == int(suggested) > width


def test_overrides_win_and_the_last_one_wins(tmp_path):
    config = load_config(MAIN, ["training.batch_size=8", "training.batch_size=16", "data.validation=null"])
    assert config.training.batch_size == 16 and config.data.validation is None


@pytest.mark.parametrize("default", ["config/quickstart.yaml", "docs/experiments/articles.yaml"])
def test_help_says_where_the_default_config_is(default):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, REPO / default)
    assert f"(default: {Path(default)})" in " ".join(parser.format_help().split())


def test_a_missing_file_names_the_nearest():
    assert "config/stories15M.yaml" in error_line(Path("stories15.yaml"))


def test_a_folder_is_no_missing_file_and_its_yaml_files_are_named(tmp_path):
    assert error_line(tmp_path) == f"--config {tmp_path}: a folder; name a YAML file in it, there is none yet"
    for name in ("tom.yml", "lily.yaml", "story.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    assert error_line(tmp_path).endswith(": a folder; name a YAML file in it: lily.yaml, tom.yml")
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text("", encoding="utf-8")
    assert len(error_line(tmp_path)) < 200 + len(str(tmp_path))


def test_a_config_comes_back_from_plain_values():
    config = load_config(MAIN, ["model.n_kv_heads=1"])
    assert config_from_dict(config.to_dict(), "checkpoint") == config


def test_importing_config_does_not_import_torch():
    code = "import config, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
