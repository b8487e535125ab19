// Splines of pairs of features in float32: y[n,o] = sum_i f_io(x[n,i], z[n,i]), and where a pair lies on its grid.
//
// With the larger and the smaller of the places of x and z in their cells, f_io is on either triangle of a cell
//     (1 - larger) W[lower] + (larger - smaller) W[middle] + smaller W[upper]
// so a token adds three rows of W for each feature. As for splines of one feature, tiles of W are packed to stay in the
// L1 cache, and sums stay in registers.

#pragma once

#include <cmath>

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

struct PairPlace {  // where a pair lies on the grid of its function
    int32_t row;    // of the lower corner among the G * G control points
    int32_t flags;  // of the following
    float larger, smaller;
};
constexpr int32_t X_IS_LARGER = 1, X_INSIDE = 2, Z_INSIDE = 4;

class PairGrid {
  public:
    explicit PairGrid(const Shape& shape)
        : inputs_(shape.inputs), points_(int32_t(shape.points)), half_width_(shape.width / 2),
          grid_(int(shape.points), shape.width) {}

    float inverse_spacing() const { return grid_.inverse_spacing(); }

    // The places of the pairs of a token and up to CHUNK features from i on.
    void locate(const Rows& x, const Rows& z, int64_t token, int64_t i, int features, PairPlace* places) const {
        alignas(64) float in[2][CHUNK], place[2][CHUNK];
        alignas(64) int32_t cell[2][CHUNK];
        const Rows* rows[] = {&x, &z};
        for (int k = 0; k < 2; k++) {
            rows[k]->read(token, i, features, CHUNK, in[k]);
            if (i + CHUNK < inputs_) rows[k]->prefetch(token, i + CHUNK);
            grid_.locate(in[k], cell[k], place[k]);
        }
        for (int f = 0; f < features; f++) {
            const float t = clamped(place[0][f]), s = clamped(place[1][f]);
            const bool x_is_larger = t >= s;  // not if either is NaN, which both weights then pass on
            const int32_t flags = X_IS_LARGER * x_is_larger + X_INSIDE * (std::fabs(in[0][f]) <= half_width_) +
                                  Z_INSIDE * (std::fabs(in[1][f]) <= half_width_);
            places[f] = {cell[0][f] * points_ + cell[1][f], flags, x_is_larger ? t : s, x_is_larger ? s : t};
        }
    }

  private:
    static float clamped(float place) {  // NaN stays NaN
        return place < 0 ? 0 : place > 1 ? 1 : place;
    }

    int64_t inputs_;
    int32_t points_;
    double half_width_;
    Grid grid_;
};

// Adds the functions of some features to the sums of some tokens, (tokens, vectors * LANES). The control points of
// feature f are `points` * `points` rows from row f * points * points of `weight` on, `stride` apart.
template <int vectors>
void add_pairs(const float* weight, int64_t stride, int64_t points, const PairPlace* places, int features,
               int64_t tokens, bool first, float* sums) {
    const Vector ones = splat(1);
    const int64_t to_upper = (points + 1) * stride;
    for (int64_t n = 0; n < tokens; n++, places += CHUNK, sums += vectors * LANES) {
        Vector sum[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) sum[k] = first ? Vector{} : load(sums + k * LANES);
        const float* rows = weight;
        for (int f = 0; f < features; f++, rows += points * points * stride) {
            const PairPlace& place = places[f];
            const float* lower = rows + place.row * stride;
            const float* middle = lower + (place.flags & X_IS_LARGER ? points * stride : stride);
            const float* upper = lower + to_upper;
            KEEP_POINTER(middle);
            KEEP_POINTER(upper);
            const Vector larger = splat(place.larger), smaller = splat(place.smaller);
            const Vector to_lower = ones - larger, to_middle = larger - smaller;
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += to_lower * load(lower + k * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += to_middle * load(middle + k * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += smaller * load(upper + k * LANES);
        }
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) store(sums + k * LANES, sum[k]);
    }
}

inline auto pairs_adder(int vectors) {
    return vectors == 8 ? add_pairs<8> : vectors == 4 ? add_pairs<4> : vectors == 2 ? add_pairs<2> : add_pairs<1>;
}

struct PairForward {
    const Shape& shape;
    Rows x, z, weight, y;  // x, z (N, I), weight (I*G*G, O), y (N, O)
    PairGrid grid;
    int64_t rows;  // of W that belong to one feature
    int max_vectors, tile_features;

    PairForward(const Shape& s, const float* x_data, const float* z_data, const float* weight_data, float* y_data)
        : shape(s),
          x{(char*)x_data, false, s.inputs},
          z{(char*)z_data, false, s.inputs},
          weight{(char*)weight_data, false, s.outputs},
          y{(char*)y_data, false, s.outputs},
          grid(s),
          rows(s.points * s.points) {
        max_vectors = s.points <= 4 ? MAX_VECTORS : std::max(1, MAX_VECTORS / 2);
        const int64_t tile_bytes = 32 << 10;
        tile_features = CHUNK;
        while (tile_features > 1 && tile_features * rows * max_vectors * LANES * 4 > tile_bytes) tile_features /= 2;
    }

    void run() const {
        const int threads = useful_threads(shape);
        const int64_t max_tokens = std::clamp<int64_t>((3 << 17) / shape.outputs, 64, 1024);  // sums of 1.5 MiB
        const int64_t even_blocks = ceil_div(ceil_div(shape.tokens, max_tokens), threads) * threads;
        const int64_t block = ceil_div(shape.tokens, even_blocks), blocks = ceil_div(shape.tokens, block);
        const int64_t parts = blocks < threads ? ceil_div(threads, blocks) : 1;  // few tokens: split outputs as well
        const int64_t part = ceil_div(ceil_div(shape.outputs, parts), LANES) * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t p = 0; p < parts; p++)
                run_block(b * block, std::min((b + 1) * block, shape.tokens), p * part,
                          std::min((p + 1) * part, shape.outputs));
    }

    void run_block(int64_t token, int64_t token_end, int64_t output, int64_t output_end) const {
        const int64_t tokens = token_end - token, padded = ceil_div(output_end - output, LANES) * LANES;
        if (padded <= 0) return;
        Buffer<float> tile(tile_features * rows * max_vectors * LANES), sums(tokens * padded);
        Buffer<PairPlace> places(tokens * CHUNK);
        for (int64_t i = 0; i < shape.inputs; i += CHUNK) {
            const int features = int(std::min<int64_t>(CHUNK, shape.inputs - i));
            for (int64_t n = 0; n < tokens; n++) grid.locate(x, z, token + n, i, features, places + n * CHUNK);
            for (int f = 0; f < features; f += tile_features)
                add_features(i + f, std::min(tile_features, features - f), tokens, output, output_end, places + f, tile,
                             sums);
        }
        for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
            const float* strip = sums + (o - output) * tokens;
            for (int64_t n = 0; n < tokens; n++) y.write(token + n, o, count, strip + n * vectors * LANES);
        });
    }

    void add_features(int64_t i, int features, int64_t tokens, int64_t output, int64_t output_end,
                      const PairPlace* places, float* tile, float* sums) const {
        for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
            // With few tokens, read W where it lies: packing would read all control points of each function.
            const int length = vectors * LANES;
            const bool in_place = count == length && (tokens < rows || weight.packed_enough(count));
            if (!in_place)
                for (int64_t r = 0; r < features * rows; r++)
                    weight.read(i * rows + r, o, count, length, tile + r * length);
            pairs_adder(vectors)(in_place ? weight.floats(i * rows, o) : tile, in_place ? shape.outputs : length,
                                 shape.points, places, features, tokens, i == 0, sums + (o - output) * tokens);
        });
    }
};

}  // namespace
