// The problem that a call solves: its shapes, and the grid in which inputs are located.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace {

struct Shape {  // mirrored in native_shape.py
    int64_t tokens, inputs, points, outputs, threads;
    int64_t x_half, weight_half, y_half;  // bfloat16 rather than float32; a gradient has the type of its tensor
    double width;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(first output, count of outputs, count of vectors) for strips that cover the outputs: as few as max_vectors
// allows, and as even as they can be, because every token costs a strip some time of its own. The last one is padded.
template <typename Body>
void for_strips(int64_t output, int64_t output_end, int max_vectors, Body body) {
    int64_t vectors_left = ceil_div(output_end - output, LANES);
    for (int64_t strips_left = ceil_div(vectors_left, max_vectors); strips_left > 0; strips_left--) {
        const int vectors = int(ceil_div(vectors_left, strips_left));
        body(output, int(std::min<int64_t>(vectors * LANES, output_end - output)), vectors);
        output += vectors * LANES;
        vectors_left -= vectors;
    }
}

// The result of body with `vectors`, from 1 to `most`, as a constant of its type, std::integral_constant<int, vectors>.
template <int most, typename Body>
auto with_constant(int vectors, Body body) {
    if constexpr (most > 1)
        if (vectors < most) return with_constant<most - 1>(vectors, body);
    return body(std::integral_constant<int, most>());
}

// The number of threads that this much work is worth: more would cost more than they save.
inline int useful_threads(const Shape& shape) {
    const double multiply_adds = 2.0 * shape.tokens * shape.inputs * shape.outputs;
    return int(std::max(1.0, std::min(double(shape.threads), multiply_adds / 50000)));
}

// Calls body(first token, end of tokens, first output, end of outputs) in parallel for blocks of up to max_tokens tokens,
// whose sums take at most 1.5 MiB. With few tokens the outputs are divided as well, so that every thread has work; then
// a block may have no outputs.
template <typename Body>
void for_blocks(const Shape& shape, int64_t max_tokens, Body body) {
    const int threads = useful_threads(shape);
    const int64_t fitting = std::clamp<int64_t>((3 << 17) / shape.outputs, 64, max_tokens);
    const int64_t even_blocks = ceil_div(ceil_div(shape.tokens, fitting), threads) * threads;
    const int64_t block = ceil_div(shape.tokens, even_blocks), blocks = ceil_div(shape.tokens, block);
    const int64_t parts = blocks < threads ? ceil_div(threads, blocks) : 1;
    const int64_t part = ceil_div(ceil_div(shape.outputs, parts), LANES) * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t p = 0; p < parts; p++)
            body(b * block, std::min((b + 1) * block, shape.tokens), p * part,
                 std::min((p + 1) * part, shape.outputs));
}

constexpr int CHUNK = 16;  // features located together: a cache line of x

class Grid {
  public:
    Grid(int points, double width)
        : half_width_(width / 2), spacing_(width / (points - 1)), inverse_(1 / spacing_), last_(points - 2) {}

    float inverse_spacing() const { return float(inverse_); }

    // Cells and places of CHUNK inputs. NaN falls in cell 0 with place NaN.
    void locate(const float* __restrict x, int32_t* __restrict cell, float* __restrict place) const {
        for (int k = 0; k < CHUNK; k++) {
            // x / spacing, rounded as a division would (Markstein 1990) at a sixth of its time.
            const double from_first = x[k] + half_width_, rough = from_first * inverse_;
            const double rest = from_first - spacing_ * rough;
            const double u = rough + (rest == rest ? rest : 0) * inverse_;  // infinity - infinity is NaN
            const double from_zero = u > 0 ? u : 0;                         // also: NaN to 0
            cell[k] = int32_t(from_zero < last_ ? from_zero : last_);
            place[k] = float(u - cell[k]);
        }
    }

  private:
    double half_width_, spacing_, inverse_, last_;
};

}  // namespace
