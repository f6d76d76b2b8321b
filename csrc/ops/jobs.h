// What the operators ask of the kernels of any device: plain pointers and sizes, no torch.
#pragma once

#include "core/dtype.h"

namespace bnbops {

// Which codebook 4-bit codes have, and its name.
enum class QuantType : uint8_t { kNF4, kFP4 };
constexpr const char* kFormats4bit[] = {"nf4", "fp4"};

struct QuantizeJob {
  const void* values;
  DType dtype;
  const float* codebook;  // 256 sorted entries, or null where 4-bit codes are asked for
  uint8_t* codes;
  float* absmax;
  int64_t numel, blocksize;
  QuantType quant_type{};  // of 4-bit codes
};

struct DequantizeJob {
  const uint8_t* codes;
  const float* absmax;
  const float* codebook;
  void* values;
  DType dtype;
  int64_t numel, blocksize;
};

// A 4-bit weight: two codes a byte, numbered in logical order. Scales are fp32, or codes of doubly quantized ones.
struct Weight4bit {
  const uint8_t* codes;
  const float* absmax;           // null if the scales are nested:
  const uint8_t* nested_codes;   // scale b is nested_codebook[nested_codes[b]] * nested_absmax[b / nested_blocksize]
  const float* nested_codebook;  //   + *nested_offset
  const float* nested_absmax;
  const float* nested_offset;
  int64_t blocksize, nested_blocksize;
  QuantType quant_type;
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

}  // namespace bnbops
