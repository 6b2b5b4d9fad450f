"""What must not end a run in the middle of a step: a signal, or an output stream that fails."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Defer SIGINT, SIGTERM and SIGHUP until the current step is done.

    The yielded list is non-empty once a signal has arrived; a second signal exits immediately. Under torchrun each
    signal arrives twice, from the terminal and from torchrun, so only the first one counts there; torchrun kills
    processes that are still running after 30 seconds.
    """
    received: list[int] = []
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    hangup = getattr(signal, "SIGHUP", None)  # on a closed terminal, the shell and the system each send one

    def remember(number: int, frame: Any) -> None:
        if received and not under_torchrun and number != hangup:
            os._exit(128 + number)  # half-written files are never used, and the next run removes them
        received.append(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            hint = b"" if under_torchrun else b" (press Ctrl-C again to stop at once, without saving)"
            with contextlib.suppress(OSError):  # os.write, since print must not be entered from a signal handler
                os.write(2, b"\nstopping after this step" + hint + b"\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) == signal.SIG_DFL:  # nohup ignores SIGHUP
        numbers.append(hangup)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FaultTolerantStream:
    """A text stream whose failures (a full disk under a log file, a closed pipe) are ignored."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()
