"""Commands in a terminal of their own: what its user types and reads, and what its screen then shows."""

import os
import select
import struct
import subprocess
import time
from collections.abc import Callable

from tests.runs import ROOT, command


class Terminal:
    """A command whose standard streams are a terminal. Tests that use it need("terminal")."""

    def __init__(self, *arguments: object, columns: int = 80, **environment: str) -> None:
        import pty

        self.end, other = pty.openpty()
        self.resize(columns)
        self.process = subprocess.Popen(
            command(*map(str, arguments)),
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
        os.close(other)

    def resize(self, columns: int) -> None:
        import fcntl
        import termios

        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def read_until(self, is_there: Callable[[str], object]) -> str:
        """What comes, as soon as it is all there, with plain line ends."""
        deadline, new = time.monotonic() + 60, ""
        while not is_there(new):
            assert time.monotonic() < deadline, new
            piece = self._read()
            assert piece is not None, f"the command ended after {new!r}"
            new += piece
        return new.replace("\r\n", "\n")

    def read_all(self, during: Callable[[str], object] = lambda new: None) -> str:
        """What comes until the command ends, as its bytes say. `during` sees all of it each time that some comes."""
        deadline, new = time.monotonic() + 60, ""
        while (piece := self._read()) is not None:
            assert time.monotonic() < deadline, new
            new += piece
            during(new)
        return new

    def _read(self) -> str | None:
        """What came in the last tenth of a second; None if no more will."""
        if not select.select([self.end], [], [], 0.1)[0]:
            return ""
        data = b""
        try:
            data = os.read(self.end, 4096)
            while select.select([self.end], [], [], 0)[0] and (more := os.read(self.end, 4096)):
                data += more
        except OSError:  # how Linux says that the other end is closed
            pass
        return data.decode(errors="replace") if data else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows for `text`, in which a carriage return is the only control beside line ends."""
    lines: list[list[str]] = [[]]
    column = 0
    for character in text:
        if character == "\n":
            lines.append([])
            column = 0
        elif character == "\r":
            column = 0
        else:
            assert character.isprintable(), f"{character!r} in {text!r}"
            line = lines[-1]
            line[column : column + 1] = [character]
            column += 1
    return ["".join(line).rstrip() for line in lines]
