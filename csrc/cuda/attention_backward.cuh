// Attention's backward on tensor cores, for GPUs since sm_80 (Dao, 2023): a block holds a tile of 64 keys and values in
// shared memory and walks over the queries of all heads of its group; a warp has 16 of the keys with dK and dV in
// registers.
//
// Scores are transposed, a row a key, so that both P' and dS' are first operands straight from registers. Per tile of
// queries: S' = K Q', dP' = V dO', P' = exp2(S' * scale * log2(e) - lse), dS' = P' (dP' - delta), dV += P' dO,
// dK += dS' Q; then dS' goes through shared memory, and dQ = dS K is added to fp32 sums in global memory. Tiles of
// queries are copied ahead into a second buffer where there is room for one. delta = rowsum(dO O) - dlse comes from a
// kernel of its own, and one converts dQ at the end. dQ is summed by atomics, in any order. Where determinism is asked
// for, few blocks walk over all keys of a head, each with sums of its own, which are added up in order: as many times
// the memory of dQ, and less parallelism. Where head_dim is above 128, registers hold half of dK and dV: two blocks a
// tile, both with all of S' and dP'. The gradient of the bias by distance is the sum of dS along diagonals, kept for
// each block and summed in order. The gradient of a mask has a kernel of its own, in which each tile of the mask sums
// up, in order, what broadcasts to it.
//
// FLOPs: 10 D for each pair in the tiles visited, above head_dim 128 14 D, and 4 D more for the gradient of a mask.
// Bytes: K, V, dK, dV once, Q and dO once for each tile of keys, from L2 where they fit, and 4 D of atomics for each
// query there. Shared memory: 56 KiB at head_dim 64, 68 at 128, 98 at 256.
#pragma once

#include "cuda/attention_gradients.cuh"

namespace pyllm::cuda {

// Adds the sums of a tile's dS' along its diagonals to a head's sums by distance. Distances from which on all biases
// are the same stay with the thread, until flush().
template <class T, int D>
class DiagonalSums {
  static constexpr int kQueries = backward_tile(D, true).queries;
  static_assert(kKeyTile + kQueries - 1 <= BackwardTile::kThreads);  // a diagonal for each

 public:
  __device__ explicit DiagonalSums(int distances) : reach_(distances / 2) {}

  __device__ void add(const Tile<T, kKeyTile, kQueries>& scores, int nearest, float* sums) {
    const int diagonal = static_cast<int>(threadIdx.x) - (kQueries - 1);
    if (diagonal >= kKeyTile) return;
    float sum = 0;
    for (int query = max(0, -diagonal); query < min(kQueries, kKeyTile - diagonal); ++query)
      sum += to_float(scores.at(query + diagonal, query));
    const int distance = nearest + diagonal;
    if (distance <= -reach_) {
      below_ += sum;
    } else if (distance >= reach_) {
      above_ += sum;
    } else {
      float* to = sums + distance + reach_;
      store(to, load<Load::coherent>(to) + sum);
    }
  }

  // spare: shared memory for two numbers of each warp that nobody uses.
  __device__ void flush(Shared<float> spare, float* sums) {
    const int warp = warp_id();
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      below_ += shuffle_xor(below_, offset);
      above_ += shuffle_xor(above_, offset);
    }
    sync_block();
    if (lane_id() == 0) {
      spare[2 * warp] = below_;
      spare[2 * warp + 1] = above_;
    }
    sync_block();
    if (threadIdx.x < 2) {
      float* to = sums + threadIdx.x * 2 * reach_;
      float sum = load<Load::coherent>(to);
      for (int i = 0; i < BackwardTile::kWarps; ++i) sum += spare[2 * i + threadIdx.x];
      store(to, sum);
    }
    sync_block();
    below_ = above_ = 0;
  }

 private:
  int reach_;
  float below_ = 0, above_ = 0;
};

// Adds dQ = dS K to the sums in global memory: the part's columns of the tile's queries.
template <class T, int D, bool FULL>
__device__ inline void add_query_gradient(const AttentionBackward& args, const KeyBlock& keys, int head, int query_tile,
                                          int part, const BackwardMemory<T, D, FULL>& memory) {
  const Sequence& s = keys.s;
  constexpr BackwardTile kTile = backward_tile(D, FULL);
  // The warps share the queries, and where those are too few their columns.
  constexpr int kAcross = kTile.queries / kMatrix, kAlong = kTile.kWarps / kAcross;
  constexpr int N = D / kTile.parts / kAlong / 8;
  const int warp = warp_id(), row = warp % kAcross * kMatrix;
  const int column = part * (D / kTile.parts) + warp / kAcross * 8 * N;
  float sums[1][N][4];
  clear(sums);
  multiply_columns(memory.scores, row, memory.keys, opaque(column), sums);
  const Attention& call = args.call;
  const int64_t pitch = int64_t{call.heads} * call.dim;
  const int query = query_tile + row + lane_id() / 4, columns = call.dim - column;
  float* to = args.dquery + keys.share * args.dquery_share + (int64_t{s.batch} * call.sq + s.query + query) * pitch +
              int64_t{head} * call.dim + column + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half, to += 8 * pitch) {
    if (query + 8 * half >= s.sq) break;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (8 * n >= columns) break;
      atomic_add_pair(to + 8 * n, sums[0][n][2 * half], sums[0][n][2 * half + 1]);
    }
  }
}

template <class T, int D, bool FULL>
__global__ void __launch_bounds__(BackwardTile::kThreads, 1)
    attention_backward_tile(const __grid_constant__ AttentionBackward args) {
  constexpr BackwardTile kTile = backward_tile(D, FULL);
  constexpr int kQueries = kTile.queries, kBuffers = kTile.buffers, kColumns = D / kTile.parts;
  const Attention& call = args.call;
  // Of a tile of keys, its parts are neighbours.
  const int part = static_cast<int>(blockIdx.x) % kTile.parts, block = static_cast<int>(blockIdx.x) / kTile.parts;
  const int in_head = args.plan.lines * args.plan.blocks, of_head = block % in_head;
  const int line = of_head / args.plan.blocks, in_line = of_head % args.plan.blocks;
  const int group = call.heads / call.kv_heads;
  const int warp_key = warp_id() * kMatrix;
  const BackwardMemory<T, D, FULL> memory;
  const bool biased = FULL && args.dbias != nullptr && part == 0;

  for (int slot = in_line; slot < args.plan.slots; slot += args.plan.blocks) {
    const Slot place = slot_at(line * args.plan.slots + slot, call.cu_k, call.count, call.sk, kKeyTile);
    KeyBlock keys{.s = sequence_of(call, place.sequence),
                  .key_head = block / in_head,
                  .key_tile = place.tile * kKeyTile,
                  .of_head = of_head,
                  .share = in_line};
    if (place.sequence == call.count) keys.s.sq = 0;
    const Sequence& s = keys.s;
    if (keys.key_tile >= s.sk) continue;
    if constexpr (FULL) keys.dropout = seeded(call.dropout, call.rng);
    keys.ignored = ignored_keys(call, s, keys.key_tile);
    const Range seeing = queries_seeing(call, s, keys.key_tile, min(keys.key_tile + kKeyTile, s.sk) - 1);
    keys.first = seeing.begin / kQueries * kQueries;
    keys.tiles = keys.ignored == ~uint64_t{0} ? 0 : max(0, (seeing.end - keys.first + kQueries - 1) / kQueries);
    const int items = group * keys.tiles;
    const auto copy_item = [&](const KeyBlock& keys, int item) {
      if (item < items)
        memory.copy_queries(args, keys.s, keys.head(item, group), keys.query_tile(item, kQueries), item % kBuffers);
      commit_copies();
    };

    float dkey[1][kColumns / 8][4], dvalue[1][kColumns / 8][4];
    clear(dkey);
    clear(dvalue);
    DiagonalSums<T, D> diagonals(call.distances);
    sync_block();  // nobody reads the tile before
    if (threadIdx.x == 0) memory.key_block()[0] = keys;
    if (items > 0) memory.copy_keys(call, s, keys.key_head, keys.key_tile, keys.ignored);
    copy_item(keys, 0);
    for (int item = 0; item < items; ++item) {
      if (item == 0) sync_block();  // what is known of the keys is there
      const KeyBlock keys = memory.key_block()[0];
      const int head = keys.head(item, group), query_tile = keys.query_tile(item, kQueries), buffer = item % kBuffers;
      if constexpr (kBuffers == 2) copy_item(keys, item + 1);
      wait_copies<kBuffers - 1>();
      sync_block();  // queries are there, and nobody reads the scores before these
      ScoreTile<kQueries / 8> tile;
      score_gradients<T, D, FULL>(args, keys, head, query_tile, buffer, memory, tile);
      Operand<1, kQueries / kMatrix> operand;
      convert<T>(tile.weights, operand);
      multiply_weights<T>(operand, memory.douts(buffer), part * kColumns, dvalue);
      if constexpr (FULL) {
        if (biased) {
          float* sums = args.dbias + (int64_t{keys.of_head} * call.heads + head) * call.distances;
          convert<T>(tile.gradients, operand);
          memory.scores.put(warp_key, operand[0]);
          sync_block();
          diagonals.add(memory.scores, keys.key_tile - query_tile - keys.s.shift, sums);
          sync_block();
          if ((item + 1) % keys.tiles == 0) diagonals.flush(shared_memory<float>(2 * kTile.key_bytes(D), 8), sums);
        }
        if (call.softcap != 0) {
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) tile.gradients[0][n][i] *= tile.derivatives[n][i];
        }
      }
      convert<T>(tile.gradients, operand);
      multiply_weights<T>(operand, memory.queries(buffer), part * kColumns, dkey);
      memory.scores.put(warp_key, operand[0]);
      sync_block();  // scores are there, and nobody reads the queries any more
      if constexpr (kBuffers == 1) copy_item(keys, item + 1);
      add_query_gradient(args, keys, head, query_tile, part, memory);
    }
    wait_copies<0>();
    sync_block();  // nobody reads keys and values any more

    const KeyBlock same = memory.key_block()[0];
    const auto write = [&](const Tile<T, kKeyTile, kColumns>& by, const Heads& to, float (&sums)[1][kColumns / 8][4],
                           float factor) {
#pragma unroll
      for (auto& numbers : sums[0])
#pragma unroll
        for (float& number : numbers) number *= factor;
      const int row = opaque(warp_key);
      Operand<1, kColumns / kMatrix> converted;
      convert<T>(sums, converted);
      by.put(row, converted[0]);
      sync_warp();
      by.template store_rows<kMatrix>(
          row, to.at<T>(same.s.batch, same.key_head, same.s.key + same.key_tile) + part * kColumns, to.row,
          same.s.sk - same.key_tile, call.dim - part * kColumns);
    };
    write(Tile<T, kKeyTile, kColumns>(0), args.dkey, dkey, call.scale);
    write(Tile<T, kKeyTile, kColumns>(kTile.key_bytes(D)), args.dvalue, dvalue, static_cast<float>(same.dropout.scale));
  }
}

// --- host ---

template <class T, int D, bool FULL>
void attention_backward(const AttentionBackward& args, Stream stream) {
  constexpr BackwardTile kTile = backward_tile(D, FULL);
  const int64_t blocks = int64_t{args.plan.lines} * args.plan.blocks * args.call.kv_heads * kTile.parts;
  if (blocks > 0)
    launch(attention_backward_tile<T, D, FULL>,
           {.grid = blocks, .block = kTile.kThreads, .shared_bytes = kTile.shared_bytes(D)}, stream, args);
}

}  // namespace pyllm::cuda
