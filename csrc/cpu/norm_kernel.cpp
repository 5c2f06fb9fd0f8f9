// Forward: reads x (and residual) once, writes y (and z) once; statistics in
// two passes over the row in cache. Backward: reads dy and z once from memory,
// writes dresidual (and dx) once. About 8 and 14 FLOPs an element.
#include "cpu/norm.h"

#include "cpu/philox.h"
#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

namespace {

// A parameter in the compute type: itself, or converted into this thread's
// scratch memory.
template <class C, int slot>
const C* parameter(const Array& p, int64_t n) {
  const C* values = p.as<const C>();
  if (!p || p.dtype == (sizeof(C) == 8 ? DType::f64 : DType::f32)) return values;
  C* converted = scratch<C, slot>(n);
  visit_dtype(p.dtype, [&](auto type) {
    const auto* source = p.as<const decltype(type)>();
    if constexpr (std::is_same_v<Compute<decltype(type)>, C>) {
      for_vectors<C>(n, [&](int64_t i, int count) { store(converted + i, load(source + i, count), count); });
    } else if constexpr (std::is_same_v<decltype(type), float>) {
      for (int64_t i = 0; i < n; ++i) converted[i] = source[i];
    }
  });
  return converted;
}

// dropout's factor for each column of a row, in scratch memory
template <class C>
const C* keep_factors(const Dropout& dropout, int64_t row, int64_t width) {
  C* factors = scratch<C, 3>(width + kPhiloxColumns);
  alignas(64) uint16_t random[kPhiloxColumns];
  for (int64_t column = 0; column < width; column += kPhiloxColumns) {
    random_bits(dropout, 0, static_cast<uint32_t>(row), column, random);
    for (int i = 0; i < kPhiloxColumns; i += kLanes<C>)
      store(factors + column + i, keep_factor<C>(dropout, random + i));
  }
  return factors;
}

template <class X, class Z>
void forward(const NormForward& args, int64_t begin, int64_t end) {
  using C = Compute<Z>;
  const int64_t n = args.width;
  const C* weight = parameter<C, 0>(args.weight, n);
  const C* bias = parameter<C, 1>(args.bias, n);
  C* row_buffer = scratch<C, 2>(n);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = args.x.as<const X>() + row * n;
    const C* values = row_buffer;  // this row of z, in the compute type
    Totals<C, 1> total;
    if (args.residual) {
      const Z* residual = args.residual.as<const Z>() + row * n;
      Z* z = args.z.as<Z>() + row * n;
      const C* keep = args.dropout ? keep_factors<C>(args.dropout, row, n) : nullptr;
      const bool stream_z = args.past_caches && streamable(z, n);
      total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
        Vec<C> v = load(x + i, count);
        if (keep != nullptr) v *= load(keep + i);
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
        const Vec<C> d = load(values + i, count) - mean;
        terms[0] += first<C>(d * d, count);
      });
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

// RowMeans of R rows at once, so that dweight and dbias (null: not wanted) are
// read and written once for all of them.
template <int R, class C, class Z>
void sum_rows(const NormBackward& args, int64_t row, const C* weight, C* dweight, C* dbias, RowMeans<C>* means) {
  const int64_t n = args.width;
  const Z* dy = args.dy.as<const Z>() + row * n;
  const Z* z = args.z.as<const Z>() + row * n;
  C mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = args.rms ? 0 : static_cast<const C*>(args.mean)[row + r];
    rstd[r] = static_cast<const C*>(args.rstd)[row + r];
  }
  const auto column = [&](int64_t i, int count, Vec<C>* shift, Vec<C>* slope) __attribute__((always_inline)) {
    const Vec<C> w = weight != nullptr ? load(weight + i, count) : splat(C{1});
    Vec<C> dw{}, db{};
    for (int r = 0; r < R; ++r) {
      const Vec<C> g = load(dy + r * n + i, count), xhat = (load(z + r * n + i, count) - mean[r]) * rstd[r];
      shift[r] += g * w;
      slope[r] += g * w * xhat;  // lanes beyond the row have g = 0
      dw += g * xhat;
      db += g;
    }
    if (dweight != nullptr) store(dweight + i, load(dweight + i, count) + dw, count);
    if (dbias != nullptr) store(dbias + i, load(dbias + i, count) + db, count);
  };
  constexpr int64_t block = 128 * kLanes<C>;  // summing blocks first keeps rounding errors small in
                                              // wide rows
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
  for (int r = 0; r < R; ++r) {
    means[r] = {args.rms ? 0 : sum<C>(shift[r]) / static_cast<C>(n), sum<C>(slope[r]) / static_cast<C>(n)};
  }
}

template <class X, class Z>
void backward(const NormBackward& args, int64_t chunk) {
  using C = Compute<Z>;
  constexpr int kRows = 4;             // taken at once
  constexpr int64_t kRowsPerSum = 16;  // sums over few rows first, then over
                                       // those: the error grows with neither
  const int64_t n = args.width;
  const C* weight = parameter<C, 0>(args.weight, n);
  C* totals = static_cast<C*>(args.partials) + chunk * 2 * n;
  const int64_t sums = args.partials == nullptr ? 0 : args.rms ? n : 2 * n;
  C* dweight = sums > 0 ? scratch<C, 1>(2 * n) : nullptr;
  C* dbias = sums > n ? dweight + n : nullptr;
  if (sums > 0) {
    std::memset(totals, 0, 2 * n * sizeof(C));
    std::memset(dweight, 0, sums * sizeof(C));
  }
  const int64_t begin = chunk * args.rows_per_chunk;
  const int64_t end = begin + args.rows_per_chunk < args.rows ? begin + args.rows_per_chunk : args.rows;
  RowMeans<C> means[kRows];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t taken = (row - begin) % kRows;
    if (taken == 0 && end - row >= kRows) {
      sum_rows<kRows, C, Z>(args, row, weight, dweight, dbias, means);
    } else if (row - taken + kRows > end) {
      sum_rows<1, C, Z>(args, row, weight, dweight, dbias, means + taken);
    }
    const auto [shift, slope] = means[taken];
    const C mean = args.rms ? 0 : static_cast<const C*>(args.mean)[row];
    const C rstd = static_cast<const C*>(args.rstd)[row];
    const Z* dy = args.dy.as<const Z>() + row * n;
    const Z* z = args.z.as<const Z>() + row * n;
    const Z* dz = args.dz ? args.dz.as<const Z>() + row * n : nullptr;
    Z* dresidual = args.dresidual.as<Z>() + row * n;
    X* dx = args.dx ? args.dx.as<X>() + row * n : nullptr;
    const C* keep = dx != nullptr && args.dropout ? keep_factors<C>(args.dropout, row, n) : nullptr;
    const bool stream_dx = args.past_caches && streamable(dx, n);
    write_row<C>(dresidual, n, args.past_caches, [&, shift = shift, slope = slope](int64_t i, int count) {
      const Vec<C> g = load(dy + i, count), xhat = (load(z + i, count) - mean) * rstd;
      const Vec<C> wg = weight != nullptr ? g * load(weight + i, count) : g;
      Vec<C> d = (wg - shift - xhat * slope) * rstd;
      if (dz != nullptr) d += load(dz + i, count);
      if (dx != nullptr) {
        const Vec<C> branch = keep != nullptr ? d * load(keep + i) : d;
        stream_dx ? stream(dx + i, branch) : store(dx + i, branch, count);
      }
      return d;
    });
    if ((row - begin) % kRowsPerSum == kRowsPerSum - 1 || row + 1 == end) {
      for_vectors<C>(sums, [&](int64_t i, int count) {
        store(totals + i, load(totals + i, count) + load(dweight + i, count), count);
        store(dweight + i, Vec<C>{}, count);
      });
    }
  }
  end_streams();
}

// Calls body(X{}, Z{}) for the pairs that the operators admit: one dtype, or
// 16-bit x with float z.
template <class Body>
void visit_pair(DType x, DType z, Body&& body) {
  visit_dtype(x, [&](auto x_type) {
    if (x == z) {
      body(x_type, x_type);
    } else if constexpr (sizeof(x_type) == 2) {
      body(x_type, float{});
    }
  });
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

void column_sum(const ColumnSum& args, int64_t begin, int64_t end) {
  auto add = [&](auto compute, const Array& gradient, int which) {
    using C = decltype(compute);
    if (!gradient) return;
    const C* partials = static_cast<const C*>(args.partials) + which * args.width;
    visit_dtype(gradient.dtype, [&](auto type) {
      auto* out = gradient.as<decltype(type)>() + begin;
      for_vectors<C>(end - begin, [&](int64_t i, int count) {
        Vec<C> total{};
        for (int64_t c = 0; c < args.chunks; ++c) total += load(partials + 2 * c * args.width + begin + i, count);
        if constexpr (std::is_same_v<Compute<decltype(type)>, C>) {
          store(out + i, total, count);
        } else if constexpr (std::is_same_v<decltype(type), float>) {
          for (int lane = 0; lane < count; ++lane) out[i + lane] = static_cast<float>(total[lane]);
        }
      });
    });
  };
  for (int which : {0, 1}) {
    const Array& gradient = which == 0 ? args.dweight : args.dbias;
    args.compute == DType::f64 ? add(double{}, gradient, which) : add(float{}, gradient, which);
  }
}

}  // namespace pyllm::PYLLM_ISA
