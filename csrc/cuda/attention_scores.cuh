// What attention's kernels share: which sequence and tile is a block's, which keys are to be ignored, and what a score
// is.
#pragma once

#include "cuda/attention.h"
#include "cuda/attention_tile.cuh"
#include "cuda/philox.cuh"

namespace pyllm::cuda {

__device__ inline Sequence sequence_of(const Attention& call, int index) {
  Sequence s{.index = index, .batch = index, .query = 0, .key = 0, .sq = call.sq, .sk = call.sk, .shift = 0};
  if (call.cu_q != nullptr) {
    s.batch = 0;
    s.query = load(call.cu_q + index);
    s.key = load(call.cu_k + index);
    const bool last = index == call.count;  // behind the sequences: the caller empties a side of it
    s.sq = (last ? call.sq : load(call.cu_q + index + 1)) - s.query;
    s.sk = (last ? call.sk : load(call.cu_k + index + 1)) - s.key;
  }
  if (call.bottom_right) s.shift = s.sk - s.sq;
  return s;
}

// That of row `row` of batch `batch`; of packed ones the last that begins there or before.
__device__ inline Sequence sequence_at(const Attention& call, int batch, int row) {
  if (call.cu_q == nullptr) return sequence_of(call, batch);
  int low = 0, high = call.count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (load(call.cu_q + middle) <= row ? low : high) = middle;
  }
  return sequence_of(call, low);
}

// bounds: null, or of the `count` packed sequences, behind which there is one more. length, size: rows of a sequence
// that is not packed, and of a tile.
__device__ inline Slot slot_at(int slot, const int32_t* bounds, int count, int length, int size) {
  if (bounds != nullptr) return packed_slot(slot, count + 1, size, [&](int i) { return load(bounds + i); });
  const int tiles = (length + size - 1) / size;
  return {slot / tiles, slot % tiles};
}

// Where a query's number is in (B, H, Sq).
__device__ inline int64_t row_index(const Attention& call, const Sequence& s, int head, int query) {
  return (int64_t{s.batch} * call.heads + head) * call.sq + s.query + query;
}

// Bit j says whether key tile + j is to be ignored. For a whole warp.
__device__ inline uint64_t ignored_keys(const Attention& call, const Sequence& s, int tile) {
  if (call.padding == nullptr) return 0;
  const auto* padding = reinterpret_cast<const uint8_t*>(call.padding) + int64_t{s.batch} * call.sk + s.key;
  const auto ignored = [&](int key) { return key >= s.sk || load(padding + key) != 0; };
  const uint64_t low = vote_ballot(ignored(tile + lane_id()));
  return uint64_t{vote_ballot(ignored(tile + kWarp + lane_id()))} << 32 | low;
}

// Bit j says whether key tile + j is outside of a range.
__device__ inline uint64_t outside(const Range& range, int tile) {
  const int begin = max(0, range.begin - tile), end = range.end - tile;
  const uint64_t before = begin < 64 ? (uint64_t{1} << begin) - 1 : ~uint64_t{0};
  return end <= 0 ? ~uint64_t{0} : end < 64 ? before | ~uint64_t{0} << end : before;
}

inline constexpr float kLowestAdded = -2.3e38f;  // which is finite in powers of two

// Scores of one sequence and head with everything that is added to them.
template <class T>
class Scoring {
 public:
  __device__ Scoring(const Attention& call, const Sequence& s, int head)
      : call_(call),
        mask_(s.index * call.mask.sequence + head * call.mask.head),
        reach_(call.distances / 2),
        shift_(s.shift),
        slope_(call.slopes == nullptr ? 0 : load(call.slopes + s.index * call.slopes_sequence + head)),
        bias_(call.bias == nullptr ? nullptr : call.bias + int64_t{head} * call.distances + reach_) {}

  // In powers of two, from the product of query i and key j, which exist; and the derivative of the capped score.
  __device__ float operator()(float product, int i, int j, float& derivative) const {
    float score = product * call_.scale;
    derivative = 1;
    if (call_.softcap != 0) {
      const float tanh = 1 - 2 * reciprocal_approx(1 + exp2_approx(2 * kLog2E / call_.softcap * score));
      score = call_.softcap * tanh;
      derivative = 1 - tanh * tanh;
    }
    if (call_.mask.data) {
      const float added = mask(i, j);
      score = added == -kInfinity ? added : score + (added < kLowestAdded ? kLowestAdded : added);  // a NaN stays one
    }
    const int distance = j - i - shift_;
    if (bias_ != nullptr) score += load(bias_ + max(-reach_, min(reach_, distance)));
    return (score - slope_ * static_cast<float>(abs(distance))) * kLog2E;
  }

 private:
  __device__ float mask(int i, int j) const {
    const Array& data = call_.mask.data;
    const int64_t at = mask_ + i * call_.mask.row + j * call_.mask.column;
    if (data.dtype == DType::boolean) return load(data.as<const uint8_t>() + at) != 0 ? 0.0f : -kInfinity;
    return data.dtype == DType::f32 ? load(data.as<const float>() + at) : to_float(load(data.as<const T>() + at));
  }

  const Attention& call_;
  int64_t mask_;
  int reach_, shift_;
  float slope_;
  const float* bias_;  // of distance 0
};

}  // namespace pyllm::cuda
