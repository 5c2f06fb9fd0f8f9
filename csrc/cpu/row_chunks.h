// How a backward deals out rows that it also sums over.
#pragma once

#include <algorithm>

#include "checks.h"
#include "cpu/chunk_sum.h"

namespace pyllm {

// One chunk of rows for each thread: their partial sums are added in order, so gradients do not vary from run to run.
struct RowChunks {
  int64_t count, rows;  // of each chunk, fewer in the last one

  RowChunks(int64_t total, int64_t width) {
    const int64_t task = rows_per_task(width);
    count = std::min<int64_t>((total + task - 1) / task, torch::stable::get_num_threads());
    rows = count == 0 ? 0 : (total + count - 1) / count;
  }
};

// sum (count,) = partials (chunks, ...) from column `first` on, added up over the chunks.
inline void add_up_chunks(const Tensor& partials, int64_t first, const Array& sum, int64_t count) {
  Array from = array(partials);
  const ChunkSum args{.partials = from.at(first).data,
                      .sum = sum,
                      .chunks = partials.size(0),
                      .stride = partials.size(1),
                      .compute = from.dtype};
  torch::stable::parallel_for(0, count, kGrain,
                              [&, kernel = pick_chunk_sum()](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

inline void add_up_chunks(const Tensor& partials, int64_t first, const Tensor& sum) {
  add_up_chunks(partials, first, array(sum), sum.numel());
}

}  // namespace pyllm
