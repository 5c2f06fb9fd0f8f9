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

// The ten rounds on four counter words, in place. Even and odd lanes go apart, each in the low half of a 64-bit lane,
// since that is what a multiplication reads; the high halves hold whatever is left there.
inline void philox(const Dropout& dropout, Words (&c)[4]) {
  using Wide = Vec<uint64_t>;
  Wide halves[2][4];
  for (int w = 0; w < 4; ++w) {
    halves[0][w] = bit_cast<Wide>(c[w]);
    halves[1][w] = halves[0][w] >> 32;
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
  for (int w = 0; w < 4; ++w) c[w] = bit_cast<Words>((halves[0][w] & 0xFFFFFFFFu) | (halves[1][w] << 32));
}

inline Words counting_from(uint32_t start) {
  Words words;
  for (int lane = 0; lane < kLanes<uint32_t>; ++lane) words[lane] = start + lane;
  return words;
}

// One call for each lane, the lanes being consecutive rows: word w holds columns 32g + 8w + 2t (low half) and the next.
inline void random_words(const Dropout& dropout, uint32_t head, uint32_t row, int64_t g, int t, Words (&words)[4]) {
  words[0] = Words{} + static_cast<uint32_t>(4 * g + t);
  words[1] = counting_from(row);
  words[2] = Words{} + head;
  words[3] = Words{} + dropout.offset;
  philox(dropout, words);
}

// The random numbers of kPhiloxColumns columns of a row, from `column` on, which is a multiple of kPhiloxGroup.
inline void random_bits(const Dropout& dropout, uint32_t head, uint32_t row, int64_t column, uint16_t* out) {
  Words words[4] = {counting_from(static_cast<uint32_t>(column / 8)), Words{} + row, Words{} + head,
                    Words{} + dropout.offset};
  philox(dropout, words);
  // A group of columns is four lanes: 16 bytes of each word lie side by side.
  for (int group = 0; group < kPhiloxColumns / kPhiloxGroup; ++group)
    for (int word = 0; word < 4; ++word)
      std::memcpy(out + kPhiloxGroup * group + 8 * word, reinterpret_cast<const char*>(&words[word]) + 16 * group, 16);
}

// What `kLanes<C>` elements are multiplied by: dropout.scale where the random number is kept, else 0.
template <class C>
inline Vec<C> keep_factor(const Dropout& dropout, const uint16_t* random) {
  Vec<C> factor;
  if constexpr (sizeof(C) == 4) {
    Half16 bits;
    std::memcpy(&bits, random, sizeof(bits));
    const float scale = static_cast<float>(dropout.scale);
#if defined(__AVX512F__)  // the threshold is at least 1 here, and up to 65536
    const auto least = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold - 1));
    const auto kept = _mm256_cmpgt_epu16_mask(bit_cast<__m256i>(bits), least);
    factor = bit_cast<Vec<float>>(_mm512_maskz_mov_ps(kept, _mm512_set1_ps(scale)));
#else
    factor = __builtin_convertvector(bits, Words) >= dropout.threshold ? splat(scale) : Vec<float>{};
#endif
  } else {
    for (int i = 0; i < kLanes<C>; ++i) factor[i] = random[i] >= dropout.threshold ? dropout.scale : 0.0;
  }
  return factor;
}

}  // namespace pyllm::PYLLM_ISA
