"""Errors that are the user's to solve, and how a command ends with one."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from common.streams import repair_streams

T = TypeVar("T")


class UserError(Exception):
    """An error for the user to solve. It is printed as one sentence, without a traceback.

    If a run has several processes, only the main one prints it, unless `everywhere` is set.
    """

    everywhere = False


def exit_on_user_error(main: Callable[[], T]) -> Callable[[], T]:
    """Decorate a command's `main`, so that it ends without a traceback after an error that is the user's to solve.

    Exit status: 2 after a `UserError`, whose sentence goes to stderr; 130 after Ctrl-C; 1 if the reader of the output
    has ended (`| head`). `repair_streams` makes sure that the standard streams can be written to.
    """

    @functools.wraps(main)
    def run() -> T:
        repair_streams()
        try:
            return _attempt(main)
        except SystemExit as ended:
            if os.environ.get("WORLD_SIZE", "1") != "1":
                end_at_once(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
            raise

    return run


def end_at_once(code: int) -> None:
    """Exit without waiting for threads, which may hang, or wait for processes that have ended.

    With open connections to other processes, the interpreter's normal exit may abort or wait for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _attempt(main: Callable[[], T]) -> T:
    try:
        result = main()
        sys.stdout.flush()  # a closed pipe raises only at the flush, which should happen here and not at exit
        return result
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.everywhere:
            print("error: " if rank == "0" else f"error: process {rank}: ", error, sep="", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path or a disk that cannot be used
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _sentence(error: OSError) -> str:
    where = error.filename or "a file"
    return f"{where} cannot be used ({error.strerror or error}); check the path, and that there is room to write"
