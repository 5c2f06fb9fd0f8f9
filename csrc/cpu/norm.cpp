// Binding of layer_norm, rms_norm, add_layer_norm and add_rms_norm on the CPU.
#include "cpu/norm.h"

#include "cpu/row_chunks.h"
#include "norm_operators.h"

namespace pyllm {
namespace {

void forward(const NormCall& call) {
  const Dropout dropout = dropout_of(call.rng, call.dropout_p);
  if (call.rows.count == 0) return;
  const NormForward args{.x = array(call.x),
                         .residual = array(call.residual),
                         .weight = array(call.weight),
                         .bias = array(call.bias),
                         .x_bias = array(call.x_bias),
                         .y = array(call.y),
                         .z = call.residual.has_value() ? array(call.z) : Array{},
                         .mean = call.rms ? nullptr : call.mean.data_ptr(),
                         .rstd = call.rstd.data_ptr(),
                         .width = call.rows.width,
                         .eps = call.eps,
                         .rms = call.rms,
                         .past_caches = past_caches(call.y),
                         .dropout = dropout};
  torch::stable::parallel_for(0, call.rows.count, rows_per_task(call.rows.width),
                              [&, kernel = pick_norm_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void backward(const NormGradientCall& call) {
  const Tensor& z = call.z;
  const Rows rows = call.rows;
  const RowChunks chunks(rows.count, rows.width);
  Tensor partials;
  if (call.wants_sums()) partials = uninitialised(z, {chunks.count, kColumnSums * rows.width}, statistics_type(z));
  const NormBackward args{.dy = array(call.dy),
                          .dz = array(call.dz),
                          .z = array(z),
                          .weight = array(call.weight),
                          .dx = call.has_dx ? array(call.dx) : Array{},
                          .dresidual = array(call.dresidual),
                          .mean = call.mean.has_value() ? call.mean->data_ptr() : nullptr,
                          .rstd = call.rstd.data_ptr(),
                          .partials = call.wants_sums() ? partials.data_ptr() : nullptr,
                          .gradients = call.gradients(),
                          .rows = rows.count,
                          .width = rows.width,
                          .rows_per_chunk = chunks.rows,
                          .rms = !call.mean.has_value(),
                          .past_caches = past_caches(call.dresidual),
                          .dropout = dropout_of(call.rng, call.dropout_p)};
  torch::stable::parallel_for(0, chunks.count, 1,
                              [&, kernel = pick_norm_bwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  for (int which = 0; which < kColumnSums; ++which)
    if (args.gradients.at[which]) add_up_chunks(partials, which * rows.width, args.gradients.at[which], rows.width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) { NormOperators<forward, backward>::implement(m); }

}  // namespace pyllm
