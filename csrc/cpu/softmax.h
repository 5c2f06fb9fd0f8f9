// Softmax and log-softmax of scaled, masked rows on the CPU: what the binding
// hands over.
#pragma once

#include "cpu/isa.h"
#include "mask_rows.h"

namespace pyllm {

// y = softmax(scale * x + mask) or its logarithm; x and y are contiguous rows
// of `width`.
struct SoftmaxForward {
  Array x, y;
  MaskRows mask;  // with the rows' sizes also where there is no mask
  int64_t width;
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
