// Binding of dropout_add on the CPU.
#include "cpu/dropout_add.h"

#include <tuple>

#include "cpu/row_chunks.h"

namespace pyllm {
namespace {

Tensor dropout_add_fwd(const Tensor& x_in, const Tensor& residual_in, const OptionalTensor& bias_in,
                       const OptionalTensor& rng, double dropout_p) {
  const Tensor x = as_contiguous(x_in), residual = as_contiguous(residual_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  const Tensor y = uninitialised(residual, residual.sizes());
  if (y.numel() == 0) return y;
  const Rows rows(x);
  const DropoutAddForward args{.x = array(x),
                               .residual = array(residual),
                               .bias = array(bias),
                               .y = array(y),
                               .width = rows.width,
                               .past_caches = past_caches(y),
                               .dropout = dropout_of(rng, dropout_p)};
  torch::stable::parallel_for(
      0, rows.count, rows_per_task(rows.width),
      [&, kernel = pick_dropout_add_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> dropout_add_bwd(const Tensor& dy_in, const OptionalTensor& bias, const OptionalTensor& rng,
                                           double dropout_p, ScalarType x_dtype) {
  const Tensor dy = as_contiguous(dy_in);
  const Tensor dx = uninitialised(dy, dy.sizes(), x_dtype);
  const Tensor dbias = bias.has_value() ? uninitialised(*bias, bias->sizes()) : uninitialised(dy, {0});
  const Rows rows(dy);
  const RowChunks chunks(rows.count, rows.width);
  Tensor partials;
  if (bias.has_value()) partials = uninitialised(dy, {chunks.count, rows.width}, statistics_type(dy));
  const DropoutAddBackward args{.dy = array(dy),
                                .dx = array(dx),
                                .partials = bias.has_value() ? partials.data_ptr() : nullptr,
                                .rows = rows.count,
                                .width = rows.width,
                                .rows_per_chunk = chunks.rows,
                                .past_caches = past_caches(dx),
                                .dropout = dropout_of(rng, dropout_p)};
  torch::stable::parallel_for(0, chunks.count, 1, [&, kernel = pick_dropout_add_bwd()](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
  if (bias.has_value()) add_up_chunks(partials, 0, dbias);
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("dropout_add_fwd", TORCH_BOX(&dropout_add_fwd));
  m.impl("dropout_add_bwd", TORCH_BOX(&dropout_add_bwd));
}

}  // namespace pyllm
