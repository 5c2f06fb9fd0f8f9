// What the kernels ask of the device beyond C++: memory accesses, shared memory, warps, barriers, clusters, tensor
// cores, asynchronous copies, launches.
// The only file with inline PTX, and the only one that knows of the model on the host: compiled by another compiler
// than nvcc, the same names come from tests/cuda_host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace pyllm::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kPortableCluster = 8;  // blocks of a cluster that every device with clusters takes

// A launch in one dimension. `grid` is in blocks and a multiple of `cluster`.
struct Launch {
  int64_t grid;
  int block;
  int cluster = 1;
  int shared_bytes = 0;
};

enum class Load {
  read_only,  // nobody writes there during the kernel
  streaming,  // likewise, and it is not read again
  coherent
};
enum class Store { plain, streaming };

// An access to an aligned T of 1, 2, 4, 8 or 16 bytes.
template <class T>
inline constexpr bool kOneAccess = std::is_trivially_copyable_v<T> && alignof(T) == sizeof(T) && sizeof(T) <= 16;

}  // namespace pyllm::cuda

#ifdef __CUDACC__

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

namespace pyllm::cuda {

// --- global memory ---

namespace detail {
template <int bytes>
using Word = std::conditional_t<
    bytes == 1, unsigned char,
    std::conditional_t<bytes == 2, unsigned short,
                       std::conditional_t<bytes == 4, unsigned, std::conditional_t<bytes == 8, uint2, uint4>>>>;
}  // namespace detail

template <Load kind = Load::read_only, class T>
__device__ __forceinline__ T load(const T* pointer) {
  static_assert(kOneAccess<T>);
  const auto* word = reinterpret_cast<const detail::Word<sizeof(T)>*>(pointer);
  if constexpr (kind == Load::read_only) {
    return __builtin_bit_cast(T, __ldg(word));
  } else if constexpr (kind == Load::streaming) {
    return __builtin_bit_cast(T, __ldcs(word));
  } else {
    return __builtin_bit_cast(T, __ldca(word));
  }
}

template <Store kind = Store::plain, class T>
__device__ __forceinline__ void store(T* pointer, const std::type_identity_t<T>& value) {
  static_assert(kOneAccess<T>);
  using Word = detail::Word<sizeof(T)>;
  if constexpr (kind == Store::streaming) {
    __stcs(reinterpret_cast<Word*>(pointer), __builtin_bit_cast(Word, value));
  } else {
    __stwb(reinterpret_cast<Word*>(pointer), __builtin_bit_cast(Word, value));  // a plain store may be taken apart
  }
}

template <class T>
__device__ __forceinline__ T atomic_add(T* pointer, std::type_identity_t<T> value) {
  return atomicAdd(pointer, value);
}

// Adds to two neighbours, at a multiple of 8 bytes; each is added to on its own.
__device__ __forceinline__ void atomic_add_pair(float* pointer, float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float2*>(pointer), make_float2(first, second));
#else
  atomicAdd(pointer, first);
  atomicAdd(pointer + 1, second);
#endif
}

// --- shared memory ---

// `count` elements of the block's dynamic shared memory. One is read into a T, not into auto: the host checks it there.
template <class T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
  __device__ __forceinline__ T& operator[](int64_t index) const { return data_[index]; }

 private:
  T* data_;
};

template <class T>
__device__ __forceinline__ Shared<T> shared_memory(int byte_offset, int64_t /*count*/) {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return Shared<T>(reinterpret_cast<T*>(dynamic_shared_memory + byte_offset));
}

// --- warps and blocks ---

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, unsigned mask = kAllLanes) {
  return __shfl_sync(mask, value, lane);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask, unsigned mask = kAllLanes) {
  return __shfl_xor_sync(mask, value, lane_mask);
}

// By a shuffle, so that the compiler knows it to be the same in the whole warp, which must all call it.
__device__ __forceinline__ int warp_id() { return shuffle(static_cast<int>(threadIdx.x / 32), 0); }

__device__ __forceinline__ unsigned vote_ballot(bool predicate, unsigned mask = kAllLanes) {
  return __ballot_sync(mask, predicate);
}

__device__ __forceinline__ bool vote_any(bool predicate, unsigned mask = kAllLanes) {
  return __any_sync(mask, predicate) != 0;
}

__device__ __forceinline__ bool vote_all(bool predicate, unsigned mask = kAllLanes) {
  return __all_sync(mask, predicate) != 0;
}

// T: int or unsigned.
template <class T>
__device__ __forceinline__ T reduce_add(T value, unsigned mask = kAllLanes) {
  return __reduce_add_sync(mask, value);
}

template <class T>
__device__ __forceinline__ T reduce_max(T value, unsigned mask = kAllLanes) {
  return __reduce_max_sync(mask, value);
}

__device__ __forceinline__ void sync_warp(unsigned mask = kAllLanes) { __syncwarp(mask); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barrier `id`, 1 to 15, of as many threads, in whole warps.
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// --- clusters; a device without them launches single blocks only ---

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }

template <class T>
__device__ __forceinline__ T& remote(Shared<T> shared, int64_t index, int) {
  return shared[index];
}
#else
__device__ __forceinline__ int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }

template <class T>
__device__ __forceinline__ T& remote(Shared<T> shared, int64_t index, int rank) {
  return *static_cast<T*>(__cluster_map_shared_rank(&shared[index], static_cast<unsigned>(rank)));
}
#endif

// The same element of another block's shared memory.
template <class T>
__device__ __forceinline__ T load_remote(Shared<T> shared, int64_t index, int rank) {
  return remote(shared, index, rank);
}

template <class T>
__device__ __forceinline__ void store_remote(Shared<T> shared, int64_t index, int rank, std::type_identity_t<T> value) {
  remote(shared, index, rank) = value;
}

// The same number, of which the compiler does not know that: what follows from it is computed where it stands, and not
// kept in registers from before a loop.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// --- asynchronous copies to shared memory and tensor cores, since sm_80 ---

namespace detail {
template <class T>
__device__ __forceinline__ unsigned shared_address(Shared<T> shared, int index) {
  return static_cast<unsigned>(__cvta_generic_to_shared(&shared[index]));
}
}  // namespace detail

// `count` elements, 8 or 16 bytes and as aligned, of global memory, or zeros if they are not present. They are there
// for this thread after wait_copies, for others after a barrier that follows.
template <class T>
__device__ __forceinline__ void copy_async(Shared<T> shared, int index, const T* from, int count, bool present) {
  const unsigned to = detail::shared_address(shared, index), ignored = present ? 0 : 1;
  if (count * sizeof(T) == 16) {
    asm volatile(
        "{\n.reg .pred ignored;\nsetp.ne.b32 ignored, %2, 0;\n"
        "cp.async.cg.shared.global [%0], [%1], 16, ignored;\n}"
        :
        : "r"(to), "l"(from), "r"(ignored)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred ignored;\nsetp.ne.b32 ignored, %2, 0;\n"
        "cp.async.ca.shared.global [%0], [%1], 8, ignored;\n}"
        :
        : "r"(to), "l"(from), "r"(ignored)
        : "memory");
  }
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits for all groups but the last GROUPS.
template <int GROUPS>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(GROUPS) : "memory");
}

// N matrices of 8 x 8 elements of 16 bits, in a layout that multiply_add takes; lane 8 i + r says where row r of matrix
// i begins, at a multiple of 16 bytes.
template <bool TRANSPOSED, int N, class T>
__device__ __forceinline__ void load_matrices(Shared<T> shared, int index, uint32_t (&out)[N]) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4));
  const unsigned from = detail::shared_address(shared, index);
  if constexpr (N == 4 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from));
  } else if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from));
  } else if constexpr (N == 2 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from));
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(from));
  } else if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from));
  }
}

// c += a b over the warp: a 16 x 16, b 16 x 8, c 16 x 8 in fp32. With g = lane / 4 and t = lane % 4, register r of a
// holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next; b0 column g, rows 2t and the next, b1 8 rows further;
// element i of c is row g + 8 (i / 2), column 2t + i % 2.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- approximations; results and arguments below the normal range are 0 ---

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- launches, from the host ---

using Stream = cudaStream_t;

namespace detail {
// Throws if a call for a kernel failed, and names the kernel with its template arguments.
inline void check(cudaError_t error, const void* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it
  const char* symbol = nullptr;
  std::string name = "a kernel";
  if (cudaFuncGetName(&symbol, kernel) == cudaSuccess) {
    char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
    name = readable != nullptr ? readable : symbol;
    std::free(readable);
  }
  throw std::runtime_error("pyllm: " + name + ": " + cudaGetErrorString(error));
}

// Lets a kernel have `bytes` of dynamic shared memory on the current device: asks for it once in a thread of the host,
// since every launch would wait for the answer.
inline void allow_shared(const void* kernel, int bytes) {
  thread_local std::map<std::pair<const void*, int>, int> allowed;
  int device = 0;
  check(cudaGetDevice(&device), kernel);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kernel);
  most = bytes;
}
}  // namespace detail

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& shape, Stream stream, Args&&... args) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  constexpr int kSharedWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kSharedWithoutAsking) detail::allow_shared(function, shape.shared_bytes);
  if (shape.cluster > kPortableCluster)
    detail::check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), function);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  detail::check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), function);
}

}  // namespace pyllm::cuda

#else
#include "cuda_host/ptx.h"
#endif

namespace pyllm::cuda {

// A vector access: as load and store, for what should not be taken apart.
template <Load kind = Load::read_only, class V>
__device__ __forceinline__ V load_vector(const V* pointer) {
  return load<kind>(pointer);
}

template <Store kind = Store::plain, class V>
__device__ __forceinline__ void store_vector(V* pointer, const std::type_identity_t<V>& value) {
  store<kind>(pointer, value);
}

}  // namespace pyllm::cuda
