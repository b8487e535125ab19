// The working memory of a thread, and access to rows of float32 or bfloat16 as padded floats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "vectors.h"

namespace {

// Working memory of a thread, kept between calls, because new pages cost more time than small layers take to compute.
class Arena {
  public:
    static constexpr size_t MAX_KEPT = size_t(64) << 20;  // bytes

    ~Arena() { std::free(kept_); }

    char* take(size_t bytes) {
        taken_ += bytes;
        wanted_ = std::max(wanted_, taken_);
        if (taken_ <= kept_bytes_) return kept_ + taken_ - bytes;
        return allocate(bytes);
    }
    void give_back(char* memory, size_t bytes) {  // in the reverse order of taking
        taken_ -= bytes;
        if (memory < kept_ || memory >= kept_ + kept_bytes_) std::free(memory);
        if (taken_ == 0 && wanted_ > kept_bytes_ && wanted_ <= MAX_KEPT) {
            std::free(kept_);
            kept_ = allocate(wanted_);
            kept_bytes_ = wanted_;
        }
    }

  private:
    static char* allocate(size_t bytes) {
        char* memory = static_cast<char*>(std::aligned_alloc(64, bytes));
        if (!memory) std::abort();  // out of memory; exceptions cannot cross the C ABI
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

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vector load_halves(const uint16_t* from) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(from), Words) << 16);
}
inline void store_halves(uint16_t* to, Vector value) {  // as `to_bfloat16` rounds them
    const Words bits = (Words)value, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, nan = Words{} + 0x7FC0;
    *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(value == value ? rounded : nan, Halves);
}

// Rows of a tensor of the caller, whose elements are float32 or bfloat16.
struct Rows {
    char* data;
    bool half;
    int64_t width;

    const float* floats(int64_t row, int64_t column) const {
        return reinterpret_cast<const float*>(data) + row * width + column;
    }
    // Reads `count` elements from (row, column) on as floats, and fills up with zeros to `padded` elements.
    void read(int64_t row, int64_t column, int count, int padded, float* to) const {
        if (half) {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(data) + row * width + column;
            int k = 0;
            for (; k + LANES <= count; k += LANES) store(to + k, load_halves(from + k));
            for (; k < count; k++) to[k] = from_bfloat16(from[k]);
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
            int k = 0;
            for (; k + LANES <= count; k += LANES) store_halves(to + k, load(from + k));
            for (; k < count; k++) to[k] = to_bfloat16(from[k]);
        } else {
            float* to = reinterpret_cast<float*>(data) + row * width + column;
            int k = 0;
            for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
            for (; k < count; k++) to[k] = from[k];
        }
    }
    // Whether strips of `count` elements are as fast in place as packed. They are if they consist of whole, aligned
    // cache lines, and the distance of rows spreads them over the sets of a cache, which depend on the place in a page.
    bool packed_enough(int count) const {
        const int64_t line = 64, lines_in_page = 64, stride = width * 4;
        return !half && uintptr_t(data) % line == 0 && stride % line == 0 && count * 4 % line == 0 &&
               std::gcd(stride / line, lines_in_page) * line <= count * 4;
    }
    void prefetch(int64_t row, int64_t column) const {
        __builtin_prefetch(data + (row * width + column) * (half ? 2 : 4));
    }
};

}  // namespace
