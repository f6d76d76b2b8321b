// What the int8 operators ask of the CPU: plain pointers and sizes, no torch. One table of functions per instruction
// set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace bnbops::cpu {

constexpr int64_t kInt8Panel = 64;   // rows of a weight that are multiplied together
constexpr int64_t kInt8Piece = 256;  // elements converted to fp32 at a time

// Rows of floats to codes. Elements that are outliers do not count towards a row's absmax; in codes of rows the whole
// column of an outlier is 0.
struct Int8QuantJob {
  const void* values;  // [rows, inner]
  DType dtype;
  int64_t rows, inner;
  bool has_threshold;
  float threshold;          // |x| >= threshold is an outlier
  float* row_stats;         // [rows]
  float* col_stats;         // [inner]
  bool* is_outlier;         // [inner], by column
  int8_t* codes;            // of rows, or of columns: [rows, inner]
  const int64_t* outliers;  // the columns that have any
  int64_t outlier_count;
  float* outlier_values;  // what x has there, [rows, outlier_count]; or null
  // Or instead of `codes`, for a product with them: rows as `prepare` makes them, and their sums.
  void* activations;
  int32_t* activation_sums;
};

// codes * stats / 127, of the columns from `begin` on, `width` of them.
struct Int8DequantJob {
  const int8_t* codes;  // [rows, inner]
  const float* stats;   // [rows]
  int64_t inner, begin, width;
  void* values;  // [rows, width]
  DType dtype;
};

// From sums of products to what they mean: sums * row_stats * col_stats / 127^2 + outliers + bias.
struct Int8Epilogue {
  const float* row_stats;
  const float* col_stats;
  const void* bias;  // or null
  DType bias_dtype;
  void* out;  // [rows, columns]
  DType dtype;
  // The columns of x that stay in floating point.
  const int64_t* outliers = nullptr;
  int64_t outlier_count = 0;
  const float* outlier_values = nullptr;  // [rows, outlier_count]
};

// a [rows, inner] times the transpose of b [columns, inner].
struct Int8MatmulJob {
  const void* activations;         // a, as `prepare` made it: [rows, stride]
  const int32_t* activation_sums;  // of its rows
  const int8_t* weight;            // b
  int64_t rows, columns, inner;
  int32_t* sums;                 // [rows, columns], or null, and then
  const Int8Epilogue* epilogue;  // tells what to make of the sums
};

struct Int8Kernels {
  // On ranges of rows.
  void (*scan_rows)(const Int8QuantJob&, int64_t first, int64_t last);    // row_stats, is_outlier
  void (*encode_rows)(const Int8QuantJob&, int64_t first, int64_t last);  // codes or activations, outlier_values
  void (*dequantize)(const Int8DequantJob&, int64_t first, int64_t last);
  // On ranges of pieces of columns: col_stats and codes.
  void (*quantize_columns)(const Int8QuantJob&, int64_t first, int64_t last);

  // A matrix product. `prepare` brings one row of a into the form that `multiply` wants, `row_bytes(inner)` long, and
  // returns its sum. `multiply` works on a range of tiles, of kInt8Panel columns by `row_block` rows.
  int64_t (*row_bytes)(int64_t inner);
  int32_t (*prepare)(const int8_t* codes, int64_t inner, void* row);
  int64_t row_block;
  void (*multiply)(const Int8MatmulJob&, int64_t first, int64_t last);

  // The epilogue alone, on sums of a range of rows.
  void (*dequantize_sums)(const int32_t* sums, int64_t columns, const Int8Epilogue&, int64_t first, int64_t last);
};

extern const Int8Kernels kInt8BaselineKernels;
#ifdef BNBOPS_X86
extern const Int8Kernels kInt8Avx2Kernels, kInt8Avx512Kernels, kInt8AmxKernels;
#endif

}  // namespace bnbops::cpu
