// Reads the partial sums once: (chunks + 1) elements of memory for each column, whatever the number of rows.
#include "cpu/chunk_sum.h"

#include "cpu/vec.h"

namespace pyllm::PYLLM_ISA {

namespace {

template <class C>
void add(const ChunkSum& args, int64_t begin, int64_t end) {
  const C* partials = static_cast<const C*>(args.partials) + begin;
  visit_dtype(args.sum.dtype, [&](auto type) {
    auto* out = args.sum.as<decltype(type)>() + begin;
    for_vectors<C>(end - begin, [&](int64_t i, int count) {
      Vec<C> total{};
      for (int64_t c = 0; c < args.chunks; ++c) total += load(partials + c * args.stride + i, count);
      if constexpr (std::is_same_v<Compute<decltype(type)>, C>) {
        store(out + i, total, count);
      } else if constexpr (std::is_same_v<decltype(type), float>) {
        for (int lane = 0; lane < count; ++lane) out[i + lane] = static_cast<float>(total[lane]);
      }
    });
  });
}

}  // namespace

void chunk_sum(const ChunkSum& args, int64_t begin, int64_t end) {
  args.compute == DType::f64 ? add<double>(args, begin, end) : add<float>(args, begin, end);
}

}  // namespace pyllm::PYLLM_ISA
