// Binding of softmax and log_softmax on the CPU.
#include "cpu/softmax.h"

#include "checks.h"

namespace pyllm {
namespace {

Tensor forward(const Tensor& x_in, const OptionalTensor& mask_in, double scale, bool is_causal, bool log) {
  const Tensor x = as_contiguous(x_in);
  const Rows rows(x);
  const int64_t rank = x.dim() - 1;
  STD_TORCH_CHECK(rank <= kMaxRank, "softmax: x must have at most ", kMaxRank + 1, " dimensions, got ", rank + 1);
  Tensor y = uninitialised(x, x.sizes());
  if (x.numel() == 0) return y;

  SoftmaxForward args{.x = array(x),
                      .y = array(y),
                      .mask = {},
                      .width = rows.width,
                      .mask_last_stride = 0,
                      .rank = static_cast<int>(rank),
                      .sizes = {},
                      .mask_strides = {},
                      .scale = scale,
                      .is_causal = is_causal,
                      .log = log,
                      .past_caches = past_caches(y)};
  for (int64_t d = 0; d < rank; ++d) args.sizes[d] = x.size(d);
  OptionalTensor mask = mask_in;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == rank + 1, "softmax: attn_mask must have x's number of dimensions");
    auto stride = [&](int64_t d) { return mask->size(d) == 1 ? 0 : mask->stride(d); };
    if (stride(rank) > 1) mask = torch::stable::contiguous(*mask);
    args.mask = array(mask);
    for (int64_t d = 0; d < rank; ++d) args.mask_strides[d] = stride(d);
    args.mask_last_stride = stride(rank);
  }
  torch::stable::parallel_for(
      0, rows.count, rows_per_task(rows.width),
      [&, kernel = pick_softmax_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

Tensor backward(const Tensor& dy_in, const Tensor& y_in, double scale, bool log) {
  const Tensor dy = as_contiguous(dy_in), y = as_contiguous(y_in);
  const Rows rows(y);
  Tensor dx = uninitialised(y, y.sizes());
  if (y.numel() == 0) return dx;
  const SoftmaxBackward args{.dy = array(dy),
                             .y = array(y),
                             .dx = array(dx),
                             .width = rows.width,
                             .scale = scale,
                             .log = log,
                             .past_caches = past_caches(dx)};
  torch::stable::parallel_for(
      0, rows.count, rows_per_task(rows.width),
      [&, kernel = pick_softmax_bwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dx;
}

Tensor softmax_fwd(const Tensor& x, const OptionalTensor& attn_mask, double scale, bool is_causal) {
  return forward(x, attn_mask, scale, is_causal, false);
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale) { return backward(dy, y, scale, false); }

Tensor log_softmax_fwd(const Tensor& x, const OptionalTensor& attn_mask, double scale, bool is_causal) {
  return forward(x, attn_mask, scale, is_causal, true);
}

Tensor log_softmax_bwd(const Tensor& dy, const Tensor& y, double scale) { return backward(dy, y, scale, true); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
  m.impl("log_softmax_fwd", TORCH_BOX(&log_softmax_fwd));
  m.impl("log_softmax_bwd", TORCH_BOX(&log_softmax_bwd));
}

}  // namespace pyllm
