// Attention with online softmax (Dao et al., 2022), in tiles of kQueryBlock queries by kKeyBlock keys that stay in the
// second-level cache. Tiles hold the scores transposed, a row a key and a lane a query: then K and V are read where
// they are, no reduction crosses lanes, and only Q (and dO) are transposed, once for each block.
//
// Forward, a task for each block of queries of a sequence: S' = K Q', softmax down the columns, O = O * rescale + P V.
// Backward, a task for each key head of a sequence (or part of its queries): S' = K Q', dP' = V dO', dV += P' dO,
// dK += dS' Q, dQ = dS K, with P recomputed from the log-sum-exp. dQ is complete after a block; dK, dV and the sums of
// dS along diagonals, which are the gradient of the bias by distance, go to the task's own buffer, so nothing is shared
// and no sum depends on timing.
// The gradient of a mask recomputes dS, a task for each tile of the mask, and sums it over what was broadcast.
// Tiles that the band or the mask empties are skipped.
//
// Bytes: Q, O, dO, dQ once; K and V once for each block of queries, from cache where a head's fit. FLOPs for each pair
// inside the band: 4 D forward, 10 D backward, 4 D more for the gradient of a mask.
//
// Measured on one of 2 cores of an AMD EPYC (Zen 4), fp32, best of 12, other work on the machine; torch.mm: 85 GFLOP/s.
// (B, H, S, D)                    AVX-512, GFLOP/s   PyTorch's fused kernel beside it
// (2, 12, 1024, 64)   forward     85, causal 79      79, causal 54
//                     backward    93, causal 82      75, causal 51
// (1, 8, 2048, 128)   forward     94, causal 89      85, causal 67
//                     backward    94, causal 89      83, causal 66
// T5's bias or ALiBi: 2 % less, with the bias's gradient 3 %; a softcap: 15 % forward, 10 % backward.
// AVX2 there: 74 forward and 77 backward at (2, 12, 1024, 64); portable: 25 and 28.
#pragma once

#include "cpu/attention_tile.h"

namespace pyllm::PYLLM_ISA {

// The sum of term(0) to term(count - 1): of runs first, since the error of one long chain would show in a whole row.
template <class C, class Term>
[[gnu::always_inline]] inline Vec<C> sum_of_runs(int count, Term&& term) {
  constexpr int run = 16;
  Vec<C> total{};
  for (int start = 0; start < count; start += run) {
    Vec<C> part{};
    for (int j = start; j < (start + run < count ? start + run : count); ++j) part += term(j);
    total += part;
  }
  return total;
}

// Where a block's statistics begin in (B, H, Sq).
inline int64_t statistics_index(const Attention& call, const Block& block) {
  return (block.sequence->batch * call.heads + block.head) * call.sq + block.query_row();
}

// `count` lanes in a dtype of `visit_mask_type`.
template <class C, class M>
void store_lanes(M* to, Vec<C> v, int count) {
  if constexpr (std::is_same_v<Compute<M>, C> && !std::is_same_v<M, uint8_t>) {
    store(to, v, count);
  } else {
    for (int i = 0; i < count; ++i) to[i] = static_cast<M>(v[i]);
  }
}

// Stores a tile (columns, kQueryBlock) as the matrix (rows, columns) of the dtype that it transposes to.
template <class C>
void store_transposed(const C* tile, int rows, int columns, DType dtype, void* data, int64_t offset, int64_t stride) {
  constexpr int lanes = kLanes<C>;
  visit_mask_type<C>(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(data) + offset;
    for (int column = 0; column < columns; column += lanes) {
      const int count = columns - column < lanes ? columns - column : lanes;
      for (int row = 0; row < rows; row += lanes) {
        Vec<C> square[lanes];
        for (int i = 0; i < lanes; ++i)
          square[i] = i < count ? load(tile + (column + i) * kQueryBlock + row) : Vec<C>{};
        transpose<C>(square);
        for (int r = 0; r < lanes && row + r < rows; ++r)
          store_lanes<C>(to + (row + r) * stride + column, square[r], count);
      }
    }
  });
}

// --- forward ---

// What the lanes of a block carry from one tile of keys to the next.
template <class C>
struct Softmax {
  alignas(64) C peak[kQueryBlock], total[kQueryBlock] = {}, rescale[kQueryBlock];
  Softmax() {
    for (C& lane : peak) lane = -kInfinity<C>;
  }
};

// Scores become keep(exp(score - peak)); the sums, of all exponentials, and the factor that earlier results need are
// brought up to date.
template <class C, class Keep>
void exponentiate(const Block& block, int keys, C* scores, Softmax<C>& softmax, Keep keep) {
  for_lanes<C>(block, [&](int i) {
    const Vec<C> before = load(softmax.peak + i);
    Vec<C> peaks[4] = {before, before, before, before};
    int next = 0;
    for (; next + 4 <= keys; next += 4)
      for (int k = 0; k < 4; ++k) peaks[k] = max<C>(load(scores + (next + k) * kQueryBlock + i), peaks[k]);
    for (; next < keys; ++next) peaks[0] = max<C>(load(scores + next * kQueryBlock + i), peaks[0]);
    const Vec<C> peak = max<C>(max<C>(peaks[0], peaks[1]), max<C>(peaks[2], peaks[3]));
    const Vec<C> shift = peak == -kInfinity<C> ? Vec<C>{} : peak;  // nothing seen yet: every exponential is 0
    const Vec<C> total = sum_of_runs<C>(keys, [&](int j) {
      C* score = scores + j * kQueryBlock + i;
      const Vec<C> e = exp(load(score) - shift);
      store(score, keep(e, j, i));
      return e;
    });
    const Vec<C> rescale = exp(before - shift);
    store(softmax.rescale + i, rescale);
    store(softmax.total + i, load(softmax.total + i) * rescale + total);
    store(softmax.peak + i, peak);
  });
}

template <class Products>
void forward(const AttentionForward& args, int64_t task) {
  using T = typename Products::Storage;
  using C = typename Products::C;
  const Attention& call = args.call;
  const QueryBlock& queries = args.blocks[task % args.block_count];
  const Block block = make_block(call, *queries.sequence, task / args.block_count, queries.index);
  C* scores = scratch<C, 1>(kKeyBlock * kQueryBlock);
  C* out = scratch<C, 2>(padded<C>(call.dim) * kQueryBlock);
  Products products(call);
  products.load_queries(block);
  Softmax<C> softmax;
  bool begun = false;
  for (int64_t key = block.begin; key < block.end; key += kKeyBlock) {
    const int keys = block.end - key < kKeyBlock ? static_cast<int>(block.end - key) : kKeyBlock;
    const Left left = make_scores(products, call, block, key, keys, scores, static_cast<C*>(nullptr));
    if (left == Left::nothing) continue;
    with_dropout<C>(call, block, key, keys, [&](auto keep) { exponentiate(block, keys, scores, softmax, keep); });
    if (begun) {
      for_lanes<C>(block, [&](int i) {
        const Vec<C> rescale = load(softmax.rescale + i);
        for (int64_t d = 0; d < call.dim; ++d)
          store(out + d * kQueryBlock + i, load(out + d * kQueryBlock + i) * rescale);
      });
    }
    sum_over_keys(products, block, call.dim, left, call.value, key, keys, scores, !begun, out);
    begun = true;
  }
  C* lse = static_cast<C*>(args.lse) + statistics_index(call, block);
  for (int row = 0; row < block.count; ++row)
    lse[row] = softmax.total[row] == 0 ? -kInfinity<C> : softmax.peak[row] + std::log(softmax.total[row]);
  const C scale = static_cast<C>(call.dropout.scale);
  for_lanes<C>(block, [&](int i) {
    const Vec<C> total = load(softmax.total + i), factor = scale / total;
    for (int64_t d = 0; d < call.dim; ++d) {
      C* sum = out + d * kQueryBlock + i;
      store(sum, total == 0 ? Vec<C>{} : load(sum) * factor);  // a NaN is no empty row
    }
  });
  T* to = args.out.at<T>(block.sequence->batch, block.head, block.query_row());
  store_transposed(out, block.count, call.dim, args.out.data.dtype, to, 0, args.out.row);
}

// --- backward ---

// What the lanes of a block need.
template <class C>
struct Rows {
  alignas(64) C delta[kQueryBlock], dlse[kQueryBlock];
  alignas(64) C lse[kQueryBlock];   // an empty query's lse is infinity, so that exp(s - lse) is 0
  alignas(64) C rest[kQueryBlock];  // what rounding took from lse
};

// Beyond it lse has lost too much of the sum to its maximum: a mask adds a large number to every key.
constexpr int kFarFromZero = 1024;

// Takes lse apart, into a row's maximum and the logarithm of its sum, where it is far from 0.
template <class Products, class C>
void refine(const Products& products, const Attention& call, const Block& block, Rows<C>& rows) {
  bool far[kQueryBlock], any = false;
  for (int row = 0; row < block.count; ++row) {
    const C size = std::abs(rows.lse[row]);
    any |= far[row] = size > kFarFromZero && size < kInfinity<C>;
  }
  if (!any) return;
  C* scores = scratch<C, 1>(kKeyBlock * kQueryBlock);
  Softmax<C> softmax;
  for (int64_t key = block.begin; key < block.end; key += kKeyBlock) {
    const int keys = block.end - key < kKeyBlock ? static_cast<int>(block.end - key) : kKeyBlock;
    if (make_scores(products, call, block, key, keys, scores, static_cast<C*>(nullptr)) == Left::nothing) continue;
    exponentiate(block, keys, scores, softmax, [](Vec<C> e, int, int) { return e; });
  }
  for (int row = 0; row < block.count; ++row) {
    if (!far[row]) continue;
    rows.lse[row] = softmax.peak[row];
    rows.rest[row] = std::log(softmax.total[row]);
  }
}

// whole: whether each query's keys come in one tile, which needs no lse.
template <class Products, class C>
void load_block(const AttentionBackward& args, const Block& block, bool whole, Products& products, Rows<C>& rows) {
  products.load_rows(args, block, rows.delta);
  const int64_t index = statistics_index(args.call, block);
  for (int row = 0; row < kQueryBlock; ++row) {
    const C lse = row < block.count ? static_cast<const C*>(args.lse)[index + row] : -kInfinity<C>;
    const bool empty = lse == -kInfinity<C>;
    rows.lse[row] = empty ? kInfinity<C> : lse;
    rows.rest[row] = 0;
    rows.dlse[row] = empty || args.dlse == nullptr ? 0 : static_cast<const C*>(args.dlse)[index + row];
    if (empty) rows.delta[row] = 0;
  }
  if (!whole) refine(products, args.call, block, rows);
}

// The tile's P (with dropout, but not its scale) and dS, transposed, and what `make_scores` makes and returns.
template <class Products, class C>
Left score_gradients(const Products& products, const Attention& call, const Block& block, const Rows<C>& rows,
                     int64_t key, int keys, C* p, C* ds, C* derivatives) {
  const Left left = make_scores(products, call, block, key, keys, p, derivatives);
  if (left == Left::nothing) return left;
  products.multiply_keys(call.value, key, keys, products.dout, static_cast<C>(call.dropout.scale), ds);
  // The rounding of lse and of out moves a whole row; where all of the row is here, its own sums are used instead.
  const bool whole = key == block.begin && key + keys == block.end;
  const Vec<C> none = splat(left == Left::all ? C{-1} : C{0});  // the weight of what is not seen; where all is, of none
  Softmax<C> softmax;
  if (whole) exponentiate(block, keys, p, softmax, [](Vec<C> e, int, int) { return e; });
  with_dropout<C>(call, block, key, keys, [&](auto keep) {
    for_lanes<C>(block, [&](int i) {
      const auto at = [=](C* tile, int j) { return tile + j * kQueryBlock + i; };
      const Vec<C> dlse = load(rows.dlse + i);
      const auto finish = [&](int j, Vec<C> weight, Vec<C> delta) {
        store(at(p, j), keep(weight, j, i));
        store(at(ds, j), weighed<C>(weight, (keep(load(at(ds, j)), j, i) - delta) + dlse, none));
      };
      if (whole) {
        const Vec<C> sum = load(softmax.total + i), total = sum == 0 ? splat(C{1}) : sum;
        const Vec<C> delta =
            sum_of_runs<C>(keys, [&](int j) { return weighed<C>(load(at(p, j)), keep(load(at(ds, j)), j, i), none); }) /
            total;
        for (int j = 0; j < keys; ++j) finish(j, load(at(p, j)) / total, delta);
      } else {
        const Vec<C> lse = load(rows.lse + i), rest = load(rows.rest + i), delta = load(rows.delta + i);
        for (int j = 0; j < keys; ++j) finish(j, exp((load(at(p, j)) - lse) - rest), delta);
      }
    });
  });
  return left;
}

// Adds the sums of dS by distance to `totals`, (2 * reach + 1).
template <class C>
void sum_by_distance(const Attention& call, const Block& block, int64_t key, int keys, const C* ds, C* totals) {
  ByDistance<C> sums{};
  // Rows that are added to the same numbers are far apart in time, so that no load waits for a store.
  for (int first = 0; first < kQueryBlock; ++first) {
    for (int j = first; j < keys; j += kQueryBlock) {
      C* to = sums.row(j);
      for_lanes<C>(block, [&](int i) { store(to + i, load(to + i) + load(ds + j * kQueryBlock + i)); });
    }
  }
  const int64_t reach = call.biases.reach;
  C below = 0, above = 0;
  sums.each(block, key, keys, [&](C sum, int64_t distance) {
    if (distance <= -reach) {
      below += sum;
    } else if (distance >= reach) {
      above += sum;
    } else {
      totals[distance + reach] += sum;
    }
  });
  totals[0] += below;
  totals[2 * reach] += above;
}

// to[i] = scale * the sum over the parts of from[part * stride + i], for i below n
template <class C, class T>
void sum_parts(const C* from, int64_t parts, int64_t stride, int64_t n, C scale, T* to) {
  for_vectors<C>(n, [&](int64_t i, int count) {
    Vec<C> total{};
    for (int64_t part = 0; part < parts; ++part) total += load(from + part * stride + i, count);
    store(to + i, total * scale, count);
  });
}

template <class Products>
void backward(const AttentionBackward& args, int64_t task) {
  using T = typename Products::Storage;
  using C = typename Products::C;
  const Attention& call = args.call;
  const int64_t width = padded<C>(call.dim), group = call.heads / call.kv_heads;
  const int64_t part = task % args.parts, key_head = task / args.parts % call.kv_heads;
  const Sequence& sequence = call.sequences[task / args.parts / call.kv_heads];
  const int64_t blocks = blocks_of(sequence.sq), keys_of_all = call.batches * call.sk;
  C *dkey, *dvalue;
  if (args.partials == nullptr) {
    dkey = scratch<C, 5>(2 * sequence.sk * width);
    dvalue = dkey + sequence.sk * width;
  } else {
    dkey = static_cast<C*>(args.partials) +
           ((key_head * args.parts + part) * 2 * keys_of_all + sequence.batch * call.sk + sequence.key) * width;
    dvalue = dkey + keys_of_all * width;
  }
  std::memset(dkey, 0, sequence.sk * width * sizeof(C));
  std::memset(dvalue, 0, sequence.sk * width * sizeof(C));
  const int64_t distances = 2 * call.biases.reach + 1;
  const auto bias_sums = [&](int64_t head) {
    return static_cast<C*>(args.bias_partials) + ((head * call.count + sequence.index) * args.parts + part) * distances;
  };
  if (args.bias_partials != nullptr) {
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
      std::memset(bias_sums(head), 0, distances * sizeof(C));
  }
  C* p = scratch<C, 1>(kKeyBlock * kQueryBlock);
  C* ds = scratch<C, 2>(kKeyBlock * kQueryBlock);
  C* dquery = scratch<C, 3>(width * kQueryBlock);
  C* derivatives = call.softcap != 0 ? scratch<C, 4>(kKeyBlock * kQueryBlock) : nullptr;
  Rows<C> rows;
  Products products(call);
  for (int64_t item = part; item < group * blocks; item += args.parts) {
    const Block block = make_block(call, sequence, key_head * group + item / blocks, item % blocks);
    load_block(args, block, block.end - block.begin <= kKeyBlock, products, rows);
    std::memset(dquery, 0, width * kQueryBlock * sizeof(C));
    for (int64_t key = block.begin; key < block.end; key += kKeyBlock) {
      const int keys = block.end - key < kKeyBlock ? static_cast<int>(block.end - key) : kKeyBlock;
      const Left left = score_gradients(products, call, block, rows, key, keys, p, ds, derivatives);
      if (left == Left::nothing) continue;
      if (args.bias_partials != nullptr) sum_by_distance(call, block, key, keys, ds, bias_sums(block.head));
      if (const ScoreMask& to = args.dmask; to.data) {
        const int64_t offset = sequence.index * to.sequence + block.head * to.head + block.first * to.row + key;
        store_transposed(ds, block.count, keys, to.data.dtype, to.data.data, offset, to.row);
      }
      if (derivatives != nullptr) {
        for (int j = 0; j < keys; ++j) {
          for_lanes<C>(block, [&, at = j * kQueryBlock](int i) {
            store(ds + at + i, weighed<C>(load(ds + at + i), load(derivatives + at + i)));
          });
        }
      }
      sum_over_queries(products, block, call.dim, left, keys, p, args.dout, products.dout, dvalue + key * width);
      sum_over_queries(products, block, call.dim, left, keys, ds, call.query, products.query, dkey + key * width);
      sum_over_keys(products, block, call.dim, left, call.key, key, keys, ds, false, dquery);
    }
    for (int64_t i = 0; i < width * kQueryBlock; i += kLanes<C>)
      store(dquery + i, load(dquery + i) * static_cast<C>(call.scale));
    T* to = args.dquery.at<T>(sequence.batch, block.head, block.query_row());
    store_transposed(dquery, block.count, call.dim, args.dquery.data.dtype, to, 0, args.dquery.row);
  }
  if (args.partials != nullptr) return;
  for (int64_t key = 0; key < sequence.sk; ++key) {
    const auto write = [&](const Heads& to, const C* from, double scale) {
      sum_parts(from + key * width, 1, 0, call.dim, static_cast<C>(scale),
                to.at<T>(sequence.batch, key_head, sequence.key + key));
    };
    write(args.dkey, dkey, call.scale);
    write(args.dvalue, dvalue, call.dropout.scale);
  }
}

// dS summed over what the mask was broadcast to, for one tile of the mask.
template <class Products>
void mask_gradient(const MaskGradient& args, int64_t task) {
  using C = typename Products::C;
  const Attention& call = args.backward.call;
  const int64_t column_block = task % args.column_blocks(), row_block = task / args.column_blocks() % args.row_blocks();
  const int64_t head = task / args.column_blocks() / args.row_blocks();
  const int64_t mask_sequence = head / args.heads, mask_head = head % args.heads;
  const int64_t column_begin = column_block * kKeyBlock;
  C* p = scratch<C, 1>(kKeyBlock * kQueryBlock);
  C* ds = scratch<C, 2>(kKeyBlock * kQueryBlock);
  C* sums = scratch<C, 3>(kKeyBlock * kQueryBlock);
  std::memset(sums, 0, kKeyBlock * kQueryBlock * sizeof(C));
  Rows<C> rows;
  Products products(call);
  const auto each = [](int64_t own, int64_t size, int64_t full, auto&& body) {
    for (int64_t i = size == 1 ? 0 : own; i < full && (size == 1 || i == own); ++i) body(i);
  };
  each(mask_sequence, args.sequences, call.count, [&](int64_t s) {
    const Sequence& sequence = call.sequences[s];
    // Keys of this tile of the mask: all where its columns are broadcast.
    const int64_t column_end =
        args.columns == 1 || column_begin + kKeyBlock > sequence.sk ? sequence.sk : column_begin + kKeyBlock;
    each(mask_head, args.heads, call.heads, [&](int64_t h) {
      each(row_block, args.rows, blocks_of(sequence.sq), [&](int64_t index) {
        const Block block = make_block(call, sequence, h, index);
        const int64_t begin = block.begin > column_begin ? block.begin : column_begin;
        const int64_t end = block.end < column_end ? block.end : column_end;
        const bool whole = begin == block.begin && end == block.end && end - begin <= kKeyBlock;
        if (begin < end) load_block(args.backward, block, whole, products, rows);
        for (int64_t key = begin; key < end; key += kKeyBlock) {
          // Where the columns are not broadcast, a key's row of `sums` is its place in the tile.
          const int keys = end - key < kKeyBlock ? static_cast<int>(end - key) : kKeyBlock;
          if (score_gradients(products, call, block, rows, key, keys, p, ds, static_cast<C*>(nullptr)) == Left::nothing)
            continue;
          C* to = sums + (args.columns == 1 ? 0 : key - column_begin) * kQueryBlock;
          for (int j = 0; j < keys; ++j) {
            for_lanes<C>(
                block, [&, at = j * kQueryBlock](int i) { store(to + at + i, load(to + at + i) + load(ds + at + i)); });
          }
        }
      });
    });
  });
  const int64_t row_begin = row_block * kQueryBlock, columns_left = args.columns - column_begin;
  const int rows_here = args.rows - row_begin < kQueryBlock ? static_cast<int>(args.rows - row_begin) : kQueryBlock;
  const int columns_here = columns_left < kKeyBlock ? static_cast<int>(columns_left) : kKeyBlock;
  if (args.columns == 1) {
    for (int j = 1; j < kKeyBlock; ++j)
      for (int i = 0; i < kQueryBlock; ++i) sums[i] += sums[j * kQueryBlock + i];
  }
  if (args.rows == 1) {
    for (int j = 0; j < columns_here; ++j)
      for (int i = 1; i < kQueryBlock; ++i) sums[j * kQueryBlock] += sums[j * kQueryBlock + i];
  }
  store_transposed(sums, rows_here, columns_here, args.dmask.dtype, args.dmask.data,
                   (head * args.rows + row_begin) * args.columns + column_begin, args.columns);
}

}  // namespace pyllm::PYLLM_ISA
