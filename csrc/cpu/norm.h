// LayerNorm and RMSNorm on the CPU, plain or with bias, dropout and residual addition in front: what the binding hands
// over.
#pragma once

#include "cpu/isa.h"
#include "dropout.h"
#include "dtype.h"
#include "norm_sums.h"

namespace pyllm {

// z = residual + dropout(x + x_bias), or x itself; y = normalised z * weight + bias. Matrices are contiguous (rows,
// width).
struct NormForward {
  Array x, residual, weight, bias, x_bias;
  Array y, z;  // z only with a residual
  void *mean, *rstd;
  int64_t width;
  double eps;
  bool rms, past_caches;
  Dropout dropout;
};

// dresidual = gradient of z; dx = that through the dropout. Partial sums of columns go to row `chunk` of (chunks,
// kColumnSums, width) in the compute type, a chunk being `rows_per_chunk` rows.
struct NormBackward {
  Array dy, dz, z, weight;
  Array dx, dresidual;  // dx only where it differs from dresidual
  const void *mean, *rstd;
  void* partials;  // null where no gradient is wanted
  ColumnGradients gradients;
  int64_t rows, width, rows_per_chunk;
  bool rms, past_caches;
  Dropout dropout;
};

PYLLM_KERNEL(norm_fwd, NormForward)   // over rows
PYLLM_KERNEL(norm_bwd, NormBackward)  // over chunks

}  // namespace pyllm
