// What row kernels share: parameters in the compute type, dropout's factors, sums over rows. Include it only from
// *_kernel.cpp.
#pragma once

#include "cpu/philox.h"
#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

// A parameter in the compute type: itself, or converted into this thread's scratch memory.
template <class C, int slot>
inline const C* parameter(const Array& p, int64_t n) {
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

// body(i, count, keep) for each vector of a row of n, with what dropout multiplies it by. (By value: what is stored
// might otherwise be the dropout.)
template <class C, class Body>
[[gnu::always_inline]] inline void for_dropped_vectors(Dropout dropout, int64_t row, int64_t n, Body&& body) {
  if (!dropout)
    return for_vectors<C>(n, [&](int64_t i, int count) __attribute__((always_inline)) { body(i, count, splat(C{1})); });
  alignas(64) Kept kept[kDrawnColumns / kKeptColumns];
  for (int64_t column = 0; column < n; column += kDrawnColumns) {
    draw(dropout, row, column, n - column, kept);
    const int64_t columns = n - column < kDrawnColumns ? n - column : kDrawnColumns;
    for_vectors<C>(columns, [&](int64_t i, int count) __attribute__((always_inline)) {
      body(column + i, count, keep_factor<C>(dropout, kept, i));
    });
  }
}

// Adds recent (n,) to total and clears it; what rounding takes from total is kept in lost (Kahan, 1965).
template <class C>
inline void add_recent(C* total, C* lost, C* recent, int64_t n) {
  for_vectors<C>(n, [&](int64_t i, int count) {
    const Vec<C> before = load(total + i, count), term = load(recent + i, count) - load(lost + i, count);
    const Vec<C> after = before + term;
    store(total + i, after, count);
    store(lost + i, after - after == 0 ? (after - before) - term : Vec<C>{}, count);  // nothing of what is not finite
    store(recent + i, Vec<C>{}, count);
  });
}

// Sums over the rows of a chunk, column by column: over few rows first, then over those, so that the error grows with
// neither. n = 0: none are wanted. A row adds to `recent`.
template <class C>
struct ColumnSums {
  static constexpr int64_t kRows = 16;
  C *total, *recent, *lost;
  int64_t n;

  ColumnSums(C* total, int64_t n) : total(total), recent(scratch<C, 1>(2 * n)), lost(recent + n), n(n) {
    if (n == 0) return;
    std::memset(total, 0, n * sizeof(C));
    std::memset(recent, 0, 2 * n * sizeof(C));
  }

  void add(int64_t i, Vec<C> v, int count) const { store(recent + i, load(recent + i, count) + v, count); }

  void end_row(int64_t row, bool last) const {
    if (row % kRows == kRows - 1 || last) add_recent(total, lost, recent, n);
  }
};

// Calls body(X{}, Z{}) for the pairs that the operators admit: one dtype, or 16-bit x with float z.
template <class Body>
inline void visit_pair(DType x, DType z, Body&& body) {
  visit_dtype(x, [&](auto x_type) {
    if (x == z) {
      body(x_type, x_type);
    } else if constexpr (sizeof(x_type) == 2) {
      body(x_type, float{});
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
