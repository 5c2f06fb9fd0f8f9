// What the bindings of attention and of decoding share.
#pragma once

#include <algorithm>
#include <atomic>

#include "attention_tensors.h"
#include "checks.h"
#include "cpu/attention.h"

namespace pyllm {

// The width of a row of t in the kernels' own buffers, in elements of the compute type.
inline int64_t padded_width(const Tensor& t) {
  const int64_t unit = kRowBytes / (t.scalar_type() == ScalarType::Double ? 8 : 4);
  return (t.size(3) + unit - 1) / unit * unit;
}

// The biases by distance of heads that are query's. furthest: beyond the distance of any query from any key.
inline DistanceBiases distance_biases(const Tensor& query, const OptionalTensor& bias, const OptionalTensor& slopes,
                                      int64_t furthest) {
  for (const OptionalTensor& given : {bias, slopes}) {
    STD_TORCH_CHECK(!given.has_value() ||
                        (given->scalar_type() == statistics_type(query) && given->dim() == 2 && given->is_contiguous()),
                    "pyllm: attention's biases by distance must be contiguous matrices of the statistics type");
  }
  DistanceBiases biases;
  if (bias.has_value()) {
    biases.bias = array(bias);
    biases.distances = bias->size(1);
    biases.reach = std::min(biases.distances / 2, furthest);
  }
  if (slopes.has_value()) {
    biases.slopes = array(slopes);
    biases.slopes_sequence = slopes->size(0) == 1 ? 0 : slopes->size(1);
  }
  return biases;
}

// Runs the kernel on every task. Their costs differ: whichever thread is free takes the next ones.
template <class Args>
void run_tasks(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t tasks, int64_t work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, tasks, work / kGrain + 1});
  const int64_t share = std::max<int64_t>(1, tasks / (64 * threads));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(share)) < tasks;) kernel(args, begin, std::min(begin + share, tasks));
  });
}

}  // namespace pyllm
