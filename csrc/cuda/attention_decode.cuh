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

// This warp's row among those of all blocks.
__device__ inline int64_t warp_row() { return int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kWarp; }

template <class T>
__global__ void __launch_bounds__(kSmallBlock) attention_decode_append(const __grid_constant__ AttentionDecode args) {
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
__global__ void __launch_bounds__(kSmallBlock) attention_decode_merge(const __grid_constant__ AttentionDecode args) {
  constexpr int E = kElements<T>, HELD = kMostShares / kWarp;
  const int64_t rows = int64_t{args.batch} * args.heads * args.queries, row = warp_row();
  if (row >= rows) return;
  float weights[HELD], peak = -kInfinity, total = 0;  // of shares lane_id(), lane_id() + 32, ...
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int share = i * kWarp + lane_id();
    weights[i] = share < args.plan.shares ? load(args.partial_lse + share * rows + row) : -kInfinity;
    peak = fmaxf(peak, weights[i]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) peak = fmaxf(peak, shuffle_xor(peak, offset));
#pragma unroll
  for (int i = 0; i < HELD; ++i) total += weights[i] = expf(weights[i] - finite_peak(peak));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) total += shuffle_xor(total, offset);
  const float divisor = total == 0 ? 1.0f : total;

  const int query = static_cast<int>(row % args.queries), head = static_cast<int>(row / args.queries % args.heads);
  T* mOut = args.out.at<T>(row / args.queries / args.heads, head, query);
  for (int first = 0; first < args.dim; first += kWarp * E) {
    const int column = first + lane_id() * E;
    float sums[E] = {};
#pragma unroll
    for (int i = 0; i < HELD; ++i)
      for (int share = i * kWarp; share < min(args.plan.shares, (i + 1) * kWarp); ++share) {
        const float weight = shuffle(weights[i], share % kWarp);
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
