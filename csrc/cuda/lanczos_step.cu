// What a step of block Lanczos does beside the growth of its bases: norms of the products decide what is dropped, the
// growth becomes columns of the projections, and the new rows the next block. The reference is
// sharpcore/backends/reference/lanczos_step.py.
#include <cmath>

#include "cuda/grow_basis.h"
#include "cuda/lanczos_step.h"
#include "cuda/lanes.h"

namespace sharpcore::cuda {
namespace {

using Index = std::int64_t;

// As in the reference: faults of a sample, and the entries whose squares are float64 numbers.
constexpr Index kNotFinite = 1, kOutOfRange = 2;
constexpr double kLeastEntry = 1e-140, kMostEntry = 1e140, kMostFinite = 0x1.fffffffffffffp1023;

constexpr Index kSlice = 4 * kWarp, kMostParts = 256;

struct Job {
    LanczosStepArguments a;
    Index slices, parts;
    double* partial;  // [batch, parts, count, 3]: sums of squares, largest entries, how many are not finite
    Index* sizes;     // [batch]: rows of the bases before the step; -1 where nothing is done
    double* floor;    // [batch], as the growth has it, as all that follow
    double *coefficients, *triangle, *dropped;
    Index* ranks;

    __device__ double product(Index column, Index sample, Index i) const {
        const Index at = column * a.product_count_stride + sample * a.product_batch_stride + i;
        return a.product_dtype == Dtype::float32 ? static_cast<double>(static_cast<const float*>(a.products)[at])
                                                 : static_cast<const double*>(a.products)[at];
    }

    __device__ double closing(Index sample) const { return a.share * a.norm[sample]; }
};

__global__ void __launch_bounds__(kThreads) observe_kernel(Job job) {
    const Index sample = blockIdx.y;
    for (Index column = warp(); column < job.a.count; column += kWarps) {
        double sum = 0, largest = 0, bad = 0;
        for (Index slice = blockIdx.x; slice < job.slices; slice += job.parts)
#pragma unroll
            for (Index i = slice * kSlice + lane(); i < (slice + 1) * kSlice; i += kWarp) {
                const double entry = i < job.a.size ? job.product(column, sample, i) : 0, size = fabs(entry);
                sum += entry * entry;
                largest = size > largest ? size : largest;
                if (!(size <= kMostFinite)) bad = 1;
            }
        sum = sum_lanes(sum);
        largest = largest_of_lanes(largest);
        bad = sum_lanes(bad);
        double* const partial = job.partial + ((sample * job.parts + blockIdx.x) * job.a.count + column) * 3;
        if (lane() == 0) {
            partial[0] = sum;
            partial[1] = largest;
            partial[2] = bad;
        }
    }
}

// The norm of the operator, faults, and what the growth is to do.
__global__ void __launch_bounds__(kThreads) begin_kernel(Job job) {
    const Index sample = blockIdx.x, count = job.a.count;
    double observed = 0, largest = 0, bad = 0;
    for (Index column = warp(); column < count; column += kWarps) {
        double sum = 0;
        for (Index part = lane(); part < job.parts; part += kWarp) {
            const double* const partial = job.partial + ((sample * job.parts + part) * count + column) * 3;
            sum += partial[0];
            largest = partial[1] > largest ? partial[1] : largest;
            bad += partial[2];
        }
        sum = sum_lanes(sum);
        observed = sum > observed ? sum : observed;
    }
    observed = sqrt(largest_of_block(observed));
    largest = largest_of_block(largest);
    bad = sum_block(bad);
    if (threadIdx.x > 0) return;
    Index faults = job.a.faults[sample];
    const bool frozen = job.a.frozen[sample];
    if (!frozen && faults == 0) {
        if (bad > 0)
            faults = kNotFinite;
        else if (largest > kMostEntry || (largest > 0 && largest < kLeastEntry))
            faults = kOutOfRange;
        job.a.faults[sample] = faults;
    }
    const bool going = !frozen && faults == 0;
    if (going && observed > job.a.norm[sample]) job.a.norm[sample] = observed;
    const double closing = job.closing(sample), wanted = job.a.tolerance / 4 * job.a.norm[sample];
    job.floor[sample] = closing < wanted ? closing : wanted;
    job.sizes[sample] = going ? job.a.sizes[sample] : -1;
}

// Writes the columns of the growth, and counts. The first block of a sample does it; no other reads what it writes.
__device__ void record(const Job& job, Index sample, Index n, Index rank, bool ended) {
    const LanczosStepArguments& a = job.a;
    const Index first = a.processed[sample], counts = n - first;
    const double* const coefficients = job.coefficients + sample * a.rows * a.count;
    const double* const triangle = job.triangle + sample * a.count * a.count;
    double* const projected = a.projected + sample * a.rows * a.rows + first;
    for (Index m = warp(); m < a.rows; m += kWarps) {
        const bool fresh = m >= n && m < n + rank && !ended;
        const double* const from = fresh ? triangle + (m - n) * a.count : coefficients + m * a.count;
        for (Index j = lane(); j < counts; j += kWarp) projected[m * a.rows + j] = from[j];
    }
    for (Index j = threadIdx.x; j < counts; j += kThreads) {
        double lost = job.dropped[sample * a.count + j];
        if (ended) {
            // A coupling of rounding alone is no direction of the old sequence: the next one begins afresh.
            double coupling = 0;
            for (Index row = 0; row < rank; ++row) {
                const double entry = triangle[row * a.count + j];
                coupling += entry * entry;
            }
            lost = hypot(lost, sqrt(coupling));
        }
        a.lost[sample * a.rows + first + j] = lost;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    a.multiplied[sample] += counts;
    if (counts > rank) a.deflated[sample] += counts - rank;
    a.processed[sample] = n;
    a.sizes[sample] = ended ? n : n + rank;
    if (ended && counts > 0) ++a.breakdowns[sample];
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(Job job) {
    const LanczosStepArguments& a = job.a;
    const Index sample = blockIdx.y, n = job.sizes[sample], rank = n < 0 ? 0 : job.ranks[sample];
    const double* const triangle = job.triangle + sample * a.count * a.count;
    double sum = 0;
    for (Index entry = threadIdx.x; entry < a.count * a.count; entry += kThreads)
        sum += triangle[entry] * triangle[entry];
    const bool ended = sqrt(sum_block(sum)) <= job.closing(sample);
    const double* const rows = a.basis + (sample * a.rows + (n < 0 ? 0 : n)) * a.size;
    for (Index slice = blockIdx.x; slice < job.slices; slice += job.parts)
        for (Index k = warp(); k < a.count; k += kWarps)
#pragma unroll
            for (Index i = slice * kSlice + lane(); i < (slice + 1) * kSlice; i += kWarp) {
                if (i >= a.size) break;
                const double entry = k < rank && !ended ? rows[k * a.size + i] : 0;
                const Index to = (k * a.batch + sample) * a.size + i;
                if (a.out_dtype == Dtype::float32)
                    static_cast<float*>(a.out)[to] = static_cast<float>(entry);
                else
                    static_cast<double*>(a.out)[to] = entry;
            }
    if (blockIdx.x == 0 && n >= 0) record(job, sample, n, rank, ended);
}

GrowBasisArguments growth(const Job& job) {
    const LanczosStepArguments& a = job.a;
    GrowBasisArguments growth{};
    growth.basis = a.basis;
    growth.sizes = job.sizes;
    growth.block = a.products;
    growth.block_count_stride = a.product_count_stride;
    growth.block_batch_stride = a.product_batch_stride;
    growth.floor = job.floor;
    growth.coefficients = job.coefficients;
    growth.triangle = job.triangle;
    growth.dropped = job.dropped;
    growth.ranks = job.ranks;
    growth.dtype = a.product_dtype;
    growth.count = a.count;
    growth.batch = a.batch;
    growth.rows = a.rows;
    growth.size = a.size;
    growth.limit = a.limit;
    return growth;
}

// Lays out the memory of a step but for that of the growth; how many doubles that is.
Index lay_out(Job& job, double* workspace) {
    const LanczosStepArguments& a = job.a;
    double* next = workspace;
    const auto give = [&](Index doubles) {
        double* const given = next;
        next += doubles;
        return given;
    };
    job.slices = (a.size + kSlice - 1) / kSlice;
    job.parts = job.slices < kMostParts ? job.slices : kMostParts;
    job.partial = give(a.batch * job.parts * a.count * 3);
    job.floor = give(a.batch);
    job.coefficients = give(a.batch * a.rows * a.count);
    job.triangle = give(a.batch * a.count * a.count);
    job.dropped = give(a.batch * a.count);
    static_assert(sizeof(Index) == sizeof(double), "doubles are counted");
    job.sizes = reinterpret_cast<Index*>(give(a.batch));
    job.ranks = reinterpret_cast<Index*>(give(a.batch));
    return next - workspace;
}

}  // namespace

Index lanczos_step_workspace(const LanczosStepArguments& a) {
    Job job{};
    job.a = a;
    const Index own = lay_out(job, nullptr);
    return own + grow_basis_workspace(growth(job));
}

void lanczos_step(const LanczosStepArguments& a, double* workspace, void* stream) {
    const auto on = static_cast<Stream>(stream);
    Job job{};
    job.a = a;
    double* const others = workspace + lay_out(job, workspace);
    const dim3 parts(static_cast<unsigned>(job.parts), static_cast<unsigned>(a.batch));
    launch(observe_kernel, parts, 0, on, job);
    launch(begin_kernel, dim3(static_cast<unsigned>(a.batch)), 0, on, job);
    grow_basis(growth(job), others, stream);
    launch(finish_kernel, parts, 0, on, job);
}

}  // namespace sharpcore::cuda
