// Binding of attention on the CPU.
#include "cpu/attention.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "checks.h"

namespace pyllm {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

Heads heads_of(const Tensor& t) { return {array(t), t.stride(0), t.stride(1), t.stride(2)}; }

// (B, H, S, D), uninitialised, stored as (B, S, H, D)
Tensor new_like(const Tensor& t) {
  return torch::stable::transpose(new_empty(t, {t.size(0), t.size(2), t.size(1), t.size(3)}), 1, 2);
}

int64_t padded_width(const Tensor& t) {
  const int64_t unit = kRowBytes / (t.scalar_type() == ScalarType::Double ? 8 : 4);
  return (t.size(3) + unit - 1) / unit * unit;
}

// The tensor itself where kernels can read it, else a copy in the compute type with padded rows.
Tensor packed(const Tensor& t_in, bool padded) {
  const Tensor t = with_contiguous_rows(t_in);
  const int64_t width = padded_width(t);
  if (t.scalar_type() == statistics_type(t) && (!padded || width == t.size(3))) return t;
  Tensor to = new_empty(t, {t.size(0), t.size(1), t.size(2), width}, statistics_type(t));
  const PackRows args{
      .from = heads_of(t), .to = to.data_ptr(), .heads = t.size(1), .rows = t.size(2), .dim = t.size(3)};
  parallel_for(0, t.size(0) * t.size(1) * t.size(2), rows_per_task(width),
               [&, kernel = pick_attention_pack()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return to;
}

// A mask whose columns are contiguous or all one.
OptionalTensor with_readable_columns(const OptionalTensor& mask) {
  const bool readable = !mask.has_value() || mask->size(3) == 1 || mask->stride(3) <= 1;
  return readable ? mask : OptionalTensor(torch::stable::contiguous(*mask));
}

// The arguments of a call, and the tensors that its pointers point into.
struct Call {
  Tensor query, key, value;
  OptionalTensor mask, padding;
  Attention args;

  Call(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const OptionalTensor& mask_in,
       const OptionalTensor& padding_in, const OptionalTensor& rng, double scale, double dropout_p, int64_t left,
       int64_t right, bool bottom_right, bool padded_keys)
      : query(with_contiguous_rows(query_in)),
        key(packed(key_in, padded_keys)),
        value(packed(value_in, true)),
        mask(with_readable_columns(mask_in)),
        padding(as_contiguous(padding_in)) {
    const int64_t sq = query.size(2), sk = key.size(2);
    STD_TORCH_CHECK(query.dim() == 4 && key_in.scalar_type() == query.scalar_type() &&
                        value_in.scalar_type() == query.scalar_type() && query.size(1) % key.size(1) == 0,
                    "pyllm: attention's query, key and value must have 4 dimensions, one dtype and heads that divide");
    args = {.query = heads_of(query),
            .key = heads_of(key),
            .value = heads_of(value),
            .mask = {},
            .padding = padding.has_value() ? static_cast<const bool*>(padding->data_ptr()) : nullptr,
            .batches = query.size(0),
            .heads = query.size(1),
            .kv_heads = key.size(1),
            .sq = sq,
            .sk = sk,
            .dim = query.size(3),
            .scale = scale,
            .left = std::min(left, sq + sk),
            .right = std::min(right, sq + sk),
            .shift = bottom_right ? sk - sq : 0,
            .dropout = dropout_of(rng, dropout_p)};
    if (mask.has_value()) {
      const auto stride = [&](int64_t i) { return mask->size(i) == 1 ? int64_t{0} : mask->stride(i); };
      args.mask = {array(mask), stride(0), stride(1), stride(2), stride(3)};
    }
  }
};

int64_t grain(const Attention& args, int64_t rows) {
  return std::max<int64_t>(1, kGrain / (1 + rows * args.sk * args.dim));
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& mask, const OptionalTensor& padding,
                                         const OptionalTensor& rng, double scale, double dropout_p, int64_t left,
                                         int64_t right, bool bottom_right) {
  const Call call(query, key, value, mask, padding, rng, scale, dropout_p, left, right, bottom_right, false);
  const Attention& args = call.args;
  Tensor out = new_like(query);
  Tensor lse = new_empty(query, {args.batches, args.heads, args.sq}, statistics_type(query));
  const AttentionForward forward{.call = args, .out = heads_of(out), .lse = lse.data_ptr()};
  parallel_for(0, args.batches * args.heads * args.blocks(), grain(args, std::min<int64_t>(args.sq, kQueryBlock)),
               [&, kernel = pick_attention_fwd()](int64_t begin, int64_t end) { kernel(forward, begin, end); });
  return {out, lse};
}

// Into how many parts a key head's queries are dealt out, so that threads get equal shares: each part costs memory for
// its own gradient of the keys and values, so one part where there are many heads for each thread.
int64_t parts_of(const Attention& args) {
  const int64_t key_heads = std::max<int64_t>(1, args.batches * args.kv_heads);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = key_heads >= 8 * threads ? 1 : threads / std::gcd(key_heads, threads);
  return std::clamp<int64_t>(args.heads / args.kv_heads * args.blocks(), 1, parts);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_in, const OptionalTensor& dlse_in,
                                                         const Tensor& query, const Tensor& key, const Tensor& value,
                                                         const OptionalTensor& mask, const OptionalTensor& padding,
                                                         const OptionalTensor& rng, const Tensor& out_in,
                                                         const Tensor& lse_in, double scale, double dropout_p,
                                                         int64_t left, int64_t right, bool bottom_right,
                                                         bool mask_gradient) {
  const Call call(query, key, value, mask, padding, rng, scale, dropout_p, left, right, bottom_right, true);
  const Attention& args = call.args;
  const Tensor dout = with_contiguous_rows(dout_in), out = with_contiguous_rows(out_in), lse = as_contiguous(lse_in);
  const OptionalTensor dlse = as_contiguous(dlse_in);
  Tensor dquery = new_like(query), dkey = new_like(key), dvalue = new_like(value);
  const int64_t parts = parts_of(args), tasks = args.batches * args.kv_heads * parts;
  Tensor partials = new_empty(query, {tasks, 2, args.sk, padded_width(query)}, statistics_type(query));
  const AttentionBackward backward{.call = args,
                                   .out = heads_of(out),
                                   .dout = heads_of(dout),
                                   .dquery = heads_of(dquery),
                                   .lse = lse.data_ptr(),
                                   .dlse = dlse.has_value() ? dlse->data_ptr() : nullptr,
                                   .partials = partials.data_ptr(),
                                   .parts = parts};
  parallel_for(0, tasks, grain(args, args.sq),
               [&, kernel = pick_attention_bwd()](int64_t begin, int64_t end) { kernel(backward, begin, end); });

  const KeyGradient sums{.partials = partials.data_ptr(),
                         .dkey = heads_of(dkey),
                         .dvalue = heads_of(dvalue),
                         .kv_heads = args.kv_heads,
                         .parts = parts,
                         .sk = args.sk,
                         .dim = args.dim,
                         .scale = scale};
  parallel_for(0, args.batches * args.kv_heads * args.sk, rows_per_task(args.dim),
               [&, kernel = pick_attention_key_gradient()](int64_t begin, int64_t end) { kernel(sums, begin, end); });

  Tensor dmask = mask_gradient ? new_empty(*mask, mask->sizes()) : new_empty(query, {0});
  if (mask_gradient) {
    const MaskGradient gradient{.backward = backward,
                                .dmask = array(dmask),
                                .batches = mask->size(0),
                                .heads = mask->size(1),
                                .rows = mask->size(2),
                                .columns = mask->size(3)};
    parallel_for(
        0, mask->size(0) * mask->size(1) * gradient.row_blocks() * gradient.column_blocks(), 1,
        [&, kernel = pick_attention_mask_gradient()](int64_t begin, int64_t end) { kernel(gradient, begin, end); });
  }
  return {dquery, dkey, dvalue, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace pyllm
