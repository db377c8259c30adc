// GEGLU: the value and its derivatives with respect to h and to g in one pass over the projection, and K tangents or
// cotangents through these derivatives: a pass bound by memory, in which a tile of the derivatives stays in the cache
// while all K vectors pass.
#include "sharpcore/geglu_tangent.h"

#include "sharpcore/for_vectors.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;

template <class T>
struct Gate {
    Vec<T> value;  // gelu(g)
    Vec<T> slope;  // gelu'(g)
};

// Mills' ratio of the normal distribution, M(a) = (1 - cdf(a)) / density(a), as a quotient of polynomials on
// [0, limit]: its relative error is 5e-9 for float and 1e-16 for double (Remez-like fit in 60 digits). Every
// coefficient is positive, so nothing cancels. Past `limit` the density is taken for zero; exp(-limit^2 / 2) is in the
// range of exp.
template <class T>
struct Mills;

template <>
struct Mills<float> {
    static constexpr float limit = 13.19f;
    static constexpr int degree = 4;
    static constexpr float numerator[] = {1.2533141437242477f, 1.0932216431830915f, 0.45529203708311794f,
                                          0.10050178580398776f, 0.010117842104620198f};
    static constexpr float denominator[] = {1.0f,
                                            1.670149599280887f,
                                            1.1958528277498182f,
                                            0.4652472108683133f,
                                            0.10050899901033081f,
                                            0.010117703186606142f};
};

template <>
struct Mills<double> {
    static constexpr double limit = 37.62;
    static constexpr int degree = 9;
    static constexpr double numerator[] = {
        1.2533141373155001,  1.9406786344523375,   1.4866746391568832,    0.7235510145725379,   0.24413393353284152,
        0.05897991304294765, 0.010200976895602613, 0.0012221512681706397, 9.27338892893322e-05, 3.4445776006952227e-06};
    static constexpr double denominator[] = {1.0,
                                             2.3463220807123633,
                                             2.558288904392004,
                                             1.7113298822759433,
                                             0.7801213232954155,
                                             0.2541494304456198,
                                             0.06019517560269807,
                                             0.010293710773031477,
                                             0.0012255958459849142,
                                             9.273388928701628e-05,
                                             3.444577600706561e-06};
};

template <int degree, class T>
inline Vec<T> polynomial(const T* coefficients, Vec<T> a) {
    Vec<T> sum = broadcast(coefficients[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) sum = sum * a + coefficients[i];
    return sum;
}

// gelu(g) = g cdf(g). The small tail is what is computed, so that gelu keeps its relative accuracy on the far left.
template <class T>
inline Gate<T> gelu(Vec<T> g) {
    using C = Mills<T>;
    constexpr T inverse_root = static_cast<T>(0.39894228040143268);  // 1 / sqrt(2 pi)
    const Vec<T> magnitude = g < T(0) ? -g : g;
    const Vec<T> a = clamp<T>(magnitude, T(0), C::limit);
    Vec<T> density = exp<T>(a * a * T(-0.5)) * inverse_root;
    density = magnitude > C::limit ? Vec<T>{} : density;
    const Vec<T> tail =
        density * polynomial<C::degree, T>(C::numerator, a) / polynomial<C::degree + 1, T>(C::denominator, a);
    const Vec<T> cdf = g < T(0) ? tail : T(1) - tail;
    return {g * cdf, cdf + g * density};
}

// Past +-kTanhLimit the approximation by tanh is 0 or 1 to the last bit, and 2u, below, is in the range of exp.
template <class T>
constexpr T kTanhLimit = sizeof(T) == sizeof(float) ? T(9.9) : T(21);

// gelu(g) = g sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g^3), which is g (1 + tanh(u)) / 2.
template <class T>
inline Gate<T> gelu_tanh(Vec<T> g) {
    constexpr T scale = static_cast<T>(1.5957691216057308);  // 2 sqrt(2 / pi)
    constexpr T cubic = static_cast<T>(0.044715);
    const Vec<T> a = clamp<T>(g, -kTanhLimit<T>, kTanhLimit<T>);
    const Vec<T> square = a * a;
    const Vec<T> e = exp<T>(-scale * a * (T(1) + cubic * square));
    Vec<T> sigmoid = T(1) / (T(1) + e);
    const Vec<T> density = sigmoid * (e * sigmoid) * scale * (T(1) + T(3) * cubic * square);
    sigmoid = g < -kTanhLimit<T> ? Vec<T>{} : sigmoid;
    return {g * sigmoid, sigmoid + a * density};
}

template <bool tanh, class T>
inline Gate<T> gate_of(Vec<T> g) {
    if constexpr (tanh) return gelu_tanh<T>(g);
    return gelu<T>(g);
}

// The value of a row and the derivatives of y with respect to h and g; these may overwrite the projection.
template <bool tanh, class T>
void forward(T* value, T* factors, const T* projection, Index columns) {
    for_vectors<T>(columns, [=](auto read, auto write) {
        const Gate<Compute<T>> activated = gate_of<tanh, Compute<T>>(read(projection + columns));
        const Vec<Compute<T>> hidden = read(projection);
        write(factors, activated.value);
        write(factors + columns, hidden * activated.slope);
        write(value, hidden * activated.value);
    });
}

template <bool adjoint, class T>
void apply(T* out, const T* v, const T* factors, Index columns) {
    for_vectors<T>(columns, [=](auto read, auto write) {
        if constexpr (adjoint) {
            const Vec<Compute<T>> vector = read(v);
            write(out, vector * read(factors));
            write(out + columns, vector * read(factors + columns));
        } else {
            write(out, read(v) * read(factors) + read(v + columns) * read(factors + columns));
        }
    });
}

// Elements of y in a task, about: its factors take a quarter of a second-level cache in float.
constexpr Index kTaskElements = 1 << 15;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// Rows of a task.
Index task_rows(Index rows, Index columns, int threads) {
    const Index whole = kTaskElements / columns, shared = threads > 1 ? rows / (kTasksPerThread * threads) : rows;
    const Index fitting = whole < shared ? whole : shared;
    return fitting > 1 ? fitting : 1;
}

template <class Arguments>
struct Work {
    const Arguments& arguments;
    Index rows, splits;  // rows of a task, ranges of K
};

template <bool tanh, class T>
void forward_task(const void* job, Index task, int) noexcept {
    const auto& [a, rows, splits] = *static_cast<const Work<GegluForwardArguments>*>(job);
    const Index end = (task + 1) * rows < a.rows ? (task + 1) * rows : a.rows;
    for (Index r = task * rows; r < end; ++r)
        forward<tanh, T>(static_cast<T*>(a.value) + r * a.columns, static_cast<T*>(a.factors) + r * 2 * a.columns,
                         static_cast<const T*>(a.projection) + r * 2 * a.columns, a.columns);
}

template <bool adjoint, class T>
void apply_task(const void* job, Index task, int) noexcept {
    const auto& [a, rows, splits] = *static_cast<const Work<GegluArguments>*>(job);
    const Index split = task % splits, row = task / splits * rows;
    const Index end = row + rows < a.rows ? row + rows : a.rows;
    const Index in_width = adjoint ? a.columns : 2 * a.columns, out_width = adjoint ? 2 * a.columns : a.columns;
    for (Index k = split * a.count / splits; k < (split + 1) * a.count / splits; ++k) {
        const T* v = static_cast<const T*>(a.vectors) + k * a.vector_count_stride;
        T* out = static_cast<T*>(a.out) + k * a.out_count_stride;
        for (Index r = row; r < end; ++r)
            apply<adjoint, T>(out + r * out_width, v + r * in_width,
                              static_cast<const T*>(a.factors) + r * 2 * a.columns, a.columns);
    }
}

template <bool adjoint>
void run(const GegluArguments& a) {
    Work<GegluArguments> work{a, task_rows(a.rows, a.columns, a.threads), 1};
    const Index tasks = (a.rows + work.rows - 1) / work.rows;
    if (a.threads > 1) work.splits = (kTasksPerThread * a.threads + tasks - 1) / tasks;
    if (work.splits > a.count) work.splits = a.count;
    with_storage(a.dtype, [&](auto one) {
        parallel_for(tasks * work.splits, a.threads, apply_task<adjoint, decltype(one)>, &work);
    });
}

}  // namespace

void geglu_forward(const GegluForwardArguments& a) {
    const Work<GegluForwardArguments> work{a, task_rows(a.rows, a.columns, a.threads), 1};
    with_storage(a.dtype, [&](auto one) {
        using T = decltype(one);
        parallel_for((a.rows + work.rows - 1) / work.rows, a.threads,
                     a.tanh ? forward_task<true, T> : forward_task<false, T>, &work);
    });
}

void geglu_tangent(const GegluArguments& arguments) { run<false>(arguments); }

void geglu_adjoint(const GegluArguments& arguments) { run<true>(arguments); }

}  // namespace sharpcore::SHARPCORE_ISA
