// Splines of pairs of features in float32: y[n,o] = sum_i f_io(x[n,i], z[n,i]), and where a pair lies on its grid.
//
// With the larger and the smaller of the places of x and z in their cells, f_io is on either triangle of a cell
//     (1 - larger) W[lower] + (larger - smaller) W[middle] + smaller W[upper]
// so a token adds three rows of W for each feature. Beyond the grid f_io goes on straight from the nearest point of it,
// which takes the fourth corner of the cell, too (standard_pairs.py). Tiles of W are packed to stay in
// the L2 cache, and sums stay in registers.

#pragma once

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

struct PairPlaces {  // where the pairs of a token and up to CHUNK features lie on the grids of their functions
    alignas(64) int32_t lower[CHUNK];   // row of the lower corner among the G * G control points
    alignas(64) int32_t middle[CHUNK];  // row of the middle corner: lower + G where x's place is the larger, else + 1
    alignas(64) float to_lower[CHUNK], to_middle[CHUNK], to_upper[CHUNK];  // the shares of these corners
    alignas(64) float to_other[CHUNK];     // the share of the fourth corner: 0 on the grid
    alignas(64) int32_t is_beyond[CHUNK];  // whether the pair lies beyond the grid
    // The slope along x at the upper edge of the cell has this share in the slope of f, that at the lower edge the rest.
    alignas(64) float share_x[CHUNK], share_z[CHUNK];

    bool x_is_larger(int f) const { return middle[f] != lower[f] + 1; }
};

class PairGrid {
  public:
    explicit PairGrid(const Shape& shape)
        : inputs_(shape.inputs), points_(int32_t(shape.points)), grid_(int(shape.points), shape.width) {}

    float inverse_spacing() const { return grid_.inverse_spacing(); }

    // Locates the pairs of a token and up to CHUNK features from i on.
    void locate(const Rows& x, const Rows& z, int64_t token, int64_t i, int features, PairPlaces& places) const {
        alignas(64) float x_in[CHUNK], z_in[CHUNK], x_place[CHUNK], z_place[CHUNK];
        alignas(64) int32_t j[CHUNK], k[CHUNK];
        x.read(token, i, features, CHUNK, x_in);
        z.read(token, i, features, CHUNK, z_in);
        if (i + CHUNK < inputs_) {
            x.prefetch(token, i + CHUNK);
            z.prefetch(token, i + CHUNK);
        }
        grid_.locate(x_in, j, x_place);
        grid_.locate(z_in, k, z_place);
        const int32_t points = points_;
        for (int f = 0; f < CHUNK; f++) {
            const float t = clamped(x_place[f]), s = clamped(z_place[f]);
            const float beyond_t = x_place[f] - t, beyond_s = z_place[f] - s;
            const bool x_is_larger = x_place[f] >= z_place[f];  // not if either is NaN
            const float larger = x_is_larger ? t : s, smaller = x_is_larger ? s : t;
            const float low_x = beyond_t * (1 - s), high_x = beyond_t * s;
            const float low_z = beyond_s * (1 - t), high_z = beyond_s * t;
            const float to_right = low_x - high_z, to_above = low_z - high_x;  // beyond the grid
            places.lower[f] = j[f] * points + k[f];
            places.middle[f] = places.lower[f] + (x_is_larger ? points : 1);
            places.to_lower[f] = 1 - larger - low_x - low_z;
            places.to_middle[f] = larger - smaller + (x_is_larger ? to_right : to_above);
            places.to_upper[f] = smaller + high_x + high_z;
            places.to_other[f] = x_is_larger ? to_above : to_right;
            places.is_beyond[f] = beyond_t != 0 || beyond_s != 0;
            const float along_x = beyond_s != 0 ? z_place[f] : x_is_larger ? 0 : 1;
            const float along_z = beyond_t != 0 ? x_place[f] : x_is_larger ? 1 : 0;
            places.share_x[f] = beyond_t != 0 ? s : along_x;
            places.share_z[f] = beyond_s != 0 ? t : along_z;
        }
    }

  private:
    static float clamped(float place) {  // NaN stays NaN
        const float from_zero = place < 0 ? 0 : place;
        return from_zero > 1 ? 1 : from_zero;
    }

    int64_t inputs_;
    int32_t points_;
    Grid grid_;
};

// Adds the functions of the features from f_begin to f_end of a chunk to the sums of some tokens, (tokens, vectors *
// LANES). The control points of the first are the first `points` * `points` rows of `weight`, which are `stride` apart.
template <int vectors>
void add_pairs(const float* weight, int64_t stride, int64_t points, const PairPlaces* places, int f_begin, int f_end,
               int64_t tokens, bool first, float* sums) {
    const int64_t to_upper = (points + 1) * stride;
    for (int64_t n = 0; n < tokens; n++, places++, sums += vectors * LANES) {
        Vector sum[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) sum[k] = first ? Vector{} : load(sums + k * LANES);
        const auto add = [&](const float* row, float share) __attribute__((always_inline)) {
            const Vector all = splat(share);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += all * load(row + k * LANES);
        };
        const float* rows = weight;
        for (int f = f_begin; f < f_end; f++, rows += points * points * stride) {
            const float *lower = rows + places->lower[f] * stride, *middle = rows + places->middle[f] * stride;
            const float* upper = lower + to_upper;
            KEEP_POINTER(middle);
            KEEP_POINTER(upper);
            add(lower, places->to_lower[f]);
            add(middle, places->to_middle[f]);
            add(upper, places->to_upper[f]);
            if (places->to_other[f] != 0) add(lower + (upper - middle), places->to_other[f]);
        }
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) store(sums + k * LANES, sum[k]);
    }
}

inline auto pairs_adder(int vectors) {
    return with_constant<MAX_VECTORS>(vectors, [](auto constant) { return &add_pairs<constant.value>; });
}

struct PairForward {
    const Shape& shape;
    Rows x, z, weight, y;  // x, z (N, I), weight (I*G*G, O), y (N, O)
    PairGrid grid;
    int64_t rows;  // of W that belong to one feature
    int max_vectors = MAX_VECTORS, tile_features = CHUNK / 2;

    PairForward(const Shape& s, const float* x_data, const float* z_data, const float* weight_data, float* y_data)
        : shape(s),
          x{(char*)x_data, false, s.inputs},
          z{(char*)z_data, false, s.inputs},
          weight{(char*)weight_data, false, s.outputs},
          y{(char*)y_data, false, s.outputs},
          grid(s),
          rows(s.points * s.points) {
        // Measured with L1 caches of 32 KiB and L2 caches of 1 MiB: a tile that leaves L1 costs less than strips half as
        // wide, or than more passes over the sums.
        const int64_t tile_bytes = 192 << 10;
        while (max_vectors > 1 && rows * max_vectors * LANES * 4 > tile_bytes) max_vectors /= 2;
        while (tile_features > 1 && tile_features * rows * max_vectors * LANES * 4 > tile_bytes) tile_features /= 2;
    }

    void run() const {
        for_blocks(shape, 2048, [&](int64_t token, int64_t token_end, int64_t output, int64_t output_end) {
            run_block(token, token_end, output, output_end);
        });
    }

    void run_block(int64_t token, int64_t token_end, int64_t output, int64_t output_end) const {
        const int64_t tokens = token_end - token, padded = ceil_div(output_end - output, LANES) * LANES;
        if (padded <= 0) return;
        Buffer<float> tile(tile_features * rows * max_vectors * LANES), sums(tokens * padded);
        Buffer<PairPlaces> places(tokens);
        for (int64_t i = 0; i < shape.inputs; i += CHUNK) {
            const int features = int(std::min<int64_t>(CHUNK, shape.inputs - i));
            for (int64_t n = 0; n < tokens; n++) grid.locate(x, z, token + n, i, features, places[n]);
            for (int f = 0; f < features; f += tile_features)
                add_features(i, f, std::min(f + tile_features, features), tokens, output, output_end, places, tile, sums);
        }
        for (int64_t n = 0; n < tokens; n++)
            for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
                y.write(token + n, o, count, sums + (o - output) * tokens + n * vectors * LANES);
            });
    }

    // Adds the features from i + f to i + f_end, `places` being those of the chunk from i on.
    void add_features(int64_t i, int f, int f_end, int64_t tokens, int64_t output, int64_t output_end,
                      const PairPlaces* places, float* tile, float* sums) const {
        const int64_t row = (i + f) * rows, count_of_rows = (f_end - f) * rows;
        for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
            // With few tokens, read W where it lies: packing would read all control points of each function.
            const int length = vectors * LANES;
            const bool in_place = count == length && (tokens < rows || weight.packed_enough(count));
            if (!in_place)
                for (int64_t r = 0; r < count_of_rows; r++)
                    weight.read(row + r, o, count, length, tile + r * length);
            pairs_adder(vectors)(in_place ? weight.floats(row, o) : tile, in_place ? shape.outputs : length,
                                 shape.points, places, f, f_end, tokens, i + f == 0, sums + (o - output) * tokens);
        });
    }
};

}  // namespace
