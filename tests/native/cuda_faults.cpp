// Faults of kernels that the emulation and the sanitizers must report: a barrier that is missing, one that not all
// threads reach, an entry behind the shared memory.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

using namespace sharpcore::cuda;

struct Job {
    double* out;
};

__global__ void race_kernel(Job job) {
    __shared__ double value;
    if (threadIdx.x == 0) value = 1;
    job.out[threadIdx.x] = value;
}

__global__ void parted_kernel(Job job) {
    if (threadIdx.x < kWarp) __syncthreads();
    job.out[threadIdx.x] = 1;
}

__global__ void overflow_kernel(Job job) {
    SHARPCORE_DYNAMIC_SHARED(double, shared);
    job.out[threadIdx.x] = shared[threadIdx.x + 2];
}

}  // namespace

int main(int count, char** arguments) {
    const std::string fault = count == 2 ? arguments[1] : "";
    std::vector<double> out(kThreads);
    const Job job{out.data()};
    const std::size_t bytes = kThreads * sizeof(double);
    if (fault == "race")
        launch(race_kernel, dim3(1), bytes, nullptr, job);
    else if (fault == "parted")
        launch(parted_kernel, dim3(1), bytes, nullptr, job);
    else if (fault == "overflow")
        launch(overflow_kernel, dim3(1), bytes, nullptr, job);
    else
        return std::fprintf(stderr, "expected race, parted or overflow\n"), 2;
    std::printf("wrote %f\n", out[0]);
    return 0;
}
