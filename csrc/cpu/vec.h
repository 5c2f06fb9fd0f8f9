// Vectors of the width that this translation unit is compiled for, on the compiler's vector extension: loads and stores
// that convert 16-bit storage, reductions, exp and its kin. Include it only from *_kernel.cpp, which is compiled once
// per ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace pyllm::PYLLM_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class C>
using Vec [[gnu::vector_size(kVectorBytes)]] = C;
template <class C>
inline constexpr int kLanes = kVectorBytes / sizeof(C);

// 16-bit lanes, as many as Vec<float> has.
using Half16 [[gnu::vector_size(kVectorBytes / 2)]] = uint16_t;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class C>
inline Vec<C> splat(C value) {
  return Vec<C>{} + value;
}

template <class C>
inline Vec<C> max(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// --- load and store: storage type T <-> Vec<Compute<T>> ---

inline Vec<float> widen(Half16 bits, BFloat16) {
#if defined(__AVX512F__)  // one instruction, of which GCC makes four
  const auto words = bit_cast<Vec<uint32_t>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#else
  const auto words = __builtin_convertvector(bits, Vec<uint32_t>);
#endif
  return bit_cast<Vec<float>>(words << 16);
}

inline Half16 narrow(Vec<float> v, BFloat16) {
#if defined(__AVX512BF16__)
  return bit_cast<Half16>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));  // subnormal numbers become 0
#else
  const auto bits = bit_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return __builtin_convertvector(v == v ? rounded : Vec<uint32_t>{} + 0x7FC0, Half16);
#endif
}

inline Vec<float> widen(Half16 bits, Float16) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(bit_cast<_Float16>(static_cast<uint16_t>(bits[i])));
  return v;
#endif
}

inline Half16 narrow(Vec<float> v, Float16) {
#if defined(__AVX512F__)
  return bit_cast<Half16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<Half16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Half16 bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
  return bits;
#endif
}

template <class T>
inline Vec<Compute<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Half16 bits;
    std::memcpy(&bits, p, sizeof(bits));
    return widen(bits, T{});
  } else {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class T>
inline void store(T* p, Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Half16 bits = narrow(v, T{});
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// v as T holds it.
template <class T>
inline Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == 2) return widen(narrow(v, T{}), T{});
  return v;
}

// The first `count` lanes; the others are 0, and nothing beyond them is read or written.
template <class T>
inline Vec<Compute<T>> load(const T* p, int count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count == lanes) return load(p);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    return widen(bit_cast<Half16>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p)), T{});
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  }
#else
  T padded[lanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
#endif
}

template <class T>
inline void store(T* p, Vec<Compute<T>> v, int count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count == lanes) return store(p, v);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow(v, T{})));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), bit_cast<__m512>(v));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), bit_cast<__m512d>(v));
  }
#else
  T padded[lanes];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
#endif
}

// v with the lanes from `count` on set to 0.
template <class C>
inline Vec<C> first(Vec<C> v, int count) {
  return count == kLanes<C> ? v : load(reinterpret_cast<const C*>(&v), count);
}

// weight * v, and 0 where the weight is `none`, whatever v is there.
template <class C>
inline Vec<C> weighed(Vec<C> weight, Vec<C> v, Vec<C> none = Vec<C>{}) {
  return weight == none ? Vec<C>{} : weight * v;
}

// body(i, count) for each vector of a row of n: count is the number of lanes, fewer in the last one.
template <class C, class Body>
[[gnu::always_inline]] inline void for_vectors(int64_t n, Body&& body) {
  constexpr int lanes = kLanes<C>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, lanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// --- stores past the caches: a large result then costs no read of what it overwrites ---

template <class T>
inline void stream(T* p, Vec<Compute<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(narrow(v, T{})));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(narrow(v, T{})));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
  }
#else
  store(p, v);
#endif
}

// Whether `stream` can write a row of n: whole aligned vectors.
template <class T>
inline bool streamable(const T* row, int64_t n) {
  constexpr int lanes = kLanes<Compute<T>>;
  return n % lanes == 0 && reinterpret_cast<uintptr_t>(row) % (lanes * sizeof(T)) == 0;
}

// to[i] = vector(i, count) for a row of n.
template <class C, class T, class Vector>
[[gnu::always_inline]] inline void write_row(T* to, int64_t n, bool past_caches, Vector&& vector) {
  if (past_caches && streamable(to, n)) {
    for (int64_t i = 0; i < n; i += kLanes<C>) stream(to + i, vector(i, kLanes<C>));
  } else {
    for_vectors<C>(n, [&](int64_t i, int count) { store(to + i, vector(i, count), count); });
  }
}

// Orders streamed stores before what tells other threads that they are done.
inline void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- reductions over the lanes ---

template <class C>
inline C sum(Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class C>
inline C max(Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// body(i, count, terms) for each vector of a row of n adds to the `sums` vectors that `terms` points to; returns their
// sums over the row. Four sets of accumulators hide the latency of the additions; summing blocks first keeps rounding
// errors small in wide rows.
template <class C, int sums>
struct Totals {
  C value[sums];
};
template <class C, int sums, class Body>
[[gnu::always_inline]] inline Totals<C, sums> accumulate(int64_t n, Body&& body) {
  constexpr int lanes = kLanes<C>;
  constexpr int64_t block = 32 * 4 * lanes;
  Vec<C> total[sums] = {};
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < block ? n : i + block;
    Vec<C> terms[4][sums] = {};
    for (; i + 4 * lanes <= end; i += 4 * lanes)
      for (int set = 0; set < 4; ++set) body(i + set * lanes, lanes, terms[set]);
    for (; i + lanes <= end; i += lanes) body(i, lanes, terms[0]);
    if (i < end) body(i, static_cast<int>(end - i), terms[1]);
    i = end;
    for (int s = 0; s < sums; ++s) total[s] += (terms[0][s] + terms[1][s]) + (terms[2][s] + terms[3][s]);
  }
  Totals<C, sums> totals;
  for (int s = 0; s < sums; ++s) totals.value[s] = sum<C>(total[s]);
  return totals;
}

// --- exp, tanh ---

// For x <= 88: 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2; within 0.9 ulp, 1.2 without FMA; 0 where the result is
// subnormal.
inline Vec<float> exp(Vec<float> x) {
  constexpr float least = -87.3f;
  const auto underflow = x < least;
#if defined(__AVX512F__)
  const Vec<float> n = bit_cast<Vec<float>>(_mm512_roundscale_ps(bit_cast<__m512>(x * 1.44269504f), 0));
  Vec<float> r = x - n * 0.693359375f;
#else
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> clamped = underflow ? splat(least) : x;
  const Vec<float> n = (clamped * 1.44269504f + shift) - shift;
  Vec<float> r = clamped - n * 0.693359375f;
#endif
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.38145394e-3f + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 0.49999994f;
  p = (p * r + 1.0f) * r + 1.0f;
#if defined(__AVX512F__)
  const auto scaled = bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
  return underflow ? Vec<float>{} : scaled;
#else
  const Vec<float> power = bit_cast<Vec<float>>((__builtin_convertvector(n, Vec<int32_t>) + 127) << 23);
  return underflow ? Vec<float>{} : p * power;
#endif
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Near 0 a minimax polynomial in x^2, good to 2^-27 of the result; beyond, 1 - 2 / (exp(2 |x|) + 1).
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> z = x * x;
  Vec<float> p = z * -5.70498004e-3f + 2.06390799e-2f;
  p = p * z - 5.37397123e-2f;
  p = p * z + 1.33314422e-1f;
  p = p * z - 3.33332819e-1f;
  const Vec<float> small = p * z * x + x;
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> large = 1.0f - 2.0f / (exp((size > 10.0f ? splat(10.0f) : size) * 2.0f) + 1.0f);
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// --- the logistic and the normal distribution ---

// s = 1 / (1 + exp(-x)), 0 where exp(-x) ends, and its derivative s (1 - s), which keeps its digits where s is near 1.
template <class C>
struct Sigmoid {
  Vec<C> value, slope;
};

template <class C>
inline Sigmoid<C> sigmoid(Vec<C> x) {
  constexpr C kEnd = sizeof(C) == 8 ? 709 : 88;
  const auto none = x < -kEnd;
  const Vec<C> power = exp(none ? splat(kEnd) : -x);
  const Vec<C> value = none ? Vec<C>{} : 1 / (1 + power);
  return {value, value * (value * power)};
}

template <class C>
struct Normal {
  Vec<C> distribution, density;
};

// The tail beyond a = |x| is exp(-a^2 / 2) times a polynomial in u = a / (a + 5), fitted to 2e-9 of 1 (the form is that
// of Hastings, 1955): one exponential for both, and near 0, where u is small, no rounding error but the last ones.
inline Normal<float> normal(Vec<float> x) {
  Vec<float> a = bit_cast<Vec<float>>(bit_cast<Vec<uint32_t>>(x) & 0x7FFFFFFF);
  a = a > 100.0f ? splat(100.0f) : a;  // an infinite one would make a NaN of u
  const Vec<float> u = a / (a + 5.0f);
  const Vec<float> power = exp(a * a * -0.5f);
  Vec<float> p = u * 1.096927702f - 3.662131140f;
  p = p * u + 5.960423709f;
  p = p * u - 6.118138930f;
  p = p * u + 4.255319751f;
  p = p * u - 1.994711792f;
  const Vec<float> tail = (p * u + 0.5f) * power;
  return {x < 0.0f ? tail : 1.0f - tail, power * 0.398942280f};
}

inline Normal<double> normal(Vec<double> x) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.distribution[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752);
    result.density[i] = 0.39894228040143268 * std::exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

// --- scratch memory of a thread, kept for its next call; one buffer for each slot ---

// Not a std::vector: its code would be shared among the instruction sets, and the linker might keep the widest.
template <class C>
struct Buffer {
  C* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

template <class C, int slot = 0>
inline C* scratch(int64_t n) {
  static thread_local Buffer<C> buffer;
  if (buffer.size < n) {
    std::free(buffer.data);
    const int64_t bytes = (n * static_cast<int64_t>(sizeof(C)) + 63) / 64 * 64;
    buffer.data = static_cast<C*>(std::aligned_alloc(64, bytes));
    buffer.size = n;
  }
  return buffer.data;
}

}  // namespace pyllm::PYLLM_ISA
