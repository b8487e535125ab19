"""KAN layers of others, imported from where the user has them; none of their code is here.

Each is set up so that its grid matches ours as far as it can: G basis functions per input on [-2, 2].
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backends import BACKENDS, Problem
from bench.case import Case
from training.errors import UserError

Modes = dict[str, dict[str, Any]]  # a mode's name ("" if there is only one) → keyword arguments of the layer


class CannotRun(Exception):
    """A contestant cannot compute the case on this machine; the message says why, in a phrase."""


@dataclass(frozen=True)
class Peer:
    module: str
    layer: str
    modes: Callable[[int], Modes]
    """Those for a grid of G."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def file(self) -> str:
        return self.module.replace(".", "/") + ".py"


def kanditioned_modes(grid: int) -> Modes:
    common = {"init": "random_normal", "num_control_points": grid, "spline_width": 4.0}
    impls = ("embedding_bag", "embedding", "sparse_matmul_csr")
    return {
        **{impl: {**common, "impl": impl} for impl in impls},
        **{f"parallel_scan {impl}": {**common, "impl": impl, "variant": "parallel_scan"} for impl in impls},
        "DCT": {**common, "impl": "embedding_bag", "variant": "DCT"},
    }


def efficient_kan_modes(grid: int) -> Modes:
    order = 3  # it has grid_size + order coefficients; without their separate scale there are about as many as ours
    sizes = {"grid_size": max(1, grid - order), "spline_order": order}
    return {"": {**sizes, "grid_range": [-2, 2], "enable_standalone_scale_spline": False}}


def centred_grid(grid: int) -> Modes:
    return {"": {"num_grids": grid, "grid_min": -2.0, "grid_max": 2.0}}


def chebyshev(grid: int) -> Modes:
    return {"": {"degree": grid - 1}}


PEERS = {
    "kanditioned": Peer("KANditioned.kan_layer", "KANLayer", kanditioned_modes),
    "efficient-kan": Peer("efficient_kan.kan", "KANLinear", efficient_kan_modes),
    "fast-kan": Peer("fastkan.fastkan", "FastKANLayer", centred_grid),
    "faster-kan": Peer("fasterkan.fasterkan_layers", "FasterKANLayer", centred_grid),
    "cheby-kan": Peer("ChebyKANLayer", "ChebyKANLayer", chebyshev),
}
Layers = dict[str, type[nn.Module]]


def load_peers(text: str) -> tuple[Layers, dict[str, str]]:
    """The layer classes that NAME=PATH,NAME=PATH asks for, and why one cannot be had. UserError if `text` is wrong.

    A name without a path means the installed package; that one may be missing.
    """
    layers: Layers = {}
    missing: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, path = part.strip().partition("=")
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}; write NAME=PATH with a name out of {', '.join(PEERS)}")
        if equals:
            layers[name] = load_layer(name, find_root(name, Path(os.path.expanduser(path))))
        elif importlib.util.find_spec(PEERS[name].package):
            layers[name] = load_layer(name)
        else:
            missing[name] = f"it is not installed, and --peers {name}=PATH does not say where it is"
    return layers, missing


def find_root(name: str, path: Path) -> Path:
    """The folder in the checkout `path` from which the peer is imported."""
    file = PEERS[name].file
    for root in (path, path / "src"):
        if (root / file).is_file():
            return root
    what = f"has no {file}" if path.is_dir() else "is no folder"
    raise UserError(f"peer {name}: {path} {what}; give the folder of a checkout of {name}")


def load_layer(name: str, root: Path | None = None) -> type[nn.Module]:
    """The peer's class, imported from under `root`, or as installed."""
    peer = PEERS[name]
    path = sys.path[:]
    if root is not None:
        sys.path.insert(0, str(root))  # its modules import each other by their full names
    try:
        module = importlib.import_module(peer.module)
        if root is not None and not Path(module.__file__ or "").resolve().is_relative_to(root.resolve()):
            raise ImportError(f"Python prefers the one at {module.__file__}")
        return getattr(module, peer.layer)
    except Exception as error:  # its code may do anything
        raise UserError(f"peer {name}: {root or 'the installed package'} is unusable ({in_one_line(error)})") from error
    finally:
        sys.path[:] = path


def peer_builders(layers: Layers, case: Case) -> dict[str, Callable[[], nn.Module]]:
    """What makes each peer, in each of its modes."""
    return {
        f"{name} {mode}".strip(): partial(build_peer, layer, case, keywords)
        for name, layer in layers.items()
        for mode, keywords in PEERS[name].modes(case.grid).items()
    }


def build_peer(layer: type[nn.Module], case: Case, keywords: dict[str, Any]) -> nn.Module:
    if keywords.get("impl") == "embedding":  # gathers as ours of that name does, in as much memory
        problem = Problem(case.width, case.grid, case.width, torch.device("cpu"), case.tokens)
        reason = BACKENDS["embedding"].why_not(problem)
        if reason is not None:
            raise CannotRun(reason)
    with contextlib.redirect_stdout(io.StringIO()):  # one of them has something to say
        return layer(case.width, case.width, **keywords)


def in_one_line(error: BaseException, most: int = 160) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= most else text[: most - 1] + "…"
