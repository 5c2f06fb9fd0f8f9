// Binding of the rotary embedding on the CPU.
#include "cpu/rotary.h"

#include "attention_tensors.h"

namespace pyllm {
namespace {

HeadRows head_rows(const Tensor& t) {
  return {.data = array(t), .batch_stride = t.stride(0), .head_stride = t.stride(1), .row_stride = t.stride(2)};
}

void rotate(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == statistics_type(x) &&
                      sin.scalar_type() == cos.scalar_type() && cos.numel() == sin.numel(),
                  "rotary: cos and sin must be contiguous, in the statistics type");
  if (x.numel() == 0) return;
  const RotaryCall args{.x = head_rows(x),
                        .y = head_rows(y),
                        .cos = cos.data_ptr(),
                        .sin = sin.data_ptr(),
                        .heads = x.size(1),
                        .length = x.size(2),
                        .width = x.size(3),
                        .pairs = cos.size(cos.dim() - 1),
                        .table_batch_stride = cos.dim() == 3 ? cos.stride(0) : 0,
                        .interleaved = interleaved,
                        .inverse = inverse};
  torch::stable::parallel_for(
      0, x.size(0) * args.length, rows_per_task(args.heads * args.width),
      [&, kernel = pick_rotary_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Stored as (batch, length, heads, width).
Tensor rotary_fwd(const Tensor& x_in, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const Tensor x = x_in.size(3) > 1 && x_in.stride(3) != 1 ? torch::stable::contiguous(x_in) : x_in;
  const Tensor y = new_like(x);
  rotate(x, y, cos, sin, interleaved, inverse);
  return y;
}

void rotary_inplace_fwd(Tensor x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "rotary: x must have a contiguous last dimension");
  rotate(x, x, cos, sin, interleaved, inverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_inplace_fwd", TORCH_BOX(&rotary_inplace_fwd));
}

}  // namespace pyllm
