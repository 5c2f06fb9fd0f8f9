// The gradient of attention's mask on tensor cores: a block for each tile of the mask, of 64 keys by the queries of a
// tile of the backward, goes over all sequences, heads, queries and keys that broadcast to it, computes dS' again and
// sums it up in registers. No sum depends on timing, no memory is needed beyond the gradient, and there is as little
// parallelism as the gradient is small.
//
// FLOPs: 4 D for each pair in the tiles visited. Bytes: the gradient once; Q, K, V and dO once for each tile of the
// mask that they belong to, from L2 where they fit.
#pragma once

#include "cuda/attention_gradients.cuh"

namespace pyllm::cuda {

// Stores element `at` of a mask's gradient.
template <class T>
__device__ inline void store_element(const Array& dmask, int64_t at, float sum) {
  if (dmask.dtype == DType::f32) {
    store(dmask.as<float>() + at, sum);
  } else {
    store(dmask.as<T>() + at, from_float<T>(sum));
  }
}

template <class T, int D>
__global__ void __launch_bounds__(BackwardTile::kThreads, D <= 128 ? 3 : 2)
    attention_mask_tile(const __grid_constant__ MaskGradient args) {
  constexpr BackwardTile kTile = backward_tile(D, true);
  constexpr int kQueries = kTile.queries, N = kQueries / 8;
  const Attention& call = args.backward.call;
  const bool has_rows = args.rows != 1, has_columns = args.columns != 1;
  int rest = static_cast<int>(blockIdx.x);
  const auto take = [&](int count) {
    const int taken = rest % count;
    rest /= count;
    return taken;
  };
  const int column = take((args.columns + kKeyTile - 1) / kKeyTile) * kKeyTile;
  const int row = take((args.rows + kQueries - 1) / kQueries) * kQueries;
  const int mask_head = take(args.heads), mask_sequence = rest;
  const auto all = [](int own, int size, int count) { return size == 1 ? Range{0, count} : Range{own, own + 1}; };
  const Range sequences = all(mask_sequence, args.sequences, call.count),
              heads = all(mask_head, args.heads, call.heads);

  const BackwardMemory<T, D, true> memory;
  const Dropout dropout = seeded(call.dropout, call.rng);
  float sums[N][4] = {};
  for (int index = sequences.begin; index < sequences.end; ++index) {
    const Sequence s = sequence_of(call, index);
    const int key_end = has_columns ? min(s.sk, column + kKeyTile) : s.sk;
    const int query_end = has_rows ? min(s.sq, row + kQueries) : s.sq;
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int key = column; key < key_end; key += kKeyTile) {
        const KeyBlock keys{.s = s,
                            .key_head = head / (call.heads / call.kv_heads),
                            .key_tile = key,
                            .of_head = 0,
                            .share = 0,
                            .dropout = dropout,
                            .ignored = ignored_keys(call, s, key)};
        if (keys.ignored == ~uint64_t{0}) continue;
        const Range seeing = queries_seeing(call, s, key, min(key + kKeyTile, s.sk) - 1);
        bool copied = false;
        for (int query = max(row, seeing.begin / kQueries * kQueries); query < min(query_end, seeing.end);
             query += kQueries) {
          sync_block();  // nobody reads the tiles before
          if (!copied) memory.copy_keys(call, s, keys.key_head, key, keys.ignored);
          copied = true;
          memory.copy_queries(args.backward, s, head, query, 0);
          commit_copies();
          wait_copies<0>();
          sync_block();
          ScoreTile<N> tile;
          score_gradients<T, D, true>(args.backward, keys, head, query, 0, memory, tile);
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += tile.gradients[0][n][i];
        }
      }
    }
  }

  const int g = lane_id() / 4, t = lane_id() % 4, warp = warp_id();
  const int64_t first = (int64_t{mask_sequence} * args.heads + mask_head) * args.rows;
  const auto store_at = [&](int query, int key, float sum) {
    if (query < args.rows && key < args.columns)
      store_element<T>(args.dmask, (first + query) * args.columns + key, sum);
  };
  if (!has_rows) {  // over the queries: in a thread, then its neighbours
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) sum += sums[n][2 * half] + sums[n][2 * half + 1];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      sums[0][2 * half] = sum;
      if (has_columns && t == 0) store_at(0, column + kMatrix * warp + 8 * half + g, sum);
    }
    if (has_columns) return;
  }
  if (has_columns) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_at(row + 8 * n + 2 * t + i % 2, column + kMatrix * warp + 8 * (i / 2) + g, sums[n][i]);
    return;
  }
  // Over the keys: in a thread, its warp, the block.
  const Shared<float> of_warps = shared_memory<float>(0, kTile.kWarps * kQueries);
  sync_block();  // nobody reads the tiles any more
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[n][i] + sums[n][2 + i];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) sum += shuffle_xor(sum, offset);
      if (g == 0) of_warps[kQueries * warp + 8 * n + 2 * t + i] = sum;
    }
  sync_block();
  // Where the queries are summed too, the first of them has all.
  const int query = static_cast<int>(threadIdx.x);
  if (query >= (has_rows ? kQueries : 1)) return;
  float sum = 0;
  for (int i = 0; i < kTile.kWarps; ++i) sum += of_warps[kQueries * i + query];
  store_at(row + query, 0, sum);
}

// --- host ---

template <class T, int D>
void attention_mask_gradient(const MaskGradient& args, Stream stream) {
  constexpr BackwardTile kTile = backward_tile(D, true);
  const int64_t tiles = ceil_div(args.rows, kTile.queries) * ceil_div(args.columns, kKeyTile);
  const int64_t blocks = int64_t{args.sequences} * args.heads * tiles;
  if (blocks > 0)
    launch(attention_mask_tile<T, D>, {.grid = blocks, .block = kTile.kThreads, .shared_bytes = kTile.shared_bytes(D)},
           stream, args);
}

}  // namespace pyllm::cuda
