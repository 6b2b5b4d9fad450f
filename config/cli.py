"""What every script's command line shares: --config and --set, one-line errors, a clean Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

REPO = Path(__file__).resolve().parent.parent
QUICKSTART = REPO / "config" / "quickstart.yaml"
MAIN_CONFIG = REPO / "config" / "train_config_tinystories_33M_TOP10K.yaml"


class UserError(Exception):
    """Something that the user can mend. Its text is the one line shown: what, where, what is allowed, what to do."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def add_config_arguments(parser: argparse.ArgumentParser, default: Path) -> None:
    """Add --config and --set; `default` is only named in the help: the script falls back to it itself."""
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help=f"YAML file (default: {os.path.relpath(default.resolve(), REPO)})")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override one value of the YAML; may be given many times")


def positive(text: str, low: int = 1) -> int:
    """The type of a flag that is a whole number from 1, or from `low`, on."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, at least {low}")
    return int(text)


def not_negative(text: str) -> int:
    """The type of a flag that is a whole number from 0 on."""
    return positive(text, low=0)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Let Ctrl-C, SIGTERM and a closed terminal wait: the list holds the signal once one came. A second leaves at once.

    Under torchrun every signal comes twice, from the terminal and from torchrun, so there only the first counts;
    torchrun itself kills what has not stopped after 30 seconds.
    """
    received: list[int] = []
    alone = "TORCHELASTIC_RUN_ID" not in os.environ
    closed = getattr(signal, "SIGHUP", None)  # the terminal was closed: the shell and the system both say so

    def remember(number: int, frame: Any) -> None:
        if received and alone and number != closed:
            os._exit(128 + number)  # nothing half-written is believed, and the next run tidies up
        received.append(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            hint = b" (once more: at once, without saving)" if alone else b""
            with contextlib.suppress(OSError):  # straight to the terminal: print must not be entered from a handler
                os.write(2, b"\nstopping after this step" + hint + b"\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if closed and signal.getsignal(closed) == signal.SIG_DFL:  # nohup ignores it
        numbers.append(closed)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Unfailing(io.TextIOBase):
    """A stream whose troubles (a full disk under the log, a closed pipe) do not end hours of work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line and status 2 for a UserError or an OSError (no such file, no permission, disk full).

    Ctrl-C is status 130. Of several processes on one machine (torchrun), the first one tells what they all found.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `generate.py | head`: the reader has gone, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # all is tidied; Python itself still leaves
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def check_first(parse_arguments: Callable[[], object]) -> None:
    """Exit with one line if a script's command line or YAML is wrong, set OpenMP up; call it before torch is imported.

    That takes seconds. Until run_script() takes over, Ctrl-C and SIGTERM end the program at once: an import that is
    cut short leaves nothing to tidy, and may turn an exception into another one.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:  # not so under nohup, say
            signal.signal(number, _leave)
    _allow_any_text()
    with one_line_errors():
        parse_arguments()
    # threads that wait soon give their core away: else one busy neighbour halves the speed of torch on a CPU
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _leave(number: int, frame: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped\n")
    os._exit(128 + number)


def _allow_any_text() -> None:
    """A console in another code page must not end a run over a curly quote."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main() and exit with its status (None is 0), or as one_line_errors() does; SIGTERM is 143."""
    _allow_any_text()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is half-done is tidied
    with one_line_errors():
        status = main() or 0
        sys.stdout.flush()  # so that a closed pipe shows here, where it is caught
    sys.exit(status)
