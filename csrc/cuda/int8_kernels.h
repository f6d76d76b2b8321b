// What the int8 operators ask of a CUDA device. Every function launches on a stream and returns at once.
#pragma once

#include "cuda/runtime.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

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
