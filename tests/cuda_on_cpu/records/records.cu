// Prints each kind of record that has bytes no kernel writes, and which bytes. Warps copy records by words, padding and
// all, so NVIDIA's compute-sanitizer (initcheck) would report them.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda/optimizer_kernels.h"
#include "rules/all.h"

using namespace bnbops;
using namespace bnbops::cuda;

namespace {

constexpr int kCount = 3;

// Calls make(memory) twice, with memory that held other bits before: what is the same then was written.
template <class Make>
int unwritten_bytes(const char* kind, const char* name, size_t size, const Make& make) {
  std::vector<uint64_t> zeros(size / 8 + 1, 0), ones(size / 8 + 1, ~uint64_t{0});
  make(zeros.data());
  make(ones.data());
  const auto *a = reinterpret_cast<const uint8_t*>(zeros.data()), *b = reinterpret_cast<const uint8_t*>(ones.data());
  int found = 0;
  for (size_t i = 0; i < size; ++i) {
    if (a[i] != b[i]) std::printf(found++ == 0 ? "%s of %s: %zu" : " %3$zu", kind, name, i);
  }
  if (found > 0) std::printf("\n");
  return found;
}

int of_steps(bool skipped) {
  int found = 0;
  for_each_rule(AllRules{}, [&](auto rule, int index) {
    float steps[kCount] = {};
    StepItem items[kCount] = {};
    for (int i = 0; i < kCount; ++i) items[i].step = steps + i;
    StepCall call{};
    call.items = items;
    call.count = kCount;
    call.common.lr.value = 1e-3;
    call.common.grad_scale.value = 1.0;
    call.common.found_inf.value = skipped;
    found += unwritten_bytes(skipped ? "skipped step" : "step", decltype(rule)::kName, kCount * record_size(index),
                             [&](void* memory) {
                               call.records = memory;
                               step(index, call, nullptr);
                             });
  });
  return found;
}

int of_squares() {
  const SquaresItem items[kCount] = {};
  double norms[kCount];
  return unwritten_bytes("squares", "tensors", sizeof(items), [&](void* memory) {
    squared_norms({items, kCount, 0, static_cast<SquaresItem*>(memory), nullptr, norms}, nullptr);
  });
}

}  // namespace

int main() { return of_steps(false) + of_steps(true) + of_squares() == 0 ? 0 : 1; }
