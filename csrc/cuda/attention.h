// Attention on a GPU: what the binding hands over, and which queries and keys see each other.
#pragma once

#include <cstdint>

#include "cuda/attention_plan.h"
#include "cuda/ptx.cuh"
#include "dropout.h"
#include "heads.h"

namespace pyllm::cuda {

// (sequences, H, Sq, Sk), strides 0 where the mask has size 1.
struct ScoreMask {
  Array data = {};
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
  ScoreMask mask;
  const bool* padding;  // (B, Sk), contiguous
  const float* bias;    // (H, distances), the middle one at distance 0
  int distances;
  const float* slopes;  // (sequences or 1, H)
  int slopes_sequence;

  // Of packed ones with one more: the rows behind the last, queries that see no key and keys that no query sees.
  int sequences() const { return count + (cu_q != nullptr ? 1 : 0); }

  bool adds_mask() const { return mask.data && mask.data.dtype != DType::boolean; }

  // Whether the plain kernels, of band and padding only, cannot serve it: they take the largest product for the largest
  // score.
  bool is_full() const { return mask.data || bias || slopes || softcap != 0 || dropout || !(scale > 0); }
};

struct AttentionForward {
  Attention call;
  Heads out;
  float* lse;  // (B, H, Sq)
  int slots;   // blocks of a head
};

// Of a query: its log-sum-exp in powers of two, infinity if it sees nothing; rowsum(dO O) - dlse.
struct alignas(kRowBytes) RowStatistics {
  float lse, delta;
};

struct AttentionDelta {
  Heads out, dout;
  const float *lse, *dlse;    // (B, H, Sq); dlse may be null
  RowStatistics* statistics;  // (B, H, Sq)
  int64_t rows;
  int heads, sq, dim;
};

// Beyond it lse has lost too much of the sum to its maximum: a mask adds a large number to every key.
inline constexpr float kFarFromZero = 1024;

// Rows whose lse is that far, where a mask adds numbers. Their statistics get the largest score in place of lse, and
// what that leaves of their weights is divided out of dout and delta.
struct AttentionFarRows {
  Attention call;
  const float* lse;           // (B, H, Sq)
  RowStatistics* statistics;  // (B, H, Sq)
  Heads dout;
  int64_t rows;
};

struct AttentionBackward {
  Attention call;
  Heads dout, dkey, dvalue;
  const RowStatistics* statistics;
  float* dquery;         // (shares, B, Sq, H, dim), holds zeros
  int64_t dquery_share;  // elements from share to share; 0: there is one
  float* dbias;          // (lines * blocks, H, distances), holds zeros; or null
  BackwardPlan plan;
};

// out = scale * the sum of `number` addends of `count` elements each
struct SumOfAddends {
  const float* addends;
  Array out;
  int64_t count;
  int number;
  float scale;
};

// The gradient of a mask, contiguous, of the shape (sequences, heads, rows, columns), each the mask's own size.
struct MaskGradient {
  AttentionBackward backward;
  Array dmask;
  int sequences, heads, rows, columns;
};

// --- which queries and keys see each other, as far as the band is concerned ---

// One of the sequences of a call. `batch`, `query` and `key` tell where its rows begin in the tensors.
struct Sequence {
  int index, batch, query, key, sq, sk;
  int shift;  // what is added to a query's index before it is compared with a key's
};

struct Range {
  int begin, end;
  PYLLM_EVERYWHERE bool has(int first, int count) const { return first >= begin && first + count <= end; }
};

PYLLM_EVERYWHERE inline int smaller(int a, int b) { return a < b ? a : b; }
PYLLM_EVERYWHERE inline int larger(int a, int b) { return a > b ? a : b; }

// The keys that any of the queries first to last sees.
PYLLM_EVERYWHERE inline Range keys_seen(const Attention& call, const Sequence& s, int first, int last) {
  return {call.left < 0 ? 0 : larger(0, first + s.shift - call.left),
          call.right < 0 ? s.sk : smaller(s.sk, last + s.shift + call.right + 1)};
}

// The queries that see any of the keys first to last.
PYLLM_EVERYWHERE inline Range queries_seeing(const Attention& call, const Sequence& s, int first, int last) {
  return {call.right < 0 ? 0 : larger(0, first - s.shift - call.right),
          call.left < 0 ? s.sq : smaller(s.sq, last - s.shift + call.left + 1)};
}

// The keys that each of the queries first to last sees.
PYLLM_EVERYWHERE inline Range keys_all_see(const Attention& call, const Sequence& s, int first, int last) {
  return {keys_seen(call, s, last, last).begin, keys_seen(call, s, first, first).end};
}

// --- the kernels: T __half or __nv_bfloat16, D head_dim rounded up, as cuda/instances.py lists them ---

template <class T, int D, bool FULL>
void attention_forward(AttentionForward args, Stream stream);
template <class T>
void attention_delta(const AttentionDelta& args, Stream stream);
template <class T>
void attention_far_rows(const AttentionFarRows& args, Stream stream);
template <class T, int D, bool FULL>
void attention_backward(const AttentionBackward& args, Stream stream);
template <class T>  // or float
void attention_sum(const SumOfAddends& args, Stream stream);
template <class T, int D>
void attention_mask_gradient(const MaskGradient& args, Stream stream);

}  // namespace pyllm::cuda
