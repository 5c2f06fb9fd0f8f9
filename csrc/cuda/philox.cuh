// Dropout's random bits on the device: Philox-4x32-10, the same function of (seed, offset, head, row, column) as in
// every backend. One call makes eight 16-bit numbers; call t of column group g serves columns 32g + 8w + 2t + b (word
// w, half b). A thread uses one word of a call, that of its two columns: 40 integer instructions for them, beside 16 or
// more bytes of memory traffic.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "dropout.h"

namespace pyllm::cuda {

// Call `call` of a row: word w has the numbers of columns 32 (call / 4) + 8 w + 2 (call % 4), low half, and the next.
__device__ inline void random_words(const Dropout& dropout, uint32_t head, uint32_t row, uint32_t call,
                                    uint32_t (&words)[4]) {
  uint32_t c0 = call, c1 = row, c2 = head, c3 = dropout.offset;
  uint32_t k0 = dropout.seed_low, k1 = dropout.seed_high;
#pragma unroll 1  // unrolled, the keys of all rounds would wait in registers
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The word that holds the random numbers of an even column (low half) and the next.
__device__ inline uint32_t random_word(const Dropout& dropout, uint32_t head, uint32_t row, uint32_t column) {
  uint32_t words[4];
  random_words(dropout, head, row, column / 32 * 4 + column % 8 / 2, words);
  const uint32_t word = column % 32 / 8;
  return word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
}

// Bit e says whether dropout keeps column + e. A negative column stands for none; its bits mean nothing.
template <int E>
__device__ inline uint32_t keep_bits(const Dropout& dropout, uint32_t head, uint32_t row, int column) {
  uint32_t bits = 0;
  const int odd = column & 1;
  for (int pair = 0; pair < E / 2 + odd; ++pair) {
    const uint32_t word = random_word(dropout, head, row, static_cast<uint32_t>(column - odd + 2 * pair));
    const uint32_t kept = (word & 0xFFFF) >= dropout.threshold ? 1 : 0;
    const uint32_t next = (word >> 16) >= dropout.threshold ? 2 : 0;
    bits |= odd != 0 && pair == 0 ? next >> 1 : (kept | next) << (2 * pair - odd);
  }
  return bits & ((1u << E) - 1);
}

// Dropout with the seed and the offset that lie at `rng` on the device.
__device__ inline Dropout seeded(Dropout dropout, const int64_t* rng) {
  if (dropout) {
    const int64_t seed = load(rng);
    dropout.seed_low = static_cast<uint32_t>(seed);
    dropout.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    dropout.offset = static_cast<uint32_t>(load(rng + 1));
  }
  return dropout;
}

}  // namespace pyllm::cuda
