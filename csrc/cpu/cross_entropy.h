// Cross-entropy of logits and class indices on the CPU: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dtype.h"

namespace pyllm {

// loss[i] of contiguous rows of `width` logits, and scale * its gradient, which may take the logits' place.
struct CrossEntropyForward {
  Array logits, gradient;  // no gradient: none is computed
  const int64_t* target;
  Array weight, scale, loss;  // statistics type; weight of each class, or none; scale has one element, or is 1
  int64_t width, ignore_index;
  double weight_total, label_smoothing, z_loss;
};

// Merges the columns [first, first + width) of the vocabulary into each row's largest logit, sum of exponentials
// relative to it, logit of the target, and sum of logits: statistics[4][rows].
struct CrossEntropyShardForward {
  Array logits, statistics;
  const int64_t* target;
  int64_t rows, width, first;
};

// logits = a exp(logits - shift) - c, and - b at the target; coefficients[4][rows] are shift, a, b and c.
struct CrossEntropyShardBackward {
  Array logits, coefficients;
  const int64_t* target;
  int64_t rows, width, first;
};

// gradient *= factor (statistics type), one of each row, or one of all if it is `shared`.
struct CrossEntropyBackward {
  Array gradient, factor;
  int64_t width;
  bool shared;
};

PYLLM_KERNEL(cross_entropy_fwd, CrossEntropyForward)              // over rows
PYLLM_KERNEL(cross_entropy_shard_fwd, CrossEntropyShardForward)   // over rows
PYLLM_KERNEL(cross_entropy_shard_bwd, CrossEntropyShardBackward)  // over rows
PYLLM_KERNEL(cross_entropy_bwd, CrossEntropyBackward)             // over rows

}  // namespace pyllm
