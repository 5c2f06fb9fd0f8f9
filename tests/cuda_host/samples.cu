// Small kernels, one or more for each thing that the host model stands in for, and their entry points for the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"
#include "cuda_host/executor.h"

namespace pyllm::cuda {

struct alignas(16) Four {
  float at[4];
};

// out[block] = sum of the block's part of x: vectors of 16 bytes, shuffles, shared memory, barriers.
__global__ void block_sum(const float* x, float* out, int count) {
  Shared<float> sums = shared_memory<float>(0, blockDim.x / 32);
  const int lane = lane_id(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* mine = x + int64_t{blockIdx.x} * count;
  float sum = 0;
  for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
    const Four four = load_vector(reinterpret_cast<const Four*>(mine + i));
    for (float value : four.at) sum += value;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
  if (lane == 0) sums[warp] = sum;
  sync_block();
  if (warp == 0) {
    sum = lane < warps ? sums[lane] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
    if (lane == 0) store(out + blockIdx.x, sum);
  }
}

// out = x reversed within the block, through shared memory that warps exchange by a barrier of their own.
__global__ void reverse_warps(const int* x, int* out, int first_barrier, int threads) {
  const int pair = threadIdx.x / 64, within = threadIdx.x % 64;
  Shared<int> values = shared_memory<int>(pair * 64 * static_cast<int>(sizeof(int)), 64);
  values[within] = load(x + threadIdx.x);
  sync_named(first_barrier + pair, threads);
  store(out + threadIdx.x, static_cast<int>(values[63 - within]));
}

// Twice in turn: a lane writes, sync_warp, all read.
__global__ void broadcast_within_warp(const int* x, int* out) {
  Shared<int> value = shared_memory<int>(0, 1);
  int sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (lane_id() == turn) value[0] = load(x + turn);
    sync_warp();
    sum += value[0];
    sync_warp();
  }
  store(out + threadIdx.x, sum);
}

// Votes, reductions and shuffles of half a warp each.
__global__ void half_warps(const int* x, int* out) {
  const unsigned mask = lane_id() < 16 ? 0x0000ffffu : 0xffff0000u;
  const int value = load(x + threadIdx.x);
  const int first = lane_id() & 16;
  store(out + 6 * threadIdx.x, static_cast<int>(vote_ballot(value > 0, mask)));
  store(out + 6 * threadIdx.x + 1, static_cast<int>(vote_any(value > 7, mask)));
  store(out + 6 * threadIdx.x + 2, static_cast<int>(vote_all(value > -9, mask)));
  store(out + 6 * threadIdx.x + 3, reduce_add(value, mask));
  store(out + 6 * threadIdx.x + 4, reduce_max(value, mask));
  store(out + 6 * threadIdx.x + 5, shuffle(value, first + 3, mask));
}

enum Step { kSync, kRead, kWrite };

// Each lane takes its part in the steps, (what, lanes, element) each, of a script.
__global__ void follow_script(const int* script, int steps, int elements) {
  Shared<int> values = shared_memory<int>(0, elements);
  for (int i = 0; i < steps; ++i) {
    const int what = load(script + 3 * i), element = load(script + 3 * i + 2);
    const unsigned lanes = static_cast<unsigned>(load(script + 3 * i + 1));
    if ((lanes >> lane_id() & 1) == 0) continue;
    if (what == kSync) sync_warp(lanes);
    if (what == kRead) static_cast<void>(static_cast<int>(values[element]));
    if (what == kWrite) values[element] = i;
  }
}

// out[rank] of each cluster = sum over its blocks of x; each block writes its x to all, and reads its left neighbour's.
__global__ void cluster_sum(const float* x, float* out) {
  const int rank = cluster_rank(), size = cluster_size();
  Shared<float> received = shared_memory<float>(0, size);
  Shared<float> kept = shared_memory<float>(size * static_cast<int>(sizeof(float)), 1);
  const float mine = load(x + blockIdx.x);
  cluster_arrive();
  if (threadIdx.x == 0) kept[0] = mine;
  cluster_wait();
  if (static_cast<int>(threadIdx.x) < size) store_remote(received, rank, static_cast<int>(threadIdx.x), mine);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < size; ++i) sum += received[i];
    store(out + 2 * blockIdx.x, sum);
    store(out + 2 * blockIdx.x + 1, load_remote(kept, 0, (rank + size - 1) % size));
  }
  cluster_arrive();  // nobody leaves while others read
  cluster_wait();
}

// order[i] = the thread that came i-th: atomics.
__global__ void take_tickets(int* counter, int* order) {
  const int ticket = atomic_add(counter, 1);
  store(order + ticket, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

__global__ void approximations(const float* x, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    store(out + i, exp2_approx(load(x + i)));
    store(out + count + i, log2_approx(load(x + i)));
    store(out + 2 * count + i, rsqrt_approx(load(x + i)));
  }
}

__global__ void round_to_16_bits(const float* x, __nv_bfloat16* bf16, __half* f16, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    store(bf16 + i, __float2bfloat16_rn(load(x + i)));
    store(f16 + i, __float2half_rn(load(x + i)));
  }
}

__global__ void load_after_store(float* x) {
  store(x + threadIdx.x, 1.0f);
  store(x + threadIdx.x, 2 * load<Load::coherent>(x + threadIdx.x));
}

__global__ void dereference(float* x, int64_t index) { x[index] = 1; }

__global__ void nothing() {}

using cuda_host::reporting;

extern "C" {

const char* run_block_sum(const float* x, float* out, int64_t blocks, int64_t count, int64_t shared_bytes) {
  return reporting([&] {
    launch(block_sum, {.grid = blocks, .block = 128, .shared_bytes = static_cast<int>(shared_bytes)}, nullptr, x, out,
           static_cast<int>(count));
  });
}

const char* run_reverse_warps(const int* x, int* out, int64_t first_barrier, int64_t threads) {
  return reporting([&] {
    launch(reverse_warps, {.grid = 1, .block = 256, .shared_bytes = 1024}, nullptr, x, out,
           static_cast<int>(first_barrier), static_cast<int>(threads));
  });
}

const char* run_broadcast_within_warp(const int* x, int* out) {
  return reporting(
      [&] { launch(broadcast_within_warp, {.grid = 1, .block = 32, .shared_bytes = 4}, nullptr, x, out); });
}

const char* run_half_warps(const int* x, int* out, int64_t block) {
  return reporting([&] { launch(half_warps, {.grid = 1, .block = static_cast<int>(block)}, nullptr, x, out); });
}

const char* run_follow_script(const int* script, int64_t steps, int64_t elements) {
  return reporting([&] {
    launch(follow_script, {.grid = 1, .block = 32, .shared_bytes = static_cast<int>(4 * elements)}, nullptr, script,
           static_cast<int>(steps), static_cast<int>(elements));
  });
}

const char* run_cluster_sum(const float* x, float* out, int64_t grid, int64_t cluster) {
  return reporting([&] {
    const int size = static_cast<int>(cluster);
    launch(cluster_sum, {.grid = grid, .block = 64, .cluster = size, .shared_bytes = 4 * size + 4}, nullptr, x, out);
  });
}

const char* run_take_tickets(int* counter, int* order) {
  return reporting([&] { launch(take_tickets, {.grid = 3, .block = 40}, nullptr, counter, order); });
}

const char* run_approximations(const float* x, float* out, int64_t count) {
  return reporting([&] { launch(approximations, {.grid = 1, .block = 32}, nullptr, x, out, static_cast<int>(count)); });
}

const char* run_round_to_16_bits(const float* x, void* bf16, void* f16, int64_t count) {
  return reporting([&] {
    launch(round_to_16_bits, {.grid = 1, .block = 64}, nullptr, x, static_cast<__nv_bfloat16*>(bf16),
           static_cast<__half*>(f16), static_cast<int>(count));
  });
}

const char* run_load_after_store(float* x) {
  return reporting([&] { launch(load_after_store, {.grid = 1, .block = 32}, nullptr, x); });
}

const char* run_dereference(float* x, int64_t index) {
  return reporting([&] { launch(dereference, {.grid = 1, .block = 1}, nullptr, x, index); });
}

const char* run_nothing(int64_t grid, int64_t block, int64_t cluster, int64_t shared_bytes) {
  return reporting([&] {
    launch(nothing,
           {.grid = grid,
            .block = static_cast<int>(block),
            .cluster = static_cast<int>(cluster),
            .shared_bytes = static_cast<int>(shared_bytes)},
           nullptr);
  });
}

}  // extern "C"

}  // namespace pyllm::cuda
