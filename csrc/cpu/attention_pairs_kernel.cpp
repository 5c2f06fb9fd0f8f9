// Attention's products on pairs of bf16, for the passes of attention_passes.h: sums in fp32, tiles of P and dS rounded
// to bf16 before they are multiplied. Every product has A in rows and B as words, pairs along the depth: K and V are
// rows as they are, the block's Q and dO are made words both along head_dim and along the queries, a tile is rounded to
// words along the keys or to rows. Only sums over keys need more: V (in backward, K) transposed, in panels, once for
// each call.
//
// Bytes: as there, with K and V read at half the size, and 4 D bytes a key for the panels. FLOPs: the same.
//
// Measured on one core of an AMD EPYC (Zen 5), (1, 1, 1024, 64), best of 200, other work on the machine. A loop of
// vdpbf16ps on registers and the first-level cache: 521 GFLOP/s, of fp32 FMAs: 260.
// forward 350 GFLOP/s, causal 314, dropout 283; backward 372, causal 340, dropout 333. Three quarters are products.
// AMX: no machine with it was at hand.
#include "cpu/attention.h"

#include "cpu/attention_passes.h"
#include "cpu/pairs.h"

namespace pyllm::PYLLM_ISA {

namespace {

// As PlainProducts.
class PairProducts {
 public:
  using Storage = BFloat16;
  using C = float;
  using KeyRow = BFloat16;

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
    for (int j = 0; j < count; ++j) narrow_row(tile + j * kQueryBlock, block_.count, rows + j * kQueryBlock);
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

// The panels of a sequence and key head: rows of head_dim, a pair of keys a word.
void pack_panels(const PackPanels& args, int64_t task) {
  const int64_t width = padded<float>(args.dim), head = task % args.heads;
  const Sequence& sequence = args.sequences[task / args.heads];
  BFloat16* to = args.to + (head * args.panels + sequence.panel) * width * kPanel;
  uint32_t* pairs = scratch<uint32_t, 0>(kPanel / 2 * width);
  for (int64_t key = 0; key < sequence.sk; key += kPanel, to += width * kPanel) {
    const int64_t keys = sequence.sk - key < kPanel ? sequence.sk - key : kPanel;
    const auto* from = args.from.at<const BFloat16>(sequence.batch, head, sequence.key + key);
    pair_rows(from, args.from.row, keys, args.dim, width, pairs);
    for (int64_t d = 0; d < width; d += kLanes<float>) {
      Vec<float> square[kLanes<float>];
      for (int i = 0; i < kLanes<float>; ++i) square[i] = bit_cast<Vec<float>>(load(pairs + i * width + d));
      transpose<float>(square);
      for (int i = 0; i < kLanes<float>; ++i)
        store(reinterpret_cast<uint32_t*>(to + (d + i) * kPanel), bit_cast<Vec<uint32_t>>(square[i]));
    }
  }
}

}  // namespace

void attention_fwd(const AttentionForward& args, int64_t begin, int64_t end) {
  with_tiles([&] {
    for (int64_t task = begin; task < end; ++task) forward<PairProducts>(args, task);
  });
}

void attention_bwd(const AttentionBackward& args, int64_t begin, int64_t end) {
  with_tiles([&] {
    for (int64_t task = begin; task < end; ++task) backward<PairProducts>(args, task);
  });
}

void attention_mask_gradient(const MaskGradient& args, int64_t begin, int64_t end) {
  with_tiles([&] {
    for (int64_t task = begin; task < end; ++task) mask_gradient<PairProducts>(args, task);
  });
}

void attention_pack_panels(const PackPanels& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) pack_panels(args, task);
}

}  // namespace pyllm::PYLLM_ISA
