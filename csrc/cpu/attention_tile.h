// A tile of attention's scores, transposed: a row a key, a lane a query; scale, softcap, biases, masks and dropout
// applied. Include it only from *_kernel.cpp.
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

// Queries [first, first + count) of a sequence and head, and the keys [begin, end) that some of them may see.
struct Block {
  const Sequence* sequence = nullptr;
  int64_t head = 0, key_head = 0, first = 0, begin = 0, end = 0;
  int count = 0;

  int64_t query_row() const { return sequence->query + first; }
  int64_t key_row(int64_t key) const { return sequence->key + key; }
};

// Which keys of a sequence are to be ignored, or null.
inline const bool* ignored_keys(const Attention& call, const Sequence& sequence) {
  return call.padding == nullptr ? nullptr : call.padding + sequence.batch * call.sk + sequence.key;
}

inline Block make_block(const Attention& call, const Sequence& sequence, int64_t head, int64_t index) {
  Block block{.sequence = &sequence, .head = head, .key_head = head / (call.heads / call.kv_heads)};
  block.first = index * kQueryBlock;
  const int64_t last = block.first + kQueryBlock < sequence.sq ? block.first + kQueryBlock : sequence.sq;
  block.count = static_cast<int>(last - block.first);
  block.begin = call.left < 0 ? 0 : block.first + sequence.shift - call.left;
  block.end = call.right < 0 ? sequence.sk : last + sequence.shift + call.right;
  if (block.begin < 0) block.begin = 0;
  if (block.end > sequence.sk) block.end = sequence.sk;
  if (const bool* ignored = ignored_keys(call, sequence)) {
    while (block.begin < block.end && ignored[block.begin]) ++block.begin;
    while (block.begin < block.end && ignored[block.end - 1]) --block.end;
  }
  block.begin = block.begin / kPhiloxGroup * kPhiloxGroup;
  return block;
}

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

// The mask of a tile as added numbers, transposed; returns whether it leaves anything of the tile.
template <class C>
bool load_mask(const ScoreMask& mask, const Block& block, int64_t key, int keys, C* to) {
  const int64_t offset =
      block.sequence->index * mask.sequence + block.head * mask.head + block.first * mask.row + key * mask.column;
  auto left = Vec<C>{} != Vec<C>{};
  visit_mask_type<C>(mask.data.dtype, [&](auto type) {
    const auto* from = mask.data.as<const decltype(type)>() + offset;
    transpose_rows<C>(block.count, keys, to, [&](int row, int64_t column, int count) {
      Vec<C> added = mask_vector<C>(from + row * mask.row + column * mask.column, mask.column, count);
      for (int i = count; i < kLanes<C>; ++i) added[i] = -kInfinity<C>;
      left |= added != -kInfinity<C>;
      return added;
    });
  });
  for (int i = 0; i < kLanes<C>; ++i)
    if (left[i]) return true;
  return false;
}

// A number for each distance from a tile's keys to its queries. Row j of the tile finds those of its lanes at row(j).
template <class C>
struct ByDistance {
  static constexpr int kSize = kKeyBlock + kQueryBlock;
  alignas(64) C values[kSize];

  C* row(int j) { return values + kKeyBlock - 1 - j; }

  // body(value, distance) for the distances j - i that a tile of `keys` keys has, and a few more
  template <class Body>
  void each(const Block& block, int64_t key, int keys, Body&& body) {
    const int64_t furthest = key + kKeyBlock - 1 - block.first - block.sequence->shift;
    for (int n = kKeyBlock - keys; n < kSize; ++n) body(values[n], furthest - n);
  }
};

// The biases of one sequence and head as a function of the distance.
template <class C>
class BiasOf {
 public:
  BiasOf(const DistanceBiases& biases, int64_t sequence, int64_t head)
      : bias_(biases.bias ? biases.bias.as<C>() + head * biases.distances + biases.distances / 2 : nullptr),
        slope_(biases.slopes ? biases.slopes.as<C>()[sequence * biases.slopes_sequence + head] : 0),
        reach_(biases.reach) {}

  C operator()(int64_t distance) const {
    const C term = -slope_ * static_cast<C>(distance < 0 ? -distance : distance);
    if (bias_ == nullptr) return term;
    return term + bias_[distance < -reach_ ? -reach_ : distance > reach_ ? reach_ : distance];
  }

 private:
  const C* bias_;  // of distance 0
  C slope_;
  int64_t reach_;
};

// What a tile's scores gain by distance: the biases, and -inf outside the band.
template <class C>
void load_biases(const Attention& call, const Block& block, int64_t key, int keys, ByDistance<C>& to) {
  const BiasOf<C> bias(call.biases, block.sequence->index, block.head);
  to.each(block, key, keys, [&](C& term, int64_t distance) {
    const bool outside = (call.left >= 0 && distance < -call.left) || (call.right >= 0 && distance > call.right);
    term = outside ? -kInfinity<C> : bias(distance);
  });
}

// What the masks leave of a tile. Where it may be less than all, weights of 0 have to keep out what keys hold that are
// not seen.
enum class Left { nothing, some, all };

// Scores (keys, kQueryBlock) of the keys from `key` on. With a softcap, `derivatives`, unless null, receives those of
// the capped products by the plain ones. Where nothing is left, the tile is undefined.
template <class Products, class C>
Left make_scores(const Products& products, const Attention& call, const Block& block, int64_t key, int keys, C* scores,
                 C* derivatives) {
  C* added = nullptr;
  if (call.mask.data) {
    added = scratch<C, 7>(kKeyBlock * kQueryBlock);
    if (!load_mask(call.mask, block, key, keys, added)) return Left::nothing;
  }
  const bool capped = call.softcap != 0;
  const C softcap = static_cast<C>(call.softcap);
  products.multiply_keys(call.key, key, keys, products.query,
                         static_cast<C>(capped ? call.scale / call.softcap : call.scale), scores);
  // Whether the band ends among the pairs of key j: queries low to high of the block see it.
  const auto cut = [&](int j) {
    const int64_t same = key + j - block.sequence->shift - block.first;
    const int64_t low = call.right < 0 ? 0 : same - call.right;
    const int64_t high = call.left < 0 ? kQueryBlock : same + call.left;
    return low > 0 || high < block.count - 1;
  };
  const bool biased = static_cast<bool>(call.biases), banded = cut(0) || cut(keys - 1), moved = biased || banded;
  Left left = banded || added != nullptr ? Left::some : Left::all;
  const bool* ignored = ignored_keys(call, *block.sequence);
  if (!capped && !moved && added == nullptr && ignored == nullptr) return left;
  ByDistance<C> biases;
  if (moved) load_biases(call, block, key, keys, biases);
  for (int j = 0; j < keys; ++j) {
    C* row = scores + j * kQueryBlock;
    if (capped) {
      for_lanes<C>(block, [&](int i) {
        const Vec<C> share = tanh(load(row + i));
        store(row + i, share * softcap);
        if (derivatives != nullptr) store(derivatives + j * kQueryBlock + i, C{1} - share * share);
      });
    }
    if (ignored != nullptr && ignored[key + j]) {
      for_lanes<C>(block, [&](int i) { store(row + i, splat(-kInfinity<C>)); });
      left = Left::some;
      continue;
    }
    if (added != nullptr) {
      for_lanes<C>(block, [&](int i) {
        const Vec<C> mask = load(added + j * kQueryBlock + i);
        store(row + i, mask == -kInfinity<C> ? mask : load(row + i) + mask);
      });
    }
    if (biased || cut(j)) {
      for_lanes<C>(block, [&](int i) {
        const Vec<C> bias = load(biases.row(j) + i);
        store(row + i, bias == -kInfinity<C> ? bias : load(row + i) + bias);
      });
    }
  }
  return left;
}

// --- products with weights of a tile, where a weight of 0 lets nothing through, not even NaN ---

// Whether no element of a matrix is infinite or NaN.
template <class T>
bool all_finite(const T* from, int64_t stride, int64_t rows, int64_t columns) {
  using C = Compute<T>;
  Vec<C> zeros[4] = {};
  for (int64_t row = 0; row < rows; ++row)
    for_vectors<C>(columns, [&](int64_t i, int count) { zeros[row % 4] += load(from + row * stride + i, count) * 0; });
  return sum<C>((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])) == 0;
}

// As Products::sum_over_keys.
template <class Products, class C>
void sum_over_keys(const Products& products, const Block& block, int64_t dim, Left left, const Keys& keys, int64_t key,
                   int count, const C* tile, bool set, C* to) {
  using Row = typename Products::KeyRow;
  const Row* rows = keys.rows.at<const Row>(block.sequence->batch, block.key_head, block.key_row(key));
  const int64_t stride = keys.rows.row;
  if (left == Left::all || all_finite(rows, stride, count, dim))
    return products.sum_over_keys(keys, key, count, tile, set, to);
  for (int64_t d = 0; d < dim; ++d) {
    for_lanes<C>(block, [&](int i) {
      Vec<C> sum = set ? Vec<C>{} : load(to + d * kQueryBlock + i);
      for (int j = 0; j < count; ++j)
        sum += weighed<C>(load(tile + j * kQueryBlock + i), splat(load(rows + j * stride + d, 1)[0]));
      store(to + d * kQueryBlock + i, sum);
    });
  }
}

// As Products::sum_over_queries; by: the block's rows of `queries`.
template <class Products, class C>
void sum_over_queries(const Products& products, const Block& block, int64_t dim, Left left, int count, const C* tile,
                      const Heads& queries, const typename Products::Operand& by, C* to) {
  using T = typename Products::Storage;
  const T* rows = queries.at<const T>(block.sequence->batch, block.head, block.query_row());
  if (left == Left::all || all_finite(rows, queries.row, block.count, dim))
    return products.sum_over_queries(count, tile, by, to);
  for (int j = 0; j < count; ++j, to += padded<C>(dim)) {
    for (int row = 0; row < block.count; ++row) {
      const C weight = tile[j * kQueryBlock + row];
      if (weight == 0) continue;
      for_vectors<C>(dim, [&](int64_t d, int lanes) {
        store(to + d, load(to + d, lanes) + load(rows + row * queries.row + d, lanes) * weight, lanes);
      });
    }
  }
}

// Dropout of a tile, without its scale. Lanes are queries, so each Philox call serves eight rows of the tile; its words
// hold the numbers of two neighbouring rows.
template <class C>
class Keep {
 public:
  Keep(const Attention& call, const Block& block, int64_t key, int keys)
      : limit_((call.dropout.threshold << 16) - 1), words_(scratch<uint32_t, 2>(kKeyBlock / 2 * kQueryBlock)) {
    const uint32_t head = static_cast<uint32_t>(block.sequence->index * call.heads + block.head);
    for (int group = 0; group < keys; group += kPhiloxGroup) {
      for (int t = 0; t < 4; t += kPhiloxCalls) {
        for (int row = 0; row < block.count; row += kLanes<uint32_t>) {
          Words words[kPhiloxCalls][4];
          random_words(call.dropout, head, static_cast<uint32_t>(block.first + row), (key + group) / kPhiloxGroup, t,
                       words);
          for (int i = 0; i < 4 * kPhiloxCalls; ++i)
            std::memcpy(words_ + (group / 2 + 4 * (i % 4) + t + i / 4) * kQueryBlock + row, &words[i / 4][i % 4],
                        sizeof(Words));
        }
      }
    }
  }

  // v, of row j and the lanes from i on, where it is kept, else 0
  Vec<C> operator()(Vec<C> v, int j, int i) const {
    using Bits [[gnu::vector_size(4 * kLanes<C>)]] = uint32_t;
    using Chosen [[gnu::vector_size(kVectorBytes)]] = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
    Bits bits;
    std::memcpy(&bits, words_ + j / 2 * kQueryBlock + i, sizeof(bits));
    // The upper halves decide.
    return __builtin_convertvector(bits << (j % 2 == 0 ? 16 : 0) > limit_, Chosen) ? v : Vec<C>{};
  }

 private:
  uint32_t limit_;  // the greatest word that is dropped
  uint32_t* words_;
};

// body(keep) with what drops elements of a tile, if anything does.
template <class C, class Body>
[[gnu::always_inline]] inline void with_dropout(const Attention& call, const Block& block, int64_t key, int keys,
                                                Body&& body) {
  if (call.dropout) {
    body(Keep<C>(call, block, key, keys));
  } else {
    body([](Vec<C> v, int, int) { return v; });
  }
}

}  // namespace pyllm::PYLLM_ISA
