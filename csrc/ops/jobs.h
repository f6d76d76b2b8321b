// What the operators ask of the kernels of any device: plain pointers and sizes, no torch.
#pragma once

#include "core/dtype.h"
#include "formats/scale.h"

namespace bnbops {

struct QuantizeJob {
  const void* values;
  DType dtype;
  const float* codebook;  // 256 sorted entries, or null where 4-bit codes are asked for
  uint8_t* codes;
  float* absmax;
  int64_t numel, blocksize;
  int format = 0;  // of 4-bit codes, an index of kFormats4bit
};

struct DequantizeJob {
  const uint8_t* codes;
  const float* absmax;
  const float* codebook;
  void* values;
  DType dtype;
  int64_t numel, blocksize;
};

// A 4-bit weight: two codes a byte, numbered in logical order.
struct Weight4bit {
  const uint8_t* codes;
  Scales4bit scales;
  int64_t blocksize;
  int format;  // an index of kFormats4bit
};

// Rows of a 4-bit weight [rows, width]: those that the indices name, one after another.
struct LookUpJob {
  Weight4bit weight;
  int64_t rows, width;
  const void* indices;  // int64 or int32, or null for row 0
  int64_t count;
  bool wide;  // int64
  void* out;  // [count, width]
  DType dtype;

  BNBOPS_HD int64_t index(int64_t i) const {
    if (indices == nullptr) return 0;
    return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
  }
};

// ---- int8 --------------------------------------------------------------------------------------------------------

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
