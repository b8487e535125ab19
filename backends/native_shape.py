"""The arguments of native.cpp's functions: shapes, dtypes, threads, and the addresses of tensors."""

import ctypes

import torch
from torch import Tensor


class Shape(ctypes.Structure):
    """`struct Shape` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "points", "outputs", "threads")),
        *((name, ctypes.c_int64) for name in ("x_half", "weight_half", "y_half")),
        ("width", ctypes.c_double),
    )


def shape_of(
    x: Tensor, points: int, spline_width: float, outputs: int = 1, weight_half: bool = False, y_half: bool = False
) -> Shape:
    """The shape for x (N, I) and splines of `points` control points, on PyTorch's number of threads."""
    half = x.dtype is torch.bfloat16, weight_half, y_half
    return Shape(*x.shape, points, outputs, torch.get_num_threads(), *half, spline_width)


def addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
