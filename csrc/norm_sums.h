// The sums over rows that a norm's backward makes beside its rows' gradients.
#pragma once

#include "dtype.h"

namespace pyllm {

// The place of each of them, also among a column's partial sums.
enum { kWeightSum, kBiasSum, kBranchSum, kColumnSums };

// The gradients of weight, bias and x_bias; without data where one is not wanted.
struct ColumnGradients {
  Array at[kColumnSums];
};

}  // namespace pyllm
