"""Speed of building a token file beside the tokenizer library's own, and peak memory by the size of the corpus.

    python tests/benchmarks/pretokenization.py --repeats 5                     offline sample stories, 2,048 tokens
    python tests/benchmarks/pretokenization.py --repeats 5 --text FILE         your text, 10,000 tokens
    python tests/benchmarks/pretokenization.py --memory 10 100 1000            megabytes

Prints medians over the repeats. Speed: the library encodes text in memory on all cores (encode_batch_fast), the
ceiling of a program that leaves all to it; against it the whole way from a .txt file to the token file, and reading and
cleaning alone. They take turns. Memory: each measurement is a process of its own, whose peak cannot be reset.
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
from data import token_files  # noqa: E402
from data.stories import open_stories  # noqa: E402
from data.synthetic_stories import synthetic_stories  # noqa: E402
from data.token_files import build_token_file, prepare_tokens  # noqa: E402
from data.tokenizer import (  # noqa: E402
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from data.word_cache import MANY_BYTES, count_processes  # noqa: E402

BLOCK = 10_000_000  # bytes of different stories; a larger corpus is this block again and again


def write_corpus(path: Path, megabytes: int) -> None:
    stories, block = synthetic_stories(seed=1), []
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
    data = DataConfig(dataset=corpus, validation=f"{folder}/validation", tokenizer_path=folder, cache_dir=folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    start = time.perf_counter()
    prepare_tokens(data, tokenizer, "train", show_progress=False)
    seconds = time.perf_counter() - start
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, seconds]))


def compare_speed(corpus: Path, vocab_size: int, repeats: int, folder: str) -> None:
    """Print MB/s of the library on text in memory, of reading, and from file to token file, taking turns."""
    data = DataConfig(dataset=str(corpus), validation=f"{folder}/validation", tokenizer_path=folder, cache_dir=folder)
    stories = open_stories(data, "train")
    texts = list(stories)
    megabytes = stories.counts["bytes"] / 1e6
    tokenizer = train_tokenizer(texts, vocab_size, show_progress=False)

    def library() -> None:
        for start in range(0, len(texts), 2400):
            tokenizer.encode_batch_fast(texts[start:start + 2400], add_special_tokens=False)

    def build(processes: int) -> None:
        token_files.count_processes = lambda num_bytes: processes
        build_token_file(stories, tokenizer, Path(folder) / "speed.bin", {}, show_progress=False)

    most = count_processes(10**12)
    ways = {"library, text in memory, all cores": library, "reading and cleaning": lambda: [*stories],
            "from file to token file": lambda: build(1)}
    if most > 1:
        ways[f"the same, {most} processes (used from {MANY_BYTES // 10**6} MB on)"] = lambda: build(most)
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first one does not count
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    ceiling = statistics.median(seconds["library, text in memory, all cores"][1:])
    print(f"{corpus.name}: {len(texts):,} stories, {megabytes:.1f} MB, {tokenizer.get_vocab_size():,} tokens\n\n"
          "| | MB/s | ratio to the library |\n|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"| {name} | {megabytes / median:.1f} | {ceiling / median:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of building a token file, or its peak memory.")
    parser.add_argument("--text", type=Path, help="a .txt file of stories, separated by <|endoftext|>")
    parser.add_argument("--memory", type=int, nargs="+", metavar="MEGABYTES", help="peak memory for these sizes")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "validation").mkdir()
        (Path(folder) / "validation" / "one.txt").write_text("A cat sat.", encoding="utf-8")  # none is held out
        if args.memory:
            measure_memory(args.memory, args.repeats, folder)
        elif args.text:
            compare_speed(args.text, 10_000, args.repeats, folder)
        else:
            write_corpus(Path(folder) / "sample.txt", 10)
            compare_speed(Path(folder) / "sample.txt", 2048, args.repeats, folder)


def measure_memory(sizes: list[int], repeats: int, folder: str) -> None:
    print("| text, MB | peak memory, MiB | of that before the first story | ratio to the first | MB/s | ratio |")
    print("|---|---|---|---|---|---|")
    first = None
    tokenizer = train_tokenizer(itertools.islice(synthetic_stories(seed=0), 5000), 2048, show_progress=False)
    save_tokenizer(tokenizer, folder)
    for megabytes in sizes:
        corpus = Path(folder) / f"{megabytes}.txt"
        write_corpus(corpus, megabytes)
        runs = []
        for _ in range(repeats):
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
