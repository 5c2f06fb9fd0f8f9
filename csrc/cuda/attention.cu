// Binding of attention on CUDA.
#include "cuda/attention.h"

#include <algorithm>

#include "attention_operators.h"
#include "cuda/attention_rows.cuh"
#include "cuda/head_dim.h"
#include "cuda/place.h"

namespace pyllm {
namespace {

using cuda::narrow;

// Whether rows (B, H, S, D) can be copied 16 bytes at a time.
bool is_aligned(const Tensor& t) {
  constexpr int64_t kStep = 8;
  const auto steps = [&](int i) { return t.size(i) == 1 || t.stride(i) % kStep == 0; };
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.size(3) % kStep == 0 && t.stride(3) == 1 &&
         steps(0) && steps(1) && steps(2);
}

// What autograd hands over has any strides, and a view in a compiled graph begins anywhere; nobody could know before.
Tensor aligned_copy(const Tensor& t) { return is_aligned(t) ? t : torch::stable::contiguous(torch::stable::clone(t)); }

const int32_t* bounds_of(const OptionalTensor& cu_seqlens) {
  if (!cu_seqlens.has_value()) return nullptr;
  STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                  "pyllm: attention's cu_seqlens must be int32 vectors");
  return static_cast<const int32_t*>(cu_seqlens->data_ptr());
}

const float* floats(const OptionalTensor& biases) {
  if (!biases.has_value()) return nullptr;
  STD_TORCH_CHECK(biases->scalar_type() == ScalarType::Float && biases->dim() == 2,
                  "pyllm: attention's biases by distance must be matrices of float32");
  return static_cast<const float*>(biases->data_ptr());
}

float* zeros(Tensor& sums, cudaStream_t stream) {
  const size_t bytes = sums.numel() * sums.element_size();
  if (bytes > 0) cuda::check_call(cudaMemsetAsync(sums.data_ptr(), 0, bytes, stream), "cudaMemsetAsync");
  return static_cast<float*>(sums.data_ptr());
}

// A call as kernels take it, and the tensors that its pointers point into.
struct Call {
  Tensor query, key, value;
  OptionalTensor padding, distance_bias, slopes, cu_q, cu_k;
  cuda::Place place;
  bool is_packed;
  cuda::Attention args;

  explicit Call(const AttentionArguments& given)
      : query(aligned_copy(given.query)),
        key(aligned_copy(given.key)),
        value(aligned_copy(given.value)),
        padding(as_contiguous(given.padding)),
        distance_bias(as_contiguous(given.distance_bias)),
        slopes(as_contiguous(given.slopes)),
        cu_q(as_contiguous(given.cu_seqlens_q)),
        cu_k(as_contiguous(given.cu_seqlens_k)),
        place({query, key, value, given.mask, padding, distance_bias, slopes, cu_q, cu_k, given.rng}),
        is_packed(cu_q.has_value()) {
    const ScalarType dtype = query.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "pyllm: attention's CUDA C++ kernels take bfloat16 and float16: choose the backend 'triton'");
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && key.scalar_type() == dtype &&
                        value.scalar_type() == dtype && key.size(1) > 0 && query.size(1) % key.size(1) == 0,
                    "pyllm: attention's query, key and value must have 4 dimensions, one dtype and heads that divide");
    STD_TORCH_CHECK(is_aligned(query) && is_aligned(key) && is_aligned(value),
                    "pyllm: attention's CUDA C++ kernels copy rows by 16 bytes, and take a head_dim that is a multiple "
                    "of 8: choose the backend 'triton'");
    STD_TORCH_CHECK(!is_packed || (cu_k.has_value() && cu_k->numel() == cu_q->numel() && query.size(0) == 1),
                    "pyllm: attention's cu_seqlens_q and cu_seqlens_k must be of one length, with a batch size of 1");
    const int64_t longest = query.size(2) + key.size(2);  // beyond the distance of any query from any key
    args = {.query = heads_of(query),
            .key = heads_of(key),
            .value = heads_of(value),
            .count = narrow(is_packed ? cu_q->numel() - 1 : query.size(0), "sequences"),
            .heads = narrow(query.size(1), "heads"),
            .kv_heads = narrow(key.size(1), "heads"),
            .sq = narrow(query.size(2), "queries"),
            .sk = narrow(key.size(2), "keys"),
            .dim = narrow(query.size(3), "columns"),
            .cu_q = bounds_of(cu_q),
            .cu_k = bounds_of(cu_k),
            .scale = static_cast<float>(given.scale),
            .softcap = static_cast<float>(given.softcap),
            .left = static_cast<int>(std::min(given.left, longest)),
            .right = static_cast<int>(std::min(given.right, longest)),
            .bottom_right = given.bottom_right,
            .rng = rng_of(given.rng, given.dropout_p),
            .dropout = Dropout(nullptr, given.dropout_p),
            .mask = {},
            .padding = padding.has_value() ? static_cast<const bool*>(padding->data_ptr()) : nullptr,
            .bias = floats(distance_bias),
            .distances = distance_bias.has_value() ? narrow(distance_bias->size(1), "distances") : 0,
            .slopes = floats(slopes),
            .slopes_sequence = slopes.has_value() && slopes->size(0) > 1 ? narrow(slopes->size(1), "heads") : 0};
    if (given.mask.has_value()) {
      const auto stride = [&](int64_t i) { return given.mask->size(i) == 1 ? int64_t{0} : given.mask->stride(i); };
      args.mask = {array(given.mask), stride(0), stride(1), stride(2), stride(3)};
    }
  }
};

// Calls body.operator()<T, D>().
template <class Body>
void visit_kernels(const Tensor& query, Body&& body) {
  cuda::visit_head_dim(query.size(3), [&]<int D>() {
    query.scalar_type() == ScalarType::Half ? body.template operator()<__half, D>()
                                            : body.template operator()<__nv_bfloat16, D>();
  });
}

std::tuple<Tensor, Tensor> forward(const AttentionArguments& given) {
  const Call call(given);
  const Tensor& query = given.query;
  Tensor out = new_like(query);
  Tensor lse = uninitialised(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  const cuda::AttentionForward args{
      .call = call.args, .out = heads_of(out), .lse = static_cast<float*>(lse.data_ptr()), .slots = 0};
  visit_kernels(query, [&]<class T, int D>() {
    call.args.is_full() ? cuda::attention_forward<T, D, true>(args, call.place.stream())
                        : cuda::attention_forward<T, D, false>(args, call.place.stream());
  });
  return {out, lse};
}

AttentionGradients backward(const AttentionGradientArguments& given) {
  const Call call(given.call);
  const Tensor &query = given.call.query, &key = given.call.key;
  const OptionalTensor &mask = given.call.mask, &bias = given.call.distance_bias;
  const Tensor out = aligned_copy(given.out), lse = as_contiguous(given.lse);
  const OptionalTensor dlse = as_contiguous(given.dlse);
  const cudaStream_t stream = call.place.stream();
  const cuda::Attention& args = call.args;
  // Of its own where attention_far_rows may write to it.
  const Tensor dout =
      args.adds_mask() ? torch::stable::contiguous(torch::stable::clone(given.dout)) : aligned_copy(given.dout);
  Tensor dquery = new_like(query), dkey = new_like(key), dvalue = new_like(given.call.value);
  Tensor dmask = given.mask_gradient ? uninitialised(*mask, mask->sizes()) : uninitialised(query, {0});
  Tensor dbias = given.bias_gradient ? uninitialised(*bias, bias->sizes()) : uninitialised(query, {0});

  const cuda::BackwardPlan plan = cuda::plan_backward(args.sequences(), args.sk, args.kv_heads, args.dim,
                                                      call.is_packed, given.deterministic, call.place.device());
  const int64_t rows = lse.numel(), parts = int64_t{plan.lines} * plan.blocks;
  Tensor statistics = uninitialised(query, {rows, 2}, ScalarType::Float);
  Tensor dquery_sums = uninitialised(query, {plan.shares, query.numel()}, ScalarType::Float);
  Tensor dbias_sums = uninitialised(query, {given.bias_gradient ? parts : 0, dbias.numel()}, ScalarType::Float);
  const cuda::AttentionBackward tiles{.call = args,
                                      .dout = heads_of(dout),
                                      .dkey = heads_of(dkey),
                                      .dvalue = heads_of(dvalue),
                                      .statistics = static_cast<const cuda::RowStatistics*>(statistics.data_ptr()),
                                      .dquery = zeros(dquery_sums, stream),
                                      .dquery_share = plan.shares > 1 ? query.numel() : 0,
                                      .dbias = given.bias_gradient ? zeros(dbias_sums, stream) : nullptr,
                                      .plan = plan};
  visit_kernels(query, [&]<class T, int D>() {
    cuda::attention_delta<T>({.out = heads_of(out),
                              .dout = tiles.dout,
                              .lse = static_cast<const float*>(lse.data_ptr()),
                              .dlse = dlse.has_value() ? static_cast<const float*>(dlse->data_ptr()) : nullptr,
                              .statistics = static_cast<cuda::RowStatistics*>(statistics.data_ptr()),
                              .rows = rows,
                              .heads = args.heads,
                              .sq = args.sq,
                              .dim = args.dim},
                             stream);
    if (args.adds_mask())
      cuda::attention_far_rows<T>({.call = args,
                                   .lse = static_cast<const float*>(lse.data_ptr()),
                                   .statistics = static_cast<cuda::RowStatistics*>(statistics.data_ptr()),
                                   .dout = tiles.dout,
                                   .rows = rows},
                                  stream);
    args.is_full() ? cuda::attention_backward<T, D, true>(tiles, stream)
                   : cuda::attention_backward<T, D, false>(tiles, stream);
    cuda::attention_sum<T>({.addends = tiles.dquery,
                            .out = array(dquery),
                            .count = query.numel(),
                            .number = plan.shares,
                            .scale = args.scale},
                           stream);
    if (given.mask_gradient)
      cuda::attention_mask_gradient<T, D>({.backward = tiles,
                                           .dmask = array(dmask),
                                           .sequences = narrow(dmask.size(0), "sequences"),
                                           .heads = narrow(dmask.size(1), "heads"),
                                           .rows = narrow(dmask.size(2), "queries"),
                                           .columns = narrow(dmask.size(3), "keys")},
                                          stream);
  });
  if (given.bias_gradient)
    cuda::attention_sum<float>({.addends = tiles.dbias,
                                .out = array(dbias),
                                .count = dbias.numel(),
                                .number = static_cast<int>(parts),
                                .scale = 1},
                               stream);
  return {dquery, dkey, dvalue, dmask, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CUDA, m) { AttentionOperators<forward, backward>::implement(m); }

}  // namespace pyllm
