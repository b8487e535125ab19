"""Splines of pairs of features: y[n,o] = Σ_i f_io(x[n,i], z[n,i]), each f_io linear on triangles of a uniform grid.

The control points of each f_io are its values at the knots of a G x G grid over [-w/2, w/2]². The diagonal on which
both inputs are equally far into a cell divides it into two triangles (Kuhn 1960). Beyond the grid, f_io goes on
straight from the nearest point of it, so that planes are exact everywhere.
"""

import torch
from torch import Tensor

from backends import native_pairs, standard, standard_pairs


def pair_sum(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> Tensor:
    """The sums of the functions of pairs, by the native kernel where it can run, else in standard operators.

    x and z (N, I), control_points (I, G, G, O), x's knot before z's → (N, O), in the dtype of x, but float32 for half
    precisions, also under autocast. NaN spoils only the outputs of its own row.

    Raises ValueError for shapes that do not fit together, fewer than two knots, or a width that is not positive.
    """
    standard_pairs.check_arguments(x, z, control_points, spline_width)
    if _is_for_kernel(x, z, control_points):
        return native_pairs.pair_sum_op(x.float(), z.float(), control_points.float(), spline_width)
    return standard_pairs.pair_sum(x, z, control_points, spline_width)


def _is_for_kernel(*tensors: Tensor) -> bool:
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    narrow = torch.float64 not in (tensor.dtype for tensor in tensors)
    return on_cpu and narrow and not standard.is_wanted()
