// Binding of decoding on the CPU.
#include "cpu/attention_decode.h"

#include <algorithm>
#include <vector>

#include "cpu/attention_binding.h"
#include "decode_operators.h"

namespace pyllm {
namespace {

// Keys of a piece for which a task of its own pays.
constexpr int64_t kLeastPiece = 512;
// Where pieces begin: at a page, whatever its size, if the first does.
constexpr int64_t kPieceUnit = 16;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

const int32_t* integers(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

// Raises unless each sequence's keys, `added` more than in the cache, have their place in it.
void check_places(const AttentionDecode& args, const int32_t* lengths, int64_t batch, int64_t pages, int64_t added) {
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    const int64_t keys = lengths[sequence] + added;
    STD_TORCH_CHECK(lengths[sequence] >= 0 && keys <= args.table_row * args.page_size,
                    "pyllm: decoding's cache_seqlens must leave room in the cache for what is added");
    if (args.block_table == nullptr) continue;
    const int32_t* table = args.block_table + sequence * args.table_row;
    STD_TORCH_CHECK(
        std::all_of(table, table + divided(keys, args.page_size), [&](int32_t p) { return p >= 0 && p < pages; }),
        "pyllm: decoding's block_table must name pages of the cache");
  }
}

// Deals the keys that each sequence's queries see out to pieces: long ones, but enough of them for all threads.
std::vector<DecodePiece> pieces_of(const AttentionDecode& args, std::vector<DecodeSequence>& sequences) {
  const auto first_key = [&](const DecodeSequence& sequence) {
    const int64_t first = args.left < 0 ? 0 : sequence.keys - args.added - args.left;
    return std::max<int64_t>(0, first) / kPieceUnit * kPieceUnit;
  };
  int64_t all = 0;
  for (const DecodeSequence& sequence : sequences) all += (sequence.keys - first_key(sequence)) * args.kv_heads;
  const int64_t longest = std::max(kLeastPiece, divided(all, 4 * torch::stable::get_num_threads()));
  std::vector<DecodePiece> pieces;
  for (DecodeSequence& sequence : sequences) {
    const int64_t first = first_key(sequence), keys = sequence.keys - first;
    const int64_t size = keys > 0 ? divided(divided(keys, divided(keys, longest)), kPieceUnit) * kPieceUnit : 1;
    sequence.first_piece = static_cast<int64_t>(pieces.size());
    sequence.pieces = divided(keys, size);
    for (int64_t begin = first; begin < sequence.keys; begin += size)
      pieces.push_back({&sequence - sequences.data(), begin, std::min(begin + size, sequence.keys)});
  }
  return pieces;
}

void decode(const DecodeCall& call) {
  AttentionDecode args{.query = heads_of(call.query),
                       .key_cache = heads_of(call.key_cache),
                       .value_cache = heads_of(call.value_cache),
                       .table_row = call.block_table.has_value() ? call.block_table->size(1) : 1,
                       .page_size = call.page_size,
                       .heads = call.heads,
                       .kv_heads = call.kv_heads,
                       .added = call.queries,
                       .dim = call.dim,
                       .scale = call.scale,
                       .softcap = call.softcap,
                       .left = call.left,
                       .right = call.right,
                       .out = heads_of(call.out),
                       .lse = call.lse.data_ptr()};
  if (call.key.has_value()) {
    args.key = heads_of(*call.key);
    args.value = heads_of(*call.value);
  }
  if (call.block_table.has_value()) args.block_table = integers(*call.block_table);
  const int32_t* lengths = integers(call.cache_seqlens);
  check_places(args, lengths, call.batch, call.pages, call.added);
  std::vector<DecodeSequence> sequences;
  int64_t longest = 0;
  for (int64_t i = 0; i < call.batch; ++i) {
    sequences.push_back({.keys = lengths[i] + call.added});
    longest = std::max(longest, sequences.back().keys);
  }
  if (call.cos.has_value()) {
    call.check_rotary(longest);
    args.rotary = {array(call.cos), array(call.sin), call.cos->size(1), call.interleaved};
  }
  args.biases = distance_biases(call.query, call.distance_bias, call.slopes, longest + call.queries);
  const std::vector<DecodePiece> pieces = pieces_of(args, sequences);
  const int64_t piece_count = static_cast<int64_t>(pieces.size());
  const ScalarType statistics = statistics_type(call.query);
  Tensor partial_out =
      uninitialised(call.query, {piece_count, call.heads, call.queries, padded_width(call.query)}, statistics);
  Tensor partial_lse = uninitialised(call.query, {piece_count, call.heads, call.queries}, statistics);
  args.sequences = sequences.data();
  args.pieces = pieces.data();
  args.partial_out = partial_out.data_ptr();
  args.partial_lse = partial_lse.data_ptr();

  if (call.key.has_value()) {
    const int64_t rows = call.batch * call.kv_heads * call.added;
    run_tasks(pick_attention_decode_append(), args, rows, rows * call.dim);
  }
  int64_t keys = 0;
  for (const DecodePiece& piece : pieces) keys += piece.end - piece.begin;
  run_tasks(pick_attention_decode(), args, piece_count * call.kv_heads, keys * call.kv_heads * call.dim);
  run_tasks(pick_attention_decode_merge(), args, call.lse.numel(), partial_out.numel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) { DecodeOperators<decode>::implement(m); }

}  // namespace pyllm
