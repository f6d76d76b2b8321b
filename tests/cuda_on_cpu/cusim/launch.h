// Kernel launches.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "cusim/memory.h"
#include "cusim/scheduler.h"

namespace cusim {

constexpr size_t kSharedByDefault = 48 * 1024;  // of any compute capability
constexpr unsigned kThreadsAtMost = 1024;

inline std::mutex one_launch;
inline std::map<const void*, size_t> shared_limits;  // by kernel, where cudaFuncSetAttribute raised it
inline std::set<const void*> launched;               // kernels that ran since they were last asked for

inline cudaError_t check_launch(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes) {
  const auto at_most = [](dim3 d, uint64_t x, uint64_t y, uint64_t z) {
    return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= x && d.y <= y && d.z <= z;
  };
  if (!at_most(grid, 0x7FFFFFFF, 65535, 65535) || !at_most(size, 1024, 1024, 64) ||
      uint64_t{size.x} * size.y * size.z > kThreadsAtMost) {
    return cudaErrorInvalidConfiguration;
  }
  const auto raised = shared_limits.find(kernel);
  const size_t limit = raised == shared_limits.end() ? kSharedByDefault : raised->second;
  return shared_bytes <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

inline void prepare_launch(dim3 grid, dim3 size, size_t shared_bytes) {
  scheduler.tsan_fiber = nullptr;
#ifdef CUSIM_TSAN
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  order.read_environment();
  if (!all_threads) {
    all_threads.reset(new Thread[kThreadsAtMost]);
    all_warps.reset(new Warp[kThreadsAtMost / kWarpSize]);
  }
  static_shared = find_static_shared();  // each OS thread has its own
  const unsigned threads = size.x * size.y * size.z;
#ifdef CUSIM_TSAN
  while (fiber_of_thread.size() < threads) fiber_of_thread.push_back(new_fiber());
#endif
  dynamic_shared = {std::unique_ptr<char[]>(new char[shared_bytes]), shared_bytes};
  block = {{0, 0, 0}, size, grid, threads, (threads + kWarpSize - 1) / kWarpSize};
}

// Runs `body(arguments)` once for each thread of the grid.
inline void run_grid(const char* name, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*),
                     void* arguments) {
  prepare_launch(grid, size, shared_bytes);
  kernel_name = name;
  thread_body = body;
  thread_arguments = arguments;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const Permutation indices = order.next(blocks);
  uint64_t index = indices.first;
  for (uint64_t i = 0; i < blocks; i++, index = indices.after(index)) {
    block.index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y)};
    reset_block();
    poison_shared();
    run_block();
  }
  kernel_name = nullptr;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const cudaError_t error = check_launch(reinterpret_cast<const void*>(kernel), grid, size, shared_bytes);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  launched.insert(reinterpret_cast<const void*>(kernel));
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  auto thread = [&] { std::apply(kernel, parameters); };
  run_grid(name, grid, size, shared_bytes, [](void* self) { (*static_cast<decltype(thread)*>(self))(); }, &thread);
}

}  // namespace cusim

// For tests: a kernel of this library that ran, which is forgotten with this; null where there is none left.
extern "C" __attribute__((used, visibility("default"))) inline const void* cusim_take_launched() {
  const std::lock_guard<std::mutex> guard(cusim::one_launch);
  if (cusim::launched.empty()) return nullptr;
  return cusim::launched.extract(cusim::launched.begin()).value();
}

// The kernel runs to its end before this returns.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cusim::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > cusim::kSharedAtMost) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> guard(cusim::one_launch);
  cusim::shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
