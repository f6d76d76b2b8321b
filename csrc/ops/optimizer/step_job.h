// What an optimizer step is to the kernels of any device: one parameter, its gradient and its states, in blocks.
#pragma once

#include "codecs/codec.h"
#include "core/dtype.h"

namespace bnbops {

constexpr int kMaxStates = 3;

// Rows of `inner` elements, each row cut into blocks of 256 and a rest.
struct StepJob {
  void* param;
  const void* grad;
  void* state[kMaxStates];    // uint8 codes, or fp32 where absmax is null
  float* absmax[kMaxStates];  // [rows, blocks_per_row]
  int64_t inner, blocks_per_row, blocks;
  DType param_dtype, grad_dtype;
};

}  // namespace bnbops

BNBOPS_NAMESPACE_BEGIN

struct Span {  // elements of a parameter that make a block of its states
  int64_t begin, n;
};

BNBOPS_HD Span span_of(const StepJob& job, int64_t block) {
  const int64_t row = block < job.blocks_per_row ? 0 : block / job.blocks_per_row;  // mostly there is one row
  const int64_t column = (block - row * job.blocks_per_row) * kStateBlock, rest = job.inner - column;
  return {row * job.inner + column, rest < kStateBlock ? rest : kStateBlock};
}

BNBOPS_NAMESPACE_END
