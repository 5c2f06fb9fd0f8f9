// How decoding's queries and keys are dealt out: plain arithmetic without a CUDA header, so that it is tested without a
// GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace pyllm::cuda {

inline constexpr int kDecodeWarps = 4;   // of a block
inline constexpr int kLeastShare = 256;  // keys, where the cache is full
inline constexpr int kMostShares = 128;
inline constexpr int kMostDecodeRows = 8;  // queries of a block
inline constexpr int kPageUnit = 16;       // keys; the size of a page is a multiple

// How a warp lies over its keys: groups of `lanes` read a key's row each, 16 bytes a lane at a time.
struct DecodeTile {
  int lanes, chunks;  // of 16 bytes, for each lane
  int groups, each;   // groups of a warp; keys of a group in one go
  int keys;           // of all groups: they divide kPageUnit, and so lie in one page
};

// rows: queries at once. More of them leave registers for fewer keys.
constexpr DecodeTile decode_tile(int head_dim, int element_bytes, int rows) {
  const int pieces = head_dim * element_bytes / 16;
  const int lanes = std::min(kWarp, static_cast<int>(std::bit_ceil(static_cast<unsigned>(pieces))));
  const int groups = kWarp / lanes, each = std::min(rows > 4 ? 4 : 8, kPageUnit / groups);
  return {lanes, (pieces + lanes - 1) / lanes, groups, each, groups * each};
}

// Bytes of shared memory of a block: its warps' sums, their peaks and totals, and facts of its rows.
constexpr int decode_shared_bytes(int head_dim, int rows) {
  return (kDecodeWarps * rows * (head_dim + 2) + 3 * rows) * static_cast<int>(sizeof(float));
}

// The queries that share a key head are dealt out in `tiles` of `rows`, a sequence's keys in `shares`; a block takes a
// tile and a share.
struct DecodePlan {
  int rows, tiles, shares;
};

// teams: blocks without shares. slots: blocks that run at once. keys: the most that a sequence has to read. The fewest
// shares that fill the machine, round by round, nearly as well as any number.
inline int plan_shares(int64_t teams, int64_t slots, int64_t keys) {
  const auto filled = [&](int64_t shares) {
    return static_cast<double>(teams * shares) / static_cast<double>(ceil_div(teams * shares, slots) * slots);
  };
  const int64_t most = std::clamp<int64_t>(keys / kLeastShare, 1, kMostShares);
  double best = 0;
  for (int64_t shares = 1; shares <= most; ++shares) best = std::max(best, filled(shares));
  int shares = 1;
  while (filled(shares) < 0.85 * best) ++shares;
  return shares;
}

// group: heads that share a key head. capacity: keys that a sequence may have; the lengths stay on the device.
inline DecodePlan plan_decode(int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t capacity,
                              int64_t left, const Device& device) {
  const int rows = group * queries <= 1 ? 1 : group * queries <= 4 ? 4 : kMostDecodeRows;
  const int64_t tiles = ceil_div(group * queries, rows);
  const int64_t resident = rows == 1 ? 4 : 2;  // blocks of a processor, as their registers allow
  const int64_t keys = left < 0 ? capacity : std::min(capacity, left + queries + kPageUnit);
  return {rows, static_cast<int>(tiles), plan_shares(batch * kv_heads * tiles, resident * device.processors, keys)};
}

struct KeyRange {
  int begin, end;
};

// What is to be read of `total` keys whose last `queries` are the queries' own places: from a whole kPageUnit on.
PYLLM_EVERYWHERE inline KeyRange keys_in_window(int total, int queries, int64_t left) {
  const int64_t first = left < 0 ? 0 : total - queries - left;
  return {first > 0 ? static_cast<int>(first / kPageUnit * kPageUnit) : 0, total};
}

// The share of a range, in whole `unit`s; it may be empty.
PYLLM_EVERYWHERE inline KeyRange share_of_keys(const KeyRange& keys, int share, int shares, int unit) {
  const int units = (keys.end - keys.begin + unit - 1) / unit;
  const int width = (units + shares - 1) / shares * unit;
  const int64_t begin = keys.begin + int64_t{share} * width, end = begin + width;
  return {static_cast<int>(begin < keys.end ? begin : keys.end), static_cast<int>(end < keys.end ? end : keys.end)};
}

}  // namespace pyllm::cuda
