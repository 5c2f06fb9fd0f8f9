// Memory that the system hands out anew.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace pyllm {

// glibc takes blocks from this size on from the system at each allocation, and gives them back.
inline constexpr int64_t kFreshPagesFrom = int64_t{32} << 20;

// Has untouched memory faulted in by 2 MB where the system lets programs ask for that: a sixth of the time that pages
// of 4 KB take, which is more than most kernels need.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pyllm
