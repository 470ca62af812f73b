// kernels.cu as plain C++: what CUDA has built in, for one thread after another on the host.
// Built with -ffp-contract=off and -DL2P_KERNELS="path"; l2p_launch takes arguments as cuLaunchKernel does.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#define __global__
#define __device__

struct Index {
    unsigned x, y, z;
};
static thread_local Index gridDim, blockDim, blockIdx, threadIdx;

static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __double2float_rn(double a) { return static_cast<float>(a); }

template <class To, class From> static To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
static inline long long __double_as_longlong(double a) { return bits_of<long long>(a); }
static inline double __longlong_as_double(long long a) { return bits_of<double>(a); }
static inline unsigned __float_as_uint(float a) { return bits_of<unsigned>(a); }

#include L2P_KERNELS

template <class... P, std::size_t... I>
static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P> static int run(void (*kernel)(P...), void** arguments) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
                call(kernel, arguments, std::index_sequence_for<P...>{});
    return 0;
}

// Runs a kernel by name on a grid of blocks of threads; 1 where there is no such kernel.
extern "C" int l2p_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_x, void** arguments) {
    const std::string wanted = name;
    gridDim = {grid_x, grid_y, 1};
    blockDim = {block_x, 1, 1};
    if (wanted == "l2p_noise") return run(l2p_noise, arguments);
    if (wanted == "l2p_euler") return run(l2p_euler, arguments);
    if (wanted == "l2p_mix_enlarged") return run(l2p_mix_enlarged, arguments);
    if (wanted == "l2p_pixels_uint8") return run(l2p_pixels_uint8, arguments);
    if (wanted == "l2p_pixels_uint16") return run(l2p_pixels_uint16, arguments);
    if (wanted == "l2p_pixels_float16") return run(l2p_pixels_float16, arguments);
    return 1;
}
