"""The contestants of a case: the MLP of equal parameters, our backends, and the layers of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import backends
from bench.case import Case, Work
from bench.peers import CannotRun, Layers, in_one_line, peer_builders
from bench.timing import Passes, trained
from kan_layer import KANLayer
from training.errors import UserError

Builder = Callable[[], nn.Module]
COMPILED = " compiled"  # ends the name of a compiled contestant


@dataclass(frozen=True)
class Contestant:
    name: str
    module: nn.Module

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in trained(self.module))

    @property
    def is_mlp(self) -> bool:
        return self.name.startswith("mlp")

    @property
    def rival(self) -> str:
        """The MLP that it is compared with: compiled if it is."""
        return "mlp" + COMPILED * self.name.endswith(COMPILED)

    def work(self, case: Case, training: bool) -> Work:
        """What the task needs; of a spline layer of others no more is asked than of ours."""
        return case.mlp_work(training) if self.is_mlp else case.spline_work(training)


def line_up(
    passes: Passes, impls: Sequence[str], peers: Layers, compiled: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can compute the case, and the reason why each of the others cannot."""
    case, device = passes.case, torch.device(passes.device)
    builders: dict[str, Builder] = {
        "mlp": partial(mlp, case),
        **{impl: partial(spline_layer, case, impl, device) for impl in impls},
        **peer_builders(peers, case),
    }
    if compiled:
        # Every contestant of a case is compiled for its own shapes; beyond a limit, compiling would silently stop.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    able: list[Contestant] = []
    unable: dict[str, str] = {}
    for name, build in builders.items():
        for suffix in ("", COMPILED) if compiled else ("",):
            try:
                able.append(enter(name + suffix, build, passes))
            except CannotRun as reason:
                unable[name + suffix] = str(reason)
    for name in ("mlp", "mlp" + COMPILED):
        if name in unable:
            raise UserError(f"{name}, which others are compared with, fails at {case} ({unable[name]})")
    return able, unable


def enter(name: str, build: Builder, passes: Passes) -> Contestant:
    """The contestant, after a first run of both passes. Raises CannotRun."""
    try:
        module = build().to(passes.device)
        if name.endswith(COMPILED):
            module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
        with warnings.catch_warnings():  # of matters that those who time it cannot change
            warnings.simplefilter("ignore")
            passes.forward(module)
            passes.training(module)
    except CannotRun:
        raise
    except Exception as error:  # a peer may fail in any way
        raise CannotRun(in_one_line(error)) from error
    return Contestant(name, module)


def mlp(case: Case) -> nn.Module:
    first, second = (nn.Linear(*sizes, bias=False) for sizes in ((case.width, case.hidden), (case.hidden, case.width)))
    return nn.Sequential(first, nn.GELU(), second)


def spline_layer(case: Case, impl: str, device: torch.device) -> nn.Module:
    backend = backends.BACKENDS.get(backends.ALIASES.get(impl, impl))
    problem = backends.Problem(case.width, case.grid, case.width, device, case.tokens)
    reason = backend.why_not(problem) if backend else None
    if reason is not None:
        raise CannotRun(reason)
    return KANLayer(case.width, case.width, num_control_points=case.grid, impl=impl, device=device)
