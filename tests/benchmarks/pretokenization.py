"""Peak memory and speed of building a token file, by the size of the corpus.

    python tests/benchmarks/pretokenization.py --megabytes 10 100 1000 --repeats 3

Each measurement is a process of its own (its peak resident memory cannot be reset) that reads a .txt file of offline
sample stories and writes the token file. Prints the medians over the repeats, and each over that of the first size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

from config.schema import DataConfig  # noqa: E402
from data.sample import sample_stories  # noqa: E402
from data.tokens import load_tokenizer, prepare_tokens  # noqa: E402
from train_custom_tokenizer import save_tokenizer, train_tokenizer  # noqa: E402

BLOCK = 10_000_000  # bytes of different stories; a larger corpus is this block again and again


def write_corpus(path: Path, megabytes: int) -> None:
    stories, block = sample_stories(seed=1), []
    while sum(map(len, block)) < BLOCK:
        block += [story + "\n<|endoftext|>\n" for story in itertools.islice(stories, 2000)]
    text = "".join(block).encode("utf-8")
    with path.open("wb") as file:
        for start in range(0, megabytes * 1_000_000, len(text)):
            file.write(text[:megabytes * 1_000_000 - start])


def measure_here(corpus: str, folder: str) -> None:
    """Build the token file and print peak resident memory in MiB before and after, and the seconds it took."""
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    tokenizer = load_tokenizer(folder)
    data = DataConfig(dataset=corpus, validation=corpus + ".none", tokenizer_path=folder, cache_dir=folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    start = time.perf_counter()
    prepare_tokens(data, tokenizer, "train", show_progress=False)
    seconds = time.perf_counter() - start
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, seconds]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and speed of building a token file.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| text, MB | peak memory, MiB | of that before the first story | ratio to the first | MB/s | ratio |")
    print("|---|---|---|---|---|---|")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(itertools.islice(sample_stories(seed=0), 5000), 2048, show_progress=False)
        save_tokenizer(tokenizer, folder)
        for megabytes in args.megabytes:
            corpus = Path(folder) / f"{megabytes}.txt"
            write_corpus(corpus, megabytes)
            runs = []
            for _ in range(args.repeats):
                done = subprocess.run([sys.executable, __file__, "--measure", str(corpus), folder], check=True,
                                      capture_output=True, encoding="utf-8")
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                for path in Path(folder).glob("*.bin"):
                    path.unlink()
            before, peak, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
            first = first or (peak, megabytes / seconds)
            print(f"| {megabytes} | {peak:.0f} | {before:.0f} | {peak / first[0]:.2f} | {megabytes / seconds:.1f} | "
                  f"{megabytes / seconds / first[1]:.2f} |", flush=True)
            corpus.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_here(*sys.argv[2:])
    else:
        main()
