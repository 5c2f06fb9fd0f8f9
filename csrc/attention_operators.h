// attention_fwd and attention_bwd as their schemas have them, over the two functions of a device.
#pragma once

#include <tuple>

#include "attention_tensors.h"

namespace pyllm {

// The fields of an AttentionCall, in their order.
struct AttentionArguments {
  const Tensor &query, &key, &value;
  const OptionalTensor &mask, &padding, &distance_bias, &slopes, &cu_seqlens_q, &cu_seqlens_k, &rng;
  double scale, softcap, dropout_p;
  int64_t left, right;
  bool bottom_right;
};

struct AttentionGradientArguments {
  AttentionArguments call;
  const Tensor& dout;
  const OptionalTensor& dlse;
  const Tensor &out, &lse;
  bool mask_gradient, bias_gradient, deterministic;
};

using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <std::tuple<Tensor, Tensor> forward(const AttentionArguments&),
          AttentionGradients backward(const AttentionGradientArguments&)>
struct AttentionOperators {
  static std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const OptionalTensor& mask, const OptionalTensor& padding,
                                                  const OptionalTensor& distance_bias, const OptionalTensor& slopes,
                                                  const OptionalTensor& cu_seqlens_q,
                                                  const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng,
                                                  double scale, double softcap, double dropout_p, int64_t left,
                                                  int64_t right, bool bottom_right) {
    return forward({query, key, value, mask, padding, distance_bias, slopes, cu_seqlens_q, cu_seqlens_k, rng, scale,
                    softcap, dropout_p, left, right, bottom_right});
  }

  static AttentionGradients attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out,
                                          const Tensor& lse, bool mask_gradient, bool bias_gradient, bool deterministic,
                                          const Tensor& query, const Tensor& key, const Tensor& value,
                                          const OptionalTensor& mask, const OptionalTensor& padding,
                                          const OptionalTensor& distance_bias, const OptionalTensor& slopes,
                                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                          const OptionalTensor& rng, double scale, double softcap, double dropout_p,
                                          int64_t left, int64_t right, bool bottom_right) {
    return backward({{query, key, value, mask, padding, distance_bias, slopes, cu_seqlens_q, cu_seqlens_k, rng, scale,
                      softcap, dropout_p, left, right, bottom_right},
                     dout,
                     dlse,
                     out,
                     lse,
                     mask_gradient,
                     bias_gradient,
                     deterministic});
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
    library.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  }
};

}  // namespace pyllm
