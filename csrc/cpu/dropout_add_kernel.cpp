// Forward: reads x and residual once, writes y once. Backward: reads dy once, writes dx once. 3 and 2 FLOPs an element
// and 15 integer operations for dropout: bound by memory.
#include "cpu/dropout_add.h"

#include "cpu/rows.h"

namespace pyllm::PYLLM_ISA {

namespace {

template <class X, class Z>
void forward(const DropoutAddForward& args, int64_t begin, int64_t end) {
  using C = Compute<Z>;
  const int64_t n = args.width;
  const C* bias = parameter<C, 0>(args.bias, n);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = args.x.as<const X>() + row * n;
    const Z* residual = args.residual.as<const Z>() + row * n;
    Z* y = args.y.as<Z>() + row * n;
    const bool stream_y = args.past_caches && streamable(y, n);
    for_dropped_vectors<C>(args.dropout, row, n, [&](int64_t i, int count, Vec<C> keep) __attribute__((always_inline)) {
      Vec<C> v = load(x + i, count);
      if (bias != nullptr) v += load(bias + i, count);
      v = v * keep + load(residual + i, count);
      stream_y ? stream(y + i, v) : store(y + i, v, count);
    });
  }
  end_streams();
}

template <class X, class Z>
void backward(const DropoutAddBackward& args, int64_t chunk) {
  using C = Compute<Z>;
  const int64_t n = args.width;
  const ColumnSums<C> sums(static_cast<C*>(args.partials) + chunk * n, args.partials != nullptr ? n : 0);
  const int64_t begin = chunk * args.rows_per_chunk;
  const int64_t end = begin + args.rows_per_chunk < args.rows ? begin + args.rows_per_chunk : args.rows;
  for (int64_t row = begin; row < end; ++row) {
    const Z* dy = args.dy.as<const Z>() + row * n;
    X* dx = args.dx.as<X>() + row * n;
    const bool stream_dx = args.past_caches && streamable(dx, n);
    for_dropped_vectors<C>(args.dropout, row, n, [&](int64_t i, int count, Vec<C> keep) __attribute__((always_inline)) {
      const Vec<C> v = load(dy + i, count) * keep;
      stream_dx ? stream(dx + i, v) : store(dx + i, v, count);
      if (sums.n > 0) sums.add(i, v, count);
    });
    sums.end_row(row - begin, row + 1 == end);
  }
  end_streams();
}

}  // namespace

void dropout_add_fwd(const DropoutAddForward& args, int64_t begin, int64_t end) {
  visit_pair(args.x.dtype, args.y.dtype, [&](auto x, auto z) { forward<decltype(x), decltype(z)>(args, begin, end); });
}

void dropout_add_bwd(const DropoutAddBackward& args, int64_t begin, int64_t end) {
  visit_pair(args.dx.dtype, args.dy.dtype, [&](auto x, auto z) {
    for (int64_t chunk = begin; chunk < end; ++chunk) backward<decltype(x), decltype(z)>(args, chunk);
  });
}

}  // namespace pyllm::PYLLM_ISA
