// What the operators ask of the kernels of any device: plain pointers and sizes, no torch.
#pragma once

#include "dtype.h"

namespace bnbops {

struct QuantizeJob {
  const void* values;
  DType dtype;
  const float* codebook;  // 256 sorted entries
  uint8_t* codes;
  float* absmax;
  int64_t numel, blocksize;
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
  const float* codebook;         // 16 entries, in the host's memory: kNF4 or kFP4
  const float* absmax;           // null if the scales are nested:
  const uint8_t* nested_codes;   // scale b is nested_codebook[nested_codes[b]] * nested_absmax[b / nested_blocksize]
  const float* nested_codebook;  //   + *nested_offset
  const float* nested_absmax;
  const float* nested_offset;
  int64_t blocksize, nested_blocksize;
};

}  // namespace bnbops
