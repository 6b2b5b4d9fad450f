"""What only a CUDA GPU can show; skipped without one. The rest of the suite runs on the CPU on any machine."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY

import train
from config import load_config
from config.schema import ModelConfig, SamplingConfig
from device import choose_precision
from inference.engine import Engine, generate_tokens
from inference.packed_weights import pack
from model import Transformer
from training.checkpoints import LATEST
from training.optimizer import make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
CUDA = torch.device("cuda")
PROMPTS = [[0], [0, 5, 9], [0, 5, 9], [0, *range(20, 35)], [0, 3], [0, 3, 8, 1]]
SETTINGS = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0},
            {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}]


def on_gpu(*overrides):
    return load_config(REPO / "config" / "quickstart.yaml", [
        *TINY, "hardware.device=cuda", "training.use_bf16=true", "model.d_model=64", *overrides])


@pytest.mark.parametrize("overrides", [[], ["optimizer.type=muon"], ["model.mask_stories=true"]])
def test_a_step_does_not_wait_for_the_gpu(overrides, tokenizer):
    config = on_gpu("model.vocab_size=1500", *overrides)
    model = Transformer(config.model).to(CUDA)
    tokens = torch.randint(0, 1500, (20_000,)).numpy().astype("uint16")
    run = train.Run(config, tokenizer, model, make_optimizer(model, config), CUDA,
                    train.TokenFile(None, tokens, {}, ""), precision=choose_precision(CUDA, True)[0])
    train.train_step(run, model, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train.train_step(run, model, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    train.read_losses(run)
    assert len(run.unlogged) == 4 and all(loss < 10 for _, loss, _ in run.unlogged)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_stories_are_those_of_eager_steps_and_of_the_cpu(settings, compiled):
    """In float32, with rows that end, that outgrow the context, and that wait for a free row."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=300, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=128,
                                    max_seq_len=128)).eval()
    sampling = SamplingConfig(**{"temperature": 0.8, "max_new_tokens": 150, **settings})

    def stories(device, graphs=True):
        packed = pack(model.to(device), "float32")
        engine = Engine(packed, 0, 100, 4, compiled=compiled and graphs)
        engine.captured = engine.captured if graphs else None
        looks = generate_tokens(packed, PROMPTS, range(6), 0, 100, sampling, engine=engine)
        return {row.index: row.new for running in looks for row in running}

    torch.backends.cuda.matmul.allow_tf32 = False
    eager, replayed, here = stories(CUDA, graphs=False), stories(CUDA), stories(torch.device("cpu"))
    assert eager == replayed and sum(eager[i] == here[i] for i in here) >= 5  # kernels round in their own ways


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """In bf16, with batch_size auto, evaluations and their stories."""
    monkeypatch.chdir(tmp_path)
    text = "Tom had a red ball. He was happy.\n<|endoftext|>\n" * 30
    (tmp_path / "validation.txt").write_text(text, encoding="utf-8")

    def losses(folder, *stops):
        for steps in stops:
            config = on_gpu("training.batch_size=auto", "training.gradient_accumulation_steps=null",
                            "training.tokens_per_step=512", f"training.max_steps={steps}", "training.eval_steps=4",
                            "scheduler.lr_decay_iters=12", f"training.output_dir={folder}")
            latest = tmp_path / folder / LATEST
            assert train.start_run(config, None, latest if latest.exists() else None) == 0
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return {entry["step"]: entry["loss"] for entry in lines if entry["type"] == "step"}

    whole, parts = losses("whole", 12), losses("parts", 6, 12)
    assert whole.keys() == parts.keys()
    assert all(parts[step] == pytest.approx(whole[step], rel=5e-3) for step in whole)
    for command in (["generate.py", "--num_samples", "40", "--checkpoint", "whole/best_model.pth"],
                    ["evaluate.py", "--checkpoint", "whole/best_model.pth", "--num_stories", "8"]):
        done = subprocess.run([sys.executable, str(REPO / command[0]), *command[1:]], capture_output=True,
                              encoding="utf-8", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
