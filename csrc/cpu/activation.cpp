// Binding of the activations on the CPU.
#include "cpu/activation.h"

#include <string>
#include <tuple>

#include "cpu/row_chunks.h"

namespace pyllm {
namespace {

struct Kind {
  Act act;
  bool gated;

  explicit Kind(const std::string& name) {
    const auto is = [&](const char* plain, const char* with_gate, Act which) {
      gated = name == with_gate;
      act = which;
      return gated || name == plain;
    };
    STD_TORCH_CHECK(is("relu", "reglu", Act::relu) || is("gelu", "geglu", Act::gelu) ||
                        is("gelu_tanh", "geglu_tanh", Act::gelu_tanh) || is("silu", "swiglu", Act::silu),
                    "activation: unknown kind ", name);
  }
};

// The two inputs of a gated activation, or one, as rows of the result's width.
struct Operands {
  Kind kind;
  StridedRows x;
  std::optional<StridedRows> second;
  OptionalTensor bias;
  bool packed;
  int64_t width;

  Operands(const Tensor& x, const OptionalTensor& up, const OptionalTensor& bias, const std::string& kind)
      : kind(kind), x(x), bias(as_contiguous(bias)), packed(this->kind.gated && !up.has_value()) {
    STD_TORCH_CHECK(!up.has_value() || up->scalar_type() == x.scalar_type(),
                    "pyllm: activation's up must have x's dtype");
    if (up.has_value()) second.emplace(*up);
    width = packed ? this->x.width / 2 : this->x.width;
  }

  Array up() const { return packed ? x.data().at(width) : second.has_value() ? second->data() : Array{}; }
  int64_t up_stride() const { return second.has_value() ? second->stride : x.stride; }
};

Tensor activation_fwd(const Tensor& x, const OptionalTensor& up, const OptionalTensor& bias, const OptionalTensor& rng,
                      double dropout_p, const std::string& kind) {
  const Operands in(x, up, bias, kind);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = in.width;
  const Tensor y = uninitialised(x, {sizes.data(), sizes.size()});
  if (y.numel() == 0) return y;
  const ActivationForward args{.gate = in.x.data(),
                               .up = in.up(),
                               .bias = array(in.bias),
                               .y = array(y),
                               .width = in.width,
                               .gate_stride = in.x.stride,
                               .up_stride = in.up_stride(),
                               .act = in.kind.act,
                               .past_caches = past_caches(y),
                               .dropout = dropout_of(rng, dropout_p)};
  torch::stable::parallel_for(
      0, in.x.count, rows_per_task(in.width),
      [&, kernel = pick_activation_fwd()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> activation_bwd(const Tensor& dy_in, const Tensor& x, const OptionalTensor& up,
                                                  const OptionalTensor& bias, const OptionalTensor& rng,
                                                  double dropout_p, const std::string& kind) {
  const Operands in(x, up, bias, kind);
  STD_TORCH_CHECK(dy_in.scalar_type() == x.scalar_type(), "pyllm: activation's dy must have x's dtype");
  const StridedRows dy(dy_in);
  const Tensor dx = uninitialised(x, x.sizes());
  const Tensor dup = up.has_value() ? uninitialised(*up, up->sizes()) : uninitialised(x, {0});
  const Tensor dbias = bias.has_value() ? uninitialised(*bias, bias->sizes()) : uninitialised(x, {0});
  const RowChunks chunks(in.x.count, in.width);
  Tensor partials;
  if (bias.has_value()) partials = uninitialised(x, {chunks.count, in.x.width}, statistics_type(x));
  const ActivationBackward args{.dy = dy.data(),
                                .gate = in.x.data(),
                                .up = in.up(),
                                .bias = array(in.bias),
                                .dgate = array(dx),
                                .dup = in.packed        ? array(dx).at(in.width)
                                       : up.has_value() ? array(dup)
                                                        : Array{},
                                .partials = bias.has_value() ? partials.data_ptr() : nullptr,
                                .rows = in.x.count,
                                .width = in.width,
                                .dy_stride = dy.stride,
                                .gate_stride = in.x.stride,
                                .up_stride = in.up_stride(),
                                .gradient_stride = in.x.width,
                                .rows_per_chunk = chunks.rows,
                                .act = in.kind.act,
                                .past_caches = past_caches(dx),
                                .dropout = dropout_of(rng, dropout_p)};
  torch::stable::parallel_for(0, chunks.count, 1, [&, kernel = pick_activation_bwd()](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
  if (bias.has_value()) add_up_chunks(partials, 0, dbias);
  return {dx, dup, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("activation_fwd", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd", TORCH_BOX(&activation_bwd));
}

}  // namespace pyllm
