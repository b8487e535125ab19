"""The contestants of a case: the MLP of equal parameters, our backends, and other projects' layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import backends
from bench.shared.case import Case, Work
from bench.shared.peers import CannotRun, Layers, peer_builders
from bench.shared.timing import Passes, compile_without_limit, in_one_line, release_memory, trained
from common.errors import UserError
from feed_forward import SwiGLU
from kan_layer import KANLayer

Builder = Callable[[], nn.Module]
COMPILED = " compiled"  # the end of a compiled contestant's name
WIDE_MLP = "mlp 4x"  # the usual MLP, if the MLP of equal parameters has another size


@dataclass(frozen=True)
class Contestant:
    name: str
    module: nn.Module
    memory: int | None
    """Peak memory of training in bytes, without parameters and input; None if not known."""
    note: str | None = None
    """A caveat about how it computes the case."""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in trained(self.module))

    @property
    def rival(self) -> str:
        """The MLP to compare with, which is compiled if the contestant is."""
        return "mlp" + COMPILED * self.name.endswith(COMPILED)

    def work(self, case: Case, training: bool) -> Work:
        """The work of the case. Other projects' spline layers are credited with the same work as ours."""
        return case.matrix_work(self.parameters, training) if is_matrices(self.name) else case.spline_work(training)


def is_matrices(name: str) -> bool:
    """Whether this contestant is an MLP, which multiplies each parameter once per token, and not a spline layer."""
    return name.removesuffix(COMPILED) in ("mlp", WIDE_MLP, "swiglu", "flashkat")


def line_up(
    passes: Passes, impls: Sequence[str], peers: Layers, compiled: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that can compute the case, and the reason for each that cannot."""
    case, device = passes.case, torch.device(passes.device)
    usual = {} if case.hidden(2) == 4 * case.width else {WIDE_MLP: partial(mlp, case.width, 4 * case.width)}
    builders: dict[str, Builder] = {
        "mlp": partial(mlp, case.width, case.hidden(2)),
        **usual,
        "swiglu": partial(SwiGLU, case.width, case.hidden(3), bias=False),
        **{impl: partial(spline_layer, case, impl, device) for impl in impls},
        **peer_builders(peers, case),
    }
    if compiled:
        compile_without_limit()  # every contestant is compiled, for the shapes of every case
    able: list[Contestant] = []
    unable: dict[str, str] = {}
    for name, build in builders.items():
        for suffix in ("", COMPILED) if compiled else ("",):
            try:
                able.append(enter(name + suffix, build, passes))
            except CannotRun as reason:
                unable[name + suffix] = str(reason)
            release_memory(name + suffix, passes.device)
    require_rivals(unable, case)
    return able, unable


def require_rivals(unable: Mapping[str, str], case: Case) -> None:
    """Raise UserError if `unable` (name → reason) has an MLP that others are compared with."""
    for name in ("mlp", "mlp" + COMPILED):
        if name in unable:
            raise UserError(f"{name}, which others are compared with, fails at {case} ({unable[name]})")


def enter(name: str, build: Builder, passes: Passes) -> Contestant:
    """Build a contestant and run both passes once. Raises CannotRun."""
    try:
        module = build().to(passes.device)
        if name.endswith(COMPILED):
            module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
        with warnings.catch_warnings():  # nobody who times it could act on them
            warnings.simplefilter("ignore")
            passes.forward(module)
            passes.training(module)
            memory = passes.memory_of_training(module)
    except CannotRun:
        raise
    except Exception as error:  # a peer may fail in any way
        raise CannotRun(in_one_line(error)) from error
    return Contestant(name, module, memory, note_on(name, passes))


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))


def spline_layer(case: Case, impl: str, device: torch.device) -> nn.Module:
    backend = backends.BACKENDS.get(backends.ALIASES.get(impl, impl))
    reason = backend.why_not(problem_of(case, device)) if backend else None
    if reason is not None:
        raise CannotRun(reason)
    return KANLayer(case.width, case.width, num_control_points=case.grid, impl=impl, device=device)


def note_on(name: str, passes: Passes) -> str | None:
    """The caveat of our backend about the case; None for other contestants."""
    backend = backends.BACKENDS.get(name.removesuffix(COMPILED))
    return backend.caveat(problem_of(passes.case, torch.device(passes.device))) if backend else None


def problem_of(case: Case, device: torch.device) -> backends.Problem:
    return backends.Problem(case.width, case.grid, case.width, device, case.tokens)
