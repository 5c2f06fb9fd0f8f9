// How attention's queries and keys are dealt out: plain arithmetic without a CUDA header, so that it is tested without
// a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace pyllm::cuda {

inline constexpr int kKeyTile = 64;    // keys of a tile
inline constexpr int kMatrix = 16;     // rows, and depth, of a product on tensor cores
inline constexpr int kRowBytes = 8;    // of the statistics of a query in the backward
inline constexpr int kFactBytes = 96;  // what is needed now and then: registers are short
inline constexpr int kMostQueryShares = 8;

// FULL: with more than a band and padding.
struct ForwardTile {
  int queries;
  int squares;  // of 16 queries, of a warp: two where its accumulators leave room, so that what it reads of keys and
                // values serves two products
  PYLLM_EVERYWHERE constexpr int threads() const { return kWarp * queries / (kMatrix * squares); }
  // In shared memory Q, K and V, and facts of the block.
  PYLLM_EVERYWHERE constexpr int tile_bytes(int head_dim) const { return 2 * head_dim * (queries + 2 * kKeyTile); }
  PYLLM_EVERYWHERE constexpr int shared_bytes(int head_dim) const { return tile_bytes(head_dim) + kFactBytes; }
};

PYLLM_EVERYWHERE constexpr ForwardTile forward_tile(int head_dim, bool full) {
  if (head_dim > 128) return {64, 1};
  return {128, full ? 1 : 2};
}

// A warp has 16 keys of the tile.
struct BackwardTile {
  int queries;
  int buffers;  // of queries
  int parts;    // into which the columns of dK and dV are split, so that a warp can hold one
  static constexpr int kWarps = kKeyTile / kMatrix, kThreads = kWarp * kWarps;

  // In shared memory K, V and dS', then the buffers of Q, dO and their statistics, then facts of the block.
  PYLLM_EVERYWHERE constexpr int key_bytes(int head_dim) const { return 2 * head_dim * kKeyTile; }
  PYLLM_EVERYWHERE constexpr int query_bytes(int head_dim) const { return 2 * head_dim * queries; }
  PYLLM_EVERYWHERE constexpr int first_buffer(int head_dim) const {
    return 2 * key_bytes(head_dim) + 2 * queries * kKeyTile;
  }
  PYLLM_EVERYWHERE constexpr int buffer_bytes(int head_dim) const {
    return 2 * query_bytes(head_dim) + kRowBytes * queries;
  }
  PYLLM_EVERYWHERE constexpr int last_buffer(int head_dim) const {  // its end
    return first_buffer(head_dim) + buffers * buffer_bytes(head_dim);
  }
  PYLLM_EVERYWHERE constexpr int shared_bytes(int head_dim) const { return last_buffer(head_dim) + kFactBytes; }
};

PYLLM_EVERYWHERE constexpr BackwardTile backward_tile(int head_dim, bool full) {
  if (head_dim <= 64) return {full ? 32 : 64, 2, 1};
  if (head_dim <= 128) return {32, 2, 1};
  if (head_dim <= 192) return {32, 1, 2};
  return {16, 2, 2};
}

// Blocks for the tiles of `size` rows of all sequences, of `length` rows each, or together if packed: then the host
// does not know the sequences' lengths, and some blocks may be left over.
inline int64_t slots_of(int64_t count, int64_t length, int size, bool packed) {
  return packed ? length / size + count : count * ceil_div(length, size);
}

// A slot's sequence, and its tile there, which may be beyond the last one.
struct Slot {
  int sequence, tile;
};

// begin(i): where packed sequence i begins. Its tiles have slots from begin(i) / size + i on: enough for it, and never
// those of the next.
template <class Begin>
PYLLM_EVERYWHERE inline Slot packed_slot(int slot, int count, int size, Begin&& begin) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (begin(middle) / size + middle <= slot ? low : high) = middle;
  }
  return {low, slot - (begin(low) / size + low)};
}

// The slots of keys lie in `lines` of `slots`; block i of a line takes its slots i, i + blocks, ... Of a line no two
// sequences share queries with another line's, so that its blocks alone may add to the same sums of dQ: to one share of
// them, in any order, or each to its own.
struct BackwardPlan {
  int lines, slots, blocks, shares;
};

inline BackwardPlan plan_backward(int64_t count, int64_t length, int64_t kv_heads, int head_dim, bool packed,
                                  bool deterministic, const Device& device) {
  const int64_t lines = packed ? 1 : count, slots = slots_of(packed ? count : 1, length, kKeyTile, packed);
  int64_t blocks = slots;
  if (deterministic) {
    const int64_t others = std::max<int64_t>(1, lines * kv_heads * backward_tile(head_dim, false).parts);
    blocks = std::min({slots, int64_t{kMostQueryShares}, ceil_div(2 * device.processors, others)});
  }
  return {static_cast<int>(lines), static_cast<int>(slots), static_cast<int>(blocks),
          deterministic ? static_cast<int>(blocks) : 1};
}

}  // namespace pyllm::cuda
