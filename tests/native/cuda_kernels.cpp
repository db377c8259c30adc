// The kernels of csrc/cuda, run by threads of the CPU on odd sizes: for a sanitizer to watch, and that what they make
// of a problem has the properties that it must have. Inputs and outputs lie in blocks of their exact size.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/grow_basis.h"
#include "cuda/lanczos_step.h"
#include "cuda/launch.h"
#include "cuda/philox.h"
#include "cuda/symmetric_eigen.h"

namespace {

using sharpcore::Dtype;
using Index = std::int64_t;
using Numbers = std::vector<double>;

constexpr bool kSmall = sharpcore::cuda::kThreads < 256;

double normal() {
    static std::mt19937 generator(0);
    static std::normal_distribution<double> distribution;
    return distribution(generator);
}

Numbers normals(Index size) {
    Numbers numbers(size);
    for (double& number : numbers) number = normal();
    return numbers;
}

Numbers poisoned(Index size) { return Numbers(size, std::nan("")); }

double dot(const double* a, const double* b, Index size) {
    double sum = 0;
    for (Index i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

void check_orthonormal(const double* rows, Index count, Index size) {
    for (Index i = 0; i < count; ++i)
        for (Index k = 0; k <= i; ++k) CHECK(std::fabs(dot(rows + i * size, rows + k * size, size) - (i == k)) < 1e-13);
}

template <class Arguments>
void run(Index (*workspace)(const Arguments&), void (*kernel)(const Arguments&, double*, void*),
         const Arguments& arguments) {
    Numbers memory = poisoned(workspace(arguments));
    kernel(arguments, memory.data(), nullptr);
}

// What a block is like: of full rank, with a zero vector, with a vector twice, in the basis but for a little, not
// finite.
enum class Block { regular, zero, twice, leaning, broken };

void check_growth(Index batch, Index rows, Index size, Index n, Index count, Block kind) {
    Numbers basis = poisoned(batch * rows * size), coefficients = poisoned(batch * rows * count),
            triangle = poisoned(batch * count * count), dropped = poisoned(batch * count), floor(batch);
    std::vector<Index> sizes(batch, 0), ranks(batch, -7);
    sharpcore::GrowBasisArguments a{};
    a.basis = basis.data();
    a.sizes = sizes.data();
    a.floor = floor.data();
    a.coefficients = coefficients.data();
    a.triangle = triangle.data();
    a.dropped = dropped.data();
    a.ranks = ranks.data();
    a.batch = batch;
    a.rows = rows;
    a.size = size;
    a.limit = rows < size ? rows : size;
    a.dtype = Dtype::float64;
    a.block_batch_stride = size;
    a.block_count_stride = batch * size;
    // A basis to begin with is what grows of nothing.
    if (n > 0) {
        Numbers start = normals(n * batch * size), c(batch * rows * n), t(batch * n * n), d(batch * n);
        sharpcore::GrowBasisArguments first = a;
        first.block = start.data();
        first.coefficients = c.data();
        first.triangle = t.data();
        first.dropped = d.data();
        first.count = n;
        run(sharpcore::cuda::grow_basis_workspace, sharpcore::cuda::grow_basis, first);
        for (Index i = 0; i < batch; ++i) CHECK(ranks[i] == n);
        sizes = ranks;
    }
    const bool frozen = batch > 2;
    if (frozen) sizes[1] = -1;
    Numbers block = normals(count * batch * size);
    for (Index i = 0; i < batch; ++i) {
        double* const second = block.data() + (batch + i) * size;
        for (Index e = 0; e < size && count > 1; ++e) {
            const double one = block[i * size + e];
            if (kind == Block::zero) second[e] = 0;
            if (kind == Block::twice) second[e] = one;
            if (kind == Block::leaning) second[e] = (n > 0 ? basis[i * rows * size + e] : one) + 1e-7 * second[e];
        }
        if (kind == Block::broken) block[i * size] = std::nan("");
    }
    a.block = block.data();
    a.count = count;
    run(sharpcore::cuda::grow_basis_workspace, sharpcore::cuda::grow_basis, a);
    for (Index i = 0; i < batch; ++i) {
        const double* const c = coefficients.data() + i * rows * count;
        const double* const t = triangle.data() + i * count * count;
        const Index old = frozen && i == 1 ? 0 : n;
        if (frozen && i == 1) {
            CHECK(ranks[i] == 0);
            for (Index e = 0; e < rows * count; ++e) CHECK(c[e] == 0);
            continue;
        }
        if (kind == Block::broken) continue;
        const Index room = a.limit - old, full = count < room ? count : room;
        const bool short_of = count > 1 && (kind == Block::zero || kind == Block::twice);
        CHECK(ranks[i] == full || (short_of && ranks[i] == (count - 1 < room ? count - 1 : room)));
        const double* const grown = basis.data() + i * rows * size;
        check_orthonormal(grown, old + ranks[i], size);
        for (Index j = 0; j < count; ++j) {
            Numbers rest(block.begin() + (j * batch + i) * size, block.begin() + (j * batch + i + 1) * size);
            const double length = std::sqrt(dot(rest.data(), rest.data(), size));
            for (Index m = 0; m < old + ranks[i]; ++m) {
                const double part = m < old ? c[m * count + j] : t[(m - old) * count + j];
                for (Index e = 0; e < size; ++e) rest[e] -= part * grown[m * size + e];
            }
            const double left = std::sqrt(dot(rest.data(), rest.data(), size));
            CHECK(std::fabs(left - dropped[i * count + j]) <= 1e-13 * length);
        }
    }
}

// Steps with diag(1, ..., size), until the space is full: eigenvalues of the projection are 1, ..., size.
void check_lanczos(Index batch, Index size, Index block, Dtype dtype) {
    const Index rows = size;
    Numbers basis = poisoned(batch * rows * size), projected(batch * rows * rows), lost(batch * rows), norm(batch),
            products(block * batch * size), out = poisoned(block * batch * size);
    std::vector<float> small(products.size()), small_out(out.size(), NAN);
    std::vector<Index> sizes(batch), processed(batch), multiplied(batch), deflated(batch), breakdowns(batch),
        faults(batch);
    std::vector<char> frozen(batch);
    for (Index i = 0; i < batch; ++i) {
        for (Index e = 0; e < block * size; ++e) basis[i * rows * size + e] = 0;
        for (Index k = 0; k < block; ++k) {
            // A combination of every block-th unit vector.
            double* const row = basis.data() + (i * rows + k) * size;
            for (Index e = k; e < size; e += block) row[e] = normal();
            const double length = std::sqrt(dot(row, row, size));
            for (Index e = k; e < size; e += block) row[e] /= length;
        }
        sizes[i] = block;
    }
    frozen[batch - 1] = batch > 1;
    sharpcore::cuda::LanczosStepArguments a{};
    a.basis = basis.data();
    a.projected = projected.data();
    a.lost = lost.data();
    a.norm = norm.data();
    a.sizes = sizes.data();
    a.processed = processed.data();
    a.multiplied = multiplied.data();
    a.deflated = deflated.data();
    a.breakdowns = breakdowns.data();
    a.frozen = reinterpret_cast<const bool*>(frozen.data());
    a.faults = faults.data();
    a.product_count_stride = batch * size;
    a.product_batch_stride = size;
    a.product_dtype = a.out_dtype = dtype;
    const bool wide = dtype == Dtype::float64;
    a.products = wide ? static_cast<const void*>(products.data()) : small.data();
    a.out = wide ? static_cast<void*>(out.data()) : small_out.data();
    a.count = block;
    a.batch = batch;
    a.rows = rows;
    a.size = a.limit = size;
    a.share = 1e-10;
    a.tolerance = 1e-10;
    for (Index step = 0; processed[0] < size; ++step) {
        CHECK(step < 2 * size);
        for (Index k = 0; k < block; ++k)
            for (Index i = 0; i < batch; ++i)
                for (Index e = 0; e < size; ++e) {
                    const Index at = (k * batch + i) * size + e;
                    const double entry = step == 0 && !frozen[i] ? basis[(i * rows + k) * size + e]
                                         : step == 0             ? 0
                                         : wide                  ? out[at]
                                                                 : small_out[at];
                    products[at] = static_cast<double>(e + 1) * entry;
                    small[at] = static_cast<float>(products[at]);
                }
        run(sharpcore::cuda::lanczos_step_workspace, sharpcore::cuda::lanczos_step, a);
    }
    for (Index i = 0; i < batch - (batch > 1); ++i) {
        CHECK(faults[i] == 0 && processed[i] == size && sizes[i] == size && breakdowns[i] == 1);
        double trace = 0;
        for (Index m = 0; m < size; ++m) trace += projected[(i * rows + m) * rows + m];
        CHECK(std::fabs(trace - size * (size + 1) / 2.0) < (wide ? 1e-10 : 1e-4) * size * size);
    }
    if (batch > 1) CHECK(processed[batch - 1] == 0 && multiplied[batch - 1] == 0);
}

void check_probes(sharpcore::ProbeKind kind, Index dimension) {
    const std::vector<Index> ids{0, 7, Index{1} << 40};
    Numbers out = poisoned(2 * 3 * dimension);
    sharpcore::PhiloxArguments a{};
    a.out = out.data();
    a.sample_ids = ids.data();
    a.dtype = Dtype::float64;
    a.kind = kind;
    a.seed = 42;
    a.count = 2;
    a.samples = 3;
    a.dimension = dimension;
    run(sharpcore::cuda::philox_workspace, sharpcore::cuda::philox_probes, a);
    for (double number : out) CHECK(std::isfinite(number));
    if (kind == sharpcore::ProbeKind::normal) return;
    for (Index row = 0; row < 6; ++row) {
        const double* const probe = out.data() + row * dimension;
        CHECK(std::fabs(dot(probe, probe, dimension) / dimension - 1) < 1e-13);
    }
}

void check_eigen(Index n, bool sizes_differ) {
    const Index batch = 2;
    Numbers matrices(batch * n * n), values = poisoned(batch * n), vectors = poisoned(batch * n * n);
    for (Index g = 0; g < batch; ++g)
        for (Index i = 0; i < n; ++i)
            for (Index k = i; k < n; ++k) matrices[(g * n + i) * n + k] = matrices[(g * n + k) * n + i] = normal();
    const std::vector<Index> sizes{n, n / 2};
    const sharpcore::cuda::SymmetricEigenArguments a{
        matrices.data(), sizes_differ ? sizes.data() : nullptr, values.data(), vectors.data(), batch, n};
    run(sharpcore::cuda::symmetric_eigen_workspace, sharpcore::cuda::symmetric_eigen, a);
    for (Index g = 0; g < batch; ++g) {
        const Index size = sizes_differ ? sizes[g] : n;
        for (Index pair = 0; pair < size; ++pair) {
            CHECK(pair == 0 || values[g * n + pair - 1] <= values[g * n + pair]);
            double off = 0, square = 0;
            for (Index i = 0; i < size; ++i) {
                double image = 0;
                for (Index k = 0; k < size; ++k)
                    image += matrices[(g * n + i) * n + k] * vectors[(g * n + k) * n + pair];
                const double entry = vectors[(g * n + i) * n + pair];
                off += (image - values[g * n + pair] * entry) * (image - values[g * n + pair] * entry);
                square += entry * entry;
            }
            CHECK(std::sqrt(off) < 1e-13 * n && std::fabs(square - 1) < 1e-13);
        }
    }
}

}  // namespace

int main() {
    using sharpcore::ProbeKind;
    for (const ProbeKind kind : {ProbeKind::rademacher, ProbeKind::normal, ProbeKind::sphere})
        for (const Index dimension : {1, 33, 1025})
            if (kSmall || dimension == 1025) check_probes(kind, dimension);
    check_growth(2, 20, 515, 5, 8, Block::regular);
    check_eigen(7, false);
    if (!kSmall) {
        check_growth(1, 6, 70, 2, 2, Block::leaning);
        check_lanczos(1, 5, 2, Dtype::float32);
        return 0;
    }
    for (const Block kind : {Block::regular, Block::zero, Block::twice, Block::leaning, Block::broken})
        for (const Index count : {1, 2, 3, 11}) check_growth(3, 20, 77, count == 3 ? 0 : 6, count, kind);
    check_growth(1, 1, 1, 0, 1, Block::regular);
    check_growth(2, 7, 7, 3, 6, Block::regular);
    check_lanczos(2, 13, 2, Dtype::float32);
    check_lanczos(3, 13, 1, Dtype::float64);
    check_lanczos(1, 24, 4, Dtype::float64);
    check_eigen(1, true);
    check_eigen(20, true);
    // More than the shared memory holds.
    check_eigen(41, false);
    return 0;
}
