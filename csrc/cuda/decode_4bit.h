// From the packed codes of a 4-bit weight to fp32 values, for all kernels that read one.
//
// Eight codes are a word of four bytes. Blocks are of 32 elements or more, so the eight from a multiple of eight on
// share a scale, which scale_of_block (codecs_4bit.h) reads or computes.
#pragma once

#include "codecs_4bit.h"
#include "cuda/elements.h"

namespace bnbops::cuda {

struct Codebook4bit {
  float value[kCodebook4bit];
};

constexpr Codebook4bit make_codebook(const float* values) {
  Codebook4bit codebook{};
  for (int i = 0; i < kCodebook4bit; ++i) codebook.value[i] = values[i];
  return codebook;
}

// By QuantType.
static __device__ const Codebook4bit kCodebooks4bit[2] = {make_codebook(kNF4), make_codebook(kFP4)};

// To shared memory; a barrier must follow. The 16 entries lie in 16 banks, so a warp's look-ups never conflict.
BNBOPS_DEVICE void copy_codebook(QuantType type, Codebook4bit& to) {
  if (threadIdx.x < kCodebook4bit) to.value[threadIdx.x] = kCodebooks4bit[static_cast<int>(type)].value[threadIdx.x];
}

// Likewise the codebook of nested scales, and has the weight look there.
BNBOPS_DEVICE void copy_nested_codebook(Weight4bit& weight, float (&to)[kCodebookSize]) {
  if (weight.absmax != nullptr) return;
  for (unsigned i = threadIdx.x; i < kCodebookSize; i += blockDim.x) to[i] = weight.nested_codebook[i];
  weight.nested_codebook = to;
}

// The block that an element belongs to. Block sizes are powers of two.
BNBOPS_DEVICE int64_t block_of(const Weight4bit& weight, int64_t element) {
  return element >> (__ffsll(weight.blocksize) - 1);
}

// The codes of elements `first` ... `first` + 7, of which `count` exist; `first` is even.
BNBOPS_DEVICE uint32_t load_packed(const uint8_t* codes, int64_t first, int64_t count) {
  const uint8_t* from = codes + first / 2;
  if (count >= kOctet && is_aligned<uint32_t>(from)) return load_vector<uint32_t>(from);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kOctet / 2; ++i) {
    if (2 * i < count) packed |= static_cast<uint32_t>(from[i]) << (i * 8);
  }
  return packed;
}

// Code i of a word: that of an even element is in the upper half of its byte.
BNBOPS_DEVICE uint32_t code_4bit(uint32_t packed, int i) { return packed >> ((i ^ 1) * 4) & 15U; }

BNBOPS_DEVICE void decode_packed(uint32_t packed, const Codebook4bit& codebook, float scale, float (&x)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = codebook.value[code_4bit(packed, i)] * scale;
}

}  // namespace bnbops::cuda
