"""Put a sharded checkpoint into one file: `python convert.py OUT_DIR`, for whatever reads one, like other machines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import common.threads  # noqa: F401  before torch

import tyro

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from training.checkpoint import FORMAT, find_checkpoint, read_state
from training.sealed_file import write_sealed

USAGE = "python convert.py OUT_DIR [--key value …]"


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or the folder of one of its checkpoints."""
    step: str = "latest"
    """Which checkpoint: best, latest or a step."""
    output: Path | None = None
    """The file to write; by default step_NNNNNN.pt beside the folder, which then stands for it."""


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    source = find_checkpoint(options.out_dir, options.step)
    if not source.is_dir():
        raise UserError(f"{source} is in one file already; use it as it is, or choose another --step")
    output = options.output or source.with_suffix(".pt")
    if output.exists():
        raise UserError(f"{output} exists already; delete it, or choose another --output")
    write_sealed({**read_state(source), "format": FORMAT}, output)
    print(output)


if __name__ == "__main__":
    main()
