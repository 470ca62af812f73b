// What runs on the GPU between networks: noise, the Euler step, and pixels of the final dtype.
//
// Each kernel gives the same bits as its NumPy twin in l2p_runtime/backends/host.py, and noise those of noise.py.
// Every multiply and add is written as an intrinsic that rounds on its own: a fused one would change the bits.
//
// Compiled by NVRTC for the device at hand, so nothing is included. The tests compile the same text with g++ behind
// tests/fakes/cuda_host.cpp.
//
// Arrays are planes of lines, strides are in values, a line's values are contiguous. Grid: x covers a line, y the
// lines; both strides of the grid are looped over, so any grid is right and sizes pass 2^32 values.

typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

namespace {

constexpr int kCoefficients = 7; // per row of the noise table, constant term first

// First index of this thread, and the distance to its next.
__device__ inline int64 first_x() { return int64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64 step_x() { return int64(gridDim.x) * blockDim.x; }

// Four words of Philox-4x32-10.
__device__ inline void philox(uint64 seed, uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint32 words[4]) {
    uint32 key0 = uint32(seed), key1 = uint32(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64 p0 = uint64(0xD2511F53u) * c0, p1 = uint64(0xCD9E8D57u) * c2;
        c0 = uint32(p1 >> 32) ^ c1 ^ key0;
        c1 = uint32(p1);
        c2 = uint32(p0 >> 32) ^ c3 ^ key1;
        c3 = uint32(p0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// The normal value of a word, as noise.py states it.
__device__ inline float to_normal(uint32 word, const double* table) {
    const uint32 upper = word >> 31;
    const double v = __dadd_rn(double(word ^ (0u - upper)), 0.5);
    uint64 bits = uint64(__double_as_longlong(v));
    // Exponent and top three mantissa bits name the row; v = 0.5 is row 0.
    const double* row = table + ((bits >> 49) - (uint64(1022) << 3)) * kCoefficients;
    // The other mantissa bits, under the exponent of 2, are a number in [2, 4).
    bits = ((bits << 3) & 0x000FFFFFFFFFFFFFull) | 0x4000000000000000ull;
    const double t = __dadd_rn(__longlong_as_double(int64(bits)), -3.0);
    double z = row[kCoefficients - 1];
    for (int i = kCoefficients - 2; i >= 0; --i) z = __dadd_rn(__dmul_rn(z, t), row[i]);
    bits = uint64(__double_as_longlong(z)) ^ (uint64(upper) << 63);
    return __double2float_rn(__longlong_as_double(int64(bits)));
}

// A value of -1..1, and beyond it clipped, on a scale of 0..2 * half; NaN stays NaN.
__device__ inline float scaled(float value, float half) {
    const float clipped = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
    return __fmul_rn(__fadd_rn(clipped, 1.0f), half);
}

// Bits of the float16 nearest to a value of 0..1, ties to even; NaN stays NaN.
__device__ inline unsigned short half_bits(float value) {
    const uint32 bits = __float_as_uint(value);
    if (!(value >= 0.0f)) return 0x7E00;
    // Below 2^-14 a float16 counts in steps of 2^-24; the product is exact.
    if (bits < 0x38800000u) return (unsigned short)(rintf(__fmul_rn(value, 16777216.0f)));
    return (unsigned short)(((bits + 0xFFFu + ((bits >> 13) & 1u)) >> 13) - (112u << 10));
}

// Each dtype of pixels: its scale, and how a scaled value becomes one. NaN becomes 0 in the integers.
struct ToUint8 {
    typedef unsigned char Pixel;
    __device__ static float half() { return 127.5f; }
    __device__ static Pixel pixel(float value) { return value >= 0.0f ? Pixel(rintf(value)) : Pixel(0); }
};
struct ToUint16 {
    typedef unsigned short Pixel;
    __device__ static float half() { return 32767.5f; }
    __device__ static Pixel pixel(float value) { return value >= 0.0f ? Pixel(rintf(value)) : Pixel(0); }
};
struct ToFloat16 {
    typedef unsigned short Pixel;
    __device__ static float half() { return 0.5f; }
    __device__ static Pixel pixel(float value) { return half_bits(value); }
};

template <class To>
__device__ inline void write_pixels(typename To::Pixel* out, const float* image, int64 image_plane, int64 image_row,
                                    int64 rows, int64 columns) {
    for (int64 y = blockIdx.y; y < rows; y += gridDim.y)
        for (int64 x = first_x(); x < columns; x += step_x()) {
            const float* source = image + y * image_row + x;
            typename To::Pixel* target = out + (y * columns + x) * 3;
            for (int c = 0; c < 3; ++c) target[c] = To::pixel(scaled(source[c * image_plane], To::half()));
        }
}

} // namespace

// out [planes, rows, columns] float32: the noise of a seed; plane p is channel p. One thread makes four values.
extern "C" __global__ void l2p_noise(float* out, int64 out_plane, int64 out_row, int64 planes, int64 rows,
                                     int64 columns, uint64 seed, uint32 image_index, const double* table) {
    for (int64 line = blockIdx.y; line < planes * rows; line += gridDim.y) {
        const int64 channel = line / rows, y = line - channel * rows;
        float* target = out + channel * out_plane + y * out_row;
        for (int64 k = first_x(); 4 * k < columns; k += step_x()) {
            uint32 words[4];
            philox(seed, uint32(k), uint32(y), uint32(channel), image_index, words);
            for (int i = 0; i < 4; ++i)
                if (4 * k + i < columns) target[4 * k + i] = to_normal(words[i], table);
        }
    }
}

// image [planes, rows, columns] float32 -= step * guided, where guided is the prediction, or with a negative
// negative + guidance * (prediction - negative); `negative` may be null.
extern "C" __global__ void l2p_euler(float* image, int64 image_plane, int64 image_row, const float* prediction,
                                     int64 prediction_plane, int64 prediction_row, const float* negative,
                                     int64 negative_plane, int64 negative_row, int64 planes, int64 rows, int64 columns,
                                     float guidance, float step) {
    for (int64 line = blockIdx.y; line < planes * rows; line += gridDim.y) {
        const int64 plane = line / rows, y = line - plane * rows;
        float* target = image + plane * image_plane + y * image_row;
        const float* positive = prediction + plane * prediction_plane + y * prediction_row;
        const float* base = negative ? negative + plane * negative_plane + y * negative_row : nullptr;
        for (int64 x = first_x(); x < columns; x += step_x()) {
            float guided = positive[x];
            if (base) guided = __fadd_rn(base[x], __fmul_rn(guidance, __fsub_rn(guided, base[x])));
            target[x] = __fsub_rn(target[x], __fmul_rn(step, guided));
        }
    }
}

// image [planes, rows, columns] float32 = sigma * image + (1 - sigma) * coarse enlarged: each value is made of 4 x 4
// coarse ones. Taps and weights are [rows, 4] and [columns, 4], contiguous; sums are added in the order of the taps.
extern "C" __global__ void l2p_mix_enlarged(float* image, int64 image_plane, int64 image_row, const float* coarse,
                                            int64 coarse_plane, int64 coarse_row, const int* row_taps,
                                            const float* row_weights, const int* column_taps,
                                            const float* column_weights, int64 planes, int64 rows, int64 columns,
                                            float keep, float take) {
    for (int64 line = blockIdx.y; line < planes * rows; line += gridDim.y) {
        const int64 plane = line / rows, y = line - plane * rows;
        float* target = image + plane * image_plane + y * image_row;
        const float* source = coarse + plane * coarse_plane;
        for (int64 x = first_x(); x < columns; x += step_x()) {
            float enlarged = 0.0f;
            for (int i = 0; i < 4; ++i) {
                const float* values = source + row_taps[4 * y + i] * coarse_row;
                float wide = __fmul_rn(values[column_taps[4 * x]], column_weights[4 * x]);
                for (int j = 1; j < 4; ++j)
                    wide = __fadd_rn(wide, __fmul_rn(values[column_taps[4 * x + j]], column_weights[4 * x + j]));
                const float part = __fmul_rn(wide, row_weights[4 * y + i]);
                enlarged = i ? __fadd_rn(enlarged, part) : part;
            }
            target[x] = __fadd_rn(__fmul_rn(keep, target[x]), __fmul_rn(take, enlarged));
        }
    }
}

// image [3, rows, columns] float32 in -1..1 to out [rows, columns, 3], contiguous.
extern "C" __global__ void l2p_pixels_uint8(unsigned char* out, const float* image, int64 image_plane, int64 image_row,
                                            int64 rows, int64 columns) {
    write_pixels<ToUint8>(out, image, image_plane, image_row, rows, columns);
}

extern "C" __global__ void l2p_pixels_uint16(unsigned short* out, const float* image, int64 image_plane,
                                             int64 image_row, int64 rows, int64 columns) {
    write_pixels<ToUint16>(out, image, image_plane, image_row, rows, columns);
}

extern "C" __global__ void l2p_pixels_float16(unsigned short* out, const float* image, int64 image_plane,
                                              int64 image_row, int64 rows, int64 columns) {
    write_pixels<ToFloat16>(out, image, image_plane, image_row, rows, columns);
}
