// Softmax and log-softmax of scaled, masked rows on the CPU: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dtype.h"

namespace pyllm {

inline constexpr int kMaxRank = 16;

// y = softmax(scale * x + mask) or its logarithm; x and y are contiguous rows of `width`. The rows' dimensions are
// sizes[0..rank-1], outermost first, with the mask's strides in elements; its last stride is 0 or 1.
struct SoftmaxForward {
  Array x, y, mask;
  int64_t width, mask_last_stride;
  int rank;
  int64_t sizes[kMaxRank], mask_strides[kMaxRank];
  double scale;
  bool is_causal, log, past_caches;
};

// dx = scale * (gradient of the scores).
struct SoftmaxBackward {
  Array dy, y, dx;
  int64_t width;
  double scale;
  bool log, past_caches;
};

PYLLM_KERNEL(softmax_fwd, SoftmaxForward)   // over rows
PYLLM_KERNEL(softmax_bwd, SoftmaxBackward)  // over rows

}  // namespace pyllm
