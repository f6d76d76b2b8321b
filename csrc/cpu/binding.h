// What the bindings of the CPU kernels have in common.
#pragma once

#include <algorithm>

#include "core/host_values.h"
#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

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

struct OnCpu {
  explicit OnCpu(const Tensor& /*like*/) {}
  static Tensor new_result(const Tensor& like, Sizes sizes, ScalarType dtype) {
    Tensor fresh = torch::stable::new_empty(like, sizes, dtype);
    prefer_huge_pages(fresh);
    return fresh;
  }
};

}  // namespace bnbops::cpu
