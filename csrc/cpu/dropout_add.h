// dropout_add on the CPU: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dropout.h"
#include "dtype.h"

namespace pyllm {

// y = residual + dropout(x + bias). Matrices are contiguous (rows, width).
struct DropoutAddForward {
  Array x, residual, bias, y;
  int64_t width;
  bool past_caches;
  Dropout dropout;
};

// dx = dy through the dropout. Partial sums of dbias go to row `chunk` of (chunks, width) in the compute type, a chunk
// being `rows_per_chunk` rows.
struct DropoutAddBackward {
  Array dy, dx;
  void* partials;  // null where there is no bias
  int64_t rows, width, rows_per_chunk;
  bool past_caches;
  Dropout dropout;
};

PYLLM_KERNEL(dropout_add_fwd, DropoutAddForward)   // over rows
PYLLM_KERNEL(dropout_add_bwd, DropoutAddBackward)  // over chunks

}  // namespace pyllm
