// What the functions of ptx.h and a test's entry points ask of the executor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <string>

namespace pyllm::cuda {
struct Launch;
}

namespace pyllm::cuda_host {

// Runs body as every thread of the launch. Throws std::runtime_error with the kernel, the block and the thread for the
// first error found.
void run(const void* kernel, const cuda::Launch& shape, const std::function<void()>& body);

// --- inside a kernel: of the running thread ---

// Ends the launch with an error of this thread.
[[noreturn]] void fail(const std::string& what);

// Where the kernel calls what a warp's lanes must call together: the default of a last argument, which callers leave.
using Site = std::source_location;

enum class Use { read_only, read, write, add };
void check_global(const void* pointer, size_t bytes, Use use);

size_t shared_size();
void read_shared(int rank, size_t offset, void* out, size_t bytes);
void write_shared(int rank, size_t offset, const void* value, size_t bytes);

// Asynchronous copies to the block's shared memory, of the bytes at `from`, zeros if that is null: begun, committed as
// a group, waited for until all groups but the last `groups` are there.
void begin_copy(size_t offset, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);

// Barrier 0 is that of all threads.
void sync_block(int barrier, int threads, const Site& site);

inline constexpr int kLaneBytes = 24;  // that a lane can bring

// What the lanes of a mask bring to an operation of a warp.
struct Collective {
  const char* name;
  Site site;
  unsigned mask, arrived = 0;
  alignas(8) unsigned char values[32][kLaneBytes];
};
// Returns when all lanes of the mask have called it.
std::shared_ptr<const Collective> meet_lanes(const char* name, const Site& site, unsigned mask, const void* value,
                                             size_t bytes, bool orders_memory);

int cluster_rank();
int cluster_size();
void arrive_at_cluster(const Site& site);
void wait_for_cluster(const Site& site);

// --- an entry point's body: returns null, or what it threw, for Python to raise ---

const char* keep_error(const char* what);

template <class Body>
const char* reporting(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& exception) { return keep_error(exception.what()); }
}

}  // namespace pyllm::cuda_host
