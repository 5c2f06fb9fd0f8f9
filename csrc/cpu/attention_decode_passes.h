// Attention of a few new queries over a long cache: reading K and V once, at the speed of memory, is all of the cost.
// A task takes a piece of a sequence's keys for all query heads that share them, tile by tile: S = Q K' with lanes
// along head_dim, softmax along the keys, O = O * rescale + P V. Storage of 16 bits is converted in registers. A
// sequence has several pieces where there are fewer heads than would keep the threads busy; their results are merged by
// log-sum-exp.
//
// Bytes: 2 Sk D for each key head; the rest is small. FLOPs: 4 Sk D for each query head and new position.
//
// Measured on 2 cores of an AMD EPYC (Zen 4), AVX-512, one new token at cache length 4096 from caches beyond the third
// level, other work on the machine: bytes of K and V per second as a share of what a copy reads and writes there.
// 12 to 16 heads, head_dim 64:     fp32 0.69-0.74, bf16 0.92-0.97; in random pages of 16 keys 0.72-0.80 and 0.64-0.71
// head_dim 128:                    fp32 0.89-0.92; bf16 with 4 query heads to a key head 0.52-0.59, with 8 0.34-0.39,
// where the arithmetic in fp32 is the limit, by estimate.
#pragma once

#include "cpu/attention_decode.h"
#include "cpu/attention_tile.h"

namespace pyllm::PYLLM_ISA {

inline constexpr int kTileKeys = 128;
// Keys that are multiplied at a time: they lie in one page.
inline constexpr int kGroup = 16;
// How many keys ahead of the arithmetic those of the next pages are fetched.
inline constexpr int kAhead = 64;
// A row of scores: whole vectors are written from any key of the tile on.
inline constexpr int kScoreRow = kTileKeys + 64 / sizeof(float);

// Turns the pairs of a row, in place.
template <class C>
void rotate(const Rotary& rotary, int64_t position, C* row) {
  if (!rotary.cos || position < 0) return;
  const C* cos = rotary.cos.as<C>() + position * rotary.pairs;
  const C* sin = rotary.sin.as<C>() + position * rotary.pairs;
  for (int64_t pair = 0; pair < rotary.pairs; ++pair) {
    C& first = row[rotary.interleaved ? 2 * pair : pair];
    C& second = row[rotary.interleaved ? 2 * pair + 1 : pair + rotary.pairs];
    const C turned = first * cos[pair] - second * sin[pair];
    second = second * cos[pair] + first * sin[pair];
    first = turned;
  }
}

// The row of a cache that holds key `key` of a sequence.
template <class T>
T* cached(const AttentionDecode& call, const Heads& cache, int64_t sequence, int64_t key_head, int64_t key) {
  const int64_t page = key / call.page_size;
  return cache.at<T>(call.block_table == nullptr ? sequence : call.block_table[sequence * call.table_row + page],
                     key_head, key % call.page_size);
}

// body(where, count, rows) for each run of the keys [begin, end) that lies together in a cache, `most` at most: its
// place after `begin`, and its rows.
template <class T, class Body>
void for_runs(const AttentionDecode& call, const Heads& cache, int64_t sequence, int64_t key_head, int64_t begin,
              int64_t end, int64_t most, Body&& body) {
  for (int64_t key = begin; key < end;) {
    int64_t count = call.page_size - key % call.page_size;
    if (count > end - key) count = end - key;
    if (count > most) count = most;
    body(key - begin, count, cached<const T>(call, cache, sequence, key_head, key));
    key += count;
  }
}

// Starts to bring the rows of a group of keys into the second-level cache. Inline, since GCC drops calls of a function
// that does nothing else.
template <class T>
[[gnu::always_inline]] inline void fetch(const AttentionDecode& call, const Heads& cache, const DecodePiece& piece,
                                         int64_t key_head, int64_t key) {
  if (key >= piece.end) return;
  const T* rows = cached<const T>(call, cache, piece.sequence, key_head, key);
  for (int64_t row = 0; row < kGroup && key + row < piece.end; ++row) {
    const char* bytes = reinterpret_cast<const char*>(rows + row * cache.row);
    for (int64_t at = 0; at < call.dim * int64_t{sizeof(T)}; at += 64) __builtin_prefetch(bytes + at, 0, 2);
  }
}

// `count` rows in the compute type, padded to `width`.
template <class T, class C>
void convert_rows(const T* from, int64_t stride, int64_t count, int64_t dim, C* to, int64_t width) {
  for (int64_t row = 0; row < count; ++row) convert_row(from + row * stride, dim, to + row * width, width);
}

// products[i] += query * row i, lane by lane, for the columns from d on as far as whole steps of `vectors` vectors go.
// Rows are read one after the other, which is what the memory is fast at.
template <class C, int vectors, class T>
[[gnu::always_inline]] inline void add_products(const C* query, const T* const (&rows)[kLanes<C>], int64_t dim,
                                                int64_t& d, Vec<C> (&products)[kLanes<C>]) {
  constexpr int lanes = kLanes<C>;
  for (; d + (vectors - 1) * lanes < dim; d += vectors * lanes) {
    Vec<C> q[vectors];
    for (int v = 0; v < vectors; ++v) q[v] = load(query + d + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      Vec<C> part[2] = {};  // two short chains, so that the next row's loads start early
      for (int v = 0; v < vectors; ++v) part[v % 2] += q[v] * load(rows[i] + d + v * lanes);
      products[i] += part[0] + part[1];
    }
  }
}

// The products of a few queries with keys and values, in the compute type. query: (rows, padded head_dim)
template <class T>
class PlainDecode {
 public:
  using C = Compute<T>;

  PlainDecode(int rows, int64_t dim, const C* query) : rows_(rows), dim_(dim), width_(padded<C>(dim)), query_(query) {}

  // scores[row][j] = scale * query[row] . keys[j] for `count` keys, and something up to a whole vector
  void multiply_keys(const T* keys, int64_t stride, int64_t count, C scale, C* scores) const {
    constexpr int lanes = kLanes<C>;
    const auto multiply = [&]<class Row>(int64_t j, const Row* from, int64_t step) {
      const Row* key[lanes];
      for (int i = 0; i < lanes; ++i) key[i] = from + (j + i < count ? i : count - 1 - j) * step;
      for (int row = 0; row < rows_; ++row) {
        Vec<C> products[lanes] = {};
        int64_t d = 0;
        add_products<C, 8>(query_ + row * width_, key, dim_, d, products);
        add_products<C, 4>(query_ + row * width_, key, dim_, d, products);
        add_products<C, 1>(query_ + row * width_, key, dim_, d, products);
        store(scores + row * kScoreRow + j, sums<C>(products) * scale);
      }
    };
    // Rows that are not whole vectors are padded first; those that several queries read are converted once.
    const bool direct = dim_ % lanes == 0 && (sizeof(T) == sizeof(C) || rows_ == 1);
    C* converted = scratch<C, 0>(lanes * width_);
    for (int64_t j = 0; j < count; j += lanes) {
      const T* from = keys + j * stride;
      if (direct) {
        multiply(j, from, stride);
      } else {
        convert_rows(from, stride, count - j < lanes ? count - j : lanes, dim_, converted, width_);
        multiply(j, converted, width_);
      }
    }
  }

  // out = rescale * out + weights . values for `count` keys
  void multiply_values(const C* weights, const T* values, int64_t stride, int64_t count, const C* rescale,
                       C* out) const {
    const auto multiply = [&](const auto* from, int64_t step) {
      const int64_t columns = (dim_ + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
      multiply_add<false>(rows_, columns, count, weights, kScoreRow, from, step, out, width_,
                          Update<C>{.beta = rescale});
    };
    if (dim_ % kLanes<C> == 0) return multiply(values, stride);
    C* converted = scratch<C, 1>(kTileKeys * width_);
    convert_rows(values, stride, count, dim_, converted, width_);
    multiply(converted, width_);
  }

 private:
  int rows_;
  int64_t dim_, width_;
  const C* query_;
};

// Softcap, biases and window on the scores of the query at `position` with the keys from `key` on; -inf up to a whole
// vector.
template <class C>
void finish_scores(const AttentionDecode& call, int64_t sequence, int64_t head, int64_t position, int64_t key, int keys,
                   C* scores) {
  if (call.softcap != 0) {
    const C softcap = static_cast<C>(call.softcap);
    for (int j = 0; j < keys; j += kLanes<C>) store(scores + j, tanh(load(scores + j)) * softcap);
  }
  if (call.biases) {
    const BiasOf<C> bias(call.biases, sequence, head);
    for (int j = 0; j < keys; ++j) scores[j] += bias(key + j - position);
  }
  const int64_t first = call.left < 0 ? 0 : position - call.left - key;
  const int64_t last = call.right < 0 ? keys : position + call.right + 1 - key;
  for (int j = 0; j < first && j < keys; ++j) scores[j] = -kInfinity<C>;
  for (int64_t j = last < 0 ? 0 : last; j < keys; ++j) scores[j] = -kInfinity<C>;
  for (int j = keys; j % kLanes<C> != 0; ++j) scores[j] = -kInfinity<C>;
}

// Scores become exp(score - peak).
template <class C>
void exponentiate(int keys, C* scores, C& peak, C& total, C& rescale) {
  Vec<C> peaks = splat(peak);
  for (int j = 0; j < keys; j += kLanes<C>) peaks = max<C>(load(scores + j), peaks);
  const C now = max<C>(peaks), shift = now == -kInfinity<C> ? 0 : now;
  Vec<C> terms{};
  for (int j = 0; j < keys; j += kLanes<C>) {
    const Vec<C> e = exp(load(scores + j) - shift);
    store(scores + j, e);
    terms += e;
  }
  rescale = exp(splat(peak - shift))[0];
  total = total * rescale + sum<C>(terms);
  peak = now;
}

// out = rescale * out + weights . values, where a weight of 0 lets nothing through, not even NaN.
template <class T, class C>
void multiply_seen_values(int rows, int64_t dim, const C* weights, const T* values, int64_t stride, int64_t count,
                          const C* rescale, C* out) {
  for (int row = 0; row < rows; ++row, weights += kScoreRow, out += padded<C>(dim)) {
    for_vectors<C>(dim, [&](int64_t d, int lanes) {
      Vec<C> sum = load(out + d, lanes) * (rescale == nullptr ? 1 : rescale[row]);
      for (int64_t j = 0; j < count; ++j) sum += weighed<C>(splat(weights[j]), load(values + j * stride + d, lanes));
      store(out + d, sum, lanes);
    });
  }
}

template <class T, class Products>
void decode(const AttentionDecode& call, int64_t task) {
  using C = Compute<T>;
  const int64_t index = task / call.kv_heads, key_head = task % call.kv_heads, group = call.heads / call.kv_heads;
  const DecodePiece piece = call.pieces[index];
  const int64_t shift = call.sequences[piece.sequence].keys - call.added;
  const int64_t width = padded<C>(call.dim);
  const int rows = static_cast<int>(group * call.added);
  // The processor foresees which memory comes next, except across pages, or where it has arithmetic to do meanwhile.
  const bool paged = call.block_table != nullptr, fetched = paged || rows > 1;
  C* query = scratch<C, 2>(rows * width);
  C* scores = scratch<C, 3>(rows * kScoreRow);
  C* peak = scratch<C, 4>(3 * rows);
  C *total = peak + rows, *rescale = total + rows;
  const int64_t first_row = (index * call.heads + key_head * group) * call.added;
  C* out = static_cast<C*>(call.partial_out) + first_row * width;
  C* lse = static_cast<C*>(call.partial_lse) + first_row;
  for (int row = 0; row < rows; ++row) {
    const int64_t head = key_head * group + row / call.added, added = row % call.added;
    convert_row(call.query.at<const T>(piece.sequence, head, added), call.dim, query + row * width, width);
    rotate(call.rotary, shift + added, query + row * width);
    peak[row] = -kInfinity<C>;
    total[row] = 0;
  }
  std::memset(out, 0, rows * width * sizeof(C));
  const Products products(rows, call.dim, query);
  const C scale = static_cast<C>(call.softcap != 0 ? call.scale / call.softcap : call.scale);
  for (int64_t key = piece.begin; key < piece.end; key += kTileKeys) {
    const int keys = piece.end - key < kTileKeys ? static_cast<int>(piece.end - key) : kTileKeys;
    for_runs<T>(call, call.key_cache, piece.sequence, key_head, key, key + keys, kGroup,
                [&](int64_t at, int64_t count, const T* from) {
                  if (fetched) fetch<T>(call, call.value_cache, piece, key_head, key + at);
                  if (paged) fetch<T>(call, call.key_cache, piece, key_head, key + at + kAhead);
                  products.multiply_keys(from, call.key_cache.row, count, scale, scores + at);
                });
    for (int row = 0; row < rows; ++row) {
      C* own = scores + row * kScoreRow;
      finish_scores(call, piece.sequence, key_head * group + row / call.added, shift + row % call.added, key, keys,
                    own);
      exponentiate(keys, own, peak[row], total[row], rescale[row]);
    }
    // Whether the window of one of the queries ends among these keys.
    const bool cut = (call.left >= 0 && shift + call.added - 1 - call.left > key) ||
                     (call.right >= 0 && shift + call.right < key + keys - 1);
    for_runs<T>(call, call.value_cache, piece.sequence, key_head, key, key + keys, kTileKeys,
                [&](int64_t at, int64_t count, const T* from) {
                  const int64_t stride = call.value_cache.row;
                  const C* factor = at == 0 ? rescale : nullptr;
                  if (!cut || all_finite(from, stride, count, call.dim)) {
                    products.multiply_values(scores + at, from, stride, count, factor, out);
                  } else {
                    multiply_seen_values(rows, call.dim, scores + at, from, stride, count, factor, out);
                  }
                });
  }
  for (int row = 0; row < rows; ++row) {
    lse[row] = total[row] == 0 ? -kInfinity<C> : peak[row] + std::log(total[row]);
    const C divisor = total[row] == 0 ? 1 : total[row];
    for (int64_t i = 0; i < width; i += kLanes<C>) store(out + row * width + i, load(out + row * width + i) / divisor);
  }
}

}  // namespace pyllm::PYLLM_ISA
