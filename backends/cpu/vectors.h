// Vectors of the CPU's full width, and sums over their lanes.

#pragma once

#include <cstdint>
#include <utility>

namespace {

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
#define KEEP_IN_REGISTER(vector)  // elsewhere it stops the compiler from loading a value three times
#endif
#define KEEP_POINTER(pointer) asm("" : "+r"(pointer))  // base + constant addresses: cheaper than base + index
constexpr int MAX_VECTORS = REGISTERS / 4;  // in a strip of outputs: the backward holds three for each

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }
inline Vector splat(float value) {
    Vector all = value - Vector{};  // compilers cannot drop a +, which changes -0.0
    KEEP_IN_REGISTER(all);
    return all;
}

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

}  // namespace
