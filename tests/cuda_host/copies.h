// A thread's asynchronous copies to shared memory, after the PTX ISA on cp.async, cp.async.commit_group and
// cp.async.wait_group: groups end in the order in which they were committed, and copies of no group are never there.
#pragma once

#include <cstddef>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

namespace pyllm::cuda_host {

class Copies {
 public:
  // from: null for zeros
  void begin(size_t offset, const void* from, size_t bytes) {
    const char* first = static_cast<const char*>(from);
    open_.push_back(
        {offset, first, from == nullptr ? std::vector<char>(bytes) : std::vector<char>(first, first + bytes)});
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  // Ends all groups but the last `left`: ended(offset, bytes, whether they are still what is at `from`) for each of
  // their copies.
  template <class Ended>
  void wait(int left, Ended&& ended) {
    for (; static_cast<int>(groups_.size()) > left; groups_.pop_front())
      for (const Copy& copy : groups_.front())
        ended(copy.offset, copy.bytes,
              copy.from == nullptr || std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()) == 0);
  }

 private:
  struct Copy {
    size_t offset;
    const char* from;
    std::vector<char> bytes;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace pyllm::cuda_host
