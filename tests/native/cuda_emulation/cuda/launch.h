// The sources of csrc/cuda on the CPU, in the place of csrc/cuda/launch.h: a grid runs block by block, each thread of a
// block is a thread, and a sanitizer sees what they do to the memory that they share. Blocks are small unless asked
// otherwise, as threads that wait for each other take their turns: SHARPCORE_EMULATED_WARP lanes of a warp,
// SHARPCORE_EMULATED_WARPS warps.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifndef SHARPCORE_EMULATED_WARP
#define SHARPCORE_EMULATED_WARP 8
#endif
#ifndef SHARPCORE_EMULATED_WARPS
#define SHARPCORE_EMULATED_WARPS 2
#endif

#define SHARPCORE_CUDA_DEVICE "cpu"
#define SHARPCORE_DYNAMIC_SHARED(type, name) type* const name = sharpcore::cuda::emulation::dynamic_shared<type>()

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so that there is one such memory.
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace sharpcore::cuda {

constexpr int kWarp = SHARPCORE_EMULATED_WARP;
constexpr int kWarps = SHARPCORE_EMULATED_WARPS;
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::size_t kMostShared = 8 * 1024;

using Stream = void*;

class OnDevice {
public:
    explicit OnDevice(int) {}
    ~OnDevice() {}
};

namespace emulation {

// Where threads wait for each other, all of them at the same place of the program. They sleep, as there are more of
// them than cores, and other work beside them.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait(const char* place) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (waiting_ > 0 && place != place_) {
            std::fprintf(stderr, "threads of a block meet at different barriers: %s, %s\n", place_, place);
            std::_Exit(1);
        }
        place_ = place;
        const unsigned round = round_;
        if (++waiting_ == threads_) {
            waiting_ = 0;
            ++round_;
            lock.unlock();
            met_.notify_all();
        } else {
            met_.wait(lock, [&] { return round_ != round; });
        }
    }

private:
    const int threads_;
    std::mutex mutex_;
    std::condition_variable met_;
    int waiting_ = 0;
    unsigned round_ = 0;
    const char* place_ = nullptr;
};

struct Warp {
    Barrier barrier{kWarp};
    unsigned char slots[2][kWarp][8];
};

// What the threads of the block that runs have in common.
struct Block {
    Barrier barrier{kThreads};
    Warp warps[kWarps];
    std::unique_ptr<std::max_align_t[]> shared;
    std::size_t shared_bytes = 0;
};

inline Block* block = nullptr;

constexpr char kEnd[] = "the end of the kernel", kSync[] = "__syncthreads", kShuffle[] = "a shuffle",
               kWarpSync[] = "__syncwarp";

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(block->shared.get());
}

template <class T>
T exchange(T value, int from) {
    static_assert(sizeof(T) <= 8, "what registers hold");
    // Every other time the same slots: whoever fills them again has met all that read them.
    static thread_local int turn = 0;
    turn = 1 - turn;
    Warp& warp = block->warps[threadIdx.x / kWarp];
    std::memcpy(warp.slots[turn][threadIdx.x % kWarp], &value, sizeof(T));
    warp.barrier.wait(kShuffle);
    std::memcpy(&value, warp.slots[turn][from], sizeof(T));
    return value;
}

}  // namespace emulation

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, std::size_t shared, Stream, const Arguments& arguments) {
    if (grid.x == 0 || grid.y == 0) return;
    static std::mutex one_at_a_time;
    static bool backwards = false;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    // Blocks have no order.
    backwards = !backwards;
    emulation::Block block;
    emulation::block = &block;
    gridDim = grid;
    blockDim = dim3(kThreads);
    const auto run = [&](unsigned thread) {
        threadIdx = dim3(thread, 0, 0);
        const unsigned blocks = grid.x * grid.y;
        for (unsigned turn = 0; turn < blocks; ++turn) {
            const unsigned place = backwards ? blocks - 1 - turn : turn;
            blockIdx = dim3(place % grid.x, place / grid.x, 0);
            if (thread == 0) {
                // Of the exact size, and filled with NaN: what a block finds there is of no use.
                const std::size_t units = (shared + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t);
                block.shared.reset(units > 0 ? new std::max_align_t[units] : nullptr);
                if (units > 0) std::memset(block.shared.get(), 0xff, units * sizeof(std::max_align_t));
            }
            block.barrier.wait(emulation::kEnd);
            kernel(arguments);
            block.barrier.wait(emulation::kEnd);
        }
    };
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < kThreads; ++thread) threads.emplace_back(run, thread);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace sharpcore::cuda

inline void __syncthreads() {
    using namespace sharpcore::cuda::emulation;
    block->barrier.wait(kSync);
}

inline void __syncwarp(unsigned = 0xffffffffu) {
    using namespace sharpcore::cuda::emulation;
    block->warps[threadIdx.x / sharpcore::cuda::kWarp].barrier.wait(kWarpSync);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return sharpcore::cuda::emulation::exchange(value, static_cast<int>(threadIdx.x % sharpcore::cuda::kWarp) ^ lanes);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return sharpcore::cuda::emulation::exchange(value, lane);
}
