// Shape, dtype and stride checks of the compiled operators, and the way from tensors to raw pointers, written once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "dropout.h"
#include "dtype.h"
#include "pages.h"

namespace pyllm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, "pyllm: expected a floating or boolean tensor");
  }
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(as_contiguous(*t)) : t;
}

inline Array array(const Tensor& t) { return {t.data_ptr(), dtype_of(t)}; }

inline Array array(const OptionalTensor& t) { return t.has_value() ? array(*t) : Array{}; }

// An uninitialised contiguous tensor on the device of `like`, which will be written whole. torch::stable::new_empty
// looks its operator up by name at each call, which costs more than the allocation.
inline Tensor uninitialised(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int32_t device, index, layout, dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype,
                                                   &layout, &device, index, nullptr, &made));
  const Tensor result(made);
  const int64_t bytes = result.numel() * result.element_size();
  if (bytes >= kFreshPagesFrom && result.is_cpu()) ask_for_large_pages(result.data_ptr(), bytes);
  return result;
}

inline Tensor uninitialised(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return uninitialised(like, sizes, like.scalar_type());
}

// Results from this size on are written past the caches, which was measured neutral at 12 MiB and ahead beyond; of 6
// MiB the next operation finds most in a cache, and both together take 0.5 to 0.7 of the time.
inline bool past_caches(const Tensor& result) { return result.numel() * result.element_size() >= int64_t{8} << 20; }

inline ScalarType statistics_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Where dropout's seed and offset lie; null where p is 0.
inline const int64_t* rng_of(const OptionalTensor& rng, double p) {
  if (p == 0.0) return nullptr;
  STD_TORCH_CHECK(rng.has_value(), "pyllm: dropout_p needs rng");
  STD_TORCH_CHECK(rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(),
                  "pyllm: rng must be two int64 numbers (seed, offset)");
  return static_cast<const int64_t*>(rng->data_ptr());
}

inline Dropout dropout_of(const OptionalTensor& rng, double p) { return Dropout(rng_of(rng, p), p); }

// A contiguous tensor seen as rows of its last dimension.
struct Rows {
  int64_t count, width;
  explicit Rows(const Tensor& t) : width(t.size(t.dim() - 1)) {
    count = 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  }
};

// A tensor seen as rows of its last dimension, `stride` elements apart; copied where it has no such view.
struct StridedRows {
  Tensor tensor;
  int64_t count = 1, width, stride;

  explicit StridedRows(const Tensor& t) : tensor(has_rows(t) ? t : torch::stable::contiguous(t)) {
    const int64_t last = tensor.dim() - 1;
    width = stride = tensor.size(last);
    for (int64_t d = last - 1; d >= 0; --d) {
      if (count == 1 && tensor.size(d) != 1) stride = tensor.stride(d);
      count *= tensor.size(d);
    }
  }

  Array data() const { return array(tensor); }

 private:
  static bool has_rows(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) return false;
    int64_t expected = -1;  // of the next dimension's stride
    for (int64_t d = last - 1; d >= 0; --d) {
      if (t.size(d) == 1) continue;
      if (expected >= 0 && t.stride(d) != expected) return false;
      expected = t.stride(d) * t.size(d);
    }
    return true;
  }
};

// Elements of work below which a thread of its own does not pay.
inline constexpr int64_t kGrain = 16384;

inline int64_t rows_per_task(int64_t width) { return kGrain / (width + 1) + 1; }

}  // namespace pyllm
