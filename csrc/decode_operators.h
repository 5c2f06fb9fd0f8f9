// attention_decode as its schema has it, over the function of a device.
#pragma once

#include <tuple>

#include "attention_tensors.h"
#include "checks.h"

namespace pyllm {

// What decoding is given, checked, with rows that are contiguous, and what it fills.
struct DecodeCall {
  Tensor query, key_cache, value_cache, cache_seqlens;
  OptionalTensor block_table, key, value, cos, sin, distance_bias, slopes;
  double scale, softcap;
  int64_t left, right;
  bool interleaved;
  int64_t batch, heads, queries, dim;  // of query
  int64_t pages, kv_heads, page_size;  // of the caches
  int64_t added;                       // keys, to each sequence
  int64_t capacity;                    // of a sequence, in keys
  Tensor out, lse;

  // What cos and sin (positions, R / 2) must at least have positions for is the device's to check.
  void check_rotary(int64_t positions) const {
    for (const OptionalTensor& table : {cos, sin}) {
      STD_TORCH_CHECK(table.has_value() && table->scalar_type() == statistics_type(query) && table->is_contiguous() &&
                          table->dim() == 2 && table->size(0) >= positions && table->size(1) == cos->size(1) &&
                          2 * table->size(1) <= dim,
                      "pyllm: decoding's cos and sin must be (positions, R / 2), contiguous, of the statistics type");
    }
  }

  DecodeCall(const Tensor& query_in, const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths,
             const OptionalTensor& table, const OptionalTensor& key_in, const OptionalTensor& value_in,
             const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& distance_bias,
             const OptionalTensor& slopes, double scale, double softcap, int64_t left, int64_t right, bool interleaved)
      : query(with_contiguous_rows(query_in)),
        key_cache(key_cache),
        value_cache(value_cache),
        cache_seqlens(as_contiguous(lengths)),
        block_table(as_contiguous(table)),
        key(key_in),
        value(value_in),
        cos(cos),
        sin(sin),
        distance_bias(distance_bias),
        slopes(slopes),
        scale(scale),
        softcap(softcap),
        left(left),
        right(right),
        interleaved(interleaved),
        batch(query.size(0)),
        heads(query.size(1)),
        queries(query.size(2)),
        dim(query.size(3)),
        pages(key_cache.size(0)),
        kv_heads(key_cache.size(1)),
        page_size(key_cache.size(2)),
        added(key.has_value() ? queries : 0),
        capacity(page_size) {
    for (const Tensor& cache : {key_cache, value_cache}) {
      STD_TORCH_CHECK(cache.dim() == 4 && cache.scalar_type() == query.scalar_type() && cache.size(0) == pages &&
                          cache.size(1) == kv_heads && cache.size(2) == page_size && cache.size(3) == dim,
                      "pyllm: decoding's caches must have query's dtype and head_dim, and one shape");
      STD_TORCH_CHECK(cache.stride(3) == 1 || dim == 1, "pyllm: decoding's caches must have contiguous rows");
    }
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && (block_table.has_value() || pages == batch),
                    "pyllm: decoding's caches must have heads that divide query's, and a sequence for each of query's");
    check_rows(cache_seqlens);
    if (block_table.has_value()) {
      check_rows(*block_table);
      STD_TORCH_CHECK(block_table->dim() == 2, "pyllm: decoding's block_table must be (B, pages)");
      capacity *= block_table->size(1);
    }
    for (OptionalTensor* appended : {&key, &value}) {
      STD_TORCH_CHECK(appended->has_value() == key.has_value(),
                      "pyllm: decoding appends both key and value, or neither");
      if (!appended->has_value()) continue;
      const Tensor& t = **appended;
      STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == query.scalar_type() && t.size(0) == batch &&
                          t.size(1) == kv_heads && t.size(2) == queries && t.size(3) == dim,
                      "pyllm: decoding's key and value must be (B, Hkv, Sn, D)");
      *appended = with_contiguous_rows(t);
    }
    out = new_like(query);
    lse = uninitialised(query, {batch, heads, queries}, statistics_type(query));
  }

 private:
  void check_rows(const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() > 0 && t.size(0) == batch,
                    "pyllm: decoding's cache_seqlens and block_table must be int32, a row for each sequence");
  }
};

template <void decode(const DecodeCall&)>
struct DecodeOperators {
  static std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& query, Tensor key_cache, Tensor value_cache,
                                                         const Tensor& cache_seqlens, const OptionalTensor& block_table,
                                                         const OptionalTensor& key, const OptionalTensor& value,
                                                         const OptionalTensor& cos, const OptionalTensor& sin,
                                                         const OptionalTensor& distance_bias,
                                                         const OptionalTensor& slopes, double scale, double softcap,
                                                         int64_t left, int64_t right, bool interleaved) {
    const DecodeCall call(query, key_cache, value_cache, cache_seqlens, block_table, key, value, cos, sin,
                          distance_bias, slopes, scale, softcap, left, right, interleaved);
    decode(call);
    return {call.out, call.lse};
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("attention_decode_fwd", TORCH_BOX(&attention_decode_fwd));
  }
};

}  // namespace pyllm
