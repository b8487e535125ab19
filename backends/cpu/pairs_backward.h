// The gradients of splines of pairs of features. For each feature, tokens are sorted by triangle. All tokens of a
// triangle share three rows of W and of its gradient, so these stay in registers, and only the gradients by the larger
// and the smaller place are stored per token. One of them is that of x, the other that of z.

#pragma once

#include "backward.h"
#include "memory.h"
#include "pairs.h"
#include "problem.h"
#include "vectors.h"

namespace {

struct PairVisit {  // a token in a triangle
    int32_t token;
    float larger, smaller;
};
constexpr int FLAG_BITS = 3;  // of PairPlaces::flags

struct Products {  // of LANES visits, whose lanes are then summed together
    float by_larger[LANES * LANES], by_smaller[LANES * LANES];
};

struct PairSlopes {  // gradients of the places of each visit
    float *by_larger, *by_smaller;

    void add(const Products& products, int64_t first_visit) const {
        add_lane_sums(products.by_larger, by_larger + first_visit);
        add_lane_sums(products.by_smaller, by_smaller + first_visit);
    }
};

// Handles the visits from `visit` to `end` of one feature, all to one triangle, whose corners are three rows of W: the
// lower, the middle and the upper one. Adds their gradients to the same rows of its gradient. Adds the gradients of both
// places, dy . (middle - lower) and dy . (upper - middle), to `slopes`, LANES visits at a time; the rest waits in
// `products` for the next triangle.
template <int vectors>
void visit_triangle(const float* grad_y, int64_t grad_y_stride, const PairVisit* visits, int visit, int end,
                    const float* const (&rows)[3], float* const (&grad_rows)[3], Products& products,
                    const PairSlopes& slopes) {
    const Vector ones = splat(1);
    Vector to_lower[vectors], to_middle[vectors], to_upper[vectors], by_larger[vectors], by_smaller[vectors];
#pragma GCC unroll 8
    for (int k = 0; k < vectors; k++) {
        to_lower[k] = to_middle[k] = to_upper[k] = Vector{};
        const Vector middle = load(rows[1] + k * LANES);
        by_larger[k] = middle - load(rows[0] + k * LANES);
        by_smaller[k] = load(rows[2] + k * LANES) - middle;
        KEEP_IN_REGISTER(by_larger[k]);
        KEEP_IN_REGISTER(by_smaller[k]);
    }
    for (; visit < end; visit++) {
        const float* dy = grad_y + visits[visit].token * grad_y_stride;
        const float* later_dy = grad_y + visits[visit + AHEAD].token * grad_y_stride;
        const Vector larger = splat(visits[visit].larger), smaller = splat(visits[visit].smaller);
        const Vector least = ones - larger, middle = larger - smaller;
        Vector larger_product = Vector{}, smaller_product = Vector{};
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) {
            Vector grad = load(dy + k * LANES);
            KEEP_IN_REGISTER(grad);
            __builtin_prefetch(later_dy + k * LANES);
            to_lower[k] += least * grad;
            to_middle[k] += middle * grad;
            to_upper[k] += smaller * grad;
            larger_product = k ? larger_product + by_larger[k] * grad : by_larger[k] * grad;
            smaller_product = k ? smaller_product + by_smaller[k] * grad : by_smaller[k] * grad;
        }
        const int lane = visit % LANES;
        store(products.by_larger + lane * LANES, larger_product);
        store(products.by_smaller + lane * LANES, smaller_product);
        if (lane == LANES - 1) slopes.add(products, visit - lane);
    }
#pragma GCC unroll 8
    for (int k = 0; k < vectors; k++) {
        store(grad_rows[0] + k * LANES, load(grad_rows[0] + k * LANES) + to_lower[k]);
        store(grad_rows[1] + k * LANES, load(grad_rows[1] + k * LANES) + to_middle[k]);
        store(grad_rows[2] + k * LANES, load(grad_rows[2] + k * LANES) + to_upper[k]);
    }
}

inline auto triangle_visitor(int vectors) {
    return vectors == 4 ? visit_triangle<4> : vectors == 2 ? visit_triangle<2> : visit_triangle<1>;
}

struct PairBackward {
    const Shape& shape;
    Rows x, z, weight, grad_y, grad_x, grad_z;
    float* grad_weight;  // (I, G, G, O)
    PairGrid grid;
    int64_t rows, triangles;  // of one feature; triangles: two for each lower corner, used or not

    static constexpr int64_t MAX_TOKENS = 2048;
    static constexpr int WIDEST = std::max(1, MAX_VECTORS / 2);  // vectors in a strip: five registers for each

    // The working memory of one thread, for a block of tokens and a chunk of features.
    struct Workspace {
        int64_t visits_stride, sums_stride;
        Buffer<float> grad_y;  // (strips, tokens, length of the strip)
        Buffer<float> sums, weight, grad_weight;
        Buffer<PairVisit> visits;   // (CHUNK, tokens), sorted by triangle
        Buffer<int32_t> ends;       // (CHUNK, 1 + triangles): after the 0, the end of each triangle's visits
        Buffer<int32_t> visit_of;   // (tokens, CHUNK): the visit that a pair became, and its flags
        Buffer<PairPlaces> places;  // (tokens)
        Buffer<Products> products;

        Workspace(int64_t tokens, int64_t outputs, int64_t rows, int64_t triangles)
            : visits_stride(tokens + AHEAD),
              sums_stride(ceil_div(tokens, LANES) * LANES),
              grad_y(tokens * ceil_div(outputs, LANES) * LANES),
              sums(CHUNK * 2 * sums_stride),
              weight(rows * WIDEST * LANES),
              grad_weight(rows * WIDEST * LANES),
              visits(CHUNK * visits_stride),
              ends(CHUNK * (1 + triangles)),
              visit_of(tokens * CHUNK),
              places(tokens),
              products(1) {}

        PairSlopes slopes(int f) const {
            float* by_larger = sums + f * 2 * sums_stride;
            return {by_larger, by_larger + sums_stride};
        }
    };

    PairBackward(const Shape& s, const float* x_data, const float* z_data, const float* weight_data,
                 const float* grad_y_data, float* grad_x_data, float* grad_z_data, float* grad_weight_data)
        : shape(s),
          x{(char*)x_data, false, s.inputs},
          z{(char*)z_data, false, s.inputs},
          weight{(char*)weight_data, false, s.outputs},
          grad_y{(char*)grad_y_data, false, s.outputs},
          grad_x{(char*)grad_x_data, false, s.inputs},
          grad_z{(char*)grad_z_data, false, s.inputs},
          grad_weight(grad_weight_data),
          grid(s),
          rows(s.points * s.points),
          triangles(2 * rows) {}

    void run() const {
        const int64_t threads = std::min<int64_t>(useful_threads(shape), shape.inputs);
#pragma omp parallel for schedule(static) num_threads(int(threads))
        for (int64_t k = 0; k < threads; k++)
            run_features(shape.inputs * k / threads, shape.inputs * (k + 1) / threads);
    }

    void run_features(int64_t i_begin, int64_t i_end) const {
        Workspace work(std::min(MAX_TOKENS, shape.tokens), shape.outputs, rows, triangles);
        for (int64_t token = 0; token < shape.tokens; token += MAX_TOKENS) {
            const int64_t tokens = std::min(MAX_TOKENS, shape.tokens - token);
            for_strips(0, shape.outputs, WIDEST, [&](int64_t o, int count, int vectors) {
                float* strip = work.grad_y + o * tokens;
                const int length = vectors * LANES;
                for (int64_t n = 0; n < tokens; n++) grad_y.read(token + n, o, count, length, strip + n * length);
            });
            for (int64_t i = i_begin; i < i_end; i += CHUNK) {
                const int features = int(std::min<int64_t>(CHUNK, i_end - i));
                sort_visits(token, tokens, i, features, work);
                std::memset(work.sums, 0, CHUNK * 2 * work.sums_stride * sizeof(float));
                for_strips(0, shape.outputs, WIDEST, [&](int64_t o, int count, int vectors) {
                    for (int f = 0; f < features; f++) visit_feature(i, f, token, tokens, o, count, vectors, work);
                });
                write_grad_in(token, tokens, i, features, work);
            }
        }
    }

    static int32_t triangle(const PairPlaces& places, int f) {
        return 2 * places.lower[f] + (places.flags[f] & X_IS_LARGER);
    }

    // Sorts the tokens by triangle (counting sort) for up to CHUNK features from i on.
    void sort_visits(int64_t token, int64_t tokens, int64_t i, int features, Workspace& work) const {
        const int64_t stride = 1 + triangles;
        int32_t *ends = work.ends, *visit_of = work.visit_of;
        PairVisit* visits = work.visits;
        std::memset(ends, 0, features * stride * sizeof(int32_t));
        for (int64_t n = 0; n < tokens; n++) {
            PairPlaces& places = work.places[n];
            grid.locate(x, z, token + n, i, features, places);
            for (int f = 0; f < features; f++) ends[f * stride + 1 + triangle(places, f)]++;
        }
        for (int f = 0; f < features; f++)
            for (int64_t k = 1; k <= triangles; k++) ends[f * stride + k] += ends[f * stride + k - 1];
        // Now ends[k] is where triangle k starts. Each visit moves it on by one, so in the end it is where k ends.
        for (int64_t n = 0; n < tokens; n++) {
            const PairPlaces& places = work.places[n];
            for (int f = 0; f < features; f++) {
                const int32_t at = ends[f * stride + triangle(places, f)]++;
                visits[f * work.visits_stride + at] = {int32_t(n), places.larger[f], places.smaller[f]};
                visit_of[n * CHUNK + f] = at << FLAG_BITS | places.flags[f];
            }
        }
        for (int f = 0; f < features; f++)  // prefetching reads past the end
            std::fill_n(visits + f * work.visits_stride + tokens, AHEAD, PairVisit{});
    }

    // Visits a strip of outputs for feature f of the chunk from i on.
    void visit_feature(int64_t i, int f, int64_t token, int64_t tokens, int64_t o, int count, int vectors,
                       Workspace& work) const {
        const int length = vectors * LANES;
        const int64_t row = (i + f) * rows;
        for (int64_t r = 0; r < rows; r++) weight.read(row + r, o, count, length, work.weight + r * length);
        std::memset(work.grad_weight, 0, rows * length * sizeof(float));

        const int32_t* ends = work.ends + f * (1 + triangles);
        const PairSlopes slopes = work.slopes(f);
        const auto visit = triangle_visitor(vectors);
        for (int64_t k = 0, start = 0; k < triangles; start = ends[k++]) {
            if (start == ends[k]) continue;
            const int64_t lower = k / 2 * length, upper = lower + (shape.points + 1) * length;
            const int64_t middle = lower + (k % 2 ? shape.points : 1) * length;
            const float* w = work.weight;
            float* grad_w = work.grad_weight;
            visit(work.grad_y + o * tokens, length, work.visits + f * work.visits_stride, int(start), ends[k],
                  {w + lower, w + middle, w + upper}, {grad_w + lower, grad_w + middle, grad_w + upper},
                  *work.products, slopes);
        }
        if (tokens % LANES) slopes.add(*work.products, tokens / LANES * LANES);

        const Rows to{(char*)grad_weight, false, shape.outputs};
        for (int64_t r = 0; r < rows; r++) {
            float* sum = work.grad_weight + r * length;
            if (token > 0) {
                float before[WIDEST * LANES];
                to.read(row + r, o, count, length, before);
                for (int k = 0; k < length; k += LANES) store(sum + k, load(sum + k) + load(before + k));
            }
            to.write(row + r, o, count, sum);
        }
    }

    void write_grad_in(int64_t token, int64_t tokens, int64_t i, int features, Workspace& work) const {
        const float scale = grid.inverse_spacing();
        const int32_t* visit_of = work.visit_of;
        for (int64_t n = 0; n < tokens; n++, visit_of += CHUNK) {
            float larger[CHUNK] = {}, smaller[CHUNK] = {}, by_x[CHUNK], by_z[CHUNK];
            for (int f = 0; f < features; f++) {
                const PairSlopes slopes = work.slopes(f);
                larger[f] = scale * slopes.by_larger[visit_of[f] >> FLAG_BITS];
                smaller[f] = scale * slopes.by_smaller[visit_of[f] >> FLAG_BITS];
            }
            for (int f = 0; f < CHUNK; f++) {  // all, so that compilers make vectors of them
                const bool x_is_larger = visit_of[f] & X_IS_LARGER;
                const float slope_of_x = x_is_larger ? larger[f] : smaller[f];
                const float slope_of_z = x_is_larger ? smaller[f] : larger[f];
                by_x[f] = visit_of[f] & X_INSIDE ? slope_of_x : 0;
                by_z[f] = visit_of[f] & Z_INSIDE ? slope_of_z : 0;
            }
            grad_x.write(token + n, i, features, by_x);
            grad_z.write(token + n, i, features, by_z);
        }
    }
};

}  // namespace
