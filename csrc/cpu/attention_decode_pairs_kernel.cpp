// Decoding's products on pairs of bf16, where several queries share the keys, so that the reading of memory is all of
// the cost there, too. Queries and weights are rounded to bf16.
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
  // A single query's products in fp32 wait for memory already.
  const bool single = call.heads / call.kv_heads * call.added == 1;
  with_tiles([&] {
    for (int64_t task = begin; task < end; ++task)
      single ? decode<BFloat16, PlainDecode<BFloat16>>(call, task) : decode<BFloat16, PairDecode>(call, task);
  });
}

}  // namespace pyllm::PYLLM_ISA
