"""How long the scripts take to answer, and to the first training step of a cached run.

    python tests/benchmarks/startup.py --repeats 5
    python tests/benchmarks/startup.py --train --config config/tinystories_cpu.yaml --set data.dataset=my.txt

Each measurement is a process of its own, after one that fills the caches and does not count. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
ANSWERS = {  # what is asked: the arguments of Python
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
    **{f"{script} --help": [script, "--help"] for script in ("train.py", "generate.py", "evaluate.py",
                                                             "train_custom_tokenizer.py")},
    "train.py, unknown key": ["train.py", "--set", "training.batch_sze=4"],
    "train.py, no such YAML": ["train.py", "--config", "nowhere.yaml"],
}
STAGES = ("tokenizer:", "tokens:", "plan:", "step 1 ")  # how the lines begin that end a stage


def seconds_to_stages(arguments: list[str]) -> dict[str, float]:
    """Seconds from the start of train.py to the first line that begins with each of STAGES."""
    start, seconds = time.perf_counter(), {}
    with subprocess.Popen([sys.executable, "-u", "train.py", *arguments], cwd=REPO, stdout=subprocess.PIPE,
                          encoding="utf-8") as process:
        for line in process.stdout:
            stage = next((stage for stage in STAGES if line.startswith(stage)), None)
            if stage:
                seconds.setdefault(stage, time.perf_counter() - start)
    if process.returncode:
        raise SystemExit("train.py failed, see above")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to an answer, and to the first training step.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="only the first step; what follows goes to train.py")
    args, rest = parser.parse_known_args()
    if not args.train:
        print("| asked | seconds, median |\n|---|---|")
        for name, arguments in ANSWERS.items():
            seconds = []
            for _ in range(args.repeats + 1):
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True)
                seconds.append(time.perf_counter() - start)
            print(f"| {name} | {statistics.median(seconds[1:]):.2f} |", flush=True)
        print()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"training.output_dir": folder, "data.cache_dir": f"{folder}/cache", "training.max_steps": 1,
                    "data.tokenizer_path": f"{folder}/tokenizer", "training.logging_steps": 1, "training.eval_samples":
                    1, "training.show_progress": "false", "scheduler.warmup_steps": 0}
        rest += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        runs = [seconds_to_stages(rest) for _ in range(args.repeats + 1)][1:]
    print("| train.py, a cached run, to the first line that begins with | seconds, median |\n|---|---|")
    for stage in STAGES:
        print(f"| {stage.strip()} | {statistics.median(run[stage] for run in runs):.2f} |")


if __name__ == "__main__":
    main()
