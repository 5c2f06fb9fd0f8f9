// Binding of layer_norm, rms_norm, add_layer_norm and add_rms_norm on CUDA.
#include "cuda/norm.cuh"

#include "cuda/place.h"
#include "norm_operators.h"

namespace pyllm {
namespace {

void forward(const NormCall& call) {
  cuda::check_dtype(call.y);
  const cuda::Place place({call.x, call.residual, call.weight, call.bias, call.x_bias, call.rng});
  if (call.rows.count == 0) return;
  cuda::norm_forward({.x = array(call.x),
                      .residual = array(call.residual),
                      .weight = array(call.weight),
                      .bias = array(call.bias),
                      .x_bias = array(call.x_bias),
                      .y = array(call.y),
                      .z = call.residual.has_value() ? array(call.z) : Array{},
                      .mean = call.rms ? nullptr : static_cast<float*>(call.mean.data_ptr()),
                      .rstd = static_cast<float*>(call.rstd.data_ptr()),
                      .rng = rng_of(call.rng, call.dropout_p),
                      .rows = call.rows.count,
                      .width = cuda::row_width(call.rows),
                      .lanes = 0,
                      .eps = static_cast<float>(call.eps),
                      .dropout = Dropout(nullptr, call.dropout_p)},
                     place.device(), place.stream());
}

void backward(const NormGradientCall& call) {
  cuda::check_dtype(call.z);
  const cuda::Place place({call.z, call.dy, call.dz, call.weight, call.mean, call.rstd, call.rng});
  cuda::NormBackward args{.dy = array(call.dy),
                          .dz = array(call.dz),
                          .z = array(call.z),
                          .weight = array(call.weight),
                          .dx = call.has_dx ? array(call.dx) : Array{},
                          .dresidual = array(call.dresidual),
                          .mean = call.mean.has_value() ? static_cast<const float*>(call.mean->data_ptr()) : nullptr,
                          .rstd = static_cast<const float*>(call.rstd.data_ptr()),
                          .rng = rng_of(call.rng, call.dropout_p),
                          .partials = nullptr,
                          .gradients = call.gradients(),
                          .rows = call.rows.count,
                          .width = cuda::row_width(call.rows),
                          .lanes = 0,
                          .dropout = Dropout(nullptr, call.dropout_p)};
  cuda::ColumnSum sum{.partials = nullptr, .gradients = args.gradients, .count = 0, .width = args.width};
  Tensor partials;
  if (args.rows > 0) {
    const cuda::RowPlan plan = cuda::plan_norm_backward(args, place.device());
    if (call.wants_sums()) {
      partials = uninitialised(call.z, {plan.groups(), kColumnSums, args.width}, ScalarType::Float);
      sum.partials = args.partials = static_cast<float*>(partials.data_ptr());
      sum.count = plan.groups();
    }
    cuda::norm_backward(args, plan, place.stream());
  }
  if (call.wants_sums()) cuda::norm_column_sum(sum, place.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CUDA, m) { NormOperators<forward, backward>::implement(m); }

}  // namespace pyllm
