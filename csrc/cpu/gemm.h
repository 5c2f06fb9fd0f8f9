// Matrix products of tiles that lie in cache, register-blocked on the vectors of vec.h. Include it only from
// *_kernel.cpp. Each step of the depth loads `vectors` vectors of B and multiplies them by `rows` broadcast elements of
// A: 6 x 4 accumulators of AVX-512's 32 registers, 6 x 2 of the 16 that the others have.
#pragma once

#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
// With at most this many rows, tiles are twice as wide: B, then all of the cost, is read in longer stretches.
inline constexpr int kWideRows = 2;

// What becomes of C: set to alpha A B, or beta[row] * C + A B, beta being 1 if it is null.
template <class C>
struct Update {
  bool set = false;
  const C* beta = nullptr;
  C alpha = 1;

  Update of_row(int64_t row) const { return {set, beta == nullptr ? nullptr : beta + row, alpha}; }
};

// Writes a tile's sums to C as `update` says.
template <int rows, int vectors, class C>
[[gnu::always_inline]] inline void write_tile(const Vec<C> (&total)[rows][vectors], C* c, int64_t c_stride,
                                              const Update<C>& update) {
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      C* out = c + r * c_stride + v * kLanes<C>;
      if (update.set) {
        store(out, total[r][v] * update.alpha);
      } else {
        store(out, update.beta == nullptr ? load(out) + total[r][v] : load(out) * update.beta[r] + total[r][v]);
      }
    }
  }
}

// C (rows, vectors) from A (rows, depth), or its transpose in memory, and B (depth, vectors).
template <bool transposed, int rows, int vectors, class C, class T>
void multiply_tile(int64_t depth, const C* a, int64_t a_stride, const T* b, int64_t b_stride, C* c, int64_t c_stride,
                   Update<C> update) {
  constexpr int lanes = kLanes<C>;
  Vec<C> total[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = load(b + k * b_stride + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const C factor = transposed ? a[k * a_stride + r] : a[r * a_stride + k];
      for (int v = 0; v < vectors; ++v) total[r][v] += column[v] * factor;
    }
  }
  write_tile<rows, vectors, C>(total, c, c_stride, update);
}

// tile<count, vectors>(), count being at most `rows`.
template <int vectors, int rows, class Tile>
[[gnu::always_inline]] inline void with_rows(int count, Tile&& tile) {
  if constexpr (rows > 0) {
    if (count == rows) {
      tile.template operator()<rows, vectors>();
    } else {
      with_rows<vectors, rows - 1>(count, tile);
    }
  }
}

// tile<rows, vectors>(row, column) for the tiles that a matrix (rows, columns) is made of; columns is a multiple of the
// lanes.
template <class C, class Tile>
[[gnu::always_inline]] inline void for_tiles(int64_t rows, int64_t columns, Tile&& tile) {
  constexpr int lanes = kLanes<C>;
  const auto panel = [&]<int vectors>(int64_t column) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = rows - row < kTileRows ? static_cast<int>(rows - row) : kTileRows;
      with_rows<vectors, vectors <= kTileVectors ? kTileRows : kWideRows>(
          count, [&]<int r, int v>() { tile.template operator()<r, v>(row, column); });
    }
  };
  int64_t column = 0;
  if (rows <= kWideRows) {
    for (; column + 2 * kTileVectors * lanes <= columns; column += 2 * kTileVectors * lanes)
      panel.template operator()<2 * kTileVectors>(column);
  }
  for (; column + kTileVectors * lanes <= columns; column += kTileVectors * lanes)
    panel.template operator()<kTileVectors>(column);
  if constexpr (kTileVectors > 2) {
    for (; column + 2 * lanes <= columns; column += 2 * lanes) panel.template operator()<2>(column);
  }
  for (; column < columns; column += lanes) panel.template operator()<1>(column);
}

// C (rows, columns) from A (rows, depth), or its transpose in memory, and B (depth, columns); strides are those of the
// rows in memory; columns is a multiple of the lanes. B may be in a storage type: it is converted in registers.
template <bool transposed, class C, class T>
void multiply_add(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_stride, const T* b,
                  int64_t b_stride, C* c, int64_t c_stride, Update<C> update) {
  for_tiles<C>(rows, columns, [&]<int r, int v>(int64_t row, int64_t column) {
    multiply_tile<transposed, r, v>(depth, a + row * (transposed ? 1 : a_stride), a_stride, b + column, b_stride,
                                    c + row * c_stride + column, c_stride, update.of_row(row));
  });
}

// --- transposition of as many vectors as each has lanes ---

// Exchanges the off-diagonal blocks of `step` lanes in each square of 2 * step.
template <int step, class C, int... lane>
[[gnu::always_inline]] inline void exchange(Vec<C> (&rows)[kLanes<C>], std::integer_sequence<int, lane...> lanes) {
  constexpr int count = sizeof...(lane);
  for (int r = 0; r < count; ++r) {
    if (r & step) continue;
    const Vec<C> a = rows[r], b = rows[r + step];
    rows[r] = __builtin_shufflevector(a, b, (lane & step ? count + lane - step : lane)...);
    rows[r + step] = __builtin_shufflevector(a, b, (lane & step ? count + lane : lane + step)...);
  }
  if constexpr (2 * step < count) exchange<2 * step, C>(rows, lanes);
}

template <class C>
[[gnu::always_inline]] inline void transpose(Vec<C> (&rows)[kLanes<C>]) {
  exchange<1, C>(rows, std::make_integer_sequence<int, kLanes<C>>());
}

// --- sums of as many vectors as each has lanes ---

template <int step, class C, int... lane>
[[gnu::always_inline]] inline Vec<C> fold(Vec<C> (&rows)[kLanes<C>], std::integer_sequence<int, lane...> lanes) {
  constexpr int count = sizeof...(lane);
  for (int r = 0; r < step; ++r) {
    const Vec<C> a = rows[r], b = rows[r + step];
    rows[r] = __builtin_shufflevector(a, b, (lane & step ? count + lane - step : lane)...) +
              __builtin_shufflevector(a, b, (lane & step ? count + lane : lane + step)...);
  }
  if constexpr (step > 1) return fold<step / 2, C>(rows, lanes);
  return rows[0];
}

// The sum of the lanes of rows[i] in lane i; the rows are lost.
template <class C>
[[gnu::always_inline]] inline Vec<C> sums(Vec<C> (&rows)[kLanes<C>]) {
  return fold<kLanes<C> / 2, C>(rows, std::make_integer_sequence<int, kLanes<C>>());
}

}  // namespace pyllm::PYLLM_ISA
