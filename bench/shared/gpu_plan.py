"""The steps of `bench/gpu.py`: their names, what they do, and how they share the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RECORD_FILE = "gpu.json"


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    share: int
    """Seconds of twenty minutes."""
    least: int = 5
    """Seconds below which it is not worth starting."""
    needed: bool = False
    """Whether the others are of no use without it."""
    interpreted: bool = False
    """Whether a rehearsal runs Triton's interpreter in it."""


STEPS = (
    Step("preflight", "imports, versions, GPU, driver, compiler, data", 60, needed=True),
    Step("peaks", "matrix product, memory and L2 cache of this GPU", 30),
    Step("right", "each kernel against float64, and 20 launches of it bit for bit", 120, 30, interpreted=True),
    Step("tests", "pytest -m cuda", 210, 60),
    Step("times", "each kernel and tile, by CUDA events over queued runs", 120, 20, interpreted=True),
    Step("layer", "bench/layer.py: every impl beside MLP, SwiGLU and kanditioned", 180, 60),
    Step("shakespeare", "train.py configs/shakespeare_char.toml beside its MLP twin", 90, 40),
    Step("gpt2", "train.py configs/gpt2_124m.toml beside its MLP twin, for throughput", 180, 80),
    Step("best", "train.py configs/shakespeare_char_best.toml beside its SwiGLU twin", 60, 40),
    Step("paths", "float16 with Muon, resume, sampling", 70, 40),
    Step("group", "NCCL: DDP and FSDP2 in a group of one", 30, 20),
    Step("profile", "where the time of a step goes", 50, 30),
)


def named(name: str) -> Step:
    """ValueError if there is no such step."""
    for step in STEPS:
        if step.name == name:
            return step
    raise ValueError(f"only must be some of {', '.join(step.name for step in STEPS)}; got {name!r}")


def limits(steps: Sequence[Step], seconds: float) -> list[float]:
    """The time of each step if they share `seconds`; what one leaves goes to those after it, when asked again."""
    total = sum(step.share for step in steps)
    return [seconds * step.share / total for step in steps]
