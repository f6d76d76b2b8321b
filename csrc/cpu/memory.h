// Fresh memory for large results.
#pragma once

#include <cstdint>

#include "check.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bnbops::cpu {

// Asks the system for huge pages under a result that nothing has touched yet. Faulting in a large result 4 KiB at a
// time costs several times what writing it does. Only advice: nothing depends on it.
inline void prefer_huge_pages(Tensor& fresh) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = size_t{8} << 20;
  const size_t bytes = static_cast<size_t>(fresh.numel()) * fresh.element_size();
  if (bytes < kWorthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = (begin + bytes) & ~(kPage - 1);
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace bnbops::cpu
