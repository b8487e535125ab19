"""The ways to compute a spline layer: one module each, one signature, and a registry that says which can run here.

Every backend is a function `spline_sum(x, control_points, spline_width, dtype)`:
x (N, I) of any floating dtype, control_points (I, G, O), → y (N, O) in `dtype`. All agree with `reference`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backends import (
    amx,
    csr,
    dense,
    embedding,
    embedding_bag,
    instruction_set,
    native,
    native_build,
    reference,
    semi_structured,
    triton,
)

SplineSum = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]

# Backends that write out the control points of every (token, feature) pair stop being a good idea above this.
LARGEST_GATHER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Problem:
    """What has to be computed: the layer's shape and where it runs. `tokens` is the N of a step, where known."""

    in_features: int
    num_control_points: int
    out_features: int
    device: torch.device
    tokens: int | None = None


WhyNot = Callable[[Problem], str | None]


def _runs_anywhere(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute the layer.

    `why_not(problem)` is the reason why it cannot do so here, or None; `but(problem)` what to know where it can.
    """

    name: str
    spline_sum: SplineSum
    why_not: WhyNot
    but: WhyNot = _runs_anywhere


def _except_on_meta(why_not: WhyNot) -> WhyNot:
    """Decorates a check of the device: on PyTorch's meta device nothing is computed, so anything can be there."""

    @functools.wraps(why_not)
    def check(problem: Problem) -> str | None:
        return None if problem.device.type == "meta" else why_not(problem)

    return check


def _gather_fits(problem: Problem) -> str | None:
    needed = (problem.tokens or 0) * problem.in_features * problem.out_features * 4 * 2
    if needed > LARGEST_GATHER_BYTES:
        return (
            f"it gathers two rows of {problem.out_features} values for each of {problem.tokens} tokens and "
            f"{problem.in_features} features, {needed / 2**30:.0f} GiB in all (at most "
            f"{LARGEST_GATHER_BYTES / 2**30:.0f} GiB is allowed)"
        )
    return None


@_except_on_meta
def _sparse_matmul_exists(problem: Problem) -> str | None:
    if problem.device.type == "cpu" and not torch.backends.mkl.is_available():
        return "this PyTorch is built without MKL, which holds the sparse matrix products for CPUs"
    if problem.device.type not in ("cpu", "cuda"):
        return f"PyTorch has no CSR matrix products on {problem.device.type}"
    if problem.in_features * problem.num_control_points >= 2**31:
        return "in_features x num_control_points does not fit the int32 column indices"
    return None


@_except_on_meta
def _kernel_can_be_built(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it is for CPUs, and the layer is on {problem.device.type}"
    return native_build.why_not()


@_except_on_meta
def _has_matrix_units(problem: Problem) -> str | None:
    on_cpu = problem.device.type == "cpu"
    return (instruction_set.why_no_amx() if on_cpu else None) or _kernel_can_be_built(problem)


def _is_sparse(problem: Problem) -> str | None:
    return semi_structured.why_not(problem.num_control_points)


def _writes_zeros(problem: Problem) -> str | None:
    reason = semi_structured.why_dense(problem.in_features, problem.out_features, problem.device)
    return reason and f"with its zeros written out, as {reason}"


@_except_on_meta
def _triton_runs(problem: Problem) -> str | None:
    return triton.why_not(problem.device)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", reference.spline_sum, _gather_fits),
        Backend("embedding_bag", embedding_bag.spline_sum, _runs_anywhere),
        Backend("embedding", embedding.spline_sum, _gather_fits),
        Backend("csr", csr.spline_sum, _sparse_matmul_exists),
        Backend("dense", dense.spline_sum, _runs_anywhere),
        Backend("native", native.spline_sum, _kernel_can_be_built),
        Backend("amx", amx.spline_sum, _has_matrix_units),
        Backend("semi_structured", semi_structured.spline_sum, _is_sparse, _writes_zeros),
        Backend("triton", triton.spline_sum, _triton_runs),
    )
}
ALIASES = {"sparse_matmul_csr": "csr"}
IMPLS = ("auto", *BACKENDS, *ALIASES)

# Where there is no kernel of ours: up to this grid `dense`, whose work grows with G, trains faster than those whose
# work does not. Measured on two CPU cores by `python bench/layer.py` (docs/log.md), where they meet between 16 and 32;
# a guess for other devices.
LARGEST_DENSE_GRID = 20

# `amx` in bfloat16 against `native`: 1.5 times as fast at G=3 and slower from G=5 on (768 x 128 → 256).
LARGEST_AMX_GRID = 4


def availability(problem: Problem) -> dict[str, str | None]:
    """For every backend, None if it can compute `problem` on this machine, else the reason why not."""
    return {name: backend.why_not(problem) for name, backend in BACKENDS.items()}


def choose(impl: str, problem: Problem) -> tuple[Backend, str]:
    """The backend for `impl` and a phrase saying why. Raises ValueError if `impl` is unknown or cannot run here."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    if impl == "auto":
        return _choose_automatically(problem)
    backend = BACKENDS[ALIASES.get(impl, impl)]
    reason = backend.why_not(problem)
    if reason is not None:
        usable = [name for name, missing in availability(problem).items() if missing is None]
        raise ValueError(f"impl {impl!r} cannot be used here: {reason}; use auto or one of {', '.join(usable)}")
    but = backend.but(problem)
    return backend, "asked for" + (f"; {but}" if but else "")


KERNELS = {"cpu": ("native", "auto: the fastest on CPUs"), "cuda": ("triton", "auto: made for tensor cores")}


def _choose_automatically(problem: Problem) -> tuple[Backend, str]:
    aside = ""
    grid = problem.num_control_points
    if problem.device.type == "meta":
        return BACKENDS["dense"], "auto: another is chosen once the layer has a device"
    if grid <= LARGEST_AMX_GRID and BACKENDS["amx"].why_not(problem) is None:
        return BACKENDS["amx"], f"auto: the fastest on CPUs with AMX up to {LARGEST_AMX_GRID} control points"
    if problem.device.type in KERNELS:
        name, why = KERNELS[problem.device.type]
        no_kernel = BACKENDS[name].why_not(problem)
        if no_kernel is None:
            return BACKENDS[name], why
        aside = f", as {name} cannot be used: {no_kernel}"
    if grid <= LARGEST_DENSE_GRID:
        return BACKENDS["dense"], f"auto: fastest in training up to {LARGEST_DENSE_GRID} control points{aside}"
    if BACKENDS["csr"].why_not(problem) is None:
        return BACKENDS["csr"], f"auto: fastest in training above {LARGEST_DENSE_GRID} control points{aside}"
    return BACKENDS["embedding_bag"], f"auto: its work does not grow with the {grid} control points{aside}"
