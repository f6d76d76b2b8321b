// What the operators ask of a CUDA device. Every function launches on a stream and returns at once.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/jobs.h"

namespace bnbops::cuda {

cudaError_t quantize(const QuantizeJob& job, cudaStream_t stream);
cudaError_t dequantize(const DequantizeJob& job, cudaStream_t stream);

// ---- 4-bit weights -------------------------------------------------------------------------------------------------

cudaError_t quantize_4bit(const QuantizeJob& job, cudaStream_t stream);
cudaError_t dequantize_4bit(const Weight4bit& weight, int64_t numel, void* out, DType dtype, cudaStream_t stream);
// An index out of range is a failed assertion on the device; nothing is read for it.
cudaError_t look_up_4bit(const LookUpJob& job, cudaStream_t stream);

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

// ---- int8 ----------------------------------------------------------------------------------------------------------

// The columns of x that stay in floating point. Only the device knows how many they are.
struct Int8Outliers {
  const void* x;           // [rows, inner], of the result's dtype; null if there are no outliers
  const int32_t* columns;  // in ascending order
  const int32_t* count;
  const int8_t* weight;  // [columns, inner]
  int64_t inner;
};

// codes [rows, inner] times the transpose of weight [columns, inner].
struct Int8ProductJob {
  const int8_t* codes;
  const int8_t* weight;
  int64_t rows, columns, inner;
  int32_t* sums;          // [rows, columns], or null, and then
  Int8Epilogue epilogue;  // tells what to make of the sums
  Int8Outliers outliers;
};

cudaError_t quantize_rows(const Int8QuantJob& job, cudaStream_t stream);
cudaError_t quantize_columns(const Int8QuantJob& job, cudaStream_t stream);
cudaError_t dequantize(const Int8DequantJob& job, cudaStream_t stream);

// Writes the numbers of the marked columns, in ascending order, and how many they are.
cudaError_t list_outliers(const bool* is_outlier, int64_t inner, int32_t* columns, int32_t* count, cudaStream_t stream);

cudaError_t multiply(const Int8ProductJob& job, cudaStream_t stream);
cudaError_t dequantize_sums(const int32_t* sums, const Int8Epilogue& epilogue, const Int8Outliers& outliers,
                            cudaStream_t stream);

}  // namespace bnbops::cuda
