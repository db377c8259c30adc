// K tangents or cotangents through GEGLU. The derivatives of y = h gelu(g) with respect to h and to g are computed once
// for a tile and stay in the cache while all K vectors pass.
#include "sharpcore/geglu_tangent.h"

#include "sharpcore/parallel.h"
#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = GegluArguments;

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

// Calls piece(start, read, write) for the vectors of a row; the last one is read and written in part where it must be.
template <class T, class Piece>
inline void for_vectors(Index columns, Piece piece) {
    Index i = 0;
    for (; i + kLanes<T> <= columns; i += kLanes<T>)
        piece([i](const T* from) { return load(from + i); }, [i](T* to, Vec<T> vector) { store(to + i, vector); });
    if (const Index rest = columns - i; rest > 0)
        piece([=](const T* from) { return load_partial(from + i, rest); },
              [=](T* to, Vec<T> vector) { store_partial(to + i, vector, rest); });
}

// Derivatives of y with respect to h and g for one row, or a part of it.
template <bool tanh, class T>
void fill(T* by_hidden, T* by_gate, const T* hidden, const T* gate, Index columns) {
    for_vectors<T>(columns, [=](auto read, auto write) {
        const Gate<T> activated = gate_of<tanh, T>(read(gate));
        write(by_hidden, activated.value);
        write(by_gate, read(hidden) * activated.slope);
    });
}

template <bool adjoint, class T>
void apply(T* out, const T* v, const T* by_hidden, const T* by_gate, Index row_columns, Index columns) {
    for_vectors<T>(columns, [=](auto read, auto write) {
        if constexpr (adjoint) {
            const Vec<T> vector = read(v);
            write(out, vector * read(by_hidden));
            write(out + row_columns, vector * read(by_gate));
        } else {
            write(out, read(v) * read(by_hidden) + read(v + row_columns) * read(by_gate));
        }
    });
}

// Elements of a tile: its two derivatives take half of a first-level cache in float.
constexpr Index kTileElements = 2048;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// A tile is some whole rows, or a part of one long row. A task is a tile, for a range of the K vectors.
struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index rows, columns;                    // of a tile
    Index row_tiles, column_tiles, splits;  // splits: ranges of K
};

template <bool adjoint, bool tanh, class T>
void do_task(const void* job, Index task, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Arguments& a = work.arguments;
    const Index split = task % work.splits, tile = task / work.splits;
    const Index column = tile % work.column_tiles * work.columns, row = tile / work.column_tiles * work.rows;
    const Index columns = column + work.columns < a.columns ? work.columns : a.columns - column;
    const Index rows = row + work.rows < a.rows ? work.rows : a.rows - row;
    const Index first = split * a.count / work.splits, last = (split + 1) * a.count / work.splits;
    T* const by_hidden = static_cast<T*>(work.scratch.slot(slot));
    T* const by_gate = by_hidden + work.rows * work.columns;
    for (Index r = 0; r < rows; ++r) {
        const T* projection = static_cast<const T*>(a.projection) + (row + r) * 2 * a.columns + column;
        fill<tanh, T>(by_hidden + r * columns, by_gate + r * columns, projection, projection + a.columns, columns);
    }
    const Index in_width = adjoint ? a.columns : 2 * a.columns, out_width = adjoint ? 2 * a.columns : a.columns;
    for (Index k = first; k < last; ++k) {
        const T* v = static_cast<const T*>(a.vectors) + k * a.vector_count_stride + row * in_width + column;
        T* out = static_cast<T*>(a.out) + k * a.out_count_stride + row * out_width + column;
        for (Index r = 0; r < rows; ++r)
            apply<adjoint, T>(out + r * out_width, v + r * in_width, by_hidden + r * columns, by_gate + r * columns,
                              a.columns, columns);
    }
}

template <bool adjoint, class T>
void run(const Arguments& a) {
    const Index columns = a.columns < kTileElements ? a.columns : kTileElements;
    Index rows = kTileElements / columns;
    if (rows > a.rows) rows = a.rows;
    const Index row_tiles = (a.rows + rows - 1) / rows, column_tiles = (a.columns + columns - 1) / columns;
    const Index tiles = row_tiles * column_tiles;
    Index splits = 1;
    if (a.threads > 1) {
        splits = (kTasksPerThread * a.threads + tiles - 1) / tiles;
        if (splits > a.count) splits = a.count;
    }
    const int threads = a.threads > 1 ? a.threads : 1;
    const Scratch scratch(threads, 2 * rows * columns * static_cast<Index>(sizeof(T)));
    const Work work{a, scratch, rows, columns, row_tiles, column_tiles, splits};
    parallel_for(tiles * splits, threads, a.tanh ? do_task<adjoint, true, T> : do_task<adjoint, false, T>, &work);
}

template <bool adjoint>
void run_any(const Arguments& a) {
    if (a.float64)
        run<adjoint, double>(a);
    else
        run<adjoint, float>(a);
}

}  // namespace

void geglu_tangent(const Arguments& arguments) { run_any<false>(arguments); }

void geglu_adjoint(const Arguments& arguments) { run_any<true>(arguments); }

}  // namespace sharpcore::SHARPCORE_ISA
