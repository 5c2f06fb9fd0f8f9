// Attention on a GPU: what the bindings hand over, and how tiles are dealt out to blocks. Plain arithmetic without a CUDA
// header, so that it is tested without a GPU.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dropout.h"
#include "dtype.h"

namespace pyllm::cuda {

inline constexpr int kKeyTile = 64;           // keys of a tile
inline constexpr int kMatrix = 16;            // rows, and depth, of a product of the tensor cores
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kSharedLimit = 99 << 10;  // bytes of shared memory that a block can have on every GPU since sm_80

// (B, H, S, D) with strides in elements; the last dimension is contiguous.
struct Heads {
  Array data;
  int64_t batch = 0, head = 0, row = 0;
  template <class T>
  PYLLM_EVERYWHERE T* at(int64_t b, int64_t h, int64_t s) const {
    return data.as<T>() + b * batch + h * head + s * row;
  }
};

// (sequences, H, Sq, Sk), strides 0 where the mask has size 1.
struct ScoreMask {
  Array data;
  int64_t sequence = 0, head = 0, row = 0, column = 0;
};

// What forward and backward share.
struct Attention {
  Heads query, key, value;
  int count, heads, kv_heads, sq, sk, dim;  // count: of the sequences; sq, sk: of the tensors
  const int32_t *cu_q, *cu_k;               // null: sequence i is batch i
  float scale, softcap;
  int left, right;  // -1: no bound
  bool bottom_right;
  const int64_t* rng;
  Dropout dropout;
  ScoreMask mask = {};
  const bool* padding = nullptr;  // (B, Sk), contiguous
  const float* bias = nullptr;    // (H, distances), the middle one at distance 0
  int distances = 0;
  const float* slopes = nullptr;  // (sequences or 1, H)
  int slopes_sequence = 0;

  // Whether the plain kernels, of band and padding only, cannot serve it. They take the largest product for the largest
  // score.
  bool is_full() const { return mask.data || bias || slopes || softcap != 0 || dropout || !(scale > 0); }
};

struct AttentionForward {
  Attention call;
  Heads out;
  float* lse;  // (B, H, Sq)
  int slots;   // blocks of a head
};

// Of a query: its log-sum-exp in powers of two, infinity if it sees nothing; rowsum(dO O) less dlse.
struct alignas(8) RowStatistics {
  float lse, delta;
};

struct AttentionDelta {
  Heads out, dout;
  const float *lse, *dlse;    // (B, H, Sq); dlse may be null
  RowStatistics* statistics;  // (B, H, Sq)
  int64_t rows;
  int heads, sq, dim;
};

// Blocks are dealt out over `slots` tiles of keys of a head in `steps`: block i takes tiles i, i + steps, ... Each block
// of a head adds to its own share of dquery if there are several.
struct AttentionBackward {
  Attention call;
  Heads dout, dkey, dvalue;
  const RowStatistics* statistics;
  float* dquery;         // (shares, B, Sq, H, dim), holds zeros
  int64_t dquery_share;  // elements from share to share; 0: all blocks add to one, in any order
  int slots, steps;
  float* dbias;  // (steps, H, distances), holds zeros, or null
};

// dquery = scale * the sum of the shares, of count elements each.
struct QueryGradient {
  const float* shares;
  Array dquery;  // contiguous
  int64_t count;
  int number;  // of shares
  float scale;
};

// dbias (H, distances) = the sum of the parts
struct BiasGradient {
  const float* parts;
  float* dbias;
  int64_t count;
  int number;  // of parts
};

// The gradient of a mask, contiguous, of the shape (sequences, heads, rows, columns), each the mask's own size.
struct MaskGradient {
  AttentionBackward backward;
  Array dmask;
  int sequences, heads, rows, columns;
};

// --- sequences and tiles ---

// One of the sequences of a call. `batch`, `query` and `key` tell where its rows begin in the tensors.
struct Sequence {
  int index, batch, query, key, sq, sk;
  int shift;  // what is added to a query's index before it is compared with a key's
};

struct Range {
  int begin, end;
};

PYLLM_EVERYWHERE inline int smaller(int a, int b) { return a < b ? a : b; }
PYLLM_EVERYWHERE inline int larger(int a, int b) { return a > b ? a : b; }

// The keys that any of the queries first to last sees, as far as the band is concerned.
PYLLM_EVERYWHERE inline Range keys_seen(const Attention& call, const Sequence& s, int first, int last) {
  return {call.left < 0 ? 0 : larger(0, first + s.shift - call.left),
          call.right < 0 ? s.sk : smaller(s.sk, last + s.shift + call.right + 1)};
}

// The queries that see any of the keys first to last.
PYLLM_EVERYWHERE inline Range queries_seeing(const Attention& call, const Sequence& s, int first, int last) {
  return {call.right < 0 ? 0 : larger(0, first - s.shift - call.right),
          call.left < 0 ? s.sq : smaller(s.sq, last - s.shift + call.left + 1)};
}

// Whether each of the queries first to last sees all of a tile's keys.
PYLLM_EVERYWHERE inline bool sees_whole_tile(const Attention& call, const Sequence& s, int first, int last, int tile) {
  return tile + kKeyTile <= s.sk && (call.left < 0 || tile >= last + s.shift - call.left) &&
         (call.right < 0 || tile + kKeyTile - 1 <= first + s.shift + call.right);
}

// Blocks for the tiles of `size` rows of all sequences, of `length` rows each, or together if packed: then the host does
// not know the sequences' lengths, and some blocks may be left over.
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

// Queries of a tile of the forward. A warp has 32 where its accumulators leave room, so that what it reads of keys and
// values serves two products.
constexpr int forward_queries(int head_dim) { return head_dim <= 128 ? 128 : 64; }

// --- kernels; T: __half or __nv_bfloat16, D: head_dim rounded up. FULL: with more than a band and padding ---

constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

// The smallest of kHeadDims that holds it.
constexpr int padded_dim(int dim) {
  for (const int size : kHeadDims)
    if (dim <= size) return size;
  return 0;
}

}  // namespace pyllm::cuda
