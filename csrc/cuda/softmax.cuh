// Softmax and log-softmax of scaled, masked rows. Never run on a GPU.
//
// Forward, per row: s = scale * x + mask; m = max(s); l = sum(exp(s - m)); y = exp(s - m) / l, or s - m - log(l). A
// team of threads holds the row in registers: memory is read and written once, and columns that causality removes are
// not read. A row that no team can hold is walked twice, with m and l kept online (Milakov and Gimelshein, 2018). An
// empty row has m = -inf and l = 0, and gives 0, or -inf. exp is exp2 with the factor log2(e); m is subtracted first,
// so that large scores cost no precision. Backward: dx = scale * y * (dy - sum(dy * y)), or scale * (dy - exp(y) *
// sum(dy)).
//
// Bytes an element of e bytes: forward 2 e plus what is read of the mask, backward 3 e; half as much again for rows
// that are walked twice. About 8 FLOPs an element, of which one exponential: bound by memory. Arithmetic is fp32.
#pragma once

#include "cuda/common.cuh"
#include "mask_rows.h"

namespace pyllm::cuda {

// y = softmax(scale * x + mask) or its logarithm; x and y are contiguous rows of `width`.
struct SoftmaxForward {
  Array x, y;
  MaskRows mask;
  int64_t rows, queries;  // causality: row i sees columns up to i % queries; 0: all
  int width, lanes;
  float scale;
  bool log;
};

// dx = scale * (gradient of the scores).
struct SoftmaxBackward {
  Array dy, y, dx;
  int64_t rows;
  int width, lanes;
  float scale;
  bool log;
};

// Blocks that a processor is to hold, so that their threads keep to 64 registers.
template <class T, bool SINGLE>
inline constexpr int kResident = SINGLE ? 8 : 1024 / kRowThreads<T>;

// --- forward ---

// What a row sees: columns below `columns`, under the mask's row at `mask`.
struct RowView {
  int columns;
  int64_t mask;
};

template <bool MASKED>
__device__ inline RowView view_row(const SoftmaxForward& args, int64_t row) {
  RowView view{row < args.rows ? args.width : 0, 0};
  if (args.queries > 0 && row % args.queries < view.columns) view.columns = static_cast<int>(row % args.queries) + 1;
  if constexpr (MASKED) {
    for (int d = args.mask.rank - 1; d >= 0; row /= args.mask.sizes[d--])
      view.mask += row % args.mask.sizes[d] * args.mask.strides[d];
  }
  return view;
}

// scores += the mask's chunk, or = -inf where that has -inf or, boolean, 0
template <class T, int E>
__device__ inline void add_mask(const SoftmaxForward& args, const RowView& view, int column, float (&scores)[E]) {
  const bool broadcast = args.mask.last_stride == 0;
  // Of a broadcast mask, column 0 is all there is.
  const int first = broadcast ? 0 : column, columns = broadcast ? min(view.columns, 1) : view.columns;
  if (args.mask.data.dtype == DType::boolean) {
    const auto mask = load_chunk<false, E>(args.mask.data.as<const uint8_t>() + view.mask, first, columns);
#pragma unroll
    for (int e = 0; e < E; ++e) scores[e] = (broadcast ? mask.at[0] : mask.at[e]) != 0 ? scores[e] : -kInfinity;
  } else {
    float mask[E];
    load_floats<T, false>(args.mask.data, view.mask, first, columns, mask);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float added = broadcast ? mask[0] : mask[e];
      scores[e] = added == -kInfinity ? added : scores[e] + added;
    }
  }
}

// Scores of a chunk, -inf where the row sees none.
template <class T, bool MASKED, int E>
__device__ inline void score(const SoftmaxForward& args, const RowView& view, int column, const Chunk<T, E>& x,
                             float (&scores)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e)
    scores[e] = inside(column + e, view.columns) ? args.scale * to_float(x.at[e]) : -kInfinity;
  if constexpr (MASKED) add_mask<T>(args, view, column, scores);
}

template <class T, bool WHOLE, int E>
__device__ inline void store_floats(const Array& out, int64_t begin, int column, int width, const float (&values)[E]) {
  Chunk<T, E> chunk;
#pragma unroll
  for (int e = 0; e < E; ++e) chunk.at[e] = from_float<T>(values[e]);
  store_chunk<WHOLE>(out.as<T>() + begin, column, width, chunk);
}

// A row in registers: RowWay::single or held.
template <class T, bool MASKED, bool SINGLE>
__global__ void __launch_bounds__(SINGLE ? kSmallBlock : kRowThreads<T>, kResident<T, SINGLE>)
    softmax_forward_held(const __grid_constant__ SoftmaxForward args) {
  constexpr int E = kElements<T>, V = SINGLE ? 1 : kHeld / E;
  constexpr bool WHOLE = !SINGLE;
  Team team(args.lanes);
  const int step = team.size() * E;
  const RowSteps rows = team.rows();
  for (int64_t first = rows.first; first < args.rows; first += rows.step) {
    const int64_t row = first + team.in_block(), begin = row * args.width;
    const int width = row < args.rows ? args.width : 0;  // a team without a row goes through the motions
    const RowView view = view_row<MASKED>(args, row);
    const int column = team.lane() * E - phase(args.x.as<const T>(), begin);

    Chunk<T, E> x[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      x[v] = load_chunk<WHOLE, E>(args.x.as<const T>() + begin, column + v * step, view.columns);
    float scores[V][E];
    float peak = -kInfinity;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      score<T, MASKED>(args, view, column + v * step, x[v], scores[v]);
#pragma unroll
      for (int e = 0; e < E; ++e) peak = fmaxf(peak, scores[v][e]);
    }
    peak = finite_peak(team.reduce<Max>(peak));
    float total = 0;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float exponent = exponential<T>(scores[v][e] - peak);
        total += exponent;
        if (!args.log) scores[v][e] = exponent;
      }
    total = team.reduce<Sum>(total);
    if (total == 0) total = 1;  // nothing is left: every exponential is 0
    const float norm = args.log ? logf(total) : 1 / total;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int e = 0; e < E; ++e) scores[v][e] = args.log ? scores[v][e] - peak - norm : scores[v][e] * norm;
      store_floats<T, WHOLE>(args.y, begin, column + v * step, width, scores[v]);
    }
  }
}

// A block for a row, which is walked twice.
template <class T, bool MASKED>
__global__ void __launch_bounds__(kWalkingThreads, 1)
    softmax_forward_walked(const __grid_constant__ SoftmaxForward args) {
  constexpr int E = kElements<T>;
  Team team(args.lanes);
  const int step = team.size() * E, width = args.width;
  const RowSteps rows = team.rows();
  for (int64_t row = rows.first; row < args.rows; row += rows.step) {
    const int64_t begin = row * width;
    const RowView view = view_row<MASKED>(args, row);
    const T* x = args.x.as<const T>() + begin;
    const int start = team.lane() * E - phase(x, 0);
    float peak = -kInfinity, total = 0, scores[E];
    for (int column = start; column < view.columns; column += step) {
      score<T, MASKED>(args, view, column, load_chunk<false, E>(x, column, view.columns), scores);
      float higher = peak;
#pragma unroll
      for (int e = 0; e < E; ++e) higher = fmaxf(higher, scores[e]);
      const float shift = finite_peak(higher);
      total *= exponential<T>(peak - shift);
#pragma unroll
      for (int e = 0; e < E; ++e) total += exponential<T>(scores[e] - shift);
      peak = higher;
    }
    const float row_peak = finite_peak(team.reduce<Max>(peak));
    total = team.reduce<Sum>(total * exponential<T>(peak - row_peak));
    if (total == 0) total = 1;
    const float norm = args.log ? logf(total) : 1 / total;
    for (int column = start; column < width; column += step) {
      score<T, MASKED>(args, view, column, load_chunk<false, E>(x, column, view.columns), scores);
#pragma unroll
      for (int e = 0; e < E; ++e)
        scores[e] = args.log ? scores[e] - row_peak - norm : exponential<T>(scores[e] - row_peak) * norm;
      store_floats<T, false>(args.y, begin, column, width, scores);
    }
  }
}

// --- backward ---

// What a chunk adds to the row's sum; a column that a mask took out of a log-softmax adds nothing.
template <class T, int E>
__device__ inline float gradient_sum(const SoftmaxBackward& args, const Chunk<T, E>& dy, const Chunk<T, E>& y) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float g = to_float(dy.at[e]), p = to_float(y.at[e]);
    sum += args.log ? (p == -kInfinity ? 0.0f : g) : g * p;
  }
  return sum;
}

template <bool WHOLE, class T, int E>
__device__ inline void store_gradient(const SoftmaxBackward& args, int64_t begin, int column, int width, float total,
                                      const Chunk<T, E>& dy, const Chunk<T, E>& y) {
  float gradient[E];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float g = to_float(dy.at[e]), p = to_float(y.at[e]);
    const float of_log = p == -kInfinity ? 0.0f : g - exponential<T>(p) * total;
    gradient[e] = args.scale * (args.log ? of_log : p * (g - total));
  }
  store_floats<T, WHOLE>(args.dx, begin, column, width, gradient);
}

template <class T, bool SINGLE>
__global__ void __launch_bounds__(SINGLE ? kSmallBlock : kRowThreads<T>, kResident<T, SINGLE>)
    softmax_backward_held(const __grid_constant__ SoftmaxBackward args) {
  constexpr int E = kElements<T>, V = SINGLE ? 1 : kHeld / E;
  constexpr bool WHOLE = !SINGLE;
  Team team(args.lanes);
  const int step = team.size() * E;
  const RowSteps rows = team.rows();
  for (int64_t first = rows.first; first < args.rows; first += rows.step) {
    const int64_t row = first + team.in_block(), begin = row * args.width;
    const int width = row < args.rows ? args.width : 0;  // a team without a row goes through the motions
    const int column = team.lane() * E - phase(args.y.as<const T>(), begin);
    Chunk<T, E> dy[V], y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dy[v] = load_chunk<WHOLE, E>(args.dy.as<const T>() + begin, column + v * step, width);
      y[v] = load_chunk<WHOLE, E>(args.y.as<const T>() + begin, column + v * step, width);
    }
    float total = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) total += gradient_sum(args, dy[v], y[v]);
    total = team.reduce<Sum>(total);
#pragma unroll
    for (int v = 0; v < V; ++v) store_gradient<WHOLE>(args, begin, column + v * step, width, total, dy[v], y[v]);
  }
}

// A block for a row, which is walked twice.
template <class T>
__global__ void __launch_bounds__(kWalkingThreads, 1)
    softmax_backward_walked(const __grid_constant__ SoftmaxBackward args) {
  constexpr int E = kElements<T>;
  Team team(args.lanes);
  const int step = team.size() * E, width = args.width;
  const RowSteps rows = team.rows();
  for (int64_t row = rows.first; row < args.rows; row += rows.step) {
    const int64_t begin = row * width;
    const int start = team.lane() * E - phase(args.y.as<const T>(), begin);
    const auto walk = [&](auto&& visit) {
      for (int column = start; column < width; column += step)
        visit(column, load_chunk<false, E>(args.dy.as<const T>() + begin, column, width),
              load_chunk<false, E>(args.y.as<const T>() + begin, column, width));
    };
    float total = 0;
    walk([&](int, const Chunk<T, E>& dy, const Chunk<T, E>& y) { total += gradient_sum(args, dy, y); });
    total = team.reduce<Sum>(total);
    walk([&](int column, const Chunk<T, E>& dy, const Chunk<T, E>& y) {
      store_gradient<false>(args, begin, column, width, total, dy, y);
    });
  }
}

// --- host ---

// Merges the rows' dimensions that the mask's strides let merge: a kernel divides by each that is left.
inline MaskRows merged(const MaskRows& mask) {
  MaskRows merged{.data = mask.data, .last_stride = mask.last_stride};
  for (int d = 0; d < mask.rank; ++d) {
    const int64_t size = mask.sizes[d], stride = mask.strides[d];
    const int last = merged.rank - 1;
    if (last >= 0 && merged.strides[last] == stride * size) {
      merged.sizes[last] *= size;
      merged.strides[last] = stride;
    } else if (size != 1) {
      merged.sizes[merged.rank] = size;
      merged.strides[merged.rank++] = stride;
    }
  }
  return merged;
}

inline void softmax_forward(SoftmaxForward args, const Device& device, Stream stream) {
  args.mask = merged(args.mask);
  visit_row_dtype(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool aligned = rows_aligned<T>(args.width, {args.x, args.y});
    const RowPlan plan =
        plan_rows(args.rows, args.width, aligned, false, RowLimits{kElements<T>, kRowThreads<T>, 2048}, device);
    args.lanes = plan.lanes;
    const auto run = [&]<bool MASKED>() {
      launch(plan.way == RowWay::walked   ? softmax_forward_walked<T, MASKED>
             : plan.way == RowWay::single ? softmax_forward_held<T, MASKED, true>
                                          : softmax_forward_held<T, MASKED, false>,
             row_launch(plan, 0), stream, args);
    };
    args.mask.data ? run.template operator()<true>() : run.template operator()<false>();
  });
}

inline void softmax_backward(SoftmaxBackward args, const Device& device, Stream stream) {
  visit_row_dtype(args.y.dtype, [&](auto type) {
    using T = decltype(type);
    const bool aligned = rows_aligned<T>(args.width, {args.dy, args.y, args.dx});
    const RowPlan plan =
        plan_rows(args.rows, args.width, aligned, false, RowLimits{kElements<T>, kRowThreads<T>, 2048}, device);
    args.lanes = plan.lanes;
    launch(plan.way == RowWay::walked   ? softmax_backward_walked<T>
           : plan.way == RowWay::single ? softmax_backward_held<T, true>
                                        : softmax_backward_held<T, false>,
           row_launch(plan, 0), stream, args);
  });
}

}  // namespace pyllm::cuda
