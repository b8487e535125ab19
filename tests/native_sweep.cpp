// Runs the kernel on many small shapes in arrays of exactly the right size, for sanitizers to watch (test_native.py).
//
// Memory is to be filled with 0xFF as it is allocated, which reads as NaN: what comes of finite inputs must be finite.

#include "../backends/native.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>

namespace {

std::mt19937 source(0);

// Exactly `count` elements of a tensor, float32 or bfloat16, at an aligned address or not; NaN at first.
struct Elements {
    int64_t count;
    bool half;
    void* memory = nullptr;

    Elements(int64_t n, bool is_half) : count(n), half(is_half) {
        if (posix_memalign(&memory, source() % 2 ? 64 : 16, n * (half ? 2 : 4))) std::abort();
    }
    ~Elements() { std::free(memory); }
    Elements(const Elements&) = delete;
    Elements& operator=(const Elements&) = delete;
    uint16_t* narrow() const { return static_cast<uint16_t*>(memory); }
    float* wide() const { return static_cast<float*>(memory); }
    float get(int64_t k) const { return half ? from_bfloat16(narrow()[k]) : wide()[k]; }
    void set(int64_t k, float value) {
        if (half)
            narrow()[k] = to_bfloat16(value);
        else
            wide()[k] = value;
    }
    template <typename Draw>
    void fill(Draw draw) {
        for (int64_t k = 0; k < count; k++) set(k, draw());
    }
    bool finite() const {
        for (int64_t k = 0; k < count; k++)
            if (!std::isfinite(get(k))) return false;
        return true;
    }
};

float normal() { return std::normal_distribution<float>()(source); }

// Inside, at knots, beside them and outside; with `wild` also what no activation should be.
float input(const Shape& shape, bool wild) {
    const float infinity = std::numeric_limits<float>::infinity();
    const float knot = float(-shape.width / 2 + shape.width / (shape.points - 1) * (source() % shape.points));
    const float kinds[] = {normal(),         knot,      std::nextafter(knot, infinity),
                           normal() * 1000,  NAN,       infinity,
                           -infinity,        1e38f,     -1e38f};
    return kinds[source() % (wild ? 9 : 4)];
}

bool run(const Shape& shape, bool wild) {
    const int64_t rows = shape.inputs * shape.points;
    Elements x(shape.tokens * shape.inputs, shape.x_half), weight(rows * shape.outputs, shape.weight_half);
    Elements y(shape.tokens * shape.outputs, shape.y_half), grad_y(shape.tokens * shape.outputs, shape.y_half);
    Elements grad_x(shape.tokens * shape.inputs, shape.x_half), grad_weight(rows * shape.outputs, false);
    x.fill([&] { return input(shape, wild); });
    weight.fill(normal);
    grad_y.fill(normal);
    auto call = [&] {
        for (Elements* result : {&y, &grad_x, &grad_weight}) result->fill([] { return NAN; });
        splinegpt_forward(&shape, x.memory, weight.memory, y.memory);
        splinegpt_backward(&shape, x.memory, weight.memory, grad_y.memory, grad_x.memory, grad_weight.wide());
    };
    const auto good = [&] { return wild || (y.finite() && grad_x.finite() && grad_weight.finite()); };
    std::thread(call).join();  // a new thread keeps no working memory yet: each piece is an allocation of its own
    if (!good()) return false;
    call();
    return good();
}

bool run_pairs(const Shape& shape, bool wild) {
    const int64_t ins = shape.tokens * shape.inputs, outs = shape.tokens * shape.outputs;
    const int64_t weights = shape.inputs * shape.points * shape.points * shape.outputs;
    Elements x(ins, false), z(ins, false), weight(weights, false), y(outs, false), grad_y(outs, false);
    Elements grad_x(ins, false), grad_z(ins, false), grad_weight(weights, false);
    for (Elements* each : {&x, &z}) each->fill([&] { return input(shape, wild); });
    for (Elements* each : {&weight, &grad_y}) each->fill(normal);
    for (Elements* result : {&y, &grad_x, &grad_z, &grad_weight}) result->fill([] { return NAN; });
    std::thread([&] {
        splinegpt_pairs_forward(&shape, x.wide(), z.wide(), weight.wide(), y.wide());
        splinegpt_pairs_backward(&shape, x.wide(), z.wide(), weight.wide(), grad_y.wide(), grad_x.wide(), grad_z.wide(),
                                 grad_weight.wide());
    }).join();
    return wild || (y.finite() && grad_x.finite() && grad_z.finite() && grad_weight.finite());
}

int failures = 0, shapes = 0;

void try_shape(int64_t tokens, int64_t inputs, int64_t outputs, int64_t points) {
    if (source() % 3) return;  // a third of them: enough of each kind
    const unsigned choice = source();
    const Shape shape{tokens,          inputs,          points,          outputs, choice & 8 ? 3 : 1,
                      choice & 1,      choice >> 1 & 1, choice >> 2 & 1, 4.0};
    const bool wild = (choice >> 4) % 4 == 0;
    shapes++;
    if (run(shape, wild) && (points > 17 || run_pairs(shape, wild))) return;
    failures++;
    std::fprintf(stderr, "not finite: tokens %ld inputs %ld outputs %ld points %ld choice %u\n", long(tokens),
                 long(inputs), long(outputs), long(points), choice % 16);
}

void try_attention(int64_t tokens, int64_t heads, int64_t size, int64_t rotary, int64_t norm) {
    const AttentionShape shape{2, tokens, heads, size, source() % 2 ? 3 : 1, rotary, norm};
    const int64_t rows = shape.batch * tokens, width = heads * size;
    Elements qkv(rows * 3 * width, false), grad_qkv(rows * 3 * width, false), y(rows * width, false);
    Elements grad_y(rows * width, false), statistics(rows * heads * 2, false), angles(tokens * (size / 2), false);
    for (Elements* each : {&qkv, &grad_y, &angles}) each->fill(normal);
    std::thread([&] {
        splinegpt_attention(&shape, qkv.wide(), angles.wide(), angles.wide(), y.wide(), statistics.wide());
        splinegpt_attention_backward(&shape, qkv.wide(), angles.wide(), angles.wide(), grad_y.wide(), statistics.wide(),
                                     grad_qkv.wide());
    }).join();
    shapes++;
    if (y.finite() && grad_qkv.finite()) return;
    failures++;
    std::fprintf(stderr, "not finite: attention of %ld tokens, %ld heads of %ld\n", long(tokens), long(heads),
                 long(size));
}

}  // namespace

int main() {
    for (int64_t tokens : {1, 2, 31, 32, 33, 70})
        for (int64_t size : {2, 6, 16, 18, 32, 34, 64})
            for (int64_t heads : {1, 3}) try_attention(tokens, heads, size, source() % 2, source() % 2);
    for (int64_t points : {2, 3, 5, 8, 17, 64, 130})
        for (int64_t inputs : {1, 2, 15, 16, 17, 33})
            for (int64_t outputs : {1, 3, 16, 17, 63, 64, 65, 128, 130, 200})
                for (int64_t tokens : {0, 1, 2, 3, 17, 65}) try_shape(tokens, inputs, outputs, points);
    for (int64_t tokens : {1023, 1025, 2047, 2048, 2049, 4100})
        for (int64_t outputs : {5, 16, 70})
            for (int64_t points : {2, 9, 140}) try_shape(tokens, 3, outputs, points);
    std::printf("%d shapes\n", shapes);
    return failures ? 1 : 0;
}
