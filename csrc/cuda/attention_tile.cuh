// Tiles of 16-bit numbers in shared memory, and the products of them that a warp makes on tensor cores.
//
// Plain wrappers of mma.sync, ldmatrix and cp.async rather than CuTe, so that the host model can run them. A warp's
// accumulators are 16 M x 8 N numbers c[M][N][4], as multiply_add lays them out: of 16 x 8 numbers a thread has rows g
// and g + 8 (g = lane / 4), columns 2t and 2t + 1 (t = lane % 4). Two neighbours of 16 x 8 are, converted, the first
// operand of another product: weights go from one product to the next in registers.
#pragma once

#include "cuda/common.cuh"

namespace pyllm::cuda {

// Two neighbours of a row, converted.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> pair;
  if constexpr (std::is_same_v<T, bf16>) {
    pair = __floats2bfloat162_rn(low, high);
  } else {
    pair = __floats2half2_rn(low, high);
  }
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// 16 M rows by 16 K columns, converted, as the first operand of a product.
template <int M, int K>
using Operand = uint32_t[M][K][4];

template <class T, int M, int N>
__device__ inline void convert(const float (&c)[M][N][4], Operand<M, N / 2>& a) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][n / 2][n % 2 * 2 + half] = pack<T>(c[m][n][2 * half], c[m][n][2 * half + 1]);
}

// ROWS x COLUMNS numbers in chunks of 8, which lie in a row in an order that depends on it: the same chunk of any 8
// rows from a multiple of 8 on lies in different banks, as does any chunk of a row.
template <class T, int ROWS, int COLUMNS>
class Tile {
  static constexpr int kChunks = COLUMNS / 8;
  static constexpr int kOrders = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // in which chunks lie

 public:
  static constexpr int kBytes = ROWS * COLUMNS * static_cast<int>(sizeof(T));
  static_assert(COLUMNS % kMatrix == 0 && ROWS % kMatrix == 0 && sizeof(T) == 2);

  __device__ explicit Tile(int byte_offset)
      : numbers_(shared_memory<T>(byte_offset, ROWS * COLUMNS)),
        pairs_(shared_memory<uint32_t>(byte_offset, ROWS * COLUMNS / 2)),
        chunks_(shared_memory<Chunk<T, 8>>(byte_offset, ROWS * kChunks)) {}

  // Begins to copy `rows` rows of `dim` numbers; zeros where there are no more, and where bit `row` of `left_out` is
  // set. All THREADS of the block take part.
  template <int THREADS>
  __device__ void copy_rows(const T* from, int64_t stride, int rows, int dim, uint64_t left_out = 0) const {
    static_assert(ROWS * kChunks % THREADS == 0);
#pragma unroll 1
    for (int i = 0; i < ROWS * kChunks; i += THREADS) {
      const int row = (i + static_cast<int>(threadIdx.x)) / kChunks,
                chunk = (i + static_cast<int>(threadIdx.x)) % kChunks;
      const bool present = row < rows && 8 * chunk < dim && (ROWS > 64 || (left_out >> row & 1) == 0);
      copy_async(numbers_, 8 * place(row, chunk), from + row * stride + 8 * chunk, 8, present);
    }
  }

  // 16 x 16 numbers from `row` and `column` on: of 8 x 8 each, the upper left, lower left, upper right, lower right.
  template <bool TRANSPOSED = false>
  __device__ void load_square(int row, int column, uint32_t (&out)[4]) const {
    load_matrices<TRANSPOSED>(numbers_, 8 * place(row + lane_id() % 16, column / 8 + lane_id() / 16), out);
  }

  // A warp's numbers, converted, into the columns from 0 and the rows from `row` on.
  template <int K>
  __device__ void put(int row, const uint32_t (&a)[K][4]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs_[4 * place(row + i % 2 * 8 + lane_id() / 4, 2 * k + i / 2) + lane_id() % 4] = a[k][i];
  }

  // Writes COUNT rows from `row` on that are below `rows`, to[0] being row 0's; by the warp that has put them there.
  template <int COUNT>
  __device__ void store_rows(int row, T* to, int64_t stride, int rows, int dim) const {
    for (int i = lane_id(); i < COUNT * kChunks; i += kWarp) {
      const int r = row + i / kChunks, chunk = i % kChunks;
      if (r >= rows || 8 * chunk >= dim) continue;
      const Chunk<T, 8> numbers = chunks_[place(r, chunk)];
      store(reinterpret_cast<Chunk<T, 8>*>(to + r * stride + 8 * chunk), numbers);
    }
  }

  __device__ T at(int row, int column) const { return numbers_[8 * place(row, column / 8) + column % 8]; }

 private:
  // Where a chunk lies, in chunks.
  __device__ static int place(int row, int chunk) { return row * kChunks + (chunk ^ (row / (8 / kOrders) % kOrders)); }

  Shared<T> numbers_;
  Shared<uint32_t> pairs_;
  Shared<Chunk<T, 8>> chunks_;
};

template <int M, int N>
__device__ inline void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (auto& rows : c)
#pragma unroll
    for (auto& numbers : rows)
#pragma unroll
      for (float& number : numbers) number = 0;
}

// c += a b', of 16 M rows of a from `row` on and all rows of b.
template <class T, int ROWS_A, int ROWS_B, int DEPTH, int M, int N>
__device__ inline void multiply_rows(const Tile<T, ROWS_A, DEPTH>& a, int row, const Tile<T, ROWS_B, DEPTH>& b,
                                     float (&c)[M][N][4]) {
  static_assert(8 * N == ROWS_B);
#pragma unroll 1
  for (int k = 0; k < DEPTH; k += kMatrix) {
    uint32_t of_a[M][4], of_b[4];
#pragma unroll
    for (int m = 0; m < M; ++m) a.load_square(row + kMatrix * m, k, of_a[m]);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      b.load_square(8 * n, k, of_b);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(c[m][n], of_a[m], of_b[0], of_b[2]);
        multiply_add<T>(c[m][n + 1], of_a[m], of_b[1], of_b[3]);
      }
    }
  }
}

// c += a b, of 8 N columns of b from `column` on.
template <class T, int DEPTH, int COLUMNS, int M, int N>
__device__ inline void multiply_weights(const Operand<M, DEPTH / kMatrix>& a, const Tile<T, DEPTH, COLUMNS>& b,
                                        int column, float (&c)[M][N][4]) {
#pragma unroll
  for (int k = 0; k < DEPTH; k += kMatrix) {
    uint32_t of_b[4];
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      b.template load_square<true>(k, column + 8 * n, of_b);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(c[m][n], a[m][k / kMatrix], of_b[0], of_b[1]);
        multiply_add<T>(c[m][n + 1], a[m][k / kMatrix], of_b[2], of_b[3]);
      }
    }
  }
}

// c += a' b, of 16 columns of a from `row` on and 8 N columns of b from `column` on.
template <class T, int DEPTH, int COLUMNS_A, int COLUMNS_B, int N>
__device__ inline void multiply_columns(const Tile<T, DEPTH, COLUMNS_A>& a, int row, const Tile<T, DEPTH, COLUMNS_B>& b,
                                        int column, float (&c)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < DEPTH; k += kMatrix) {
    uint32_t squares[4], of_b[4];
    a.template load_square<true>(k, row, squares);
    const uint32_t of_a[4] = {squares[0], squares[2], squares[1], squares[3]};
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      b.template load_square<true>(k, column + 8 * n, of_b);
      multiply_add<T>(c[0][n], of_a, of_b[0], of_b[1]);
      multiply_add<T>(c[0][n + 1], of_a, of_b[2], of_b[3]);
    }
  }
}

}  // namespace pyllm::cuda
