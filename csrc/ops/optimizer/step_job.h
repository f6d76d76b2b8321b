// What an optimizer step is to the kernels of any device: one parameter, its gradient and its states, in blocks.
#pragma once

#include "codecs/all.h"
#include "core/dtype.h"

namespace bnbops {

constexpr int kMaxStates = 3;

// What an operator does of a step: all of it; the first half, which moves the states on and gives the direction; or the
// second, which takes the step along whatever has become of the direction.
enum class Part { kStep, kDirection, kApply };

// One state of a parameter: codes and their scales, or fp32.
struct StateSlot {
  void* data;
  float* absmax;  // [rows, blocks_per_row], or null
  int codec;      // its number in AllCodecs, or kUncoded
};

// Rows of `inner` elements, each row cut into blocks of 256 and a rest.
struct StepJob {
  void* param;
  const void* grad;
  StateSlot state[kMaxStates];
  float* direction;  // where only half a step is taken: what it gives, or goes along
  int64_t inner, blocks_per_row, blocks;
  DType param_dtype, grad_dtype;
};

// A state outside a step.
struct StateJob {
  const void* from;  // values, or codes
  void* to;          // codes, or values
  float* absmax;
  int64_t inner, blocks_per_row, blocks;
  int codec;
  Role role;
};

}  // namespace bnbops

BNBOPS_NAMESPACE_BEGIN

struct Span {  // elements of a parameter that make a block of its states
  int64_t begin, n;
};

template <class Job>
BNBOPS_HD Span span_of(const Job& job, int64_t block) {
  const int64_t row = block < job.blocks_per_row ? 0 : block / job.blocks_per_row;  // mostly there is one row
  const int64_t column = (block - row * job.blocks_per_row) * kStateBlock, rest = job.inner - column;
  return {row * job.inner + column, rest < kStateBlock ? rest : kStateBlock};
}

// The codec that all states have, kUncoded where there are none, or kMixed.
BNBOPS_HD int common_codec(const StepJob& job, int states) {
  const int first = states > 0 ? job.state[0].codec : kUncoded;
  for (int k = 1; k < states; ++k) {
    if (job.state[k].codec != first) return kMixed;
  }
  return first;
}

BNBOPS_NAMESPACE_END
