// The spline layer on a CPU: forward and backward for float32 and bfloat16, behind a plain C ABI.
//
//     y[n,o] = sum_i (1-t) W[i,j,o] + t W[i,j+1,o],   cell j and place t found from x[n,i]
//
// All arithmetic is float32 (the place on the grid float64); bfloat16 is converted where rows are read and written, so
// the kernels see nothing but padded float tiles. Each sum is taken in an order that depends on neither the number of
// threads nor the other tokens of the batch, and no two threads write to the same place: results are deterministic.
//
// Forward: a token adds two rows of W for each feature. What bounds it is loads from the L1 cache, so a tile of W
// (some features, all control points, a strip of outputs) is packed to stay there, and the sums stay in registers.
//
// Backward: tokens are sorted by cell, one feature at a time. All tokens of a cell share the two rows of W and of its
// gradient, which therefore stay in registers, and nothing is stored but the gradient of x.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// ---- vectors ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#define KEEP_IN_REGISTER(vector) asm("" : "+v"(vector))
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#define KEEP_IN_REGISTER(vector) asm("" : "+x"(vector))
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#define KEEP_IN_REGISTER(vector) asm("" : "+w"(vector))
#else
constexpr int LANES = 4, REGISTERS = 16;
#define KEEP_IN_REGISTER(vector)  // otherwise: stops the compiler from loading one value from memory three times
#endif
#define KEEP_POINTER(pointer) asm("" : "+r"(pointer))  // base + constant addresses: cheaper than base + index
constexpr int MOST_VECTORS = REGISTERS / 4;  // a strip of outputs: the backward holds three vectors for each of its

// Whether bfloat16 is computed by vdpbf16ps, the lerp of 16 outputs in one instruction, rather than in float32. Off
// unless asked for (-DBFLOAT16_DOT=1): Intel's Emerald Rapids issues one in two cycles, where two float32 multiply-adds
// are faster, and with both weights rounded to bfloat16, inputs far outside the grid cancel badly.
#ifndef BFLOAT16_DOT
#define BFLOAT16_DOT 0
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }
inline Vector splat(float value) {
    Vector all = value - Vector{};  // not +, which is not exact for -0.0 and therefore not left out
    KEEP_IN_REGISTER(all);
    return all;
}

#if BFLOAT16_DOT
// sum += the dot products of pairs of bfloat16: in each lane the values at both ends of a cell, and their two weights.
inline void add_dots(Vector& sum, const float* pairs, uint32_t weights) {
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    const Bits all = weights - Bits{};
    asm("vdpbf16ps %1, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const UnalignedVector*>(pairs)), "v"(all));
}
#else
[[maybe_unused]] inline void add_dots(Vector&, const float*, uint32_t) {}
#endif

// Lane k of the result is the sum of lanes k and k ^ distance: of a where k & distance is 0, else of b.
template <int distance, int... k>
inline Vector fold(Vector a, Vector b, std::integer_sequence<int, k...>) {
    constexpr auto swapped = [](int lane) { return lane & distance ? lane - distance + LANES : lane + distance; };
    constexpr auto blended = [](int lane) { return lane & distance ? lane + LANES : lane; };
#if defined(__clang__)
    return __builtin_shufflevector(a, b, swapped(k)...) + __builtin_shufflevector(a, b, blended(k)...);
#else
    typedef int32_t Indices __attribute__((vector_size(LANES * 4)));
    return __builtin_shuffle(a, b, Indices{swapped(k)...}) + __builtin_shuffle(a, b, Indices{blended(k)...});
#endif
}

// The sum over the lanes of each of LANES vectors that lie one after the other.
template <int count = LANES>
inline Vector lane_sums(const float* vectors) {
    if constexpr (count == 1)
        return load(vectors);
    else
        return fold<count / 2>(lane_sums<count / 2>(vectors), lane_sums<count / 2>(vectors + count / 2 * LANES),
                               std::make_integer_sequence<int, LANES>());
}

// ---- memory ----------------------------------------------------------------------------------------------------

// Working memory of a thread, kept from call to call: fresh pages cost more than small layers take to compute.
class Arena {
  public:
    static constexpr size_t MOST_KEPT = size_t(64) << 20;  // bytes

    ~Arena() { std::free(kept_); }

    char* take(size_t bytes) {
        taken_ += bytes;
        wanted_ = std::max(wanted_, taken_);
        if (taken_ <= kept_bytes_) return kept_ + taken_ - bytes;
        return allocate(bytes);
    }
    void give_back(char* memory, size_t bytes) {  // last taken, first given back
        taken_ -= bytes;
        if (memory < kept_ || memory >= kept_ + kept_bytes_) std::free(memory);
        if (taken_ == 0 && wanted_ > kept_bytes_ && wanted_ <= MOST_KEPT) {
            std::free(kept_);
            kept_ = allocate(wanted_);
            kept_bytes_ = wanted_;
        }
    }

  private:
    static char* allocate(size_t bytes) {
        char* memory = static_cast<char*>(std::aligned_alloc(64, bytes));
        if (!memory) std::abort();  // out of memory: there is nobody to throw to across a C ABI
        return memory;
    }
    char* kept_ = nullptr;
    size_t kept_bytes_ = 0, taken_ = 0, wanted_ = 0;
};
thread_local Arena arena;

template <typename T>
class Buffer {  // uninitialized, aligned to a cache line
  public:
    explicit Buffer(int64_t count) : bytes_((count * sizeof(T) + 63) / 64 * 64), data_((T*)arena.take(bytes_)) {}
    ~Buffer() { arena.give_back((char*)data_, bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

  private:
    size_t bytes_;
    T* data_;
};

inline uint16_t to_bfloat16(float value) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
}

inline uint32_t bfloat16_pair(float low, float high) { return uint32_t(to_bfloat16(high)) << 16 | to_bfloat16(low); }

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// Rows of a tensor whose elements are float32 or bfloat16, as the caller has them.
struct Rows {
    char* data;
    bool half;
    int64_t width;

    const float* floats(int64_t row, int64_t column) const {
        return reinterpret_cast<const float*>(data) + row * width + column;
    }
    // `count` elements from (row, column) on, as float, then zeros up to `padded`.
    void read(int64_t row, int64_t column, int count, int padded, float* to) const {
        if (half) {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(data) + row * width + column;
            for (int k = 0; k < count; k++) to[k] = from_bfloat16(from[k]);
        } else {
            const float* from = floats(row, column);
            int k = 0;
            for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
            for (; k < count; k++) to[k] = from[k];
        }
        for (int k = count; k < padded; k++) to[k] = 0;
    }
    void write(int64_t row, int64_t column, int count, const float* from) const {
        if (half) {
            uint16_t* to = reinterpret_cast<uint16_t*>(data) + row * width + column;
            for (int k = 0; k < count; k++) to[k] = to_bfloat16(from[k]);
        } else {
            float* to = reinterpret_cast<float*>(data) + row * width + column;
            int k = 0;
            for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
            for (; k < count; k++) to[k] = from[k];
        }
    }
    // Whether strips of `count` elements can be worked on in place as fast as if they were packed: whole, aligned
    // cache lines, with rows so far apart that many fit a cache (whose sets go by the place within a page).
    bool packed_enough(int count) const {
        const int64_t line = 64, lines_in_page = 64, stride = width * 4;
        return !half && uintptr_t(data) % line == 0 && stride % line == 0 &&
               std::gcd(stride / line, lines_in_page) * line <= count * 4;
    }
    void prefetch(int64_t row, int64_t column) const {
        __builtin_prefetch(data + (row * width + column) * (half ? 2 : 4));
    }
};

// ---- the grid --------------------------------------------------------------------------------------------------

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

// ---- the problem -----------------------------------------------------------------------------------------------

struct Shape {  // mirrored in native.py
    int64_t tokens, inputs, points, outputs, threads;
    int64_t x_half, weight_half, y_half;  // bfloat16 rather than float32; gradients are of the type of what they are of
    double width;
};

// Calls body(first output, how many, how many vectors they fill) for strips that cover the outputs: as many vectors
// wide as allowed while that many are left, then narrower ones, the last of them padded.
template <typename Body>
void for_strips(int64_t output, int64_t output_end, int most_vectors, Body body) {
    for (int vectors = most_vectors; output < output_end; output += vectors * LANES) {
        while (vectors > 1 && vectors * LANES > output_end - output) vectors /= 2;
        body(output, int(std::min<int64_t>(vectors * LANES, output_end - output)), vectors);
    }
}

// More threads than this much work is worth cost more than they save.
inline int useful_threads(const Shape& shape) {
    const double multiply_adds = 2.0 * shape.tokens * shape.inputs * shape.outputs;
    return int(std::max(1.0, std::min(double(shape.threads), multiply_adds / 50000)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- forward ---------------------------------------------------------------------------------------------------

// Adds the splines of some features to the sums of some tokens. `row` is where the lower row of W of each
// (token, feature) starts in `weight`, `next` the distance to the upper one; sums (tokens, vectors * LANES).
// `paired`: `weight` holds pairs of bfloat16, the rows of both ends of a cell as one, and `place` pairs of weights.
template <int vectors, bool paired>
void add_splines(const float* weight, int64_t next, const int32_t* row, const float* place, int features,
                 int64_t tokens, bool first, float* sums) {
    const Vector ones = splat(1);
    for (int64_t n = 0; n < tokens; n++, row += CHUNK, place += CHUNK, sums += vectors * LANES) {
        Vector sum[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) sum[k] = first ? Vector{} : load(sums + k * LANES);
        auto add = [&](uint32_t lower_row, const float& t) __attribute__((always_inline)) {
            const float *lower = weight + lower_row, *upper = lower + next;
            if constexpr (paired) {
                uint32_t weights;
                std::memcpy(&weights, &t, 4);
#pragma GCC unroll 8
                for (int k = 0; k < vectors; k++) add_dots(sum[k], lower + k * LANES, weights);
                return;
            }
            KEEP_POINTER(upper);
            const Vector right = splat(t), left = ones - right;
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += left * load(lower + k * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; k++) sum[k] += right * load(upper + k * LANES);
        };
        int f = 0;
        for (; f + 2 <= features; f += 2) {
            uint64_t two_rows;  // one load for two: loads are what there are too many of
            std::memcpy(&two_rows, row + f, 8);
            add(uint32_t(two_rows), place[f]);
            add(uint32_t(two_rows >> 32), place[f + 1]);
        }
        if (f < features) add(row[f], place[f]);
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) store(sums + k * LANES, sum[k]);
    }
}

template <bool paired>
auto splines_adder(int vectors) {
    return vectors == 8   ? add_splines<8, paired>
           : vectors == 4 ? add_splines<4, paired>
           : vectors == 2 ? add_splines<2, paired>
                          : add_splines<1, paired>;
}

struct Forward {
    const Shape& shape;
    Rows x, weight, y;  // x (N, I), weight (I*G, O), y (N, O)
    Grid grid;
    bool paired;
    int most_vectors, tile_features;
    int64_t tile_rows;  // of one feature

    Forward(const Shape& s, const void* x_data, const void* weight_data, void* y_data)
        : shape(s),
          x{(char*)x_data, s.x_half != 0, s.inputs},
          weight{(char*)weight_data, s.weight_half != 0, s.outputs},
          y{(char*)y_data, s.y_half != 0, s.outputs},
          grid(s.points, s.width),
          paired(BFLOAT16_DOT && s.y_half && s.tokens > s.points),  // else too few for what packing costs
          tile_rows(paired ? s.points - 1 : s.points) {
        // Measured with L1 caches of 48 KiB: wide strips while a tile of four features fits there; else narrower
        // ones, tiles that fit the L2 cache, and more features to a tile, as each costs a pass over the sums.
        const bool small = s.points <= 16 * 8 / MOST_VECTORS;
        most_vectors = small ? MOST_VECTORS : std::max(1, MOST_VECTORS / 2);
        const int64_t tile_bytes = small ? 32 << 10 : 128 << 10;
        tile_features = CHUNK;
        const int64_t feature_bytes = tile_rows * most_vectors * LANES * 4;
        while (tile_features > 1 && tile_features * feature_bytes > tile_bytes) tile_features /= 2;
    }

    void run() {
        const int threads = useful_threads(shape);
        const int64_t most_tokens = std::clamp<int64_t>((3 << 17) / shape.outputs, 64, 1024);  // sums of 1.5 MiB
        const int64_t even_blocks = ceil_div(ceil_div(shape.tokens, most_tokens), threads) * threads;
        const int64_t block = ceil_div(shape.tokens, even_blocks), blocks = ceil_div(shape.tokens, block);
        const int64_t parts = blocks < threads ? ceil_div(threads, blocks) : 1;  // few tokens: split outputs as well
        const int64_t part = ceil_div(ceil_div(shape.outputs, parts), LANES) * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t p = 0; p < parts; p++)
                run_block(b * block, std::min((b + 1) * block, shape.tokens), p * part,
                          std::min((p + 1) * part, shape.outputs));
    }

    void run_block(int64_t token, int64_t token_end, int64_t output, int64_t output_end) {
        const int64_t tokens = token_end - token, padded = ceil_div(output_end - output, LANES) * LANES;
        if (padded <= 0) return;
        Buffer<float> tile(tile_features * tile_rows * most_vectors * LANES), sums(tokens * padded);
        Buffer<float> place(tokens * CHUNK);
        Buffer<int32_t> cell(tokens * CHUNK), row(tokens * CHUNK);
        for (int64_t i = 0; i < shape.inputs; i += CHUNK) {
            const int features = int(std::min<int64_t>(CHUNK, shape.inputs - i));
            locate(token, tokens, i, features, cell, place);
            for (int f = 0; f < features; f += tile_features)
                add_features(i + f, std::min(tile_features, features - f), tokens, output, output_end, cell + f,
                             place + f, row + f, tile, sums);
        }
        for_strips(output, output_end, most_vectors, [&](int64_t o, int count, int vectors) {
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
            if (!paired) continue;
            for (float* t = place + n * CHUNK; t < place + (n + 1) * CHUNK; t++) {
                const uint32_t weights = bfloat16_pair(1 - *t, *t);
                std::memcpy(t, &weights, 4);
            }
        }
    }

    void add_features(int64_t i, int features, int64_t tokens, int64_t output, int64_t output_end, const int32_t* cell,
                      const float* place, int32_t* row, float* tile, float* sums) const {
        int64_t stride = 0;
        for_strips(output, output_end, most_vectors, [&](int64_t o, int count, int vectors) {
            // With few tokens, read W where it lies: packing would read all G control points of each spline.
            const bool in_place = (tokens < shape.points ? !weight.half : weight.packed_enough(count)) && !paired &&
                                  count == vectors * LANES && features * shape.points * shape.outputs < INT32_MAX;
            const int64_t row_length = in_place ? shape.outputs : vectors * LANES;
            if (row_length != stride) {
                stride = row_length;
                for (int64_t n = 0; n < tokens; n++)
                    for (int f = 0; f < features; f++)
                        row[n * CHUNK + f] = int32_t((f * tile_rows + cell[n * CHUNK + f]) * stride);
            }
            if (!in_place) pack(i, features, o, count, vectors, tile);
            const auto add = paired ? splines_adder<BFLOAT16_DOT>(vectors) : splines_adder<false>(vectors);
            add(in_place ? weight.floats(i * shape.points, o) : tile, stride, row, place, features, tokens, i == 0,
                sums + (o - output) * tokens);
        });
    }

    void pack(int64_t i, int features, int64_t o, int count, int vectors, float* tile) const {
        const int length = vectors * LANES;
        if (!paired) {
            for (int64_t r = 0; r < features * shape.points; r++)
                weight.read(i * shape.points + r, o, count, length, tile + r * length);
            return;
        }
        float ends[2][MOST_VECTORS * LANES];
        for (int f = 0; f < features; f++) {
            weight.read((i + f) * shape.points, o, count, length, ends[0]);
            for (int64_t g = 0; g < tile_rows; g++, tile += length) {
                const float *lower = ends[g % 2], *upper = ends[(g + 1) % 2];
                weight.read((i + f) * shape.points + g + 1, o, count, length, ends[(g + 1) % 2]);
                for (int k = 0; k < length; k++) {
                    const uint32_t pair = bfloat16_pair(lower[k], upper[k]);
                    std::memcpy(tile + k, &pair, 4);
                }
            }
        }
    }

};

// ---- backward --------------------------------------------------------------------------------------------------

inline void add_lane_sums(const float* vectors, float* to) { store(to, load(to) + lane_sums(vectors)); }

struct Visit {  // a token in a cell
    int32_t token;
    float place;
};
constexpr int AHEAD = 4;  // visits by which the gradients of y are prefetched

// The visits from `visit` to `end` of one feature, all to one cell: their share of the gradients of its two rows of W,
// and, to grad_place[visit], the gradient of its place, dy . (upper - lower). Those are summed over the lanes of
// `products`, LANES visits at a time; fewer wait there for the next cell. `carry` is what the cell below has for the
// row that both share, then what this one has for the row it shares with the cell above. `fresh`: grad_lower is unset.
template <int vectors>
void visit_cell(const float* grad_y, int64_t grad_y_stride, const Visit* visits, int visit, int end, const float* lower,
                const float* upper, bool fresh, float* grad_lower, float* carry, float* products, float* grad_place) {
    const Vector ones = splat(1);
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

auto cell_visitor(int vectors) {
    return vectors == 8   ? visit_cell<8>
           : vectors == 4 ? visit_cell<4>
           : vectors == 2 ? visit_cell<2>
                          : visit_cell<1>;
}

struct Backward {
    const Shape& shape;
    Rows x, weight, grad_y, grad_x;
    float* grad_weight;  // (I, G, O)
    Grid grid;

    static constexpr int64_t MOST_TOKENS = 2048;

    // What one thread needs for its features and a block of tokens.
    struct Workspace {
        int64_t tokens, visits_stride, sums_stride;
        Buffer<float> grad_y, products, sums, weight, grad_weight, place, grad_x;
        Buffer<Visit> visits;        // (features, tokens), sorted by cell
        Buffer<int32_t> ends, cell;  // ends (features, G): where the visits of a cell end; cell (tokens, CHUNK)

        Workspace(int64_t most_tokens, int64_t features, int64_t points)
            : tokens(most_tokens),
              visits_stride(most_tokens + AHEAD),
              sums_stride(ceil_div(most_tokens, LANES) * LANES + LANES),
              grad_y(most_tokens * MOST_VECTORS * LANES),
              products(LANES * LANES),
              sums(features * sums_stride),
              weight(points * MOST_VECTORS * LANES),
              grad_weight(points * MOST_VECTORS * LANES),
              place(most_tokens * CHUNK),
              grad_x(most_tokens * CHUNK),
              visits(features * visits_stride),
              ends(features * points),
              cell(most_tokens * CHUNK) {}
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
        Workspace work(std::min(MOST_TOKENS, shape.tokens), i_end - i, shape.points);
        for (int64_t token = 0; token < shape.tokens; token += MOST_TOKENS) {
            const int64_t tokens = std::min(MOST_TOKENS, shape.tokens - token);
            for_chunks(i, i_end, [&](int64_t c, int count) { sort_visits(token, tokens, c, count, c - i, work); });
            std::memset(work.sums, 0, (i_end - i) * work.sums_stride * sizeof(float));
            for_strips(0, shape.outputs, MOST_VECTORS, [&](int64_t o, int count, int vectors) {
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

    struct Strip {  // some outputs, and where the gradients of y for a block of tokens are
        int64_t output;
        int count, vectors;
        const float* grad_y;
        int64_t grad_y_stride;
    };

    Strip strip_of_grad_y(int64_t token, int64_t tokens, int64_t o, int count, int vectors, Workspace& work) const {
        const int length = vectors * LANES;
        if (count == length && grad_y.packed_enough(count))
            return {o, count, vectors, grad_y.floats(token, o), shape.outputs};
        for (int64_t n = 0; n < tokens; n++) grad_y.read(token + n, o, count, length, work.grad_y + n * length);
        return {o, count, vectors, work.grad_y, length};
    }

    // Counting sort by cell of the tokens, for up to CHUNK features from i on, the thread's `own`-th and following.
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
        // ends[g] is where cell g starts now, and, each visit having moved it on by one, where it ends afterwards.
        for (int64_t n = 0; n < tokens; n++)
            for (int f = 0; f < features; f++) {
                const int32_t at = ends[f * shape.points + cell[n * CHUNK + f]]++;
                visits[f * work.visits_stride + at] = {int32_t(n), place[n * CHUNK + f]};
            }
        for (int f = 0; f < features; f++)  // what is prefetched past the end must exist
            std::fill_n(visits + f * work.visits_stride + tokens, AHEAD, Visit{0, 0});
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
        float *sums = work.sums + own * work.sums_stride, carry[MOST_VECTORS * LANES] = {};
        const bool fresh = token == 0 || !in_place;
        const auto visit = cell_visitor(strip.vectors);
        for (int64_t g = 0, start = 0; g < points - 1; start = ends[g++])
            visit(strip.grad_y, strip.grad_y_stride, visits, int(start), ends[g], w + g * stride, w + (g + 1) * stride,
                  fresh, grad_w + g * stride, carry, work.products, sums);
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

// ---- the basis, for matrix units ---------------------------------------------------------------------------------

// What of the layer is not a matrix product, for CPUs whose matrix units multiply bfloat16 (amx.py): the basis of each
// token, (columns x inputs), and the gradient of x from that of the basis.
struct Basis {
    Shape shape;
    Rows x;
    Grid grid;

    Basis(const Shape& shape, const void* x)
        : shape(shape), x{(char*)x, bool(shape.x_half), shape.inputs}, grid(int(shape.points), shape.width) {}

    // Calls body(token, first input, how many, cells, places) for all, CHUNK inputs at a time.
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

    // Ramps: how far each of the points - 1 cells lies left of x, 0 … 1 (beyond, at the ends of the grid).
    void write_ramps(uint16_t* ramps) const {
        write(ramps, int(shape.points) - 1, [](int g, int cell, float place) {
            const float inside = g == cell ? place : 0;
            return g < cell ? 1 : inside;
        });
    }

    // Hats: 1 - t and t at the ends of the cell, else 0.
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
}
