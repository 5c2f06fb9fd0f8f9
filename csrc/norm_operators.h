// layer_norm, rms_norm, add_layer_norm and add_rms_norm as their schemas have them, over the two functions of a device.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"
#include "norm_sums.h"

namespace pyllm {

// What a forward is given, contiguous, and what it fills.
struct NormCall {
  Tensor x;
  OptionalTensor residual, weight, bias, x_bias, rng;
  double dropout_p, eps;
  bool rms;
  Rows rows;
  Tensor y, z, mean, rstd;  // z only with a residual, mean only without rms

  NormCall(const Tensor& x_in, const OptionalTensor& residual_in, const OptionalTensor& weight_in,
           const OptionalTensor& bias_in, const OptionalTensor& x_bias_in, const OptionalTensor& rng, double dropout_p,
           double eps, bool rms)
      : x(as_contiguous(x_in)),
        residual(as_contiguous(residual_in)),
        weight(as_contiguous(weight_in)),
        bias(as_contiguous(bias_in)),
        x_bias(as_contiguous(x_bias_in)),
        rng(rng),
        dropout_p(dropout_p),
        eps(eps),
        rms(rms),
        rows(x) {
    const Tensor& like = residual.has_value() ? *residual : x;
    y = uninitialised(like, x.sizes());
    if (residual.has_value()) z = uninitialised(like, x.sizes());
    if (!rms) mean = uninitialised(x, {rows.count}, statistics_type(like));
    rstd = uninitialised(x, {rows.count}, statistics_type(like));
  }
};

// What a backward is given, contiguous, and what it fills. dx is there where it differs from dresidual; x_dtype is
// empty where there is no residual: then dresidual is the gradient of x.
struct NormGradientCall {
  Tensor dy, z;
  OptionalTensor dz, weight, bias, x_bias, mean;
  Tensor rstd;
  OptionalTensor rng;
  double dropout_p;
  Rows rows;
  bool has_dx;
  Tensor dx, dresidual, dweight, dbias, dx_bias;  // (0,) where there is nothing

  NormGradientCall(const Tensor& dy_in, const OptionalTensor& dz_in, const Tensor& z_in,
                   const OptionalTensor& weight_in, const OptionalTensor& bias, const OptionalTensor& x_bias,
                   const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& rng, double dropout_p,
                   std::optional<ScalarType> x_dtype)
      : dy(as_contiguous(dy_in)),
        z(as_contiguous(z_in)),
        dz(as_contiguous(dz_in)),
        weight(as_contiguous(weight_in)),
        bias(bias),
        x_bias(x_bias),
        mean(as_contiguous(mean)),
        rstd(as_contiguous(rstd)),
        rng(rng),
        dropout_p(dropout_p),
        rows(z),
        has_dx(x_dtype.has_value() && (dropout_p != 0.0 || *x_dtype != z.scalar_type())) {
    dresidual = uninitialised(z, z.sizes());
    if (x_dtype.has_value()) dx = has_dx ? uninitialised(z, z.sizes(), *x_dtype) : uninitialised(z, {0}, *x_dtype);
    dweight = gradient_of(weight);
    dbias = gradient_of(bias);
    dx_bias = gradient_of(x_bias);
  }

  bool wants_sums() const { return weight.has_value() || bias.has_value() || x_bias.has_value(); }

  ColumnGradients gradients() const {
    const auto wanted = [](const OptionalTensor& parameter, const Tensor& gradient) {
      return parameter.has_value() ? array(gradient) : Array{};
    };
    return {{wanted(weight, dweight), wanted(bias, dbias), wanted(x_bias, dx_bias)}};
  }

 private:
  Tensor gradient_of(const OptionalTensor& parameter) const {
    return parameter.has_value() ? uninitialised(*parameter, parameter->sizes()) : uninitialised(z, {0});
  }
};

template <void forward(const NormCall&), void backward(const NormGradientCall&)>
struct NormOperators {
  static std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, double eps) {
    const NormCall call(x, {}, weight, bias, {}, {}, 0.0, eps, false);
    forward(call);
    return {call.y, call.mean, call.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& rstd) {
    const NormGradientCall call(dy, {}, x, weight, bias, {}, mean, rstd, {}, 0.0, {});
    backward(call);
    return {call.dresidual, call.dweight, call.dbias};
  }

  static std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptionalTensor& weight, double eps) {
    const NormCall call(x, {}, weight, {}, {}, {}, 0.0, eps, true);
    forward(call);
    return {call.y, call.rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                 const Tensor& rstd) {
    const NormGradientCall call(dy, {}, x, weight, {}, {}, {}, rstd, {}, 0.0, {});
    backward(call);
    return {call.dresidual, call.dweight};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
      const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& x_bias, const OptionalTensor& rng, double dropout_p, double eps) {
    const NormCall call(x, residual, weight, bias, x_bias, rng, dropout_p, eps, false);
    forward(call);
    return {call.y, call.z, call.mean, call.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
      const Tensor& dy, const OptionalTensor& dz, const Tensor& z, const OptionalTensor& weight,
      const OptionalTensor& bias, const OptionalTensor& x_bias, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& rng, double dropout_p, ScalarType x_dtype) {
    const NormGradientCall call(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype);
    backward(call);
    return {call.dx, call.dresidual, call.dweight, call.dbias, call.dx_bias};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                             const OptionalTensor& weight, const OptionalTensor& x_bias,
                                                             const OptionalTensor& rng, double dropout_p, double eps) {
    const NormCall call(x, residual, weight, {}, x_bias, rng, dropout_p, eps, true);
    forward(call);
    return {call.y, call.z, call.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> add_rms_norm_bwd(const Tensor& dy, const OptionalTensor& dz,
                                                                     const Tensor& z, const OptionalTensor& weight,
                                                                     const OptionalTensor& x_bias, const Tensor& rstd,
                                                                     const OptionalTensor& rng, double dropout_p,
                                                                     ScalarType x_dtype) {
    const NormGradientCall call(dy, dz, z, weight, {}, x_bias, {}, rstd, rng, dropout_p, x_dtype);
    backward(call);
    return {call.dx, call.dresidual, call.dweight, call.dx_bias};
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
    library.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
    library.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
    library.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
    library.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
    library.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
    library.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
    library.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd));
  }
};

}  // namespace pyllm
