// The rows of a softmax's mask, without a torch header.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyllm {

// Under rows of dimensions sizes[0 ... rank - 1], outermost first, with the mask's strides in elements; last_stride,
// from column to column, is 0 or 1. No data: no mask.
struct MaskRows {
  static constexpr int kMaxRank = 16;
  Array data;
  int64_t last_stride = 0;
  int rank = 0;
  int64_t sizes[kMaxRank] = {}, strides[kMaxRank] = {};
};

}  // namespace pyllm
