// Attention's backward on tensor cores, for GPUs since sm_80 (Dao, 2023): a block holds a tile of 64 keys and values in
// shared memory and walks over the queries of all heads of its group; a warp has 16 of the keys with dK and dV in registers.
//
// Scores are transposed, a row a key, so that both P' and dS' are first operands straight from registers. Per tile of
// queries: S' = K Q', dP' = V dO', P' = exp2(S' * scale * log2(e) - lse), dS' = P' (dP' - delta), dV += P' dO,
// dK += dS' Q; then dS' goes through shared memory, and dQ = dS K is added to fp32 sums in global memory. Tiles of queries
// are copied ahead into a second buffer where there is room for one. delta = rowsum(dO O) - dlse comes from a kernel of its
// own, and one converts dQ at the end.
// dQ is summed by atomics, in any order. Where determinism is asked for, few blocks walk over all keys of a head, each with
// sums of its own, which are added up in order: as many times the memory of dQ, and less parallelism.
// Where head_dim is above 128, registers hold half of dK and dV: two blocks a tile, both with all of S' and dP'.
// The gradient of the bias by distance is the sum of dS along diagonals, kept for each block and summed in order. The
// gradient of a mask has a kernel of its own, in which each tile of the mask sums up, in order, what broadcasts to it.
//
// FLOPs: 10 D for each pair in the tiles visited, above head_dim 128 14 D, and 4 D more for the gradient of a mask. Bytes:
// K, V, dK, dV once, Q and dO once for each tile of keys, from L2 where they fit, and 4 D of atomics for each query there.
// Shared memory: 56 KiB at head_dim 64, 68 at 128, 98 at 256.
#pragma once

#include "cuda/attention_scores.cuh"

namespace pyllm::cuda {

template <int D>
struct BackwardTile {
  static constexpr int kQueries = D < 128 ? 64 : D < 256 ? 32 : 16;
  static constexpr int kBuffers = D == 192 ? 1 : 2;  // of queries
  static constexpr int kParts = D <= 128 ? 1 : 2;    // into which the columns of dK and dV are split
  static constexpr int kColumns = D / kParts;        // of a part
  static constexpr int kWarps = kKeyTile / kMatrix, kThreads = kWarp * kWarps;

  // Shared memory: K, V, dS', and buffers of Q, dO and their statistics.
  static constexpr int kKeyBytes = 2 * D * kKeyTile, kScoreBytes = 2 * kQueries * kKeyTile;
  static constexpr int kQueryBytes = 2 * D * kQueries, kRowBytes = kQueries * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kBuffer = 2 * kKeyBytes + kScoreBytes, kBufferBytes = 2 * kQueryBytes + kRowBytes;
  static constexpr int kSharedBytes = kBuffer + kBuffers * kBufferBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

// --- delta ---

inline constexpr int kDeltaLanes = 8, kDeltaThreads = 128;  // a row; a block

template <class T>
__global__ void __launch_bounds__(kDeltaThreads, 1)
    attention_delta_kernel(const __grid_constant__ AttentionDelta args) {
  constexpr int kRows = kDeltaThreads / kDeltaLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  float delta = 0;
  if (row < args.rows) {
    const int64_t head = row / args.sq;
    const auto at = [&](const Heads& rows) { return rows.at<const T>(head / args.heads, head % args.heads, row % args.sq); };
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

// --- dK, dV, dQ, the bias ---

// Of a block: where its tiles lie in shared memory.
template <class T, int D>
struct BackwardMemory {
  using Sizes = BackwardTile<D>;
  static constexpr int kThreads = Sizes::kThreads;
  using Keys = Tile<T, kKeyTile, D>;
  using Queries = Tile<T, Sizes::kQueries, D>;

  Keys keys{0}, values{Sizes::kKeyBytes};
  Tile<T, kKeyTile, Sizes::kQueries> scores{2 * Sizes::kKeyBytes};

  __device__ Queries queries(int buffer) const { return Queries(Sizes::kBuffer + buffer * Sizes::kBufferBytes); }
  __device__ Queries douts(int buffer) const {
    return Queries(Sizes::kBuffer + buffer * Sizes::kBufferBytes + Sizes::kQueryBytes);
  }
  template <class Row>
  __device__ Shared<Row> rows(int buffer) const {
    return shared_memory<Row>(Sizes::kBuffer + buffer * Sizes::kBufferBytes + 2 * Sizes::kQueryBytes,
                              Sizes::kRowBytes / static_cast<int>(sizeof(Row)));
  }

  __device__ void copy_keys(const Attention& call, const Sequence& s, int head, int tile) const {
    const auto copy = [&](const Keys& to, const Heads& from) {
      to.template copy_rows<kThreads>(from.at<const T>(s.batch, head, s.key + tile), from.row, s.sk - tile, call.dim);
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
    if (row < Sizes::kQueries)
      copy_async(rows<RowStatistics>(buffer), row, args.statistics + row_index(call, s, head, tile) + row, 1,
                 tile + row < s.sq);
  }
};

// Bit 8 half + n says whether dropout keeps the weight of a thread's key of that half and its query of accumulator n, in
// `low` of the first, in `high` of the second of two. A call of Philox serves eight keys of a query: of 8 queries, a lane
// makes one of the calls for the warp's keys, the first of which is `key`, and its neighbours ask for theirs.
template <int N>
struct KeptWeights {
  uint32_t low = 0, high = 0;

  __device__ KeptWeights(const Dropout& dropout, uint32_t head, int query, int key) {
    static_assert(N <= 8);
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

  __device__ bool operator()(int n, int half, int i) const { return ((i == 0 ? low : high) >> (8 * half + n) & 1) != 0; }
};

// A tile of transposed scores: 16 keys of a warp by the tile's queries.
template <int N>
struct ScoreTile {
  float weights[1][N][4], gradients[1][N][4];
  float derivatives[N][4];  // of the softcap
};

// P' (dropout applied, but for its factor) and dS' (before the softcap). first_key: the warp's first key.
template <class T, int D, bool FULL>
__device__ inline void score_gradients(const AttentionBackward& args, const Sequence& s, int head, int key_tile,
                                       uint64_t ignored, int query_tile, int buffer, const Dropout& dropout,
                                       const BackwardMemory<T, D>& memory, ScoreTile<BackwardTile<D>::kQueries / 8>& tile) {
  constexpr int kQueries = BackwardTile<D>::kQueries, N = kQueries / 8;
  const Attention& call = args.call;
  const int warp_key = static_cast<int>(threadIdx.x) / kWarp * kMatrix;
  clear(tile.weights);
  clear(tile.gradients);
  multiply_rows(memory.keys, opaque(warp_key), memory.queries(buffer), tile.weights);
  multiply_rows(memory.values, opaque(warp_key), memory.douts(buffer), tile.gradients);

  const int last = min(query_tile + kQueries, s.sq) - 1;
  const bool cut = ignored != 0 || (FULL && query_tile + kQueries > s.sq) ||
                   !sees_whole_tile(call, s, query_tile, last, key_tile);
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
  struct alignas(16) Pair {
    RowStatistics at[2];
  };
  const Shared<Pair> rows = memory.template rows<Pair>(buffer);
  const Scoring<T> scoring(call, s, head);
  const float factor = FULL ? 1.0f : call.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Pair row = rows[4 * n + t];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& weight = tile.weights[0][n][2 * half + i];
        float score = weight, derivative = 1;
        if (cut && (8 * n + i < seeing[half].begin || 8 * n + i >= seeing[half].end)) {
          score = -kInfinity;
        } else if constexpr (FULL) {
          score = scoring(score, query + 8 * n + i, key_tile + warp_key + 8 * half + g, derivative);
        }
        weight = exp2_approx(fmaf(score, factor, -row.at[i].lse));
        if constexpr (FULL) tile.derivatives[n][2 * half + i] = derivative;
      }
  }
  const auto differentiate = [&](auto&& kept, float kept_factor) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Pair row = rows[4 * n + t];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &weight = tile.weights[0][n][2 * half + i], &gradient = tile.gradients[0][n][2 * half + i];
          const bool keep = kept(n, half, i);
          gradient = weight * ((keep ? gradient * kept_factor : 0) - row.at[i].delta);
          if (!keep) weight = 0;
        }
    }
  };
  if (FULL && dropout) {
    const KeptWeights<N> kept(dropout, static_cast<uint32_t>(s.index * call.heads + head), query_tile,
                              key_tile + warp_key);
    differentiate(kept, static_cast<float>(dropout.scale));
  } else {
    differentiate([](int, int, int) { return true; }, 1.0f);
  }
}

// Adds the sums of a tile's dS' along its diagonals to a head's sums by distance. Distances from which on all biases are
// the same stay with the thread, until flush().
template <class T, int D>
class DiagonalSums {
  static constexpr int kQueries = BackwardTile<D>::kQueries, kDiagonals = kKeyTile + kQueries - 1;
  static_assert(kDiagonals <= BackwardTile<D>::kThreads);

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
    constexpr int kWarps = BackwardTile<D>::kWarps;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
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
      for (int i = 0; i < kWarps; ++i) sum += spare[2 * i + threadIdx.x];
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
template <class T, int D>
__device__ inline void add_query_gradient(const AttentionBackward& args, const Sequence& s, int head, int query_tile,
                                          int part, const BackwardMemory<T, D>& memory, float* dquery) {
  using Sizes = BackwardTile<D>;
  // The warps share the queries, and where those are too few their columns.
  constexpr int kAcross = Sizes::kQueries / kMatrix, kAlong = Sizes::kWarps / kAcross;
  constexpr int N = Sizes::kColumns / kAlong / 8;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, row = warp % kAcross * kMatrix;
  const int column = part * Sizes::kColumns + warp / kAcross * 8 * N;
  float sums[1][N][4];
  clear(sums);
  multiply_columns(memory.scores, row, memory.keys, opaque(column), sums);
  const Attention& call = args.call;
  const int64_t pitch = int64_t{call.heads} * call.dim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = query_tile + row + 8 * half + lane_id() / 4;
    if (query >= s.sq) continue;
    float* to = dquery + (int64_t{s.batch} * call.sq + s.query + query) * pitch + int64_t{head} * call.dim + column +
                lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (column + 8 * n >= call.dim) break;
      atomic_add(to + 8 * n, sums[0][n][2 * half]);
      atomic_add(to + 8 * n + 1, sums[0][n][2 * half + 1]);
    }
  }
}

template <class T, int D, bool FULL>
__global__ void __launch_bounds__(BackwardTile<D>::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackward args) {
  using Sizes = BackwardTile<D>;
  constexpr int kQueries = Sizes::kQueries, kColumns = Sizes::kColumns;
  const Attention& call = args.call;
  // Of a tile of keys, its parts are neighbours.
  const int part = static_cast<int>(blockIdx.x) % Sizes::kParts, block = static_cast<int>(blockIdx.x) / Sizes::kParts;
  const int key_head = block / args.steps, step = block % args.steps, group = call.heads / call.kv_heads;
  const int warp_key = static_cast<int>(threadIdx.x) / kWarp * kMatrix;
  const BackwardMemory<T, D> memory;
  const Dropout dropout = FULL ? seeded(call.dropout, call.rng) : Dropout();
  float* dquery = args.dquery + step * args.dquery_share;
  const bool biased = FULL && args.dbias != nullptr && part == 0;

  for (int slot = step; slot < args.slots; slot += args.steps) {
    const Slot place = slot_at(slot, call.cu_k, call.count, call.sk, kKeyTile);
    const Sequence s = sequence_of(call, place.sequence);
    const int key_tile = place.tile * kKeyTile;
    if (key_tile >= s.sk) continue;
    const uint64_t ignored = ignored_keys(call, s, key_tile);
    const Range seeing = queries_seeing(call, s, key_tile, min(key_tile + kKeyTile, s.sk) - 1);
    const int first = seeing.begin / kQueries * kQueries;
    const int tiles = ignored == ~uint64_t{0} ? 0 : max(0, (seeing.end - first + kQueries - 1) / kQueries);
    const int items = group * tiles;
    const auto copy_item = [&](int item) {
      if (item < items)
        memory.copy_queries(args, s, key_head * group + item / tiles, first + item % tiles * kQueries,
                            item % Sizes::kBuffers);
      commit_copies();
    };

    float dkey[1][kColumns / 8][4], dvalue[1][kColumns / 8][4];
    clear(dkey);
    clear(dvalue);
    DiagonalSums<T, D> diagonals(call.distances);
    sync_block();  // nobody reads the tile before
    if (items > 0) memory.copy_keys(call, s, key_head, key_tile);
    copy_item(0);
    for (int item = 0; item < items; ++item) {
      const int head = key_head * group + item / tiles, query_tile = first + item % tiles * kQueries;
      const int buffer = item % Sizes::kBuffers;
      if constexpr (Sizes::kBuffers == 2) copy_item(item + 1);
      wait_copies<Sizes::kBuffers - 1>();
      sync_block();  // queries are there, and nobody reads the scores before these
      ScoreTile<kQueries / 8> tile;
      score_gradients<T, D, FULL>(args, s, head, key_tile, ignored, query_tile, buffer, dropout, memory, tile);
      multiply_weights(tile.weights, memory.douts(buffer), part * kColumns, dvalue);
      if constexpr (FULL) {
        if (biased) {
          float* sums = args.dbias + (int64_t{step} * call.heads + head) * call.distances;
          memory.scores.put(warp_key, tile.gradients[0]);
          sync_block();
          diagonals.add(memory.scores, key_tile - query_tile - s.shift, sums);
          sync_block();
          if ((item + 1) % tiles == 0) diagonals.flush(shared_memory<float>(2 * Sizes::kKeyBytes, 8), sums);
        }
        if (call.softcap != 0) {
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) tile.gradients[0][n][i] *= tile.derivatives[n][i];
        }
      }
      multiply_weights(tile.gradients, memory.queries(buffer), part * kColumns, dkey);
      memory.scores.put(warp_key, tile.gradients[0]);
      sync_block();  // scores are there, and nobody reads the queries any more
      if constexpr (Sizes::kBuffers == 1) copy_item(item + 1);
      add_query_gradient(args, s, head, query_tile, part, memory, dquery);
    }
    wait_copies<0>();
    sync_block();  // nobody reads keys and values any more

    const auto write = [&](const Tile<T, kKeyTile, kColumns>& by, const Heads& to, float (&sums)[1][kColumns / 8][4],
                           float factor) {
#pragma unroll
      for (auto& numbers : sums[0])
#pragma unroll
        for (float& number : numbers) number *= factor;
      by.put(warp_key, sums[0]);
      sync_warp();
      by.template store_rows<kMatrix>(warp_key,
                                      to.at<T>(s.batch, key_head, s.key + key_tile) + part * kColumns, to.row,
                                      s.sk - key_tile, call.dim - part * kColumns);
    };
    write(Tile<T, kKeyTile, kColumns>(0), args.dkey, dkey, call.scale);
    write(Tile<T, kKeyTile, kColumns>(Sizes::kKeyBytes), args.dvalue, dvalue, static_cast<float>(dropout.scale));
  }
}

// --- the sums of shares and parts, in order ---

inline constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads, 1)
    attention_query_gradient_kernel(const __grid_constant__ QueryGradient args) {
  const int64_t at = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * 8;
  if (at >= args.count) return;
  float sums[8] = {};
  for (int share = 0; share < args.number; ++share) {
    const auto numbers = load_chunk<true, 8>(args.shares + share * args.count + at, 0, 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += numbers.at[i];
  }
  Chunk<T, 8> chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk.at[i] = from_float<T>(args.scale * sums[i]);
  store(reinterpret_cast<Chunk<T, 8>*>(args.dquery.as<T>() + at), chunk);
}

inline __global__ void __launch_bounds__(kSumThreads, 1)
    attention_bias_gradient_kernel(const __grid_constant__ BiasGradient args) {
  const int64_t at = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (at >= args.count) return;
  float sum = 0;
  for (int part = 0; part < args.number; ++part) sum += load(args.parts + part * args.count + at);
  store(args.dbias + at, sum);
}

// --- host ---

template <class T>
void attention_delta(const AttentionDelta& args, Stream stream) {
  if (args.rows > 0)
    launch(attention_delta_kernel<T>,
           {.grid = ceil_div(args.rows, kDeltaThreads / kDeltaLanes), .block = kDeltaThreads}, stream, args);
}

template <class T, int D, bool FULL>
void attention_backward(const AttentionBackward& args, Stream stream) {
  using Sizes = BackwardTile<D>;
  const int64_t blocks = int64_t{args.steps} * args.call.kv_heads * Sizes::kParts;
  if (blocks > 0)
    launch(attention_backward_kernel<T, D, FULL>,
           {.grid = blocks, .block = Sizes::kThreads, .shared_bytes = Sizes::kSharedBytes}, stream, args);
}

template <class T>
void attention_query_gradient(const QueryGradient& args, Stream stream) {
  if (args.count > 0)
    launch(attention_query_gradient_kernel<T>, {.grid = ceil_div(args.count, 8 * kSumThreads), .block = kSumThreads},
           stream, args);
}

inline void attention_bias_gradient(const BiasGradient& args, Stream stream) {
  if (args.count > 0)
    launch(attention_bias_gradient_kernel, {.grid = ceil_div(args.count, kSumThreads), .block = kSumThreads}, stream,
           args);
}

}  // namespace pyllm::cuda
