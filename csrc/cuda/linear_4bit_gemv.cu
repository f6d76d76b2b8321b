// Products of a few rows with a 4-bit weight, on the ordinary cores: for fp32, and for what tensor cores cannot take.
//
// The weight's bytes should bound it: a weight is 4 bits and a 64th of an fp32 scale, 0.5625 bytes, of which a
// multiprocessor gets 13 bytes a cycle at most on an A100 and 14.5 on an H100, 26 weights. It can issue 128
// instructions for a lane and look up 32 entries of the codebook in a cycle. A weight and a row take one look-up, two
// instructions to find the entry and one to multiply and add, but the machine code for sm_90 has 12: addresses and
// choices for askew shapes are the rest. That is 11 weights a cycle: instructions still bound it, and it has not been
// measured on a GPU.
//
// A thread block has some output features. Its threads go along the rows of the weight together, eight codes each, so
// that a warp reads 128 bytes of each feature, and every x that is read serves all features.
#include "cuda/decode_4bit.h"
#include "cuda/grouping.h"
#include "cuda/threads.h"

namespace bnbops::cuda {
namespace {

constexpr int kFeatures = 4, kRows = kGemvRows, kWarps = kThreads / kWarp;
constexpr int kGemvResident = 2;  // the sums alone are 32 registers
using Sums = float[kFeatures][kRows];

// Of `count` weights from element `first` on, without the scale that they share, which is returned. Beyond `count`
// there are zeros.
BNBOPS_DEVICE float load_weights(const Weight4bit& weight, const Codebook4bit& codebook, int64_t first, int64_t count,
                                 float (&w)[kOctet]) {
  if (first % kOctet == 0 && count >= kOctet) {
    decode_packed(load_packed(weight.codes, first, count), codebook, 1.0F, w);
    return scale_of_block(weight, block_of(weight, first));
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {  // which may begin within a byte, and end in another block
    const int64_t at = first + i;
    w[i] = i < count
               ? codebook.value[code_4bit(weight.codes[at / 2], at % 2)] * scale_of_block(weight, block_of(weight, at))
               : 0.0F;
  }
  return 1.0F;
}

// A thread's part of the sums.
BNBOPS_DEVICE void multiply(const Linear4bitJob& job, const Codebook4bit& codebook, const Part& part, int64_t row,
                            int rows, Sums& sum) {
  const int64_t features = job.in_features, last = job.out_features - 1;
  for (int64_t k = threadIdx.x * kOctet; k < features; k += kThreads * kOctet) {
    float w[kFeatures][kOctet], scale[kFeatures];
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      const int64_t feature = part.column + f < last ? part.column + f : last;
      const int64_t first = (part.expert * job.out_features + feature) * features + k;
      scale[f] = load_weights(job.weight, codebook, first, features - k, w[f]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float x[kOctet];
      to_floats(load_octet(job.x, job.dtype, (row + r) * features + k, features - k), job.dtype, x);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        float dot = w[f][0] * x[0];
#pragma unroll
        for (int i = 1; i < kOctet; ++i) dot = fused_multiply_add(w[f][i], x[i], dot);
        sum[f][r] = fused_multiply_add(dot, scale[f], sum[f][r]);
      }
    }
  }
}

BNBOPS_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__global__ void __launch_bounds__(kThreads, kGemvResident) gemv_kernel(Linear4bitJob job) {
  __shared__ Codebook4bit codebook;
  __shared__ Sums of_warp[kWarps];
  copy_codebook(job.weight.quant_type, codebook);
  const Part part = part_of_block<kFeatures>(job.grouping, job.out_features);
  if (!part.has_expert) return write_zeros<kFeatures>(part, job.out, job.dtype, job.out_features);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t row = part.row_begin; row < part.row_end; row += kRows) {
    const int rows = part.row_end - row < kRows ? static_cast<int>(part.row_end - row) : kRows;
    __syncthreads();  // the codebook is there, and the last sums have been read
    Sums sum = {};
    multiply(job, codebook, part, row, rows, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        const float total = warp_sum(sum[f][r]);
        if (lane == 0) of_warp[warp][f][r] = total;
      }
    }
    __syncthreads();
    const int f = threadIdx.x % kFeatures, r = threadIdx.x / kFeatures;
    const int64_t feature = part.column + f;
    if (r >= rows || feature >= job.out_features) continue;
    float total = of_warp[0][f][r];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][f][r];  // in this order always
    if (job.bias != nullptr) total += load_element(job.bias, job.dtype, part.expert * job.out_features + feature);
    store_element(job.out, job.dtype, (row + r) * job.out_features + feature, total);
  }
}

}  // namespace

cudaError_t linear_4bit_gemv(const Linear4bitJob& job, cudaStream_t stream) {
  if (job.grouping.rows == 0 || job.out_features == 0) return cudaSuccess;
  LAUNCH(gemv_kernel, grid_of_parts<kFeatures>(job.grouping, job.out_features), dim3(kThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
