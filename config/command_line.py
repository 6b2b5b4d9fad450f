"""What the command lines of all scripts share: --config and --set, number types, and how a script starts and ends."""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from config.errors import UserError, one_line_errors
from config.schema import SECTIONS
from config.unknown_keys import suggest

REPO = Path(__file__).resolve().parent.parent
QUICKSTART = REPO / "config" / "quickstart.yaml"
MAIN_CONFIG = REPO / "config" / "train_config_tinystories_33M_TOP10K.yaml"
Arguments = TypeVar("Arguments")


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError, so that its errors look like all others."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+) ?(\S*)", message)
        advice = unknown and self._suggest_flag(*unknown.groups())
        raise UserError(f"{message}; {advice or '--help lists the flags'}")

    def _suggest_flag(self, argument: str, following: str) -> str | None:
        """The way to give a file without its flag, a key of the YAML given as a flag, or --set with a space for =."""
        before = sys.argv[:sys.argv.index(argument)] if argument in sys.argv else []
        if before[-2:-1] == ["--set"] and "=" not in before[-1]:
            return f"use --set {before[-1]}={following if argument == '=' else argument}"
        flags = {".yaml": "--config", ".yml": "--config", ".pth": "--checkpoint"}
        if (flag := flags.get(Path(argument).suffix)) in self._option_string_actions:
            return f"use {flag} {argument}"
        name, _, value = argument.lstrip("-").partition("=")
        key = suggest("", name.replace("-", "_").rpartition(".")[2], SECTIONS)
        if argument.startswith("--") and key.startswith("use ") and "--set" in self._option_string_actions:
            return f"use --set {key.removeprefix('use ')}={value or following or 'VALUE'}"
        return None


def add_config_arguments(parser: argparse.ArgumentParser, default: Path) -> None:
    """Add --config and --set. `default` is only named in the help: the script itself falls back to it."""
    parser.add_argument("--config", type=file_path, metavar="FILE",
                        help=f"YAML file (default: {os.path.relpath(default.resolve(), REPO)}); "
                        "docs/TRAINING_GUIDE.md has a table of all keys")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the YAML; may be given many times")


def file_path(text: str) -> Path:
    """The argparse type of a path; ~ is the home directory, since a shell leaves it alone after a = and on Windows."""
    return Path(text).expanduser()


def positive(text: str, low: int = 1) -> int:
    """The argparse type of a whole number that is at least `low`."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, at least {low}")
    return int(text)


def not_negative(text: str) -> int:
    """The argparse type of a whole number that is at least 0."""
    return positive(text, low=0)


def parse_before_imports(parse_arguments: Callable[[], Arguments], spin: bool = False) -> Arguments:
    """Parse a script's command line and YAML before its slow imports (torch takes seconds), and set OpenMP up.

    spin: let OpenMP's threads wait by spinning for longer, which suits many small operations.

    A mistake is reported at once, in one line. Until run_script() takes over, Ctrl-C and SIGTERM exit immediately:
    there is nothing to clean up yet, and an import could turn the exception into a different one.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:  # under nohup it is another one
            signal.signal(number, _exit_now)
    _replace_unprintable()
    with one_line_errors():
        arguments = parse_arguments()
    # waiting OpenMP threads should yield their core soon: with GOMP's own count, busy neighbours halve torch's speed.
    # For small operations, 30,000 is as fast as that alone, and as 1,000 beside them (docs/EXPERIMENTS.md)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000" if spin else "1000")
    return arguments


def run_script(main: Callable[[Arguments], int | None], arguments: Arguments) -> None:
    """Call a script's main() and exit with its status (None is 0). Errors as in one_line_errors(); SIGTERM is 143."""
    _replace_unprintable()
    if signal.getsignal(signal.SIGINT) is _exit_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an exception, so that cleanup runs
    with one_line_errors():
        status = main(arguments) or 0
        sys.stdout.flush()  # so that a closed pipe is noticed here, where it is caught
    sys.exit(status)


def _exit_now(number: int, frame: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped\n")
    os._exit(128 + number)


def _replace_unprintable() -> None:
    """Let a console in another code page replace characters that it lacks, such as a curly quote."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
