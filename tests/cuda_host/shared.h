// Shared memory that knows, byte by byte, who wrote and read it and when, and so finds races: vector clocks, reads kept
// as one epoch until they are concurrent (Flanagan & Freund, FastTrack, 2009).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pyllm::cuda_host {

// For each thread of a cluster, a time up to which what it did is known to have happened; 0: not that it has begun.
using Clock = std::vector<uint32_t>;

inline void raise_to(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

// A thread's own time, and what it knows of the others.
struct Observer {
  uint32_t id = 0, now = 1;
  std::shared_ptr<const Clock> others;

  bool knows(uint32_t thread, uint32_t time) const { return thread == id || (*others)[thread] >= time; }
};

// What threads that meet at a barrier know together.
class Meeting {
 public:
  void join(Observer& thread) {
    if (known_.empty()) {
      known_ = *thread.others;
    } else if (thread.others.get() != last_) {
      raise_to(known_, *thread.others);
    }
    last_ = thread.others.get();
    known_[thread.id] = thread.now++;
  }

  std::shared_ptr<const Clock> end() { return std::make_shared<const Clock>(std::exchange(known_, {})); }

 private:
  Clock known_;
  const Clock* last_ = nullptr;
};

class SharedMemory {
 public:
  // What is wrong with an access, and the other thread where there is one.
  struct Fault {
    const char* what = nullptr;
    int64_t other = -1;
  };

  explicit SharedMemory(size_t bytes) : bytes_(bytes), cells_(bytes) {}

  size_t size() const { return bytes_.size(); }

  Fault read(const Observer& thread, size_t offset, void* out, size_t count) {
    for (size_t i = offset; i < offset + count; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) return {"reads shared memory while an asynchronous copy to it runs, of", cell.writer};
      if (cell.written == 0) return {"reads shared memory that nobody has written"};
      if (!thread.knows(cell.writer, cell.written))
        return {"reads shared memory that is written, without a barrier in between, by", cell.writer};
      if (cell.read != 0 && !thread.knows(cell.reader, cell.read) && !cell.many_readers) {
        cell.many_readers = true;
        Clock& readers = readers_[i];
        readers.assign(thread.others->size(), 0);
        readers[cell.reader] = cell.read;
      }
      if (cell.many_readers) readers_[i][thread.id] = thread.now;
      cell.reader = thread.id;
      cell.read = thread.now;
    }
    std::memcpy(out, bytes_.data() + offset, count);
    return {};
  }

  Fault write(const Observer& thread, size_t offset, const void* value, size_t count) {
    const Fault fault = claim(thread, offset, count, false);
    if (fault.what == nullptr) std::memcpy(bytes_.data() + offset, value, count);
    return fault;
  }

  // A copy that runs beside the threads. Until its thread ends it, nobody may touch the bytes.
  Fault begin_copy(const Observer& thread, size_t offset, size_t count) { return claim(thread, offset, count, true); }

  void end_copy(const Observer& thread, size_t offset, const void* value, size_t count) {
    for (size_t i = offset; i < offset + count; ++i) cells_[i] = {.written = thread.now, .writer = thread.id};
    std::memcpy(bytes_.data() + offset, value, count);
  }

 private:
  // Makes bytes the thread's own, unless somebody else may still use them.
  Fault claim(const Observer& thread, size_t offset, size_t count, bool in_flight) {
    for (size_t i = offset; i < offset + count; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) return {"writes shared memory while an asynchronous copy to it runs, of", cell.writer};
      if (cell.written != 0 && !thread.knows(cell.writer, cell.written))
        return {"writes shared memory that is written, without a barrier in between, by", cell.writer};
      if (cell.read != 0 && !thread.knows(cell.reader, cell.read)) return {kReadBefore, cell.reader};
      if (cell.many_readers) {
        const Clock& readers = readers_[i];
        for (uint32_t reader = 0; reader < readers.size(); ++reader)
          if (!thread.knows(reader, readers[reader])) return {kReadBefore, reader};
      }
      cell = {.written = thread.now, .writer = thread.id, .in_flight = in_flight};
    }
    return {};
  }

  static constexpr const char* kReadBefore = "writes shared memory that is read, without a barrier in between, by";

  // Times are 0 where it did not happen.
  struct Cell {
    uint32_t written = 0, writer = 0;
    uint32_t read = 0, reader = 0;  // the last one
    bool many_readers = false;      // readers_ has the time of each
    bool in_flight = false;         // an asynchronous copy writes it
  };

  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  std::unordered_map<size_t, Clock> readers_;
};

}  // namespace pyllm::cuda_host
