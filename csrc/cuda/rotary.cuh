// Rotary position embedding and the places of keys in a cache, for the kernels of decoding.
#pragma once

#include "cuda/attention_decode.h"
#include "cuda/common.cuh"

namespace pyllm::cuda {

// A column of a row turned by its position, rounded to T.
template <class T>
__device__ inline float turned(const T* row, const Rotary& rotary, int position, int column) {
  const float x = to_float(load(row + column));
  if (column >= 2 * rotary.pairs) return x;
  const bool second = rotary.interleaved ? column % 2 == 1 : column >= rotary.pairs;
  const int pair = rotary.interleaved ? column / 2 : second ? column - rotary.pairs : column;
  const int other = rotary.interleaved ? column ^ 1 : second ? pair : column + rotary.pairs;
  const int64_t angle = int64_t{max(position, 0)} * rotary.pairs + pair;
  const float sine = load(rotary.sin + angle), y = to_float(load(row + other));
  return to_float(from_float<T>(x * load(rotary.cos + angle) + y * (second ? sine : -sine)));
}

struct CachePlace {
  int64_t page;
  int row;
};

// Where a cache has a key of a sequence.
__device__ inline CachePlace cache_place(const AttentionDecode& args, int sequence, int key) {
  if (args.block_table == nullptr) return {sequence, key};
  return {load(args.block_table + int64_t{sequence} * args.table_row + key / args.page_size), key % args.page_size};
}

}  // namespace pyllm::cuda
