// Which GPUs a list of compiled architectures serves. The list is what setup.py compiled for, such as
// "sm_80,sm_90a,compute_100": machine code of sm_XY runs on X.Y and on later X.*, of sm_XYa on X.Y alone; compute_XY is
// PTX, which the driver compiles for X.Y and all that come later.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace pyllm::cuda {

inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    items.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

// capability: 10 * major + minor.
inline bool serves(const std::string& architecture, int capability) {
  const int compiled = std::stoi(architecture.substr(architecture.find('_') + 1));
  if (architecture.starts_with("compute_")) return capability >= compiled;
  if (architecture.ends_with('a')) return capability == compiled;
  return capability / 10 == compiled / 10 && capability >= compiled;
}

inline bool any_serves(const std::string& list, int capability) {
  const auto architectures = split(list);
  return std::any_of(architectures.begin(), architectures.end(),
                     [&](const std::string& architecture) { return serves(architecture, capability); });
}

}  // namespace pyllm::cuda
