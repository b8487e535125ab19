// Sums of products of modes: the control points of functions on a G x G grid from their coefficients,
//     to[i,a,b,o] = sum_cd modes[a,c] modes[b,d] scales[c,d] from[i,c,d,o]
// and the transpose, which takes gradients of control points to those of coefficients. The arithmetic is small, so memory
// decides the time: every value is read once and written once.

#pragma once

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

struct ModeSums {
    int64_t inputs, points, outputs, threads;
    const float *modes, *scales;  // (G, G): a mode in each column; the scale of each product of two modes
    bool transposed;

    void run(const float* from, float* to) const {
        const int64_t rows = points * points, cached = (24 << 10) / (2 * rows * LANES * int64_t(sizeof(float)));
        const int vectors_in_strip = int(std::clamp<int64_t>(cached, 1, MAX_VECTORS / 2));
#pragma omp parallel for schedule(static) num_threads(int(threads))
        for (int64_t i = 0; i < inputs; i++) {
            Buffer<float> values(rows * vectors_in_strip * LANES), along_z(rows * vectors_in_strip * LANES);
            const Rows read{(char*)(from + i * rows * outputs), false, outputs};
            const Rows write{(char*)(to + i * rows * outputs), false, outputs};
            for_strips(0, outputs, vectors_in_strip, [&](int64_t o, int count, int vectors) {
                const int64_t length = vectors * LANES, slab = points * length;
                for (int64_t r = 0; r < rows; r++) {
                    read.read(r, o, count, int(length), values + r * length);
                    if (!transposed) scale(values + r * length, scales[r], length);
                }
                for (int64_t a = 0; a < points; a++)
                    for (int64_t k = 0; k < length; k += LANES)
                        multiply(values + a * slab + k, length, along_z + a * slab + k);
                for (int64_t k = 0; k < slab; k += LANES) multiply(along_z + k, slab, values + k);
                for (int64_t r = 0; r < rows; r++) {
                    if (transposed) scale(values + r * length, scales[r], length);
                    write.write(r, o, count, values + r * length);
                }
            });
        }
    }

    static void scale(float* row, float factor, int64_t length) {
        for (int64_t k = 0; k < length; k += LANES) store(row + k, factor * load(row + k));
    }

    // The product of the modes, or of their transpose, with `points` vectors that are `stride` floats apart.
    void multiply(const float* from, int64_t stride, float* to) const {
        const int64_t across = transposed ? 1 : points, along = transposed ? points : 1;
        for (int64_t a = 0; a < points; a += AT_ONCE)
            with_constant<AT_ONCE>(int(std::min<int64_t>(AT_ONCE, points - a)), [&](auto count) {
                Vector sum[count.value] = {};
                const float* factor = modes + a * across;
                for (int64_t c = 0; c < points; c++, factor += along) {
                    const Vector value = load(from + c * stride);
#pragma GCC unroll 8
                    for (int k = 0; k < count.value; k++) sum[k] += factor[k * across] * value;
                }
#pragma GCC unroll 8
                for (int k = 0; k < count.value; k++) store(to + (a + k) * stride, sum[k]);
            });
    }

    static constexpr int AT_ONCE = 4;  // sums that do not wait for each other
};

}  // namespace
