// The products that attention is made of, for a block of queries and a tile of keys. Tiles are (keys, kQueryBlock). Two
// classes do the same: one in the compute type, one on pairs of bf16. Include it only from *_kernel.cpp.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/pairs.h"

namespace pyllm::PYLLM_ISA {

// In the compute type.
template <class T>
class PlainProducts {
 public:
  using C = Compute<T>;

  // Of the block: (queries, padded head_dim), and the transpose (head_dim, kQueryBlock).
  struct Operand {
    C *rows, *columns;
  };
  Operand query = {}, dout = {};

  explicit PlainProducts(const Attention& call) : call_(call), width_(padded<C>(call.dim)) {}

  // What the forward needs.
  void load_queries(const Block& block) {
    block_ = block;
    query.columns = scratch<C, 0>(width_ * kQueryBlock);
    const T* from = rows_of(call_.query);
    transpose_rows<C>(block.count, call_.dim, query.columns, [&](int row, int64_t column, int count) {
      return load(from + row * call_.query.row + column, count);
    });
  }

  // What the backward needs, and delta, the sum of dO O for each query.
  void load_rows(const AttentionBackward& args, const Block& block, C* delta) {
    block_ = block;
    const int64_t size = width_ * kQueryBlock;
    C* memory = scratch<C, 0>(6 * size);
    query = load_operand(call_.query, memory);
    dout = load_operand(args.dout, memory + 2 * size);
    const Operand out = load_operand(args.out, memory + 4 * size);
    // Summed in the order of the products dO V, so that errors cancel where a query sees one key.
    for_lanes<C>(block, [&](int i) {
      Vec<C> sum{};
      for (int64_t at = i; at < size; at += kQueryBlock) sum += load(dout.columns + at) * load(out.columns + at);
      store(delta + i, sum);
    });
  }

  // to = alpha rows by', (keys, kQueryBlock)
  void multiply_keys(const Keys& keys, int64_t key, int count, const Operand& by, C alpha, C* to) const {
    multiply_add<false>(count, vectors<C>(block_) * kLanes<C>, call_.dim, at(keys, key), keys.rows.row, by.columns,
                        kQueryBlock, to, kQueryBlock, Update<C>{.set = true, .alpha = alpha});
  }

  // to = keys' tile, or that is added to it: (head_dim, kQueryBlock)
  void sum_over_keys(const Keys& keys, int64_t key, int count, const C* tile, bool set, C* to) const {
    multiply_add<true>(call_.dim, vectors<C>(block_) * kLanes<C>, count, at(keys, key), keys.rows.row, tile,
                       kQueryBlock, to, kQueryBlock, Update<C>{.set = set});
  }

  // to += tile by, (keys, padded head_dim)
  void sum_over_queries(int count, const C* tile, const Operand& by, C* to) const {
    multiply_add<false>(count, width_, block_.count, tile, kQueryBlock, by.rows, width_, to, width_, Update<C>{});
  }

 private:
  const T* rows_of(const Heads& from) const {
    return from.at<const T>(block_.sequence->batch, block_.head, block_.query_row());
  }

  const C* at(const Keys& keys, int64_t key) const {
    return keys.rows.at<const C>(block_.sequence->batch, block_.key_head, block_.key_row(key));
  }

  Operand load_operand(const Heads& from, C* memory) const {
    const Operand to{memory, memory + width_ * kQueryBlock};
    for (int row = 0; row < block_.count; ++row)
      convert_row(rows_of(from) + row * from.row, call_.dim, to.rows + row * width_, width_);
    transpose_rows<C>(block_.count, width_, to.columns,
                      [&](int row, int64_t column, int) { return load(to.rows + row * width_ + column); });
    return to;
  }

  const Attention& call_;
  const int64_t width_;
  Block block_;
};

#if defined(__AVX512BF16__)

// On pairs of bf16, with sums in fp32. Tiles are rounded to bf16 before they are multiplied.
class PairProducts {
 public:
  using C = float;

  // Of the block, as words: pairs of queries (queries / 2, padded head_dim), 0 up to a whole panel of queries; and
  // pairs along head_dim (head_dim / 2, kQueryBlock), 0 up to a whole panel of head_dim.
  struct Operand {
    uint32_t *rows, *columns;
  };
  Operand query = {}, dout = {};

  explicit PairProducts(const Attention& call)
      : call_(call), width_(padded<C>(call.dim)), depth_(whole_panels(call.dim)) {}

  void load_queries(const Block& block) {
    block_ = block;
    query.columns = scratch<uint32_t, 0>(depth_ / 2 * kQueryBlock);
    load_columns(call_.query, query.columns);
  }

  void load_rows(const AttentionBackward& args, const Block& block, C* delta) {
    block_ = block;
    const int64_t size = kQueryBlock / 2 * (depth_ + width_);
    uint32_t* memory = scratch<uint32_t, 0>(2 * size);
    query = load_operand(call_.query, memory);
    dout = load_operand(args.dout, memory + size);
    const BFloat16 *gradients = rows_of(args.dout), *out = rows_of(args.out);
    for (int first = 0; first < kQueryBlock; first += kLanes<C>) {
      Vec<C> products[kLanes<C>] = {};
      for (int r = 0; r < kLanes<C> && first + r < block.count; ++r) {
        for_vectors<C>(call_.dim, [&, row = first + r](int64_t d, int count) {
          products[r] += load(gradients + row * args.dout.row + d, count) * load(out + row * args.out.row + d, count);
        });
      }
      store(delta + first, sums<C>(products));
    }
  }

  void multiply_keys(const Keys& keys, int64_t key, int count, const Operand& by, C alpha, C* to) const {
    const auto* rows = keys.rows.at<const BFloat16>(block_.sequence->batch, block_.key_head, block_.key_row(key));
    multiply_pairs(count, vectors<C>(block_) * kLanes<C>, call_.dim, {rows, keys.rows.row}, by.columns, kQueryBlock, to,
                   kQueryBlock, {.set = true, .alpha = alpha});
  }

  void sum_over_keys(const Keys& keys, int64_t key, int count, const C* tile, bool set, C* to) const {
    uint32_t* pairs = scratch<uint32_t, 1>(kKeyBlock / 2 * kQueryBlock);
    for (int j = 0; j < whole_panels(count); j += 2) {
      const auto row = [&](int k, int i) { return k < count ? load(tile + k * kQueryBlock + i) : Vec<C>{}; };
      for_lanes<C>(block_,
                   [&](int i) { store(pairs + j / 2 * kQueryBlock + i, narrow_pairs(row(j, i), row(j + 1, i))); });
    }
    const int64_t size = width_ * kPanel,
                  panel = block_.key_head * call_.panels + block_.sequence->panel + key / kPanel;
    multiply_pairs(call_.dim, vectors<C>(block_) * kLanes<C>, count, {keys.panels + panel * size, kPanel, size}, pairs,
                   kQueryBlock, to, kQueryBlock, {.set = set});
  }

  void sum_over_queries(int count, const C* tile, const Operand& by, C* to) const {
    BFloat16* rows = scratch<BFloat16, 0>(kKeyBlock * kQueryBlock);
    for (int j = 0; j < count; ++j)
      for (int i = 0; i < block_.count; i += kPanel) narrow_row(tile + j * kQueryBlock + i, rows + j * kQueryBlock + i);
    multiply_pairs(count, width_, block_.count, {rows, kQueryBlock}, by.rows, width_, to, width_, {});
  }

 private:
  const BFloat16* rows_of(const Heads& from) const {
    return from.at<const BFloat16>(block_.sequence->batch, block_.head, block_.query_row());
  }

  void load_columns(const Heads& from, uint32_t* to) const {
    const BFloat16* rows = rows_of(from);
    transpose_rows<float>(block_.count, depth_ / 2, reinterpret_cast<float*>(to), [&](int row, int64_t column, int) {
      return bit_cast<Vec<float>>(load_words(rows + row * from.row + 2 * column, call_.dim - 2 * column));
    });
  }

  Operand load_operand(const Heads& from, uint32_t* memory) const {
    const Operand to{memory, memory + kQueryBlock / 2 * width_};
    load_columns(from, to.columns);
    pair_rows(rows_of(from), from.row, block_.count, call_.dim, width_, to.rows);
    return to;
  }

  const Attention& call_;
  const int64_t width_, depth_;
  Block block_;
};

template <class T>
using Products = std::conditional_t<std::is_same_v<T, BFloat16>, PairProducts, PlainProducts<T>>;

#else

template <class T>
using Products = PlainProducts<T>;

#endif

}  // namespace pyllm::PYLLM_ISA
