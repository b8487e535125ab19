"""Mistakes of the user's, and how a command ends when one is made."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from common.streams import repair_streams

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's: printed as one sentence, without a traceback.

    Of several processes of a run only the main one prints it, unless it is of those that are true `everywhere`.
    """

    everywhere = False


def exit_on_user_error(main: Callable[[], T]) -> Callable[[], T]:
    """Decorate a command's `main` so that it ends without a traceback when the user, not the code, is why.

    Exit status: 2 after a `UserError` (its sentence goes to stderr), 130 after Ctrl-C, 1 when the reader of
    the output has gone away (`| head`). Closed streams and those of any encoding will do, as `repair_streams` has it.
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
    """Exit without taking anything down: threads that hang, or that wait for processes that are gone, are left behind.

    With connections to other processes open, the interpreter's own way may abort or wait for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _attempt(main: Callable[[], T]) -> T:
    try:
        result = main()
        sys.stdout.flush()  # a closed pipe shows only at the flush; let that be here and not at shutdown
        return result
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.everywhere:
            print("error: " if rank == "0" else f"error: process {rank}: ", error, sep="", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path or a disk that will not do
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _sentence(error: OSError) -> str:
    where = error.filename or "a file"
    return f"{where} cannot be used ({error.strerror or error}); check the path, and that there is room to write"
