// Decoding for the host model: its host function, and how it deals out queries and keys, for ctypes.
#define PYLLM_CUDA_HEAD_DIMS "32,64,96,128,192,256"
#include "cuda/attention_decode.cuh"
#include "cuda/attention_decode_split.cuh"
#include "cuda_host/executor.h"

using namespace pyllm;

extern "C" {

// numbers: table_row, page_size, batch, heads, kv_heads, queries, dim, added, pairs, interleaved, left, right,
// distances, slopes_sequence, rows, tiles, shares; then the strides of query, key_cache, value_cache, key, value and
// out.
const char* attention_decode(void* query, int64_t dtype, void* key_cache, void* value_cache, void* key, void* value,
                             const int32_t* lengths, const int32_t* block_table, const float* cos, const float* sin,
                             const float* bias, const float* slopes, const int64_t* numbers, double scale,
                             double softcap, float* partial_out, float* partial_lse, void* out, float* lse) {
  return cuda_host::reporting([&] {
    const int64_t *next = numbers, *strides = numbers + 17;
    const auto n = [&] { return static_cast<int>(*next++); };
    const auto h = [&](void* data) {
      const Heads heads{{data, static_cast<DType>(dtype)}, strides[0], strides[1], strides[2]};
      strides += 3;
      return heads;
    };
    cuda::AttentionDecode args{.query = h(query),
                               .key_cache = h(key_cache),
                               .value_cache = h(value_cache),
                               .key = h(key),
                               .value = h(value),
                               .lengths = lengths,
                               .block_table = block_table,
                               .table_row = n(),
                               .page_size = n(),
                               .batch = n(),
                               .heads = n(),
                               .kv_heads = n(),
                               .queries = n(),
                               .dim = n(),
                               .added = n(),
                               .rotary = {.cos = cos, .sin = sin, .pairs = n(), .interleaved = n() != 0},
                               .scale = static_cast<float>(scale),
                               .softcap = static_cast<float>(softcap),
                               .left = n(),
                               .right = n(),
                               .bias = bias,
                               .distances = n(),
                               .slopes = slopes,
                               .slopes_sequence = n(),
                               .plan = {.rows = n(), .tiles = n(), .shares = n()},
                               .partial_out = partial_out,
                               .partial_lse = partial_lse,
                               .out = h(out),
                               .lse = lse};
    cuda::attention_decode(args, nullptr);
  });
}

// {rows, tiles, shares}
void decode_plan(int64_t* out, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t capacity,
                 int64_t left, int64_t processors) {
  const cuda::Device device{.processors = static_cast<int>(processors)};
  const cuda::DecodePlan plan = cuda::plan_decode(batch, kv_heads, group, queries, capacity, left, device);
  out[0] = plan.rows;
  out[1] = plan.tiles;
  out[2] = plan.shares;
}

// {lanes, chunks, groups, each, keys}
void decode_tile(int64_t* out, int64_t head_dim, int64_t bytes, int64_t rows) {
  const cuda::DecodeTile tile =
      cuda::decode_tile(static_cast<int>(head_dim), static_cast<int>(bytes), static_cast<int>(rows));
  const int64_t told[] = {tile.lanes, tile.chunks, tile.groups, tile.each, tile.keys};
  std::copy_n(told, 5, out);
}

// {begin, end}
void share_of_keys(int64_t* out, int64_t total, int64_t queries, int64_t left, int64_t share, int64_t shares,
                   int64_t unit) {
  const cuda::KeyRange window = cuda::keys_in_window(static_cast<int>(total), static_cast<int>(queries), left);
  const cuda::KeyRange keys =
      cuda::share_of_keys(window, static_cast<int>(share), static_cast<int>(shares), static_cast<int>(unit));
  out[0] = keys.begin;
  out[1] = keys.end;
}

}  // extern "C"
