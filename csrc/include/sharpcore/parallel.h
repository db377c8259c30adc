// Jobs on several threads; the caller says at each call how many may work on one. They are the threads that PyTorch's
// operations run on, or, where its OpenMP is not at hand and after fork(), a persistent pool.
//
// Kernel sources are compiled for several instruction sets, so this header holds no inline function: the linker could
// keep the copy that was compiled for a CPU newer than the one the program runs on.
#pragma once

#include <cstdint>

namespace sharpcore {

// Does task `task` of a job; `slot` in [0, threads) says whose scratch memory it may use.
using TaskFunction = void (*)(const void* job, std::int64_t task, int slot) noexcept;

// Runs `function(job, task, slot)` for every task in [0, tasks) on at most `threads` threads, the calling one among
// them, and returns when all are done. While another thread's job occupies the workers the tasks run on the caller
// alone. A child made by fork() starts its own workers. Every task computes in the floating-point environment of the
// caller: its rounding, its flushing of denormals.
void parallel_for(std::int64_t tasks, int threads, TaskFunction function, const void* job);

// Uninitialized memory of one block per slot, each aligned to 64 bytes and freed with the object.
class Scratch {
public:
    Scratch(int slots, std::int64_t bytes_per_slot);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* slot(int index) const;

private:
    char* memory_;
    std::int64_t stride_;
};

}  // namespace sharpcore
