// Storage types as kernels see them, without a torch header.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define PYLLM_EVERYWHERE __host__ __device__
#else
#define PYLLM_EVERYWHERE
#endif

namespace pyllm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : int8_t { f32, f64, bf16, f16, boolean };

// What arithmetic on a storage type is done in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body(T{}) with the storage type of a floating dtype.
template <class Body>
inline void visit_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(BFloat16{});
    case DType::f16: return body(Float16{});
    case DType::boolean: return;
  }
}

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2;
}

// A matrix or vector element type known at run time: the pointer and its dtype travel together.
struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
  PYLLM_EVERYWHERE explicit operator bool() const { return data != nullptr; }
  template <class T>
  PYLLM_EVERYWHERE T* as() const {
    return static_cast<T*>(data);
  }
  // From element i on.
  Array at(int64_t i) const { return {static_cast<char*>(data) + i * size_of(dtype), dtype}; }
};

}  // namespace pyllm
