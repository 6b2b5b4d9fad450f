"""What train.py shows on a terminal: its progress bar, the time it will take, and stories wrapped to the width."""

import os
import re
import sys
import textwrap
import time
from typing import TextIO

from tqdm import tqdm

from config.wording import counted, format_seconds
from training.run import Run, read_losses

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
MIN_BAR = 8  # columns
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but the tab and the line feed


def columns(stream: TextIO) -> int | None:
    """The width of the terminal that a stream writes to; None if it writes to none."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or 80) if stream.isatty() else None
    except (OSError, ValueError):  # a stream without a file
        return None


def bold(text: str) -> str:
    """The text in bold, if standard output is a terminal that shows them and NO_COLOR is not set."""
    shows = os.name != "nt" or "WT_SESSION" in os.environ  # Windows Terminal does, an old console may not
    plain = not shows or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not columns(sys.stdout)
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def wrapped(story: str) -> str:
    """A story marked at the left, and wrapped if standard output is a terminal. Ends in a line break.

    Control characters, which a model writes early in training, become U+FFFD.
    """
    width, lines = columns(sys.stdout), CONTROL.sub("\ufffd", story).split("\n")
    if width:
        lines = [part for line in lines for part in textwrap.wrap(line, max(20, width - 5)) or [""]]
    return "".join(f"  | {line}".rstrip() + "\n" for line in lines)


def open_bar(total: int, done: int, show: bool) -> tqdm:
    """The progress bar of the steps, on standard error; disabled without a terminal there."""
    return tqdm(total=total, initial=done, bar_format=BAR, dynamic_ncols=True, smoothing=0.05,
                disable=not (show and columns(sys.stderr)))


def show_figures(bar: tqdm, step: int, figures: dict[str, str]) -> None:
    """Show the figures beside the bar, the first ones if there is no room for all; without a bar, print a line."""
    texts = [f"{name} {value}" for name, value in figures.items()]
    if bar.disable:
        print(f"step {step:,} of {bar.total:,}: {', '.join(texts)}", flush=True)
        return
    length = len(f"100%|| {bar.total}/{bar.total} steps, 00:00:00 left") + MIN_BAR
    width = columns(sys.stderr) or 80  # the terminal may have been closed since the bar was opened
    while texts and length + len(", ".join(["", *texts])) > width:
        texts.pop()
    bar.set_postfix_str(", ".join(texts))


def announce_duration(run: Run, is_first: bool, start: float, total_steps: int) -> None:
    """Say how long the run will take: by its second step, since the first one warms up, or by its first if it is slow.

    start: time at the beginning of the step. Synchronizes with the device. More than a day is a warning, since the
    device may not be the one intended.
    """
    read_losses(run)
    seconds = time.perf_counter() - start
    left = (total_steps - run.iter_num) * seconds
    if left > 60 and is_first == (seconds > 20):
        tqdm.write(f"plan: about {format_seconds(left)} for {counted(total_steps - run.iter_num, 'more step')}, by the "
                   "first ones; evaluations come on top")
        if left > 86_400:
            tqdm.write(f"warning: that is more than a day, on the {run.device.type}: use a GPU, a smaller config such "
                       "as config/tinystories_cpu.yaml, or --set training.max_steps")
