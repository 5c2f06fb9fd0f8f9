// What the kernels of attention's backward share: their tiles in shared memory, and the gradients of a tile's scores.
#pragma once

#include "cuda/attention_scores.cuh"

namespace pyllm::cuda {

// A tile of keys, and what its block knows of it. Its items are the tiles of queries that see it, head by head.
struct alignas(16) KeyBlock {
  Sequence s;
  int key_head, key_tile;
  int of_head, share;        // the block among those of its head; where it adds to dQ
  int first = 0, tiles = 0;  // of queries
  Dropout dropout = {};
  uint64_t ignored = 0;

  __device__ int head(int item, int group) const { return key_head * group + item / tiles; }
  __device__ int query_tile(int item, int size) const { return first + item % tiles * size; }
};
static_assert(sizeof(KeyBlock) <= kFactBytes);

// Of a block: where its tiles lie in shared memory.
template <class T, int D, bool FULL>
struct BackwardMemory {
  static constexpr BackwardTile kTile = backward_tile(D, FULL);
  static constexpr int kQueries = kTile.queries, kThreads = kTile.kThreads;
  using Keys = Tile<T, kKeyTile, D>;
  using Queries = Tile<T, kQueries, D>;

  Keys keys{0}, values{kTile.key_bytes(D)};
  Tile<T, kKeyTile, kQueries> scores{2 * kTile.key_bytes(D)};

  __device__ Queries queries(int buffer) const { return Queries(begin(buffer)); }
  __device__ Queries douts(int buffer) const { return Queries(begin(buffer) + kTile.query_bytes(D)); }
  template <class Row>
  __device__ Shared<Row> rows(int buffer) const {
    return shared_memory<Row>(begin(buffer) + 2 * kTile.query_bytes(D),
                              kRowBytes * kQueries / static_cast<int>(sizeof(Row)));
  }

  __device__ Shared<KeyBlock> key_block() const { return shared_memory<KeyBlock>(kTile.last_buffer(D), 1); }

  // ignored: weights of 0 do not keep out NaN, so keys that no query sees are not copied.
  __device__ void copy_keys(const Attention& call, const Sequence& s, int head, int tile, uint64_t ignored) const {
    const uint64_t left_out = ignored | outside(keys_seen(call, s, 0, s.sq - 1), tile);
    const auto copy = [&](const Keys& to, const Heads& from) {
      to.template copy_rows<kThreads>(from.at<const T>(s.batch, head, s.key + tile), from.row, s.sk - tile, call.dim,
                                      left_out);
    };
    copy(keys, call.key);
    copy(values, call.value);
  }

  // Rows beyond the last are 0, and so is then all that they add.
  __device__ void copy_queries(const AttentionBackward& args, const Sequence& s, int head, int tile, int buffer) const {
    const Attention& call = args.call;
    const auto copy = [&](const Queries& to, const Heads& from) {
      to.template copy_rows<kThreads>(from.at<const T>(s.batch, head, s.query + tile), from.row, s.sq - tile, call.dim);
    };
    copy(queries(buffer), call.query);
    copy(douts(buffer), args.dout);
    const int row = static_cast<int>(threadIdx.x);
    if (row < kQueries)
      copy_async(rows<RowStatistics>(buffer), row, args.statistics + row_index(call, s, head, tile) + row, 1,
                 tile + row < s.sq);
  }

 private:
  __device__ static int begin(int buffer) { return kTile.first_buffer(D) + buffer * kTile.buffer_bytes(D); }
};

// Bit 8 half + n says whether dropout keeps the weight of a thread's key of that half and its query of accumulator n,
// in `low` of the first, in `high` of the second of two. A call of Philox serves eight keys of a query: of 8 queries, a
// lane makes one of the calls for the warp's keys, the first of which is `key`, and its neighbours ask for theirs.
template <int N>
struct KeptWeights {
  uint32_t low = ~0u, high = ~0u;

  __device__ void draw(const Dropout& dropout, uint32_t head, int query, int key) {
    static_assert(N <= 8);
    low = high = 0;
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint32_t words[4];
      random_words(dropout, head, static_cast<uint32_t>(query + 8 * n + g), static_cast<uint32_t>(key / 32 * 4 + t),
                   words);
      uint32_t kept = 0;  // bit 2w + b: of column 8w + 2t + b
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        kept |= (words[w] & 0xFFFF) >= dropout.threshold ? 1u << 2 * w : 0;
        kept |= words[w] >> 16 >= dropout.threshold ? 2u << 2 * w : 0;
      }
      kept >>= key % 32 / 4;  // the warp's half of the 32 columns
      // Of query 2t, then 2t + 1, call g / 2 has the bits of keys g and g + 8.
      const uint32_t first = shuffle(kept, 8 * t + g / 2) >> g % 2, second = shuffle(kept, 8 * t + 4 + g / 2) >> g % 2;
      low |= (first & 1) << n | (first >> 2 & 1) << (8 + n);
      high |= (second & 1) << n | (second >> 2 & 1) << (8 + n);
    }
  }

  __device__ bool operator()(int n, int half, int i) const {
    return ((i == 0 ? low : high) >> (8 * half + n) & 1) != 0;
  }
};

// A tile of transposed scores: 16 keys of a warp by the tile's queries.
template <int N>
struct ScoreTile {
  float weights[1][N][4], gradients[1][N][4];
  float derivatives[N][4];  // of the softcap
};

// body(n, half, i, statistics of the query) for each of a thread's scores of a tile: element 2 half + i of fragment n.
template <int N, class Memory, class Body>
__device__ inline void for_scores(const Memory& memory, int buffer, Body&& body) {
  struct alignas(16) Pair {
    RowStatistics at[2];
  };
  const Shared<Pair> rows = memory.template rows<Pair>(buffer);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Pair pair = rows[4 * n + lane_id() % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) body(n, half, i, pair.at[i]);
  }
}

// P' (dropout applied, but for its factor) and dS' (before the softcap).
template <class T, int D, bool FULL>
__device__ inline void score_gradients(const AttentionBackward& args, const KeyBlock& keys, int head, int query_tile,
                                       int buffer, const BackwardMemory<T, D, FULL>& memory,
                                       ScoreTile<backward_tile(D, FULL).queries / 8>& tile) {
  constexpr int kQueries = backward_tile(D, FULL).queries, N = kQueries / 8;
  const Attention& call = args.call;
  const Sequence& s = keys.s;
  const int key_tile = keys.key_tile;
  const uint64_t ignored = keys.ignored;
  const int warp_key = warp_id() * kMatrix;
  clear(tile.weights);
  clear(tile.gradients);
  multiply_rows(memory.keys, warp_key, memory.queries(buffer), tile.weights);
  multiply_rows(memory.values, warp_key, memory.douts(buffer), tile.gradients);

  const int last = min(query_tile + kQueries, s.sq) - 1;
  const bool cut = ignored != 0 || (FULL && query_tile + kQueries > s.sq) ||
                   !keys_all_see(call, s, query_tile, last).has(key_tile, kKeyTile);
  const int g = lane_id() / 4, t = lane_id() % 4, query = query_tile + 2 * t;
  Range seeing[2];  // by the thread's two keys, in queries from its first on
  if (cut) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = warp_key + 8 * half + g, key = key_tile + in_tile;
      seeing[half] = queries_seeing(call, s, key, key);
      if (key >= s.sk || (ignored >> in_tile & 1) != 0) seeing[half].end = 0;
      seeing[half].begin -= query;
      seeing[half].end -= query;
    }
  }
  const Scoring<T> scoring(call, s, head);
  const float factor = FULL ? 1.0f : call.scale * kLog2E;
  const auto sees = [&](int n, int half, int i) {
    return 8 * n + i >= seeing[half].begin && 8 * n + i < seeing[half].end;
  };
  if (!FULL && cut) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!sees(n, i / 2, i % 2)) tile.weights[0][n][i] = -kInfinity;
  }
  for_scores<N>(memory, buffer, [&](int n, int half, int i, const RowStatistics& row) {
    float& weight = tile.weights[0][n][2 * half + i];
    float score = weight, derivative = 1;
    if (FULL && cut && !sees(n, half, i)) {
      score = -kInfinity;
    } else if constexpr (FULL) {
      score = scoring(score, query + 8 * n + i, key_tile + warp_key + 8 * half + g, derivative);
    }
    weight = exp2_approx(fmaf(score, factor, -row.lse));
    if constexpr (FULL) tile.derivatives[n][2 * half + i] = derivative;
  });
  KeptWeights<N> kept;
  float kept_factor = 1;
  if (FULL && keys.dropout) {
    kept.draw(keys.dropout, static_cast<uint32_t>(s.index * call.heads + head), query_tile, key_tile + warp_key);
    kept_factor = static_cast<float>(keys.dropout.scale);
  }
  for_scores<N>(memory, buffer, [&](int n, int half, int i, const RowStatistics& row) {
    float &weight = tile.weights[0][n][2 * half + i], &gradient = tile.gradients[0][n][2 * half + i];
    const bool keep = !FULL || kept(n, half, i);
    gradient = weight * ((keep ? gradient * kept_factor : 0) - row.delta);
    if (!keep) weight = 0;
  });
}

}  // namespace pyllm::cuda
