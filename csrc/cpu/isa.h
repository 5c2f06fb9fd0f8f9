// The instruction sets that kernels are compiled for, and which one this processor gets.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/amx.h"

namespace pyllm {

// Each has what the ones before it have. avx512bf16 has products of pairs of bf16, for which kernels that multiply
// matrices have a *_pairs_kernel.cpp, and a conversion to bf16, for the others.
enum class Isa { portable, avx2, avx512, avx512bf16, amx };
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512bf16 && request_tiles()) return Isa::amx;
  return avx512bf16 ? Isa::avx512bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

// The best there is, or what PYLLM_CPU_ISA asks for. Throws if that is unknown or not of this processor.
inline Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* asked = std::getenv("PYLLM_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  for (int isa = 0; isa <= static_cast<int>(Isa::amx); ++isa) {
    if (asked == std::string(kIsaNames[isa])) {
      if (isa > static_cast<int>(best))
        throw std::runtime_error(std::string("PYLLM_CPU_ISA: this processor has no ") + asked);
      return static_cast<Isa>(isa);
    }
  }
  throw std::runtime_error(std::string("PYLLM_CPU_ISA must be portable, avx2, avx512, avx512bf16 or amx, got ") +
                           asked);
}

// The kernel for the instruction set in use, of those for `first` and the ones that follow it.
template <class Kernel>
Kernel pick(Isa first, std::initializer_list<Kernel> kernels) {
  const int last = static_cast<int>(kernels.size()) - 1;
  const int index = static_cast<int>(chosen_isa()) - static_cast<int>(first);
  return kernels.begin()[index < last ? index : last];
}

}  // namespace pyllm

// Declare `void name(const Args&, int64_t begin, int64_t end)` in the namespace of each instruction set, and a function
// that gives the one to call: PYLLM_KERNEL of a *_kernel.cpp, and `pick_name()`; PYLLM_PAIR_KERNEL of a
// *_pairs_kernel.cpp, and `pick_name_pairs()`, where the instruction set in use has products of pairs;
// PYLLM_PLAIN_KERNEL, as PYLLM_KERNEL, of a *_kernel.cpp that has such a file beside it.
#define PYLLM_DECLARE(isa, name, Args)      \
  namespace isa {                           \
  void name(const Args&, int64_t, int64_t); \
  }
#if defined(__x86_64__)
#define PYLLM_PLAIN_KERNEL(name, Args)                                                          \
  PYLLM_DECLARE(portable, name, Args)                                                           \
  PYLLM_DECLARE(avx2, name, Args)                                                               \
  PYLLM_DECLARE(avx512, name, Args)                                                             \
  inline auto pick_##name() {                                                                   \
    static const auto kernel = pick(Isa::portable, {portable::name, avx2::name, avx512::name}); \
    return kernel;                                                                              \
  }
#define PYLLM_KERNEL(name, Args)                                                                                  \
  PYLLM_DECLARE(portable, name, Args)                                                                             \
  PYLLM_DECLARE(avx2, name, Args)                                                                                 \
  PYLLM_DECLARE(avx512, name, Args)                                                                               \
  PYLLM_DECLARE(avx512bf16, name, Args)                                                                           \
  inline auto pick_##name() {                                                                                     \
    static const auto kernel = pick(Isa::portable, {portable::name, avx2::name, avx512::name, avx512bf16::name}); \
    return kernel;                                                                                                \
  }
#define PYLLM_PAIR_KERNEL(name, Args)                                                \
  PYLLM_DECLARE(avx512bf16, name, Args)                                              \
  PYLLM_DECLARE(amx, name, Args)                                                     \
  inline auto pick_##name##_pairs() {                                                \
    static const auto kernel = pick(Isa::avx512bf16, {avx512bf16::name, amx::name}); \
    return kernel;                                                                   \
  }
#else
#define PYLLM_KERNEL(name, Args)      \
  PYLLM_DECLARE(portable, name, Args) \
  inline auto pick_##name() { return portable::name; }
#define PYLLM_PLAIN_KERNEL PYLLM_KERNEL
#define PYLLM_PAIR_KERNEL(name, Args) \
  inline auto pick_##name##_pairs() { return static_cast<void (*)(const Args&, int64_t, int64_t)>(nullptr); }
#endif
