// Philox-4x32-10 words as normal values: the same bits as l2p_runtime/noise.py, which states the contract.
// Every float64 multiply and add must round on its own, so this file is built with -ffp-contract=off.

#include "lines.h"

#include <cstring>

using namespace l2p;

namespace {

constexpr int kAbiVersion = 2;
constexpr int kCoefficients = 7; // per table row, constant term first

struct Counter {
    uint32_t k, y, channel, image;
};

// One counter at a time: scalar multiplies in registers measured faster than arrays of 4, 8 or 16 lanes.
void philox(uint64_t seed, Counter at, uint32_t words[4]) {
    uint32_t c0 = at.k, c1 = at.y, c2 = at.channel, c3 = at.image;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(p0);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

float to_normal(uint32_t r, const double* table) {
    // No branch on the sign: it would be mispredicted every other time.
    const uint32_t upper = r >> 31;
    const double v = (r ^ (0U - upper)) + 0.5;
    uint64_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    // Exponent and top three mantissa bits name the row; v = 0.5 is row 0.
    const double* row = table + ((bits >> 49) - (uint64_t{1022} << 3)) * kCoefficients;
    // The other mantissa bits, under the exponent of 2, are a number in [2, 4).
    bits = ((bits << 3) & 0x000FFFFFFFFFFFFF) | 0x4000000000000000;
    double t;
    std::memcpy(&t, &bits, sizeof t);
    t -= 3.0;
    double z = row[kCoefficients - 1];
    for (int i = kCoefficients - 2; i >= 0; --i) z = z * t + row[i];
    std::memcpy(&bits, &z, sizeof bits);
    bits ^= uint64_t{upper} << 63;
    std::memcpy(&z, &bits, sizeof z);
    return static_cast<float>(z);
}

// Values x0 .. x1 - 1 of one line; the first and the last counter may give only some of their four.
void fill_line(uint64_t seed, Counter at, uint64_t x0, uint64_t x1, const double* table, float* out) {
    uint32_t words[4];
    for (uint64_t x = x0 / 4 * 4; x < x1; x += 4) {
        at.k = static_cast<uint32_t>(x / 4);
        philox(seed, at, words);
        for (uint64_t i = 0; i < 4; ++i)
            if (x + i >= x0 && x + i < x1) out[x + i - x0] = to_normal(words[i], table);
    }
}

} // namespace

// Version of the functions below and of the table's layout; the loader ignores a library with another one.
L2P_API int l2p_abi_version() { return kAbiVersion; }

// Fills a window [channels, rows, cols] of the noise. Strides are in floats; the last axis is contiguous.
// `table` is [256, 7] as in data/normal_table.f64. threads <= 0: as many as the machine runs at once.
// Returns 0, or 1 for a null pointer or a window past 2^32, or 2 when the system has no memory.
L2P_API int l2p_normal_noise(uint64_t seed, uint32_t image_index, uint32_t channel0, uint32_t channels, uint32_t row0,
                             uint32_t rows, uint32_t col0, uint32_t cols, const double* table, float* out,
                             int64_t channel_stride, int64_t row_stride, int threads) {
    const uint64_t limit = uint64_t{1} << 32;
    if (uint64_t{channel0} + channels > limit || uint64_t{row0} + rows > limit || uint64_t{col0} + cols > limit)
        return kBadArgument;
    const uint64_t lines = uint64_t{channels} * rows;
    if (lines == 0 || cols == 0) return kOk;
    if (!table || !out) return kBadArgument;

    return for_each_unit(lines, lines * cols, threads, [&](uint64_t line) {
        const uint32_t c = static_cast<uint32_t>(line / rows), y = static_cast<uint32_t>(line % rows);
        const Counter at{0, row0 + y, channel0 + c, image_index};
        fill_line(seed, at, col0, uint64_t{col0} + cols, table, out + c * channel_stride + y * row_stride);
    });
}
