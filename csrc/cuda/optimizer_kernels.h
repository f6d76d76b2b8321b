// What the optimizer and norm operators ask of a CUDA device. Rules are numbered as in AllRules.
#pragma once

#include <cuda_runtime_api.h>

#include "core/portable.h"
#include "ops/optimizer/step_job.h"

namespace bnbops::cuda {

// A number that the host knows, or one in the device's memory.
struct Scalar {
  const void* at;  // or null, and the value is here:
  double value;
  bool is_double;
};

BNBOPS_HD double value_of(const Scalar& scalar) {
  if (scalar.at == nullptr) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.at) : *static_cast<const float*>(scalar.at);
}

// What grad_scale, and what steps and factors must be. A kernel leaves alone what the CPU's operators would refuse.
BNBOPS_HD bool is_scale(double x) { return is_finite(x) && x > 0; }
BNBOPS_HD bool is_amount_or_count(double x) { return is_finite(x) && x >= 0; }

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

// ---- norms ---------------------------------------------------------------------------------------------------------

// One of many tensors; [first, end) are its pieces among those of all (norm_math.h).
struct SquaresItem {
  const void* values;
  int64_t numel, first, end;
  DType dtype;
};

struct SquaresCall {
  const SquaresItem* items;
  int count;
  int64_t pieces;
  SquaresItem* records;  // room for the items in the device's memory
  double* sums;          // room for a number for each piece
  double* norms;
};

cudaError_t squared_norms(const SquaresCall& call, cudaStream_t stream);

struct ClipItem {
  float* history;
  const float* step;
};

struct ClipCall {
  const ClipItem* items;
  int count, percentile;
  const double* squared_norms;
  Scalar grad_scale, found_inf;
  float* factors;
};

cudaError_t percentile_clip(const ClipCall& call, cudaStream_t stream);

}  // namespace bnbops::cuda
