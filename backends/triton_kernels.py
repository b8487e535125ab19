"""The Triton kernels of `triton`: the spline layer as matrix products whose left operand is built in registers.

With u the position of x in knot units, D_k = W_{k+1} - W_k the rise over cell k, and the ramp r_k(u) = u - k clamped to
[0, 1] (the first ramp unclamped below, the last above: linear extrapolation):

    forward      y = Σ_i W_0 + Σ_k r_k(u) @ D_k        G-1 products: ramps, not hats, save one of G
    gradient x   dx = (dy @ D_kᵀ) / h                  G-1 products, each kept where x is in cell k
    gradient W   dW_g = hat_g(u)ᵀ @ dy                 G products: hats, so that unused control points get exactly zero

Tiles of the operand go from registers into the tensor cores and are never written to memory; nothing is saved but x.
The sums are float32. No kernel uses atomics, so results are the same at every run.
"""

import triton
import triton.language as tl


@triton.jit
def position(x, inverse_spacing, centre):
    """In knot units, to 2⁻²⁴ of its distance from the centre of the grid."""
    return x.to(tl.float32) * inverse_spacing + centre


@triton.jit
def clamp(value, lowest, highest):
    """NaN stays NaN."""
    value = tl.maximum(value, lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, highest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ramp(u, k, cells):
    """The share of cell k that lies left of u."""
    lowest = tl.where(k == 0, float("-inf"), 0.0)
    highest = tl.where(k == cells - 1, float("inf"), 1.0)
    return clamp(u - k, lowest, highest)


@triton.jit
def hat(u, g, cells):
    """The weight of control point g at u: min(1 + (u-g), 1 - (u-g)) above 0, with the outermost two cells going on."""
    lowest_rise = tl.where(g == 0, float("inf"), tl.where(g == 1, float("-inf"), 0.0))
    lowest_fall = tl.where(g == cells, float("inf"), tl.where(g == cells - 1, float("-inf"), 0.0))
    rising = tl.maximum(1.0 + (u - g), lowest_rise, propagate_nan=tl.PropagateNan.ALL)
    return clamp(1.0 - (u - g), lowest_fall, rising)


@triton.jit
def tile(row, column, rows, columns):
    """Offsets of a tile of a row-major matrix, and which of its places exist."""
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    return offsets, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def forward_kernel(
    x_pointer,  # (N, I)
    rise_pointer,  # (G-1, I, O)
    first_pointer,  # (O,) float32: Σ_i W_0
    y_pointer,  # (N, O)
    tokens,
    inputs,
    outputs,
    inverse_spacing,
    CELLS: tl.constexpr,
    GROUP: tl.constexpr,  # cells for which u is found once and whose rises are fetched together; divides CELLS
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    n = tl.program_id(0) // output_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(0) % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    y = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    groups = CELLS // GROUP
    for step in range(tl.cdiv(inputs, BLOCK_I) * groups):  # one loop, not two nested: only the innermost is pipelined
        i = step // groups * BLOCK_I + tl.arange(0, BLOCK_I)
        x_offsets, x_mask = tile(n, i, tokens, inputs)
        u = position(tl.load(x_pointer + x_offsets, x_mask, 0.0), inverse_spacing, CELLS / 2)
        rise_offsets, rise_mask = tile(i, o, inputs, outputs)
        for cell in tl.static_range(GROUP):
            k = step % groups * GROUP + cell
            rise = tl.load(rise_pointer + tl.cast(k, tl.int64) * inputs * outputs + rise_offsets, rise_mask, 0.0)
            y = tl.dot(ramp(u, k, CELLS).to(rise.dtype), rise, y, input_precision=PRECISION)
    y += tl.load(first_pointer + o, o < outputs, 0.0)[None, :]
    y_offsets, y_mask = tile(n, o, tokens, outputs)
    tl.store(y_pointer + y_offsets, y.to(y_pointer.dtype.element_ty), y_mask)


@triton.jit
def grad_x_kernel(
    grad_y_pointer,  # (N, O)
    x_pointer,  # (N, I)
    rise_pointer,  # (G-1, I, O)
    edge_pointer,  # (G,) float32: the smallest x of each cell, then +Inf
    grad_x_pointer,  # (N, I)
    tokens,
    inputs,
    outputs,
    inverse_spacing,
    CELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    input_tiles = tl.cdiv(inputs, BLOCK_I)
    n = tl.program_id(0) // input_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    x_offsets, x_mask = tile(n, i, tokens, inputs)
    grad_x = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for k in range(CELLS):
        in_cell = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        for first_output in range(0, outputs, BLOCK_O):
            o = first_output + tl.arange(0, BLOCK_O)
            y_offsets, y_mask = tile(n, o, tokens, outputs)
            rise_offsets, rise_mask = tile(i, o, inputs, outputs)
            grad_y = tl.load(grad_y_pointer + y_offsets, y_mask, 0.0)
            rise = tl.load(rise_pointer + tl.cast(k, tl.int64) * inputs * outputs + rise_offsets, rise_mask, 0.0)
            in_cell = tl.dot(grad_y, tl.trans(rise), in_cell, input_precision=PRECISION)
        x = tl.load(x_pointer + x_offsets, x_mask, 0.0).to(tl.float32)  # again, lest it hold registers in the loop
        is_here = (x >= tl.load(edge_pointer + k)) & (x < tl.load(edge_pointer + k + 1))
        grad_x += tl.where(is_here, in_cell, 0.0)
    grad_x *= inverse_spacing
    tl.store(grad_x_pointer + x_offsets, grad_x.to(grad_x_pointer.dtype.element_ty), x_mask)


@triton.jit
def grad_weight_kernel(
    grad_y_pointer,  # (N, O)
    x_pointer,  # (N, I)
    grad_pointer,  # (splits, I, G, O) float32
    tokens,
    inputs,
    outputs,
    inverse_spacing,
    split_tokens,
    CELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    points = CELLS + 1
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    g = tl.program_id(0) // output_tiles % points
    o = tl.program_id(0) % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(0) // (output_tiles * points) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    grad = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    start = split * split_tokens
    for first_token in range(start, tl.minimum(start + split_tokens, tokens), BLOCK_N):
        n = first_token + tl.arange(0, BLOCK_N)
        x_offsets = n.to(tl.int64)[None, :] * inputs + i[:, None]  # (BLOCK_I, BLOCK_N): transposed
        x_mask = (n < tokens)[None, :] & (i < inputs)[:, None]
        u = position(tl.load(x_pointer + x_offsets, x_mask, 0.0), inverse_spacing, CELLS / 2)
        y_offsets, y_mask = tile(n, o, tokens, outputs)
        grad_y = tl.load(grad_y_pointer + y_offsets, y_mask, 0.0)
        grad = tl.dot(hat(u, g, CELLS).to(grad_y.dtype), grad_y, grad, input_precision=PRECISION)
    row = (tl.cast(split, tl.int64) * inputs + i) * points + g
    offsets = row[:, None] * outputs + o[None, :]
    tl.store(grad_pointer + offsets, grad, (i < inputs)[:, None] & (o < outputs)[None, :])
