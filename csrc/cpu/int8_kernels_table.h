// What the int8 operators ask of the CPU: plain pointers and sizes, no torch. One table of functions per instruction
// set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "ops/jobs.h"

namespace bnbops::cpu {

constexpr int64_t kInt8Panel = 64;   // rows of a weight that are multiplied together
constexpr int64_t kInt8Piece = 256;  // elements converted to fp32 at a time

// For codes of rows: also the outlier columns, and a form for products.
struct Int8EncodeJob : Int8QuantJob {
  const int64_t* outliers = nullptr;  // the columns that have any
  int64_t outlier_count = 0;
  float* outlier_values = nullptr;  // what x has there, [rows, outlier_count]; or null
  // Or instead of `codes`, for a product with them: rows as `prepare` makes them, and their sums.
  void* activations = nullptr;
  int32_t* activation_sums = nullptr;
};

// The columns of x that stay in floating point.
struct Int8Outliers {
  const int64_t* columns = nullptr;
  int64_t count = 0;
  const float* values = nullptr;  // [rows, count]
};

// a [rows, inner] times the transpose of b [columns, inner].
struct Int8MatmulJob {
  const void* activations;         // a, as `prepare` made it: [rows, stride]
  const int32_t* activation_sums;  // of its rows
  const int8_t* weight;            // b
  int64_t rows, columns, inner;
  int32_t* sums;                 // [rows, columns], or null, and then
  const Int8Epilogue* epilogue;  // tells what to make of the sums
  Int8Outliers outliers;
};

struct Int8Kernels {
  // On ranges of rows.
  void (*scan_rows)(const Int8QuantJob&, int64_t first, int64_t last);     // row_stats, is_outlier
  void (*encode_rows)(const Int8EncodeJob&, int64_t first, int64_t last);  // codes or activations, outlier_values
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
  void (*dequantize_sums)(const int32_t* sums, const Int8Epilogue&, int64_t first, int64_t last);
};

extern const Int8Kernels kInt8BaselineKernels;
#ifdef BNBOPS_X86
extern const Int8Kernels kInt8Avx2Kernels, kInt8Avx512Kernels, kInt8AmxKernels;
#endif

}  // namespace bnbops::cpu
