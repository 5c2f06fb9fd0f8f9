// A thread's asynchronous copies to shared memory, after the PTX ISA on cp.async, cp.async.commit_group and
// cp.async.wait_group: groups end in the order in which they were committed, and copies of no group are never there.
#pragma once

#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

namespace pyllm::cuda_host {

class Copies {
 public:
  void begin(size_t offset, const void* value, size_t bytes) {
    const char* first = static_cast<const char*>(value);
    open_.push_back({offset, std::vector<char>(first, first + bytes)});
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  // Ends all groups but the last `left`: ended(offset, bytes) for each of their copies.
  template <class Ended>
  void wait(int left, Ended&& ended) {
    for (; static_cast<int>(groups_.size()) > left; groups_.pop_front())
      for (const Copy& copy : groups_.front()) ended(copy.offset, copy.bytes);
  }

 private:
  struct Copy {
    size_t offset;
    std::vector<char> bytes;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace pyllm::cuda_host
