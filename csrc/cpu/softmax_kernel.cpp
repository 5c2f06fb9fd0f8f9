// Three passes over a row in cache: scale, mask and maximum; exp and sum; normalise. Memory is read and written once,
// and columns that causality removes are not read. The backward reads dy and y once. About 15 and 5 FLOPs an element.
#include "cpu/softmax.h"

#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

namespace {

template <class C>
constexpr C kInf = std::numeric_limits<C>::infinity();

// scores += the mask's row, or = -inf where that has -inf or, boolean, 0
template <class C>
void add_mask(const SoftmaxForward& args, int64_t offset, int64_t n, C* scores) {
  const bool broadcast = args.mask.last_stride == 0;
  if (args.mask.data.dtype == DType::boolean) {
    const uint8_t* mask = args.mask.data.as<const uint8_t>() + offset;
    for (int64_t i = 0; i < n; ++i) scores[i] = mask[broadcast ? 0 : i] ? scores[i] : -kInf<C>;
    return;
  }
  visit_dtype(args.mask.data.dtype, [&](auto type) {
    using M = decltype(type);
    const M* mask = args.mask.data.as<const M>() + offset;
    if constexpr (std::is_same_v<Compute<M>, C>) {
      M value[kLanes<C>];
      for (M& lane : value) lane = *mask;
      for_vectors<C>(n, [&](int64_t i, int count) {
        const Vec<C> added = broadcast ? load(value) : load(mask + i, count);
        store(scores + i, added == -kInf<C> ? added : load(scores + i, count) + added, count);
      });
    } else if constexpr (std::is_same_v<M, float>) {
      for (int64_t i = 0; i < n; ++i) {
        const C added = mask[broadcast ? 0 : i];
        scores[i] = added == -kInf<C> ? added : scores[i] + added;
      }
    }
  });
}

template <class T>
void forward(const SoftmaxForward& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr C inf = kInf<C>;
  const C scale = static_cast<C>(args.scale);
  const bool masked = static_cast<bool>(args.mask.data);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x.as<const T>() + row * args.width;
    T* y = args.y.as<T>() + row * args.width;
    int64_t offset = 0;
    for (int64_t d = args.mask.rank - 1, rest = row; masked && d >= 0; rest /= args.mask.sizes[d--])
      offset += rest % args.mask.sizes[d] * args.mask.strides[d];
    int64_t n = args.width;
    if (args.is_causal) {
      const int64_t i = row % args.mask.sizes[args.mask.rank - 1];
      n = i + 1 < n ? i + 1 : n;
    }

    C* scores = nullptr;  // y itself where it can hold them
    if constexpr (std::is_same_v<T, C>) scores = args.past_caches ? nullptr : y;
    if (scores == nullptr) scores = scratch<C>(n);
    Vec<C> peaks[2] = {splat(-inf), splat(-inf)};
    if (masked) {
      for_vectors<C>(n, [&](int64_t i, int count) { store(scores + i, load(x + i, count) * scale, count); });
      add_mask(args, offset, n, scores);
    } else if (!std::is_same_v<T, C> || scale != 1) {
      for_vectors<C>(n, [&](int64_t i, int count) { store(scores + i, load(x + i, count) * scale, count); });
    }
    const C* source = scores;
    if constexpr (std::is_same_v<T, C>) source = masked || scale != 1 ? scores : x;
    int64_t i = 0;
    for (; i + 2 * kLanes<C> <= n; i += 2 * kLanes<C>) {
      peaks[0] = max<C>(load(source + i), peaks[0]);
      peaks[1] = max<C>(load(source + i + kLanes<C>), peaks[1]);
    }
    C peak = max<C>(max<C>(peaks[0], peaks[1]));
    for (; i < n; ++i) peak = source[i] > peak ? source[i] : peak;

    const C shift = peak == -inf ? 0 : peak;  // an empty row: every exponential is 0
    const C total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
                      const Vec<C> e = exp(load(source + i, count) - shift);
                      if (!args.log) store(scores + i, e, count);
                      terms[0] += first<C>(e, count);
                    }).value[0];
    const C log_total =
        total == 0 || !args.log ? 0 : std::log(total);  // apart from shift, beside which it would lose its digits
    const C norm = total == 0 ? 0 : 1 / total;
    if (args.log) {
      write_row<C>(y, n, args.past_caches,
                   [&](int64_t i, int count) { return load(source + i, count) - shift - log_total; });
    } else {
      write_row<C>(y, n, args.past_caches, [&](int64_t i, int count) { return load(scores + i, count) * norm; });
    }
    const Vec<C> removed = splat(args.log ? -inf - log_total : 0 * norm);  // NaN as the rest of the row
    for_vectors<C>(args.width - n, [&](int64_t i, int count) { store(y + n + i, removed, count); });
  }
  end_streams();
}

template <class T>
void backward(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr C inf = kInf<C>;
  const C scale = static_cast<C>(args.scale);
  const int64_t n = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = args.dy.as<const T>() + row * n;
    const T* y = args.y.as<const T>() + row * n;
    T* dx = args.dx.as<T>() + row * n;
    const C total = accumulate<C, 1>(n, [&](int64_t i, int count, Vec<C>* terms) {
                      const Vec<C> g = load(dy + i, count), p = load(y + i, count);
                      terms[0] += args.log ? (p == -inf ? Vec<C>{} : g) : g * p;
                    }).value[0];
    write_row<C>(dx, n, args.past_caches, [&](int64_t i, int count) {
      const Vec<C> g = load(dy + i, count), p = load(y + i, count);
      const Vec<C> d = args.log ? (p == -inf ? Vec<C>{} : g - exp(p) * total) : p * (g - total);
      return d * scale;
    });
  }
  end_streams();
}

}  // namespace

void softmax_fwd(const SoftmaxForward& args, int64_t begin, int64_t end) {
  visit_dtype(args.x.dtype, [&](auto type) { forward<decltype(type)>(args, begin, end); });
}

void softmax_bwd(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  visit_dtype(args.y.dtype, [&](auto type) { backward<decltype(type)>(args, begin, end); });
}

}  // namespace pyllm::PYLLM_ISA
