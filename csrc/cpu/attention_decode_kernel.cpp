// Decoding's products in the compute type, and what is around the pass of attention_decode_passes.h: the new keys and
// values, the merging of pieces.
#include "cpu/attention_decode.h"

#include "cpu/attention_decode_passes.h"

namespace pyllm::PYLLM_ISA {

namespace {

template <class T>
void append(const AttentionDecode& call, int64_t index) {
  using C = Compute<T>;
  const int64_t row = index % call.added, key_head = index / call.added % call.kv_heads;
  const int64_t sequence = index / call.added / call.kv_heads;
  const int64_t position = call.sequences[sequence].keys - call.added + row;
  C* key = scratch<C, 0>(call.dim + kLanes<C>);
  convert_row(call.key.at<const T>(sequence, key_head, row), call.dim, key, call.dim);
  rotate(call.rotary, position, key);
  T* to = cached<T>(call, call.key_cache, sequence, key_head, position);
  for_vectors<C>(call.dim, [&](int64_t i, int count) { store(to + i, load(key + i, count), count); });
  std::memcpy(cached<T>(call, call.value_cache, sequence, key_head, position),
              call.value.at<const T>(sequence, key_head, row), call.dim * sizeof(T));
}

template <class T>
void merge(const AttentionDecode& call, int64_t index) {
  using C = Compute<T>;
  const int64_t rows = call.heads * call.added, row = index % rows, width = padded<C>(call.dim);
  const DecodeSequence& sequence = call.sequences[index / rows];
  const C* out = static_cast<const C*>(call.partial_out) + (sequence.first_piece * rows + row) * width;
  const C* lse = static_cast<const C*>(call.partial_lse) + sequence.first_piece * rows + row;
  C peak = -kInfinity<C>, total = 0;
  for (int64_t i = 0; i < sequence.pieces; ++i) peak = lse[i * rows] > peak ? lse[i * rows] : peak;
  const C shift = peak == -kInfinity<C> ? 0 : peak;
  for (int64_t i = 0; i < sequence.pieces; ++i) total += std::exp(lse[i * rows] - shift);
  static_cast<C*>(call.lse)[index] = total == 0 ? -kInfinity<C> : shift + std::log(total);
  const C divisor = total == 0 ? 1 : total;
  T* to = call.out.at<T>(index / rows, row / call.added, row % call.added);
  for_vectors<C>(call.dim, [&](int64_t d, int count) {
    Vec<C> merged{};
    for (int64_t i = 0; i < sequence.pieces; ++i)
      merged += load(out + i * rows * width + d) * (std::exp(lse[i * rows] - shift) / divisor);
    store(to + d, merged, count);
  });
}

}  // namespace

void attention_decode_append(const AttentionDecode& call, int64_t begin, int64_t end) {
  visit_dtype(call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) append<decltype(type)>(call, task);
  });
}

void attention_decode(const AttentionDecode& call, int64_t begin, int64_t end) {
  visit_dtype(call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) decode<decltype(type), PlainDecode<decltype(type)>>(call, task);
  });
}

void attention_decode_merge(const AttentionDecode& call, int64_t begin, int64_t end) {
  visit_dtype(call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) merge<decltype(type)>(call, task);
  });
}

}  // namespace pyllm::PYLLM_ISA
