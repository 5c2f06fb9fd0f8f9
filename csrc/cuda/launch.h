// How rows are dealt out to threads: plain arithmetic without a CUDA header, so that it is tested without a GPU.
//
// A team of threads takes a row: a part of a warp or a warp (several rows a block), a block, or a cluster of blocks. It
// reads chunks of 16 bytes, aligned in memory: where a row begins off alignment, its first chunk begins before it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "dtype.h"

namespace pyllm::cuda {

// What is asked of a GPU.
struct Device {
  int processors = 1;   // streaming multiprocessors
  int capability = 80;  // 10 * major + minor
};

inline constexpr int kWarp = 32;
inline constexpr int kSmallBlock = 128;      // threads of a block that takes several rows
inline constexpr int kWalkingThreads = 512;  // of a block that walks along a row
inline constexpr int kFewestLanes = 4;       // of a team
inline constexpr int kLargestCluster = 8;    // that every device with clusters takes
inline constexpr int kHeld = 16;             // elements of a long row in a thread's registers
inline constexpr int64_t kMaxWidth = int64_t{1} << 30;

// What a kernel can take.
struct RowLimits {
  int chunk;     // elements in 16 bytes
  int threads;   // of a block that takes one row
  int resident;  // threads for which a processor is given blocks
};

// How a kernel goes over its rows.
enum class RowWay {
  single,  // one chunk a thread, in registers; any alignment
  held,    // kHeld elements a thread, in registers; whole chunks only
  walked,  // a block walks along the row, twice; any alignment
};

struct RowPlan {
  RowWay way;
  int lanes;    // threads of a team in one block
  int threads;  // of a block
  int cluster;  // blocks of a team
  int64_t blocks;

  int teams_per_block() const { return threads / lanes; }
  int64_t groups() const { return blocks / cluster; }  // of blocks that share rows
};

// A block's teams take rows first ... first + teams - 1, then those `step` further on.
struct RowSteps {
  int64_t first, step;
};

PYLLM_EVERYWHERE inline RowSteps row_steps(int64_t block, int64_t blocks, int cluster, int teams) {
  return {block / cluster * teams, blocks / cluster * teams};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int whole_warps(int64_t threads) { return static_cast<int>(ceil_div(threads, kWarp)) * kWarp; }

// aligned: every row begins at a multiple of 16 bytes and ends at one. same_phase: all rows of a team are to begin
// equally far from one, as sums of columns in registers need.
inline RowPlan plan_rows(int64_t rows, int64_t width, bool aligned, bool same_phase, const RowLimits& limits,
                         const Device& device) {
  const int64_t chunks = ceil_div(width + (aligned ? 0 : limits.chunk - 1), limits.chunk);
  const int64_t held = kHeld / limits.chunk;  // chunks of a thread
  int cluster = 1;
  while (cluster < kLargestCluster && ceil_div(chunks, cluster * held) > limits.threads) cluster *= 2;
  const int64_t lanes = ceil_div(chunks, cluster * held);

  RowPlan plan{.way = RowWay::single, .lanes = 0, .threads = kSmallBlock, .cluster = 1, .blocks = 0};
  if (chunks <= kWarp) {
    plan.lanes = std::max(kFewestLanes, static_cast<int>(std::bit_ceil(static_cast<uint64_t>(chunks))));
  } else if (aligned && lanes <= limits.threads && (cluster == 1 || device.capability >= 90)) {
    plan.way = RowWay::held;
    plan.cluster = cluster;
    plan.lanes = lanes <= kWarp ? kWarp : whole_warps(lanes);
    plan.threads = lanes <= kWarp ? kSmallBlock : plan.lanes;
  } else {
    plan.way = RowWay::walked;
    plan.lanes = plan.threads = std::min(kWalkingThreads, whole_warps(ceil_div(chunks, held)));
  }
  const int64_t resident = std::max(1, device.processors * std::max(1, limits.resident / plan.threads) / plan.cluster);
  int64_t groups = std::min(ceil_div(rows, plan.teams_per_block()), resident);
  if (same_phase && !aligned && plan.teams_per_block() % limits.chunk != 0)
    groups = ceil_div(groups, limits.chunk) * limits.chunk;
  plan.blocks = groups * plan.cluster;
  return plan;
}

}  // namespace pyllm::cuda
