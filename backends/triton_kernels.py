"""The Triton kernels of `triton`: the spline layer as matrix products with an operand that is built from x on the way.

With u the position of x in knot units, D_k = W_{k+1} - W_k the rise over cell k, and the ramp r_k(u) = u - k clamped to
[0, 1] (the first ramp unclamped below, the last above: linear extrapolation):

    forward      y = Σ_i W_0 + Σ_k r_k(u) @ D_k        G-1 products: ramps, not hats, save one of G
    gradient x   dx = (dy @ D_kᵀ) / h                  G-1 products, each kept where x is in cell k
    gradient W   dW_g = hat_g(u)ᵀ @ dy                 G products: hats, so that unused control points get exactly zero

The forward and the gradient of W compute the transposed product. What is built from x is then the right operand, which
Hopper's tensor cores read from shared memory. A left one would stay in registers, and there Triton 3.6 overwrites
registers that a product still reads (triton issue 9433). Several ramps or hats of a tile of x make one operand, so that
x is fetched once for them and there is enough to multiply between two waits.

The sums are float32. No kernel uses atomics, so results are the same at every run. Rows of x, dy, D and y must be
multiples of 16 values long: copies take 16 bytes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def ramp(x, first, j: tl.constexpr, inverse_spacing, CELLS: tl.constexpr, SPAN: tl.constexpr):
    """The share of cell k = first + j left of x; 1 for k = -1 and 0 for k ≥ CELLS. `first` is a multiple of SPAN.

    Only at some places j of a group can k be the first or last cell, or none; at all others the ramp is one saturating
    multiply-add. That one turns NaN into 0, but the first ramp keeps it.
    """
    ONLY: tl.constexpr = SPAN > CELLS  # there is one group: first is 0
    k = first + j
    ramp = x * inverse_spacing + (CELLS / 2 - k)
    if ONLY and j < 0:
        ramp = tl.full(x.shape, 1.0, tl.float32)
    elif ONLY and j >= CELLS:
        ramp = tl.zeros(x.shape, tl.float32)
    elif j <= 0 or (CELLS - 1 - j) % SPAN == 0 or (CELLS - j) % SPAN == 0:
        lowest = tl.where(k < 0, 1.0, tl.where(k == 0, float("-inf"), 0.0))
        highest = tl.where(k >= CELLS, 0.0, tl.where(k == CELLS - 1, float("inf"), 1.0))
        ramp = tl.maximum(ramp, lowest, propagate_nan=tl.PropagateNan.ALL)
        ramp = tl.minimum(ramp, highest, propagate_nan=tl.PropagateNan.ALL)
    else:
        ramp = tl.minimum(tl.maximum(ramp, 0.0), 1.0)
    return ramp


@triton.jit
def basis_function(
    x, first, j: tl.constexpr, inverse_spacing, CELLS: tl.constexpr, SPAN: tl.constexpr, HATS: tl.constexpr
):
    """Ramp or hat number first + j at x. A hat is what its two ramps differ by."""
    right = ramp(x, first, j, inverse_spacing, CELLS, SPAN)
    if HATS:
        return ramp(x, first, j - 1, inverse_spacing, CELLS, SPAN) - right
    return right


@triton.jit
def basis(
    x,
    first,
    j: tl.constexpr,
    inverse_spacing,
    CELLS: tl.constexpr,
    SPAN: tl.constexpr,
    COUNT: tl.constexpr,  # 1, 2, 4 or 8
    HATS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Ramps or hats number first + j and the next ones beside each other: (N, I) → (N, COUNT·I)."""
    if COUNT == 1:
        return basis_function(x, first, j, inverse_spacing, CELLS, SPAN, HATS).to(DTYPE)
    else:  # which Triton needs to see: it compiles what follows a return, too
        HALF: tl.constexpr = COUNT // 2
        left = basis(x, first, j, inverse_spacing, CELLS, SPAN, HALF, HATS, DTYPE)
        right = basis(x, first, j + HALF, inverse_spacing, CELLS, SPAN, HALF, HATS, DTYPE)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


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
    GROUP: tl.constexpr,  # ramps that make one operand
    SPAN: tl.constexpr,  # ramps for which x is fetched once, a multiple of GROUP
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    first_n = tl.program_id(0) // output_tiles * BLOCK_N
    first_o = tl.program_id(0) % output_tiles * BLOCK_O
    n, o, i = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    row = tl.arange(0, GROUP * BLOCK_I)
    n_mask, o_mask = n < tokens - first_n, o < outputs - first_o
    x_offsets = tl.minimum(n, tokens - first_n - 1)[:, None] * inputs + i[None, :]
    rise_offsets = (row // BLOCK_I * inputs.to(tl.int64) + row % BLOCK_I)[:, None] * outputs + o[None, :]
    x_pointer += first_n.to(tl.int64) * inputs
    y = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    GROUPS: tl.constexpr = (CELLS + SPAN - 1) // SPAN
    for step in range(tl.cdiv(inputs, BLOCK_I) * GROUPS):  # one loop, as only the innermost is pipelined
        first_i = step // GROUPS * BLOCK_I
        first = step % GROUPS * SPAN
        x = tl.load(x_pointer + first_i + x_offsets).to(tl.float32)
        for j in tl.static_range(0, SPAN, GROUP):
            start = ((first + j) * inputs.to(tl.int64) + first_i) * outputs + first_o
            rise_mask = o_mask[None, :]
            if CELLS % SPAN != 0:
                rise_mask &= (row // BLOCK_I < CELLS - first - j)[:, None]
            rise = tl.load(rise_pointer + start + rise_offsets, rise_mask, 0.0)
            ramps = basis(x, first, j, inverse_spacing, CELLS, SPAN, GROUP, False, rise.dtype)
            y = tl.dot(tl.trans(rise), tl.trans(ramps), y, input_precision=PRECISION)
    y += tl.load(first_pointer + first_o + o, o_mask, 0.0)[:, None]
    y_pointer += first_n.to(tl.int64) * outputs + first_o
    y_offsets = n[None, :] * outputs + o[:, None]
    tl.store(y_pointer + y_offsets, y.to(y_pointer.dtype.element_ty), n_mask[None, :] & o_mask[:, None])


@triton.jit
def cell_kernel(
    x_pointer,  # (N, I)
    edge_pointer,  # (G,) float32: the smallest x of each cell, then +Inf
    cell_pointer,  # (blocks of tokens, blocks of inputs, BLOCK_N, BLOCK_I/2) unsigned integers
    tokens,
    inputs,
    inverse_spacing,
    CELLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Numbers of the cells that x is in. Those of the two halves of a block share an integer."""
    HALF: tl.constexpr = BLOCK_I // 2
    input_tiles = tl.cdiv(inputs, BLOCK_I)
    n = (tl.program_id(0) // input_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) % input_tiles * BLOCK_I + tl.arange(0, HALF)
    pair = tl.zeros((BLOCK_N, HALF), tl.uint32)
    for half in tl.static_range(2):
        column = i + half * HALF
        mask = (n < tokens)[:, None] & (column < inputs)[None, :]
        x = tl.load(x_pointer + n[:, None] * inputs + column[None, :], mask, 0.0).to(tl.float32)
        position = tl.minimum(tl.maximum(x * inverse_spacing + CELLS / 2, 0.0), CELLS - 1)
        guess = tl.minimum(tl.maximum(position.to(tl.int32), 0), CELLS - 1)  # of NaN too
        guess -= (x < tl.load(edge_pointer + guess)).to(tl.int32)
        guess += (x >= tl.load(edge_pointer + guess + 1)).to(tl.int32)
        cell = tl.minimum(guess, CELLS - 1).to(tl.uint32)
        pair |= cell << (half * cell_pointer.dtype.element_ty.primitive_bitwidth // 2)
    cell_pointer += tl.program_id(0).to(tl.int64) * (BLOCK_N * HALF)
    offsets = tl.arange(0, BLOCK_N)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(cell_pointer + offsets, pair.to(cell_pointer.dtype.element_ty))


@triton.jit
def rounded_pair(low, high, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Two float32 numbers rounded to a type of 16 bits, whose bits share an integer."""
    if INTERPRETED:
        low = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        pair = low | (high << 16)
    else:  # Triton makes up to four instructions of these; the first source of this one goes to the upper half
        ASSEMBLY: tl.constexpr = f"cvt.rn.{'bf16' if DTYPE.is_bf16() else 'f16'}x2.f32 $0, $2, $1;"
        pair = tl.inline_asm_elementwise(ASSEMBLY, "=r,f,f", [low, high], tl.uint32, True, 1)
    return pair


@triton.jit
def number(bits, DTYPE: tl.constexpr):
    """Whose 16 bits these are."""
    return bits.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def grad_x_kernel(
    grad_y_pointer,  # (N, O)
    cell_pointer,  # as cell_kernel makes it with the same blocks
    rise_pointer,  # (G-1, I, O)
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
    INTERPRETED: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_I // 2
    DTYPE: tl.constexpr = grad_y_pointer.dtype.element_ty
    PACKED: tl.constexpr = DTYPE.primitive_bitwidth == 16  # two results in a register
    CELL_BITS: tl.constexpr = cell_pointer.dtype.element_ty.primitive_bitwidth // 2
    input_tiles = tl.cdiv(inputs, BLOCK_I)
    first_n = tl.program_id(0) // input_tiles * BLOCK_N
    first_i = tl.program_id(0) % input_tiles * BLOCK_I
    n, i, o, h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O), tl.arange(0, HALF)
    grad_y_pointer += first_n.to(tl.int64) * outputs
    y_offsets = tl.minimum(n, tokens - first_n - 1)[:, None] * outputs + o[None, :]
    rise_pointer += first_i.to(tl.int64) * outputs
    rise_offsets = tl.minimum(i, inputs - first_i - 1)[:, None] * outputs + o[None, :]
    cell_pointer += tl.program_id(0).to(tl.int64) * (BLOCK_N * HALF)
    picked = tl.zeros((BLOCK_N, HALF), tl.uint32 if PACKED else tl.float32)
    picked_right = tl.zeros((BLOCK_N, HALF), tl.float32)  # not used if packed
    for k in range(CELLS):
        in_cell = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        for first_o in range(0, outputs, BLOCK_O):
            grad_y = tl.load(grad_y_pointer + first_o + y_offsets)
            rise = tl.load(rise_pointer + first_o + rise_offsets)
            in_cell = tl.dot(grad_y, tl.trans(rise), in_cell, input_precision=PRECISION)
        rise_pointer += inputs.to(tl.int64) * outputs
        left, right = tl.split(tl.permute(tl.reshape(in_cell, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        # Volatile, lest they be fetched before the loop and hold registers in it.
        cells = tl.load(cell_pointer + n[:, None] * HALF + h[None, :], volatile=True).to(tl.uint32)
        if PACKED:
            if CELL_BITS == 8:
                cells = (cells | (cells << 8)) & 0x00FF00FF
            differs = (
                cells ^ (tl.cast(k, tl.uint32) * 0x00010001)
            ) + 0x7FFF7FFF  # the highest bit of either half says so
            here = (((differs & 0x80008000) ^ 0x80008000) >> 15) * 0xFFFF
            picked |= rounded_pair(left, right, DTYPE, INTERPRETED) & here
        else:
            picked = tl.where((cells & ((1 << CELL_BITS) - 1)) == k, left, picked)
            picked_right = tl.where((cells >> CELL_BITS) == k, right, picked_right)
    if PACKED:
        picked_right = number(picked >> 16, DTYPE)
        picked_left = number(picked & 0xFFFF, DTYPE)
    else:
        picked_left = picked
    grad_x_pointer += first_n.to(tl.int64) * inputs + first_i
    x_offsets = n[:, None] * inputs + h[None, :]
    DX: tl.constexpr = grad_x_pointer.dtype.element_ty
    n_mask = n < tokens - first_n
    left_mask = n_mask[:, None] & (h < inputs - first_i)[None, :]
    tl.store(grad_x_pointer + x_offsets, (picked_left * inverse_spacing).to(DX), left_mask)
    right_mask = n_mask[:, None] & (h < inputs - first_i - HALF)[None, :]
    tl.store(grad_x_pointer + HALF + x_offsets, (picked_right * inverse_spacing).to(DX), right_mask)


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
    FIRST: tl.constexpr,  # hat, a multiple of GROUP
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # hats that make one operand
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    POINTS: tl.constexpr = CELLS + 1
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    first_o = tl.program_id(0) % output_tiles * BLOCK_O
    first = FIRST + tl.program_id(0) // output_tiles % GROUPS * GROUP
    first_i = tl.program_id(0) // (output_tiles * GROUPS) * BLOCK_I
    split = tl.program_id(1).to(tl.int64)
    n, o, i = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    o_mask = o < outputs - first_o
    x_offsets = n[:, None] * inputs + i[None, :]
    y_offsets = n[:, None] * outputs + o[None, :]
    x_pointer += split * split_tokens * inputs + first_i
    grad_y_pointer += split * split_tokens * outputs + first_o
    grad = tl.zeros((BLOCK_O, GROUP * BLOCK_I), tl.float32)
    for remaining in range(tl.minimum(split_tokens, tokens - split * split_tokens).to(tl.int32), 0, -BLOCK_N):
        n_mask = (n < remaining)[:, None]
        x = tl.load(x_pointer + x_offsets, n_mask, 0.0).to(tl.float32)
        grad_y = tl.load(grad_y_pointer + y_offsets, n_mask & o_mask[None, :], 0.0)
        hats = basis(x, first, 0, inverse_spacing, CELLS, GROUP, GROUP, True, grad_y.dtype)
        grad = tl.dot(tl.trans(grad_y), hats, grad, input_precision=PRECISION)
        x_pointer += BLOCK_N * inputs
        grad_y_pointer += BLOCK_N * outputs
    column = tl.arange(0, GROUP * BLOCK_I)
    g, i = first + column // BLOCK_I, first_i + column % BLOCK_I
    offsets = (((split * inputs + i) * POINTS + g) * outputs)[None, :] + (first_o + o)[:, None]
    tl.store(grad_pointer + offsets, grad, o_mask[:, None] & ((i < inputs) & (g < POINTS))[None, :])
