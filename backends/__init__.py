"""The ways to compute a spline layer: one module each, and a registry that says which can run here.

Every backend is a function `spline_sum(x, control_points, spline_width, dtype)`: x (N, I) of any floating dtype and
control_points (I, G, O) give y (N, O) in `dtype`. All backends agree with `reference`.
"""

from backends import (
    amx,
    chunked,
    csr,
    cuda_choice,
    dense,
    embedding,
    embedding_bag,
    native,
    reference,
    semi_structured,
    triton,
)
from backends.problem import Backend, Problem, SplineSum, why_no_gather

__all__ = ["ALIASES", "BACKENDS", "IMPLS", "Backend", "Problem", "SplineSum", "availability", "choose"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", reference.spline_sum, why_no_gather),
        Backend("embedding_bag", embedding_bag.spline_sum),
        Backend("embedding", embedding.spline_sum, why_no_gather),
        Backend("csr", csr.spline_sum, csr.why_not),
        Backend("dense", dense.spline_sum),
        Backend("chunked", chunked.spline_sum),
        Backend("native", native.spline_sum, native.why_not),
        Backend("amx", amx.spline_sum, amx.why_not),
        Backend("semi_structured", semi_structured.spline_sum, semi_structured.why_not, semi_structured.caveat),
        Backend("triton", triton.spline_sum, triton.why_not),
    )
}
ALIASES = {"sparse_matmul_csr": "csr"}
IMPLS = ("auto", *BACKENDS, *ALIASES)

# Without a kernel of ours, `dense`, whose work grows with G, trains faster up to this grid than the backends whose work
# does not. Measured on two CPU cores by `python bench/layer.py` (docs/log.md), where the two are equally fast between
# 16 and 32; a guess for other devices.
LARGEST_DENSE_GRID = 20

# `amx` in bfloat16 against `native`: 1.5 times as fast at G=3 and slower from G=5 on (768 x 128 → 256).
LARGEST_AMX_GRID = 4


def availability(problem: Problem) -> dict[str, str | None]:
    """For every backend, None if it can compute `problem` on this machine, else why it cannot."""
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
    caveat = backend.caveat(problem)
    return backend, "asked for" + (f"; {caveat}" if caveat else "")


def _choose_automatically(problem: Problem) -> tuple[Backend, str]:
    grid, kind, aside = problem.num_control_points, problem.device.type, ""
    if kind == "meta":
        return BACKENDS["dense"], "auto: another is chosen once the layer has a device"
    if kind == "cuda":
        name, why = cuda_choice.pick(problem, {name: backend.why_not for name, backend in BACKENDS.items()})
        return BACKENDS[name], why
    if grid <= LARGEST_AMX_GRID and BACKENDS["amx"].why_not(problem) is None:
        return BACKENDS["amx"], f"auto: the fastest on CPUs with AMX up to {LARGEST_AMX_GRID} control points"
    if kind == "cpu":
        no_kernel = BACKENDS["native"].why_not(problem)
        if no_kernel is None:
            return BACKENDS["native"], "auto: the fastest on CPUs"
        aside = f", as native cannot be used: {no_kernel}"
    if grid <= LARGEST_DENSE_GRID:
        return BACKENDS["dense"], f"auto: fastest in training up to {LARGEST_DENSE_GRID} control points{aside}"
    if BACKENDS["csr"].why_not(problem) is None:
        return BACKENDS["csr"], f"auto: fastest in training above {LARGEST_DENSE_GRID} control points{aside}"
    return BACKENDS["embedding_bag"], f"auto: its work does not grow with the {grid} control points{aside}"
