// Forward: reads x (and residual) once, writes y (and z) once; statistics in two passes over the row in cache.
// Backward: reads dy and z (and dz) once from memory, writes dresidual (and dx) once; rows are taken four at a time, so
// that weight and the sums of columns are read and written once for all of them. About 8 and 14 FLOPs an element.
#include "cpu/norm.h"

#include "cpu/rows.h"

namespace pyllm::PYLLM_ISA {

namespace {

// What dropout keeps of `rows` rows from `first` on, in scratch memory; each begins `stride` after the one before.
struct KeptRows {
  const Kept* rows;
  int64_t stride;
};

inline KeptRows draw_rows(const Dropout& dropout, int64_t first, int rows, int64_t width) {
  const int64_t stride = (width + kDrawnColumns - 1) / kDrawnColumns * (kDrawnColumns / kKeptColumns);
  Kept* kept = scratch<Kept, 0>(rows * stride);
  for (int r = 0; r < rows; ++r)
    for (int64_t column = 0; column < width; column += kDrawnColumns)
      draw(dropout, first + r, column, width - column, kept + r * stride + column / kKeptColumns);
  return {kept, stride};
}

constexpr double kLittle = 1.0 / 2048;  // as a share of the mean

template <class X, class Z>
void forward(const NormForward& args, int64_t begin, int64_t end) {
  using C = Compute<Z>;
  const int64_t n = args.width;
  const C* weight = parameter<C, 0>(args.weight, n);
  const C* bias = parameter<C, 1>(args.bias, n);
  const C* x_bias = parameter<C, 3>(args.x_bias, n);
  C* row_buffer = scratch<C, 2>(n);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = args.x.as<const X>() + row * n;
    const C* values = row_buffer;  // this row of z, in the compute type
    Totals<C, 1> total;
    if (args.residual) {
      const Z* residual = args.residual.as<const Z>() + row * n;
      Z* z = args.z.as<Z>() + row * n;
      const Kept* kept = args.dropout ? draw_rows(args.dropout, row, 1, n).rows : nullptr;
      const bool stream_z = args.past_caches && streamable(z, n);
      total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
        Vec<C> v = load(x + i, count);
        if (x_bias != nullptr) v += load(x_bias + i, count);
        if (kept != nullptr) v *= keep_factor<C>(args.dropout, kept, i);
        v = rounded<Z>(v + load(residual + i, count));  // what the backward sees
        stream_z ? stream(z + i, v) : store(z + i, v, count);
        store(row_buffer + i, v, count);
        terms[0] += args.rms ? v * v : v;
      });
    } else {
      if constexpr (std::is_same_v<X, C>) values = x;
      total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
        const Vec<C> v = load(x + i, count);
        if constexpr (!std::is_same_v<X, C>) store(row_buffer + i, v, count);
        terms[0] += args.rms ? v * v : v;
      });
    }
    C mean = 0;
    if (!args.rms) {
      mean = total.value[0] / static_cast<C>(n);
      total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
        const Vec<C> d = first<C>(load(values + i, count) - mean, count);
        terms[0] += d * d;
      });
      // Beside what varies so little, what rounding left in the mean counts: of a constant row it is all that there is.
      const C little = mean * static_cast<C>(kLittle);
      if (total.value[0] <= static_cast<C>(n) * little * little) {
        const C sum = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
                        terms[0] += first<C>(load(values + i, count) - mean, count);
                      }).value[0];
        const C left = sum / static_cast<C>(n);
        total.value[0] -= sum * left;
        if (total.value[0] < 0) total.value[0] = 0;
        mean += left;
      }
      static_cast<C*>(args.mean)[row] = mean;
    }
    const C rstd = 1 / std::sqrt(total.value[0] / static_cast<C>(n) + static_cast<C>(args.eps));
    static_cast<C*>(args.rstd)[row] = rstd;
    Z* y = args.y.as<Z>() + row * n;
    write_row<C>(y, n, args.past_caches, [&](int64_t i, int count) {
      Vec<C> v = (load(values + i, count) - mean) * rstd;
      if (weight != nullptr) v *= load(weight + i, count);
      if (bias != nullptr) v += load(bias + i, count);
      return v;
    });
  }
  end_streams();
}

// What a row's gradient subtracts: the means of w dy and of w dy xhat.
template <class C>
struct RowMeans {
  C shift, slope;
};

// What the backward of R rows needs beside its arguments, which R rows share.
template <int R, class C, class Z>
struct RowBlock {
  const Z *dy, *z;  // of the first row
  C mean[R], rstd[R];
  RowMeans<C> means[R];

  RowBlock(const NormBackward& args, int64_t row)
      : dy(args.dy.as<const Z>() + row * args.width), z(args.z.as<const Z>() + row * args.width) {
    const bool is_mean = !args.rms && args.width == 1;  // no gradient: rstd would blow up rounding errors
    for (int r = 0; r < R; ++r) {
      mean[r] = args.rms ? 0 : static_cast<const C*>(args.mean)[row + r];
      rstd[r] = is_mean ? 0 : static_cast<const C*>(args.rstd)[row + r];
    }
  }
  Vec<C> xhat(int r, int64_t n, int64_t i, int count) const { return (load(z + r * n + i, count) - mean[r]) * rstd[r]; }
};

template <class C>
inline void add(C* sums, int64_t i, int count, Vec<C> terms) {
  if (sums != nullptr) store(sums + i, load(sums + i, count) + terms, count);
}

// The RowMeans of R rows, and their part in the sums of columns (null: not wanted).
template <int R, class C, class Z>
void sum_rows(const NormBackward& args, RowBlock<R, C, Z>& rows, const C* weight, C* dweight, C* dbias) {
  const int64_t n = args.width;
  const auto column = [&](int64_t i, int count, Vec<C>* shift, Vec<C>* slope) __attribute__((always_inline)) {
    const Vec<C> w = weight != nullptr ? load(weight + i, count) : splat(C{1});
    Vec<C> dw{}, db{};
    for (int r = 0; r < R; ++r) {
      const Vec<C> g = load(rows.dy + r * n + i, count), xhat = rows.xhat(r, n, i, count);
      shift[r] += g * w;
      slope[r] += g * w * xhat;  // lanes beyond the row have g = 0
      dw += g * xhat;
      db += g;
    }
    add<C>(dweight, i, count, dw);
    add<C>(dbias, i, count, db);
  };
  constexpr int64_t block = 128 * kLanes<C>;  // summing blocks first keeps rounding errors small in wide rows
  Vec<C> shift[R] = {}, slope[R] = {};
  for (int64_t begin = 0; begin < n; begin += block) {
    Vec<C> block_shift[R] = {}, block_slope[R] = {};
    for_vectors<C>(n - begin < block ? n - begin : block,
                   [&](int64_t i, int count) { column(begin + i, count, block_shift, block_slope); });
    for (int r = 0; r < R; ++r) {
      shift[r] += block_shift[r];
      slope[r] += block_slope[r];
    }
  }
  for (int r = 0; r < R; ++r)
    rows.means[r] = {args.rms ? 0 : sum<C>(shift[r]) / static_cast<C>(n), sum<C>(slope[r]) / static_cast<C>(n)};
}

// The gradients of R rows from `row` on; sums: of columns (null: not wanted).
template <int R, class X, class Z, class C = Compute<Z>>
void backward_rows(const NormBackward& args, int64_t row, const C* weight, C* const (&sums)[kColumnSums]) {
  const int64_t n = args.width;
  RowBlock<R, C, Z> rows(args, row);
  sum_rows(args, rows, weight, sums[kWeightSum], sums[kBiasSum]);
  const Z* dz = args.dz ? args.dz.as<const Z>() + row * n : nullptr;
  Z* dresidual = args.dresidual.as<Z>() + row * n;
  X* dx = args.dx ? args.dx.as<X>() + row * n : nullptr;
  const KeptRows kept = dx != nullptr && args.dropout ? draw_rows(args.dropout, row, R, n) : KeptRows{nullptr, 0};
  const bool stream_dx = args.past_caches && streamable(dx, n), stream_z = args.past_caches && streamable(dresidual, n);
  for_vectors<C>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const Vec<C> w = weight != nullptr ? load(weight + i, count) : splat(C{1});
    Vec<C> branch_sum{};
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * n + i;
      const Vec<C> g = load(rows.dy + at, count) * w;
      Vec<C> d = (g - rows.means[r].shift - rows.xhat(r, n, i, count) * rows.means[r].slope) * rows.rstd[r];
      if (dz != nullptr) d += load(dz + at, count);
      stream_z ? stream(dresidual + at, d) : store(dresidual + at, d, count);
      if (kept.rows != nullptr) d *= keep_factor<C>(args.dropout, kept.rows + r * kept.stride, i);
      if (dx != nullptr) stream_dx ? stream(dx + at, d) : store(dx + at, d, count);
      branch_sum += d;
    }
    add<C>(sums[kBranchSum], i, count, branch_sum);
  });
}

template <class X, class Z>
void backward(const NormBackward& args, int64_t chunk) {
  using C = Compute<Z>;
  constexpr int kRows = 4;             // taken at once
  constexpr int64_t kRowsPerSum = 16;  // over few rows first, then over those, see ColumnSums
  const int64_t n = args.width;
  const C* weight = parameter<C, 0>(args.weight, n);
  C* totals = static_cast<C*>(args.partials) + chunk * kColumnSums * n;
  C* sums[kColumnSums] = {};
  for (int which = 0; which < kColumnSums; ++which) {
    if (!args.gradients.at[which]) continue;
    sums[which] = scratch<C, 1>(2 * kColumnSums * n) + 2 * which * n;  // and behind them what add_recent wants
    std::memset(sums[which], 0, 2 * n * sizeof(C));
    std::memset(totals + which * n, 0, n * sizeof(C));
  }
  const int64_t begin = chunk * args.rows_per_chunk;
  const int64_t end = begin + args.rows_per_chunk < args.rows ? begin + args.rows_per_chunk : args.rows;
  for (int64_t row = begin; row < end;) {
    const bool several = end - row >= kRows;
    several ? backward_rows<kRows, X, Z>(args, row, weight, sums) : backward_rows<1, X, Z>(args, row, weight, sums);
    row += several ? kRows : 1;
    if ((row - begin) % kRowsPerSum != 0 && row != end) continue;
    for (int which = 0; which < kColumnSums; ++which) {
      if (sums[which] != nullptr) add_recent(totals + which * n, sums[which] + n, sums[which], n);
    }
  }
  end_streams();
}

}  // namespace

void norm_fwd(const NormForward& args, int64_t begin, int64_t end) {
  visit_pair(args.x.dtype, args.y.dtype, [&](auto x, auto z) { forward<decltype(x), decltype(z)>(args, begin, end); });
}

void norm_bwd(const NormBackward& args, int64_t begin, int64_t end) {
  const DType x_dtype = args.dx ? args.dx.dtype : args.z.dtype;
  visit_pair(x_dtype, args.z.dtype, [&](auto x, auto z) {
    for (int64_t chunk = begin; chunk < end; ++chunk) backward<decltype(x), decltype(z)>(args, chunk);
  });
}

}  // namespace pyllm::PYLLM_ISA
