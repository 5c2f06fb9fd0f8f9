// Attention's forward on tensor cores, for GPUs since sm_80 (Dao, 2023): a block holds a tile of queries in shared
// memory and walks over the keys of its head, a warp has 16 or 32 of the queries with their output and softmax in
// registers.
//
// Per tile of keys: S = Q K'; online softmax, p = exp2(S * scale * log2(e) - shift) in one multiply-add and one
// exponential; O = O * rescale + P V with P as the first operand, from registers. Two buffers, one for keys and one for
// values: while a product reads one, copies fill the other. Tiles that the band or the padding empties are not visited;
// only those that the band or the end of the keys cuts are compared.
// The plain kernel knows bands and padding. The full one adds masks, biases, softcap and dropout, whose random numbers
// a thread gets eight at a time, for exactly the columns that it has.
//
// FLOPs: 4 D for each pair of query and key in the tiles visited, and an exponential. Bytes: Q, O and lse once, K and V
// once for each tile of queries of each query head, from L2 where they fit. Shared memory: 64 KiB at head_dim 128, 32
// at 64, 96 at 256. Any head_dim that is a multiple of 8 is padded by copies that fill in zeros.
#pragma once

#include "cuda/attention_scores.cuh"

namespace pyllm::cuda {

// The softmax of a warp's rows so far: a thread has two of each 16, its sums are of its own columns.
template <int M>
struct OnlineSoftmax {
  float peak[M][2], total[M][2];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        peak[m][half] = -kInfinity;
        total[m][half] = 0;
      }
  }

  // Scores become exp2(factor * (score - peak)), and what is summed up so far is rescaled to the new peak.
  template <int N, int NO>
  __device__ void add(float (&scores)[M][N][4], float factor, float (&out)[M][NO][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = peak[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) highest = fmaxf(highest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        const float shift = fmaxf(highest * factor, -kLargest);  // finite: where all is -inf, exponentials are 0
        const float rescale = exp2_approx(peak[m][half] * factor - shift);
        peak[m][half] = highest;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][n][i] = exp2_approx(fmaf(scores[m][n][i], factor, -shift));
            sum += scores[m][n][i];
          }
        total[m][half] = total[m][half] * rescale + sum;
#pragma unroll
        for (int n = 0; n < NO; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] *= rescale;
      }
  }
};

// Scores outside the band, of ignored keys and beyond the last one become -inf, others what they are with all that is
// added. first: the query of the thread's first row.
template <class T, bool FULL, int M, int N>
__device__ inline void finish_scores(const Attention& call, const Sequence& s, int head, int first, int tile,
                                     uint64_t ignored, bool cut, float (&scores)[M][N][4]) {
  const Scoring<T> scoring(call, s, head);
  const int column = 2 * (lane_id() % 4);
  const uint64_t mine = ignored >> column;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + kMatrix * m + 8 * half;
      const Range seen = keys_seen(call, s, query, query);
      const int begin = seen.begin - tile - column, end = query < s.sq ? seen.end - tile - column : 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = 8 * n + i;
          float& score = scores[m][n][2 * half + i];
          if (cut && (key < begin || key >= end || (mine >> key & 1) != 0)) {
            score = -kInfinity;
          } else if constexpr (FULL) {
            float derivative;
            score = scoring(score, query, tile + column + key, derivative);
          }
        }
    }
}

// Weights that dropout takes become 0. first: the query of the thread's first row.
template <int M, int N>
__device__ inline void drop_weights(const Dropout& dropout, uint32_t head, int first, int tile,
                                    float (&weights)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < N / 4; ++group) {
        uint32_t words[4];
        random_words(dropout, head, static_cast<uint32_t>(first + kMatrix * m + 8 * half),
                     static_cast<uint32_t>((tile / 32 + group) * 4 + lane_id() % 4), words);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float* pair = &weights[m][4 * group + w][2 * half];
          if ((words[w] & 0xFFFF) < dropout.threshold) pair[0] = 0;
          if (words[w] >> 16 < dropout.threshold) pair[1] = 0;
        }
      }
}

// What boundary tiles and the end need of a block.
template <class T>
struct alignas(16) ForwardBlock {
  Sequence s;
  int head, first, rows;
  Range whole;  // keys that all of its queries see
  const T *keys, *values;
};

template <class T, int D, bool FULL>
__global__ void __launch_bounds__(forward_tile(D, FULL).threads(), FULL&& D <= 64 ? 2 : 1)
    attention_forward_tile(const __grid_constant__ AttentionForward args) {
  constexpr ForwardTile kTile = forward_tile(D, FULL);
  constexpr int M = kTile.squares, kQueries = kTile.queries, kThreads = kTile.threads();
  const Attention& call = args.call;
  const int head = static_cast<int>(blockIdx.x) / args.slots;
  // Under causality, the rows with most keys first.
  const int in_order = static_cast<int>(blockIdx.x) % args.slots;
  const int slot = call.right < 0 ? in_order : args.slots - 1 - in_order;
  const Slot place = slot_at(slot, call.cu_q, call.count, call.sq, kQueries);
  Sequence s = sequence_of(call, place.sequence);
  if (place.sequence == call.count) s.sk = 0;
  const int first = place.tile * kQueries, rows = min(kQueries, s.sq - first);
  if (rows <= 0) return;
  const int key_head = head / (call.heads / call.kv_heads), last = first + rows - 1;
  const Range seen = keys_seen(call, s, first, last);

  using Block = ForwardBlock<T>;
  static_assert(sizeof(Block) <= kFactBytes);
  const Shared<Block> facts = shared_memory<Block>(kTile.tile_bytes(D), 1);
  const Block all = {.s = s,
                     .head = head,
                     .first = first,
                     .rows = rows,
                     .whole = keys_all_see(call, s, first, last),
                     .keys = call.key.at<const T>(s.batch, key_head, s.key),
                     .values = call.value.at<const T>(s.batch, key_head, s.key)};
  if (threadIdx.x == 0) facts[0] = all;
  const Tile<T, kQueries, D> queries(0);
  const Tile<T, kKeyTile, D> keys(queries.kBytes), values(queries.kBytes + keys.kBytes);
  const auto copy = [&](const Tile<T, kKeyTile, D>& to, const Block& block, const T* from, int64_t stride, int tile,
                        uint64_t left_out) {
    to.template copy_rows<kThreads>(from + tile * stride, stride, block.s.sk - tile, call.dim, left_out);
    commit_copies();
  };
  // The first tile from `tile` on that has a key which is not ignored, and which those are.
  uint64_t ignored = 0;
  const auto seek = [&](const Sequence& s, int tile) {
    for (; tile < seen.end; tile += kKeyTile) {
      ignored = ignored_keys(call, s, tile);
      if (ignored != ~uint64_t{0}) break;
    }
    return tile;
  };

  // A warp whose queries are all beyond the last one takes part in copies and barriers only.
  const int warp_row = warp_id() * kMatrix * M, first_row = warp_row + lane_id() / 4;
  const bool works = warp_row < rows;
  const Dropout dropout = FULL ? seeded(call.dropout, call.rng) : Dropout();
  const float factor = FULL ? 1.0f : call.scale * kLog2E;
  OnlineSoftmax<M> softmax;
  float out[M][D / 8][4];
  clear(out);

  int tile = seek(s, seen.begin / kKeyTile * kKeyTile);
  queries.template copy_rows<kThreads>(call.query.at<const T>(s.batch, head, s.query + first), call.query.row, rows,
                                       call.dim);
  copy(keys, all, all.keys, call.key.row, tile, 0);
  while (tile < seen.end) {
    wait_copies<0>();
    sync_block();  // keys are there, and nobody reads the values before these
    Block block = facts[0];
    // Weights of 0 do not keep out NaN: values that no query of the block sees are not copied.
    copy(values, block, block.values, call.value.row, tile, ignored | outside(seen, tile));
    Operand<M, kKeyTile / kMatrix> weights;
    if (works) {
      float scores[M][kKeyTile / 8][4];
      clear(scores);
      multiply_rows(queries, warp_row, keys, scores);
      const bool cut = ignored != 0 || (FULL && block.rows < kQueries) || !block.whole.has(tile, kKeyTile);
      if (FULL || cut)
        finish_scores<T, FULL>(call, block.s, block.head, block.first + first_row, tile, ignored, cut, scores);
      softmax.add(scores, factor, out);
      if constexpr (FULL) {
        if (dropout)
          drop_weights(dropout, static_cast<uint32_t>(block.s.index * call.heads + block.head), block.first + first_row,
                       tile, scores);
      }
      convert<T>(scores, weights);
    }
    wait_copies<0>();
    sync_block();  // values are there, and nobody reads the keys any more
    block = facts[0];
    const int next = seek(block.s, tile + kKeyTile);
    if (next < seen.end) copy(keys, block, block.keys, call.key.row, next, 0);
    if (works) multiply_weights<T>(weights, values, 0, out);
    tile = next;
  }
  wait_copies<0>();
  sync_block();  // all copies have ended
  if (!works) return;
  const Block block = facts[0];

#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.total[m][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float norm = total == 0 ? 0 : static_cast<float>(dropout.scale) * reciprocal_approx(total);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] = norm == 0 ? 0 : out[m][n][i] * norm;
      const int row = first_row + kMatrix * m + 8 * half;
      if (lane_id() % 4 == 0 && row < block.rows) {
        const float lse = (softmax.peak[m][half] * factor + log2_approx(total)) * (1 / kLog2E);
        store(args.lse + row_index(call, block.s, block.head, block.first + row), total == 0 ? -kInfinity : lse);
      }
    }
  }
  Operand<M, D / kMatrix> converted;
  convert<T>(out, converted);
#pragma unroll
  for (int m = 0; m < M; ++m) queries.put(warp_row + kMatrix * m, converted[m]);  // its own, which nobody else reads
  sync_warp();
  queries.template store_rows<kMatrix * M>(warp_row,
                                           args.out.at<T>(block.s.batch, block.head, block.s.query + block.first),
                                           args.out.row, block.rows, call.dim);
}

// --- host ---

template <class T, int D, bool FULL>
void attention_forward(AttentionForward args, Stream stream) {
  constexpr ForwardTile kTile = forward_tile(D, FULL);
  const Attention& call = args.call;
  const int64_t slots = slots_of(call.sequences(), call.sq, kTile.queries, call.cu_q != nullptr);
  args.slots = static_cast<int>(slots);
  if (slots * call.heads > 0)
    launch(attention_forward_tile<T, D, FULL>,
           {.grid = slots * call.heads, .block = kTile.threads(), .shared_bytes = kTile.shared_bytes(D)}, stream, args);
}

}  // namespace pyllm::cuda
