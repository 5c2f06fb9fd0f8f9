// Binding of decoding on CUDA.
#include "cuda/attention_decode.cuh"

#include "cuda/place.h"
#include "decode_operators.h"

namespace pyllm {
namespace {

using cuda::narrow;

const float* floats(const OptionalTensor& t) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous(),
                  "pyllm: decoding's biases and rotary must be contiguous matrices in float32");
  return static_cast<const float*>(t->data_ptr());
}

void check_alignment(const Tensor& cache) {
  const int64_t step = 16 / cache.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0 && cache.size(3) % step == 0 &&
                       cache.stride(0) % step == 0 && cache.stride(1) % step == 0 && cache.stride(2) % step == 0;
  STD_TORCH_CHECK(aligned,
                  "pyllm: decoding's caches must have rows that begin at multiples of 16 bytes: choose the "
                  "backend 'triton'");
}

void decode(const DecodeCall& call) {
  cuda::check_dtype(call.query);
  const cuda::Place place({call.query, call.key_cache, call.value_cache, call.cache_seqlens, call.block_table, call.key,
                           call.value, call.cos, call.sin, call.distance_bias, call.slopes});
  if (call.batch == 0 || call.queries == 0 || call.heads == 0) return;
  check_alignment(call.key_cache);
  check_alignment(call.value_cache);
  if (call.cos.has_value()) call.check_rotary(call.capacity);
  const auto lengths = [](const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); };
  cuda::AttentionDecode args{
      .query = heads_of(call.query),
      .key_cache = heads_of(call.key_cache),
      .value_cache = heads_of(call.value_cache),
      .lengths = lengths(call.cache_seqlens),
      .block_table = call.block_table.has_value() ? lengths(*call.block_table) : nullptr,
      .table_row = call.block_table.has_value() ? narrow(call.block_table->size(1), "pages") : 0,
      .page_size = narrow(call.page_size, "keys"),
      .batch = narrow(call.batch, "sequences"),
      .heads = narrow(call.heads, "heads"),
      .kv_heads = narrow(call.kv_heads, "heads"),
      .queries = narrow(call.queries, "queries"),
      .dim = narrow(call.dim, "columns"),
      .added = narrow(call.added, "keys"),
      .rotary = {.cos = floats(call.cos),
                 .sin = floats(call.sin),
                 .pairs = call.cos.has_value() ? narrow(call.cos->size(1), "columns") : 0,
                 .interleaved = call.interleaved},
      .scale = static_cast<float>(call.scale),
      .softcap = static_cast<float>(call.softcap),
      .left = call.left,
      .right = call.right,
      .bias = floats(call.distance_bias),
      .distances = call.distance_bias.has_value() ? narrow(call.distance_bias->size(1), "distances") : 0,
      .slopes = floats(call.slopes),
      .slopes_sequence = call.slopes.has_value() && call.slopes->size(0) > 1 ? narrow(call.heads, "heads") : 0,
      .plan = cuda::plan_decode(call.batch, call.kv_heads, call.heads / call.kv_heads, call.queries,
                                narrow(call.capacity, "keys"), call.left, place.device()),
      .out = heads_of(call.out),
      .lse = static_cast<float*>(call.lse.data_ptr())};
  if (call.key.has_value()) {
    args.key = heads_of(*call.key);
    args.value = heads_of(*call.value);
  }
  Tensor partial_out, partial_lse;
  if (args.plan.shares > 1) {
    const int64_t rows = call.lse.numel();
    partial_out = uninitialised(call.query, {args.plan.shares, rows, call.dim}, ScalarType::Float);
    partial_lse = uninitialised(call.query, {args.plan.shares, rows}, ScalarType::Float);
    args.partial_out = static_cast<float*>(partial_out.data_ptr());
    args.partial_lse = static_cast<float*>(partial_lse.data_ptr());
  }
  cuda::attention_decode(args, place.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CUDA, m) { DecodeOperators<decode>::implement(m); }

}  // namespace pyllm
