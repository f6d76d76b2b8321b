// Groups of threads that work on one block of elements together, and the grids they run in.
#pragma once

#include "cuda/device.h"

namespace bnbops::cuda {

constexpr int kThreads = 256;  // of every kernel's thread blocks, unless it says otherwise
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 4;  // thread blocks on a multiprocessor: enough to hide the memory, with 64 registers each

// The largest of the unsigned numbers that the `kSize` threads of a group hold; all of them get it. A group is a part
// of a warp, a warp, or several warps; then all threads of the thread block must call, and `scratch` is shared memory
// of one number for each warp.
template <int kSize>
BNBOPS_DEVICE uint32_t group_max(uint32_t x, uint32_t* scratch) {
  if constexpr (kSize < kWarp) {
#pragma unroll
    for (int step = kSize / 2; step > 0; step /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, x, step);
      x = x > other ? x : other;
    }
    return x;
  } else {
    x = __reduce_max_sync(kAllLanes, x);
    if constexpr (kSize == kWarp) return x;
    constexpr int kOwnWarps = kSize / kWarp;
    const int warp = threadIdx.x / kWarp, first = warp / kOwnWarps * kOwnWarps;
    __syncthreads();  // the last call's numbers have been read
    if (threadIdx.x % kWarp == 0) scratch[warp] = x;
    __syncthreads();
    unrolled<kOwnWarps>([&](int i) { x = x > scratch[first + i] ? x : scratch[first + i]; });
    return x;
  }
}

// All threads of a thread block copy a table into shared memory, by words of 128 bits if it is made for them; a barrier
// must follow.
template <class T>
BNBOPS_DEVICE void copy_table(const T& from, T& to) {
  using Word = std::conditional_t<alignof(T) % sizeof(uint4) == 0, uint4, uint32_t>;
  static_assert(sizeof(T) % sizeof(Word) == 0 && alignof(T) >= alignof(uint32_t));
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < sizeof(T) / sizeof(Word); i += blockDim.x) {
    store_vector(reinterpret_cast<Word*>(&to) + i, load_vector<Word>(reinterpret_cast<const Word*>(&from) + i));
  }
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Thread blocks for so many units of work, each doing some after another: no more than the device can run at a time,
// so that tables in shared memory are filled rarely.
inline dim3 grid_of(int64_t units, int resident = kResident) {
  const int64_t most = int64_t{multiprocessors()} * resident;
  return dim3(static_cast<unsigned>(units < most ? units : most));
}

// Launches a grid, unless it is empty, and tells what CUDA says of this and of earlier launches.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x > 0) LAUNCH(kernel, grid, dim3(kThreads), 0, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
