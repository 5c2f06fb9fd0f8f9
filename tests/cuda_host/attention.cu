// The attention kernels for the host model: their host functions, for ctypes.
#include "cuda/attention_forward.cuh"
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
  cuda::Heads heads(void* data, DType dtype) {
    cuda::Heads heads{.data = {data, dtype}};
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
template <class T, class Body>
void visit_dims(const cuda::Attention& call, Body&& body) {
  const auto with = [&]<int D>() {
    if (cuda::padded_dim(call.dim) == D)
      call.is_full() ? body.template operator()<T, D, true>() : body.template operator()<T, D, false>();
  };
  with.template operator()<32>();
  with.template operator()<64>();
  with.template operator()<96>();
  with.template operator()<128>();
  with.template operator()<192>();
  with.template operator()<256>();
}

}  // namespace

#define CALL_PARAMETERS                                                                                           \
  void *query, void *key, void *value, void *mask, const bool *padding, const float *bias, const float *slopes,   \
      const int32_t *cu_q, const int32_t *cu_k, const int64_t *rng, const int64_t *ints, double scale, double softcap, \
      double p
#define CALL_ARGUMENTS query, key, value, mask, padding, bias, slopes, cu_q, cu_k, rng, ints, scale, softcap, p

extern "C" {

const char* attention_forward(CALL_PARAMETERS, void* out, float* lse) {
  return cuda_host::reporting([&] {
    Call call(CALL_ARGUMENTS);
    const cuda::AttentionForward args{
        .call = call.args, .out = call.numbers.heads(out, call.dtype), .lse = lse, .slots = 0};
    const auto run = [&]<class T, int D, bool FULL>() { cuda::attention_forward<T, D, FULL>(args, nullptr); };
    call.dtype == DType::f16 ? visit_dims<f16>(args.call, run) : visit_dims<bf16>(args.call, run);
  });
}

}  // extern "C"
