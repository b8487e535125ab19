// Computes the gradients of x and W from the gradient of y. For each feature, tokens are sorted by cell. All tokens of
// a cell share two rows of W and of its gradient, so these stay in registers, and only the gradient of x is stored per
// token.

#pragma once

#include "memory.h"
#include "problem.h"
#include "vectors.h"

namespace {

inline void add_lane_sums(const float* vectors, float* to) { store(to, load(to) + lane_sums(vectors)); }

struct Visit {  // a token in a cell
    int32_t token;
    float place;
};
constexpr int AHEAD = 4;  // how many visits ahead the gradients of y are prefetched

// Handles the visits from `visit` to `end` of one feature, all to one cell. Adds their gradients to the two rows of W,
// and writes the gradient of each place, dy . (upper - lower), to grad_place[visit]. These products are summed over
// lanes LANES visits at a time; the rest waits in `products` for the next cell. On entry `carry` holds the gradient that
// the cell below has for the row it shares with this cell; on return, the gradient that this cell has for the row it
// shares with the cell above. `fresh`: grad_lower is not initialized.
template <int vectors>
void visit_cell(const float* grad_y, int64_t grad_y_stride, const Visit* visits, int visit, int end, const float* lower,
                const float* upper, bool fresh, float* grad_lower, float* carry, float* products, float* grad_place) {
    const Vector ones = splat(1);
    for (int k = 0; k < vectors; k++) {  // the rows of the cell above, which memory delivers late on large grids
        __builtin_prefetch(upper + (upper - lower) + k * LANES);
        __builtin_prefetch(grad_lower + (upper - lower) + k * LANES, 1);
    }
    Vector to_lower[vectors], to_upper[vectors], slope[vectors];
#pragma GCC unroll 8
    for (int k = 0; k < vectors; k++) {
        to_lower[k] = load(carry + k * LANES);
        to_upper[k] = Vector{};
        slope[k] = load(upper + k * LANES) - load(lower + k * LANES);
        KEEP_IN_REGISTER(slope[k]);
    }
    for (; visit < end; visit++) {
        const float* dy = grad_y + visits[visit].token * grad_y_stride;
        const float* later_dy = grad_y + visits[visit + AHEAD].token * grad_y_stride;
        const Vector right = splat(visits[visit].place), left = ones - right;
        Vector product = Vector{};
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) {
            Vector grad = load(dy + k * LANES);
            KEEP_IN_REGISTER(grad);
            __builtin_prefetch(later_dy + k * LANES);
            to_lower[k] += left * grad;
            to_upper[k] += right * grad;
            product = k ? product + slope[k] * grad : slope[k] * grad;
        }
        const int lane = visit % LANES;
        store(products + lane * LANES, product);
        if (lane == LANES - 1) add_lane_sums(products, grad_place + visit - lane);
    }
#pragma GCC unroll 8
    for (int k = 0; k < vectors; k++) {
        store(grad_lower + k * LANES, fresh ? to_lower[k] : load(grad_lower + k * LANES) + to_lower[k]);
        store(carry + k * LANES, to_upper[k]);
    }
}

inline auto cell_visitor(int vectors) {
    return with_constant<MAX_VECTORS>(vectors, [](auto constant) { return &visit_cell<constant.value>; });
}

struct Backward {
    const Shape& shape;
    Rows x, weight, grad_y, grad_x;
    float* grad_weight;  // (I, G, O)
    Grid grid;

    // Tokens in a block. Their part of dy should fit half of an L2 cache, but each block reads dW again.
    static constexpr int64_t FEW_TOKENS = 1024, MANY_TOKENS = 2048, LARGE_GRID = 17;

    // The working memory of one thread for its features and a block of tokens.
    struct Workspace {
        int64_t tokens, visits_stride, sums_stride;
        Buffer<float> grad_y, products, sums, weight, grad_weight, place, grad_x;
        Buffer<Visit> visits;        // (features, tokens), sorted by cell
        Buffer<int32_t> ends, cell;  // ends (features, G): the end of each cell's visits; cell (tokens, CHUNK)

        Workspace(int64_t max_tokens, int64_t features, int64_t points)
            : tokens(max_tokens),
              visits_stride(max_tokens + AHEAD),
              sums_stride(ceil_div(max_tokens, LANES) * LANES + LANES),
              grad_y(max_tokens * MAX_VECTORS * LANES),
              products(LANES * LANES),
              sums(features * sums_stride),
              weight(points * MAX_VECTORS * LANES),
              grad_weight(points * MAX_VECTORS * LANES),
              place(max_tokens * CHUNK),
              grad_x(max_tokens * CHUNK),
              visits(features * visits_stride),
              ends(features * points),
              cell(max_tokens * CHUNK) {}
    };

    Backward(const Shape& s, const void* x_data, const void* weight_data, const void* grad_y_data, void* grad_x_data,
             float* grad_weight_data)
        : shape(s),
          x{(char*)x_data, s.x_half != 0, s.inputs},
          weight{(char*)weight_data, s.weight_half != 0, s.outputs},
          grad_y{(char*)grad_y_data, s.y_half != 0, s.outputs},
          grad_x{(char*)grad_x_data, s.x_half != 0, s.inputs},
          grad_weight(grad_weight_data),
          grid(s.points, s.width) {}

    void run() {
        const int64_t threads = std::min<int64_t>(useful_threads(shape), shape.inputs);
#pragma omp parallel for schedule(static) num_threads(int(threads))
        for (int64_t k = 0; k < threads; k++)
            run_features(shape.inputs * k / threads, shape.inputs * (k + 1) / threads);
    }

    void run_features(int64_t i, int64_t i_end) {
        const int64_t most = std::min(shape.points < LARGE_GRID ? FEW_TOKENS : MANY_TOKENS, shape.tokens);
        Workspace work(most, i_end - i, shape.points);
        for (int64_t token = 0; token < shape.tokens; token += most) {
            const int64_t tokens = std::min(most, shape.tokens - token);
            for_chunks(i, i_end, [&](int64_t c, int count) { sort_visits(token, tokens, c, count, c - i, work); });
            std::memset(work.sums, 0, (i_end - i) * work.sums_stride * sizeof(float));
            for_strips(0, shape.outputs, MAX_VECTORS, [&](int64_t o, int count, int vectors) {
                const Strip strip = strip_of_grad_y(token, tokens, o, count, vectors, work);
                for (int64_t f = i; f < i_end; f++) visit_feature(f, f - i, token, tokens, strip, work);
            });
            for_chunks(i, i_end, [&](int64_t c, int count) { write_grad_x(token, tokens, c, count, c - i, work); });
        }
    }

    template <typename Body>
    static void for_chunks(int64_t i, int64_t i_end, Body body) {
        for (; i < i_end; i += CHUNK) body(i, int(std::min<int64_t>(CHUNK, i_end - i)));
    }

    struct Strip {  // some outputs, and the address of their gradients for a block of tokens
        int64_t output;
        int count, vectors;
        const float* grad_y;
        int64_t grad_y_stride;
    };

    Strip strip_of_grad_y(int64_t token, int64_t tokens, int64_t o, int count, int vectors, Workspace& work) const {
        const int length = vectors * LANES;
        // Tokens come in the order of their cells: fewer pages of memory are faster even if none evicts another.
        if (count == length && count == shape.outputs && grad_y.packed_enough(count))
            return {o, count, vectors, grad_y.floats(token, o), shape.outputs};
        for (int64_t n = 0; n < tokens; n++) grad_y.read(token + n, o, count, length, work.grad_y + n * length);
        return {o, count, vectors, work.grad_y, length};
    }

    // Sorts the tokens by cell (counting sort) for up to CHUNK features from i on, the thread's features from `own` on.
    void sort_visits(int64_t token, int64_t tokens, int64_t i, int features, int64_t own, Workspace& work) const {
        int32_t *cell = work.cell, *ends = work.ends + own * shape.points;
        float* place = work.place;
        Visit* visits = work.visits + own * work.visits_stride;
        std::memset(ends, 0, features * shape.points * sizeof(int32_t));
        for (int64_t n = 0; n < tokens; n++) {
            alignas(64) float in[CHUNK];
            x.read(token + n, i, features, CHUNK, in);
            if (i + CHUNK < shape.inputs) x.prefetch(token + n, i + CHUNK);
            grid.locate(in, cell + n * CHUNK, place + n * CHUNK);
            for (int f = 0; f < features; f++) ends[f * shape.points + cell[n * CHUNK + f] + 1]++;
        }
        for (int f = 0; f < features; f++)
            for (int64_t g = 1; g < shape.points; g++) ends[f * shape.points + g] += ends[f * shape.points + g - 1];
        // Now ends[g] is where cell g starts. Each visit moves it on by one, so in the end it is where the cell ends.
        for (int64_t n = 0; n < tokens; n++)
            for (int f = 0; f < features; f++) {
                const int32_t at = ends[f * shape.points + cell[n * CHUNK + f]]++;
                visits[f * work.visits_stride + at] = {int32_t(n), place[n * CHUNK + f]};
            }
        for (int f = 0; f < features; f++)  // prefetching reads past the end
            std::fill_n(visits + f * work.visits_stride + tokens, AHEAD, Visit{0, 0});
    }

    // No token is in the cell: W is not read, and its lower row gets what the cell below has for it.
    static void pass_empty_cell(int length, bool fresh, bool carries, float* grad_lower, float* carry) {
        if (fresh)
            std::memcpy(grad_lower, carry, length * sizeof(float));
        else if (carries)
            for (int k = 0; k < length; k++) grad_lower[k] += carry[k];
        if (carries) std::memset(carry, 0, length * sizeof(float));
    }

    void visit_feature(int64_t i, int64_t own, int64_t token, int64_t tokens, const Strip& strip, Workspace& work) {
        const int64_t points = shape.points;
        const int length = strip.vectors * LANES;
        const bool in_place = !weight.half && strip.count == length;
        const int64_t stride = in_place ? shape.outputs : length;
        float* grad_rows = grad_weight + i * points * shape.outputs + strip.output;
        const float* w = in_place ? weight.floats(i * points, strip.output) : work.weight;
        float* grad_w = in_place ? grad_rows : work.grad_weight;
        if (!in_place)
            for (int64_t g = 0; g < points; g++)
                weight.read(i * points + g, strip.output, strip.count, length, work.weight + g * stride);

        const Visit* visits = work.visits + own * work.visits_stride;
        const int32_t* ends = work.ends + own * points;
        float *sums = work.sums + own * work.sums_stride, carry[MAX_VECTORS * LANES] = {};
        const bool fresh = token == 0 || !in_place;
        const auto visit = cell_visitor(strip.vectors);
        bool carries = false;  // whether `carry` may hold anything but zeros
        for (int64_t g = 0, start = 0; g < points - 1; start = ends[g++])
            if (ends[g] > start || tokens >= points) {  // with many tokens, skipping would only end the prefetching
                visit(strip.grad_y, strip.grad_y_stride, visits, int(start), ends[g], w + g * stride,
                      w + (g + 1) * stride, fresh, grad_w + g * stride, carry, work.products, sums);
                carries = true;
            } else {
                pass_empty_cell(length, fresh, carries, grad_w + g * stride, carry);
                carries = false;
            }
        if (tokens % LANES) add_lane_sums(work.products, sums + tokens / LANES * LANES);

        float* last = grad_w + (points - 1) * stride;
        for (int k = 0; k < length; k++) last[k] = fresh ? carry[k] : last[k] + carry[k];
        if (!in_place)
            for (int64_t g = 0; g < points; g++, grad_rows += shape.outputs)
                for (int k = 0; k < strip.count; k++)
                    grad_rows[k] = grad_w[g * stride + k] + (token == 0 ? 0 : grad_rows[k]);
    }

    void write_grad_x(int64_t token, int64_t tokens, int64_t i, int features, int64_t own, Workspace& work) const {
        const float scale = grid.inverse_spacing();
        float* by_feature = work.grad_x;
        for (int f = 0; f < features; f++) {
            const Visit* visits = work.visits + (own + f) * work.visits_stride;
            const float* sums = work.sums + (own + f) * work.sums_stride;
            for (int64_t m = 0; m < tokens; m++) by_feature[f * tokens + visits[m].token] = scale * sums[m];
        }
        for (int64_t n = 0; n < tokens; n++) {
            float row[CHUNK];
            for (int f = 0; f < features; f++) row[f] = by_feature[f * tokens + n];
            grad_x.write(token + n, i, features, row);
        }
    }
};

}  // namespace
