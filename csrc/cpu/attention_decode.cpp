// Binding of decoding on the CPU.
#include "cpu/attention_decode.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/attention_binding.h"

namespace pyllm {
namespace {

// Keys of a piece for which a task of its own pays.
constexpr int64_t kLeastPiece = 512;
// Where pieces begin: at a page, whatever its size, if the first does.
constexpr int64_t kPieceUnit = 16;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

const int32_t* integers(const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() > 0 && t.size(0) == rows,
                  "pyllm: decoding's cache_seqlens and block_table must be contiguous int32, a row for each sequence");
  return static_cast<const int32_t*>(t.data_ptr());
}

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

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& query_in, Tensor key_cache, Tensor value_cache,
                                                const Tensor& cache_seqlens_in, const OptionalTensor& block_table_in,
                                                const OptionalTensor& key_in, const OptionalTensor& value_in,
                                                const OptionalTensor& cos, const OptionalTensor& sin,
                                                const OptionalTensor& distance_bias, const OptionalTensor& slopes,
                                                double scale, double softcap, int64_t left, int64_t right,
                                                bool interleaved) {
  const Tensor query = with_contiguous_rows(query_in), cache_seqlens = as_contiguous(cache_seqlens_in);
  const OptionalTensor block_table = as_contiguous(block_table_in);
  const int64_t batch = query.size(0), heads = query.size(1), added = query.size(2), dim = query.size(3);
  const int64_t pages = key_cache.size(0), kv_heads = key_cache.size(1), page_size = key_cache.size(2);
  for (const Tensor& cache : {key_cache, value_cache}) {
    STD_TORCH_CHECK(cache.dim() == 4 && cache.scalar_type() == query.scalar_type() && cache.size(0) == pages &&
                        cache.size(1) == kv_heads && cache.size(2) == page_size && cache.size(3) == dim,
                    "pyllm: decoding's caches must have query's dtype and head_dim, and one shape");
    STD_TORCH_CHECK(cache.stride(3) == 1 || dim == 1, "pyllm: decoding's caches must have contiguous rows");
  }
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && (block_table.has_value() || pages == batch),
                  "pyllm: decoding's caches must have heads that divide query's, and a sequence for each of query's");
  OptionalTensor key = key_in, value = value_in;
  for (OptionalTensor* appended : {&key, &value}) {
    STD_TORCH_CHECK(appended->has_value() == key.has_value(), "pyllm: decoding appends both key and value, or neither");
    if (!appended->has_value()) continue;
    const Tensor& t = **appended;
    STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == query.scalar_type() && t.size(0) == batch &&
                        t.size(1) == kv_heads && t.size(2) == added && t.size(3) == dim,
                    "pyllm: decoding's key and value must be (B, Hkv, Sn, D)");
    *appended = with_contiguous_rows(t);
  }

  Tensor out = new_like(query);
  const ScalarType statistics = statistics_type(query);
  Tensor lse = uninitialised(query, {batch, heads, added}, statistics);
  AttentionDecode args{.query = heads_of(query),
                       .key_cache = heads_of(key_cache),
                       .value_cache = heads_of(value_cache),
                       .table_row = block_table.has_value() ? block_table->size(1) : 1,
                       .page_size = page_size,
                       .heads = heads,
                       .kv_heads = kv_heads,
                       .added = added,
                       .dim = dim,
                       .scale = scale,
                       .softcap = softcap,
                       .left = left,
                       .right = right,
                       .out = heads_of(out),
                       .lse = lse.data_ptr()};
  if (key.has_value()) {
    args.key = heads_of(*key);
    args.value = heads_of(*value);
  }
  if (block_table.has_value()) args.block_table = integers(*block_table, batch);
  const int32_t* lengths = integers(cache_seqlens, batch);
  const int64_t appended = key.has_value() ? added : 0;
  check_places(args, lengths, batch, pages, appended);
  std::vector<DecodeSequence> sequences;
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    sequences.push_back({.keys = lengths[i] + appended});
    longest = std::max(longest, sequences.back().keys);
  }
  if (cos.has_value()) {
    for (const OptionalTensor& table : {cos, sin}) {
      STD_TORCH_CHECK(table.has_value() && table->scalar_type() == statistics && table->is_contiguous() &&
                          table->dim() == 2 && table->size(0) >= longest && table->size(1) == cos->size(1) &&
                          2 * table->size(1) <= dim,
                      "pyllm: decoding's cos and sin must be (positions, R / 2), contiguous, of the statistics type");
    }
    args.rotary = {array(cos), array(sin), cos->size(1), interleaved};
  }
  args.biases = distance_biases(query, distance_bias, slopes, longest + added);
  const std::vector<DecodePiece> pieces = pieces_of(args, sequences);
  const int64_t piece_count = static_cast<int64_t>(pieces.size());
  Tensor partial_out = uninitialised(query, {piece_count, heads, added, padded_width(query)}, statistics);
  Tensor partial_lse = uninitialised(query, {piece_count, heads, added}, statistics);
  args.sequences = sequences.data();
  args.pieces = pieces.data();
  args.partial_out = partial_out.data_ptr();
  args.partial_lse = partial_lse.data_ptr();

  if (key.has_value()) {
    const int64_t rows = batch * kv_heads * added;
    run_tasks(pick_attention_decode_append(), args, rows, rows * dim);
  }
  int64_t keys = 0;
  for (const DecodePiece& piece : pieces) keys += piece.end - piece.begin;
  const bool pairs = multiplies_pairs(args.query.data.dtype);
  run_tasks(pairs ? pick_attention_decode_pairs() : pick_attention_decode(), args, piece_count * kv_heads,
            keys * kv_heads * dim);
  run_tasks(pick_attention_decode_merge(), args, lse.numel(), partial_out.numel());
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) { m.impl("attention_decode_fwd", TORCH_BOX(&attention_decode_fwd)); }

}  // namespace pyllm
