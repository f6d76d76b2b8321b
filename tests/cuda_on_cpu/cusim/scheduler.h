// Threads, warps and blocks: who runs, who waits for whom, and what is wrong when nobody can go on.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cusim/fiber.h"
#include "cusim/order.h"
#include "cusim/types.h"

namespace cusim {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// A place in the source: threads meet only where they wait at the same one.
struct Site {
  const char* file;
  unsigned line;

  static constexpr Site here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return {file, line};
  }
};

CUSIM_UNWATCHED inline bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

struct Warp;

// A copy of cp.async that is under way: its bytes reach shared memory when the thread waits for them.
struct AsyncCopy {
  char* to;
  char bytes[16];
  unsigned size;
  unsigned group;
};

struct Thread {
  uint3 index;
  unsigned lane;
  Warp* warp;
  Fiber* fiber;
  Site site;               // where it waits
  unsigned mask;           // the lanes for which it waits
  const void* collective;  // the operation that these perform together
  void* operands;          // what it brings to it and takes from it
  std::vector<AsyncCopy> copies;
  unsigned copy_group;
};

// One bit a lane. A lane that exists is in one of these.
struct Warp {
  unsigned ready;     // running or able to
  unsigned at_warp;   // in an operation of the warp
  unsigned at_block;  // at a barrier of the block
  unsigned exited;    // ended, or never was
  Thread* threads;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  unsigned threads, warps;
};

inline Block block;              // the one that runs
inline Thread* current;          // the thread that runs
inline const char* kernel_name;  // for messages
inline std::unique_ptr<Thread[]> all_threads;
inline std::unique_ptr<Warp[]> all_warps;
inline Fiber scheduler;
inline Order order;
inline void (*thread_body)(void*);
inline void* thread_arguments;

// Objects of the happens-before order. Each event has its own, or what one thread does after the event would come
// before what another does there: start and end of the block, one barrier and the next.
inline char block_starts, block_waits[2], block_ends;
inline unsigned barriers_opened;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  const uint3 thread = current ? current->index : uint3{0, 0, 0};
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cusim: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, " in kernel %s block (%u,%u,%u) thread (%u,%u,%u)\n", kernel_name ? kernel_name : "(none)",
               block.index.x, block.index.y, block.index.z, thread.x, thread.y, thread.z);
  va_end(arguments);
  std::abort();
}

// -------------------------------------------------------------------------------------------------- in a thread

CUSIM_UNWATCHED inline void suspend() { switch_fiber(*current->fiber, scheduler); }

CUSIM_UNWATCHED inline void thread_main() {
  enter_fiber(scheduler);
  acquire_from(&block_starts);
  thread_body(thread_arguments);
  release_to(&block_ends);
  Warp& warp = *current->warp;
  warp.ready &= ~(1U << current->lane);
  warp.exited |= 1U << current->lane;
  switch_fiber(*current->fiber, scheduler, true);
}

// What the threads that arrive at one barrier say of a predicate; those at the next one have votes of their own.
struct Votes {
  unsigned yes, no;
};
inline Votes barrier_votes[2];

CUSIM_UNWATCHED inline Votes wait_for_block(Site site, bool predicate = false) {
  Thread& me = *current;
  Votes& votes = barrier_votes[barriers_opened % 2];
  (predicate ? votes.yes : votes.no)++;
  char* waits = &block_waits[barriers_opened % 2];
  release_to(waits);
  me.site = site;
  me.warp->ready &= ~(1U << me.lane);
  me.warp->at_block |= 1U << me.lane;
  suspend();
  acquire_from(waits);
  return votes;
}

// Whether the live lanes of the thread's mask wait for each other in the same operation at the same place.
CUSIM_UNWATCHED inline bool together(const Warp& warp, const Thread& me) {
  const unsigned live = me.mask & ~warp.exited;
  if ((warp.at_warp & live) != live) return false;
  for (unsigned left = live; left; left &= left - 1) {
    const Thread& other = warp.threads[__builtin_ctz(left)];
    if ((other.mask & ~warp.exited) != live || other.collective != me.collective || !(other.site == me.site)) {
      return false;
    }
  }
  return true;
}

template <class Operands>
using Combine = void(Operands* const (&lanes)[kWarpSize], unsigned mask);

template <class Operands>
CUSIM_UNWATCHED inline void perform(Warp& warp, unsigned mask, Combine<Operands>* combine) {
  Operands* lanes[kWarpSize] = {};
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    lanes[lane] = static_cast<Operands*>(warp.threads[lane].operands);
  }
  combine(lanes, mask);
  warp.at_warp &= ~mask;
  warp.ready |= mask;
}

// An operation that the lanes of `mask` perform together. The last to arrive does it for all: `combine` gets each
// lane's operands and leaves the results in them. It orders no accesses to memory, as in CUDA.
template <class Operands>
CUSIM_UNWATCHED inline void collective(unsigned mask, Operands& operands, Combine<Operands>* combine, Site site) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1)) fail("%s:%u: mask %08x lacks the calling lane %u", site.file, site.line, mask, me.lane);
  if (const unsigned gone = mask & warp.exited) {
    fail("%s:%u: mask %08x names lane %d, which has exited", site.file, site.line, mask, __builtin_ctz(gone));
  }
  me.mask = mask;
  me.site = site;
  me.collective = reinterpret_cast<const void*>(combine);
  me.operands = &operands;
  warp.ready &= ~(1U << me.lane);
  warp.at_warp |= 1U << me.lane;
  if (together(warp, me)) {
    perform(warp, mask, combine);
  } else {
    suspend();
  }
}

struct WarpBarrier {
  char arrives, leaves;

  CUSIM_UNWATCHED static void combine(WarpBarrier* const (&lanes)[kWarpSize], unsigned mask) {
    for (unsigned left = mask; left; left &= left - 1) acquire_from(&lanes[__builtin_ctz(left)]->arrives);
    for (unsigned left = mask; left; left &= left - 1) release_to(&lanes[__builtin_ctz(left)]->leaves);
  }
};

// Unlike the other operations of a warp, its barrier orders accesses to memory, and exited lanes do not count.
CUSIM_UNWATCHED inline void wait_for_warp(unsigned mask, Site site) {
  WarpBarrier barrier;
  release_to(&barrier.arrives);
  collective(mask & ~current->warp->exited, barrier, WarpBarrier::combine, site);
  acquire_from(&barrier.leaves);
}

// ----------------------------------------------------------------------------------------------- in the scheduler

// The thread sanitizer's picture of a stack belongs to one thread; else a stack that just became free is the warmest.
inline std::vector<Fiber*> free_fibers, fiber_of_thread;

CUSIM_UNWATCHED inline Fiber* fiber_for(unsigned thread) {
#ifdef CUSIM_TSAN
  return fiber_of_thread[thread];
#else
  (void)thread;
  if (free_fibers.empty()) return new_fiber();
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  return fiber;
#endif
}

CUSIM_UNWATCHED inline void resume(Thread& thread) {
  if (!thread.fiber) {
    thread.fiber = fiber_for(static_cast<unsigned>(&thread - all_threads.get()));
    prepare(thread.fiber->context, thread.fiber->stack, thread.fiber->size, thread_main);
  }
  current = &thread;
  switch_fiber(scheduler, *thread.fiber);
  current = nullptr;
#ifndef CUSIM_TSAN
  if (thread.warp->exited >> thread.lane & 1) free_fibers.push_back(thread.fiber);
#endif
}

// No lane of the warp can run, but some wait for lanes that will never come.
[[noreturn]] CUSIM_UNWATCHED inline void fail_stalled(const Warp& warp) {
  Thread& waiting = warp.threads[__builtin_ctz(warp.at_warp)];
  current = &waiting;
  const Site at = waiting.site;
  for (unsigned left = waiting.mask & ~warp.exited; left; left &= left - 1) {
    const Thread& other = warp.threads[__builtin_ctz(left)];
    if (warp.at_block >> other.lane & 1 || !(other.site == at) || other.mask != waiting.mask) {
      fail("%s:%u: divergent warp: mask %08x names lane %u, which waits at %s:%u with mask %08x", at.file, at.line,
           waiting.mask, other.lane, other.site.file, other.site.line, other.mask);
    }
  }
  if (const unsigned gone = waiting.mask & warp.exited) {
    fail("%s:%u: mask %08x names lane %d, which has exited", at.file, at.line, waiting.mask, __builtin_ctz(gone));
  }
  fail("%s:%u: divergent warp: its lanes wait in different operations", at.file, at.line);
}

// A barrier of the warp may wait only for lanes that have exited meanwhile.
CUSIM_UNWATCHED inline bool open_warp_barrier(Warp& warp) {
  for (unsigned left = warp.at_warp; left; left &= left - 1) {
    const Thread& thread = warp.threads[__builtin_ctz(left)];
    if (thread.collective != reinterpret_cast<const void*>(WarpBarrier::combine) || !together(warp, thread)) continue;
    perform(warp, thread.mask & ~warp.exited, WarpBarrier::combine);
    return true;
  }
  return false;
}

CUSIM_UNWATCHED inline void run_warp(Warp& warp) {
  while (warp.ready || open_warp_barrier(warp)) {
    const Permutation lanes = order.next(kWarpSize);
    uint64_t lane = lanes.first;
    for (unsigned i = 0; i < kWarpSize; i++, lane = lanes.after(lane)) {
      if (warp.ready >> lane & 1) resume(warp.threads[lane]);
    }
  }
  if (warp.at_warp) fail_stalled(warp);
}

// Lets the threads that wait at the block's barrier go on; false if there are none. Exited threads do not count.
CUSIM_UNWATCHED inline bool open_barrier() {
  Thread* first = nullptr;
  barriers_opened++;
  barrier_votes[barriers_opened % 2] = {0, 0};
  for (unsigned w = 0; w < block.warps; w++) {
    Warp& warp = all_warps[w];
    for (unsigned left = warp.at_block; left; left &= left - 1) {
      Thread& thread = warp.threads[__builtin_ctz(left)];
      if (!first) first = &thread;
      if (thread.site == first->site) continue;
      current = &thread;
      fail("%s:%u: divergent barrier: thread (%u,%u,%u) waits at %s:%u", thread.site.file, thread.site.line,
           first->index.x, first->index.y, first->index.z, first->site.file, first->site.line);
    }
    warp.ready = warp.at_block;
    warp.at_block = 0;
  }
  return first != nullptr;
}

CUSIM_UNWATCHED inline void run_block() {
  release_to(&block_starts);
  do {
    const Permutation warps = order.next(block.warps);
    uint64_t warp = warps.first;
    for (unsigned i = 0; i < block.warps; i++, warp = warps.after(warp)) run_warp(all_warps[warp]);
  } while (open_barrier());
  acquire_from(&block_ends);
}

// Puts all threads of the block at their start.
CUSIM_UNWATCHED inline void reset_block() {
  uint3 index = {0, 0, 0};
  for (unsigned i = 0; i < block.threads; i++) {
    Thread& thread = all_threads[i];
    thread.index = index;
    thread.lane = i % kWarpSize;
    thread.warp = &all_warps[i / kWarpSize];
    thread.fiber = nullptr;
    thread.copies.clear();
    thread.copy_group = 0;
    if (++index.x == block.size.x) {
      index.x = 0;
      if (++index.y == block.size.y) index.y = 0, index.z++;
    }
  }
  for (unsigned w = 0; w < block.warps; w++) {
    const unsigned rest = block.threads - w * kWarpSize;
    const unsigned exists = rest < kWarpSize ? (1U << rest) - 1 : kAllLanes;
    all_warps[w] = {exists, 0, 0, ~exists, &all_threads[w * kWarpSize]};
  }
}

}  // namespace cusim

#define threadIdx (cusim::current->index)
#define blockIdx (cusim::block.index)
#define blockDim (cusim::block.size)
#define gridDim (cusim::block.grid)
#define warpSize (static_cast<int>(cusim::kWarpSize))
