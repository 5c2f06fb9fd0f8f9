// What attention's backward does before and after its tiles, row by row: the statistics of the queries, and sums that
// blocks have left side by side, added up in order. Bound by memory: 4 bytes an element of O and dO, 4 an addend and 2
// a sum.
#pragma once

#include "cuda/attention.h"
#include "cuda/common.cuh"

namespace pyllm::cuda {

inline constexpr int kDeltaLanes = 8, kDeltaThreads = 128;  // a row; a block

template <class T>
__global__ void __launch_bounds__(kDeltaThreads, 1) attention_delta_rows(const __grid_constant__ AttentionDelta args) {
  constexpr int kRows = kDeltaThreads / kDeltaLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  float delta = 0;
  if (row < args.rows) {
    const int64_t head = row / args.sq;
    const auto at = [&](const Heads& rows) {
      return rows.at<const T>(head / args.heads, head % args.heads, row % args.sq);
    };
    const T *out = at(args.out), *dout = at(args.dout);
    for (int column = 8 * lane; column < args.dim; column += 8 * kDeltaLanes) {
      const auto a = load(reinterpret_cast<const Chunk<T, 8>*>(out + column));
      const auto b = load(reinterpret_cast<const Chunk<T, 8>*>(dout + column));
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += to_float(a.at[i]) * to_float(b.at[i]);
    }
  }
#pragma unroll
  for (int offset = kDeltaLanes / 2; offset > 0; offset /= 2) delta += shuffle_xor(delta, offset);
  if (row >= args.rows || lane != 0) return;
  const float lse = load(args.lse + row);
  const bool empty = lse == -kInfinity;
  if (args.dlse != nullptr) delta -= load(args.dlse + row);
  store(args.statistics + row, {.lse = empty ? kInfinity : lse * kLog2E, .delta = empty ? 0 : delta});
}

inline constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads, 1) attention_sum_addends(const __grid_constant__ SumOfAddends args) {
  const int64_t at = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * 8;
  if (at >= args.count) return;
  const int left = static_cast<int>(min(args.count - at, int64_t{8}));
  float sums[8] = {};
  for (int i = 0; i < args.number; ++i) {
    const auto addends = load_chunk<false, 8>(args.addends + i * args.count + at, 0, left);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] += addends.at[j];
  }
  Chunk<T, 8> chunk;
#pragma unroll
  for (int j = 0; j < 8; ++j) chunk.at[j] = from_float<T>(args.scale * sums[j]);
  store_chunk<false>(args.out.as<T>() + at, 0, left, chunk);
}

// --- host ---

template <class T>
void attention_delta(const AttentionDelta& args, Stream stream) {
  if (args.rows > 0)
    launch(attention_delta_rows<T>, {.grid = ceil_div(args.rows, kDeltaThreads / kDeltaLanes), .block = kDeltaThreads},
           stream, args);
}

template <class T>
void attention_sum(const SumOfAddends& args, Stream stream) {
  if (args.count > 0)
    launch(attention_sum_addends<T>, {.grid = ceil_div(args.count, 8 * kSumThreads), .block = kSumThreads}, stream,
           args);
}

}  // namespace pyllm::cuda
