// The attention kernels for the host model: their host functions, and how they deal out tiles, for ctypes.
#define PYLLM_CUDA_HEAD_DIMS "32,64,96,128,192,256"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_mask_gradient.cuh"
#include "cuda/attention_rows.cuh"
#include "cuda/head_dim.h"
#include "cuda_host/executor.h"

using namespace pyllm;
using cuda::bf16, cuda::f16;

namespace {

// Hands out numbers in the order in which cuda_attention.py wrote them.
class Numbers {
 public:
  explicit Numbers(const int64_t* next) : next_(next) {}
  int64_t wide() { return *next_++; }
  int next() { return static_cast<int>(wide()); }
  Heads heads(void* data, DType dtype) {
    Heads heads{.data = {data, dtype}};
    heads.batch = wide();
    heads.head = wide();
    heads.row = wide();
    return heads;
  }

 private:
  const int64_t* next_;
};

struct Call {
  cuda::Attention args;
  Numbers numbers;
  DType dtype;

  Call(void* query, void* key, void* value, void* mask, const bool* padding, const float* bias, const float* slopes,
       const int32_t* cu_q, const int32_t* cu_k, const int64_t* rng, const int64_t* ints, double scale, double softcap,
       double p)
      : numbers(ints), dtype(static_cast<DType>(numbers.wide())) {
    args.query = numbers.heads(query, dtype);
    args.key = numbers.heads(key, dtype);
    args.value = numbers.heads(value, dtype);
    for (int* number : {&args.count, &args.heads, &args.kv_heads, &args.sq, &args.sk, &args.dim, &args.left,
                        &args.right, &args.distances, &args.slopes_sequence})
      *number = numbers.next();
    args.bottom_right = numbers.next() != 0;
    args.mask.data = {mask, static_cast<DType>(numbers.wide())};
    for (int64_t* stride : {&args.mask.sequence, &args.mask.head, &args.mask.row, &args.mask.column})
      *stride = numbers.wide();
    args.cu_q = cu_q;
    args.cu_k = cu_k;
    args.scale = static_cast<float>(scale);
    args.softcap = static_cast<float>(softcap);
    args.rng = rng;
    args.dropout = Dropout(nullptr, p);
    args.padding = padding;
    args.bias = bias;
    args.slopes = slopes;
  }
};

// Calls body.operator()<T, D, FULL>() as the binding does.
template <class Body>
void visit(const Call& call, Body&& body) {
  cuda::visit_head_dim(call.args.dim, [&]<int D>() {
    const auto with = [&]<class T>() {
      call.args.is_full() ? body.template operator()<T, D, true>() : body.template operator()<T, D, false>();
    };
    call.dtype == DType::f16 ? with.template operator()<f16>() : with.template operator()<bf16>();
  });
}

}  // namespace

#define CALL_PARAMETERS                                                                                                \
  void *query, void *key, void *value, void *mask, const bool *padding, const float *bias, const float *slopes,        \
      const int32_t *cu_q, const int32_t *cu_k, const int64_t *rng, const int64_t *ints, double scale, double softcap, \
      double p
#define CALL_ARGUMENTS query, key, value, mask, padding, bias, slopes, cu_q, cu_k, rng, ints, scale, softcap, p

extern "C" {

const char* attention_forward(CALL_PARAMETERS, void* out, float* lse) {
  return cuda_host::reporting([&] {
    Call call(CALL_ARGUMENTS);
    const cuda::AttentionForward args{
        .call = call.args, .out = call.numbers.heads(out, call.dtype), .lse = lse, .slots = 0};
    visit(call, [&]<class T, int D, bool FULL>() { cuda::attention_forward<T, D, FULL>(args, nullptr); });
  });
}

// statistics, rest, dquery_sums and dbias_sums, of `room` shares and parts, are for what is between the kernels; all
// but the first hold zeros.
const char* attention_backward(CALL_PARAMETERS, void* dout, const float* dlse, void* out, const float* lse,
                               void* statistics, float* dquery_sums, float* dbias_sums, void* dquery, void* dkey,
                               void* dvalue, void* dmask, float* dbias, int64_t shares, int64_t parts,
                               int64_t deterministic, int64_t processors) {
  return cuda_host::reporting([&] {
    Call call(CALL_ARGUMENTS);
    const cuda::Attention& args = call.args;
    const Heads of_out = call.numbers.heads(out, call.dtype), of_dout = call.numbers.heads(dout, call.dtype);
    const int64_t rows = call.numbers.wide();  // of all batches and heads
    auto* of_rows = static_cast<cuda::RowStatistics*>(statistics);
    cuda::AttentionBackward backward{
        .call = args,
        .dout = of_dout,
        .dkey = call.numbers.heads(dkey, call.dtype),
        .dvalue = call.numbers.heads(dvalue, call.dtype),
        .statistics = of_rows,
        .dquery = dquery_sums,
        .dquery_share = 0,
        .dbias = dbias_sums,
        .plan = cuda::plan_backward(args.sequences(), args.sk, args.kv_heads, args.dim, args.cu_q != nullptr,
                                    deterministic != 0, {.processors = static_cast<int>(processors)})};
    const cuda::BackwardPlan& plan = backward.plan;
    if (plan.shares > shares || plan.lines * plan.blocks > parts) throw std::runtime_error("more sums than room");
    if (plan.shares > 1) backward.dquery_share = rows * args.dim;
    const int columns = call.numbers.next();
    const cuda::MaskGradient mask_gradient{.backward = backward,
                                           .dmask = {dmask, args.mask.data.dtype},
                                           .sequences = call.numbers.next(),
                                           .heads = call.numbers.next(),
                                           .rows = call.numbers.next(),
                                           .columns = columns};
    visit(call, [&]<class T, int D, bool FULL>() {
      cuda::attention_delta<T>({.out = of_out,
                                .dout = of_dout,
                                .lse = lse,
                                .dlse = dlse,
                                .statistics = of_rows,
                                .rows = rows,
                                .heads = args.heads,
                                .sq = args.sq,
                                .dim = args.dim},
                               nullptr);
      if (args.adds_mask())
        cuda::attention_far_rows<T>({.call = args, .lse = lse, .statistics = of_rows, .dout = of_dout, .rows = rows},
                                    nullptr);
      cuda::attention_backward<T, D, FULL>(backward, nullptr);
      cuda::attention_sum<T>({.addends = dquery_sums,
                              .out = {dquery, call.dtype},
                              .count = rows * args.dim,
                              .number = plan.shares,
                              .scale = args.scale},
                             nullptr);
      if (dmask != nullptr) cuda::attention_mask_gradient<T, D>(mask_gradient, nullptr);
    });
    if (dbias != nullptr)
      cuda::attention_sum<float>({.addends = dbias_sums,
                                  .out = {dbias, DType::f32},
                                  .count = int64_t{args.heads} * args.distances,
                                  .number = plan.lines * plan.blocks,
                                  .scale = 1},
                                 nullptr);
  });
}

void slots_of(int64_t* out, int64_t count, int64_t length, int64_t size, int64_t packed) {
  out[0] = cuda::slots_of(count, length, static_cast<int>(size), packed != 0);
}

// {sequence, tile}
void packed_slot(int64_t* out, int64_t slot, int64_t count, int64_t size, const int32_t* bounds) {
  const cuda::Slot found = cuda::packed_slot(static_cast<int>(slot), static_cast<int>(count), static_cast<int>(size),
                                             [&](int i) { return bounds[i]; });
  out[0] = found.sequence;
  out[1] = found.tile;
}

// {lines, slots, blocks, shares}
void plan_backward(int64_t* out, int64_t count, int64_t length, int64_t kv_heads, int64_t head_dim, int64_t packed,
                   int64_t deterministic, int64_t processors) {
  const cuda::BackwardPlan plan = cuda::plan_backward(count, length, kv_heads, static_cast<int>(head_dim), packed != 0,
                                                      deterministic != 0, {.processors = static_cast<int>(processors)});
  const int64_t told[] = {plan.lines, plan.slots, plan.blocks, plan.shares};
  std::copy_n(told, 4, out);
}

}  // extern "C"
