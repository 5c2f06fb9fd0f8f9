// The head_dims that kernels are compiled for: PYLLM_CUDA_HEAD_DIMS, such as "64,128", ascending, from setup.py.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace pyllm::cuda {

inline constexpr auto kHeadDims = [] {
  constexpr std::string_view list = PYLLM_CUDA_HEAD_DIMS;
  std::array<int, std::count(list.begin(), list.end(), ',') + 1> dims{};
  size_t item = 0;
  for (const char c : list) {
    if (c == ',')
      ++item;
    else
      dims[item] = 10 * dims[item] + (c - '0');
  }
  return dims;
}();

// Calls body.operator()<D>() with the least D that holds rows of `dim` elements.
template <class Body>
void visit_head_dim(int64_t dim, Body&& body) {
  const bool found = [&]<size_t... I>(std::index_sequence<I...>) {
    return ((dim <= kHeadDims[I] && (body.template operator()<kHeadDims[I]>(), true)) || ...);
  }(std::make_index_sequence<kHeadDims.size()>());
  if (!found)
    throw std::invalid_argument("pyllm: the CUDA kernels were compiled for head_dim " PYLLM_CUDA_HEAD_DIMS
                                ", not for " +
                                std::to_string(dim) + ": reinstall pyllm without PYLLM_CUDA_HEAD_DIMS");
}

}  // namespace pyllm::cuda
