// What the kernels share: how lines are given to threads, and which processors a loop is compiled for.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#define L2P_API extern "C" __attribute__((visibility("default")))

// One copy of a loop for each vector width, chosen when the library is loaded; musl and other compilers get one copy.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define L2P_VECTORS __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define L2P_VECTORS
#endif

namespace l2p {

constexpr uint64_t kValuesPerThread = 1 << 15; // less work than this does not pay for a thread

enum Status { kOk = 0, kBadArgument = 1, kFailed = 2 };

// Calls work(unit) for each unit, in any order and in several threads. threads <= 0: as many as the machine runs at once.
template <typename Work> int for_each_unit(uint64_t units, uint64_t values, int threads, const Work& work) {
    std::atomic<uint64_t> next{0};
    const auto run = [&]() noexcept {
        for (uint64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit);
    };
    uint64_t wanted = threads > 0 ? static_cast<uint64_t>(threads) : std::max(1U, std::thread::hardware_concurrency());
    wanted = std::min({wanted, units, 1 + values / kValuesPerThread});
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(wanted - 1);
    } catch (...) {
        return kFailed;
    }
    try {
        while (helpers.size() + 1 < wanted) helpers.emplace_back(run);
    } catch (...) {
        // The system has no further thread: units are taken one by one, so those that run do all of them.
    }
    run();
    for (auto& helper : helpers) helper.join();
    return kOk;
}

} // namespace l2p
