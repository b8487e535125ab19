"""Where a step of `bench/gpu.py` runs, how long it may, and what it has found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Setting:
    """Where a step runs and what it has found."""

    step: str
    folder: Path
    seconds: float
    rehearse: bool
    start: float = field(default_factory=time.monotonic)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        """Seconds until the step is ended."""
        return self.start + self.seconds - time.monotonic()

    def keep(self, **found: Any) -> None:
        self.result.update(found)
        text = json.dumps(self.result, allow_nan=False)
        write_atomically(self.folder / f"{self.step}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append to the list `name`."""
        print(row, flush=True)
        self.keep(**{name: [*self.result.get(name, []), row]})

    def call(self, *arguments: object, limit: float = float("inf")) -> str:
        """Run a command of the project; its output. RuntimeError, with its last line, if it fails or takes too long."""
        command = [sys.executable, *map(str, arguments)]
        print("$ python", *arguments, flush=True)
        limit = max(1.0, min(limit, self.left() - 3))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{arguments[0]} was not done within {limit:.0f} s") from None
        print(done.stdout, done.stderr, sep="", flush=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RuntimeError(f"{arguments[0]} ended with status {done.returncode}: {lines[-1] if lines else ''}")
        return done.stdout
