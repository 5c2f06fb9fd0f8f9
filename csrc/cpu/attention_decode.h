// Decoding on the CPU: what the binding hands over.
#pragma once

#include "cpu/attention.h"

namespace pyllm {

// One sequence of a batch: how many keys it has with the new ones, and which pieces they are read in.
struct DecodeSequence {
  int64_t keys, first_piece = 0, pieces = 0;
};

// Keys [begin, end) of a sequence.
struct DecodePiece {
  int64_t sequence, begin, end;
};

// cos and sin (positions, pairs) of the statistics type, or null; a pair is two neighbours, or columns c and c + pairs.
struct Rotary {
  Array cos = {}, sin = {};
  int64_t pairs = 0;
  bool interleaved = false;
};

struct AttentionDecode {
  Heads query, key_cache, value_cache;
  Heads key = {}, value = {};            // what is appended, or null
  const int32_t* block_table = nullptr;  // (B, table_row), the page of each page_size keys; null: a sequence is a page
  int64_t table_row, page_size;
  int64_t heads, kv_heads, added, dim;  // added: the queries of a sequence, its last positions
  Rotary rotary = {};
  double scale, softcap;
  int64_t left, right;  // -1: no bound
  DistanceBiases biases = {};
  const DecodeSequence* sequences = nullptr;
  const DecodePiece* pieces = nullptr;
  void *partial_out = nullptr, *partial_lse = nullptr;  // (pieces, H, added, padded width) and (pieces, H, added)
  Heads out;
  void* lse;  // (B, H, added), statistics type
};

PYLLM_PLAIN_KERNEL(attention_decode_append, AttentionDecode)  // over B * Hkv * added
PYLLM_PLAIN_KERNEL(attention_decode, AttentionDecode)         // over pieces * Hkv
PYLLM_PAIR_KERNEL(attention_decode, AttentionDecode)
PYLLM_PLAIN_KERNEL(attention_decode_merge, AttentionDecode)  // over B * H * added

}  // namespace pyllm
