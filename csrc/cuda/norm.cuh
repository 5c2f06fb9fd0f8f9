// LayerNorm and RMSNorm over rows, with bias, dropout and residual addition fused in front. Never run on a GPU.
//
// Forward, per row: z = residual + dropout(x + x_bias), or z = x; y = (z - mean) * rstd * weight + bias (RMSNorm: mean
// = 0). A team of threads holds the row in registers: the mean, then the sum of squared deviations from it, then y;
// memory is read and written once. A row that no team can hold is walked twice; the first walk merges each thread's
// chunks by count, mean and squared deviations (Chan et al., 1979). Backward, with g = weight * dy and xhat = (z -
// mean) * rstd: dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat))
// + dz, and through dropout dx. A persistent grid sums dy * xhat, dy and dx of its rows, in registers, or beside a row
// that is walked twice in its own partial sums in memory; a second kernel adds the blocks' sums in a fixed order.
//
// Bytes an element of e bytes: forward 2 e (4 e with residual); backward 3 e (5 e at most with residual, dz and
// dropout). About 8 FLOPs an element forward and 14 backward: bound by memory. Statistics and sums are fp32.
#pragma once

#include "cuda/common.cuh"
#include "cuda/philox.cuh"
#include "norm_sums.h"

namespace pyllm::cuda {

// z = residual + dropout(x + x_bias), or x itself; y = normalised z * weight + bias. Matrices are contiguous (rows,
// width).
struct NormForward {
  Array x, residual, weight, bias, x_bias;
  Array y, z;   // z only with a residual
  float* mean;  // null: RMSNorm
  float* rstd;
  const int64_t* rng;  // only with dropout
  int64_t rows;
  int width, lanes;
  float eps;
  Dropout dropout;
};

// dresidual = gradient of z; dx = that through the dropout. Partial sums of columns go to (blocks of a row counted as
// one, kColumnSums, width).
struct NormBackward {
  Array dy, dz, z, weight;
  Array dx, dresidual;  // dx only where it differs from dresidual
  const float* mean;    // null: RMSNorm
  const float* rstd;
  const int64_t* rng;
  float* partials;  // null where no gradient is wanted
  ColumnGradients gradients;
  int64_t rows;
  int width, lanes;
  Dropout dropout;
};

// gradients.at[which][j] = sum over the `count` partial sums of partials[i][which][j]
struct ColumnSum {
  const float* partials;
  ColumnGradients gradients;
  int64_t count;
  int width;
};

inline constexpr int kNormBackwardThreads = 512;  // it holds five rows in registers, not two

// --- forward ---

// z of a chunk, rounded as it is stored, so that the forward normalises what the backward will see.
template <bool WHOLE, class X, class Z, int E>
__device__ inline Chunk<Z, E> add_branch(const NormForward& args, const Dropout& dropout, int64_t row, int column,
                                         const Chunk<X, E>& x, const Chunk<Z, E>& residual) {
  const uint32_t keep = dropout ? keep_bits<E>(dropout, 0, static_cast<uint32_t>(row), column) : ~0u;
  const float scale = static_cast<float>(dropout.scale);
  float x_bias[E] = {};
  if (args.x_bias) load_floats<X, WHOLE>(args.x_bias, 0, column, args.width, x_bias);
  Chunk<Z, E> z;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float branch = keep >> e & 1 ? (to_float(x.at[e]) + x_bias[e]) * scale : 0.0f;
    z.at[e] = from_float<Z>(branch + to_float(residual.at[e]));
  }
  return z;
}

template <bool WHOLE, class Z, int E>
__device__ inline void store_normalised(const NormForward& args, int64_t begin, int column, int width, float mean,
                                        float rstd, const Chunk<Z, E>& z) {
  float values[E], parameter[E];
#pragma unroll
  for (int e = 0; e < E; ++e) values[e] = (to_float(z.at[e]) - mean) * rstd;
  if (args.weight) {
    load_floats<Z, WHOLE>(args.weight, 0, column, width, parameter);
#pragma unroll
    for (int e = 0; e < E; ++e) values[e] *= parameter[e];
  }
  if (args.bias) {
    load_floats<Z, WHOLE>(args.bias, 0, column, width, parameter);
#pragma unroll
    for (int e = 0; e < E; ++e) values[e] += parameter[e];
  }
  Chunk<Z, E> y;
#pragma unroll
  for (int e = 0; e < E; ++e) y.at[e] = from_float<Z>(values[e]);
  store_chunk<WHOLE>(args.y.as<Z>() + begin, column, width, y);
}

__device__ inline void store_statistics(const NormForward& args, const Team& team, int64_t row, float mean,
                                        float rstd) {
  if (team.lane() != 0 || row >= args.rows) return;
  if (args.mean != nullptr) store(args.mean + row, mean);
  store(args.rstd + row, rstd);
}

// A row in registers: RowWay::single or held.
template <class X, class Z, bool RESIDUAL, bool SINGLE>
__global__ void __launch_bounds__(SINGLE ? kSmallBlock : kRowThreads<Z>, 1)
    norm_forward_held(const __grid_constant__ NormForward args) {
  constexpr int E = kElements<Z>, V = SINGLE ? 1 : kHeld / E;
  constexpr bool WHOLE = !SINGLE;
  Team team(args.lanes);
  const Dropout dropout = seeded(args.dropout, args.rng);
  const int step = team.size() * E;
  const RowSteps rows = team.rows();
  for (int64_t first = rows.first; first < args.rows; first += rows.step) {
    const int64_t row = first + team.in_block(), begin = row * args.width;
    const int width = row < args.rows ? args.width : 0;  // a team without a row goes through the motions
    const X* x = args.x.as<const X>() + begin;
    const Z* stream = RESIDUAL ? args.residual.as<const Z>() : args.x.as<const Z>();
    const int column = team.lane() * E - phase(stream, begin);

    Chunk<Z, E> z[V];
    Chunk<X, E> branch[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      z[v] = load_chunk<WHOLE, E>(stream + begin, column + v * step, width);
      if constexpr (RESIDUAL) branch[v] = load_chunk<WHOLE, E>(x, column + v * step, width);
    }
    float sum = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if constexpr (RESIDUAL) {
        z[v] = add_branch<WHOLE>(args, dropout, row, column + v * step, branch[v], z[v]);
        store_chunk<WHOLE>(args.z.as<Z>() + begin, column + v * step, width, z[v]);
      }
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float value = to_float(z[v].at[e]);
        sum += args.mean == nullptr ? value * value : value;
      }
    }
    float mean = 0, squares = team.reduce<Sum>(sum);
    if (args.mean != nullptr) {
      mean = squares / args.width;
      float around[2] = {};
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const bool counts = inside(column + v * step + (WHOLE ? 0 : e), width);
          const float centred = counts ? to_float(z[v].at[e]) - mean : 0.0f;
          around[0] += centred * centred;
          around[1] += centred;
        }
      team.reduce<Sum>(around);
      // What rounding left in the mean is all that there is of the deviations of a constant row.
      const float left = around[1] / args.width;
      squares = around[0] - around[1] * left;
      if (squares < 0) squares = 0;
      mean += left;
    }
    const float rstd = 1 / sqrtf(squares / args.width + args.eps);
    store_statistics(args, team, row, mean, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) store_normalised<WHOLE>(args, begin, column + v * step, width, mean, rstd, z[v]);
  }
}

// A block for a row, which is walked twice.
template <class X, class Z, bool RESIDUAL>
__global__ void __launch_bounds__(kWalkingThreads, 1) norm_forward_walked(const __grid_constant__ NormForward args) {
  constexpr int E = kElements<Z>;
  Team team(args.lanes);
  const Dropout dropout = seeded(args.dropout, args.rng);
  const int step = team.size() * E, width = args.width;
  const RowSteps rows = team.rows();
  for (int64_t row = rows.first; row < args.rows; row += rows.step) {
    const int64_t begin = row * width;
    const Z* stream = (RESIDUAL ? args.residual.as<const Z>() : args.x.as<const Z>()) + begin;
    const int start = team.lane() * E - phase(stream, 0);
    const auto load_z = [&](int column) {
      const auto z = load_chunk<false, E>(stream, column, width);
      if constexpr (RESIDUAL) {
        const X* x = args.x.as<const X>() + begin;
        return add_branch<false>(args, dropout, row, column, load_chunk<false, E>(x, column, width), z);
      } else {
        return z;
      }
    };
    float count = 0, mean = 0, squares = 0;
    for (int column = start; column < width; column += step) {
      const Chunk<Z, E> z = load_z(column);
      if constexpr (RESIDUAL) store_chunk<false>(args.z.as<Z>() + begin, column, width, z);
      float chunk_count = 0, chunk_mean = 0;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        chunk_count += inside(column + e, width);
        chunk_mean += inside(column + e, width) ? to_float(z.at[e]) : 0.0f;
      }
      chunk_mean = args.mean == nullptr ? 0.0f : chunk_mean / chunk_count;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float centred = inside(column + e, width) ? to_float(z.at[e]) - chunk_mean : 0.0f;
        squares += centred * centred;
      }
      count += chunk_count;
      const float delta = chunk_mean - mean, share = chunk_count / count;
      squares += delta * delta * share * (count - chunk_count);
      mean += delta * share;
    }
    float row_mean = team.reduce<Sum>(mean * count) / width;
    row_mean += team.reduce<Sum>(count * (mean - row_mean)) / width;  // what rounding left, as above
    squares = team.reduce<Sum>(squares + count * (mean - row_mean) * (mean - row_mean));
    const float rstd = 1 / sqrtf(squares / width + args.eps);
    store_statistics(args, team, row, row_mean, rstd);
    for (int column = start; column < width; column += step)
      store_normalised<false>(args, begin, column, width, row_mean, rstd, load_z(column));
  }
}

// --- backward ---

// One row's part in the backward: what its gradient subtracts is in `means`, of g and of g * xhat.
struct RowStatistics {
  float mean = 0, rstd = 0;
  float means[2] = {};
};

__device__ inline RowStatistics load_statistics(const NormBackward& args, int64_t row) {
  RowStatistics row_statistics;
  if (row < args.rows) {
    if (args.mean != nullptr) row_statistics.mean = load(args.mean + row);
    row_statistics.rstd = load(args.rstd + row);
  }
  return row_statistics;
}

__device__ inline void finish_means(const NormBackward& args, Team& team, RowStatistics& row) {
  team.reduce<Sum>(row.means);
  row.means[0] = args.mean == nullptr ? 0.0f : row.means[0] / args.width;
  row.means[1] /= args.width;
}

// g = weight * dy, of a chunk
template <bool WHOLE, class Z, int E>
__device__ inline void weigh(const NormBackward& args, int column, const Chunk<Z, E>& dy, float (&g)[E]) {
  float weight[E];
  if (args.weight) load_floats<Z, WHOLE>(args.weight, 0, column, args.width, weight);
#pragma unroll
  for (int e = 0; e < E; ++e) g[e] = args.weight ? to_float(dy.at[e]) * weight[e] : to_float(dy.at[e]);
}

template <class Z, int E>
__device__ inline void add_means(const float (&g)[E], const Chunk<Z, E>& z, RowStatistics& row) {
#pragma unroll
  for (int e = 0; e < E; ++e) {
    row.means[0] += g[e];
    row.means[1] += g[e] * (to_float(z.at[e]) - row.mean) * row.rstd;
  }
}

// Sums of columns: of a chunk of each.
template <int E>
using Sums = Chunk<float, E>[kColumnSums];

template <class Z, int E>
__device__ inline void add_columns(const Chunk<Z, E>& dy, const Chunk<Z, E>& z, const RowStatistics& row,
                                   Sums<E>& sums) {
#pragma unroll
  for (int e = 0; e < E; ++e) {
    sums[kWeightSum].at[e] += to_float(dy.at[e]) * (to_float(z.at[e]) - row.mean) * row.rstd;
    sums[kBiasSum].at[e] += to_float(dy.at[e]);
  }
}

template <class X, bool WHOLE, class Z, int E>
__device__ inline void store_gradient(const NormBackward& args, const Dropout& dropout, int64_t row, int column,
                                      int width, const float (&g)[E], const Chunk<Z, E>& z, const Chunk<Z, E>& dz,
                                      const RowStatistics& statistics, Chunk<float, E>& branch_sum) {
  const int64_t begin = row * args.width;
  float gradient[E];
  Chunk<Z, E> dresidual;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float xhat = (to_float(z.at[e]) - statistics.mean) * statistics.rstd;
    gradient[e] = statistics.rstd * (g[e] - statistics.means[0] - xhat * statistics.means[1]) + to_float(dz.at[e]);
    dresidual.at[e] = from_float<Z>(gradient[e]);
  }
  store_chunk<WHOLE>(args.dresidual.as<Z>() + begin, column, width, dresidual);
  if (dropout) {
    const uint32_t keep = keep_bits<E>(dropout, 0, static_cast<uint32_t>(row), column);
    const float scale = static_cast<float>(dropout.scale);
#pragma unroll
    for (int e = 0; e < E; ++e) gradient[e] = keep >> e & 1 ? gradient[e] * scale : 0.0f;
  }
  if (args.dx) {
    Chunk<X, E> dx;
#pragma unroll
    for (int e = 0; e < E; ++e) dx.at[e] = from_float<X>(gradient[e]);
    store_chunk<WHOLE>(args.dx.as<X>() + begin, column, width, dx);
  }
#pragma unroll
  for (int e = 0; e < E; ++e) branch_sum.at[e] += gradient[e];
}

template <bool WHOLE, int E, class Z>
__device__ inline Chunk<Z, E> load_dz(const NormBackward& args, int64_t begin, int column, int width) {
  Chunk<Z, E> dz{};
  if (args.dz) dz = load_chunk<WHOLE, E>(args.dz.as<const Z>() + begin, column, width);
  return dz;
}

// Floats of shared memory in which each thread of a block sums the branch's columns.
PYLLM_EVERYWHERE inline int branch_floats(const NormBackward& args, int threads, int per_thread) {
  return args.gradients.at[kBranchSum] ? threads * per_thread : 0;
}

// This block's sums of columns; the teams of a block of several add theirs one after the other, in shared memory from
// `offset` bytes on.
template <bool WHOLE, int V, int E>
__device__ inline void store_partials(const NormBackward& args, const Team& team, int column, int step, int offset,
                                      const Sums<E> (&sums)[V]) {
  const int width = args.width;
  float* partials = args.partials + team.rows().first / team.per_block() * kColumnSums * width;
  if (team.per_block() == 1) {
#pragma unroll
    for (int which = 0; which < kColumnSums; ++which)
#pragma unroll
      for (int v = 0; v < V; ++v)
        store_chunk<WHOLE>(partials + which * width, column + v * step, width, sums[v][which]);
    return;
  }
  Shared<float> shared = shared_memory<float>(offset, kColumnSums * width);
  for (int turn = 0; turn < team.per_block(); ++turn) {
    if (turn == team.in_block()) {
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const int at = column + v * step + e;
          if (!inside(at, width)) continue;
#pragma unroll
          for (int which = 0; which < kColumnSums; ++which) {
            const int slot = which * width + at;
            shared[slot] = turn == 0 ? sums[v][which].at[e] : shared[slot] + sums[v][which].at[e];
          }
        }
    }
    sync_block();
  }
  for (int i = static_cast<int>(threadIdx.x); i < kColumnSums * width; i += static_cast<int>(blockDim.x))
    store(partials + i, static_cast<float>(shared[i]));
}

// Rows in registers, RowWay::single or held, and their columns' sums, which stay there from row to row; those of the
// branch, for which no registers are left, in shared memory, each thread's for itself.
template <class X, class Z, bool SINGLE>
__global__ void __launch_bounds__(SINGLE ? kSmallBlock : kNormBackwardThreads, 1)
    norm_backward_held(const __grid_constant__ NormBackward args) {
  constexpr int E = kElements<Z>, V = SINGLE ? 1 : kHeld / E;
  constexpr bool WHOLE = !SINGLE;
  Team team(args.lanes);
  const Dropout dropout = seeded(args.dropout, args.rng);
  const int step = team.size() * E;
  // Every row of a team begins equally far from alignment: see plan_rows.
  const int column = team.lane() * E - phase(args.z.as<const Z>(), (team.rows().first + team.in_block()) * args.width);
  Sums<E> sums[V] = {};
  const bool wants_branch{args.gradients.at[kBranchSum]};
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const auto branch_sums = shared_memory<Chunk<float, E>>(Team::kSharedBytes, wants_branch ? V * threads : 0);
  if (wants_branch) {
#pragma unroll
    for (int v = 0; v < V; ++v) branch_sums[v * threads + thread] = Chunk<float, E>{};
  }
  const RowSteps rows = team.rows();
  for (int64_t first = rows.first; first < args.rows; first += rows.step) {
    const int64_t row = first + team.in_block(), begin = row * args.width;
    const int width = row < args.rows ? args.width : 0;  // a team without a row goes through the motions
    Chunk<Z, E> dy[V], z[V], dz[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dy[v] = load_chunk<WHOLE, E>(args.dy.as<const Z>() + begin, column + v * step, width);
      z[v] = load_chunk<WHOLE, E>(args.z.as<const Z>() + begin, column + v * step, width);
      dz[v] = load_dz<WHOLE, E, Z>(args, begin, column + v * step, width);
    }
    RowStatistics statistics = load_statistics(args, row);
    float g[V][E];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      weigh<WHOLE>(args, column + v * step, dy[v], g[v]);
      add_means(g[v], z[v], statistics);
      add_columns(dy[v], z[v], statistics, sums[v]);
    }
    finish_means(args, team, statistics);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Chunk<float, E> branch_sum{};
      if (wants_branch) branch_sum = branch_sums[v * threads + thread];
      store_gradient<X, WHOLE>(args, dropout, row, column + v * step, width, g[v], z[v], dz[v], statistics, branch_sum);
      if (wants_branch) branch_sums[v * threads + thread] = branch_sum;
    }
  }
  if (args.partials == nullptr) return;
  if (wants_branch) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v][kBranchSum] = branch_sums[v * threads + thread];
  }
  const int offset = Team::kSharedBytes + 4 * branch_floats(args, threads, V * E);
  store_partials<WHOLE>(args, team, column, step, offset, sums);
}

// A block for a row, which is walked twice; the second walk adds to the block's sums in memory.
template <class X, class Z>
__global__ void __launch_bounds__(kWalkingThreads, 1) norm_backward_walked(const __grid_constant__ NormBackward args) {
  constexpr int E = kElements<Z>;
  Team team(args.lanes);
  const Dropout dropout = seeded(args.dropout, args.rng);
  const int step = team.size() * E, width = args.width;
  const int start = team.lane() * E - phase(args.z.as<const Z>(), team.rows().first * width);
  float* partials = args.partials + team.rows().first * kColumnSums * width;
  const auto walk = [&](int64_t row, auto&& visit) {
    for (int column = start; column < width; column += step) {
      const auto dy = load_chunk<false, E>(args.dy.as<const Z>() + row * width, column, width);
      const auto z = load_chunk<false, E>(args.z.as<const Z>() + row * width, column, width);
      float g[E];
      weigh<false>(args, column, dy, g);
      visit(column, dy, z, g);
    }
  };
  for (int which = 0; which < kColumnSums; ++which) {
    if (!args.gradients.at[which]) continue;
    for (int column = start; column < width; column += step)
      store_chunk<false>(partials + which * width, column, width, Chunk<float, E>{});
  }
  const RowSteps rows = team.rows();
  for (int64_t row = rows.first; row < args.rows; row += rows.step) {
    RowStatistics statistics = load_statistics(args, row);
    walk(row, [&](int, const Chunk<Z, E>&, const Chunk<Z, E>& z, const float (&g)[E]) { add_means(g, z, statistics); });
    finish_means(args, team, statistics);
    walk(row, [&](int column, const Chunk<Z, E>& dy, const Chunk<Z, E>& z, const float (&g)[E]) {
      const Chunk<Z, E> dz = load_dz<false, E, Z>(args, row * width, column, width);
      Sums<E> sums = {};
#pragma unroll
      for (int which = 0; which < kColumnSums; ++which)
        if (args.gradients.at[which])
          sums[which] = load_chunk<false, E, Load::coherent>(partials + which * width, column, width);
      add_columns(dy, z, statistics, sums);
      store_gradient<X, false>(args, dropout, row, column, width, g, z, dz, statistics, sums[kBranchSum]);
#pragma unroll
      for (int which = 0; which < kColumnSums; ++which)
        if (args.gradients.at[which]) store_chunk<false>(partials + which * width, column, width, sums[which]);
    });
  }
}

// 32 columns a block, of each sum in turn; 16 threads share a column.
inline constexpr int kColumns = 32, kColumnThreads = 16;

__global__ void __launch_bounds__(kColumns* kColumnThreads) column_sum(const __grid_constant__ ColumnSum args) {
  const int which = static_cast<int>(blockIdx.x) % kColumnSums, width = args.width;
  const Array gradient = args.gradients.at[which];
  if (!gradient) return;
  Shared<float> sums = shared_memory<float>(0, kColumns * kColumnThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int column = static_cast<int>(blockIdx.x) / kColumnSums * kColumns + thread % kColumns;
  float sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t i = thread / kColumns; i < args.count; i += kColumnThreads)
      sum += load(args.partials + (kColumnSums * i + which) * width + column);
  }
  sums[thread] = sum;
  sync_block();
  if (thread >= kColumns || column >= width) return;
  for (int i = 1; i < kColumnThreads; ++i) sum += sums[i * kColumns + thread];
  switch (gradient.dtype) {
    case DType::bf16: return store(gradient.as<bf16>() + column, from_float<bf16>(sum));
    case DType::f16: return store(gradient.as<f16>() + column, from_float<f16>(sum));
    default: return store(gradient.as<float>() + column, sum);
  }
}

// --- host ---

// Calls body(X{}, Z{}) for the pairs that the operators admit: one dtype, or 16-bit x with float z.
template <class Body>
inline void visit_norm_dtypes(DType x, DType z, Body&& body) {
  visit_row_dtype(x, [&](auto x_type) {
    if (x == z) {
      body(x_type, x_type);
    } else if constexpr (sizeof(x_type) == 2) {
      body(x_type, float{});
    }
  });
}

inline void norm_forward(NormForward args, const Device& device, Stream stream) {
  visit_norm_dtypes(args.x.dtype, args.y.dtype, [&](auto x_type, auto z_type) {
    using X = decltype(x_type);
    using Z = decltype(z_type);
    const bool aligned =
        rows_aligned<Z>(args.width, {args.x, args.residual, args.weight, args.bias, args.x_bias, args.y, args.z});
    const RowPlan plan =
        plan_rows(args.rows, args.width, aligned, false, RowLimits{kElements<Z>, kRowThreads<Z>, 2048}, device);
    args.lanes = plan.lanes;
    const auto run = [&]<bool RESIDUAL>() {
      launch(plan.way == RowWay::walked   ? norm_forward_walked<X, Z, RESIDUAL>
             : plan.way == RowWay::single ? norm_forward_held<X, Z, RESIDUAL, true>
                                          : norm_forward_held<X, Z, RESIDUAL, false>,
             row_launch(plan, 0), stream, args);
    };
    if (args.residual) {
      run.template operator()<true>();
    } else if constexpr (std::is_same_v<X, Z>) {
      run.template operator()<false>();
    }
  });
}

inline RowPlan plan_norm_backward(const NormBackward& args, const Device& device) {
  const auto plan = [&]<class Z>(Z) {
    const bool aligned = rows_aligned<Z>(args.width, {args.dy, args.dz, args.z, args.weight, args.dx, args.dresidual});
    return plan_rows(args.rows, args.width, aligned, true, {kElements<Z>, kNormBackwardThreads, 1024}, device);
  };
  return args.z.dtype == DType::f32 ? plan(float{}) : plan(bf16{});
}

// args.partials: (plan.groups(), kColumnSums, width)
inline void norm_backward(NormBackward args, const RowPlan& plan, Stream stream) {
  args.lanes = plan.lanes;
  visit_norm_dtypes(args.dx ? args.dx.dtype : args.z.dtype, args.z.dtype, [&](auto x_type, auto z_type) {
    using X = decltype(x_type);
    using Z = decltype(z_type);
    const bool sums_shared = args.partials != nullptr && plan.teams_per_block() > 1;
    const int per_thread = plan.way == RowWay::walked ? 0 : plan.way == RowWay::single ? kElements<Z> : kHeld;
    const int floats = branch_floats(args, plan.threads, per_thread) + (sums_shared ? kColumnSums * args.width : 0);
    launch(plan.way == RowWay::walked   ? norm_backward_walked<X, Z>
           : plan.way == RowWay::single ? norm_backward_held<X, Z, true>
                                        : norm_backward_held<X, Z, false>,
           row_launch(plan, floats), stream, args);
  });
}

inline void norm_column_sum(const ColumnSum& args, Stream stream) {
  if (args.width == 0) return;
  const int blocks = kColumnSums * static_cast<int>(ceil_div(args.width, kColumns));
  launch(column_sum,
         Launch{.grid = blocks,
                .block = kColumns * kColumnThreads,
                .cluster = 1,
                .shared_bytes = kColumns * kColumnThreads * 4},
         stream, args);
}

}  // namespace pyllm::cuda
