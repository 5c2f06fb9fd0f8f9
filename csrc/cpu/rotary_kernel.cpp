// Reads x once and writes y once; the tables' row of a position serves all of its heads. 3 FLOPs an element: bound by
// memory.
#include "cpu/rotary.h"

#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

namespace {

// Each pair of lanes the other way round.
inline Vec<float> swap_pairs(Vec<float> v) {
  const auto pairs = bit_cast<Vec<uint64_t>>(v);
  return bit_cast<Vec<float>>((pairs << 32) | (pairs >> 32));
}

inline Vec<double> swap_pairs(Vec<double> v) {
  Vec<double> swapped;
  for (int i = 0; i < kLanes<double>; ++i) swapped[i] = v[i ^ 1];
  return swapped;
}

// Pairs of columns (c, c + pairs).
template <class T, class C>
void turn_halves(const T* x, T* y, const C* cos, const C* sin, int64_t pairs) {
  for_vectors<C>(pairs, [&](int64_t i, int count) {
    const Vec<C> first = load(x + i, count), second = load(x + pairs + i, count);
    const Vec<C> c = load(cos + i, count), s = load(sin + i, count);
    store(y + i, first * c - second * s, count);
    store(y + pairs + i, second * c + first * s, count);
  });
}

// Pairs of columns (2c, 2c + 1); cos and sin hold an element for each column, sin negative for the first of a pair.
template <class T, class C>
void turn_neighbours(const T* x, T* y, const C* cos, const C* sin, int64_t pairs) {
  for_vectors<C>(2 * pairs, [&](int64_t i, int count) {
    const Vec<C> v = load(x + i, count);
    store(y + i, v * load(cos + i, count) + swap_pairs(v) * load(sin + i, count), count);
  });
}

template <class T>
void turn(const RotaryCall& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t pairs = args.pairs, turned = 2 * pairs;
  C *cos = scratch<C, 0>(turned), *sin = scratch<C, 1>(turned);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.length, position = i % args.length;
    const int64_t at = batch * args.table_batch_stride + position * pairs;
    for (int64_t c = 0; c < pairs; ++c) {
      const C cosine = static_cast<const C*>(args.cos)[at + c];
      const C sine = (args.inverse ? -1 : 1) * static_cast<const C*>(args.sin)[at + c];
      const int64_t first = args.interleaved ? 2 * c : c, second = args.interleaved ? first + 1 : c;
      cos[first] = cos[second] = cosine;
      sin[first] = -sine;
      sin[second] = sine;
    }
    const T* x = args.x.data.as<const T>() + batch * args.x.batch_stride + position * args.x.row_stride;
    T* y = args.y.data.as<T>() + batch * args.y.batch_stride + position * args.y.row_stride;
    for (int64_t head = 0; head < args.heads; ++head, x += args.x.head_stride, y += args.y.head_stride) {
      args.interleaved ? turn_neighbours<T, C>(x, y, cos, sin, pairs) : turn_halves<T, C>(x, y, cos, sin, pairs);
      if (x != y) std::memcpy(y + turned, x + turned, (args.width - turned) * sizeof(T));
    }
  }
}

}  // namespace

void rotary_fwd(const RotaryCall& args, int64_t begin, int64_t end) {
  visit_dtype(args.x.data.dtype, [&](auto type) { turn<decltype(type)>(args, begin, end); });
}

}  // namespace pyllm::PYLLM_ISA
