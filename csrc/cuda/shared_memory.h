// What blocks are launched with, for `make check-cuda`: it is not in the machine code.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "cuda/attention_plan.h"
#include "cuda/decode_plan.h"
#include "cuda/head_dim.h"

namespace pyllm::cuda {

// (kernel, head_dim, the most bytes of dynamic shared memory) of the kernels that are templates of head_dim.
inline std::vector<std::tuple<std::string, int, int>> shared_memory() {
  std::vector<std::tuple<std::string, int, int>> told;
  for (const int dim : kHeadDims) {
    told.emplace_back("attention_decode_split", dim, decode_shared_bytes(dim, kMostDecodeRows));
    told.emplace_back("attention_forward_tile", dim, forward_tile(dim, true).shared_bytes(dim));
    told.emplace_back("attention_backward_tile", dim, backward_tile(dim, false).shared_bytes(dim));
    told.emplace_back("attention_mask_tile", dim, backward_tile(dim, true).shared_bytes(dim));
  }
  return told;
}

}  // namespace pyllm::cuda
