// Sums in the order of norm_math.h. A lane has eight neighbouring columns of the 256, or a thread has one.
#pragma once

#include "cuda/elements.h"
#include "cuda/many_tensors.h"
#include "ops/norms/norm_math.h"

namespace bnbops::cuda {

static_assert(kColumns == kWarp * kOctet && kColumns == kThreads);

BNBOPS_DEVICE void add_squares(const float (&x)[kOctet], double (&column)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const double value = counted(x[i]);
    column[i] = __fma_rn(value, value, column[i]);  // the square of a float is exact either way
  }
}

// Of the columns of all lanes, neighbours first.
BNBOPS_DEVICE double sum_over_warp(double column) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) column += __shfl_xor_sync(kAllLanes, column, step);
  return column;
}

BNBOPS_DEVICE double sum_of_columns(const double (&column)[kOctet]) {
  return sum_over_warp(((column[0] + column[1]) + (column[2] + column[3])) +
                       ((column[4] + column[5]) + (column[6] + column[7])));
}

// A thread block sums up the pieces of its tensor.
template <class Record>
__global__ void __launch_bounds__(kThreads, kResident)
    sum_pieces_kernel(const Record* records, const double* pieces, double* sums) {
  __shared__ double of_warp[kWarps];
  const int64_t end = records[blockIdx.x].end;
  double column = 0;
#pragma unroll 8
  for (int64_t i = records[blockIdx.x].first + threadIdx.x; i < end; i += kColumns) column += pieces[i];
  column = sum_over_warp(column);
  if (lane_of_warp() == 0) of_warp[warp_of_block()] = column;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2) {
#pragma unroll
    for (int i = 0; i < kWarps; i += 2 * step) of_warp[i] += of_warp[i + step];
  }
  sums[blockIdx.x] = of_warp[0];
}

}  // namespace bnbops::cuda
