// Memory that the system hands out anew.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "checks.h"

namespace pyllm {

// An uninitialised tensor that will be written whole. Its memory, if it is fresh, is faulted in by 2 MB where the
// system lets programs ask for that: a sixth of the time that pages of 4 KB take, which is more than most kernels need.
inline Tensor uninitialised_large(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  Tensor made = uninitialised(like, sizes);
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(made.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + made.numel() * made.element_size()) / page * page;
  if (end > first && past_caches(made)) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return made;
}

}  // namespace pyllm
