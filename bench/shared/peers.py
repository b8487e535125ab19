"""Other projects' KAN layers, imported from the user's checkouts. None of their code is copied here.

The grid of each matches ours as closely as it allows: G basis functions per input on [-2, 2].
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import BACKENDS, Problem
from bench.shared.case import Case
from bench.shared.timing import in_one_line
from common.errors import UserError
from common.files import expand_home

RATIONAL_GROUPS = 8
Layers = dict[str, type[nn.Module]]
Modes = dict[str, dict[str, Any]]  # a mode's name ("" if there is only one) → keyword arguments of the layer


class CannotRun(Exception):
    """Raised when a contestant cannot compute the case on this machine. The message is a phrase that says why."""


@dataclass(frozen=True)
class Peer:
    module: str
    layer: str
    modes: Callable[[int], Modes]
    """The modes for a grid of G."""
    build: Callable[[type[nn.Module], Case, dict[str, Any]], nn.Module] = lambda layer, case, keywords: layer(
        case.width, case.width, **keywords
    )
    """Makes a module from (N, width) to (N, width) of this class, with these keyword arguments."""
    needs: str = ""
    """A module that it imports and that must be installed or compiled besides its checkout."""

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
    order = 3  # it has grid_size + order coefficients, about as many as ours if they have no separate scale
    sizes = {"grid_size": max(1, grid - order), "spline_order": order}
    return {"": {**sizes, "grid_range": [-2, 2], "enable_standalone_scale_spline": False}}


def centred_grid(grid: int) -> Modes:
    return {"": {"num_grids": grid, "grid_min": -2.0, "grid_max": 2.0}}


def chebyshev(grid: int) -> Modes:
    return {"": {"degree": grid - 1}}


def lookup_modes(grid: int) -> Modes:
    """Modes of lmKAN, whose functions take two inputs: (cells + 1)² values for each output and pair of inputs.

    Its grid needs at least three cells. So it has at least 8 values for each input and output, also for G < 8.
    """
    return {"": {"num_grids": max(3, round((2 * grid) ** 0.5) - 1)}}


def rational_modes(grid: int) -> Modes:
    return {"": {"num_groups": 1, "den_groups": RATIONAL_GROUPS, "m": 6, "n": 4}}  # as in FlashKAT's scripts


class TokensLast(nn.Module):
    """lmKAN's layer, which expects (width, N)."""

    def __init__(self, layer: type[nn.Module], case: Case, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer(input_dim=case.width, output_dim=case.width, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.t().contiguous()).t()


class SplineMLP(nn.Module):
    """kan-gpt's block: an MLP with layers of its splines, which expect (B, T, width), for its two matrices."""

    def __init__(self, layer: type[nn.Module], case: Case, keywords: dict[str, Any]) -> None:
        super().__init__()
        values = 2 * keywords["grid"] + 2  # per input and output: coefficients, a scale, and a linear weight
        hidden = max(1, round(case.grid * case.width / (2 * values)))
        self.first = layer(width=[case.width, hidden], **keywords)
        self.second = layer(width=[hidden, case.width], **keywords)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.shape[-1])  # (*, width) → (1, N, width)
        return self.second(F.gelu(self.first(rows), approximate="tanh")).view_as(x)


class RationalMLP(nn.Module):
    """FlashKAT's layer: an MLP with a learned rational function, one per group of features, before each matrix."""

    def __init__(self, layer: type[nn.Module], case: Case, keywords: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = case.width, case.hidden(2)
        if width % RATIONAL_GROUPS or hidden % RATIONAL_GROUPS:  # else its kernel would read beyond its coefficients
            raise CannotRun(f"{width} and {hidden} features do not make {RATIONAL_GROUPS} equal groups")
        self.first_function = layer(in_features=width, mode="identity", **keywords)
        self.first = nn.Linear(width, hidden, bias=False)
        self.second_function = layer(in_features=hidden, mode="swish", **keywords)
        self.second = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.first_function(x.unsqueeze(0)))  # it expects (B, T, width)
        return self.second(self.second_function(hidden)).squeeze(0)


PEERS = {
    "kanditioned": Peer("KANditioned.kan_layer", "KANLayer", kanditioned_modes),
    "efficient-kan": Peer("efficient_kan.kan", "KANLinear", efficient_kan_modes),
    "fast-kan": Peer("fastkan.fastkan", "FastKANLayer", centred_grid),
    "faster-kan": Peer("fasterkan.fasterkan_layers", "FasterKANLayer", centred_grid),
    "lmkan": Peer("lmKAN.lmKAN_2d", "LMKAN2DLayer", lookup_modes, TokensLast, needs="lmKAN_kernels"),
    "flashkat": Peer(
        "rational_kat.flash_kat_1dgroup_triton", "FlashKAT_Group", rational_modes, RationalMLP, needs="triton"
    ),
    "kan-gpt": Peer("kan_gpt.efficient_kan.model", "KAN", lambda grid: {"": {"grid": 3}}, SplineMLP),
    "cheby-kan": Peer("ChebyKANLayer", "ChebyKANLayer", chebyshev),
}


def load_peers(text: str) -> tuple[Layers, dict[str, str]]:
    """The layer classes that NAME=PATH,NAME=PATH asks for, and the reason for each that is missing.

    A name without a path means the installed package. That package, or a module that a peer needs, may be missing.
    Raises UserError if `text` is wrong.
    """
    layers: Layers = {}
    missing: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, path = part.strip().partition("=")
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}; write NAME=PATH with a name out of {', '.join(PEERS)}")
        root = find_root(name, Path(expand_home(path))) if equals else None
        needed = PEERS[name].needs
        if root is None and not importlib.util.find_spec(PEERS[name].package):
            missing[name] = f"it is not installed, and --peers {name}=PATH does not say where it is"
        elif needed and not PathFinder.find_spec(needed, [str(root or ""), *sys.path]):
            missing[name] = f"it needs {needed}, which is not installed (its README says how)"
        else:
            layers[name] = load_layer(name, root)
    return layers, missing


def find_root(name: str, path: Path) -> Path:
    """The folder of the checkout `path` from which the peer is imported. Raises UserError if there is none."""
    file = PEERS[name].file
    for root in (path, path / "src"):
        if (root / file).is_file():
            return root
    what = f"has no {file}" if path.is_dir() else "is no folder"
    raise UserError(f"peer {name}: {path} {what}; give the folder of a checkout of {name}")


def load_layer(name: str, root: Path | None = None) -> type[nn.Module]:
    """Import the peer's class from below `root`, or the installed one. Raises UserError if that fails."""
    peer = PEERS[name]
    path = sys.path[:]
    if root is not None:
        sys.path.insert(0, str(root))  # its modules import each other by their full names
    try:
        with warnings.catch_warnings():  # nobody who times it could act on them
            warnings.simplefilter("ignore")
            module = importlib.import_module(peer.module)
        if root is not None and not Path(module.__file__ or "").resolve().is_relative_to(root.resolve()):
            raise ImportError(f"Python prefers the one at {module.__file__}")
        return getattr(module, peer.layer)
    except Exception as error:  # its code may do anything
        raise UserError(f"peer {name}: {root or 'the installed package'} is unusable ({in_one_line(error)})") from error
    finally:
        sys.path[:] = path


def peer_builders(layers: Layers, case: Case) -> dict[str, Callable[[], nn.Module]]:
    """For each peer and mode its name and a function that builds it."""
    return {
        f"{name} {mode}".strip(): partial(build_peer, PEERS[name], layer, case, keywords)
        for name, layer in layers.items()
        for mode, keywords in PEERS[name].modes(case.grid).items()
    }


def build_peer(peer: Peer, layer: type[nn.Module], case: Case, keywords: dict[str, Any]) -> nn.Module:
    if keywords.get("impl") == "embedding":  # needs as much memory as our backend of that name
        problem = Problem(case.width, case.grid, case.width, torch.device("cpu"), case.tokens)
        reason = BACKENDS["embedding"].why_not(problem)
        if reason is not None:
            raise CannotRun(reason)
    with contextlib.redirect_stdout(io.StringIO()):  # one of them prints
        return peer.build(layer, case, keywords)
