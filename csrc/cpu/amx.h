// AMX: the tiles of 16 rows of 64 bytes that a thread has, and the instructions on them. tests/amx_model has these
// functions in C++, for processors without AMX.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyllm {

// Asks the kernel to let this process use tiles, which it has to before their first use.
inline bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & amx_bf16) != 0 && (edx & amx_tile) != 0 &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#if defined(__AMX_BF16__)

// body(), with all eight tiles at their full size. Afterwards they are as the thread had set them: other libraries take
// the tiles for as they left them.
template <class Body>
[[gnu::always_inline]] inline void with_tiles(Body&& body) {
  alignas(64) unsigned char full[64] = {1},
                            before[64];  // palette 1; from byte 16 on bytes of a row, from byte 48 on rows
  for (int tile = 0; tile < 8; ++tile) {
    full[16 + 2 * tile] = 64;
    full[48 + tile] = 16;
  }
  asm volatile("sttilecfg %0" : "=m"(before));
  asm volatile("ldtilecfg %0" ::"m"(full));
  body();
  asm volatile("ldtilecfg %0" ::"m"(before));
}

template <int tile>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// Rows of 64 bytes, `stride` bytes apart.
template <int tile>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

// c += a b: c (16, 16) of fp32, a (16, 32) of bf16, b (16, 16) of pairs of bf16.
template <int c, int a, int b>
[[gnu::always_inline]] inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#endif

}  // namespace pyllm
