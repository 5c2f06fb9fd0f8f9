// Binding of attention on the CPU.
#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "attention_operators.h"
#include "cpu/attention_binding.h"

namespace pyllm {
namespace {

using torch::stable::parallel_for;

// Keys or values as products with them read the rows: the tensor itself, or a copy in the compute type.
Tensor readable(const Tensor& t_in) {
  const Tensor t = with_contiguous_rows(t_in);
  if (t.scalar_type() == statistics_type(t) || multiplies_pairs(array(t).dtype)) return t;
  Tensor to = uninitialised(t, t.sizes(), statistics_type(t));
  const PackRows args{
      .from = heads_of(t), .to = to.data_ptr(), .heads = t.size(1), .rows = t.size(2), .dim = t.size(3)};
  parallel_for(0, t.size(0) * t.size(1) * t.size(2), rows_per_task(t.size(3)),
               [&, kernel = pick_attention_pack()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return to;
}

// A mask whose columns are contiguous or all one.
OptionalTensor with_readable_columns(const OptionalTensor& mask) {
  const bool readable = !mask.has_value() || mask->size(3) == 1 || mask->stride(3) <= 1;
  return readable ? mask : OptionalTensor(torch::stable::contiguous(*mask));
}

// Where the packed sequences begin among `rows` rows, and the last one's end.
const int32_t* bounds_of(const OptionalTensor& cu_seqlens, int64_t count, int64_t rows) {
  STD_TORCH_CHECK(cu_seqlens.has_value() && cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->size(0) == count + 1,
                  "pyllm: attention's cu_seqlens_q and cu_seqlens_k must be int32 and of one length");
  const auto* bounds = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] <= rows && std::is_sorted(bounds, bounds + count + 1),
                  "pyllm: attention's cu_seqlens must go from 0 up to at most the number of rows, never decreasing");
  return bounds;
}

int64_t panels_of(const Sequence& sequence) { return (sequence.sk + kPanel - 1) / kPanel; }

std::vector<Sequence> sequences_of(const AttentionArguments& given) {
  const int64_t batches = given.query.size(0), sq = given.query.size(2), sk = given.key.size(2);
  const bool packed = given.cu_seqlens_q.has_value();
  std::vector<Sequence> sequences;
  if (packed) {
    const OptionalTensor cu_q = as_contiguous(given.cu_seqlens_q), cu_k = as_contiguous(given.cu_seqlens_k);
    const int64_t count = cu_q->numel() - 1;
    STD_TORCH_CHECK(batches == 1 && count >= 0, "pyllm: packed sequences must have a batch size of 1");
    const int32_t *q = bounds_of(cu_q, count, sq), *k = bounds_of(cu_k, count, sk);
    for (int64_t i = 0; i < count; ++i) {
      sequences.push_back({.index = i,
                           .batch = 0,
                           .query = q[i],
                           .key = k[i],
                           .sq = q[i + 1] - q[i],
                           .sk = k[i + 1] - k[i],
                           .shift = 0,
                           .panel = 0});
    }
  } else {
    for (int64_t i = 0; i < batches; ++i)
      sequences.push_back({.index = i, .batch = i, .query = 0, .key = 0, .sq = sq, .sk = sk, .shift = 0, .panel = 0});
  }
  int64_t panel = 0;
  for (Sequence& sequence : sequences) {
    if (given.bottom_right) sequence.shift = sequence.sk - sequence.sq;
    sequence.panel = panel;
    panel += panels_of(sequence);
  }
  return sequences;
}

int64_t pairs(const Sequence& sequence) { return sequence.sq * sequence.sk; }

// What a call is made of, and the tensors that its pointers point into.
struct Call {
  Tensor query, key, value;
  OptionalTensor mask, padding, distance_bias, slopes;
  Tensor panels;
  std::vector<Sequence> sequences;
  int64_t query_end, key_end;  // of the sequences: rows from there on belong to none
  Attention args;

  Call(const AttentionArguments& given, Keys Attention::* summed)
      : query(with_contiguous_rows(given.query)),
        key(readable(given.key)),
        value(readable(given.value)),
        mask(with_readable_columns(given.mask)),
        padding(as_contiguous(given.padding)),
        distance_bias(as_contiguous(given.distance_bias)),
        slopes(as_contiguous(given.slopes)),
        sequences(sequences_of(given)) {
    STD_TORCH_CHECK(query.dim() == 4 && given.key.scalar_type() == query.scalar_type() &&
                        given.value.scalar_type() == query.scalar_type() && query.size(1) % key.size(1) == 0,
                    "pyllm: attention's query, key and value must have 4 dimensions, one dtype and heads that divide");
    query_end = query.size(2);
    key_end = key.size(2);
    if (given.cu_seqlens_q.has_value()) {
      query_end = sequences.empty() ? 0 : sequences.back().query + sequences.back().sq;
      key_end = sequences.empty() ? 0 : sequences.back().key + sequences.back().sk;
    }
    int64_t longest_q = 0, longest_k = 0;
    for (const Sequence& sequence : sequences) {
      longest_q = std::max(longest_q, sequence.sq);
      longest_k = std::max(longest_k, sequence.sk);
    }
    const int64_t furthest = longest_q + longest_k;  // beyond the distance of any query from any key
    args = {.query = heads_of(query),
            .key = {heads_of(key)},
            .value = {heads_of(value)},
            .panels = sequences.empty() ? 0 : sequences.back().panel + panels_of(sequences.back()),
            .batches = query.size(0),
            .heads = query.size(1),
            .kv_heads = key.size(1),
            .sq = query.size(2),
            .sk = key.size(2),
            .dim = query.size(3),
            .sequences = sequences.data(),
            .count = static_cast<int64_t>(sequences.size()),
            .scale = given.scale,
            .softcap = given.softcap,
            .left = std::min(given.left, furthest),
            .right = std::min(given.right, furthest),
            .dropout = dropout_of(given.rng, given.dropout_p)};
    if (mask.has_value()) {
      const auto covers = [&](int64_t i, int64_t size) { return mask->size(i) == 1 || mask->size(i) >= size; };
      STD_TORCH_CHECK(covers(0, args.count) && covers(1, args.heads) && covers(2, longest_q) && covers(3, longest_k),
                      "pyllm: attention's attn_mask must cover the longest sequences");
      const auto stride = [&](int64_t i) { return mask->size(i) == 1 ? int64_t{0} : mask->stride(i); };
      args.mask = {array(mask), stride(0), stride(1), stride(2), stride(3)};
    }
    if (padding.has_value()) args.padding = static_cast<const bool*>(padding->data_ptr());
    args.biases = distance_biases(query, distance_bias, slopes, furthest);
    if (in_pairs()) pack_panels(args.*summed);
  }

  bool in_pairs() const { return multiplies_pairs(args.query.data.dtype); }

  // summed: what sums over keys multiply
  void pack_panels(Keys& summed) {
    panels = uninitialised(query, {args.kv_heads, args.panels, padded_width(query), kPanel});
    auto* to = static_cast<BFloat16*>(panels.data_ptr());
    const PackPanels pack{.from = summed.rows,
                          .to = to,
                          .sequences = args.sequences,
                          .heads = args.kv_heads,
                          .panels = args.panels,
                          .dim = args.dim};
    parallel_for(
        0, args.count * args.kv_heads, 1,
        [&, kernel = pick_attention_pack_panels_pairs()](int64_t begin, int64_t end) { kernel(pack, begin, end); });
    summed.panels = to;
  }

  // Multiplications of one of the products over all pairs
  int64_t work() const {
    int64_t total = 0;
    for (const Sequence& sequence : sequences) total += pairs(sequence);
    return total * args.heads * args.dim;
  }
};

// Rows of (1, H, S, D), as new_like stores them, that belong to no packed sequence.
void zero_from(Tensor& t, int64_t row) {
  const int64_t bytes = t.size(1) * t.size(3) * t.element_size();
  if (row < t.size(2)) std::memset(static_cast<char*>(t.data_ptr()) + row * bytes, 0, (t.size(2) - row) * bytes);
}

// Likewise of (1, H, S) log-sum-exps.
void empty_from(Tensor& lse, int64_t row) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  for (int64_t head = 0; head < lse.size(1); ++head)
    for (int64_t i = head * lse.size(2) + row; i < (head + 1) * lse.size(2); ++i)
      lse.scalar_type() == ScalarType::Double ? static_cast<double*>(lse.data_ptr())[i] = kNothing
                                              : static_cast<float*>(lse.data_ptr())[i] = static_cast<float>(kNothing);
}

std::tuple<Tensor, Tensor> forward(const AttentionArguments& given) {
  const Call call(given, &Attention::value);
  const Attention& args = call.args;
  Tensor out = new_like(given.query);
  Tensor lse = uninitialised(out, {args.batches, args.heads, args.sq}, statistics_type(out));
  std::vector<QueryBlock> blocks;  // of a causal sequence the one with most keys first, so that threads end together
  for (const Sequence& sequence : call.sequences)
    for (int64_t index = blocks_of(sequence.sq) - 1; index >= 0; --index) blocks.push_back({&sequence, index});
  const AttentionForward tasks{.call = args,
                               .out = heads_of(out),
                               .lse = lse.data_ptr(),
                               .blocks = blocks.data(),
                               .block_count = static_cast<int64_t>(blocks.size())};
  run_tasks(call.in_pairs() ? pick_attention_fwd_pairs() : pick_attention_fwd(), tasks, args.heads * tasks.block_count,
            call.work());
  zero_from(out, call.query_end);
  empty_from(lse, call.query_end);
  return {out, lse};
}

// Into how many parts the queries of a sequence and key head are dealt out, so that threads get equal shares: each part
// costs memory for its own gradients of the keys and values, so one part where there are many heads for each thread.
// Of packed sequences those count that are as long as the longest.
int64_t parts_of(const Call& call) {
  const Attention& args = call.args;
  int64_t all = 0, most = 1, blocks = 1;
  for (const Sequence& sequence : call.sequences) {
    all += pairs(sequence);
    most = std::max(most, pairs(sequence));
    blocks = std::max(blocks, blocks_of(sequence.sq));
  }
  const int64_t key_heads = std::max<int64_t>(1, all / most * args.kv_heads);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = key_heads >= 8 * threads ? 1 : threads / std::gcd(key_heads, threads);
  return std::min(args.heads / args.kv_heads * blocks, parts);
}

// Whether scores share elements of the mask. Dimensions of one key or query are left to count as shared.
bool is_broadcast(const Attention& args, const Tensor& mask) {
  return mask.size(0) != args.count || mask.size(1) != args.heads || mask.size(2) == 1 || mask.size(3) == 1;
}

void zero(Tensor& t) {
  auto* bytes = static_cast<char*>(t.data_ptr());
  parallel_for(0, t.numel(), kGrain, [&, size = t.element_size()](int64_t begin, int64_t end) {
    std::memset(bytes + begin * size, 0, (end - begin) * size);
  });
}

AttentionGradients backward(const AttentionGradientArguments& given) {
  const Call call(given.call, &Attention::key);
  const Tensor &query = given.call.query, &key = given.call.key, &value = given.call.value;
  const OptionalTensor &mask = given.call.mask, &distance_bias = given.call.distance_bias;
  const bool mask_gradient = given.mask_gradient, bias_gradient = given.bias_gradient;
  const Attention& args = call.args;
  const Tensor dout = with_contiguous_rows(given.dout), out = with_contiguous_rows(given.out),
               lse = as_contiguous(given.lse);
  const OptionalTensor dlse = as_contiguous(given.dlse);
  Tensor dquery = new_like(query), dkey = new_like(key), dvalue = new_like(value);
  const int64_t parts = parts_of(call), keys = args.batches * args.sk, summed = 2 * args.biases.reach + 1;
  const ScalarType statistics = statistics_type(query);
  const bool single = parts == 1;
  Tensor partials = uninitialised(query, {single ? 0 : args.kv_heads, parts, 2, keys, padded_width(query)}, statistics);
  Tensor bias_partials = uninitialised(query, {bias_gradient ? args.heads : 0, args.count * parts, summed}, statistics);
  AttentionBackward tasks{.call = args,
                          .out = heads_of(out),
                          .dout = heads_of(dout),
                          .dquery = heads_of(dquery),
                          .dkey = heads_of(dkey),
                          .dvalue = heads_of(dvalue),
                          .lse = lse.data_ptr(),
                          .dlse = dlse.has_value() ? dlse->data_ptr() : nullptr,
                          .partials = single ? nullptr : partials.data_ptr(),
                          .bias_partials = bias_gradient ? bias_partials.data_ptr() : nullptr,
                          .parts = parts};
  Tensor dmask = mask_gradient ? uninitialised(*mask, mask->sizes()) : uninitialised(query, {0});
  const bool broadcast = mask_gradient && is_broadcast(args, *mask);
  if (mask_gradient && !broadcast) {
    zero(dmask);
    tasks.dmask = {array(dmask), dmask.stride(0), dmask.stride(1), dmask.stride(2), 1};
  }
  run_tasks(call.in_pairs() ? pick_attention_bwd_pairs() : pick_attention_bwd(), tasks,
            args.count * args.kv_heads * parts, call.work());

  if (!single) {
    const KeyGradient sums{.partials = partials.data_ptr(),
                           .dkey = heads_of(dkey),
                           .dvalue = heads_of(dvalue),
                           .keys = keys,
                           .parts = parts,
                           .sk = args.sk,
                           .dim = args.dim,
                           .scale = given.call.scale,
                           .value_scale = args.dropout.scale};
    parallel_for(0, args.kv_heads * keys, rows_per_task(args.dim),
                 [&, kernel = pick_attention_key_gradient()](int64_t begin, int64_t end) { kernel(sums, begin, end); });
  }

  zero_from(dquery, call.query_end);
  zero_from(dkey, call.key_end);
  zero_from(dvalue, call.key_end);

  Tensor dbias = bias_gradient ? uninitialised(*distance_bias, distance_bias->sizes()) : uninitialised(query, {0});
  if (bias_gradient) {
    const BiasGradient gradient{.partials = bias_partials.data_ptr(),
                                .dbias = array(dbias),
                                .parts = args.count * parts,
                                .summed = summed,
                                .distances = args.biases.distances};
    run_tasks(pick_attention_bias_gradient(), gradient, args.heads, bias_partials.numel());
  }

  if (broadcast) {
    const MaskGradient gradient{.backward = tasks,
                                .dmask = array(dmask),
                                .sequences = mask->size(0),
                                .heads = mask->size(1),
                                .rows = mask->size(2),
                                .columns = mask->size(3)};
    run_tasks(call.in_pairs() ? pick_attention_mask_gradient_pairs() : pick_attention_mask_gradient(), gradient,
              mask->size(0) * mask->size(1) * gradient.row_blocks() * gradient.column_blocks(), call.work());
  }
  return {dquery, dkey, dvalue, dmask, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllm, CPU, m) { AttentionOperators<forward, backward>::implement(m); }

}  // namespace pyllm
