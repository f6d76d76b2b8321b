// What the optimizer operators ask of a CUDA device. Rules are numbered as in AllRules.
#pragma once

#include "cuda/scalar.h"
#include "ops/optimizer/step_job.h"

namespace bnbops::cuda {

constexpr int kMaxOptions = 8;

struct StepItem {
  StepJob job;
  float* step;
  int64_t first;  // unit of work
};

// What all parameters of a call have in common.
struct StepCommon {
  Scalar lr, grad_scale, found_inf;
  const float *clip, *trust;  // a factor for each parameter, or null
  double option[kMaxOptions];
  int64_t unit_blocks;  // blocks that make a unit of work
  bool maximize, counts_step;
};

struct StepCall {
  const StepItem* items;
  int count;
  int64_t units;  // of all parameters
  bool quantized;
  StepCommon common;
  void* records;  // `record_size` bytes for each parameter, in the device's memory
};

size_t record_size(int rule);
cudaError_t step(int rule, const StepCall& call, cudaStream_t stream);

// Squared norms of a rule's directions. `pieces` has room for one number a unit.
cudaError_t direction_norms(int rule, const StepCall& call, double* pieces, double* norms, cudaStream_t stream);

}  // namespace bnbops::cuda
