// The instruction sets that kernels are compiled for, and which one this processor gets.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyllm {

enum class Isa { portable, avx2, avx512 };

inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

// The best there is, or what PYLLM_CPU_ISA asks for. Throws if that is unknown or not of this processor.
inline Isa chosen_isa() {
  const char* asked = std::getenv("PYLLM_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best_isa();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (asked == std::string(isa_name(isa))) {
      if (isa > best_isa()) throw std::runtime_error(std::string("PYLLM_CPU_ISA: this processor has no ") + asked);
      return isa;
    }
  }
  throw std::runtime_error(std::string("PYLLM_CPU_ISA must be portable, avx2 or avx512, got ") + asked);
}

}  // namespace pyllm

// Declares `void name(const Args&, int64_t begin, int64_t end)` in the namespace of each instruction set, and
// `pick_name()`, which gives the one to call.
#if defined(__x86_64__)
#define PYLLM_KERNEL(name, Args)                                                               \
  namespace portable {                                                                         \
  void name(const Args&, int64_t, int64_t);                                                    \
  }                                                                                            \
  namespace avx2 {                                                                             \
  void name(const Args&, int64_t, int64_t);                                                    \
  }                                                                                            \
  namespace avx512 {                                                                           \
  void name(const Args&, int64_t, int64_t);                                                    \
  }                                                                                            \
  inline auto pick_##name() {                                                                  \
    static const Isa isa = chosen_isa();                                                       \
    return isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : portable::name; \
  }
#else
#define PYLLM_KERNEL(name, Args)            \
  namespace portable {                      \
  void name(const Args&, int64_t, int64_t); \
  }                                         \
  inline auto pick_##name() { return portable::name; }
#endif
