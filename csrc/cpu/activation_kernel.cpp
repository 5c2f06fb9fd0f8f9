// Forward: reads the input once and writes y once. Backward: reads dy and the input once, writes the gradients once.
// About 30 FLOPs an element forward and 40 backward for gelu (an exponential, a division), 3 for relu; dropout adds 15
// integer operations.
#include "cpu/activation.h"

#include "cpu/rows.h"

namespace pyllm::PYLLM_ISA {

namespace {

// Every activation is h s(h); its derivative is s + h s'(h).
template <class C>
struct Switch {
  Vec<C> s, slope;
};

template <Act act, class C>
inline Switch<C> switch_of(Vec<C> h) {
  if constexpr (act == Act::relu) {
    return {h <= 0 ? Vec<C>{} : splat(C{1}), Vec<C>{}};
  } else if constexpr (act == Act::gelu) {
    const auto [distribution, density] = normal(h);
    return {distribution, density};
  } else if constexpr (act == Act::gelu_tanh) {                     // (1 + tanh(v)) / 2 is the sigmoid of 2 v
    constexpr C root = 1.5957691216057308, cube = 0.044715 * root;  // 2 sqrt(2 / pi)
    const auto [s, slope] = sigmoid<C>(h * (h * h * cube + root));
    return {s, slope * (h * h * (3 * cube) + root)};
  } else {
    const auto [s, slope] = sigmoid<C>(h);
    return {s, slope};
  }
}

template <Act act, class C>
inline Vec<C> value_of(Vec<C> h, Vec<C> s) {
  if constexpr (act == Act::relu) return h <= 0 ? Vec<C>{} : h;  // a NaN stays one
  return h * s;
}

// The gradient of h from that of the value, g.
template <Act act, class C>
inline Vec<C> gradient_of(Vec<C> g, Vec<C> h, const Switch<C>& by) {
  if constexpr (act == Act::relu) return h <= 0 ? Vec<C>{} : g;  // whatever g is, and an infinite h times a slope of 0
  return g * (h * by.slope + by.s);
}

template <class T, Act act, bool gated>
void forward(const ActivationForward& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = args.width;
  const C* bias = parameter<C, 0>(args.bias, gated ? 2 * n : n);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = args.gate.as<const T>() + row * args.gate_stride;
    const T* up = args.up.as<const T>() + row * args.up_stride;
    T* y = args.y.as<T>() + row * n;
    const bool stream_y = args.past_caches && streamable(y, n);
    for_dropped_vectors<C>(args.dropout, row, n, [&](int64_t i, int count, Vec<C> keep) __attribute__((always_inline)) {
      Vec<C> h = load(gate + i, count);
      if (bias != nullptr) h += load(bias + i, count);
      Vec<C> v = value_of<act, C>(h, switch_of<act, C>(h).s);
      if constexpr (gated) {
        Vec<C> u = load(up + i, count);
        if (bias != nullptr) u += load(bias + n + i, count);
        v *= u;
      }
      v *= keep;
      stream_y ? stream(y + i, v) : store(y + i, v, count);
    });
  }
  end_streams();
}

template <class T, Act act, bool gated>
void backward(const ActivationBackward& args, int64_t chunk) {
  using C = Compute<T>;
  const int64_t n = args.width, inputs = gated ? 2 * n : n;
  const C* bias = parameter<C, 0>(args.bias, inputs);
  const ColumnSums<C> sums(static_cast<C*>(args.partials) + chunk * inputs, bias != nullptr ? inputs : 0);
  const int64_t begin = chunk * args.rows_per_chunk;
  const int64_t end = begin + args.rows_per_chunk < args.rows ? begin + args.rows_per_chunk : args.rows;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = args.dy.as<const T>() + row * args.dy_stride;
    const T* gate = args.gate.as<const T>() + row * args.gate_stride;
    const T* up = args.up.as<const T>() + row * args.up_stride;
    T* dgate = args.dgate.as<T>() + row * args.gradient_stride;
    T* dup = args.dup.as<T>() + row * args.gradient_stride;
    const bool past_caches = args.past_caches && streamable(dgate, n) && (!gated || streamable(dup, n));
    const auto write = [&](T* to, int64_t column, Vec<C> v, int count) __attribute__((always_inline)) {
      past_caches ? stream(to, v) : store(to, v, count);
      if (bias != nullptr) sums.add(column, v, count);
    };
    for_dropped_vectors<C>(args.dropout, row, n, [&](int64_t i, int count, Vec<C> keep) __attribute__((always_inline)) {
      Vec<C> h = load(gate + i, count);
      if (bias != nullptr) h += load(bias + i, count);
      const Switch<C> by = switch_of<act, C>(h);
      Vec<C> g = load(dy + i, count) * keep;
      if constexpr (gated) {
        Vec<C> u = load(up + i, count);
        if (bias != nullptr) u += load(bias + n + i, count);
        write(dup + i, n + i, g * value_of<act, C>(h, by.s), count);
        g *= u;
      }
      write(dgate + i, i, gradient_of<act, C>(g, h, by), count);
    });
    sums.end_row(row - begin, row + 1 == end);
  }
  end_streams();
}

// Calls body(T{}, act, gated), the latter two as constants.
template <class Body>
void visit(DType dtype, Act act, bool gated, Body&& body) {
  visit_dtype(dtype, [&](auto type) {
    const auto with = [&](auto constant) {
      gated ? body(type, constant, std::true_type{}) : body(type, constant, std::false_type{});
    };
    switch (act) {
      case Act::relu: return with(std::integral_constant<Act, Act::relu>{});
      case Act::gelu: return with(std::integral_constant<Act, Act::gelu>{});
      case Act::gelu_tanh: return with(std::integral_constant<Act, Act::gelu_tanh>{});
      case Act::silu: return with(std::integral_constant<Act, Act::silu>{});
    }
  });
}

}  // namespace

void activation_fwd(const ActivationForward& args, int64_t begin, int64_t end) {
  visit(args.y.dtype, args.act, static_cast<bool>(args.up),
        [&](auto type, auto act, auto gated) { forward<decltype(type), act.value, gated.value>(args, begin, end); });
}

void activation_bwd(const ActivationBackward& args, int64_t begin, int64_t end) {
  visit(args.gate.dtype, args.act, static_cast<bool>(args.up), [&](auto type, auto act, auto gated) {
    for (int64_t chunk = begin; chunk < end; ++chunk) backward<decltype(type), act.value, gated.value>(args, chunk);
  });
}

}  // namespace pyllm::PYLLM_ISA
