// Attention of a few queries over a cache of keys and values, contiguous or paged. Never run on a GPU.
//
// A block takes the queries that share a key head, up to 8 of them, and a share of the keys of one sequence, so that
// few sequences fill the machine too (flash decoding, Dao et al., 2023). Its warps take turns at tiles of the keys.
// Lanes lie along head_dim, 16 bytes each, and several groups of them along the keys, so that a warp's loads are 512
// bytes in a row; all loads of a tile, of K and of V, are under way before the first is used. Partial products of
// several keys are summed over the lanes of a group while these halve the keys among them: a lane then has the score of
// one key, takes its exponential, and hands it round. Warps, and then shares, are merged by their log-sum-exps, in
// order.
//
// Bytes: the keys and values of each sequence, once for each 8 queries: 2 Hkv D elements a key. FLOPs: 4 H D for each
// key and query, on the FMA units in fp32; by estimate bound by memory up to about 7 queries a key head.
#pragma once

#include "cuda/attention_decode.h"
#include "cuda/common.cuh"
#include "cuda/rotary.cuh"

namespace pyllm::cuda {

// Queries of a tile, in a block's order: of one head after the other.
struct QueryRow {
  int head, row;
};

__device__ inline QueryRow query_row(const AttentionDecode& args, int kv_head, int index) {
  return {kv_head * args.group() + index / args.queries, index % args.queries};
}

template <class T, int E>
__device__ inline void to_floats(const Chunk<T, E>& chunk, float (&out)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) out[e] = to_float(chunk.at[e]);
}

// Sums each value over a group of LANES, which halve the values among them: a lane gets the sum of value lane % N.
template <int LANES, int N>
__device__ inline float sum_dealt_out(float (&values)[N]) {
  const int lane = lane_id();
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = (lane & half) != 0;
      const float kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = kept + shuffle_xor(given, half);
    }
#pragma unroll
  for (int offset = N; offset < LANES; offset *= 2) values[0] += shuffle_xor(values[0], offset);
  return values[0];
}

template <class T, int D, int R>
inline constexpr DecodeTile kDecodeTile = decode_tile(D, sizeof(T), R);

// For two blocks a multiprocessor: left to itself nvcc makes room for a third, and spills.
template <class T, int D, int R>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 2)
    attention_decode_split(const __grid_constant__ AttentionDecode args) {
  constexpr DecodeTile TILE = kDecodeTile<T, D, R>;
  constexpr int E = kElements<T>, L = TILE.lanes, C = TILE.chunks, U = TILE.each, G = TILE.groups;
  static_assert(U <= L && kPageUnit % TILE.keys == 0);
  constexpr int STEP = kDecodeWarps * TILE.keys, THREADS = kDecodeWarps * kWarp;

  const int tile = static_cast<int>(blockIdx.x) % args.plan.tiles,
            team = static_cast<int>(blockIdx.x) / args.plan.tiles;
  const int share = team % args.plan.shares, kv_head = team / args.plan.shares % args.kv_heads;
  const int sequence = team / args.plan.shares / args.kv_heads;
  const int first_row = tile * R, rows = min(R, args.group() * args.queries - first_row);
  const int total = load(args.lengths + sequence) + args.added, shift = total - args.queries;
  const KeyRange keys = share_of_keys(keys_in_window(total, args.queries, args.left), share, args.plan.shares, STEP);
  // Weights of 0 do not keep out NaN: what comes before the first query's window is not read.
  const int seen = args.left < 0 ? 0 : static_cast<int>(max(int64_t{0}, int64_t{shift} - args.left));
  const int warp = static_cast<int>(threadIdx.x) / kWarp, group = lane_id() / L, lane = lane_id() % L;

  Shared<float> sSums = shared_memory<float>(0, kDecodeWarps * R * D);  // [warp][row][D]; before that, sQuery
  Shared<float> sPeaks = shared_memory<float>(kDecodeWarps * R * D * 4, kDecodeWarps * R);
  Shared<float> sTotals = shared_memory<float>(kDecodeWarps * R * (D + 1) * 4, kDecodeWarps * R);
  Shared<int> sPlaces = shared_memory<int>(kDecodeWarps * R * (D + 2) * 4, R);  // of the queries, among the keys
  Shared<int> sHeads = shared_memory<int>((kDecodeWarps * R * (D + 2) + R) * 4, R);
  Shared<float> sSlopes = shared_memory<float>((kDecodeWarps * R * (D + 2) + 2 * R) * 4, R);

  Shared<float> sQuery = shared_memory<float>(0, R * D);
  for (int i = static_cast<int>(threadIdx.x); i < R * D; i += THREADS) {
    const int r = i / D, column = i % D;
    const QueryRow at = query_row(args, kv_head, first_row + r);
    float q = 0;
    if (r < rows && column < args.dim)
      q = turned(args.query.at<const T>(sequence, at.head, at.row), args.rotary, shift + at.row, column);
    sQuery[i] = q;
    if (column == 0) {
      sPlaces[r] = shift + at.row;
      sHeads[r] = r < rows ? at.head : 0;
      sSlopes[r] = args.slopes != nullptr && r < rows
                       ? load(args.slopes + int64_t{sequence} * args.slopes_sequence + at.head)
                       : 0.0f;
    }
  }
  sync_block();
  float query[R][C][E];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int column = (c * L + lane) * E + e;
        query[r][c][e] = 0;
        if (C * L * E == D || column < D) query[r][c][e] = sQuery[r * D + column];
      }
  sync_block();  // sSums may be written

  float sums[R][C][E] = {}, peaks[R], totals[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) peaks[r] = -kInfinity;
  for (int first = keys.begin + warp * TILE.keys; first < keys.end; first += STEP) {
    const CachePlace place = cache_place(args, sequence, first);
    const T* mKeys = args.key_cache.at<const T>(place.page, kv_head, place.row);
    const T* mValues = args.value_cache.at<const T>(place.page, kv_head, place.row);
    Chunk<T, E> rKeys[U][C], rValues[U][C];
    const auto load_rows = [&](const T* rows_of, int64_t stride, Chunk<T, E>(&out)[U][C]) {
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int row = u * G + group, column = (c * L + lane) * E;
          out[u][c] = Chunk<T, E>{};
          if (first + row >= seen && first + row < keys.end && column < args.dim)
            out[u][c] = load<Load::streaming>(reinterpret_cast<const Chunk<T, E>*>(rows_of + row * stride + column));
        }
    };
    load_rows(mKeys, args.key_cache.row, rKeys);
    load_rows(mValues, args.value_cache.row, rValues);

    float partial[R][U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float k[E];
        to_floats(rKeys[u][c], k);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < E; ++e) partial[r][u] += query[r][c][e] * k[e];
      }

    const int key = first + lane % U * G + group;  // whose scores this lane has
    float weights[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float score = args.scale * sum_dealt_out<L>(partial[r]);
      if (args.softcap != 0) score = args.softcap * tanhf(score / args.softcap);
      const int place_of_query = sPlaces[r], distance = key - place_of_query;
      if (args.bias != nullptr) {
        const int reach = args.distances / 2, head = sHeads[r];
        score += load(args.bias + int64_t{head} * args.distances + max(-reach, min(reach, distance)) + reach);
      }
      const float slope = sSlopes[r];
      score -= slope * static_cast<float>(abs(distance));
      if (key >= keys.end || (args.left >= 0 && distance < -args.left) || (args.right >= 0 && distance > args.right))
        score = -kInfinity;

      const float peak = fmaxf(peaks[r], combine<Max, L, kWarp>(combine<Max, 1, U>(score)));
      const float shift_by = finite_peak(peak), shrink = exponential<T>(peaks[r] - shift_by);
      weights[r] = exponential<T>(score - shift_by);
      totals[r] = totals[r] * shrink + weights[r];
      peaks[r] = peak;
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int e = 0; e < E; ++e) sums[r][c][e] *= shrink;
    }

#pragma unroll
    for (int u = 0; u < U; ++u) {
      float weight[R];
#pragma unroll
      for (int r = 0; r < R; ++r) weight[r] = shuffle(weights[r], group * L + u);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float v[E];
        to_floats(rValues[u][c], v);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < E; ++e) sums[r][c][e] += weight[r] * v[e];
      }
    }
  }

  // Of a warp: over its groups of lanes.
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float sum = combine<Sum, L, kWarp>(combine<Sum, 1, U>(totals[r]));
    if (lane_id() == 0) {
      sPeaks[warp * R + r] = peaks[r];
      sTotals[warp * R + r] = sum;
    }
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int column = (c * L + lane) * E + e;
        const float over_keys = combine<Sum, L, kWarp>(sums[r][c][e]);
        if (group == 0 && column < D) sSums[(warp * R + r) * D + column] = over_keys;
      }
  }
  sync_block();

  // Of the block: four columns at a time.
  constexpr int COLUMNS = 4;
  for (int i = static_cast<int>(threadIdx.x); i < rows * (D / COLUMNS); i += THREADS) {
    const int r = i / (D / COLUMNS), column = i % (D / COLUMNS) * COLUMNS;
    if (column >= args.dim) continue;
    float peak = -kInfinity, sum = 0, out[COLUMNS] = {};
    for (int w = 0; w < kDecodeWarps; ++w) peak = fmaxf(peak, sPeaks[w * R + r]);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = exponential<T>(sPeaks[w * R + r] - finite_peak(peak));
      sum += weight * sTotals[w * R + r];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) out[j] += weight * sSums[(w * R + r) * D + column + j];
    }
    const float divisor = sum == 0 ? 1.0f : sum;
    const QueryRow at = query_row(args, kv_head, first_row + r);
    const int64_t row = (int64_t{sequence} * args.heads + at.head) * args.queries + at.row;
    const int64_t all_rows = int64_t{args.batch} * args.heads * args.queries;
    if (args.plan.shares > 1) {
      Chunk<float, COLUMNS> chunk;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) chunk.at[j] = out[j] / divisor;
      store(reinterpret_cast<Chunk<float, COLUMNS>*>(args.partial_out + (share * all_rows + row) * args.dim + column),
            chunk);
    } else {
      Chunk<T, COLUMNS> chunk;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) chunk.at[j] = from_float<T>(out[j] / divisor);
      store(reinterpret_cast<Chunk<T, COLUMNS>*>(args.out.at<T>(sequence, at.head, at.row) + column), chunk);
    }
    float* mLse = args.plan.shares > 1 ? args.partial_lse + share * all_rows : args.lse;
    if (column == 0) store(mLse + row, peak + logf(divisor));
  }
}

// --- host ---

template <class T, int D>
void decode_split(const AttentionDecode& args, Stream stream) {
  const int64_t teams = int64_t{args.batch} * args.kv_heads * args.plan.tiles;
  const auto run = [&]<int R>() {
    launch(attention_decode_split<T, D, R>,
           {.grid = teams * args.plan.shares, .block = kDecodeWarps * kWarp, .shared_bytes = decode_shared_bytes(D, R)},
           stream, args);
  };
  switch (args.plan.rows) {
    case 1: return run.template operator()<1>();
    case 4: return run.template operator()<4>();
    default: return run.template operator()<kMostDecodeRows>();
  }
}

}  // namespace pyllm::cuda
