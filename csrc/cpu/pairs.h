// Products of bf16 matrices by the instructions that multiply pairs of neighbours along the depth and add both products
// in fp32: vdpbf16ps, register-blocked as in gemm.h, or AMX's tdpbf16ps on tiles, 2 x 2 of them at a time. Both take A
// in rows, and B as words, a word being a pair; for both, subnormal numbers are 0. Include it only from
// *_pairs_kernel.cpp.
#pragma once

#include "cpu/attention.h"
#include "cpu/gemm.h"

#if defined(__AMX_BF16__)
#include "cpu/amx.h"
#endif

namespace pyllm::PYLLM_ISA {

#if !defined(__AMX_BF16__)
// body(); products by lanes need nothing set up.
template <class Body>
[[gnu::always_inline]] inline void with_tiles(Body&& body) {
  body();
}
#endif

// B has whole panels of rows, and 0 beyond the depth.
template <class N>
constexpr N whole_panels(N n) {
  return (n + kPanel - 1) / kPanel * kPanel;
}

// A, rows of bf16: element (r, k) is data[k / kPanel * panel + r * row + k % kPanel].
struct PairRows {
  const BFloat16* data;
  int64_t row, panel = kPanel;

  const BFloat16* at(int64_t r, int64_t k) const { return data + k / kPanel * panel + r * row + k % kPanel; }
};

// --- conversions ---

inline Vec<uint32_t> load(const uint32_t* p) {
  Vec<uint32_t> words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

inline void store(uint32_t* p, Vec<uint32_t> words) { std::memcpy(p, &words, sizeof(words)); }

// Up to 32 elements, the others 0.
inline Vec<uint32_t> load_words(const BFloat16* p, int64_t count) {
  const auto mask = static_cast<__mmask32>(count >= 32 ? ~0u : (1u << count) - 1);
  return bit_cast<Vec<uint32_t>>(_mm512_maskz_loadu_epi16(mask, p));
}

// Words of 16 of a's 32 elements, from `first` on, in the low halves, and 16 of b's, from `second` on.
template <int first, int second>
Vec<uint32_t> interleaved(Vec<uint32_t> a, Vec<uint32_t> b) {
  using Halves [[gnu::vector_size(64)]] = uint16_t;
  const auto shuffled = [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(bit_cast<Halves>(a), bit_cast<Halves>(b), (i % 2 ? 32 + second : first) + i / 2 ...);
  };
  return bit_cast<Vec<uint32_t>>(shuffled(std::make_integer_sequence<int, 32>()));
}

// a and b rounded, one after the other.
inline Vec<uint32_t> narrow(Vec<float> a, Vec<float> b) {
  return bit_cast<Vec<uint32_t>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a)));
}

// The words of a and b.
inline Vec<uint32_t> narrow_pairs(Vec<float> a, Vec<float> b) {
  const Vec<uint32_t> both = narrow(a, b);
  return interleaved<0, 16>(both, both);
}

// `count` elements of a row that whole vectors can be read from, and something up to a whole panel.
inline void narrow_row(const float* from, int64_t count, BFloat16* to) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += kPanel) {
    const Vec<float> next = i + lanes < count ? load(from + i + lanes) : Vec<float>{};
    store(reinterpret_cast<uint32_t*>(to + i), narrow(load(from + i), next));
  }
}

// The pairs of neighbouring rows of a matrix (rows, columns): (rows / 2, width), and zeros up to a whole panel of rows.
inline void pair_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t columns, int64_t width,
                      uint32_t* to) {
  for (int64_t row = 0; row < whole_panels(rows); row += 2, to += width) {
    for (int64_t column = 0; column < width; column += kPanel) {
      const auto part = [&](int64_t r) {
        return r < rows ? load_words(from + r * stride + column, columns - column) : Vec<uint32_t>{};
      };
      const Vec<uint32_t> a = part(row), b = part(row + 1);
      store(to + column, interleaved<0, 0>(a, b));
      if (column + kPanel / 2 < width) store(to + column + kPanel / 2, interleaved<16, 16>(a, b));
    }
  }
}

// --- products ---

template <int rows, int vectors>
void multiply_pairs_lanes(int64_t depth, PairRows a, const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride,
                          const Update<float>& update) {
  Vec<float> total[rows][vectors] = {};
  const auto step = [&](auto&& word) __attribute__((always_inline)) {
    Vec<uint32_t> column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = load(b + v * kLanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<uint32_t> factor = splat<uint32_t>(word(r));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)  // casts, not bit_cast, whose copies would keep the sums in memory
        total[r][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)total[r][v], (__m512bh)factor, (__m512bh)column[v]);
    }
    b += b_stride;
  };
  for (; depth > 0; depth -= kPanel, a.data += a.panel) {
    const BFloat16* from = a.data;
    const BFloat16* const last = from + (depth < kPanel ? depth : kPanel) - 1;
    for (; from < last; from += 2) {
      step([&](int r) {
        uint32_t word;
        std::memcpy(&word, from + r * a.row, sizeof(word));
        return word;
      });
    }
    if (from == last) step([&](int r) { return from[r * a.row].bits; });
  }
  write_tile<rows, vectors, float>(total, c, c_stride, update);
}

#if defined(__AMX_BF16__)

// 16 rows from `row` on and a panel of A from k on; what lies beyond `rows` and `depth` is not read, and 0.
inline const BFloat16* amx_rows(const PairRows& a, int64_t row, int64_t rows, int64_t k, int64_t depth, uint32_t* edge,
                                int64_t& stride) {
  if (row + 16 <= rows && k + kPanel <= depth) {
    stride = a.row;
    return a.at(row, k);
  }
  const int64_t count = rows - row < 16 ? rows - row : 16;
  for (int64_t r = 0; r < 16; ++r)
    store(edge + r * 16, r < count ? load_words(a.at(row + r, k), depth - k) : Vec<uint32_t>{});
  stride = kPanel;
  return reinterpret_cast<const BFloat16*>(edge);
}

// Tiles 0 to 3: a square of C; 4 and 5: A's; 6 and 7: B's.
template <int high, int wide>
void multiply_pairs_tiles(int64_t row, int64_t rows, int64_t depth, const PairRows& a, const uint32_t* b,
                          int64_t b_stride, float* c, int64_t c_stride, const Update<float>& update) {
  alignas(64) uint32_t edge[16 * kPanel / 2];
  alignas(64) float square[16 * 16];
  tile_zero<0>();
  if constexpr (wide > 1) tile_zero<1>();
  if constexpr (high > 1) tile_zero<2>();
  if constexpr (high > 1 && wide > 1) tile_zero<3>();
  for (int64_t k = 0; k < depth; k += kPanel) {
    int64_t stride;
    const BFloat16* from = amx_rows(a, row, rows, k, depth, edge, stride);
    tile_load<4>(from, stride * sizeof(BFloat16));
    tile_load<6>(b + k / 2 * b_stride, b_stride * sizeof(uint32_t));
    tile_dot<0, 4, 6>();
    if constexpr (wide > 1) {
      tile_load<7>(b + k / 2 * b_stride + 16, b_stride * sizeof(uint32_t));
      tile_dot<1, 4, 7>();
    }
    if constexpr (high > 1) {
      from = amx_rows(a, row + 16, rows, k, depth, edge, stride);
      tile_load<5>(from, stride * sizeof(BFloat16));
      tile_dot<2, 5, 6>();
      if constexpr (wide > 1) tile_dot<3, 5, 7>();
    }
  }
  const auto write = [&]<int index>() {
    const int64_t down = index / 2 * 16, right = index % 2 * 16;
    const int64_t count = rows - row - down < 16 ? rows - row - down : 16;
    tile_store<index>(square, 16 * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      const Vec<float> total[1][1] = {{load(square + r * 16)}};
      write_tile<1, 1, float>(total, c + (row + down + r) * c_stride + right, c_stride, update.of_row(row + down + r));
    }
  };
  write.template operator()<0>();
  if constexpr (wide > 1) write.template operator()<1>();
  if constexpr (high > 1) write.template operator()<2>();
  if constexpr (high > 1 && wide > 1) write.template operator()<3>();
}

#endif

// C (rows, columns) from A (rows, depth) and B (depth, columns), whose words (k / 2, column) hold its elements
// (k, column) and (k + 1, column); columns is a multiple of the lanes.
inline void multiply_pairs(int64_t rows, int64_t columns, int64_t depth, const PairRows& a, const uint32_t* b,
                           int64_t b_stride, float* c, int64_t c_stride, const Update<float>& update) {
#if defined(__AMX_BF16__)
  if (rows >= 16) {  // fewer would leave most of a tile unused
    for (int64_t column = 0; column < columns; column += 32) {
      for (int64_t row = 0; row < rows; row += 32) {
        const auto tiles = [&]<int high, int wide>() {
          multiply_pairs_tiles<high, wide>(row, rows, depth, a, b + column, b_stride, c + column, c_stride, update);
        };
        const bool high = rows - row > 16, wide = columns - column > 16;
        if (high && wide) {
          tiles.template operator()<2, 2>();
        } else if (high) {
          tiles.template operator()<2, 1>();
        } else if (wide) {
          tiles.template operator()<1, 2>();
        } else {
          tiles.template operator()<1, 1>();
        }
      }
    }
    return;
  }
#endif
  for_tiles<float>(rows, columns, [&]<int r, int v>(int64_t row, int64_t column) {
    multiply_pairs_lanes<r, v>(depth, {a.data + row * a.row, a.row, a.panel}, b + column, b_stride,
                               c + row * c_stride + column, c_stride, update.of_row(row));
  });
}

}  // namespace pyllm::PYLLM_ISA
