// Attention on the CPU: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dropout.h"
#include "dtype.h"
#include "heads.h"

namespace pyllm {

// Queries and keys of a tile of scores.
inline constexpr int kQueryBlock = 64;
inline constexpr int kKeyBlock = 256;

// A row of head_dim elements in the kernels' own buffers is padded to a multiple of this many bytes.
inline constexpr int64_t kRowBytes = 64;

// (sequences, H, Sq, Sk), strides 0 where the mask has size 1; the column's is 0 or 1.
struct ScoreMask {
  Array data;
  int64_t sequence = 0, head = 0, row = 0, column = 0;
};

// One of the sequences of a call. `batch`, `query` and `key` tell where its rows begin in the tensors.
struct Sequence {
  int64_t index, batch, query, key, sq, sk;
  int64_t shift;  // what is added to a query's index before it is compared with a key's
  int64_t panel;  // the first of its keys' panels
};

// A sequence's queries [index * kQueryBlock, (index + 1) * kQueryBlock).
struct QueryBlock {
  const Sequence* sequence;
  int64_t index;
};

inline int64_t blocks_of(int64_t queries) { return (queries + kQueryBlock - 1) / kQueryBlock; }

// What scores gain by the distance j - i; of the statistics type.
struct DistanceBiases {
  Array bias = {};  // (H, distances), the middle one at distance 0; beyond -reach to reach constant, or never needed
  int64_t distances = 0, reach = 0;
  Array slopes = {};  // (sequences or 1, H)
  int64_t slopes_sequence = 0;

  explicit operator bool() const { return bias || slopes; }
};

// Columns of a matrix of bf16 that lie together where pairs of them are multiplied: a cache line.
inline constexpr int kPanel = 32;

// Whether products of this dtype are made of pairs.
inline bool multiplies_pairs(DType dtype) { return dtype == DType::bf16 && chosen_isa() >= Isa::avx512bf16; }

// Keys or values. Products of pairs take the rows as the caller has them, and for sums over keys `panels`, unless null:
// (Hkv, panels, padded head_dim, kPanel), a panel being kPanel keys of a sequence, transposed, with zeros at their end.
// All other products take the rows in the compute type.
struct Keys {
  Heads rows;
  const BFloat16* panels = nullptr;
};

// What forward and backward share.
struct Attention {
  Heads query;
  Keys key, value;
  int64_t panels;                                 // of all sequences
  int64_t batches, heads, kv_heads, sq, sk, dim;  // of the tensors
  const Sequence* sequences;
  int64_t count;  // of the sequences
  double scale, softcap;
  int64_t left, right;  // -1: no bound
  Dropout dropout;
  ScoreMask mask = {};
  const bool* padding = nullptr;  // (B, Sk), contiguous
  DistanceBiases biases = {};
};

struct AttentionForward {
  Attention call;
  Heads out;
  void* lse;  // (B, H, Sq), statistics type
  const QueryBlock* blocks;
  int64_t block_count;
};

// The (head of the group, query block) pairs of a sequence and key head are dealt out to `parts` tasks. A single one
// writes the gradients of key and value; of several each writes its sums to its own part of `partials`
// (Hkv, parts, 2, B * Sk, padded width). The bias's sums go to `bias_partials` (H, sequences, parts, 2 * reach + 1).
// dmask, of a mask that is not broadcast, holds zeros, and gets the tiles that are not empty.
struct AttentionBackward {
  Attention call;
  Heads out, dout, dquery, dkey, dvalue;
  const void *lse, *dlse;          // (B, H, Sq); dlse may be null
  void *partials, *bias_partials;  // null: a single part; not asked for
  int64_t parts;
  ScoreMask dmask = {};
};

// dkey and dvalue are scale and value_scale times the sum of the parts. keys: B * Sk.
struct KeyGradient {
  const void* partials;
  Heads dkey, dvalue;
  int64_t keys, parts, sk, dim;
  double scale, value_scale;
};

// The gradient of the bias (H, distances): the sums of the parts (H, parts, summed) in the middle, 0 beyond.
struct BiasGradient {
  const void* partials;
  Array dbias;
  int64_t parts, summed, distances;
};

// The gradient of a mask that is broadcast, contiguous, of the shape (sequences, heads, rows, columns), each the mask's
// own size.
struct MaskGradient {
  AttentionBackward backward;
  Array dmask;
  int64_t sequences, heads, rows, columns;

  int64_t row_blocks() const { return rows == 1 ? 1 : blocks_of(rows); }
  int64_t column_blocks() const { return columns == 1 ? 1 : (columns + kKeyBlock - 1) / kKeyBlock; }
};

// (B, H, S, D) of any storage type into contiguous rows of the compute type.
struct PackRows {
  Heads from;
  void* to;
  int64_t heads, rows, dim;
};

// The keys or values of sequences into panels.
struct PackPanels {
  Heads from;
  BFloat16* to;
  const Sequence* sequences;
  int64_t heads, panels, dim;
};

PYLLM_PLAIN_KERNEL(attention_fwd, AttentionForward)        // over H * query blocks
PYLLM_PLAIN_KERNEL(attention_bwd, AttentionBackward)       // over sequences * Hkv * parts
PYLLM_PLAIN_KERNEL(attention_mask_gradient, MaskGradient)  // over blocks of the mask
PYLLM_PAIR_KERNEL(attention_fwd, AttentionForward)
PYLLM_PAIR_KERNEL(attention_bwd, AttentionBackward)
PYLLM_PAIR_KERNEL(attention_mask_gradient, MaskGradient)
PYLLM_PLAIN_KERNEL(attention_key_gradient, KeyGradient)    // over Hkv * B * Sk
PYLLM_PLAIN_KERNEL(attention_bias_gradient, BiasGradient)  // over H
PYLLM_PLAIN_KERNEL(attention_pack, PackRows)               // over B * H * S
PYLLM_PAIR_KERNEL(attention_pack_panels, PackPanels)       // over sequences * Hkv

}  // namespace pyllm
