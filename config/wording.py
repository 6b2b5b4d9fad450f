"""How messages show values, numbers, sizes and durations."""

import os
import re
import shlex
from pathlib import Path
from typing import Any


def show(value: Any) -> str:
    """A value as messages show it."""
    kind = {dict: "a group of keys", list: "a list", type(None): "nothing"}.get(type(value))
    return kind or one_line(repr(value) if isinstance(value, str) else str(value).lower())


def counted(number: int, noun: str) -> str:
    """The number and its noun: 1 step, 2,000 steps, 3 stories."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def format_bytes(number: float) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{max(1, round(number / 2**20)):,} MiB"


def format_seconds(seconds: float) -> str:
    """A duration in its largest unit: 40 seconds, 2.5 hours, 26 days."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}s"
    return f"{seconds:.0f} seconds"


def one_line(value: Any) -> str:
    """The value as text on one line, shortened to 120 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "..."


def shell_argument(path: Path, windows: bool = os.name == "nt") -> str:
    """The path as an argument of a printed command, which cmd.exe and PowerShell must understand on Windows."""
    if windows:
        return f'"{path}"' if re.search(r"[^\w.:\\/-]", str(path)) else str(path)
    return shlex.quote(str(path))


def indented(text: str) -> str:
    """A text of several lines, as messages show it."""
    return "  | " + text.replace("\n", "\n  | ")
