// The second step of a gradient that is a sum over rows: adding the chunks' partial sums, always in the same order.
#pragma once

#include "cpu/isa.h"
#include "dtype.h"

namespace pyllm {

// sum[j] = sum over the chunks of partials[chunk * stride + j], partials being of the compute type.
struct ChunkSum {
  const void* partials;
  Array sum;
  int64_t chunks, stride;
  DType compute;
};

PYLLM_KERNEL(chunk_sum, ChunkSum)  // over columns

}  // namespace pyllm
