// Binding of cross-entropy on the CPU.
#include "cpu/cross_entropy.h"

#include "checks.h"

namespace pyllm {
namespace {

template <class Kernel, class Args>
void over_rows(Kernel* kernel, const Args& args, int64_t rows, int64_t width) {
  torch::stable::parallel_for(0, rows, rows_per_task(width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void check_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "pyllm: ", name, ", which is written to, must be contiguous");
}

// One index for each row of logits.
Tensor indices(const Tensor& target, const Rows& rows) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == rows.count,
                  "pyllm: target must be int64, one for each row of logits");
  return as_contiguous(target);
}

Array statistics(const char* name, const Tensor& t, const Tensor& logits, int64_t elements) {
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(logits) && t.numel() == elements && t.is_contiguous(),
                  "pyllm: ", name, " must be ", elements, " contiguous numbers of the statistics' type");
  return array(t);
}

double sum_of(const Array& weight, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i)
    total += weight.dtype == DType::f64 ? weight.as<const double>()[i] : weight.as<const float>()[i];
  return total;
}

// Per-row losses; the gradient goes to `gradient`, which may be `logits`, unless that is null.
Tensor forward(const Tensor& logits, Tensor* gradient, const Tensor& target, const OptionalTensor& weight,
               const OptionalTensor& scale, int64_t ignore_index, double label_smoothing, double z_loss) {
  const Rows rows(logits);
  const Tensor index = indices(target, rows);
  Tensor loss = uninitialised(logits, target.sizes(), statistics_type(logits));
  CrossEntropyForward args{.logits = array(logits),
                           .gradient = gradient == nullptr ? Array{} : array(*gradient),
                           .target = static_cast<const int64_t*>(index.data_ptr()),
                           .weight = {},
                           .scale = {},
                           .loss = array(loss),
                           .width = rows.width,
                           .ignore_index = ignore_index,
                           .weight_total = static_cast<double>(rows.width),
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss};
  if (weight.has_value()) {
    args.weight = statistics("weight", *weight, logits, rows.width);
    args.weight_total = sum_of(args.weight, rows.width);
  }
  if (scale.has_value()) args.scale = statistics("scale", *scale, logits, 1);
  over_rows(pick_cross_entropy_fwd(), args, rows.count, rows.width);
  return loss;
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits_in, const Tensor& target,
                                             const OptionalTensor& weight, const OptionalTensor& scale,
                                             int64_t ignore_index, double label_smoothing, double z_loss,
                                             bool gradient) {
  const Tensor logits = as_contiguous(logits_in);
  Tensor dlogits = gradient ? uninitialised(logits, logits.sizes()) : uninitialised(logits, {0});
  Tensor loss =
      forward(logits, gradient ? &dlogits : nullptr, target, weight, scale, ignore_index, label_smoothing, z_loss);
  return {loss, dlogits};
}

Tensor cross_entropy_inplace_fwd(Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                 const OptionalTensor& scale, int64_t ignore_index, double label_smoothing,
                                 double z_loss) {
  check_contiguous("logits", logits);
  return forward(logits, &logits, target, weight, scale, ignore_index, label_smoothing, z_loss);
}

void cross_entropy_bwd(Tensor gradient, const Tensor& factor) {
  if (gradient.numel() == 0) return;
  check_contiguous("gradient", gradient);
  const bool shared = factor.numel() == 1;
  const int64_t rows = shared ? gradient.numel() / gradient.size(gradient.dim() - 1) : factor.numel();
  const CrossEntropyBackward args{.gradient = array(gradient),
                                  .factor = statistics("factor", factor, gradient, shared ? 1 : rows),
                                  .width = gradient.numel() / rows,
                                  .shared = shared};
  over_rows(pick_cross_entropy_bwd(), args, rows, args.width);
}

void cross_entropy_shard_fwd(Tensor statistic, const Tensor& logits_in, const Tensor& target, int64_t first) {
  const Tensor logits = as_contiguous(logits_in);
  const Rows rows(logits);
  const Tensor index = indices(target, rows);
  const CrossEntropyShardForward args{.logits = array(logits),
                                      .statistics = statistics("statistics", statistic, logits, 4 * rows.count),
                                      .target = static_cast<const int64_t*>(index.data_ptr()),
                                      .rows = rows.count,
                                      .width = rows.width,
                                      .first = first};
  over_rows(pick_cross_entropy_shard_fwd(), args, rows.count, rows.width);
}

void cross_entropy_shard_bwd(Tensor logits, const Tensor& coefficients, const Tensor& target, int64_t first) {
  check_contiguous("logits", logits);
  const Rows rows(logits);
  const Tensor index = indices(target, rows);
  const CrossEntropyShardBackward args{.logits = array(logits),
                                       .coefficients = statistics("coefficients", coefficients, logits, 4 * rows.count),
                                       .target = static_cast<const int64_t*>(index.data_ptr()),
                                       .rows = rows.count,
                                       .width = rows.width,
                                       .first = first};
  over_rows(pick_cross_entropy_shard_bwd(), args, rows.count, rows.width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_inplace_fwd", TORCH_BOX(&cross_entropy_inplace_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_shard_fwd", TORCH_BOX(&cross_entropy_shard_fwd));
  m.impl("cross_entropy_shard_bwd", TORCH_BOX(&cross_entropy_shard_bwd));
}

}  // namespace pyllm
