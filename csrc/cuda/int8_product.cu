// Products of int8 matrices, and what follows them.
//
// Few rows read a weight as fast as the memory gives it: 32 rows of weights times 16 of activations is a thread block's
// tile. Its warps take turns along the depth, 64 codes at a time, and lane 4 * g + t of a warp has 16 neighbors of each
// of its rows. Tensor cores want two runs of four from every lane; which ones does not matter, as long as both operands
// agree, since a sum of products has no order. Sums are exact, so that the warps may add theirs in any order too.
#include "core/layout.h"
#include "cuda/int8_epilogue.h"
#include "cuda/mma.h"

namespace bnbops::cuda {
namespace {

constexpr int kTileColumns = 32, kTileRows = 16;  // columns of the product: rows of weights
constexpr int kRun = 16;                          // codes that a lane loads at once
constexpr int kDepth = 4 * kRun;
constexpr int kResidentTiles = 3;  // thread blocks on a multiprocessor: 80 registers a thread, for operands and sums

// Codes k ... k + 15 of a row; zeros beyond its end.
BNBOPS_DEVICE void load_run(const int8_t* row, int64_t k, int64_t inner, uint32_t (&word)[4]) {
  const auto* from = reinterpret_cast<const char*>(row + k);
  if (k + kRun <= inner && is_aligned<uint4>(from)) return load_words(from, word);
  unrolled<4>([&](int w) {
    word[w] = 0;
    unrolled<4>([&](int i) {
      if (k + 4 * w + i < inner) word[w] |= static_cast<uint32_t>(static_cast<uint8_t>(from[4 * w + i])) << (8 * i);
    });
  });
}

// Row i of a matrix; beyond the last one, that one again.
BNBOPS_DEVICE const int8_t* row_of(const int8_t* matrix, int64_t i, int64_t rows, int64_t inner) {
  return matrix + (i < rows ? i : rows - 1) * inner;
}

// Adds the tile's products to its sums in shared memory.
BNBOPS_DEVICE void multiply_tile(const Int8ProductJob& job, int64_t row, int64_t column,
                                 int32_t (&sums)[kTileRows][kTileColumns]) {
  const int warp = threadIdx.x / kWarp, group = threadIdx.x % kWarp / 4, turn = threadIdx.x % 4;
  const int8_t *weight[4], *codes[2];
  unrolled<4>([&](int i) { weight[i] = row_of(job.weight, column + group + 8 * i, job.columns, job.inner); });
  unrolled<2>([&](int i) { codes[i] = row_of(job.codes, row + group + 8 * i, job.rows, job.inner); });
  int32_t part[2][2][4] = {};  // by 16 columns and by 8 rows
  for (int64_t first = warp * kDepth; first < job.inner; first += kWarps * kDepth) {
    const int64_t k = first + turn * kRun;
    uint32_t w[4][4], x[2][4];
    unrolled<4>([&](int i) { load_run(weight[i], k, job.inner, w[i]); });
    unrolled<2>([&](int i) { load_run(codes[i], k, job.inner, x[i]); });
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      unrolled<2>([&](int c) {
        const uint32_t a[4] = {w[2 * c][s], w[2 * c + 1][s], w[2 * c][s + 1], w[2 * c + 1][s + 1]};
        unrolled<2>([&](int r) { multiply_add_int8(part[c][r], a, {x[r][s], x[r][s + 1]}); });
      });
    }
  }
  unrolled<16>([&](int i) {
    const int c = i / 8, r = i / 4 % 2, j = i % 4;
    atomicAdd(&sums[8 * r + 2 * turn + j % 2][16 * c + 8 * (j / 2) + group], part[c][r][j]);
  });
}

using ProductTile = Int8Tile<kTileColumns, kTileRows, 1>;

__global__ void __launch_bounds__(kThreads, kResidentTiles) multiply_kernel(Int8ProductJob job) {
  __shared__ int32_t sums[kTileRows][kTileColumns];
  __shared__ ProductTile::Shared outliers;
  const int64_t tiles = divide_up(job.rows, kTileRows);  // neighbors share a weight's rows
  const int64_t row = blockIdx.x % tiles * kTileRows, column = blockIdx.x / tiles * kTileColumns;
  const int c = threadIdx.x % kTileColumns;
  for (int r = threadIdx.x / kTileColumns; r < kTileRows; r += kThreads / kTileColumns) sums[r][c] = 0;
  __syncthreads();
  multiply_tile(job, row, column, sums);
  __syncthreads();
  if (job.sums == nullptr) {
    const ProductTile tile(job.epilogue, row, column);
    return tile.write(job.outliers, outliers, [&](int r, int32_t (&sum)[kOctet]) {
      unrolled<kOctet>([&](int i) { sum[i] = sums[r][tile.own_column + i]; });
    });
  }
  for (int r = threadIdx.x / kTileColumns; r < kTileRows; r += kThreads / kTileColumns) {
    if (row + r < job.rows && column + c < job.columns) job.sums[(row + r) * job.columns + column + c] = sums[r][c];
  }
}

// ---- the epilogue alone ----------------------------------------------------------------------------------------

constexpr int kSumColumns = kWarp * kOctet, kSumRows = 16;
using SumTile = Int8Tile<kSumColumns, kSumRows, kSumRows / kWarps>;

__global__ void __launch_bounds__(kThreads, kResidentTiles)
    dequantize_sums_kernel(const int32_t* sums, Int8Epilogue epilogue, Int8Outliers outliers) {
  __shared__ SumTile::Shared shared;
  const int64_t tiles = divide_up(epilogue.rows, kSumRows);
  const int64_t row = blockIdx.x % tiles * kSumRows, column = blockIdx.x / tiles * kSumColumns;
  const SumTile tile(epilogue, row, column);
  tile.write(outliers, shared, [&](int r, int32_t (&sum)[kOctet]) {
    const int64_t at = column + tile.own_column;
    const Octet words = load_octet(sums, DType::kFloat32, (row + r) * epilogue.columns + at, epilogue.columns - at);
    unrolled<kOctet>([&](int i) { sum[i] = static_cast<int32_t>(words.word[i]); });
  });
}

dim3 grid_of_tiles(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns) {
  return dim3(static_cast<unsigned>(divide_up(rows, tile_rows) * divide_up(columns, tile_columns)));
}

}  // namespace

cudaError_t multiply(const Int8ProductJob& job, cudaStream_t stream) {
  return launch(multiply_kernel, grid_of_tiles(job.rows, job.columns, kTileRows, kTileColumns), stream, job);
}

cudaError_t dequantize_sums(const int32_t* sums, const Int8Epilogue& epilogue, const Int8Outliers& outliers,
                            cudaStream_t stream) {
  const dim3 grid = grid_of_tiles(epilogue.rows, epilogue.columns, kSumRows, kSumColumns);
  return launch(dequantize_sums_kernel, grid, stream, sums, epilogue, outliers);
}

}  // namespace bnbops::cuda
