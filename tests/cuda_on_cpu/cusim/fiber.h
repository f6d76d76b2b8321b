// Fibers: stacks that take turns on one OS thread, with what the sanitizers must be told about each switch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <deque>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUSIM_ASAN
#endif
#if __has_feature(thread_sanitizer)
#define CUSIM_TSAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUSIM_ASAN
#endif
#if defined(__SANITIZE_THREAD__)
#define CUSIM_TSAN
#endif

#ifdef CUSIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUSIM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(CUSIM_UCONTEXT)
#define CUSIM_UCONTEXT
#endif
#ifdef CUSIM_UCONTEXT
#include <ucontext.h>
#endif

// The simulator's own code, which runs between the threads of a kernel: its accesses are no kernel's races.
#define CUSIM_UNWATCHED __attribute__((no_sanitize("thread", "address")))

namespace cusim {

// Happens-before, for the thread sanitizer. A switch alone orders nothing.
inline void release_to(void* object) {
#ifdef CUSIM_TSAN
  __tsan_release(object);
#else
  (void)object;
#endif
}

inline void acquire_from(void* object) {
#ifdef CUSIM_TSAN
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

#ifdef CUSIM_UCONTEXT
struct Context {
  ucontext_t registers;
};

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size;
  makecontext(&context.registers, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#else
struct Context {
  void** stack_pointer;
};

// Saves the registers that a call preserves and loads those of another stack: 2 ns, where swapcontext makes a system
// call.
extern "C" void cusim_switch(void*** save, void** load);
asm(R"(
.pushsection .text
.weak cusim_switch
.hidden cusim_switch
.type cusim_switch, @function
cusim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_switch, . - cusim_switch
.popsection
)");

CUSIM_UNWATCHED inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // the return address of `entry`, which does not return; keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}

CUSIM_UNWATCHED inline void switch_context(Context& from, Context& to) {
  cusim_switch(&from.stack_pointer, to.stack_pointer);
}
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;  // lowest address
  size_t size = 0;
  void* fake_stack = nullptr;  // the address sanitizer's
  void* tsan_fiber = nullptr;  // the thread sanitizer's
};

inline std::deque<Fiber> all_fibers;

// Stacks are kept until the end. A page below each of them stops an overflow.
inline Fiber* new_fiber() {
  constexpr size_t kStack = 256 * 1024, kPage = 4096;
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    std::perror("cusim: stack of a thread");
    std::abort();
  }
  Fiber* fiber = &all_fibers.emplace_back();
  fiber->stack = static_cast<char*>(memory) + kPage;
  fiber->size = kStack;
#ifdef CUSIM_TSAN
  fiber->tsan_fiber = __tsan_create_fiber(0);
#endif
  return fiber;
}

// `from` resumes here when another fiber switches to it; never if it ends.
CUSIM_UNWATCHED inline void switch_fiber(Fiber& from, Fiber& to, bool ends = false) {
  (void)ends;
#ifdef CUSIM_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUSIM_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
  switch_context(from.context, to.context);
#ifdef CUSIM_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// First call on a new fiber; `from` is the one that switched to it, whose stack the address sanitizer tells.
CUSIM_UNWATCHED inline void enter_fiber(Fiber& from) {
  (void)from;
#ifdef CUSIM_ASAN
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.size);
  from.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

}  // namespace cusim
