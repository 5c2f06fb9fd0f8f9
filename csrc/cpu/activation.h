// Activations on the CPU, plain or gated, with bias in front and dropout behind: what the binding hands over.
#pragma once

#include "cpu/isa.h"
#include "dropout.h"
#include "dtype.h"

namespace pyllm {

enum class Act : int8_t { relu, gelu, gelu_tanh, silu };

// y = dropout(act(gate + bias)), or gated (where there is `up`) dropout(act(gate + bias) * (up + bias from `width`
// on)). Rows are of `width` elements, y's side by side, those of the others a stride apart.
struct ActivationForward {
  Array gate, up, bias, y;
  int64_t width, gate_stride, up_stride;
  Act act;
  bool past_caches;
  Dropout dropout;
};

// Partial sums of dbias go to row `chunk` of (chunks, width, or twice that if gated) in the compute type, a chunk being
// `rows_per_chunk` rows.
struct ActivationBackward {
  Array dy, gate, up, bias;
  Array dgate, dup;
  void* partials;  // null where there is no bias
  int64_t rows, width, dy_stride, gate_stride, up_stride, gradient_stride, rows_per_chunk;
  Act act;
  bool past_caches;
  Dropout dropout;
};

PYLLM_KERNEL(activation_fwd, ActivationForward)   // over rows
PYLLM_KERNEL(activation_bwd, ActivationBackward)  // over chunks

}  // namespace pyllm
