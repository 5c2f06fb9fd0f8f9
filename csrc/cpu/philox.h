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

// Low and high halves of the products of 32-bit lanes with a constant.
inline void multiply(Words a, uint32_t b, Words& low, Words& high) {
  using Wide = Vec<uint64_t>;
  const Wide even = (bit_cast<Wide>(a) & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
  const Wide odd = (bit_cast<Wide>(a) >> 32) * static_cast<uint64_t>(b);
  low = bit_cast<Words>((even & 0xFFFFFFFFu) | (odd << 32));
  high = bit_cast<Words>((even >> 32) | (odd & 0xFFFFFFFF00000000u));
}

// The ten rounds on four counter words, in place.
inline void philox(const Dropout& dropout, Words (&c)[4]) {
  uint32_t k0 = dropout.seed_low, k1 = dropout.seed_high;
  for (int round = 0; round < 10; ++round) {
    Words low0, high0, low1, high1;
    multiply(c[0], 0xD2511F53u, low0, high0);
    multiply(c[2], 0xCD9E8D57u, low1, high1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
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
