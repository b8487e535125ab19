// Computes y from x and W: a token adds two rows of W for each feature. Loads from the L1 cache limit the speed, so a
// tile of W (some features, all control points, a strip of outputs) is packed to stay there, and the sums stay in
// registers.

#pragma once

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

// Adds the splines of some features to the sums of some tokens, (tokens, vectors * LANES). The lower row of W of each
// (token, feature) starts at `row` in `weight`, the upper one at the distance `next` from it.
template <int vectors>
void add_splines(const float* weight, int64_t next, const int32_t* row, const float* place, int features,
                 int64_t tokens, bool first, float* sums) {
    const Vector ones = splat(1);
    for (int64_t n = 0; n < tokens; n++, row += CHUNK, place += CHUNK, sums += vectors * LANES) {
        Vector sum[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) sum[k] = first ? Vector{} : load(sums + k * LANES);
        auto add = [&](uint32_t lower_row, const float& t) __attribute__((always_inline)) {
            const float *lower = weight + lower_row, *upper = lower + next;
            KEEP_POINTER(upper);
            const Vector right = splat(t), left = ones - right;
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += left * load(lower + k * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += right * load(upper + k * LANES);
        };
        int f = 0;
        for (; f + 2 <= features; f += 2) {
            uint64_t two_rows;  // one load for both, because loads are the bottleneck
            std::memcpy(&two_rows, row + f, 8);
            add(uint32_t(two_rows), place[f]);
            add(uint32_t(two_rows >> 32), place[f + 1]);
        }
        if (f < features) add(row[f], place[f]);
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) store(sums + k * LANES, sum[k]);
    }
}

inline auto splines_adder(int vectors) {
    return with_constant<MAX_VECTORS>(vectors, [](auto constant) { return &add_splines<constant.value>; });
}

struct Forward {
    const Shape& shape;
    Rows x, weight, y;  // x (N, I), weight (I*G, O), y (N, O)
    Grid grid;
    int max_vectors, tile_features;

    Forward(const Shape& s, const void* x_data, const void* weight_data, void* y_data)
        : shape(s),
          x{(char*)x_data, s.x_half != 0, s.inputs},
          weight{(char*)weight_data, s.weight_half != 0, s.outputs},
          y{(char*)y_data, s.y_half != 0, s.outputs},
          grid(s.points, s.width) {
        // Measured with L1 caches of 48 KiB: wide strips while a tile of four features fits there; else narrower
        // ones, tiles that fit the L2 cache, and more features to a tile, as each costs a pass over the sums.
        const bool small = s.points <= 16 * 8 / MAX_VECTORS;
        max_vectors = small ? MAX_VECTORS : std::max(1, MAX_VECTORS / 2);
        const int64_t tile_bytes = small ? 32 << 10 : 64 << 10;
        tile_features = CHUNK;
        const int64_t feature_bytes = shape.points * max_vectors * LANES * 4;
        while (tile_features > 1 && tile_features * feature_bytes > tile_bytes) tile_features /= 2;
    }

    void run() {
        for_blocks(shape, 1024, [&](int64_t token, int64_t token_end, int64_t output, int64_t output_end) {
            run_block(token, token_end, output, output_end);
        });
    }

    void run_block(int64_t token, int64_t token_end, int64_t output, int64_t output_end) {
        const int64_t tokens = token_end - token, padded = ceil_div(output_end - output, LANES) * LANES;
        if (padded <= 0) return;
        Buffer<float> tile(tile_features * shape.points * max_vectors * LANES), sums(tokens * padded);
        Buffer<float> place(tokens * CHUNK);
        Buffer<int32_t> cell(tokens * CHUNK), row(tokens * CHUNK);
        for (int64_t i = 0; i < shape.inputs; i += CHUNK) {
            const int features = int(std::min<int64_t>(CHUNK, shape.inputs - i));
            locate(token, tokens, i, features, cell, place);
            for (int f = 0; f < features; f += tile_features)
                add_features(i + f, std::min(tile_features, features - f), tokens, output, output_end, cell + f,
                             place + f, row + f, tile, sums);
        }
        for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
            const float* strip = sums + (o - output) * tokens;
            for (int64_t n = 0; n < tokens; n++) y.write(token + n, o, count, strip + n * vectors * LANES);
        });
    }

    void locate(int64_t token, int64_t tokens, int64_t i, int features, int32_t* cell, float* place) const {
        for (int64_t n = 0; n < tokens; n++) {
            alignas(64) float in[CHUNK];
            x.read(token + n, i, features, CHUNK, in);
            if (i + CHUNK < shape.inputs) x.prefetch(token + n, i + CHUNK);
            grid.locate(in, cell + n * CHUNK, place + n * CHUNK);
        }
    }

    void add_features(int64_t i, int features, int64_t tokens, int64_t output, int64_t output_end, const int32_t* cell,
                      const float* place, int32_t* row, float* tile, float* sums) const {
        int64_t stride = 0;
        for_strips(output, output_end, max_vectors, [&](int64_t o, int count, int vectors) {
            // With few tokens, read W where it lies: packing would read all G control points of each spline.
            const bool in_place = (tokens < 3 * shape.points ? !weight.half : weight.packed_enough(count)) &&
                                  count == vectors * LANES && features * shape.points * shape.outputs < INT32_MAX;
            const int64_t row_length = in_place ? shape.outputs : vectors * LANES;
            if (row_length != stride) {
                stride = row_length;
                for (int64_t n = 0; n < tokens; n++)
                    for (int f = 0; f < features; f++)
                        row[n * CHUNK + f] = int32_t((f * shape.points + cell[n * CHUNK + f]) * stride);
            }
            if (!in_place)
                for (int64_t r = 0; r < features * shape.points; r++)
                    weight.read(i * shape.points + r, o, count, vectors * LANES, tile + r * stride);
            splines_adder(vectors)(in_place ? weight.floats(i * shape.points, o) : tile, stride, row, place, features,
                                   tokens, i == 0, sums + (o - output) * tokens);
        });
    }
};

}  // namespace
