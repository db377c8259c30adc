// How kernels are started, and the shape of their blocks. The emulation of the tests has a header of this name in the
// place of this one (tests/native/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

// Where the tensors live that the kernels work on, as PyTorch calls it.
#define SHARPCORE_CUDA_DEVICE "cuda"

// Memory that the threads of a block share, as large as the launch says.
#define SHARPCORE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace sharpcore::cuda {

constexpr int kWarp = 32;  // threads that exchange registers
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::size_t kMostShared = 96 * 1024;  // bytes that any GPU gives a block that asks for them

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one of the thread while it lives.
class OnDevice {
public:
    explicit OnDevice(int device) : wanted_(device) {
        check(cudaGetDevice(&before_));
        if (before_ != wanted_) check(cudaSetDevice(wanted_));
    }
    ~OnDevice() {
        if (before_ != wanted_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    const int wanted_;
};

#ifdef __CUDACC__

// Starts blocks of kThreads threads with `shared` bytes of shared memory each; a grid without blocks is none.
template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, std::size_t shared, Stream stream, const Arguments& arguments) {
    if (grid.x == 0 || grid.y == 0) return;
    // More than this is there, but must be asked for.
    constexpr std::size_t usual = 48 * 1024;
    if (shared > usual)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    kernel<<<grid, kThreads, shared, stream>>>(arguments);
    check(cudaGetLastError());
}

#endif

}  // namespace sharpcore::cuda
