// Binding of softmax and log_softmax on the CPU.
#include "cpu/softmax.h"

#include "softmax_operators.h"

namespace pyllm {
namespace {

void forward(const SoftmaxCall& call) {
  const SoftmaxForward args{.x = array(call.x),
                            .y = array(call.y),
                            .mask = call.mask,
                            .width = call.rows.width,
                            .scale = call.scale,
                            .is_causal = call.is_causal,
                            .log = call.log,
                            .past_caches = past_caches(call.y)};
  torch::stable::parallel_for(
      0, call.rows.count, rows_per_task(call.rows.width),
      [&, kernel = pick_softmax_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void backward(const SoftmaxGradientCall& call) {
  const SoftmaxBackward args{.dy = array(call.dy),
                             .y = array(call.y),
                             .dx = array(call.dx),
                             .width = call.rows.width,
                             .scale = call.scale,
                             .log = call.log,
                             .past_caches = past_caches(call.dx)};
  torch::stable::parallel_for(
      0, call.rows.count, rows_per_task(call.rows.width),
      [&, kernel = pick_softmax_bwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) { SoftmaxOperators<forward, backward>::implement(m); }

}  // namespace pyllm
