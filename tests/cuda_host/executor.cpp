// Runs a launch on the host: cluster by cluster, a fiber for each thread, in an order that a seed decides.
//
// A thread runs until it waits for others (a barrier, an operation of a warp) or ends; then any thread that can go on
// does. Where none can, those that wait do so for ever, and that is an error; so is a thread that ends while others
// wait for it, which hardware forgives.
#include "cuda_host/executor.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cuda/ptx.cuh"
#include "cuda_host/copies.h"
#include "cuda_host/fiber.h"
#include "cuda_host/shared.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pyllm::cuda_host {
namespace {

using cuda::Launch;

constexpr int kMaxThreads = 1024, kMaxSharedBytes = 227 << 10, kMaxCluster = 16, kWarp = 32;
constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

struct Block;

struct Thread {
  Block* block;
  int index;  // in its block
  Observer observer;
  const char* waits_in = nullptr;  // or last did
  unsigned mask = 0;               // of the lanes that it waits for
  bool ended = false;
  int64_t cluster_phase = -1;  // that it arrived in, and has not yet waited for
  Copies copies;
};

struct Barrier {
  int expected = 0;
  std::map<int, std::vector<Thread*>> parts;  // of warps, which arrive as a whole
  std::map<int, Site> sites;                  // where each of them does
  std::vector<Thread*> arrived;
};

struct ClusterBarrier {
  int64_t phase = 0;
  int arrived = 0;
  std::vector<Thread*> waiting;
  Meeting meeting;
  std::shared_ptr<const Clock> known;  // of the last phase
};

using Collectives = std::vector<std::shared_ptr<Collective>>;

struct Block {
  int rank;  // in its cluster
  int64_t index;
  int running;
  SharedMemory shared;
  std::array<Barrier, 16> barriers;
  std::vector<Collectives> open;  // of each warp
  Clock remote_uses;              // when threads of other blocks last used its memory
  Clock known_at_end;             // by any of its threads
};

struct Buffer {
  const char* begin;
  size_t bytes;
  char* mapping;
  size_t mapped;
  std::vector<uint32_t> writers;  // of each byte in this launch: 0, or a cluster's number from 1 on (kMany: several)
};

constexpr uint32_t kAdded = 1u << 31, kMany = kAdded - 1;  // kAdded: only by atomics

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // SplitMix64 (Steele, Lea & Flood, 2014)
  uint64_t below(uint64_t bound) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (z ^ z >> 31) % bound;
  }

 private:
  uint64_t state_;
};

Random random_order(0);
std::vector<Buffer> buffers;

// Of the launch that runs.
std::string kernel_name, failure;
const std::function<void()>* kernel_body;
std::vector<Block> blocks;  // of the cluster that runs
std::vector<Thread> threads;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch, until cuda_host_free_all
std::vector<Thread*> ready;
ClusterBarrier cluster_barrier;
Thread* current = nullptr;
sigjmp_buf after_fault;
const void* fault_address;

Fiber& fiber_of(const Thread& thread) { return *fibers[thread.observer.id]; }

std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index);
}

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(kernel_name + ": " + what); }

int lanes_of_warp(int warp) { return std::min(kWarp, static_cast<int>(blockDim.x) - warp * kWarp); }

// Lets threads that have all arrived go on, knowing what each has done.
void meet(const std::vector<Thread*>& arrived) {
  Meeting meeting;
  for (Thread* thread : arrived) meeting.join(thread->observer);
  const auto known = meeting.end();
  for (Thread* thread : arrived) thread->observer.others = known;
  ready.insert(ready.end(), arrived.begin(), arrived.end());
}

void pause(const char* waits_in, unsigned mask = 0) {
  current->waits_in = waits_in;
  current->mask = mask;
  fiber_of(*current).suspend();
}

void check(const SharedMemory::Fault& fault) {
  if (fault.what == nullptr) return;
  fail(fault.what + (fault.other < 0 ? "" : " " + name_of(threads[fault.other])));
}

// The block's shared memory, for the running thread; that of another block only while it surely runs.
SharedMemory& shared_memory_of(int rank) {
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("uses shared memory of a block outside the cluster");
  Block& block = blocks[rank];
  if (&block == current->block) return block.shared;
  const Clock& known = *current->observer.others;
  const auto first = known.begin() + rank * blockDim.x;
  if (std::all_of(first, first + blockDim.x, [](uint32_t time) { return time == 0; }))
    fail("uses shared memory of another block, which may not have begun");
  if (block.running == 0) fail("uses shared memory of another block, which has ended");
  block.remote_uses[current->observer.id] = current->observer.now;
  return block.shared;
}

void end_thread() {
  Block& block = *current->block;
  raise_to(block.known_at_end, *current->observer.others);
  if (--block.running == 0)
    for (const Thread& thread : threads)
      if (thread.block != &block && block.remote_uses[thread.observer.id] > block.known_at_end[thread.observer.id])
        fail("ends its block while the shared memory of that may be in use by " + name_of(thread));
  current->ended = true;
}

void run_thread() {
  (*kernel_body)();
  end_thread();
  fiber_of(*current).suspend();
}

// Who waits in what, when nobody can go on.
std::string describe_deadlock() {
  std::map<std::string, int> counts;
  const Thread* first = nullptr;
  for (const Thread& thread : threads) {
    if (thread.ended) {
      ++counts["ended"];
      continue;
    }
    if (first == nullptr) first = &thread;
    char mask[24] = "";
    if (thread.mask != 0) snprintf(mask, sizeof(mask), " of lanes %08x", thread.mask);
    ++counts[std::string("in ") + thread.waits_in + mask];
  }
  std::string text = name_of(*first) + ": waits for ever; threads of the cluster: ";
  for (const auto& [what, count] : counts)
    text += (text.back() == ' ' ? "" : ", ") + std::to_string(count) + " " + what;
  return text;
}

void run_cluster(int64_t first_block, const Launch& shape) {
  const int count = shape.cluster * shape.block, warps = (shape.block + kWarp - 1) / kWarp;
  const auto nothing = std::make_shared<const Clock>(count);
  blocks.clear();
  threads.clear();
  ready.clear();
  cluster_barrier = {};
  for (int rank = 0; rank < shape.cluster; ++rank)
    blocks.push_back({.rank = rank,
                      .index = first_block + rank,
                      .running = shape.block,
                      .shared = SharedMemory(shape.shared_bytes),
                      .barriers = {},
                      .open = std::vector<Collectives>(warps),
                      .remote_uses = *nothing,
                      .known_at_end = *nothing});
  for (int id = 0; id < count; ++id) {
    if (static_cast<int>(fibers.size()) == id) fibers.push_back(std::make_unique<Fiber>());
    fibers[id]->start(run_thread);
    threads.push_back({.block = &blocks[id / shape.block],
                       .index = id % shape.block,
                       .observer = {.id = static_cast<uint32_t>(id), .others = nothing},
                       .copies = {}});
  }
  for (Thread& thread : threads) ready.push_back(&thread);

  if (sigsetjmp(after_fault, 0) != 0) {
    char text[64];
    snprintf(text, sizeof(text), ": touches memory at %p, outside all buffers", fault_address);
    failure = name_of(*current) + text;
  }
  while (failure.empty() && !ready.empty()) {
    std::swap(ready[random_order.below(ready.size())], ready.back());
    current = ready.back();
    ready.pop_back();
    threadIdx = {static_cast<unsigned>(current->index), 0, 0};
    blockIdx = {static_cast<unsigned>(current->block->index), 0, 0};
    fiber_of(*current).resume();
  }
  current = nullptr;
  if (failure.empty() && std::any_of(threads.begin(), threads.end(), [](const Thread& t) { return !t.ended; }))
    failure = describe_deadlock();
}

void on_fault(int number, siginfo_t* info, void*) {
  if (current == nullptr) {  // not the kernel's doing
    signal(number, SIG_DFL);
    return;
  }
  fault_address = info->si_addr;
  siglongjmp(after_fault, 1);
}

// While it lives, a fault of a kernel is an error of the launch.
class FaultHandler {
 public:
  FaultHandler() {
    stack_t stack{};
    stack.ss_sp = stack_;
    stack.ss_size = sizeof(stack_);
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  alignas(16) static inline char stack_[64 << 10];
  stack_t old_stack_;
  struct sigaction old_action_;
};

std::string demangled(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) return "kernel";  // it has internal linkage
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = text != nullptr ? text : info.dli_sname;
  std::free(text);
  return name;
}

std::string last_error;

}  // namespace

const char* keep_error(const char* what) {
  last_error = what;
  return last_error.c_str();
}

void run(const void* kernel, const Launch& shape, const std::function<void()>& body) {
  kernel_name = demangled(kernel);
  kernel_body = &body;
  failure.clear();
  if (shape.block < 1 || shape.block > kMaxThreads) refuse("blocks have 1 to 1024 threads");
  if (shape.shared_bytes < 0 || shape.shared_bytes > kMaxSharedBytes)
    refuse("blocks have up to 227 KiB of shared memory");
  if (shape.cluster < 1 || shape.cluster > kMaxCluster) refuse("clusters have 1 to 16 blocks");
  if (shape.grid < 1 || shape.grid > kMaxGrid) refuse("grids have 1 to 2^31 - 1 blocks");
  if (shape.grid % shape.cluster != 0) refuse("the grid is not a multiple of the cluster");
  blockDim = dim3(shape.block);
  gridDim = dim3(static_cast<unsigned>(shape.grid));
  for (Buffer& buffer : buffers) buffer.writers.assign(buffer.bytes, 0);

  std::vector<int64_t> clusters(shape.grid / shape.cluster);
  std::iota(clusters.begin(), clusters.end(), int64_t{0});
  for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[random_order.below(i)]);
  const FaultHandler handler;
  for (const int64_t cluster : clusters) {
    run_cluster(cluster * shape.cluster, shape);
    if (!failure.empty()) refuse(failure);
  }
}

void fail(const std::string& what) {
  failure = name_of(*current) + ": " + what;
  fiber_of(*current).suspend();
  std::abort();  // a fiber that failed is not resumed
}

// --- memory ---

void check_global(const void* pointer, size_t bytes, Use use) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes != 0)
    fail("misaligned access of " + std::to_string(bytes) + " bytes, " + std::to_string(address % bytes) + " too far");
  for (Buffer& buffer : buffers) {
    const ptrdiff_t offset = static_cast<const char*>(pointer) - buffer.begin;
    if (offset < 0 || offset + bytes > buffer.bytes) continue;
    const uint32_t cluster = 1 + current->block->index / static_cast<int64_t>(blocks.size());
    for (size_t i = offset; i < offset + bytes; ++i) {
      uint32_t& writer = buffer.writers[i];
      if (writer != 0 && use == Use::read_only) fail("loads as read-only what its kernel has written");
      // No barrier orders them.
      const bool others = writer != 0 && (writer & ~kAdded) != cluster;
      const bool added = writer == 0 || (writer & kAdded) != 0;
      if (others && !(added && use == Use::add))
        fail(std::string(use == Use::read ? "reads" : "writes") +
             " global memory that another cluster of blocks writes");
      if (use == Use::write) writer = cluster;
      if (use == Use::add && added) writer = kAdded | (others ? kMany : cluster);
    }
    return;
  }
  fail("accesses global memory outside all buffers");
}

size_t shared_size() { return current->block->shared.size(); }

void read_shared(int rank, size_t offset, void* out, size_t bytes) {
  check(shared_memory_of(rank).read(current->observer, offset, out, bytes));
}

void write_shared(int rank, size_t offset, const void* value, size_t bytes) {
  check(shared_memory_of(rank).write(current->observer, offset, value, bytes));
}

void begin_copy(size_t offset, const void* from, size_t bytes) {
  check(current->block->shared.begin_copy(current->observer, offset, bytes));
  current->copies.begin(offset, from, bytes);
}

void commit_copies() { current->copies.commit(); }

void wait_for_copies(int groups) {
  current->copies.wait(groups, [&](size_t offset, const std::vector<char>& bytes, bool same) {
    if (!same) fail("waits for an asynchronous copy of global memory that has changed since the copy began");
    current->block->shared.end_copy(current->observer, offset, bytes.data(), bytes.size());
  });
}

// --- barriers ---

namespace {

std::string described(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line()) + ":" +
         std::to_string(site.column());
}

// Lanes must not meet from two places of the source: mma.sync, ldmatrix and bar.sync are undefined then, and lanes that
// diverged rarely mean to shuffle. Instances of a template are one place.
void check_one_site(const char* name, const Site& first, const Site& site) {
  if (first.line() != site.line() || first.column() != site.column() ||
      std::strcmp(first.file_name(), site.file_name()) != 0)
    fail(std::string(name) + " at " + described(site) + ", while lanes of its warp are in that at " + described(first));
}

}  // namespace

void sync_block(int number, int count, const Site& site) {
  Barrier& barrier = current->block->barriers[number];
  const int block = static_cast<int>(blockDim.x), warp = current->index / kWarp;
  if (count < 1 || count > block || (count != block && count % kWarp != 0))
    fail("a barrier is for whole warps of the block");
  if ((!barrier.parts.empty() || !barrier.arrived.empty()) && barrier.expected != count)
    fail("arrives at a barrier with another number of threads than those before it");
  barrier.expected = count;
  std::vector<Thread*>& part = barrier.parts[warp];
  const char* name = number == 0 ? "sync_block" : "sync_named";
  if (part.empty()) barrier.sites[warp] = site;
  check_one_site(name, barrier.sites[warp], site);
  part.push_back(current);
  if (static_cast<int>(part.size()) == lanes_of_warp(warp)) {
    barrier.arrived.insert(barrier.arrived.end(), part.begin(), part.end());
    barrier.parts.erase(warp);
  }
  if (static_cast<int>(barrier.arrived.size()) == count) meet(std::exchange(barrier.arrived, {}));
  pause(name);
}

std::shared_ptr<const Collective> meet_lanes(const char* name, const Site& site, unsigned mask, const void* value,
                                             size_t bytes, bool orders_memory) {
  const int warp = current->index / kWarp, lane = current->index % kWarp;
  const int lanes = lanes_of_warp(warp);
  if ((mask >> lane & 1) == 0) fail(std::string(name) + ": the mask is without the lane that calls");
  if (lanes < kWarp && mask >> lanes != 0) fail(std::string(name) + ": the mask has lanes that the block has not");
  auto& open = current->block->open[warp];
  auto found = std::find_if(open.begin(), open.end(), [&](const auto& other) {
    return other->mask == mask && std::strcmp(other->name, name) == 0;
  });
  if (found == open.end()) {
    open.push_back(std::make_shared<Collective>(Collective{.name = name, .site = site, .mask = mask, .values = {}}));
    found = open.end() - 1;
  }
  const std::shared_ptr<Collective> collective = *found;
  check_one_site(name, collective->site, site);
  std::memcpy(collective->values[lane], value, bytes);
  collective->arrived |= 1u << lane;
  if (collective->arrived == mask) {
    open.erase(found);
    std::vector<Thread*> arrived;
    for (int i = 0; i < lanes; ++i)
      if ((mask >> i & 1) != 0) arrived.push_back(current - lane + i);
    orders_memory ? meet(arrived) : void(ready.insert(ready.end(), arrived.begin(), arrived.end()));
  }
  pause(name, mask);
  return collective;
}

namespace {

// The cluster's barrier is arrived at, and waited for, by warps as a whole.
void wait_for_warp(const char* name, const Site& site) {
  const unsigned lanes = lanes_of_warp(current->index / kWarp);
  meet_lanes(name, site, ~0u >> (kWarp - lanes), name, 0, false);
}

}  // namespace

int cluster_rank() { return current->block->rank; }
int cluster_size() { return static_cast<int>(blocks.size()); }

void arrive_at_cluster(const Site& site) {
  if (current->cluster_phase >= 0) fail("arrives at the cluster's barrier twice without a wait");
  wait_for_warp("cluster_arrive", site);
  current->cluster_phase = cluster_barrier.phase;
  cluster_barrier.meeting.join(current->observer);
  if (++cluster_barrier.arrived < static_cast<int>(threads.size())) return;
  cluster_barrier.known = cluster_barrier.meeting.end();
  cluster_barrier.arrived = 0;
  ++cluster_barrier.phase;
  for (Thread* thread : std::exchange(cluster_barrier.waiting, {})) ready.push_back(thread);
}

void wait_for_cluster(const Site& site) {
  if (current->cluster_phase < 0) fail("waits for the cluster's barrier without arriving at it");
  wait_for_warp("cluster_wait", site);
  if (current->cluster_phase == cluster_barrier.phase) {
    cluster_barrier.waiting.push_back(current);
    pause("cluster_wait");
  }
  current->cluster_phase = -1;
  Clock known = *cluster_barrier.known;
  raise_to(known, *current->observer.others);
  current->observer.others = std::make_shared<const Clock>(std::move(known));
}

// --- for Python ---

extern "C" {

void cuda_host_seed(uint64_t seed) { random_order = Random(seed); }

// Global memory that begins as many bytes past a multiple of 16 as asked, between pages that fault.
void* cuda_host_allocate(size_t bytes, size_t past_alignment) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const size_t data = (bytes + 16 + page - 1) / page * page;
  auto* mapping = static_cast<char*>(mmap(nullptr, data + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapping == MAP_FAILED || mprotect(mapping + page, data, PROT_READ | PROT_WRITE) != 0) return nullptr;
  char* begin = mapping + page + (data - bytes - past_alignment) / 16 * 16 + past_alignment;
  buffers.push_back({begin, bytes, mapping, data + 2 * page, {}});
  return begin;
}

void cuda_host_free_all() {
  for (const Buffer& buffer : buffers) munmap(buffer.mapping, buffer.mapped);
  buffers.clear();
  fibers.clear();  // each has two mappings, of which a process may have no more than 65530
}

}  // extern "C"

}  // namespace pyllm::cuda_host
