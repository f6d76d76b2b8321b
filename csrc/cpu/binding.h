// What the bindings of the CPU kernels have in common.
#pragma once

#include <algorithm>

#include "core/host_values.h"
#include "core/layout.h"
#include "cpu/kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bnbops::cpu {

constexpr int64_t kThreadElements = 32768;  // what is worth a thread

// Calls work(first, last) on ranges of n pieces of so many elements each.
template <class Work>
void in_parallel(int64_t n, int64_t elements, int64_t grain, const Work& work) {
  if (n > 0) torch::stable::parallel_for(0, n, divide_up(grain, std::max<int64_t>(elements, 1)), work);
}

// The same with a kernel.
template <class Job>
void in_parallel(int64_t n, int64_t elements, void (*kernel)(const Job&, int64_t, int64_t), const Job& job,
                 int64_t grain = kThreadElements) {
  in_parallel(n, elements, grain, [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

// ---- memory for large results ------------------------------------------------------------------------------------

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

// What devices of operators have.
struct OnCpu {
  explicit OnCpu(const Tensor& /*like*/) {}
  static Tensor new_result(const Tensor& like, Sizes sizes, ScalarType dtype) {
    Tensor fresh = torch::stable::new_empty(like, sizes, dtype);
    prefer_huge_pages(fresh);
    return fresh;
  }
};

}  // namespace bnbops::cpu
