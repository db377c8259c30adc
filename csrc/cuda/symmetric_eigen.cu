// Jacobi's method for one small matrix a block. A round rotates disjoint pairs of rows and columns at once; the rounds
// of a tournament, in which each meets each, are a sweep (Brent and Luk, 1985, "The solution of singular-value and
// symmetric eigenvalue problems on multiprocessor arrays").
#include <cmath>
#include <stdexcept>

#include "cuda/lanes.h"
#include "cuda/symmetric_eigen.h"

namespace sharpcore::cuda {
namespace {

using Index = std::int64_t;

// Entries of at most this part of the largest one are as good as zero: what they change is far below a rounding.
constexpr double kNegligible = 0x1p-58;
constexpr int kMostSweeps = 40;

// Entries that fit into the shared memory. Larger matrices are rotated where the L2 cache is.
constexpr Index kShared = kMostShared / sizeof(double);

struct Job {
    SymmetricEigenArguments a;
    double *matrices, *transposed;  // [batch, rows, rows]: where the shared memory is too small; eigenvectors as rows
};

struct Rotation {
    int p, q;  // rows that it turns; q < 0: none
    double c, s;
};

// The pair number `i` of a round among `players`, an even number; one without a partner has a rotation of nothing.
__device__ Rotation pair_of(int round, int i, int players, int n) {
    const int others = players - 1;
    int p = i == 0 ? others : (round + i) % others;
    int q = i == 0 ? round : (round + others - i) % others;
    if (p > q) {
        const int larger = p;
        p = q;
        q = larger;
    }
    return {p, q < n ? q : -1, 1, 0};
}

// The rotation that makes the entry (p, q) zero, where it is more than `least`.
__device__ bool annihilate(Rotation& rotation, const double* a, int n, double least) {
    if (rotation.q < 0) return false;
    const double entry = a[rotation.p * n + rotation.q];
    if (!(fabs(entry) > least)) return false;
    const double theta = (a[rotation.q * n + rotation.q] - a[rotation.p * n + rotation.p]) / (2 * entry);
    const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
    rotation.c = 1 / sqrt(t * t + 1);
    rotation.s = t * rotation.c;
    return true;
}

// The entries of two pairs of rows and columns; both halves of the matrix are kept, as the same numbers.
__device__ void rotate(double* a, int n, const Rotation& rows, const Rotation& columns, bool same) {
    if (rows.s == 0 && columns.s == 0) return;
    const int p = rows.p, q = rows.q, r = columns.p, s = columns.q;
    const double pr = a[p * n + r], ps = s < 0 ? 0 : a[p * n + s], qr = q < 0 ? 0 : a[q * n + r],
                 qs = q < 0 || s < 0 ? 0 : a[q * n + s];
    const double left_p = columns.c * pr - columns.s * ps, right_p = columns.s * pr + columns.c * ps;
    const double left_q = columns.c * qr - columns.s * qs, right_q = columns.s * qr + columns.c * qs;
    const double new_pr = rows.c * left_p - rows.s * left_q, new_qr = rows.s * left_p + rows.c * left_q;
    const double new_ps = rows.c * right_p - rows.s * right_q, new_qs = rows.s * right_p + rows.c * right_q;
    a[p * n + r] = a[r * n + p] = new_pr;
    if (same) {
        a[q * n + q] = new_qs;
        // What has been rotated to zero is zero.
        a[p * n + q] = a[q * n + p] = 0;
        return;
    }
    if (q >= 0) a[q * n + r] = a[r * n + q] = new_qr;
    if (s >= 0) a[p * n + s] = a[s * n + p] = new_ps;
    if (q >= 0 && s >= 0) a[q * n + s] = a[s * n + q] = new_qs;
}

__global__ void __launch_bounds__(kThreads) eigen_kernel(Job job) {
    SHARPCORE_DYNAMIC_SHARED(double, shared);
    __shared__ Rotation rotations[kMostEigenRows / 2];
    const Index problem = blockIdx.x, rows = job.a.rows;
    const Index counts = job.a.sizes == nullptr || job.a.sizes[problem] > rows ? rows : job.a.sizes[problem];
    const int n = counts > 0 ? static_cast<int>(counts) : 0;
    const double* const matrix = job.a.matrices + problem * rows * rows;
    double* const vectors = job.a.vectors + problem * rows * rows;
    double* const values = job.a.values + problem * rows;
    double* const a = rows * rows <= kShared ? shared : job.matrices + problem * rows * rows;
    double* const transposed = job.transposed + problem * rows * rows;
    double largest = 0, bad = 0;
    for (int entry = threadIdx.x; entry < n * n; entry += kThreads) {
        const int i = entry / n, k = entry % n;
        const double number = i <= k ? matrix[i * rows + k] : matrix[k * rows + i], size = fabs(number);
        a[entry] = number;
        transposed[entry] = i == k ? 1 : 0;
        largest = size > largest ? size : largest;
        if (!(number - number == 0)) bad = 1;
    }
    // Nothing beyond the leading part.
    for (Index entry = threadIdx.x; entry < rows * rows; entry += kThreads) vectors[entry] = 0;
    for (Index k = n + static_cast<Index>(threadIdx.x); k < rows; k += kThreads) values[k] = INFINITY;
    largest = largest_of_block(largest);
    if (sum_block(bad) > 0) {
        for (int entry = threadIdx.x; entry < n * n; entry += kThreads) vectors[entry / n * rows + entry % n] = NAN;
        for (int k = threadIdx.x; k < n; k += kThreads) values[k] = NAN;
        return;
    }
    const double least = kNegligible * largest;
    const int players = n + n % 2, pairs = players / 2;
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
        double turned = 0;
        for (int round = 0; round + 1 < players; ++round) {
#pragma unroll 1
            for (int i = threadIdx.x; i < pairs; i += kThreads) {
                rotations[i] = pair_of(round, i, players, n);
                if (annihilate(rotations[i], a, n, least)) turned = 1;
            }
            __syncthreads();
            // Blocks (i, k), i <= k, of two pairs: the first and the last row together have pairs + 1, and so on.
#pragma unroll 1
            for (int item = threadIdx.x; item < (pairs + 1) / 2 * (pairs + 1); item += kThreads) {
                const int fold = item / (pairs + 1), place = item % (pairs + 1);
                const bool upper = place < pairs - fold;
                const int i = upper ? fold : pairs - 1 - fold, k = upper ? fold + place : place - 1;
                if (!upper && i == fold) continue;
                rotate(a, n, rotations[i], rotations[k], i == k);
            }
            for (int item = threadIdx.x; item < pairs * n; item += kThreads) {
                const Rotation& rotation = rotations[item / n];
                if (rotation.s == 0) continue;
                double& p = transposed[rotation.p * n + item % n];
                double& q = transposed[rotation.q * n + item % n];
                const double old = p;
                p = rotation.c * old - rotation.s * q;
                q = rotation.s * old + rotation.c * q;
            }
            __syncthreads();
        }
        if (sum_block(turned) == 0) break;
    }
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const double value = a[i * n + i];
        int place = 0;
        for (int k = 0; k < n; ++k) place += a[k * n + k] < value || (a[k * n + k] == value && k < i) ? 1 : 0;
        values[place] = value;
        for (int k = 0; k < n; ++k) vectors[k * rows + place] = transposed[i * n + k];
    }
}

// A lane has a pair, a warp some of the rows.
__global__ void __launch_bounds__(kThreads) residuals_kernel(RitzResidualsArguments a) {
    __shared__ double sums[3][kWarps][kWarp];
    const Index sample = blockIdx.y, pair = static_cast<Index>(blockIdx.x) * kWarp + lane();
    const Index processed = a.processed[sample], size = a.sizes[sample];
    const double* const projected = a.projected + sample * a.rows * a.rows;
    const double* const weights = a.weights + sample * a.count * a.count + pair;
    double coupling = 0, noise = 0, lost = 0;
    if (pair < processed && pair < a.count) {
        const double value = a.values[sample * a.count + pair];
        for (Index m = warp(); m < size; m += kWarps) {
            double image = 0;
            for (Index k = 0; k < processed; ++k) image += projected[m * a.rows + k] * weights[k * a.count];
            if (m >= processed) {
                coupling += image * image;
                continue;
            }
            const double weight = weights[m * a.count], off = image - value * weight;
            const double carried = weight * a.lost[sample * a.rows + m];
            noise += off * off;
            lost += carried * carried;
        }
    }
    sums[0][warp()][lane()] = coupling;
    sums[1][warp()][lane()] = noise;
    sums[2][warp()][lane()] = lost;
    __syncthreads();
    if (warp() > 0 || pair >= a.count) return;
    double total[3] = {};
    for (int i = 0; i < kWarps; ++i)
        for (int k = 0; k < 3; ++k) total[k] += sums[k][i][lane()];
    a.coupling[sample * a.count + pair] = sqrt(total[0]);
    a.noise[sample * a.count + pair] = sqrt(total[1] + total[2]);
}

}  // namespace

Index symmetric_eigen_workspace(const SymmetricEigenArguments& a) {
    return (a.rows * a.rows <= kShared ? 1 : 2) * a.batch * a.rows * a.rows;
}

void symmetric_eigen(const SymmetricEigenArguments& a, double* workspace, void* stream) {
    if (a.rows > kMostEigenRows) throw std::invalid_argument("symmetric_eigen: expected at most 128 rows");
    const Index entries = a.rows * a.rows;
    const std::size_t shared = entries <= kShared ? entries * sizeof(double) : 0;
    const Job job{a, workspace + a.batch * entries, workspace};
    launch(eigen_kernel, dim3(static_cast<unsigned>(a.batch)), shared, static_cast<Stream>(stream), job);
}

void ritz_residuals(const RitzResidualsArguments& a, void* stream) {
    const dim3 grid(static_cast<unsigned>((a.count + kWarp - 1) / kWarp), static_cast<unsigned>(a.batch));
    launch(residuals_kernel, grid, 0, static_cast<Stream>(stream), a);
}

}  // namespace sharpcore::cuda
