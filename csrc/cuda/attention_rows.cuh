// What attention's backward does before and after its tiles, row by row: the statistics of the queries, and sums that
// blocks have left side by side, added up in order. Bound by memory: 4 bytes an element of O and dO, 4 an addend and 2
// a sum. Where a mask adds a large number to all keys of a row, its scores are made again, by plain products.
#pragma once

#include "cuda/attention_scores.cuh"
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

inline constexpr int kFarRowsThreads = 128;

// A warp for each row, which nearly always ends at once.
template <class T>
__global__ void __launch_bounds__(kFarRowsThreads, 1)
    attention_divide_far_rows(const __grid_constant__ AttentionFarRows args) {
  const Attention& call = args.call;
  const int64_t row = int64_t{blockIdx.x} * (kFarRowsThreads / kWarp) + warp_id();
  if (row >= args.rows) return;
  const float size = fabsf(load(args.lse + row));
  if (!(size > kFarFromZero && size < kInfinity)) return;
  const int head = static_cast<int>(row / call.sq % call.heads);
  const Sequence s = sequence_at(call, static_cast<int>(row / call.sq / call.heads), static_cast<int>(row % call.sq));
  const int query = static_cast<int>(row % call.sq) - s.query;
  const int key_head = head / (call.heads / call.kv_heads);
  const Range seen = keys_seen(call, s, query, query);
  const Scoring<T> scoring(call, s, head);
  const T* of_query = call.query.at<const T>(s.batch, head, s.query + query);
  float peak = -kInfinity, total = 0;
  for (int key = seen.begin + lane_id(); key < seen.end; key += kWarp) {
    if (call.padding != nullptr && load(call.padding + int64_t{s.batch} * call.sk + s.key + key)) continue;
    const T* of_key = call.key.at<const T>(s.batch, key_head, s.key + key);
    float product = 0, derivative;
    for (int column = 0; column < call.dim; column += 8) {
      const auto a = load(reinterpret_cast<const Chunk<T, 8>*>(of_query + column));
      const auto b = load(reinterpret_cast<const Chunk<T, 8>*>(of_key + column));
#pragma unroll
      for (int i = 0; i < 8; ++i) product += to_float(a.at[i]) * to_float(b.at[i]);
    }
    const float score = scoring(product, query, key, derivative);
    const float highest = fmaxf(peak, score), shift = finite_peak(highest);
    total = total * exp2_approx(peak - shift) + exp2_approx(score - shift);
    peak = highest;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other_peak = shuffle_xor(peak, offset), other_total = shuffle_xor(total, offset);
    const float highest = fmaxf(peak, other_peak), shift = finite_peak(highest);
    total = total * exp2_approx(peak - shift) + other_total * exp2_approx(other_peak - shift);
    peak = highest;
  }
  const float share = 1 / total;
  T* of_dout = args.dout.at<T>(s.batch, head, s.query + query);
  for (int column = 8 * lane_id(); column < call.dim; column += 8 * kWarp) {
    auto* at = reinterpret_cast<Chunk<T, 8>*>(of_dout + column);
    auto chunk = load<Load::coherent>(at);
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk.at[i] = from_float<T>(to_float(chunk.at[i]) * share);
    store(at, chunk);
  }
  if (lane_id() != 0) return;
  const float delta = load<Load::coherent>(&args.statistics[row].delta);
  store(args.statistics + row, {.lse = peak, .delta = delta * share});
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
void attention_far_rows(const AttentionFarRows& args, Stream stream) {
  if (args.rows > 0)
    launch(attention_divide_far_rows<T>,
           {.grid = ceil_div(args.rows, kFarRowsThreads / kWarp), .block = kFarRowsThreads}, stream, args);
}

template <class T>
void attention_sum(const SumOfAddends& args, Stream stream) {
  if (args.count > 0)
    launch(attention_sum_addends<T>, {.grid = ceil_div(args.count, 8 * kSumThreads), .block = kSumThreads}, stream,
           args);
}

}  // namespace pyllm::cuda
