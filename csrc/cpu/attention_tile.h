// A tile of attention's scores, transposed: a row a key, a lane a query; scale, masks and dropout applied. Include it
// only from *_kernel.cpp.
#pragma once

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

template <class C>
int64_t padded(int64_t dim) {
  constexpr int64_t unit = kRowBytes / sizeof(C);
  return (dim + unit - 1) / unit * unit;
}

// Queries [first, first + count) of a head and the keys [begin, end) that some of them may see.
struct Block {
  int64_t batch = 0, head = 0, key_head = 0, first = 0, begin = 0, end = 0;
  int count = 0;
};

inline Block make_block(const Attention& call, int64_t batch, int64_t head, int64_t index) {
  Block block{.batch = batch, .head = head, .key_head = head / (call.heads / call.kv_heads)};
  block.first = index * kQueryBlock;
  const int64_t last = block.first + kQueryBlock < call.sq ? block.first + kQueryBlock : call.sq;
  block.count = static_cast<int>(last - block.first);
  block.begin = call.left < 0 ? 0 : block.first + call.shift - call.left;
  block.end = call.right < 0 ? call.sk : last + call.shift + call.right;
  if (block.begin < 0) block.begin = 0;
  if (block.end > call.sk) block.end = call.sk;
  if (call.padding != nullptr) {
    const bool* ignored = call.padding + batch * call.sk;
    while (block.begin < block.end && ignored[block.begin]) ++block.begin;
    while (block.begin < block.end && ignored[block.end - 1]) --block.end;
  }
  block.begin = block.begin / kPhiloxGroup * kPhiloxGroup;
  return block;
}

// Blocks in an order in which every run of them has its share of long and short rows of keys.
inline int64_t balanced(int64_t index, int64_t blocks) { return index % 2 == 0 ? index / 2 : blocks - 1 - index / 2; }

// Vectors that hold the queries of a block.
template <class C>
int vectors(const Block& block) {
  return (block.count + kLanes<C> - 1) / kLanes<C>;
}

// body(offset) for the offset of each vector of a tile's row
template <class C, class Body>
[[gnu::always_inline]] inline void for_lanes(const Block& block, Body&& body) {
  for (int v = 0; v < vectors<C>(block); ++v) body(v * kLanes<C>);
}

// to[column][row] = row_vector(row, column, count)[lane]; rows beyond `rows`, up to a whole vector, give 0
template <class C, class Load>
void transpose_rows(int rows, int64_t columns, C* to, Load&& row_vector) {
  constexpr int lanes = kLanes<C>;
  for (int64_t column = 0; column < columns; column += lanes) {
    const int count = columns - column < lanes ? static_cast<int>(columns - column) : lanes;
    for (int row = 0; row < rows; row += lanes) {
      Vec<C> square[lanes];
      for (int r = 0; r < lanes; ++r) square[r] = row + r < rows ? row_vector(row + r, column, count) : Vec<C>{};
      transpose<C>(square);
      for (int i = 0; i < count; ++i) store(to + (column + i) * kQueryBlock + row, square[i]);
    }
  }
}

// A row in the compute type, padded with zeros to `width`.
template <class T, class C>
void convert_row(const T* from, int64_t dim, C* to, int64_t width) {
  for_vectors<C>(dim, [&](int64_t i, int count) { store(to + i, load(from + i, count)); });
  for (int64_t i = dim; i < width; ++i) to[i] = 0;
}

// --- scores ---

// `count` elements of a mask's row as added numbers; stride 0: the same one `count` times.
template <class C, class M>
Vec<C> mask_vector(const M* from, int64_t stride, int count) {
  constexpr int lanes = kLanes<C>;
  M values[lanes] = {};
  if (stride != 0) {
    std::memcpy(values, from, count * sizeof(M));
  } else {
    for (int i = 0; i < count; ++i) values[i] = *from;
  }
  if constexpr (std::is_same_v<M, uint8_t>) {
    Vec<C> added;
    for (int i = 0; i < lanes; ++i) added[i] = values[i] ? 0 : -kInfinity<C>;
    return added;
  } else if constexpr (std::is_same_v<Compute<M>, C>) {
    return load(values);
  } else {  // a float mask on double scores
    Vec<C> added;
    for (int i = 0; i < lanes; ++i) added[i] = static_cast<C>(values[i]);
    return added;
  }
}

// Calls body(M{}) with the mask's storage type, of those that the scores' compute type C admits.
template <class C, class Body>
void visit_mask_type(DType dtype, Body&& body) {
  if (dtype == DType::boolean) return body(uint8_t{});
  visit_dtype(dtype, [&](auto type) {
    using M = decltype(type);
    if constexpr (std::is_same_v<Compute<M>, C> || std::is_same_v<M, float>) body(type);
  });
}

// The mask of a tile as added numbers, transposed.
template <class C>
void load_mask(const ScoreMask& mask, const Block& block, int64_t key, int keys, C* to) {
  const int64_t offset = block.batch * mask.batch + block.head * mask.head + block.first * mask.row + key * mask.column;
  visit_mask_type<C>(mask.data.dtype, [&](auto type) {
    const auto* from = mask.data.as<const decltype(type)>() + offset;
    transpose_rows<C>(block.count, keys, to, [&](int row, int64_t column, int count) {
      return mask_vector<C>(from + row * mask.row + column * mask.column, mask.column, count);
    });
  });
}

// Scores (keys, kQueryBlock) of the keys from `key` on; query_t holds the queries transposed.
template <class C>
void make_scores(const Attention& call, const Block& block, int64_t key, int keys, const C* query_t, C* scores) {
  multiply_add<false>(keys, vectors<C>(block) * kLanes<C>, call.dim,
                      call.key.at<const C>(block.batch, block.key_head, key), call.key.row, query_t, kQueryBlock,
                      scores, kQueryBlock, Update<C>{.set = true, .alpha = static_cast<C>(call.scale)});
  const bool* ignored = call.padding == nullptr ? nullptr : call.padding + block.batch * call.sk + key;
  C* added = nullptr;
  if (call.mask.data) {
    added = scratch<C, 7>(kKeyBlock * kQueryBlock);
    load_mask(call.mask, block, key, keys, added);
  }
  Vec<C> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = static_cast<C>(i);
  for (int j = 0; j < keys; ++j) {
    C* row = scores + j * kQueryBlock;
    if (ignored != nullptr && ignored[j]) {
      for_lanes<C>(block, [&](int i) { store(row + i, splat(-kInfinity<C>)); });
      continue;
    }
    if (added != nullptr) {
      for_lanes<C>(block, [&](int i) { store(row + i, load(row + i) + load(added + j * kQueryBlock + i)); });
    }
    // Queries low to high of the block see this key.
    const int64_t same = key + j - call.shift - block.first;
    const int64_t low = call.right < 0 ? 0 : same - call.right;
    const int64_t high = call.left < 0 ? kQueryBlock : same + call.left;
    if (low > 0 || high < block.count - 1) {
      const C first = static_cast<C>(low), last = static_cast<C>(high);
      for_lanes<C>(block, [&](int i) {
        const Vec<C> query = lane + static_cast<C>(i);
        Vec<C> score = load(row + i);
        score = query < first ? splat(-kInfinity<C>) : score;
        store(row + i, query > last ? splat(-kInfinity<C>) : score);
      });
    }
  }
}

// Dropout's factors of a tile. Lanes are queries, so each Philox call serves eight rows of the tile.
template <class C>
C* keep_factors(const Attention& call, const Block& block, int64_t key, int keys) {
  C* factors = scratch<C, 6>(kKeyBlock * kQueryBlock);
  const uint32_t head = static_cast<uint32_t>(block.batch * call.heads + block.head);
  const C scale = static_cast<C>(call.dropout.scale);
  for (int group = 0; group < keys; group += kPhiloxGroup) {
    for (int t = 0; t < 4; ++t) {
      for (int row = 0; row < block.count; row += kLanes<uint32_t>) {
        Words words[4];
        random_words(call.dropout, head, static_cast<uint32_t>(block.first + row), (key + group) / kPhiloxGroup, t,
                     words);
        for (int i = 0; i < 8; ++i) {
          const int j = group + 8 * (i / 2) + 2 * t + i % 2;
          const auto kept = ((words[i / 2] >> (16 * (i % 2))) & 0xFFFF) >= call.dropout.threshold;
          C* to = factors + j * kQueryBlock + row;
          if constexpr (sizeof(C) == 4) {
            store(to, kept ? splat(scale) : Vec<C>{});
          } else {
            for (int lane = 0; lane < kLanes<uint32_t>; ++lane) to[lane] = kept[lane] ? scale : 0;
          }
        }
      }
    }
  }
  return factors;
}

}  // namespace pyllm::PYLLM_ISA
