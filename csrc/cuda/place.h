// Where a CUDA operator runs: the device of its tensors, made current, and PyTorch's current stream there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/architectures.h"
#include "cuda/launch.h"

namespace pyllm::cuda {

inline void check_call(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "pyllm: ", what, ": ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_call(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// Every device of the process, asked for once.
inline const std::vector<Device>& devices() {
  static const std::vector<Device> all = [] {
    int count = 0;
    check_call(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Device> found;
    for (int i = 0; i < count; ++i)
      found.push_back({.processors = attribute(cudaDevAttrMultiProcessorCount, i),
                       .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, i) +
                                     attribute(cudaDevAttrComputeCapabilityMinor, i)});
    return found;
  }();
  return all;
}

inline const Device& served_device(int index) {
  const Device& device = devices().at(index);
  if (!any_serves(PYLLM_CUDA_ARCHITECTURES, device.capability)) {
    cudaDeviceProp properties;
    check_call(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    const std::string capability = std::to_string(device.capability);
    STD_TORCH_CHECK(false, "pyllm: cuda:", index, ", ", properties.name, " (sm_", capability,
                    "), is served by none of the compiled architectures (", PYLLM_CUDA_ARCHITECTURES,
                    "): install pyllm with PYLLM_CUDA_ARCHS=", capability,
                    ", or choose the backend 'triton' or 'torch'");
  }
  return device;
}

class Place {
 public:
  // The tensors must all be on the first one's device.
  explicit Place(std::initializer_list<const OptionalTensor> tensors)
      : index_(tensors.begin()->value().get_device_index()), guard_(index_), device_(served_device(index_)) {
    for (const OptionalTensor& tensor : tensors) {
      if (!tensor.has_value()) continue;
      STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == index_,
                      "pyllm: expected all tensors on cuda:", index_);
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Device& device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Device& device_;
  cudaStream_t stream_;
};

// A size as kernels take it.
inline int narrow(int64_t number, const char* what) {
  STD_TORCH_CHECK(number <= kMaxWidth, "pyllm: the CUDA kernels take up to ", kMaxWidth, " ", what, ", got ", number);
  return static_cast<int>(number);
}

// A row's width as kernels take it.
inline int row_width(const Rows& rows) {
  STD_TORCH_CHECK(rows.width <= kMaxWidth, "pyllm: the CUDA kernels take rows of up to ", kMaxWidth, " elements, got ",
                  rows.width);
  return static_cast<int>(rows.width);
}

inline void check_dtype(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.scalar_type() != ScalarType::Double,
      "pyllm: the CUDA kernels take float32, bfloat16 and float16, got float64: choose the backend 'triton' "
      "or 'torch'");
}

}  // namespace pyllm::cuda
