"""Errors that a user can fix, and how a script reports errors: one line on standard error and exit status 2."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


class UserError(Exception):
    """An error that the user can fix. Its text is the line to show: what, where, what is allowed, what to do."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError or an OSError (no such file, no permission, disk full) into one line and exit status 2.

    Ctrl-C exits with status 130. When torchrun started several processes on one machine, local rank 0 reports a
    UserError for all of them.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `generate.py | head`: the reader has closed the pipe, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # cleanup is done; only Python has to exit
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
