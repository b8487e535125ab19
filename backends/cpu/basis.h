// The parts of the layer that are not matrix products, for CPUs whose matrix units multiply bfloat16 (amx.py).

#pragma once

#include "memory.h"
#include "problem.h"

namespace {

// Computes the basis of each token, (columns x inputs), and the gradient of x from the gradient of the basis.
struct Basis {
    Shape shape;
    Rows x;
    Grid grid;

    Basis(const Shape& shape, const void* x)
        : shape(shape), x{(char*)x, bool(shape.x_half), shape.inputs}, grid(int(shape.points), shape.width) {}

    // Calls body(token, first input, count, cells, places) for all tokens and inputs, CHUNK inputs at a time.
    template <typename Body>
    void for_chunks(Body body) const {
        const double values = double(shape.tokens) * shape.inputs * shape.points;
        const int threads = int(std::max(1.0, std::min(double(shape.threads), values / 20000)));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t n = 0; n < shape.tokens; n++)
            for (int64_t i = 0; i < shape.inputs; i += CHUNK) {
                const int features = int(std::min<int64_t>(CHUNK, shape.inputs - i));
                alignas(64) float in[CHUNK], place[CHUNK];
                alignas(64) int32_t cell[CHUNK];
                x.read(n, i, features, CHUNK, in);
                grid.locate(in, cell, place);
                body(n, i, features, cell, place);
            }
    }

    // Ramps: the share of each of the points - 1 cells left of x, 0 … 1 (beyond 0 and 1 at the ends of the grid).
    void write_ramps(uint16_t* ramps) const {
        write(ramps, int(shape.points) - 1, [](int g, int cell, float place) {
            const float inside = g == cell ? place : 0;
            return g < cell ? 1 : inside;
        });
    }

    // Hats: 1 - t and t for the knots at both ends of the cell, 0 for all others.
    void write_hats(uint16_t* hats) const {
        write(hats, int(shape.points), [](int g, int cell, float place) {
            const float left = g == cell ? 1 - place : 0;
            return g == cell + 1 ? place : left;
        });
    }

    static void copy(uint16_t* to, const uint16_t* from, int count) {
        if (count == CHUNK)
            std::memcpy(to, from, CHUNK * sizeof(uint16_t));  // of known size: one instruction
        else
            std::memcpy(to, from, count * sizeof(uint16_t));
    }

    // Rows of `columns` x inputs values each.
    template <typename Value>
    void write(uint16_t* to, int columns, Value value) const {
        for_chunks([&](int64_t n, int64_t i, int features, const int32_t* cell, const float* place) {
            uint16_t* row = to + n * columns * shape.inputs + i;
            for (int g = 0; g < columns; g++, row += shape.inputs) {
                uint16_t values[CHUNK];
                for (int f = 0; f < CHUNK; f++) values[f] = to_bfloat16(value(g, cell[f], place[f]));
                copy(row, values, features);
            }
        });
    }

    // The gradient of the ramp of the cell that x is in, times the ramp's slope.
    void write_grad_x(const uint16_t* grad_ramps, const Rows& grad_x) const {
        const int columns = int(shape.points) - 1;
        const float scale = grid.inverse_spacing();
        for_chunks([&](int64_t n, int64_t i, int features, const int32_t* cell, const float*) {
            const uint16_t* from = grad_ramps + n * columns * shape.inputs + i;
            alignas(64) float row[CHUNK] = {};
            for (int g = 0; g < columns; g++, from += shape.inputs) {
                alignas(64) uint16_t values[CHUNK];
                alignas(64) float slopes[CHUNK];
                copy(values, from, features);
                for (int f = 0; f < CHUNK; f++) slopes[f] = scale * from_bfloat16(values[f]);
                for (int f = 0; f < CHUNK; f++) {
                    const float before = row[f], here = slopes[f];
                    row[f] = g == cell[f] ? here : before;
                }
            }
            grad_x.write(n, i, features, row);
        });
    }
};

}  // namespace
