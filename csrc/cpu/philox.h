// Dropout's random bits: Philox-4x32-10, the same function of (seed, offset, head, row, column) as in every backend.
// One call makes eight 16-bit numbers; call t of column group g serves columns 32g + 8w + 2t + b (word w, half b).
#pragma once

#include "cpu/dropout.h"
#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

using Words = Vec<uint32_t>;

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

// The random numbers of kPhiloxColumns columns of a row, from `column` on, which is a multiple of 32.
inline void random_bits(const Dropout& dropout, uint32_t head, uint32_t row, int64_t column, uint16_t* out) {
  Words c0, c1 = Words{} + row, c2 = Words{} + head, c3 = Words{} + dropout.offset;
  for (int lane = 0; lane < kLanes<uint32_t>; ++lane) c0[lane] = static_cast<uint32_t>(column / 8) + lane;
  uint32_t k0 = dropout.seed_low, k1 = dropout.seed_high;
  for (int round = 0; round < 10; ++round) {
    Words low0, high0, low1, high1;
    multiply(c0, 0xD2511F53u, low0, high0);
    multiply(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Words words[4] = {c0, c1, c2, c3};
  // A group of 32 columns is four lanes: 16 bytes of each word lie side by side.
  for (int group = 0; group < kPhiloxColumns / 32; ++group)
    for (int word = 0; word < 4; ++word)
      std::memcpy(out + 32 * group + 8 * word, reinterpret_cast<const char*>(&words[word]) + 16 * group, 16);
}

// What `kLanes<C>` elements are multiplied by: dropout.scale where the random number is kept, else 0.
template <class C>
inline Vec<C> keep_factor(const Dropout& dropout, const uint16_t* random) {
  Vec<C> factor;
  if constexpr (sizeof(C) == 4) {
    Half16 bits;
    std::memcpy(&bits, random, sizeof(bits));
    const Words r = __builtin_convertvector(bits, Words);
    factor = r >= dropout.threshold ? Vec<float>{} + static_cast<float>(dropout.scale) : Vec<float>{};
  } else {
    for (int i = 0; i < kLanes<C>; ++i) factor[i] = random[i] >= dropout.threshold ? dropout.scale : 0.0;
  }
  return factor;
}

}  // namespace pyllm::PYLLM_ISA
