// Small kernels for what the host model stands in for of tensor cores and asynchronous copies, and their entry points.
#include "cuda/ptx.cuh"
#include "cuda_host/executor.h"

namespace pyllm::cuda {

// Registers of fragments (lane, register) in, c (lane, 4) in and out.
template <class T>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = lane_id();
  uint32_t of_a[4], of_b[2];
  float of_c[4];
  for (int i = 0; i < 4; ++i) of_a[i] = load(a + 4 * lane + i);
  for (int i = 0; i < 2; ++i) of_b[i] = load(b + 2 * lane + i);
  for (int i = 0; i < 4; ++i) of_c[i] = load<Load::coherent>(c + 4 * lane + i);
  multiply_add<T>(of_c, of_a, of_b[0], of_b[1]);
  for (int i = 0; i < 4; ++i) store(c + 4 * lane + i, of_c[i]);
}

// Rows of 8 numbers, `pitch` numbers apart in shared memory, copied there by 16 bytes a lane (present: lanes that do)
// and taken as N matrices: out (lane, N).
template <bool TRANSPOSED, int N>
__global__ void take_matrices(const uint16_t* x, uint32_t* out, int pitch, int present) {
  Shared<__half> rows = shared_memory<__half>(0, 32 * pitch);
  const int lane = lane_id();
  copy_async(rows, lane * pitch, reinterpret_cast<const __half*>(x) + 8 * lane, 8, lane < present);
  commit_copies();
  wait_copies<0>();
  sync_warp();
  uint32_t matrices[N];
  load_matrices<TRANSPOSED>(rows, lane * pitch, matrices);
  for (int i = 0; i < N; ++i) store(out + N * lane + i, matrices[i]);
}

// out = sums of neighbours in a block's tiles of x, which are copied a tile ahead.
__global__ void sum_neighbours(const float* x, float* out, int tiles) {
  Shared<float> buffers = shared_memory<float>(0, 4 * blockDim.x);
  const int lane = threadIdx.x, threads = blockDim.x;
  const auto copy = [&](int tile) {
    if (tile < tiles) copy_async(buffers, 2 * (tile % 2 * threads + lane), x + 2 * (tile * threads + lane), 2, true);
    commit_copies();
  };
  copy(0);
  for (int tile = 0; tile < tiles; ++tile) {
    copy(tile + 1);
    wait_copies<1>();
    sync_block();
    const int first = tile % 2 * threads;
    float sum = 0;
    for (int i = 0; i < 2; ++i) sum += buffers[2 * first + (2 * lane + i + 1) % (2 * threads)];
    store(out + tile * threads + lane, sum);
    sync_block();
  }
}

using cuda_host::reporting;

extern "C" {

const char* run_multiply_fragments(const uint32_t* a, const uint32_t* b, float* c, int64_t bf16) {
  return reporting([&] {
    launch(bf16 != 0 ? multiply_fragments<__nv_bfloat16> : multiply_fragments<__half>, {.grid = 1, .block = 32},
           nullptr, a, b, c);
  });
}

const char* run_take_matrices(const uint16_t* x, uint32_t* out, int64_t count, int64_t transposed, int64_t pitch,
                              int64_t present) {
  return reporting([&] {
    const auto run = [&]<int N>() {
      launch(transposed != 0 ? take_matrices<true, N> : take_matrices<false, N>,
             {.grid = 1, .block = 32, .shared_bytes = static_cast<int>(64 * pitch)}, nullptr, x, out,
             static_cast<int>(pitch), static_cast<int>(present));
    };
    count == 4   ? run.template operator()<4>()
    : count == 2 ? run.template operator()<2>()
                 : run.template operator()<1>();
  });
}

const char* run_sum_neighbours(const float* x, float* out, int64_t tiles, int64_t threads) {
  return reporting([&] {
    const int block = static_cast<int>(threads);
    launch(sum_neighbours, {.grid = 1, .block = block, .shared_bytes = 16 * block}, nullptr, x, out,
           static_cast<int>(tiles));
  });
}

}  // extern "C"

}  // namespace pyllm::cuda
