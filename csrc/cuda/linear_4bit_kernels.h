// Products with 4-bit weights: what the operators ask of a CUDA device. Every function launches on a stream and returns
// at once.
#pragma once

#include "cuda/runtime.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

// Which rows of the activations an expert multiplies: from where the one before ends to ends[expert].
struct Grouping {
  int64_t rows, experts;
  const int32_t* ends;  // in the device's memory; null if there is one expert, for all rows
};

struct Linear4bitJob {
  Weight4bit weight;  // [experts, out_features, in_features]
  int64_t out_features, in_features;
  Grouping grouping;
  const void* x;     // [rows, in_features]
  const void* bias;  // [experts, out_features], or null
  void* out;         // [rows, out_features]; zeros where no expert multiplies
  DType dtype;       // of these three
};

// For weights, activations and results of any kind. It reads the weight once for every kGemvRows rows.
cudaError_t linear_4bit_gemv(const Linear4bitJob& job, cudaStream_t stream);
constexpr int64_t kGemvRows = 8;

// By tensor cores, for 16-bit activations; x is aligned to 16 bytes. It reads the weight once for every
// kTensorRows rows.
bool takes_tensor_cores(const Linear4bitJob& job);
cudaError_t linear_4bit_tensor_cores(const Linear4bitJob& job, cudaStream_t stream);
constexpr int64_t kTensorRows = 64;

// out[row] = x[row] @ weight[expert of the row]; zeros where there is none.
struct GroupedProductJob {
  Grouping grouping;
  int64_t inner, columns;
  const void* x;       // [rows, inner]
  const void* weight;  // [experts, inner, columns]
  void* out;           // [rows, columns]
  DType dtype;         // of these three
};
cudaError_t grouped_product(const GroupedProductJob& job, cudaStream_t stream);

}  // namespace bnbops::cuda
