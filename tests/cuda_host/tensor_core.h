// The functions of cuda/ptx.cuh for tensor cores on the host: ldmatrix, mma.sync.m16n8k16 and cp.async, with the
// layouts of fragments that the PTX ISA gives. g is a lane's group (lane / 4), t its place there (lane % 4); an element
// of 16 bits is named by the register, the half of it (0: low) and the lane.
#pragma once

#include "cuda_host/executor.h"

namespace pyllm::cuda {

// ldmatrix.m8n8.x1/.x2/.x4: lanes 8i ... 8i + 7 hold where the rows of matrix i begin. Of matrix i register i gets row
// g, columns 2t and 2t + 1; with .trans column g, rows 2t and 2t + 1.
template <bool TRANSPOSED, int N, class T>
void load_matrices(const Shared<T>& shared, int index, uint32_t (&out)[N], host::Site site = host::Site::current()) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4));
  const char* name = "load_matrices";
  const uint64_t mine = lane_id() < 8 * N ? shared.place(index, 8) : 0;
  if (mine % 16 != 0) host::fail("load_matrices: a row does not begin at a multiple of 16 bytes");
  const auto collective = host::meet_lanes(name, site, kAllLanes, &mine, sizeof(mine), false);
  const auto row = [&](int matrix, int i) { return detail::value_of<uint64_t>(*collective, 8 * matrix + i); };
  for (int matrix = 0; matrix < N; ++matrix) {
    // A row of 16 bytes lies in 4 of 32 banks: the 8 rows of a matrix are read at once if no two are in the same.
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << row(matrix, i) / 16 % 8;
    if (banks != 0xff) host::fail("load_matrices: rows of a matrix lie in the same banks");
    const int g = lane_id() / 4, t = lane_id() % 4;
    uint16_t halves[2];
    for (int i = 0; i < 2; ++i) {
      const uint64_t at = TRANSPOSED ? row(matrix, 2 * t + i) + 2 * g : row(matrix, g) + 2 * (2 * t + i);
      host::read_shared(host::cluster_rank(), at, &halves[i], 2);
    }
    std::memcpy(&out[matrix], halves, 4);
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32: c += a b in fp32.
//   a (16 x 16): register r holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next
//   b (16 x 8): register r holds column g, rows 2t + 8 r and the next
//   c (16 x 8): element i is row g + 8 (i / 2), column 2t + i % 2
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  host::Site site = host::Site::current()) {
  struct Lane {
    T a[4][2], b[2][2];
  } mine;
  static_assert(sizeof(Lane) == host::kLaneBytes);
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b[0], &b0, 4);
  std::memcpy(mine.b[1], &b1, 4);
  const auto collective = host::meet_lanes("multiply_add", site, kAllLanes, &mine, sizeof(mine), false);
  const auto* lanes = reinterpret_cast<const Lane*>(collective->values);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int of_k = k % 8 / 2, upper = k / 8;
      c[i] += static_cast<float>(lanes[4 * g + of_k].a[2 * upper + i / 2][k % 2]) *
              static_cast<float>(lanes[4 * column + of_k].b[upper][k % 2]);
    }
  }
}

// cp.async of 8 or 16 bytes; not present (src-size 0): zeros.
template <class T>
void copy_async(const Shared<T>& shared, int index, const T* from, int count, bool present) {
  const size_t bytes = count * sizeof(T), to = shared.place(index, count);
  if (bytes != 8 && bytes != 16) host::fail("copy_async: copies are of 8 or 16 bytes");
  if (to % bytes != 0) host::fail("copy_async: the copy does not begin at a multiple of its size");
  if (present) host::check_global(from, bytes, host::Use::read);
  host::begin_copy(to, present ? from : nullptr, bytes);
}

inline void commit_copies() { host::commit_copies(); }

template <int GROUPS>
void wait_copies() {
  host::wait_for_copies(GROUPS);
}

}  // namespace pyllm::cuda
