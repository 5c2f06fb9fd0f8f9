// Rotary embedding on the CPU: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dtype.h"

namespace pyllm {

// Where the rows of `width` elements of a (batch, heads, length, width) tensor begin.
struct HeadRows {
  Array data;
  int64_t batch_stride, head_stride, row_stride;
};

// y = the first 2 * pairs columns of x turned, the others as they are; y may be x. cos and sin: (batch or 1, length,
// pairs) in the compute type.
struct RotaryCall {
  HeadRows x, y;
  const void *cos, *sin;
  int64_t heads, length, width, pairs, table_batch_stride;
  bool interleaved, inverse;
};

PYLLM_KERNEL(rotary_fwd, RotaryCall)  // over batch * length

}  // namespace pyllm
