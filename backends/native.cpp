// The spline layer on a CPU, forward and backward for float32 and bfloat16, and in float32 splines of pairs of features,
// sums of their modes, and attention, behind a plain C ABI.
//
//     y[n,o] = sum_i (1-t) W[i,j,o] + t W[i,j+1,o],   cell j and place t found from x[n,i]
//
// All arithmetic is float32, except for the place on the grid, which is float64. bfloat16 is converted where rows are
// read and written, so the kernels see only padded float tiles. The order of each sum depends on neither the number of
// threads nor the other tokens of the batch, and no two threads write to the same place, so results are deterministic.

#include <cstdint>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/backward.h"
#include "cpu/basis.h"
#include "cpu/forward.h"
#include "cpu/mode_sums.h"
#include "cpu/pairs.h"
#include "cpu/pairs_backward.h"
#include "cpu/problem.h"

extern "C" {

void splinegpt_ramps(const Shape* shape, const void* x, uint16_t* ramps) { Basis(*shape, x).write_ramps(ramps); }

void splinegpt_hats(const Shape* shape, const void* x, uint16_t* hats) { Basis(*shape, x).write_hats(hats); }

void splinegpt_grad_x(const Shape* shape, const void* x, const uint16_t* grad_ramps, void* grad_x) {
    Basis(*shape, x).write_grad_x(grad_ramps, {(char*)grad_x, bool(shape->x_half), shape->inputs});
}

void splinegpt_forward(const Shape* shape, const void* x, const void* weight, void* y) {
    if (shape->tokens > 0) Forward(*shape, x, weight, y).run();
}

void splinegpt_backward(const Shape* shape, const void* x, const void* weight, const void* grad_y, void* grad_x,
                        float* grad_weight) {
    if (shape->tokens > 0)
        Backward(*shape, x, weight, grad_y, grad_x, grad_weight).run();
    else
        std::memset(grad_weight, 0, shape->inputs * shape->points * shape->outputs * sizeof(float));
}

void splinegpt_pairs_forward(const Shape* shape, const float* x, const float* z, const float* weight, float* y) {
    if (shape->tokens > 0) PairForward(*shape, x, z, weight, y).run();
}

void splinegpt_pairs_backward(const Shape* shape, const float* x, const float* z, const float* weight,
                              const float* grad_y, float* grad_x, float* grad_z, float* grad_weight) {
    if (shape->tokens > 0)
        PairBackward(*shape, x, z, weight, grad_y, grad_x, grad_z, grad_weight).run();
    else
        std::memset(grad_weight, 0, shape->inputs * shape->points * shape->points * shape->outputs * sizeof(float));
}

void splinegpt_mode_sums(int64_t inputs, int64_t points, int64_t outputs, int64_t threads, int64_t transposed,
                         const float* modes, const float* scales, const float* from, float* to) {
    ModeSums{inputs, points, outputs, threads, modes, scales, transposed != 0}.run(from, to);
}

void splinegpt_attention(const AttentionShape* shape, const float* qkv, const float* cosine, const float* sine, float* y,
                         float* statistics) {
    Attention(*shape, qkv, cosine, sine).forward(y, statistics);
}

void splinegpt_attention_backward(const AttentionShape* shape, const float* qkv, const float* cosine, const float* sine,
                                  const float* grad_y, const float* statistics, float* grad_qkv) {
    Attention(*shape, qkv, cosine, sine).backward(grad_y, statistics, grad_qkv);
}
}
