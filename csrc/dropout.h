// Dropout's parameters as kernels take them.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyllm {

// threshold 0 means no dropout. An element is dropped where its 16 random bits are below the threshold.
struct Dropout {
  uint32_t seed_low = 0, seed_high = 0, offset = 0;
  uint32_t threshold = 0;
  double scale = 1.0;

  Dropout() = default;
  // rng: (seed, offset); null where p is 0.
  Dropout(const int64_t* rng, double p) : threshold(static_cast<uint32_t>(p * 65536 + 0.5)) {
    if (rng != nullptr) {
      seed_low = static_cast<uint32_t>(rng[0]);
      seed_high = static_cast<uint32_t>(static_cast<uint64_t>(rng[0]) >> 32);
      offset = static_cast<uint32_t>(rng[1]);
    }
    scale = threshold < 65536 ? 65536.0 / (65536 - threshold) : 0.0;
  }
  PYLLM_EVERYWHERE explicit operator bool() const { return threshold > 0; }
};

}  // namespace pyllm
