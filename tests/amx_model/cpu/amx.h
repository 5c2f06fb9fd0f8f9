// csrc/cpu/amx.h in C++, for processors without AMX: the same functions, as the pseudocode of the instruction set
// reference computes. Misuse aborts: a tile used outside of with_tiles, or read before anything was put into it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pyllm {

inline bool request_tiles() { return true; }

struct TileModel {
  bool configured = false;
  bool defined[8] = {};
  uint32_t words[8][16][16];

  static TileModel& of_thread() {
    static thread_local TileModel model;
    return model;
  }

  void expect(bool condition, const char* what) const {
    if (condition) return;
    std::fprintf(stderr, "AMX model: %s\n", what);
    std::abort();
  }

  // A tile that is read, or one that is overwritten.
  auto& read(int tile) {
    expect(configured && defined[tile], "a tile is read that holds nothing");
    return words[tile];
  }
  auto& overwrite(int tile) {
    expect(configured, "a tile is written before the tiles are set up");
    defined[tile] = true;
    return words[tile];
  }
};

template <class Body>
void with_tiles(Body&& body) {
  TileModel& model = TileModel::of_thread();
  model.expect(!model.configured, "tiles are set up twice");
  model = TileModel{};
  model.configured = true;
  body();
  model.configured = false;
}

template <int tile>
void tile_zero() {
  std::memset(TileModel::of_thread().overwrite(tile), 0, 16 * 64);
}

template <int tile>
void tile_load(const void* from, int64_t stride) {
  auto& words = TileModel::of_thread().overwrite(tile);
  for (int row = 0; row < 16; ++row) std::memcpy(words[row], static_cast<const char*>(from) + row * stride, 64);
}

template <int tile>
void tile_store(void* to, int64_t stride) {
  const auto& words = TileModel::of_thread().read(tile);
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, words[row], 64);
}

// Subnormal numbers are 0, in operands and in results.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

template <int c, int a, int b>
void tile_dot() {
  TileModel& model = TileModel::of_thread();
  auto& to = model.read(c);
  const auto &left = model.read(a), &right = model.read(b);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float low = as_float(left[m][k] << 16), high = as_float(left[m][k] & 0xFFFF0000u);
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(std::fma(low, as_float(right[k][n] << 16), even[n]));
        odd[n] = flushed(std::fma(high, as_float(right[k][n] & 0xFFFF0000u), odd[n]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float sum = flushed(as_float(to[m][n]) + flushed(even[n] + odd[n]));
      std::memcpy(&to[m][n], &sum, sizeof(sum));
    }
  }
}

}  // namespace pyllm
