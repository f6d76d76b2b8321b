// Kernels with one planted bug each. Without it they pass in every build and order.
#include "harness.h"

namespace {

constexpr int kThreads = 96;

__global__ void copy(const float* x, float* y, int readable, int writable) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = i < readable ? x[i] : 0.0F;
  if (i < writable) y[i] = value;
}

void run_copy(int read_more, int write_more) {
  constexpr int n = 1000;
  auto x = array<float>(n), y = array<float>(n);
  for (int i = 0; i < n; i++) x[i] = i;
  LAUNCH(copy, n / kThreads + 1, kThreads, 0, nullptr, x.get(), y.get(), n + read_more, n + write_more);
  for (int i = 0; i < n; i++) EXPECT_EQUAL(y[i], x[i]);
}

__attribute__((noinline)) void store_through(int* p) { *p = threadIdx.x; }

template <bool bug>
__global__ void static_shared(int* y) {
  __shared__ int tile[kThreads];
  tile[threadIdx.x + bug] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

template <bool bug>
__global__ void shared_by_pointer(int* y) {
  __shared__ int tile[kThreads];
  int* p = tile;
  store_through(p + threadIdx.x + bug);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

template <bool bug>
__global__ void dynamic_shared(int* y) {
  DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x + bug] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// In forward order a thread's left neighbor has always written.
template <bool bug>
__global__ void shift(int* y) {
  __shared__ int tile[kThreads];
  tile[threadIdx.x] = threadIdx.x;
  if (!bug) __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ? threadIdx.x - 1 : 0];
}

void check_shift(void (*kernel)(int*), int threads, size_t shared_bytes = 0) {
  auto y = array<int>(threads);
  LAUNCH(kernel, 1, threads, shared_bytes, nullptr, y.get());
  for (int i = 0; i < threads; i++) EXPECT_EQUAL(y[i], i ? i - 1 : 0);
}

// The tile is filled again while others still read it.
template <bool bug>
__global__ void refill(int* y) {
  __shared__ int tile[kThreads];
  int sum = 0;
  for (int round = 0; round < 3; round++) {
    tile[threadIdx.x] = round;
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads] + tile[(threadIdx.x + kThreads - 1) % kThreads];
    if (!bug) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// A shuffle orders no accesses to memory, a barrier of the warp does.
template <bool bug>
__global__ void shift_in_warp(int* y) {
  __shared__ int tile[32];
  tile[threadIdx.x] = threadIdx.x;
  if (bug) {
    __shfl_sync(~0U, 0, 0);
  } else {
    __syncwarp();
  }
  y[threadIdx.x] = tile[threadIdx.x ? threadIdx.x - 1 : 0];
}

// Lane 0 writes again what lane 1 still reads after the barrier.
template <bool bug>
__global__ void rewrite_in_warp(int* y) {
  __shared__ int first;
  if (threadIdx.x == 0) first = 1;
  __syncwarp();
  y[threadIdx.x] = first;
  if (!bug) __syncwarp();
  if (threadIdx.x == 0) first = 1;
  __syncwarp();
}

// Lanes leave one by one; the others' barrier does not wait for them.
__global__ void leave_one_by_one(int* y) {
  for (unsigned i = 0; i < 32; i++) {
    if (threadIdx.x == i) return;
    __syncwarp();
    if (threadIdx.x == i + 1) *y += 1;
    __syncwarp();
  }
}

template <bool bug>
__global__ void count(int* y) {
  if (bug) {
    *y += 1;
  } else {
    atomicAdd(y, 1);
  }
}

// Adds its neighbor's result, which another block computes.
template <bool bug>
__global__ void chain(int* y) {
  const int i = blockIdx.x;
  y[i] = i + (bug && i ? y[i - 1] - (i - 1) : 0);
}

template <bool bug>
__global__ void two_barriers() {
  if (bug && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// An odd thread meets the barrier after the loop while the others are in it.
template <bool bug>
__global__ void barrier_in_loop() {
  const int rounds = bug ? 1 + threadIdx.x % 2 : 2;
  for (int i = 0; i < rounds; i++) __syncthreads();
  __syncthreads();
}

template <bool bug>
__global__ void shuffle_or_barrier() {
  if (bug && threadIdx.x == 5) __syncthreads();
  __shfl_xor_sync(~0U, 1, 1);
  __syncthreads();
}

template <bool bug>
__global__ void shuffle_at_two_places(int* y) {
  if (bug && threadIdx.x < 16) {
    y[threadIdx.x] = __shfl_xor_sync(~0U, 1, 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(~0U, 1, 1);
  }
}

template <class T>
__global__ void copy_vectors(const char* x, char* y) {
  const int i = threadIdx.x * sizeof(T);
  store_vector(y + i, load_vector<T>(x + i));
}

template <class T>
__global__ void copy_plainly(const char* x, char* y) {
  reinterpret_cast<T*>(y)[threadIdx.x] = reinterpret_cast<const T*>(x)[threadIdx.x];
}

void run_vectors(void (*kernel)(const char*, char*), int load_at, int store_at) {
  auto x = array<char>(kThreads * 16 + 16), y = array<char>(kThreads * 16 + 16);
  for (int i = 0; i < kThreads * 16; i++) x[load_at + i] = static_cast<char>(i);
  LAUNCH(kernel, 1, kThreads, 0, nullptr, x.get() + load_at, y.get() + store_at);
  for (int i = 0; i < kThreads * 16; i++) EXPECT_EQUAL(y[store_at + i], x[load_at + i]);
}

template <bool bug>
__global__ void shuffle_after_exit(int* y) {
  if (threadIdx.x >= 20) return;
  y[threadIdx.x] = __shfl_xor_sync(bug ? ~0U : (1U << 20) - 1, static_cast<int>(threadIdx.x), 1);
}

template <unsigned mask, int source>
__global__ void shuffle_by_mask(int* y) {
  if (threadIdx.x < 20) y[threadIdx.x] = __shfl_sync(mask, static_cast<int>(threadIdx.x), source);
}

template <unsigned mask, int source>
void run_shuffle_by_mask() {
  auto y = array<int>(20);
  LAUNCH((shuffle_by_mask<mask, source>), 1, 32, 0, nullptr, y.get());
  for (int i = 0; i < 20; i++) EXPECT_EQUAL(y[i], source);
}

// Only the first block fills the table: the others would find it filled if shared memory carried over.
template <bool bug>
inline __device__ void fill(int* table) {
  if (!bug || blockIdx.x == gridDim.x / 2) table[threadIdx.x] = threadIdx.x;
  __syncthreads();
}

template <bool bug>
__global__ void static_table(int* y) {
  __shared__ int table[32];
  fill<bug>(table);
  y[blockIdx.x * 32 + threadIdx.x] = table[threadIdx.x ^ 1];
}

template <bool bug>
__global__ void dynamic_table(int* y) {
  DYNAMIC_SHARED(int, table);
  fill<bug>(table);
  y[blockIdx.x * 32 + threadIdx.x] = table[threadIdx.x ^ 1];
}

inline __device__ int* table_of_inline_function() {
  __shared__ int table[32];
  return table;
}

template <bool bug>
__global__ void inline_table(int* y) {
  int* table = table_of_inline_function();
  fill<bug>(table);
  y[blockIdx.x * 32 + threadIdx.x] = table[threadIdx.x ^ 1];
}

void run_table(void (*kernel)(int*)) {
  auto y = array<int>(3 * 32);
  LAUNCH(kernel, 3, 32, 32 * sizeof(int), nullptr, y.get());
  for (int i = 0; i < 3 * 32; i++) EXPECT_EQUAL(y[i], i % 32 ^ 1);
}

// Two buffers: while one is read, the next tile is on its way to the other.
enum class Pipeline { kRight, kNoWait, kWaitTooLittle, kNoBarrier };

template <Pipeline pipeline>
__global__ void pipelined_sum(const int4* x, unsigned* y, int tiles) {
  DYNAMIC_SHARED(int4, buffers);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      cusim::cp_async<16>(buffers + tile % 2 * blockDim.x + threadIdx.x, x + tile * blockDim.x + threadIdx.x);
    }
    cusim::cp_async_commit();
  };
  fetch(0);
  unsigned sum = 0;
  for (int tile = 0; tile < tiles; tile++) {
    fetch(tile + 1);
    if (pipeline != Pipeline::kNoWait) cusim::cp_async_wait<pipeline == Pipeline::kWaitTooLittle ? 2 : 1>();
    if (pipeline != Pipeline::kNoBarrier) __syncthreads();
    sum += buffers[tile % 2 * blockDim.x + (threadIdx.x + blockDim.x - 1) % blockDim.x].w;
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}

template <Pipeline pipeline>
void run_pipeline() {
  constexpr int kTiles = 5;
  auto x = array<int4>(kTiles * kThreads);
  auto y = array<unsigned>(kThreads);
  for (int i = 0; i < kTiles * kThreads; i++) x[i].w = i;
  LAUNCH(pipelined_sum<pipeline>, 1, kThreads, 2 * kThreads * sizeof(int4), nullptr, x.get(), y.get(), kTiles);
  for (int i = 0; i < kThreads; i++) {
    unsigned sum = 0;
    for (int tile = 0; tile < kTiles; tile++) sum += x[tile * kThreads + (i + kThreads - 1) % kThreads].w;
    EXPECT_EQUAL(y[i], sum);
  }
}

template <bool bug>
__global__ void copy_to_global(const int* x, int* y) {
  DYNAMIC_SHARED(int, tile);
  cusim::cp_async<4>(bug ? y : tile, x);
  cusim::cp_async_wait_all();
  *y = *tile;
}

}  // namespace

BUG(global_read) { run_copy(bug, 0); }
BUG(global_write) { run_copy(0, bug); }
BUG(shared_write) {
  auto y = array<int>(kThreads);
  LAUNCH(static_shared<bug>, 1, kThreads, 0, nullptr, y.get());
  for (int i = 0; i < kThreads; i++) EXPECT_EQUAL(y[i], i);
}
BUG(shared_write_by_pointer) {
  auto y = array<int>(kThreads);
  LAUNCH(shared_by_pointer<bug>, 1, kThreads, 0, nullptr, y.get());
  for (int i = 0; i < kThreads; i++) EXPECT_EQUAL(y[i], i);
}
BUG(dynamic_shared_write) {
  auto y = array<int>(kThreads);
  LAUNCH(dynamic_shared<bug>, 1, kThreads, kThreads * sizeof(int), nullptr, y.get());
  for (int i = 0; i < kThreads; i++) EXPECT_EQUAL(y[i], i);
}
BUG(missing_barrier) { check_shift(shift<bug>, kThreads); }
BUG(missing_barrier_before_refill) {
  auto y = array<int>(kThreads);
  LAUNCH(refill<bug>, 1, kThreads, 0, nullptr, y.get());
  for (int i = 0; i < kThreads; i++) EXPECT_EQUAL(y[i], 6);
}
BUG(shuffle_as_barrier) { check_shift(shift_in_warp<bug>, 32); }
BUG(missing_warp_barrier) {
  auto y = array<int>(32);
  LAUNCH(rewrite_in_warp<bug>, 1, 32, 0, nullptr, y.get());
  for (int i = 0; i < 32; i++) EXPECT_EQUAL(y[i], 1);
}
TEST(warp_barrier_ignores_exited_lanes) {
  int y = 0;
  LAUNCH(leave_one_by_one, 1, 32, 0, nullptr, &y);
  EXPECT_EQUAL(y, 31);
}
BUG(sum_without_atomic) {
  int y = 0;
  LAUNCH(count<bug>, 3, kThreads, 0, nullptr, &y);
  EXPECT_EQUAL(y, 3 * kThreads);
}
BUG(block_needs_another) {
  auto y = array<int>(9);
  for (int i = 0; i < 9; i++) y[i] = -1;
  LAUNCH(chain<bug>, 9, 1, 0, nullptr, y.get());
  for (int i = 0; i < 9; i++) EXPECT_EQUAL(y[i], i);
}
BUG(divergent_barrier) { LAUNCH(two_barriers<bug>, 1, kThreads, 0, nullptr); }
BUG(divergent_loop) { LAUNCH(barrier_in_loop<bug>, 1, kThreads, 0, nullptr); }
BUG(lane_at_barrier) { LAUNCH(shuffle_or_barrier<bug>, 1, kThreads, 0, nullptr); }
BUG(divergent_shuffle) {
  auto y = array<int>(32);
  LAUNCH(shuffle_at_two_places<bug>, 1, 32, 0, nullptr, y.get());
}
BUG(misaligned_load) { run_vectors(copy_vectors<uint4>, 8 * bug, 0); }
BUG(misaligned_store) { run_vectors(copy_vectors<float4>, 0, 4 * bug); }
BUG(misaligned_plain_load) { run_vectors(copy_plainly<uint4>, 8 * bug, 0); }
BUG(shuffle_names_exited_lane) {
  auto y = array<int>(20);
  LAUNCH(shuffle_after_exit<bug>, 1, 32, 0, nullptr, y.get());
  for (int i = 0; i < 20; i++) EXPECT_EQUAL(y[i], i ^ 1);
}
BUG(mask_without_caller) { run_shuffle_by_mask<bug ? 0x7FFFF : 0xFFFFF, 3>(); }
BUG(shuffle_reads_beyond_mask) { run_shuffle_by_mask<0xFFFFF, bug ? 25 : 3>(); }
BUG(static_table_kept) { run_table(static_table<bug>); }
BUG(inline_table_kept) { run_table(inline_table<bug>); }
BUG(dynamic_table_kept) { run_table(dynamic_table<bug>); }
BUG(missing_wait) { run_pipeline<bug ? Pipeline::kNoWait : Pipeline::kRight>(); }
BUG(wait_for_older_copy) { run_pipeline<bug ? Pipeline::kWaitTooLittle : Pipeline::kRight>(); }
BUG(missing_barrier_after_wait) { run_pipeline<bug ? Pipeline::kNoBarrier : Pipeline::kRight>(); }
BUG(async_copy_to_global) {
  auto x = array<int>(1), y = array<int>(1);
  LAUNCH(copy_to_global<bug>, 1, 1, sizeof(int), nullptr, x.get(), y.get());
}
