// What the int8 operators ask of the kernels of any device: plain pointers and sizes, no torch.
#pragma once

#include "core/dtype.h"

namespace bnbops {

// Floats to codes of rows, or of columns. Elements that are left out (formats/int8.h) do not count towards an absmax,
// and have code 0; in codes of rows, the whole column of an outlier has.
struct Int8QuantJob {
  const void* values;  // [rows, inner]
  DType dtype;
  int64_t rows, inner;
  bool has_threshold;
  uint32_t limit;              // left_out_from(threshold)
  float* row_stats = nullptr;  // [rows]
  float* col_stats = nullptr;  // [inner]
  bool* is_outlier = nullptr;  // [inner], by column; false beforehand
  int8_t* codes = nullptr;     // [rows, inner]
};

// codes * stats / 127, of the columns from `begin` on, `width` of them.
struct Int8DequantJob {
  const int8_t* codes;  // [rows, inner]
  const float* stats;   // [rows]
  int64_t rows, inner, begin, width;
  void* values;  // [rows, width]
  DType dtype;
};

// From sums of products to what they mean: sums * row_stats * col_stats / 127^2 + bias.
struct Int8Epilogue {
  int64_t rows, columns;
  const float* row_stats;
  const float* col_stats;
  const void* bias;  // or null
  DType bias_dtype;
  void* out;  // [rows, columns]
  DType dtype;
};

}  // namespace bnbops
