// Products of rows with dense matrices, one for each expert: the gradient of grouped products. The ordinary way, by
// square tiles in shared memory, for any dtype, with fp32 arithmetic; not tuned, and without tensor cores.
#include "cuda/grouping.h"
#include "cuda/threads.h"

namespace bnbops::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16;  // of a tile of the result, and of the tiles that are multiplied at a time
constexpr int kOwn = 4;                 // rows and columns of a thread
constexpr int kGroupedResident = 3;
constexpr int kAcross = kTile / kOwn;  // threads side by side
static_assert(kAcross * kAcross == kThreads, "all threads make a tile");

struct Tiles {
  float x[kDepth][kTile + 1];  // transposed; one more, so that a column's elements lie in different banks
  float weight[kDepth][kTile];
};

// Half of the threads load 8 elements of x each, the others 8 of the weight. What lies outside is zero.
BNBOPS_DEVICE void load_tiles(const GroupedProductJob& job, const Part& part, int64_t row, int64_t k, Tiles& tiles) {
  constexpr int kLoaders = kThreads / 2;
  static_assert(kLoaders * kOctet == kTile * kDepth, "an octet for each");
  const int loader = threadIdx.x % kLoaders;
  float values[kOctet];
  if (threadIdx.x < kLoaders) {
    const int r = loader % kTile, first = loader / kTile * kOctet;
    const int64_t count = row + r < part.row_end ? job.inner - k - first : 0;
    to_floats(load_octet(job.x, job.dtype, (row + r) * job.inner + k + first, count), job.dtype, values);
    unrolled<kOctet>([&](int i) { tiles.x[first + i][r] = values[i]; });
  } else {
    const int d = loader / (kTile / kOctet), first = loader % (kTile / kOctet) * kOctet;
    const int64_t count = k + d < job.inner ? job.columns - part.column - first : 0;
    const int64_t at = (part.expert * job.inner + k + d) * job.columns + part.column + first;
    to_floats(load_octet(job.weight, job.dtype, at, count), job.dtype, values);
    unrolled<kOctet>([&](int i) { tiles.weight[d][first + i] = values[i]; });
  }
}

__global__ void __launch_bounds__(kThreads, kGroupedResident) grouped_product_kernel(GroupedProductJob job) {
  __shared__ Tiles tiles;
  const Part part = part_of_block<kTile>(job.grouping, job.columns);
  if (!part.has_expert) return write_zeros<kTile>(part, job.out, job.dtype, job.columns);
  const int own_row = threadIdx.x / kAcross, own_column = threadIdx.x % kAcross;  // and every kAcross-th after it
  for (int64_t row = part.row_begin; row < part.row_end; row += kTile) {
    float sum[kOwn][kOwn] = {};
    for (int64_t k = 0; k < job.inner; k += kDepth) {
      __syncthreads();  // the last tiles have been read
      load_tiles(job, part, row, k, tiles);
      __syncthreads();
      unrolled<kDepth>([&](int d) {
        float x[kOwn], weight[kOwn];
        unrolled<kOwn>([&](int i) {
          x[i] = tiles.x[d][own_row + i * kAcross];
          weight[i] = tiles.weight[d][own_column + i * kAcross];
        });
        unrolled<kOwn * kOwn>([&](int i) {
          float& to = sum[i / kOwn][i % kOwn];
          to = fused_multiply_add(x[i / kOwn], weight[i % kOwn], to);
        });
      });
    }
    unrolled<kOwn>([&](int i) {
      unrolled<kOwn>([&](int j) {
        const int64_t to_row = row + own_row + i * kAcross, column = part.column + own_column + j * kAcross;
        if (to_row >= part.row_end || column >= job.columns) return;
        store_element(job.out, job.dtype, to_row * job.columns + column, sum[i][j]);
      });
    });
  }
}

}  // namespace

cudaError_t grouped_product(const GroupedProductJob& job, cudaStream_t stream) {
  return launch(grouped_product_kernel, grid_of_parts<kTile>(job.grouping, job.columns), stream, job);
}

}  // namespace bnbops::cuda
