// What one core can do at most, for bench/cpu_limits.py: loops of nothing but the vector operations that it names.
// Each does at least `operations` of them, over `values` where it reads memory, and returns how many it did.

#include <cstdint>
#include <utility>

namespace {

// As in backends/native.cpp. The compiler cannot know what the value is afterwards.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#define KEEP_IN_REGISTER(vector) asm volatile("" : "+v"(vector))
#elif defined(__AVX__)
constexpr int LANES = 8;
#define KEEP_IN_REGISTER(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
constexpr int LANES = 4;
#define KEEP_IN_REGISTER(vector) asm volatile("" : "+w"(vector))
#else
constexpr int LANES = 4;
#define KEEP_IN_REGISTER(vector)
#endif
constexpr int CHAINS = 12;  // sums that do not wait for each other: two a cycle, each ready after four, need 8
using Chains = std::make_integer_sequence<int, CHAINS>;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float MemoryVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const MemoryVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<MemoryVector*>(to) = value; }
inline Vector splat(float value) { return value - Vector{}; }

inline void keep([[maybe_unused]] Vector& value) { KEEP_IN_REGISTER(value); }

template <int... k>
int64_t multiply_registers(int64_t operations, std::integer_sequence<int, k...>) {
    Vector sums[] = {splat(float(k))...}, factor = splat(0.5f), addend = splat(0.1f);
    keep(factor), keep(addend);
    int64_t done = 0;
    for (; done < operations; done += CHAINS) {
        ((sums[k] = sums[k] * factor + addend), ...);
        (keep(sums[k]), ...);
    }
    return done;
}

template <int... k>
int64_t multiply_loaded(const float* values, int64_t count, int64_t operations, std::integer_sequence<int, k...>) {
    Vector sums[] = {splat(float(k))...}, factor = splat(0.5f);
    keep(factor);
    int64_t done = 0;
    while (done < operations)
        for (int64_t at = 0; at + CHAINS * LANES <= count; at += CHAINS * LANES, done += CHAINS) {
            ((sums[k] += factor * load(values + at + k * LANES)), ...);
            (keep(sums[k]), ...);
        }
    return done;
}

inline void add_product(Vector& sum, Vector& a, Vector b) {
    keep(a);  // or the compiler would compute the product once
    sum += a * b;
}

template <int... k>
int64_t update_memory(float* values, int64_t count, int64_t operations, std::integer_sequence<int, k...>) {
    Vector a = splat(0.5f), b = splat(0.1f);
    int64_t done = 0;
    while (done < operations)
        for (int64_t at = 0; at + CHAINS * LANES <= count; at += CHAINS * LANES, done += CHAINS) {
            Vector sums[] = {load(values + at + k * LANES)...};
            (keep(sums[k]), ...);
            (add_product(sums[k], a, b), ...);
            (add_product(sums[k], a, b), ...);
            (store(values + at + k * LANES, sums[k]), ...);
        }
    return done;
}

#ifdef __AVX512BF16__
inline void add_dots(Vector& sum, Vector pairs) { asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(pairs)); }

template <int... k>
int64_t dot_registers(int64_t operations, std::integer_sequence<int, k...>) {
    Vector sums[] = {splat(float(k))...}, factor = splat(0.5f);
    int64_t done = 0;
    for (; done < operations; done += CHAINS)
        (add_dots(sums[k], factor), ...);
    return done;
}
#endif

}  // namespace

extern "C" {
int64_t lanes() { return LANES; }
int64_t registers(float*, int64_t, int64_t operations) { return multiply_registers(operations, Chains()); }
int64_t loaded(float* values, int64_t count, int64_t operations) {
    return multiply_loaded(values, count, operations, Chains());
}
int64_t updated(float* values, int64_t count, int64_t operations) {
    return update_memory(values, count, operations, Chains());
}
#ifdef __AVX512BF16__
int64_t bfloat16_dots(float*, int64_t, int64_t operations) { return dot_registers(operations, Chains()); }
#endif
}
