// Attention's products in the compute type, and what is around the passes of attention_passes.h: conversion of keys and
// values, sums of parts.
#include "cpu/attention.h"

#include "cpu/attention_passes.h"

namespace pyllm::PYLLM_ISA {

namespace {

// The products that attention is made of, for a block of queries and a tile of keys. Tiles are (keys, kQueryBlock).
template <class T>
class PlainProducts {
 public:
  using Storage = T;
  using C = Compute<T>;
  using KeyRow = C;

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

template <class T>
void key_gradient(const KeyGradient& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t width = padded<C>(args.dim), size = args.keys * width;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t head = index / args.keys, key = index % args.keys, batch = key / args.sk, row = key % args.sk;
    const C* part = static_cast<const C*>(args.partials) + head * args.parts * 2 * size + key * width;
    sum_parts(part, args.parts, 2 * size, args.dim, static_cast<C>(args.scale), args.dkey.at<T>(batch, head, row));
    sum_parts(part + size, args.parts, 2 * size, args.dim, static_cast<C>(args.value_scale),
              args.dvalue.at<T>(batch, head, row));
  }
}

template <class C>
void bias_gradient(const BiasGradient& args, int64_t head) {
  const int64_t beyond = (args.distances - args.summed) / 2;
  C* to = args.dbias.as<C>() + head * args.distances;
  std::memset(to, 0, args.distances * sizeof(C));
  sum_parts(static_cast<const C*>(args.partials) + head * args.parts * args.summed, args.parts, args.summed,
            args.summed, C{1}, to + beyond);
}

template <class T>
void pack(const PackRows& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % args.rows, head = index / args.rows;
    const T* from = args.from.at<const T>(head / args.heads, head % args.heads, row);
    C* to = static_cast<C*>(args.to) + index * args.dim;
    for_vectors<C>(args.dim, [&](int64_t i, int count) { store(to + i, load(from + i, count), count); });
  }
}

}  // namespace

void attention_fwd(const AttentionForward& args, int64_t begin, int64_t end) {
  visit_dtype(args.call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) forward<PlainProducts<decltype(type)>>(args, task);
  });
}

void attention_bwd(const AttentionBackward& args, int64_t begin, int64_t end) {
  visit_dtype(args.call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) backward<PlainProducts<decltype(type)>>(args, task);
  });
}

void attention_mask_gradient(const MaskGradient& args, int64_t begin, int64_t end) {
  visit_dtype(args.backward.call.query.data.dtype, [&](auto type) {
    for (int64_t task = begin; task < end; ++task) mask_gradient<PlainProducts<decltype(type)>>(args, task);
  });
}

void attention_key_gradient(const KeyGradient& args, int64_t begin, int64_t end) {
  visit_dtype(args.dkey.data.dtype, [&](auto type) { key_gradient<decltype(type)>(args, begin, end); });
}

void attention_bias_gradient(const BiasGradient& args, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head)
    args.dbias.dtype == DType::f64 ? bias_gradient<double>(args, head) : bias_gradient<float>(args, head);
}

void attention_pack(const PackRows& args, int64_t begin, int64_t end) {
  visit_dtype(args.from.data.dtype, [&](auto type) { pack<decltype(type)>(args, begin, end); });
}

}  // namespace pyllm::PYLLM_ISA
