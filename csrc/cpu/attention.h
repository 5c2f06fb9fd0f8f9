// Attention on the CPU: what the binding hands over.
#pragma once

#include "cpu/dropout.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace pyllm {

// Queries and keys of a tile of scores.
inline constexpr int kQueryBlock = 64;
inline constexpr int kKeyBlock = 256;

// A row of head_dim elements in the kernels' own buffers is padded to a multiple of this many bytes.
inline constexpr int64_t kRowBytes = 64;

// (B, H, S, D) with strides in elements; the last dimension is contiguous.
struct Heads {
  Array data;
  int64_t batch = 0, head = 0, row = 0;
  template <class T>
  T* at(int64_t b, int64_t h, int64_t s) const {
    return data.as<T>() + b * batch + h * head + s * row;
  }
};

// (B, H, Sq, Sk), strides 0 where the mask has size 1; the column's is 0 or 1.
struct ScoreMask {
  Array data;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// What forward and backward share. key and value are in the compute type; value's rows (in backward, key's too) can be
// read up to their padded width.
struct Attention {
  Heads query, key, value;
  ScoreMask mask;
  const bool* padding;  // (B, Sk), contiguous, or null
  int64_t batches, heads, kv_heads, sq, sk, dim;
  double scale;
  int64_t left, right;  // -1: no bound
  int64_t shift;        // what is added to a query's index before it is compared with a key's
  Dropout dropout;

  int64_t blocks() const { return (sq + kQueryBlock - 1) / kQueryBlock; }
};

struct AttentionForward {
  Attention call;
  Heads out;
  void* lse;  // (B, H, Sq), statistics type
};

// The (head of the group, query block) pairs of a key head are dealt out to `parts` tasks; each writes its sums of the
// gradients of key and value, (2, Sk, padded width), to its own part of `partials` (B, Hkv, parts, 2, Sk, width).
struct AttentionBackward {
  Attention call;
  Heads out, dout, dquery;
  const void *lse, *dlse;  // (B, H, Sq); dlse may be null
  void* partials;
  int64_t parts;
};

// dkey = scale * sum of the parts; dvalue = sum of the parts.
struct KeyGradient {
  const void* partials;
  Heads dkey, dvalue;
  int64_t kv_heads, parts, sk, dim;
  double scale;
};

// The gradient of the mask, contiguous, of the shape (batches, heads, rows, columns), each the mask's own size.
struct MaskGradient {
  AttentionBackward backward;
  Array dmask;
  int64_t batches, heads, rows, columns;

  int64_t row_blocks() const { return rows == 1 ? 1 : (rows + kQueryBlock - 1) / kQueryBlock; }
  int64_t column_blocks() const { return columns == 1 ? 1 : (columns + kKeyBlock - 1) / kKeyBlock; }
};

// (B, H, S, D) of any storage type into contiguous padded rows of the compute type.
struct PackRows {
  Heads from;
  void* to;
  int64_t heads, rows, dim;
};

PYLLM_KERNEL(attention_fwd, AttentionForward)        // over B * H * query blocks
PYLLM_KERNEL(attention_bwd, AttentionBackward)       // over B * Hkv * parts
PYLLM_KERNEL(attention_key_gradient, KeyGradient)    // over B * Hkv * Sk
PYLLM_KERNEL(attention_mask_gradient, MaskGradient)  // over blocks of the mask
PYLLM_KERNEL(attention_pack, PackRows)               // over B * H * S

}  // namespace pyllm
