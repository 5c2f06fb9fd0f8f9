// Binding of layer_norm, rms_norm, add_layer_norm and add_rms_norm on the CPU.
#include "cpu/norm.h"

#include <algorithm>
#include <tuple>

#include "checks.h"

namespace pyllm {
namespace {

struct Normalised {
  Tensor y, z, mean, rstd;
};

Normalised forward(const Tensor& x_in, const OptionalTensor& residual_in, const OptionalTensor& weight_in,
                   const OptionalTensor& bias_in, const Dropout& dropout, double eps, bool rms) {
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor residual = as_contiguous(residual_in), weight = as_contiguous(weight_in),
                       bias = as_contiguous(bias_in);
  const Tensor& like = residual.has_value() ? *residual : x;
  const Rows rows(x);
  Normalised out;
  out.y = uninitialised(like, x.sizes());
  if (residual.has_value()) out.z = uninitialised(like, x.sizes());
  if (!rms) out.mean = uninitialised(x, {rows.count}, statistics_type(like));
  out.rstd = uninitialised(x, {rows.count}, statistics_type(like));
  if (rows.count == 0) return out;

  const NormForward args{.x = array(x),
                         .residual = array(residual),
                         .weight = array(weight),
                         .bias = array(bias),
                         .y = array(out.y),
                         .z = residual.has_value() ? array(out.z) : Array{},
                         .mean = rms ? nullptr : out.mean.data_ptr(),
                         .rstd = out.rstd.data_ptr(),
                         .width = rows.width,
                         .eps = eps,
                         .rms = rms,
                         .past_caches = past_caches(out.y),
                         .dropout = dropout};
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.width),
                              [&, kernel = pick_norm_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

struct Gradients {
  Tensor dx, dresidual, dweight, dbias;
};

// x_dtype is empty where there is no residual: then dresidual is the gradient of x.
Gradients backward(const Tensor& dy_in, const OptionalTensor& dz_in, const Tensor& z_in,
                   const OptionalTensor& weight_in, const OptionalTensor& bias, const Tensor* mean, const Tensor& rstd,
                   const Dropout& dropout, std::optional<ScalarType> x_dtype) {
  const Tensor dy = as_contiguous(dy_in), z = as_contiguous(z_in);
  const OptionalTensor dz = as_contiguous(dz_in), weight = as_contiguous(weight_in);
  const Rows rows(z);
  const bool separate = x_dtype.has_value() && (dropout || *x_dtype != z.scalar_type());
  Gradients out;
  out.dresidual = uninitialised(z, z.sizes());
  if (x_dtype.has_value()) {
    out.dx = separate ? uninitialised(z, z.sizes(), *x_dtype) : uninitialised(z, {0}, *x_dtype);
  }
  out.dweight = weight.has_value() ? uninitialised(*weight, weight->sizes()) : uninitialised(z, {0});
  out.dbias = bias.has_value() ? uninitialised(*bias, bias->sizes()) : uninitialised(z, {0});

  // One chunk of rows for each thread: its partial sums are added in order, so gradients do not vary from run to run.
  const int64_t tasks = (rows.count + rows_per_task(rows.width) - 1) / rows_per_task(rows.width);
  const int64_t chunks = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t rows_per_chunk = chunks == 0 ? 0 : (rows.count + chunks - 1) / chunks;
  const bool parameters = weight.has_value() || bias.has_value();
  Tensor partials;
  if (parameters) partials = uninitialised(z, {chunks, 2, rows.width}, statistics_type(z));
  const NormBackward args{.dy = array(dy),
                          .dz = array(dz),
                          .z = array(z),
                          .weight = array(weight),
                          .dx = separate ? array(out.dx) : Array{},
                          .dresidual = array(out.dresidual),
                          .mean = mean != nullptr ? mean->data_ptr() : nullptr,
                          .rstd = rstd.data_ptr(),
                          .partials = parameters ? partials.data_ptr() : nullptr,
                          .rows = rows.count,
                          .width = rows.width,
                          .rows_per_chunk = rows_per_chunk,
                          .rms = mean == nullptr,
                          .past_caches = past_caches(out.dresidual),
                          .dropout = dropout};
  torch::stable::parallel_for(0, chunks, 1,
                              [&, kernel = pick_norm_bwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (parameters) {
    const ColumnSum sum{.partials = partials.data_ptr(),
                        .dweight = weight.has_value() ? array(out.dweight) : Array{},
                        .dbias = bias.has_value() ? array(out.dbias) : Array{},
                        .chunks = chunks,
                        .width = rows.width,
                        .compute = z.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32};
    torch::stable::parallel_for(0, rows.width, kGrain, [&, kernel = pick_column_sum()](int64_t begin, int64_t end) {
      kernel(sum, begin, end);
    });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps) {
  const Normalised out = forward(x, {}, weight, bias, {}, eps, false);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd) {
  const Gradients out = backward(dy, {}, x, weight, bias, &mean, rstd, {}, {});
  return {out.dresidual, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptionalTensor& weight, double eps) {
  const Normalised out = forward(x, {}, weight, {}, {}, eps, true);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                        const Tensor& rstd) {
  const Gradients out = backward(dy, {}, x, weight, {}, nullptr, rstd, {}, {});
  return {out.dresidual, out.dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const OptionalTensor& weight, const OptionalTensor& bias,
                                                              const OptionalTensor& rng, double dropout_p, double eps) {
  const Normalised out = forward(x, residual, weight, bias, dropout_of(rng, dropout_p), eps, false);
  return {out.y, out.z, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dy, const OptionalTensor& dz,
                                                              const Tensor& z, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, const Tensor& mean,
                                                              const Tensor& rstd, const OptionalTensor& rng,
                                                              double dropout_p, ScalarType x_dtype) {
  const Gradients out = backward(dy, dz, z, weight, bias, &mean, rstd, dropout_of(rng, dropout_p), x_dtype);
  return {out.dx, out.dresidual, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const OptionalTensor& weight, const OptionalTensor& rng,
                                                    double dropout_p, double eps) {
  const Normalised out = forward(x, residual, weight, {}, dropout_of(rng, dropout_p), eps, true);
  return {out.y, out.z, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(const Tensor& dy, const OptionalTensor& dz, const Tensor& z,
                                                    const OptionalTensor& weight, const Tensor& rstd,
                                                    const OptionalTensor& rng, double dropout_p, ScalarType x_dtype) {
  const Gradients out = backward(dy, dz, z, weight, {}, nullptr, rstd, dropout_of(rng, dropout_p), x_dtype);
  return {out.dx, out.dresidual, out.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd));
}

}  // namespace pyllm
