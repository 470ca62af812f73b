// The kernels between networks: the same bits as l2p_runtime/backends/host_kernels.py, which states them.
// Every float32 multiply and add must round on its own, so this file is built with -ffp-contract=off.

#include "lines.h"

#include <cmath>
#include <cstring>

using namespace l2p;

namespace {

constexpr uint64_t kBlock = 512;     // pixels that are quantized before they are interleaved
constexpr uint64_t kChunkRows = 32;  // rows of one unit of work that shares enlarged lines
constexpr int kTaps = 4;

L2P_VECTORS void euler_line(float* target, const float* positive, const float* base, uint64_t columns, float guidance,
                            float step) {
    if (base)
        for (uint64_t x = 0; x < columns; ++x)
            target[x] -= step * (base[x] + guidance * (positive[x] - base[x]));
    else
        for (uint64_t x = 0; x < columns; ++x) target[x] -= step * positive[x];
}

// [-1, 1] to [0, 1] times `top`; NaN stays.
inline float scaled(float value, float half_top) {
    const float low = value < -1.0f ? -1.0f : value;
    return ((low > 1.0f ? 1.0f : low) + 1.0f) * half_top;
}

// To the nearest integer, ties to even: adding 1.5 * 2^23 leaves no bits for a fraction.
inline int32_t rounded(float value) {
    constexpr float kShift = 12582912.0f;
    return static_cast<int32_t>(value == value ? (value + kShift) - kShift : 0.0f);
}

// A value of [0, 1] or NaN as float16, to nearest, ties to even.
inline uint16_t half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Below 2^-14 a float16 counts in steps of 2^-24.
    const uint32_t small = static_cast<uint32_t>(rounded(value * 16777216.0f));
    const uint32_t normal = ((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112 << 10);
    const uint32_t nan = (bits >> 16 & 0x8000) | 0x7C00 | (bits >> 13 & 0x3FF);
    return static_cast<uint16_t>(value == value ? (value < 6.103515625e-05f ? small : normal) : nan);
}

L2P_VECTORS void quantize_uint8(uint8_t* out, const float* in, uint64_t count) {
    for (uint64_t x = 0; x < count; ++x) out[x] = static_cast<uint8_t>(rounded(scaled(in[x], 127.5f)));
}

L2P_VECTORS void quantize_uint16(uint16_t* out, const float* in, uint64_t count) {
    for (uint64_t x = 0; x < count; ++x) out[x] = static_cast<uint16_t>(rounded(scaled(in[x], 32767.5f)));
}

L2P_VECTORS void quantize_float16(uint16_t* out, const float* in, uint64_t count) {
    for (uint64_t x = 0; x < count; ++x) out[x] = half(scaled(in[x], 0.5f));
}

L2P_VECTORS void interleave(uint8_t* out, const uint8_t* red, const uint8_t* green, const uint8_t* blue, uint64_t count) {
    for (uint64_t x = 0; x < count; ++x) {
        out[3 * x] = red[x];
        out[3 * x + 1] = green[x];
        out[3 * x + 2] = blue[x];
    }
}

L2P_VECTORS void interleave(uint16_t* out, const uint16_t* red, const uint16_t* green, const uint16_t* blue,
                            uint64_t count) {
    for (uint64_t x = 0; x < count; ++x) {
        out[3 * x] = red[x];
        out[3 * x + 1] = green[x];
        out[3 * x + 2] = blue[x];
    }
}

template <typename Value, typename Quantize>
int write_pixels(Value* out, const float* image, int64_t plane, int64_t row, uint64_t rows, uint64_t columns,
                 int threads, const Quantize& quantize) {
    return for_each_unit(rows, 3 * rows * columns, threads, [&](uint64_t y) {
        Value parts[3][kBlock];
        const float* line = image + static_cast<int64_t>(y) * row;
        for (uint64_t x = 0; x < columns; x += kBlock) {
            const uint64_t count = std::min(kBlock, columns - x);
            for (int channel = 0; channel < 3; ++channel) quantize(parts[channel], line + channel * plane + x, count);
            interleave(out + 3 * (y * columns + x), parts[0], parts[1], parts[2], count);
        }
    });
}

// Taps and weights with one line for each of the four.
struct Columns {
    std::vector<int32_t> taps;
    std::vector<float> weights;
    uint64_t count;
};

L2P_VECTORS void enlarge_line(float* wide, const float* line, const int32_t* taps, const float* weights, uint64_t count) {
    const int32_t *t0 = taps, *t1 = t0 + count, *t2 = t1 + count, *t3 = t2 + count;
    const float *w0 = weights, *w1 = w0 + count, *w2 = w1 + count, *w3 = w2 + count;
    for (uint64_t x = 0; x < count; ++x)
        wide[x] = ((line[t0[x]] * w0[x] + line[t1[x]] * w1[x]) + line[t2[x]] * w2[x]) + line[t3[x]] * w3[x];
}

L2P_VECTORS void mix_line(float* target, const float* const* lines, const float* weights, uint64_t columns, float keep,
                          float take) {
    const float *a = lines[0], *b = lines[1], *c = lines[2], *d = lines[3];
    const float wa = weights[0], wb = weights[1], wc = weights[2], wd = weights[3];
    for (uint64_t x = 0; x < columns; ++x) {
        const float enlarged = ((a[x] * wa + b[x] * wb) + c[x] * wc) + d[x] * wd;
        target[x] = keep * target[x] + take * enlarged;
    }
}

// Lines of a coarse plane enlarged along their columns; those of the row before mostly serve the next.
class EnlargedLines {
  public:
    EnlargedLines(const float* plane, int64_t row_stride, const Columns& columns)
        : plane_(plane), row_stride_(row_stride), columns_(columns), lines_(2 * kTaps * columns.count) {}

    // The four lines of an output row.
    void find(const int32_t* rows, const float** found) {
        for (int i = 0; i < kTaps; ++i) {
            const int slot = rows[i] % kTaps;
            bool is_taken = false;
            for (int before = 0; before < i; ++before) is_taken |= rows[before] != rows[i] && rows[before] == rows_[slot];
            if (rows_[slot] == rows[i]) {
                found[i] = line(slot);
            } else if (is_taken) {
                found[i] = enlarged(rows[i], kTaps + i);
            } else {
                rows_[slot] = rows[i];
                found[i] = enlarged(rows[i], slot);
            }
        }
    }

  private:
    float* line(int slot) { return lines_.data() + static_cast<uint64_t>(slot) * columns_.count; }

    const float* enlarged(int32_t row, int slot) {
        const float* source = plane_ + row * row_stride_;
        enlarge_line(line(slot), source, columns_.taps.data(), columns_.weights.data(), columns_.count);
        return line(slot);
    }

    const float* plane_;
    int64_t row_stride_;
    const Columns& columns_;
    std::vector<float> lines_;
    int32_t rows_[kTaps] = {-1, -1, -1, -1};
};

bool are_inside(const int32_t* taps, uint64_t count, uint64_t size) {
    return std::all_of(taps, taps + kTaps * count,
                       [size](int32_t tap) { return tap >= 0 && static_cast<uint64_t>(tap) < size; });
}

} // namespace

// Strides are in floats; the last axis is contiguous. threads <= 0: as many as the machine runs at once.
// Each function returns 0, 1 for a bad argument, or 2 when the system has no memory.

// image [planes, rows, columns] -= step * prediction; with `negative`, of negative + guidance * (prediction - negative).
L2P_API int l2p_euler(float* image, int64_t image_plane, int64_t image_row, const float* prediction,
                      int64_t prediction_plane, int64_t prediction_row, const float* negative, int64_t negative_plane,
                      int64_t negative_row, uint64_t planes, uint64_t rows, uint64_t columns, float guidance, float step,
                      int threads) {
    if (!image || !prediction) return kBadArgument;
    return for_each_unit(planes * rows, planes * rows * columns, threads, [&](uint64_t unit) {
        const int64_t plane = static_cast<int64_t>(unit / rows), y = static_cast<int64_t>(unit % rows);
        const float* base = negative ? negative + plane * negative_plane + y * negative_row : nullptr;
        euler_line(image + plane * image_plane + y * image_row,
                   prediction + plane * prediction_plane + y * prediction_row, base, columns, guidance, step);
    });
}

// image [3, rows, columns] in [-1, 1] to out [rows, columns, 3]: bits 8 or 16 for full-range integers, 0 for float16.
L2P_API int l2p_pixels(void* out, int bits, const float* image, int64_t plane, int64_t row, uint64_t rows,
                       uint64_t columns, int threads) {
    if (!out || !image) return kBadArgument;
    auto* const words = static_cast<uint16_t*>(out);
    switch (bits) {
    case 0: return write_pixels(words, image, plane, row, rows, columns, threads, quantize_float16);
    case 8: return write_pixels(static_cast<uint8_t*>(out), image, plane, row, rows, columns, threads, quantize_uint8);
    case 16: return write_pixels(words, image, plane, row, rows, columns, threads, quantize_uint16);
    default: return kBadArgument;
    }
}

// image [planes, rows, columns] = keep * image + take * coarse [planes, coarse_rows, coarse_columns] enlarged: each value
// is made of 4 x 4 coarse ones. Taps and weights are [rows, 4] and [columns, 4], contiguous.
L2P_API int l2p_mix_enlarged(float* image, int64_t image_plane, int64_t image_row, const float* coarse,
                             int64_t coarse_plane, int64_t coarse_row, uint64_t coarse_rows, uint64_t coarse_columns,
                             const int32_t* row_taps, const float* row_weights, const int32_t* column_taps,
                             const float* column_weights, uint64_t planes, uint64_t rows, uint64_t columns, float keep,
                             float take, int threads) {
    if (!image || !coarse || !row_taps || !row_weights || !column_taps || !column_weights) return kBadArgument;
    if (!are_inside(row_taps, rows, coarse_rows) || !are_inside(column_taps, columns, coarse_columns))
        return kBadArgument;
    std::atomic<bool> has_failed{false};
    try {
        Columns table{std::vector<int32_t>(kTaps * columns), std::vector<float>(kTaps * columns), columns};
        for (uint64_t x = 0; x < columns; ++x)
            for (uint64_t i = 0; i < kTaps; ++i) {
                table.taps[i * columns + x] = column_taps[kTaps * x + i];
                table.weights[i * columns + x] = column_weights[kTaps * x + i];
            }
        const uint64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
        const int status = for_each_unit(planes * chunks, planes * rows * columns, threads, [&](uint64_t unit) {
            const int64_t plane = static_cast<int64_t>(unit / chunks);
            const uint64_t first = unit % chunks * kChunkRows, stop = std::min(rows, first + kChunkRows);
            try {
                EnlargedLines lines(coarse + plane * coarse_plane, coarse_row, table);
                for (uint64_t y = first; y < stop; ++y) {
                    const float* found[kTaps];
                    lines.find(row_taps + kTaps * y, found);
                    float* target = image + plane * image_plane + static_cast<int64_t>(y) * image_row;
                    mix_line(target, found, row_weights + kTaps * y, columns, keep, take);
                }
            } catch (...) {
                has_failed = true;
            }
        });
        return has_failed ? static_cast<int>(kFailed) : status;
    } catch (...) {
        return kFailed;
    }
}
