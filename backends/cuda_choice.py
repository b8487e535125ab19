"""What `auto` takes on a CUDA GPU: a small table by generation, grid and tokens, in cuda_choice.json.

`python bench/gpu.py --table True` prints the table anew from measurements. An entry that nobody has measured says so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from backends import triton_tiles
from backends.problem import Problem

TABLE_FILE = Path(__file__).with_name("cuda_choice.json")
FALLBACK = "chunked"  # PyTorch alone, so that it runs wherever PyTorch does
ANY = "any"  # generation: of those that have no entries of their own

# Versions of Triton whose compiled code tests/test_triton_compiled.py has been seen to pass. Others may miscompile the
# kernels, as 3.6 did former ones (its issue 9433), which shows in nothing but wrong numbers now and then.
CHECKED_TRITONS = ((3, 6), (3, 7))


@dataclass(frozen=True)
class Entry:
    """An impl for grids of up to `points` control points (None: any) and steps of at least `tokens` tokens."""

    points: int | None
    tokens: int
    impl: str
    why: str

    def suits(self, problem: Problem) -> bool:
        small_enough = self.points is None or problem.num_control_points <= self.points
        return small_enough and (problem.tokens is None or problem.tokens >= self.tokens)


def read_table(text: str) -> dict[str, list[Entry]]:
    return {generation: [Entry(**entry) for entry in entries] for generation, entries in json.loads(text).items()}


@functools.cache
def table() -> dict[str, list[Entry]]:
    return read_table(TABLE_FILE.read_text(encoding="utf-8"))


def generation(device: torch.device) -> str:
    """The part of the table that is for this GPU."""
    if torch.version.hip is not None:
        return ANY
    capability = torch.cuda.get_device_capability(device)
    return triton_tiles.generation(capability) if capability >= triton_tiles.OLDEST else ANY


def pick(problem: Problem, why_not: Mapping[str, Callable[[Problem], str | None]]) -> tuple[str, str]:
    """The impl for a problem on a CUDA GPU, and why. `why_not`: for each impl the reason why it cannot be used."""
    kind = generation(problem.device)
    entries = [*table().get(kind, ()), *table()[ANY]]
    entry = next((entry for entry in entries if entry.suits(problem)), Entry(None, 1, FALLBACK, "needs no more"))
    reason = why_not[entry.impl](problem)
    if reason is None and entry.impl == "triton":
        reason = why_not_trusted(triton_version())
    if reason is not None:
        return FALLBACK, f"auto: {entry.impl} would be taken, but {reason}"
    return entry.impl, f"auto: {entry.why}"


def why_not_trusted(version: str) -> str | None:
    """Why this version of Triton may compile our kernels wrongly, or None."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers in CHECKED_TRITONS:
        return None
    checked = " and ".join(".".join(map(str, numbers)) for numbers in CHECKED_TRITONS)
    return f"nobody has checked what Triton {version} makes of its kernels (only {checked})"


def triton_version() -> str:
    import triton  # Triton is optional, and importing it takes a moment

    return str(triton.__version__)
