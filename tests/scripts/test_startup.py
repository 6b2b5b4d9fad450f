"""A mistake in the command line or the YAML is reported before torch is loaded, which takes seconds; so is --help."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO
from packaging.requirements import Requirement

SCRIPTS = ("train.py", "generate.py", "evaluate.py", "serve.py", "train_custom_tokenizer.py")
HEAVY = {"torch", "tokenizers", "datasets", "transformers", "matplotlib", "numpy", "tqdm", "fastapi", "model"}
# runs a script as `python script.py ...` does; when that exits, the heavy modules it loaded are the last line of stderr
RUN = f"""
import atexit, runpy, sys
atexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(REPO)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path, script, *arguments):
    return subprocess.run([sys.executable, "-c", RUN, str(REPO / script), *arguments], cwd=tmp_path,
                          capture_output=True, encoding="utf-8")


def test_the_build_of_torch_that_a_user_installed_first_is_kept():
    """pip would replace it by PyPI's, which on Windows has no CUDA."""
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    torch, = (Requirement(line) for line in lines if line.startswith("torch"))
    assert all(torch.specifier.contains(build) for build in ("2.11.0+cu130", "2.14.1+cu130", "2.99.0+cu150"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(tmp_path, script):
    done = run(tmp_path, script, "--help")
    assert done.returncode == 0 and "--" in done.stdout and done.stderr == "[]\n"


BAD = [(script, arguments, part) for script in SCRIPTS for arguments, part in (
    (["--no_such_flag"], "--no_such_flag"),
    (["--set", "training.batch_sze=4"], "batch_size" if script not in ("generate.py", "serve.py") else "--set"))]
BAD += [(script, arguments, part) for script in ("train.py", "train_custom_tokenizer.py") for arguments, part in (
    (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"), (["--config", "bad.yaml"], "bad.yaml, line"),
    (["--config", "unknown.yaml"], "did you mean d_model?"), (["--set", "training.batch_size"], "section.key"))]
BAD += [("train.py", ["--resume", "--checkpoint", "x"], "--resume"),
        ("train.py", ["--checkpoint", "x.pth", "--set", "model.d_modl=1"], "did you mean d_model?"),
        ("generate.py", ["--temperature", "hot"], "error: --temperature hot: "),
        ("generate.py", ["--device", "tpu"], "--device")]
BAD += [(script, [flag, text], f"{flag}: found {text!r}, expected a whole number, at least {least}")
        for script, flag, least in (
            ("train.py", "--num_epochs", 1), ("train_custom_tokenizer.py", "--max_samples", 1),
            ("generate.py", "--num_samples", 1), ("evaluate.py", "--num_stories", 0))
        for text in ("x", str(least - 1))]


@pytest.mark.parametrize(("script", "arguments", "part"), BAD)
def test_a_mistake_is_one_line_and_loads_nothing_heavy(tmp_path, script, arguments, part):
    (tmp_path / "bad.yaml").write_text("model:\n  d_model: [\n", encoding="utf-8")
    (tmp_path / "unknown.yaml").write_text("model:\n  d_modl: 64\n", encoding="utf-8")
    done = run(tmp_path, script, *arguments)
    line, loaded = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and part in line and loaded == "[]"


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent signals there")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_the_script_is_importing_ends_it_in_one_line(tmp_path, script, number, status):
    """The import that the signal comes into is one that turns every exception into an ImportError, as some do."""
    name = "tokenizers" if script == "train_custom_tokenizer.py" else "torch"
    slow = tmp_path / "slow" / f"{name}.py"
    slow.parent.mkdir()
    slow.write_text(f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    for _ in range(10**9): pass\n"
                    "except BaseException:\n    raise ImportError('half loaded')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(REPO / script)], cwd=tmp_path, capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONPATH": str(slow.parent)})
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "\nstopped\n")


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent signals there")
def test_a_second_ctrl_c_while_python_leaves_is_no_second_message(tmp_path):
    """It comes into something that is thrown away last, as a file lock is."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
from config import run_script

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass

def main():
    late = Late()
    raise KeyboardInterrupt

run_script(lambda nothing: main(), None)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8",
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    # Python 3.12 and later throw it away when signals are the system's again: killed by SIGINT, which a shell calls 130
    assert done.returncode in (130, -signal.SIGINT) and (done.stdout, done.stderr) == ("", "\nstopped\n")


@pytest.mark.parametrize(("given", "short", "long"), [
    ({}, "1000", "30000"), ({"GOMP_SPINCOUNT": "5"}, "5", "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None", "None")])
def test_waiting_threads_yield_unless_the_user_set_otherwise(given, short, long):
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = ("import os; from config.command_line import parse_before_imports; parse_before_imports(list); "
            "print(os.environ.get('GOMP_SPINCOUNT'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env={**plain, **given}, capture_output=True,
                          encoding="utf-8", check=True)
    assert done.stdout == short + "\n"
    spinning = subprocess.run([sys.executable, "-c", code.replace("(list)", "(list, spin=True)")], cwd=REPO,
                              env={**plain, **given}, capture_output=True, encoding="utf-8", check=True)
    assert spinning.stdout == long + "\n"
