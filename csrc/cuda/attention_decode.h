// Decoding on a GPU: what the binding hands over, and the launcher that instances.py has compiled.
#pragma once

#include "cuda/decode_plan.h"
#include "cuda/ptx.cuh"
#include "heads.h"

namespace pyllm::cuda {

// cos and sin (positions, pairs); a pair is two neighbours, or columns c and c + pairs.
struct Rotary {
  const float *cos = nullptr, *sin = nullptr;
  int pairs = 0;  // 0: nothing turns
  bool interleaved = false;
};

struct AttentionDecode {
  Heads query, key_cache, value_cache;
  Heads key = {}, value = {};            // what is appended, or null
  const int32_t* lengths;                // (B,): keys of each sequence before the call
  const int32_t* block_table = nullptr;  // (B, table_row), the page of each page_size keys; null: a sequence is a page
  int table_row = 0, page_size = 0;
  int batch, heads, kv_heads, queries, dim;
  int added;  // keys, to each sequence: 0, or one for each query
  Rotary rotary = {};
  float scale, softcap;
  int64_t left, right;          // -1: no bound
  const float* bias = nullptr;  // (H, distances), the middle one at distance 0
  int distances = 0;
  const float* slopes = nullptr;  // (B or 1, H)
  int slopes_sequence = 0;
  DecodePlan plan;
  float *partial_out = nullptr, *partial_lse = nullptr;  // (shares, B, H, queries, dim) and (shares, B, H, queries)
  Heads out;
  float* lse;  // (B, H, queries)

  PYLLM_EVERYWHERE int group() const { return heads / kv_heads; }
};

// T: float, bf16 or f16; D: head_dim, rounded up.
template <class T, int D>
void decode_split(const AttentionDecode& args, Stream stream);

}  // namespace pyllm::cuda
