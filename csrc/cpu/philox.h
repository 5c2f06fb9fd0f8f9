// Dropout's random bits: Philox-4x32-10, the same function of (seed, offset, head, row, column) as in every backend.
// One call makes eight 16-bit numbers; call t of column group g serves columns 32g + 8w + 2t + b (word w, half b).
#pragma once

#include "cpu/vec.h"
#include "dropout.h"

namespace pyllm::PYLLM_ISA {

using Words = Vec<uint32_t>;

// Columns that share a group of four calls.
inline constexpr int kPhiloxGroup = 32;

// Columns whose bits one Philox call per lane makes: eight for each 32-bit lane.
inline constexpr int kPhiloxColumns = 8 * kLanes<uint32_t>;

// Calls per lane made at a time: the rounds of one wait for each other, and 32 registers hold two.
#if defined(__AVX512F__)
inline constexpr int kPhiloxCalls = 2;
#else
inline constexpr int kPhiloxCalls = 1;
#endif

// The products of the low halves of 64-bit lanes with a constant.
inline Vec<uint64_t> product(Vec<uint64_t> a, uint32_t b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<uint64_t>>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<uint64_t>>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__x86_64__)
  return bit_cast<Vec<uint64_t>>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
}

// The ten rounds on the four counter words of some calls, in place. Even and odd lanes go apart, each in the low half
// of a 64-bit lane, since that is what a multiplication reads; the high halves hold whatever is left there.
template <int calls>
inline void philox(const Dropout& dropout, Words (&c)[calls][4]) {
  using Wide = Vec<uint64_t>;
  Wide halves[2 * calls][4];
  for (int call = 0; call < calls; ++call) {
    for (int w = 0; w < 4; ++w) {
      halves[2 * call][w] = bit_cast<Wide>(c[call][w]);
      halves[2 * call + 1][w] = halves[2 * call][w] >> 32;
    }
  }
  uint32_t k0 = dropout.seed_low, k1 = dropout.seed_high;
  for (int round = 0; round < 10; ++round) {
    for (Wide(&h)[4] : halves) {
      const Wide product0 = product(h[0], 0xD2511F53u), product1 = product(h[2], 0xCD9E8D57u);
      h[0] = (product1 >> 32) ^ h[1] ^ k0;
      h[1] = product1;
      h[2] = (product0 >> 32) ^ h[3] ^ k1;
      h[3] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int call = 0; call < calls; ++call)
    for (int w = 0; w < 4; ++w)
      c[call][w] = bit_cast<Words>((halves[2 * call][w] & 0xFFFFFFFFu) | (halves[2 * call + 1][w] << 32));
}

inline Words counting_from(uint32_t start) {
  Words words;
  for (int lane = 0; lane < kLanes<uint32_t>; ++lane) words[lane] = start + lane;
  return words;
}

// Calls t and those that follow, for each lane, the lanes being consecutive rows: word w of call t holds columns
// 32g + 8w + 2t (low half) and the next.
inline void random_words(const Dropout& dropout, uint32_t head, uint32_t row, int64_t g, int t,
                         Words (&words)[kPhiloxCalls][4]) {
  for (int call = 0; call < kPhiloxCalls; ++call) {
    words[call][0] = Words{} + static_cast<uint32_t>(4 * g + t + call);
    words[call][1] = counting_from(row);
    words[call][2] = Words{} + head;
    words[call][3] = Words{} + dropout.offset;
  }
  philox(dropout, words);
}

// What dropout keeps of a row, in order of its columns: with AVX-512 a bit for each, elsewhere the random number of
// each.
using Kept = uint16_t;
#if defined(__AVX512F__)
inline constexpr int kKeptColumns = 16;
#else
inline constexpr int kKeptColumns = 1;
#endif

// The numbers of kPhiloxColumns columns, a call's words, as `Kept`.
inline void store_kept(const Dropout& dropout, const Words (&words)[4], Kept* out) {
  // A group of columns is four lanes: 16 bytes of each word lie side by side.
#if defined(__AVX512F__)
  __m512i groups[4], halves[4];
  for (int w = 0; w < 4; ++w) groups[w] = bit_cast<__m512i>(words[w]);
  for (int w = 0; w < 4; w += 2) {
    halves[w] = _mm512_shuffle_i32x4(groups[w], groups[w + 1], 0x88);  // groups 0 and 2 of both words
    halves[w + 1] = _mm512_shuffle_i32x4(groups[w], groups[w + 1], 0xDD);
  }
  for (int odd = 0; odd < 2; ++odd) {
    groups[odd] = _mm512_shuffle_i32x4(halves[odd], halves[2 + odd], 0x88);
    groups[2 + odd] = _mm512_shuffle_i32x4(halves[odd], halves[2 + odd], 0xDD);
  }
  const __m512i greatest = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold - 1));  // that is dropped
  for (int group = 0; group < 4; ++group) {
    const uint32_t kept = _mm512_cmpgt_epu16_mask(groups[group], greatest);
    std::memcpy(out + 2 * group, &kept, sizeof(kept));
  }
#else
  for (int group = 0; group < kPhiloxColumns / kPhiloxGroup; ++group)
    for (int word = 0; word < 4; ++word)
      std::memcpy(out + kPhiloxGroup * group + 8 * word, reinterpret_cast<const char*>(&words[word]) + 16 * group, 16);
#endif
}

// What is kept of the columns that some calls per lane serve, from `column` on, which is a multiple of kPhiloxGroup.
template <int calls>
inline void draw_columns(const Dropout& dropout, uint32_t row, int64_t column, Kept* out) {
  Words words[calls][4];
  for (int call = 0; call < calls; ++call) {
    words[call][0] = counting_from(static_cast<uint32_t>((column + call * kPhiloxColumns) / 8));
    words[call][1] = Words{} + row;
    words[call][2] = Words{};  // rows that no heads share
    words[call][3] = Words{} + dropout.offset;
  }
  philox(dropout, words);
  for (int call = 0; call < calls; ++call)
    store_kept(dropout, words[call], out + call * (kPhiloxColumns / kKeptColumns));
}

// Columns that are drawn at a time.
inline constexpr int64_t kDrawnColumns = kPhiloxCalls * kPhiloxColumns;

// What is kept of the next `columns` columns of a row, or of kDrawnColumns if there are more.
inline void draw(const Dropout& dropout, int64_t row, int64_t column, int64_t columns, Kept* out) {
  if (columns > (kPhiloxCalls - 1) * kPhiloxColumns) {
    draw_columns<kPhiloxCalls>(dropout, static_cast<uint32_t>(row), column, out);
  } else {
    draw_columns<1>(dropout, static_cast<uint32_t>(row), column, out);
  }
}

// What the vector at `column` of a row is multiplied by: dropout.scale where it is kept, else 0.
template <class C>
inline Vec<C> keep_factor(const Dropout& dropout, const Kept* row, int64_t column) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    const auto scale = _mm512_set1_ps(static_cast<float>(dropout.scale));
    return bit_cast<Vec<C>>(_mm512_maskz_mov_ps(row[column / kKeptColumns], scale));
  } else {
    const auto kept = static_cast<__mmask8>(row[column / kKeptColumns] >> column % kKeptColumns);
    return bit_cast<Vec<C>>(_mm512_maskz_mov_pd(kept, _mm512_set1_pd(dropout.scale)));
  }
#else
  Vec<C> factor;
  if constexpr (sizeof(C) == 4) {
    Half16 bits;
    std::memcpy(&bits, row + column, sizeof(bits));
    factor = __builtin_convertvector(bits, Words) >= dropout.threshold ? splat(static_cast<float>(dropout.scale))
                                                                       : Vec<float>{};
  } else {
    for (int i = 0; i < kLanes<C>; ++i) factor[i] = row[column + i] >= dropout.threshold ? dropout.scale : 0.0;
  }
  return factor;
#endif
}

}  // namespace pyllm::PYLLM_ISA
