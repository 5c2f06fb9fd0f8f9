// Decoding's products on pairs of bf16, where many queries share the keys, so that the reading of memory is all of the
// cost there, too. Queries and weights are rounded to bf16.
//
// Measured on 2 cores of an AMD EPYC (Zen 5), AVX-512-BF16, 8 sequences of 4096 keys, head_dim 128, 2 key heads: with
// 16 queries to a key head 2.35 ms in place of 2.55; with 8 it would be 4.3 in place of 3.2.
#include "cpu/attention_decode.h"

#include "cpu/attention_decode_passes.h"
#include "cpu/pairs.h"

namespace pyllm::PYLLM_ISA {

namespace {

// As PlainDecode.
class PairDecode {
 public:
  PairDecode(int rows, int64_t dim, const float* query)
      : rows_(rows),
        dim_(dim),
        width_(padded<float>(dim)),
        depth_(whole_panels(dim)),
        query_(scratch<BFloat16, 0>(rows * depth_)) {
    for (int row = 0; row < rows; ++row) narrow_row(query + row * width_, dim, query_ + row * depth_);
  }

  void multiply_keys(const BFloat16* keys, int64_t stride, int64_t count, float scale, float* scores) const {
    constexpr int lanes = kLanes<float>;
    uint32_t* columns = scratch<uint32_t, 0>(depth_ / 2 * lanes);
    for (int64_t j = 0; j < count; j += lanes) {
      for (int64_t d = 0; d < dim_; d += kPanel) {
        Vec<float> square[lanes];
        for (int i = 0; i < lanes; ++i) {
          const int64_t key = j + i < count ? j + i : count - 1;
          square[i] = bit_cast<Vec<float>>(load_words(keys + key * stride + d, dim_ - d));
        }
        transpose<float>(square);
        for (int i = 0; i < lanes; ++i) store(columns + (d / 2 + i) * lanes, bit_cast<Vec<uint32_t>>(square[i]));
      }
      multiply_pairs(rows_, lanes, dim_, {query_, depth_}, columns, lanes, scores + j, kScoreRow,
                     {.set = true, .alpha = scale});
    }
  }

  void multiply_values(const float* weights, const BFloat16* values, int64_t stride, int64_t count,
                       const float* rescale, float* out) const {
    BFloat16* narrowed = scratch<BFloat16, 1>(rows_ * kTileKeys);
    uint32_t* pairs = scratch<uint32_t, 1>(kTileKeys / 2 * width_);
    for (int row = 0; row < rows_; ++row) narrow_row(weights + row * kScoreRow, count, narrowed + row * kTileKeys);
    pair_rows(values, stride, count, dim_, width_, pairs);
    multiply_pairs(rows_, width_, count, {narrowed, kTileKeys}, pairs, width_, out, width_, {.beta = rescale});
  }

 private:
  int rows_;
  int64_t dim_, width_, depth_;
  BFloat16* query_;
};

}  // namespace

void attention_decode(const AttentionDecode& call, int64_t begin, int64_t end) {
  // Of fewer queries the products in fp32 take less time than pairing the keys and values.
  constexpr int64_t least = 16;
  if (call.heads / call.kv_heads * call.added < least) {
    for (int64_t task = begin; task < end; ++task) decode<BFloat16, PlainDecode<BFloat16>>(call, task);
  } else {
    with_tiles([&] {
      for (int64_t task = begin; task < end; ++task) decode<BFloat16, PairDecode>(call, task);
    });
  }
}

}  // namespace pyllm::PYLLM_ISA
