// The functions of cuda/ptx.cuh on the host, each after the PTX ISA's text on the instruction that it names.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "cuda_host/executor.h"

#define __launch_bounds__(...)

// Of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace pyllm::cuda {

namespace host = pyllm::cuda_host;
using std::max, std::min;

// --- global memory: ld, ld.global.nc, st ("Addresses as Operands": aligned to the access) ---

template <Load kind = Load::read_only, class T>
T load(const T* pointer) {
  static_assert(kOneAccess<T>);
  host::check_global(pointer, sizeof(T), kind == Load::coherent ? host::Use::read : host::Use::read_only);
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <Store kind = Store::plain, class T>
void store(T* pointer, const std::type_identity_t<T>& value) {
  static_assert(kOneAccess<T>);
  host::check_global(pointer, sizeof(T), host::Use::write);
  std::memcpy(pointer, &value, sizeof(T));
}

// atom.add
template <class T>
T atomic_add(T* pointer, std::type_identity_t<T> value) {
  host::check_global(pointer, sizeof(T), host::Use::add);
  return std::exchange(*pointer, *pointer + value);
}

inline void atomic_add_pair(float* pointer, float first, float second) {
  host::check_global(pointer, 2 * sizeof(float), host::Use::add);
  pointer[0] += first;
  pointer[1] += second;
}

// --- shared memory ---

template <class T>
class Shared {
 public:
  // Stands for an element until it is read or written: `auto` must not keep it.
  class Reference {
   public:
    operator T() && { return shared_.load(host::cluster_rank(), index_); }
    T operator=(T value) && {
      shared_.store(host::cluster_rank(), index_, value);
      return value;
    }
    T operator=(Reference&& other) && { return std::move(*this) = static_cast<T>(std::move(other)); }

   private:
    friend Shared;
    Reference(const Shared& shared, int64_t index) : shared_(shared), index_(index) {}
    const Shared& shared_;
    int64_t index_;
  };

  Shared(int byte_offset, int64_t count) : begin_(byte_offset), count_(count) {
    if (byte_offset < 0 || count < 0 || begin_ + count * sizeof(T) > host::shared_size())
      host::fail("uses shared memory beyond the " + std::to_string(host::shared_size()) + " bytes of the launch");
    if (begin_ % alignof(T) != 0) host::fail("uses shared memory at a misaligned offset");
  }

  Reference operator[](int64_t index) const { return Reference(*this, index); }

  // Where elements index ... index + count - 1 begin.
  size_t place(int64_t index, int64_t count) const {
    offset(index + count - 1);
    return offset(index);
  }

  T load(int rank, int64_t index) const {
    T value;
    host::read_shared(rank, offset(index), &value, sizeof(T));
    return value;
  }

  void store(int rank, int64_t index, const T& value) const {
    host::write_shared(rank, offset(index), &value, sizeof(T));
  }

 private:
  size_t offset(int64_t index) const {
    if (index < 0 || index >= count_)
      host::fail("uses element " + std::to_string(index) + " of " + std::to_string(count_) + " in shared memory");
    return begin_ + index * sizeof(T);
  }

  size_t begin_;
  int64_t count_;
};

template <class T>
Shared<T> shared_memory(int byte_offset, int64_t count) {
  return Shared<T>(byte_offset, count);
}

// --- warps and blocks ---

inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }

namespace detail {

template <class T>
T value_of(const host::Collective& collective, int lane) {
  T value;
  std::memcpy(&value, collective.values[lane], sizeof(T));
  return value;
}

// shfl.sync: the result is undefined where the source lane is not in membermask.
template <class T>
T shuffled(const char* name, const host::Site& site, T value, int source, unsigned mask) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const auto collective = host::meet_lanes(name, site, mask, &value, sizeof(T), false);
  if ((mask >> source & 1) == 0)
    host::fail(std::string(name) + ": lane " + std::to_string(source) + " is not in the mask");
  return value_of<T>(*collective, source);
}

// redux.sync
template <class T, class Combine>
T reduced(const char* name, const host::Site& site, T value, unsigned mask, Combine combine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const auto collective = host::meet_lanes(name, site, mask, &value, sizeof(T), false);
  for (int lane = 0; lane < 32; ++lane)
    if (lane != lane_id() && (mask >> lane & 1) != 0) value = combine(value, value_of<T>(*collective, lane));
  return value;
}

// vote.sync: the lanes with the predicate
inline unsigned voted(const char* name, const host::Site& site, bool predicate, unsigned mask) {
  const auto collective = host::meet_lanes(name, site, mask, &predicate, sizeof(predicate), false);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) != 0 && value_of<bool>(*collective, lane)) lanes |= 1u << lane;
  return lanes;
}

}  // namespace detail

template <class T>
T shuffle(T value, int lane, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::shuffled("shuffle", site, value, lane & 31, mask);
}

template <class T>
T shuffle_xor(T value, int lane_mask, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::shuffled("shuffle_xor", site, value, lane_id() ^ (lane_mask & 31), mask);
}

inline int warp_id(host::Site site = host::Site::current()) {
  return shuffle(static_cast<int>(threadIdx.x / 32), 0, kAllLanes, site);
}

inline unsigned vote_ballot(bool predicate, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::voted("vote_ballot", site, predicate, mask);
}

inline bool vote_any(bool predicate, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::voted("vote_any", site, predicate, mask) != 0;
}

inline bool vote_all(bool predicate, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::voted("vote_all", site, predicate, mask) == mask;
}

template <class T>
T reduce_add(T value, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::reduced("reduce_add", site, value, mask,
                         [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); });
}

template <class T>
T reduce_max(T value, unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  return detail::reduced("reduce_max", site, value, mask, [](T a, T b) { return std::max(a, b); });
}

// bar.warp.sync: of these, the only one that orders memory.
inline void sync_warp(unsigned mask = kAllLanes, host::Site site = host::Site::current()) {
  host::meet_lanes("sync_warp", site, mask, &mask, 0, true);
}

// bar.sync, without and with a number of threads
inline void sync_block(host::Site site = host::Site::current()) {
  host::sync_block(0, static_cast<int>(blockDim.x), site);
}
inline void sync_named(int id, int threads, host::Site site = host::Site::current()) {
  if (id < 1 || id > 15) host::fail("sync_named: there are barriers 1 to 15");
  host::sync_block(id, threads, site);
}

// --- clusters: %cluster_ctarank, %cluster_nctarank, barrier.cluster, mapa ---

inline int cluster_rank() { return host::cluster_rank(); }
inline int cluster_size() { return host::cluster_size(); }
inline void cluster_arrive(host::Site site = host::Site::current()) { host::arrive_at_cluster(site); }
inline void cluster_wait(host::Site site = host::Site::current()) { host::wait_for_cluster(site); }

template <class T>
T load_remote(const Shared<T>& shared, int64_t index, int rank) {
  return shared.load(rank, index);
}

template <class T>
void store_remote(const Shared<T>& shared, int64_t index, int rank, std::type_identity_t<T> value) {
  shared.store(rank, index, value);
}

// --- approximations: .ftz, and off by up to the relative error of 2^-22 that ex2, lg2 and rsqrt (rcp: 2^-23) are
// allowed ---

namespace detail {

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Off by a share of the allowed error that is a function of the argument, unless the result is a float.
inline float approximate(double exact, float x, double allowed = 0x1p-22) {
  const float nearest = static_cast<float>(exact);
  if (static_cast<double>(nearest) == exact || std::isnan(exact)) return flushed(nearest);
  const uint32_t hash = std::bit_cast<uint32_t>(x) * 0x9E3779B1u;
  const double share = static_cast<int32_t>(hash ^ hash >> 15) * 0x1p-31;
  return flushed(static_cast<float>(exact * (1 + share * allowed)));
}

}  // namespace detail

inline float exp2_approx(float x) { return detail::approximate(std::exp2(double{detail::flushed(x)}), x); }
inline float log2_approx(float x) { return detail::approximate(std::log2(double{detail::flushed(x)}), x); }
inline float reciprocal_approx(float x) { return detail::approximate(1 / double{detail::flushed(x)}, x, 0x1p-23); }
inline float rsqrt_approx(float x) { return detail::approximate(1 / std::sqrt(double{detail::flushed(x)}), x); }

inline int opaque(int value) { return value; }

// --- launches ---

using Stream = void*;

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& shape, Stream, Args&&... args) {
  const std::tuple<Params...> values(std::forward<Args>(args)...);
  host::run(reinterpret_cast<const void*>(kernel), shape, [&] { std::apply(kernel, values); });
}

}  // namespace pyllm::cuda

#include "cuda_host/tensor_core.h"
