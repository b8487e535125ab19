// Causal attention of one head after another, from projected queries, keys and values to their mix, with rotary
// positions and QK-norm on the way. Scores are kept keys first, (keys, QUERIES), so that sums over keys are sums of
// vectors, and every product broadcasts a left factor to vectors of the right one.

#pragma once

#include <cmath>

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

struct AttentionShape {  // mirrored in attention_kernel.py
    int64_t batch, tokens, heads, head_size, threads, rotary, norm;

    int64_t width() const { return heads * head_size; }
};

constexpr int ROWS = REGISTERS / 4;  // of a product: two vectors of each stay in registers
constexpr int QUERIES = 32;          // in a block
constexpr float NORM_EPSILON = 1.1920929e-07f;  // of F.rms_norm in float32

// to (ROWS, vectors * LANES) = a (ROWS, depth) @ b (depth, vectors * LANES), or += it. In a, rows are a_row apart.
template <int vectors, int a_row>
void multiply_rows(const float* a, int64_t a_depth, const float* b, int64_t b_stride, int64_t depth, float* to,
                   int64_t to_stride, bool add) {
    Vector sum[ROWS][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++) sum[r][k] = add ? load(to + r * to_stride + k * LANES) : Vector{};
    for (int64_t n = 0; n < depth; n++, a += a_depth, b += b_stride) {
        Vector right[vectors];
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++) right[k] = load(b + k * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Vector left = splat(a[r * a_row]);
#pragma GCC unroll 2
            for (int k = 0; k < vectors; k++) sum[r][k] += left * right[k];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++) store(to + r * to_stride + k * LANES, sum[r][k]);
}

// The same for any multiple of ROWS and of LANES.
template <int a_row>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_depth, const float* b,
              int64_t b_stride, float* to, int64_t to_stride, bool add = false) {
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        const auto kernel = columns - c > LANES ? multiply_rows<2, a_row> : multiply_rows<1, a_row>;
        for (int64_t r = 0; r < rows; r += ROWS)
            kernel(a + r * a_row, a_depth, b + c, b_stride, depth, to + r * to_stride + c, to_stride, add);
    }
}

typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

// e^x for x <= 0, within two units in the last place (the polynomial of Cephes); 0 below -87; NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector round = splat(12582912.0f);  // 1.5 * 2^23: its last bit counts ones
    const Vector shifted = x * 1.44269504f + round, n = shifted - round;
    const Vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    const Vector power = (Vector)(((Integers)shifted - (Integers)round + 127) << 23);
    return x < -87.0f ? Vector{} : (p * f * f + f + 1.0f) * power;
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// One head's queries, keys or values: rows of `size` floats, padded with zeros, and their transpose.
struct HeadRows {
    int64_t tokens, padded, size;
    Buffer<float> rows, columns;  // (padded tokens, size) and (size, padded tokens)

    HeadRows(const AttentionShape& shape, int64_t padded_tokens, int64_t padded_size)
        : tokens(shape.tokens),
          padded(padded_tokens),
          size(padded_size),
          rows(padded * size),
          columns(padded * size) {}

    void read(const float* from, int64_t stride, int64_t count) {
        if (tokens < padded || count < size) std::memset(rows, 0, padded * size * sizeof(float));
        for (int64_t n = 0; n < tokens; n++) std::memcpy(rows + n * size, from + n * stride, count * sizeof(float));
    }
    void transpose() {
        for (int64_t n = 0; n < padded; n += LANES)
            for (int64_t k = 0; k < size; k++) {
                float* to = columns + k * padded + n;
                const float* from = rows + n * size + k;
#pragma omp simd
                for (int lane = 0; lane < LANES; lane++) to[lane] = from[lane * size];
            }
    }
};

// Rotation of pairs by the angle of their position, then division by the root mean square; both are optional.
struct Preparation {
    const AttentionShape& shape;
    const float *cosine, *sine;  // (tokens, head_size / 2)

    void apply(HeadRows& x, float* inverse_norm, float scale) const {
        const int64_t half = shape.head_size / 2;
        for (int64_t n = 0; n < shape.tokens; n++) {
            float* row = x.rows + n * x.size;
            if (shape.rotary) rotate(row, n, half, 1);
            inverse_norm[n] = 1;
            if (shape.norm) {
                float squares = 0;
#pragma omp simd reduction(+ : squares)
                for (int64_t k = 0; k < shape.head_size; k++) squares += row[k] * row[k];
                inverse_norm[n] = 1 / std::sqrt(squares / shape.head_size + NORM_EPSILON);
            }
            const float factor = inverse_norm[n] * scale;
#pragma omp simd
            for (int64_t k = 0; k < shape.head_size; k++) row[k] *= factor;
        }
    }

    // From the gradient of a prepared row to that of the row itself. `prepared` was multiplied by `scale`.
    void apply_backward(int64_t n, const float* prepared, float scale, float inverse_norm, float* grad) const {
        const int64_t size = shape.head_size;
        float along = 0;
        if (shape.norm) {
#pragma omp simd reduction(+ : along)
            for (int64_t k = 0; k < size; k++) along += prepared[k] * grad[k];
            along /= size * scale * scale;
        }
        const float factor = inverse_norm * scale;
#pragma omp simd
        for (int64_t k = 0; k < size; k++) grad[k] = factor * (grad[k] - along * prepared[k]);
        if (shape.rotary) rotate(grad, n, size / 2, -1);
    }

    void rotate(float* row, int64_t n, int64_t half, float direction) const {
        const float *c = cosine + n * half, *s = sine + n * half;
#pragma omp simd
        for (int64_t k = 0; k < half; k++) {
            const float first = row[k], second = row[half + k], turn = direction * s[k];
            row[k] = first * c[k] - second * turn;
            row[half + k] = first * turn + second * c[k];
        }
    }
};

struct Attention {
    const AttentionShape& shape;
    const float* qkv;  // (batch, tokens, 3, heads, head_size)
    Preparation preparation;
    int64_t padded, size;  // tokens and head_size in whole blocks and vectors
    float scale;

    Attention(const AttentionShape& s, const float* projections, const float* cosine, const float* sine)
        : shape(s),
          qkv(projections),
          preparation{s, cosine, sine},
          padded(ceil_div(s.tokens, QUERIES) * QUERIES),
          size(ceil_div(s.head_size, LANES) * LANES),
          scale(1 / std::sqrt(float(s.head_size))) {}

    template <typename Body>
    void for_heads(Body body) const {
        const int64_t heads = shape.tokens > 0 ? shape.batch * shape.heads : 0;
#pragma omp parallel for schedule(static) num_threads(int(std::clamp<int64_t>(heads, 1, shape.threads)))
        for (int64_t h = 0; h < heads; h++) body(h / shape.heads, h % shape.heads);
    }

    const float* projected(int64_t b, int64_t h, int which) const {
        return qkv + (b * shape.tokens * 3 + which) * shape.width() + h * shape.head_size;
    }
    float* statistics_of(float* statistics, int64_t b, int64_t h) const {  // (batch, heads, 2, tokens)
        return statistics + (b * shape.heads + h) * 2 * shape.tokens;
    }

    // Reads, prepares and transposes the queries (scaled) and keys of a head.
    void prepare(int64_t b, int64_t h, HeadRows& q, HeadRows& k, float* q_norm, float* k_norm) const {
        q.read(projected(b, h, 0), 3 * shape.width(), shape.head_size);
        k.read(projected(b, h, 1), 3 * shape.width(), shape.head_size);
        preparation.apply(q, q_norm, scale);
        preparation.apply(k, k_norm, 1);
        q.transpose();
        k.transpose();
    }

    // Scores of the queries from `first` on, (keys up to the last of them, QUERIES); those of later keys are -infinity.
    void score(const HeadRows& q, const HeadRows& k, int64_t first, float* scores) const {
        const int64_t keys = first + QUERIES;
        multiply<1>(keys, QUERIES, size, k.columns, padded, q.columns + first, padded, scores, QUERIES);
        for (int key = 1; key < QUERIES; key++)
            std::fill_n(scores + (first + key) * QUERIES, key, -INFINITY);
    }

    // y (batch, tokens, heads, head_size); statistics: the largest score of each query, and 1 / its sum of exponentials.
    void forward(float* y, float* statistics) const {
        for_heads([&](int64_t b, int64_t h) {
            HeadRows q(shape, padded, size), k(shape, padded, size), v(shape, padded, size);
            Buffer<float> norms(2 * padded), shares(padded * QUERIES), mix(QUERIES * size);
            prepare(b, h, q, k, norms, norms + padded);
            v.read(projected(b, h, 2), 3 * shape.width(), shape.head_size);
            float* largest = statistics_of(statistics, b, h);
            for (int64_t first = 0; first < shape.tokens; first += QUERIES) {
                alignas(64) float maxima[QUERIES], inverse_sums[QUERIES];
                score(q, k, first, shares);
                for (int c = 0; c < QUERIES; c += LANES) exponentials(first + QUERIES, c, shares, maxima, inverse_sums);
                multiply<1>(QUERIES, size, first + QUERIES, shares, QUERIES, v.rows, size, mix, size);
                const int64_t queries = std::min<int64_t>(QUERIES, shape.tokens - first);
                std::copy_n(maxima, queries, largest + first);
                std::copy_n(inverse_sums, queries, largest + shape.tokens + first);
                for (int64_t n = 0; n < queries; n++) {
                    float* to = y + (b * shape.tokens + first + n) * shape.width() + h * shape.head_size;
#pragma omp simd
                    for (int64_t d = 0; d < shape.head_size; d++) to[d] = inverse_sums[n] * mix[n * size + d];
                }
            }
        });
    }

    static void exponentials(int64_t keys, int c, float* scores, float* maxima, float* inverse_sums) {
        Vector most = load(scores + c), sum = Vector{};
        for (int64_t key = 1; key < keys; key++) most = larger(load(scores + key * QUERIES + c), most);
        for (int64_t key = 0; key < keys; key++) {
            float* at = scores + key * QUERIES + c;
            const Vector share = exponential(load(at) - most);
            sum += share;
            store(at, share);
        }
        store(maxima + c, most);
        store(inverse_sums + c, 1.0f / sum);
    }

    // grad_qkv has the shape of qkv.
    void backward(const float* grad_y, const float* statistics, float* grad_qkv) const {
        for_heads([&](int64_t b, int64_t h) {
            HeadRows q(shape, padded, size), k(shape, padded, size), v(shape, padded, size), dy(shape, padded, size);
            Buffer<float> norms(2 * padded), shares(padded * QUERIES), slopes(padded * QUERIES);
            Buffer<float> grad_q(QUERIES * size), grad_k(padded * size), grad_v(padded * size);
            prepare(b, h, q, k, norms, norms + padded);
            v.read(projected(b, h, 2), 3 * shape.width(), shape.head_size);
            dy.read(grad_y + b * shape.tokens * shape.width() + h * shape.head_size, shape.width(), shape.head_size);
            v.transpose();
            dy.transpose();
            std::memset(grad_k, 0, padded * size * sizeof(float));
            std::memset(grad_v, 0, padded * size * sizeof(float));
            float* to = grad_qkv + (projected(b, h, 0) - qkv);
            const float* largest = statistics_of(const_cast<float*>(statistics), b, h);
            for (int64_t first = 0; first < shape.tokens; first += QUERIES) {
                const int64_t keys = first + QUERIES;
                score(q, k, first, shares);
                multiply<1>(keys, QUERIES, size, v.columns, padded, dy.columns + first, padded, slopes, QUERIES);
                for (int c = 0; c < QUERIES; c += LANES) shares_and_slopes(first, c, largest, shares, slopes);
                multiply<QUERIES>(keys, size, QUERIES, shares, 1, dy.rows + first * size, size, grad_v, size, true);
                multiply<QUERIES>(keys, size, QUERIES, slopes, 1, q.rows + first * size, size, grad_k, size, true);
                multiply<1>(QUERIES, size, keys, slopes, QUERIES, k.rows, size, grad_q, size);
                for (int64_t n = 0; n < std::min<int64_t>(QUERIES, shape.tokens - first); n++)
                    write_prepared(first + n, q, scale, norms, grad_q + n * size, to);
            }
            for (int64_t n = 0; n < shape.tokens; n++) {
                write_prepared(n, k, 1, norms + padded, grad_k + n * size, to + shape.width());
                std::copy_n(grad_v + n * size, shape.head_size, to + 3 * n * shape.width() + 2 * shape.width());
            }
        });
    }

    // From scores to shares, and from gradients of shares to those of scores: share * (gradient - mean gradient).
    void shares_and_slopes(int64_t first, int c, const float* largest, float* shares, float* slopes) const {
        alignas(64) float maxima[LANES] = {}, inverse_sums[LANES] = {};
        const int64_t queries = std::clamp<int64_t>(shape.tokens - first - c, 0, LANES);
        std::copy_n(largest + first + c, queries, maxima);
        std::copy_n(largest + shape.tokens + first + c, queries, inverse_sums);
        const Vector most = load(maxima), inverse_sum = load(inverse_sums);
        Vector mean = Vector{};
        for (int64_t at = c; at < (first + QUERIES) * QUERIES; at += QUERIES) {
            const Vector share = exponential(load(shares + at) - most) * inverse_sum;
            mean += share * load(slopes + at);
            store(shares + at, share);
        }
        for (int64_t at = c; at < (first + QUERIES) * QUERIES; at += QUERIES)
            store(slopes + at, load(shares + at) * (load(slopes + at) - mean));
    }

    void write_prepared(int64_t n, const HeadRows& x, float x_scale, const float* inverse_norm, float* grad,
                        float* to) const {
        preparation.apply_backward(n, x.rows + n * size, x_scale, inverse_norm[n], grad);
        std::copy_n(grad, shape.head_size, to + 3 * n * shape.width());
    }
};

}  // namespace
