// Attention's tensors as kernels see them, without a torch header.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyllm {

// (B, H, S, D) with strides in elements; the last dimension is contiguous.
struct Heads {
  Array data;
  int64_t batch = 0, head = 0, row = 0;
  template <class T>
  PYLLM_EVERYWHERE T* at(int64_t b, int64_t h, int64_t s) const {
    return data.as<T>() + b * batch + h * head + s * row;
  }
};

}  // namespace pyllm
