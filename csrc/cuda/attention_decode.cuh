// What decoding does before and after attention over the shares of the keys: new keys, turned by rotary, and values are
// written to the cache, and the shares are merged by their log-sum-exps. Never run on a GPU.
//
// Bytes: 4 Hkv D elements for each new key; 4 B for each element of the output and share. A warp takes a row.
#pragma once

#include "cuda/attention_decode.h"
#include "cuda/common.cuh"
#include "cuda/head_dim.h"
#include "cuda/rotary.cuh"

namespace pyllm::cuda {

inline constexpr int kRowsOfBlock = kSmallBlock / kWarp;
inline constexpr int kRowBlocks = 4;  // that a processor is to hold, so that threads keep to 128 registers

// This warp's row among those of all blocks.
__device__ inline int64_t warp_row() { return int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kWarp; }

template <class T>
__global__ void __launch_bounds__(kSmallBlock, kRowBlocks)
    attention_decode_append(const __grid_constant__ AttentionDecode args) {
  const int64_t index = warp_row();
  if (index >= int64_t{args.batch} * args.kv_heads * args.added) return;
  const int added = static_cast<int>(index % args.added);
  const int kv_head = static_cast<int>(index / args.added % args.kv_heads);
  const int sequence = static_cast<int>(index / args.added / args.kv_heads);
  const int position = load(args.lengths + sequence) + added;
  const CachePlace place = cache_place(args, sequence, position);
  T* mKey = args.key_cache.at<T>(place.page, kv_head, place.row);
  T* mValue = args.value_cache.at<T>(place.page, kv_head, place.row);
  for (int column = lane_id(); column < args.dim; column += kWarp) {
    const T* row = args.key.at<const T>(sequence, kv_head, added);
    store(mKey + column, from_float<T>(turned(row, args.rotary, position, column)));
    store(mValue + column, load(args.value.at<const T>(sequence, kv_head, added) + column));
  }
}

template <class T>
__global__ void __launch_bounds__(kSmallBlock, kRowBlocks)
    attention_decode_merge(const __grid_constant__ AttentionDecode args) {
  constexpr int E = kElements<T>;
  const int64_t rows = int64_t{args.batch} * args.heads * args.queries, row = warp_row();
  if (row >= rows) return;
  const auto lse = [&](int share) { return load(args.partial_lse + share * rows + row); };
  float peak = -kInfinity, total = 0;
  for (int share = lane_id(); share < args.plan.shares; share += kWarp) peak = fmaxf(peak, lse(share));
  peak = combine<Max, 1, kWarp>(peak);
  const float shift = finite_peak(peak);
  for (int share = lane_id(); share < args.plan.shares; share += kWarp) total += expf(lse(share) - shift);
  total = combine<Sum, 1, kWarp>(total);
  const float divisor = total == 0 ? 1.0f : total;

  const int query = static_cast<int>(row % args.queries), head = static_cast<int>(row / args.queries % args.heads);
  T* mOut = args.out.at<T>(row / args.queries / args.heads, head, query);
  for (int column = lane_id() * E; column < args.dim; column += kWarp * E) {
    float sums[E] = {};
#pragma unroll 4
    for (int share = 0; share < args.plan.shares; ++share) {
      const float weight = expf(lse(share) - shift);
      const auto part = load_chunk<true, E>(args.partial_out + (share * rows + row) * args.dim, column, args.dim);
#pragma unroll
      for (int e = 0; e < E; ++e) sums[e] += weight * part.at[e];
    }
    Chunk<T, E> out;
#pragma unroll
    for (int e = 0; e < E; ++e) out.at[e] = from_float<T>(sums[e] / divisor);
    store_chunk<true>(mOut, column, args.dim, out);
  }
  if (lane_id() == 0) store(args.lse + row, peak + logf(divisor));
}

// --- host ---

// Appends, attends, merges. partial_out and partial_lse are there if the plan has several shares.
inline void attention_decode(const AttentionDecode& args, Stream stream) {
  visit_row_dtype(args.query.data.dtype, [&](auto type) {
    using T = decltype(type);
    const auto on_rows = [&](void (*kernel)(AttentionDecode), int64_t rows) {
      launch(kernel, {.grid = ceil_div(rows, kRowsOfBlock), .block = kSmallBlock}, stream, args);
    };
    if (args.added > 0) on_rows(attention_decode_append<T>, int64_t{args.batch} * args.kv_heads * args.added);
    visit_head_dim(args.dim, [&]<int D>() { decode_split<T, D>(args, stream); });
    if (args.plan.shares > 1) on_rows(attention_decode_merge<T>, int64_t{args.batch} * args.heads * args.queries);
  });
}

}  // namespace pyllm::cuda
