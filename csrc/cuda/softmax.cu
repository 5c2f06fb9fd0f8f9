// Binding of softmax and log_softmax on CUDA.
#include "cuda/softmax.cuh"

#include "cuda/place.h"
#include "softmax_operators.h"

namespace pyllm {
namespace {

void forward(const SoftmaxCall& call) {
  cuda::check_dtype(call.x);
  const cuda::Place place({call.x, call.mask_tensor});
  cuda::softmax_forward({.x = array(call.x),
                         .y = array(call.y),
                         .mask = call.mask,
                         .rows = call.rows.count,
                         .queries = call.is_causal ? call.mask.sizes[call.mask.rank - 1] : 0,
                         .width = cuda::row_width(call.rows),
                         .lanes = 0,
                         .scale = static_cast<float>(call.scale),
                         .log = call.log},
                        place.device(), place.stream());
}

void backward(const SoftmaxGradientCall& call) {
  cuda::check_dtype(call.y);
  const cuda::Place place({call.y, call.dy});
  cuda::softmax_backward({.dy = array(call.dy),
                          .y = array(call.y),
                          .dx = array(call.dx),
                          .rows = call.rows.count,
                          .width = cuda::row_width(call.rows),
                          .lanes = 0,
                          .scale = static_cast<float>(call.scale),
                          .log = call.log},
                         place.device(), place.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CUDA, m) { SoftmaxOperators<forward, backward>::implement(m); }

}  // namespace pyllm
