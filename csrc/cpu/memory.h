// Memory for large results.
#pragma once

#include <cstdint>

#include "core/check.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bnbops::cpu {

constexpr size_t kLargeResult = size_t{8} << 20;  // bytes: more than the cores' own caches hold

// Asks the system for huge pages under a result that nothing has touched yet. Faulting in a large result 4 KiB at a
// time costs several times what writing it does. Only advice: nothing depends on it.
inline void prefer_huge_pages(Tensor& fresh) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const size_t bytes = static_cast<size_t>(fresh.numel()) * fresh.element_size();
  if (bytes < kLargeResult) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = (begin + bytes) & ~(kPage - 1);
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

// Whether to write whole lines of a result past the caches. A store would first read a line that no cache holds, twice
// the work. Memory that nothing has touched yet is different: the system's zeros bring its lines into the caches.
inline bool worth_past_caches(const void* result, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kLine = 64, kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(result);
  if (bytes < kLargeResult || begin % kLine != 0) return false;
  unsigned char touched = 0;
  const uintptr_t page = (begin + bytes / 2) & ~(kPage - 1);
  return mincore(reinterpret_cast<void*>(page), kPage, &touched) == 0 && (touched & 1) != 0;
#else
  (void)result, (void)bytes;
  return false;
#endif
}

}  // namespace bnbops::cpu
