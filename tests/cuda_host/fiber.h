// A call stack for each CUDA thread, and the switch between it and the scheduler's.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace pyllm::cuda_host {

#ifdef __x86_64__
// Pushes what a call preserves, leaves the top of this stack in *from and goes on where `to` was left.
extern "C" void pyllm_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type pyllm_switch_stack, @function
pyllm_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

class Fiber {
 public:
  Fiber() : stack_(static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (stack_ == MAP_FAILED || mprotect(stack_ + kGuard, kStack, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack_, kGuard + kStack); }
  Fiber(const Fiber&) = delete;

  // The next resume() calls entry, which must not return, on an empty stack; what was on it is forgotten.
  void start(void (*entry)()) {
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack_ + kGuard + kStack);
    *--top = nullptr;  // entry finds the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    inside_ = top - 6;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_ + kGuard;
    inside_.uc_stack.ss_size = kStack;
    makecontext(&inside_, entry, 0);
#endif
  }

  // From the scheduler into the fiber, until it suspends itself.
  void resume() {
#ifdef __x86_64__
    pyllm_switch_stack(&outside_, inside_);
#else
    swapcontext(&outside_, &inside_);
#endif
  }

  void suspend() {
#ifdef __x86_64__
    pyllm_switch_stack(&inside_, outside_);
#else
    swapcontext(&inside_, &outside_);
#endif
  }

 private:
  static constexpr size_t kStack = 64 << 10, kGuard = 64 << 10;

  char* stack_;
#ifdef __x86_64__
  void *inside_ = nullptr, *outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
};

}  // namespace pyllm::cuda_host
