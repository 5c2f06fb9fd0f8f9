// What the kernels share: conversions, exponentials, chunks of 16 bytes, teams of threads and their reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "dtype.h"

namespace pyllm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

static_assert(kLargestCluster <= kPortableCluster);

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(f16 value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

// --- softmax ---

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLargest = 3.4e38f;
inline constexpr float kLog2E = 1.4426950408889634f;

// Of a T: 16 bits do not show what the quick way loses.
template <class T>
__device__ inline float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  return exp2_approx(x * kLog2E);
}

// A maximum to subtract from scores: 0 where there are none.
__device__ inline float finite_peak(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// --- chunks: E neighbouring elements of a row ---

// Elements of T in 16 bytes.
template <class T>
inline constexpr int kElements = 16 / sizeof(T);

// Threads of a block that takes one row and holds it: 32 KiB. Where __launch_bounds__ does not name the blocks that a
// processor is to hold, ptxas may spill for more of them.
template <class T>
inline constexpr int kRowThreads = 128 * kElements<T>;

template <class T, int E>
struct alignas(sizeof(T) * E) Chunk {
  T at[E];
};

__device__ inline bool inside(int column, int width) {
  return static_cast<unsigned>(column) < static_cast<unsigned>(width);
}

template <class Access>
__device__ inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Access) == 0;
}

// Whether a chunk is read or written by vector accesses. WHOLE: no chunk is cut by an end of its row, none is
// misaligned.
template <bool WHOLE, int E, class Access>
__device__ inline bool by_vectors(const void* first, int column, int width) {
  if constexpr (WHOLE) return column < width;
  return column >= 0 && column + E <= width && aligned<Access>(first);
}

// Elements column ... column + E - 1 of a row; 0 where the row has none.
template <bool WHOLE, int E, Load kind = Load::read_only, class T>
__device__ inline Chunk<T, E> load_chunk(const T* row, int column, int width) {
  constexpr int kStep = E < kElements<T> ? E : kElements<T>;
  using Access = Chunk<T, kStep>;
  const T* source = row + column;
  Chunk<T, E> chunk;
  if (by_vectors<WHOLE, E, Access>(source, column, width)) {
#pragma unroll
    for (int i = 0; i < E; i += kStep) {
      const Access part = load<kind>(reinterpret_cast<const Access*>(source + i));
#pragma unroll
      for (int e = 0; e < kStep; ++e) chunk.at[i + e] = part.at[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) chunk.at[e] = !WHOLE && inside(column + e, width) ? load<kind>(source + e) : T{};
  }
  return chunk;
}

template <bool WHOLE, int E, class T>
__device__ inline void store_chunk(T* row, int column, int width, const Chunk<T, E>& chunk) {
  constexpr int kStep = E < kElements<T> ? E : kElements<T>;
  using Access = Chunk<T, kStep>;
  T* target = row + column;
  if (by_vectors<WHOLE, E, Access>(target, column, width)) {
#pragma unroll
    for (int i = 0; i < E; i += kStep) {
      Access part;
#pragma unroll
      for (int e = 0; e < kStep; ++e) part.at[e] = chunk.at[i + e];
      store(reinterpret_cast<Access*>(target + i), part);
    }
  } else if constexpr (!WHOLE) {
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (inside(column + e, width)) store(target + e, chunk.at[e]);
  }
}

// A chunk of an array in T or in float, converted; 0 where the row has none.
template <class T, bool WHOLE, int E>
__device__ inline void load_floats(const Array& array, int64_t row, int column, int width, float (&out)[E]) {
  if (array.dtype == DType::f32) {
    const auto chunk = load_chunk<WHOLE, E>(array.as<const float>() + row, column, width);
#pragma unroll
    for (int e = 0; e < E; ++e) out[e] = chunk.at[e];
  } else if constexpr (!std::is_same_v<T, float>) {
    const auto chunk = load_chunk<WHOLE, E>(array.as<const T>() + row, column, width);
#pragma unroll
    for (int e = 0; e < E; ++e) out[e] = to_float(chunk.at[e]);
  }
}

// --- teams ---

struct Sum {
  __device__ static float of(float a, float b) { return a + b; }
  static constexpr float kNeutral = 0.0f;
};

struct Max {
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
  static constexpr float kNeutral = -__builtin_inff();
};

// Combines a value over the lanes of a warp that differ in the bits from FIRST up to, without it, LAST.
template <class Op, int FIRST, int LAST>
__device__ inline float combine(float value) {
#pragma unroll
  for (int offset = FIRST; offset < LAST; offset *= 2) value = Op::of(value, shuffle_xor(value, offset));
  return value;
}

// The threads that share a row; all of a block make the same reductions, in the same order.
class Team {
 public:
  // Bytes of shared memory that reductions of a block of more than one warp need, from its start.
  static constexpr int kSharedBytes = 4 * (kWarp + kLargestCluster) * sizeof(float);

  __device__ explicit Team(int lanes)
      : lanes_(lanes), cluster_(cluster_size()), rank_(cluster_rank()), slots_(shared_memory<float>(0, 4 * kSlots)) {
    if (cluster_ > 1) {  // no block writes to another before that has begun
      cluster_arrive();
      cluster_wait();
    }
  }

  // This thread among those of its team, and their number.
  __device__ int lane() const { return rank_ * lanes_ + static_cast<int>(threadIdx.x) % lanes_; }
  __device__ int size() const { return cluster_ * lanes_; }
  // This team among those of its block, and their number; one where blocks share a row.
  __device__ int in_block() const { return static_cast<int>(threadIdx.x) / lanes_; }
  __device__ int per_block() const { return static_cast<int>(blockDim.x) / lanes_; }
  __device__ RowSteps rows() const { return row_steps(blockIdx.x, gridDim.x, cluster_, per_block()); }

  // Combines each value over the team, in an order that depends on nothing else; every thread gets the results.
  template <class Op, int K>
  __device__ void reduce(float (&values)[K]) {
    static_assert(K <= 2);
    within_warp<Op>(values, lanes_ < kWarp ? lanes_ : kWarp);
    if (lanes_ > kWarp) within_block<Op>(values);
    if (cluster_ > 1) within_cluster<Op>(values);
  }

  template <class Op>
  __device__ float reduce(float value) {
    float values[1] = {value};
    reduce<Op>(values);
    return values[0];
  }

 private:
  static constexpr int kSlots = kWarp + kLargestCluster;  // of one value, in one of two turns

  template <class Op, int K>
  __device__ static void within_warp(float (&values)[K], int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = Op::of(values[k], shuffle_xor(values[k], offset));
  }

  // Two sets of slots take turns: a set is written again after a barrier that all threads reach after reading it.
  template <class Op, int K>
  __device__ void within_block(float (&values)[K]) {
    turn_ ^= 1;
    const int warps = lanes_ / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (lane_id() == 0) slots_[slot(k) + warp] = values[k];
    sync_block();
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = lane_id() < warps ? slots_[slot(k) + lane_id()] : Op::kNeutral;
    within_warp<Op>(values, kWarp);
  }

  template <class Op, int K>
  __device__ void within_cluster(float (&values)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (static_cast<int>(threadIdx.x) < cluster_)
        store_remote(slots_, slot(k) + kWarp + rank_, static_cast<int>(threadIdx.x), values[k]);
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = slots_[slot(k) + kWarp];
      for (int rank = 1; rank < cluster_; ++rank) values[k] = Op::of(values[k], slots_[slot(k) + kWarp + rank]);
    }
  }

  __device__ int slot(int k) const { return (2 * turn_ + k) * kSlots; }

  int lanes_, cluster_, rank_, turn_ = 0;
  Shared<float> slots_;
};

// How far before a row its first chunk begins, in elements: `base` is where row 0 begins.
template <class T>
__device__ inline int phase(const T* base, int64_t element) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(base) / sizeof(T) + element) % kElements<T>);
}

// --- host ---

// Whether chunks of 16 bytes of T cover rows of `width` in every array that there is.
template <class T>
inline bool rows_aligned(int64_t width, std::initializer_list<Array> arrays) {
  return width % kElements<T> == 0 && std::all_of(arrays.begin(), arrays.end(), [](const Array& array) {
           return reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
         });
}

// floats: what the kernel keeps in shared memory beside its reductions.
inline Launch row_launch(const RowPlan& plan, int floats) {
  return {.grid = plan.blocks,
          .block = plan.threads,
          .cluster = plan.cluster,
          .shared_bytes = Team::kSharedBytes + floats * static_cast<int>(sizeof(float))};
}

// Calls body(T{}) with the device's type for a dtype that the row kernels take.
template <class Body>
inline void visit_row_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace pyllm::cuda
