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
 public:
  static constexpr int kChunks = COLUMNS / 8;
  static constexpr int kOrders = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // in which chunks lie
  using Number = T;
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
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (ROWS <= 64 && THREADS % kChunks == 0) {  // a thread's chunks lie below one another
      constexpr int kStep = THREADS / kChunks;
      const int row = thread / kChunks, chunk = thread % kChunks;
      uint64_t present = ~left_out & (rows >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(rows, 0)) - 1);
      present = 8 * chunk < dim ? present >> row : 0;
      from += row * stride + 8 * chunk;
#pragma unroll
      for (int i = 0; i < ROWS; i += kStep) {
        copy_async(numbers_, 8 * place(row + i, chunk), from, 8, (present >> i & 1) != 0);
        from += kStep * stride;
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < ROWS * kChunks; i += THREADS) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool present = row < rows && 8 * chunk < dim && (ROWS > 64 || (left_out >> row & 1) == 0);
        copy_async(numbers_, 8 * place(row, chunk), from + row * stride + 8 * chunk, 8, present);
      }
    }
  }

  // A warp's numbers, converted, into the columns from 0 and the rows from `row` on, a multiple of 8.
  template <int K>
  __device__ void put(int row, const uint32_t (&a)[K][4]) const {
    const int first = (row + lane_id() / 4) * kChunks + order(lane_id() / 4);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs_[4 * (moved(first, 2 * k + i / 2) + i % 2 * 8 * kChunks) + lane_id() % 4] = a[k][i];
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
  // Where a row has the first of its chunks.
  __device__ static int order(int row) {
    return static_cast<int>(static_cast<unsigned>(row) / (8 / kOrders) % kOrders);
  }
  // Where a chunk lies, in chunks.
  __device__ static int place(int row, int chunk) { return row * kChunks + (chunk ^ order(row)); }
  // From where a row has a chunk to where it has the one `by` further on: no bit of `by` among those that orders change
  // may be one of that chunk.
  __device__ static int moved(int place, int by) { return (place ^ by % kOrders) + by / kOrders * kOrders; }

  template <class, bool, bool>
  friend class Squares;

  Shared<T> numbers_;
  Shared<uint32_t> pairs_;
  Shared<Chunk<T, 8>> chunks_;
};

// A lane's part in loading squares of 16 x 16 numbers of a tile: of 8 x 8 each, the upper left, lower left, upper right
// and lower right; ACROSS: the upper right before the lower left. Where the lane's rows begin is known but for a
// constant, which changes bits of the chunk alone.
template <class OF, bool TRANSPOSED, bool ACROSS>
class Squares {
 public:
  // From there on. row: a multiple of 8; column: of 16.
  __device__ Squares(const OF& tile, int row, int column) : numbers_(tile.numbers_) {
    const unsigned lane = lane_id();
    const int below = ACROSS ? lane % 8 + lane / 16 * 8 : lane % 16, right = ACROSS ? lane / 8 % 2 : lane / 16;
    first_ = OF::moved((opaque(row) + below) * OF::kChunks + (right ^ OF::order(lane % 8)), column / 8);
  }

  // `row` and `column` further on; see Tile::moved.
  __device__ void load(int row, int column, uint32_t (&out)[4]) const {
    load_matrices<TRANSPOSED>(numbers_, 8 * (OF::moved(first_, column / 8) + row * OF::kChunks), out);
  }

  // On by as many columns as orders know.
  __device__ void advance() { first_ += OF::kOrders; }

 private:
  Shared<typename OF::Number> numbers_;
  int first_;
};

// Whether 8 N columns from a multiple of that on may be loaded by their distance from the first.
template <class OF, int N>
inline constexpr bool kApart = N % OF::kOrders == 0 || (N & (N - 1)) == 0;

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
  Squares<Tile<T, ROWS_A, DEPTH>, false, false> squares_a(a, row, 0);
  Squares<Tile<T, ROWS_B, DEPTH>, false, true> squares_b(b, 0, 0);
  constexpr int kOrders = Tile<T, ROWS_A, DEPTH>::kOrders;
#pragma unroll 1
  for (int first = 0; first < DEPTH; first += 8 * kOrders) {
#pragma unroll
    for (int k = 0; k < 8 * kOrders; k += kMatrix) {
      uint32_t of_a[M][4], of_b[4];
#pragma unroll
      for (int m = 0; m < M; ++m) squares_a.load(kMatrix * m, k, of_a[m]);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        squares_b.load(8 * n, k, of_b);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply_add<T>(c[m][n], of_a[m], of_b[0], of_b[1]);
          multiply_add<T>(c[m][n + 1], of_a[m], of_b[2], of_b[3]);
        }
      }
    }
    squares_a.advance();
    squares_b.advance();
  }
}

// c += a b, of 8 N columns of b from `column` on, a multiple of that.
template <class T, int DEPTH, int COLUMNS, int M, int N>
__device__ inline void multiply_weights(const Operand<M, DEPTH / kMatrix>& a, const Tile<T, DEPTH, COLUMNS>& b,
                                        int column, float (&c)[M][N][4]) {
  using B = Tile<T, DEPTH, COLUMNS>;
  const Squares<B, true, false> squares_b(b, 0, kApart<B, N> ? column : 0);
  const int from = kApart<B, N> ? 0 : column;
#pragma unroll
  for (int k = 0; k < DEPTH; k += kMatrix) {
    uint32_t of_b[4];
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      squares_b.load(k, from + 8 * n, of_b);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(c[m][n], a[m][k / kMatrix], of_b[0], of_b[1]);
        multiply_add<T>(c[m][n + 1], a[m][k / kMatrix], of_b[2], of_b[3]);
      }
    }
  }
}

// c += a' b, of 16 columns of a from `row` on and 8 N columns of b from `column` on, a multiple of that.
template <class T, int DEPTH, int COLUMNS_A, int COLUMNS_B, int N>
__device__ inline void multiply_columns(const Tile<T, DEPTH, COLUMNS_A>& a, int row, const Tile<T, DEPTH, COLUMNS_B>& b,
                                        int column, float (&c)[1][N][4]) {
  using A = Tile<T, DEPTH, COLUMNS_A>;
  using B = Tile<T, DEPTH, COLUMNS_B>;
  const Squares<A, true, true> squares_a(a, 0, row);
  const Squares<B, true, false> squares_b(b, 0, kApart<B, N> ? column : 0);
  const int from = kApart<B, N> ? 0 : column;
#pragma unroll
  for (int k = 0; k < DEPTH; k += kMatrix) {
    uint32_t of_a[4], of_b[4];
    squares_a.load(k, 0, of_a);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      squares_b.load(k, from + 8 * n, of_b);
      multiply_add<T>(c[0][n], of_a, of_b[0], of_b[1]);
      multiply_add<T>(c[0][n + 1], of_a, of_b[2], of_b[3]);
    }
  }
}

}  // namespace pyllm::cuda
