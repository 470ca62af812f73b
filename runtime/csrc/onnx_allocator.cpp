// The memory that ONNX Runtime's CPU sessions take for tensors of 1 MiB or more: mapped in huge pages, and kept between
// allocations for the next ones. What is mapped is never more than what was in use at once since the last release, so a
// memory budget holds as it does without. A fresh page costs 0.6 to 1 us, which was a third of a call at 4096 px.

#include <cstddef>
#include <cstdint>

#define L2P_API extern "C" __attribute__((visibility("default")))

// ONNX Runtime's C interface, of which a version never changes: its functions are a table, here by their places.
struct OrtStatus;
struct OrtEnv;
struct OrtMemoryInfo;
struct OrtSessionOptions;
struct OrtApiBase {
    void** (*get_api)(uint32_t version);
    const char* (*get_version)();
};

namespace {
bool is_registered = false;
} // namespace

// Whether sessions may be told to use the allocators of ONNX Runtime's environment, because this one is there.
L2P_API int l2p_onnx_allocator_is_registered() { return is_registered; }

#ifdef __linux__

#include <cstdlib>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>

namespace {

constexpr uint32_t kApiVersion = 12;
constexpr size_t kCreateEnv = 3, kCreateMemoryInfo = 68, kReleaseEnv = 92, kReleaseStatus = 93, kRegisterAllocator = 176;
constexpr int kLogErrors = 3, kDeviceAllocator = 0, kDefaultMemory = 0;

constexpr size_t kLargeBytes = size_t{1} << 20; // smaller blocks are malloc's
constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kAlignment = 64;

struct Allocator {
    uint32_t version;
    void* (*alloc)(Allocator*, size_t);
    void (*free)(Allocator*, void*);
    const OrtMemoryInfo* (*info)(const Allocator*);
};

struct Blocks {
    std::mutex mutex;
    std::unordered_map<void*, size_t> used;
    std::multimap<size_t, char*> kept;
    size_t used_bytes = 0, kept_bytes = 0, peak_bytes = 0;
    const OrtMemoryInfo* info = nullptr;
};

// Never destroyed: ONNX Runtime frees its last blocks after static objects are gone.
Blocks& blocks() {
    static Blocks* const the_blocks = new Blocks;
    return *the_blocks;
}

size_t whole_pages(size_t bytes) {
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}

char* map_aligned(size_t bytes) {
    const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    void* mapped = mmap(nullptr, bytes + kHugePageBytes, access, kind, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(mapped);
    const size_t before = (kHugePageBytes - reinterpret_cast<uintptr_t>(first) % kHugePageBytes) % kHugePageBytes;
    if (before) munmap(first, before);
    munmap(first + before + bytes, kHugePageBytes - before);
    madvise(first + before, bytes, MADV_HUGEPAGE); // where the kernel has none, its pages are small
    return first + before;
}

void keep(Blocks& all, char* block, size_t bytes) {
    all.kept.emplace(bytes, block);
    all.kept_bytes += bytes;
}

char* take(Blocks& all, std::multimap<size_t, char*>::iterator found) {
    char* const block = found->second;
    all.kept_bytes -= found->first;
    all.kept.erase(found);
    return block;
}

// Unmaps kept blocks, the smallest first, until what is mapped fits.
void drop_kept(Blocks& all, size_t mapped_max_bytes) {
    while (!all.kept.empty() && all.used_bytes + all.kept_bytes > mapped_max_bytes) {
        const size_t bytes = all.kept.begin()->first;
        munmap(take(all, all.kept.begin()), bytes);
    }
}

// A block of kept pages: cut from a larger one, or else the largest, which grows by fresh pages.
char* reuse(Blocks& all, size_t bytes) {
    const auto larger = all.kept.lower_bound(bytes);
    if (larger != all.kept.end()) {
        const size_t rest = larger->first - bytes;
        char* const block = take(all, larger);
        if (rest >= kLargeBytes)
            keep(all, block + bytes, rest);
        else if (rest)
            munmap(block + bytes, rest);
        return block;
    }
    if (all.kept.empty()) return nullptr;
    char* const block = map_aligned(bytes);
    if (!block) return nullptr;
    const auto largest = std::prev(all.kept.end());
    const size_t old_bytes = largest->first;
    char* const old = take(all, largest);
    if (mremap(old, old_bytes, old_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, block) == MAP_FAILED) munmap(old, old_bytes);
    return block;
}

void* alloc_large(size_t bytes) {
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    char* block = reuse(all, bytes);
    if (!block) block = map_aligned(bytes);
    if (!block) {
        drop_kept(all, 0);
        block = map_aligned(bytes);
    }
    if (!block) return nullptr;
    all.used.emplace(block, bytes);
    all.used_bytes += bytes;
    if (all.used_bytes > all.peak_bytes) all.peak_bytes = all.used_bytes;
    drop_kept(all, all.peak_bytes);
    return block;
}

void* alloc(Allocator*, size_t bytes) {
    if (!bytes || bytes > SIZE_MAX / 2) return nullptr;
    try {
        if (bytes >= kLargeBytes) return alloc_large(whole_pages(bytes));
    } catch (...) {
        return nullptr;
    }
    void* block = nullptr;
    return posix_memalign(&block, kAlignment, bytes) ? nullptr : block;
}

void free_block(Allocator*, void* block) {
    if (!block) return;
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.used.find(block);
    if (found == all.used.end()) {
        std::free(block);
        return;
    }
    const size_t bytes = found->second;
    all.used.erase(found);
    all.used_bytes -= bytes;
    try {
        keep(all, static_cast<char*>(block), bytes);
    } catch (...) {
        munmap(block, bytes);
    }
}

const OrtMemoryInfo* info(const Allocator*) { return blocks().info; }

Allocator the_allocator{kApiVersion, alloc, free_block, info};

template <typename... Arguments>
bool succeeds(void** api, size_t place, Arguments... arguments) {
    OrtStatus* const status = reinterpret_cast<OrtStatus* (*)(Arguments...)>(api[place])(arguments...);
    if (status) reinterpret_cast<void (*)(OrtStatus*)>(api[kReleaseStatus])(status);
    return !status;
}

void register_allocator(void** api) {
    OrtEnv* env = nullptr;
    // The environment is one for the process: this gives the one that is there.
    if (!succeeds(api, kCreateEnv, kLogErrors, "l2p", &env)) return;
    is_registered =
        succeeds(api, kCreateMemoryInfo, "Cpu", kDeviceAllocator, 0, kDefaultMemory, &blocks().info) &&
        succeeds(api, kRegisterAllocator, env, &the_allocator);
    reinterpret_cast<void (*)(OrtEnv*)>(api[kReleaseEnv])(env);
}

} // namespace

// Unmaps what is kept between allocations.
L2P_API void l2p_onnx_allocator_release() {
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    drop_kept(all, 0);
    all.peak_bytes = all.used_bytes;
}

// Bytes in use, kept, and the most that were in use at once since the last release.
L2P_API void l2p_onnx_allocator_bytes(uint64_t* used, uint64_t* kept, uint64_t* peak) {
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    *used = all.used_bytes;
    *kept = all.kept_bytes;
    *peak = all.peak_bytes;
}

// What ONNX Runtime calls in a library of custom operators: the way to its C interface in a Python package that exports
// no function. There are no operators here.
L2P_API OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase* base) {
    static std::once_flag once;
    void** const api = base->get_api(kApiVersion);
    if (api) std::call_once(once, register_allocator, api);
    return nullptr;
}

#else

L2P_API void l2p_onnx_allocator_release() {}

L2P_API void l2p_onnx_allocator_bytes(uint64_t* used, uint64_t* kept, uint64_t* peak) { *used = *kept = *peak = 0; }

L2P_API OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*) { return nullptr; }

#endif
