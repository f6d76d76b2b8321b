// What the optimizer operators ask of a CUDA device. Rules are numbered as in AllRules.
#pragma once

#include "cuda/scalar.h"
#include "ops/optimizer/step_job.h"

namespace bnbops::cuda {

constexpr int kMaxOptions = 8;

struct StepItem {
  StepJob job;
  float* step;
  int64_t first;  // of its blocks among those of all
};

// What all parameters of a call have in common.
struct StepCommon {
  Scalar lr, grad_scale, found_inf;
  const float *clip, *trust;  // a factor for each parameter, or null
  double option[kMaxOptions];
  bool maximize, counts_step;
};

struct StepCall {
  Part part;
  int codec;  // that all states have, or kMixed
  const StepItem* items;
  int count;
  int64_t blocks;  // of all parameters
  StepCommon common;
  void* records;  // `record_size` bytes for each parameter, in the device's memory
};

size_t record_size(int rule);
cudaError_t step(int rule, const StepCall& call, cudaStream_t stream);

// States outside a step.
cudaError_t encode_state(const StateJob& job, cudaStream_t stream);
cudaError_t decode_state(const StateJob& job, cudaStream_t stream);

}  // namespace bnbops::cuda
