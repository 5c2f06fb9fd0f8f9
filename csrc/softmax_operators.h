// softmax and log_softmax as their schemas have them, over the two functions of a device.
#pragma once

#include "checks.h"
#include "mask_rows.h"

namespace pyllm {

struct SoftmaxCall {
  Tensor x, y;
  OptionalTensor mask_tensor;  // keeps what `mask` points to
  MaskRows mask;
  Rows rows;
  double scale;
  bool is_causal, log;

  SoftmaxCall(const Tensor& x_in, const OptionalTensor& mask_in, double scale, bool is_causal, bool log)
      : x(as_contiguous(x_in)), mask_tensor(mask_in), rows(x), scale(scale), is_causal(is_causal), log(log) {
    const int64_t rank = x.dim() - 1;
    STD_TORCH_CHECK(rank <= MaskRows::kMaxRank, "softmax: x must have at most ", MaskRows::kMaxRank + 1,
                    " dimensions, got ", rank + 1);
    y = uninitialised(x, x.sizes());
    mask.rank = static_cast<int>(rank);
    for (int64_t d = 0; d < rank; ++d) mask.sizes[d] = x.size(d);
    if (!mask_tensor.has_value()) return;
    STD_TORCH_CHECK(mask_tensor->dim() == rank + 1, "softmax: attn_mask must have x's number of dimensions");
    const auto stride = [&](int64_t d) { return mask_tensor->size(d) == 1 ? 0 : mask_tensor->stride(d); };
    if (stride(rank) > 1) mask_tensor = torch::stable::contiguous(*mask_tensor);
    mask.data = array(mask_tensor);
    for (int64_t d = 0; d < rank; ++d) mask.strides[d] = stride(d);
    mask.last_stride = stride(rank);
  }
};

struct SoftmaxGradientCall {
  Tensor dy, y, dx;
  Rows rows;
  double scale;
  bool log;

  SoftmaxGradientCall(const Tensor& dy_in, const Tensor& y_in, double scale, bool log)
      : dy(as_contiguous(dy_in)), y(as_contiguous(y_in)), rows(y), scale(scale), log(log) {
    dx = uninitialised(y, y.sizes());
  }
};

template <void forward(const SoftmaxCall&), void backward(const SoftmaxGradientCall&)>
struct SoftmaxOperators {
  static Tensor softmax_fwd(const Tensor& x, const OptionalTensor& attn_mask, double scale, bool is_causal) {
    return run(SoftmaxCall(x, attn_mask, scale, is_causal, false));
  }

  static Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale) {
    return run(SoftmaxGradientCall(dy, y, scale, false));
  }

  static Tensor log_softmax_fwd(const Tensor& x, const OptionalTensor& attn_mask, double scale, bool is_causal) {
    return run(SoftmaxCall(x, attn_mask, scale, is_causal, true));
  }

  static Tensor log_softmax_bwd(const Tensor& dy, const Tensor& y, double scale) {
    return run(SoftmaxGradientCall(dy, y, scale, true));
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
    library.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
    library.impl("log_softmax_fwd", TORCH_BOX(&log_softmax_fwd));
    library.impl("log_softmax_bwd", TORCH_BOX(&log_softmax_bwd));
  }

 private:
  static Tensor run(const SoftmaxCall& call) {
    if (call.y.numel() > 0) forward(call);
    return call.y;
  }

  static Tensor run(const SoftmaxGradientCall& call) {
    if (call.dx.numel() > 0) backward(call);
    return call.dx;
  }
};

}  // namespace pyllm
