// From the tensors of attention to what kernels take, on any device.
#pragma once

#include "checks.h"
#include "heads.h"

namespace pyllm {

inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

inline Heads heads_of(const Tensor& t) { return {array(t), t.stride(0), t.stride(1), t.stride(2)}; }

// (B, H, S, D), uninitialised, stored as (B, S, H, D). Not by torch::stable::transpose, for new_empty's reason.
inline Tensor new_like(const Tensor& t) {
  const int64_t batch = t.size(0), heads = t.size(1), length = t.size(2), dim = t.size(3);
  const Tensor stored = uninitialised(t, {batch, length, heads, dim});
  const int64_t sizes[] = {batch, heads, length, dim};
  const int64_t strides[] = {length * heads * dim, dim, heads * dim, 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(stored.get(), 4, sizes, strides, 0, &made));
  return Tensor(made);
}

}  // namespace pyllm
