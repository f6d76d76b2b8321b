// What the norm operators ask of a CUDA device.
#pragma once

#include "core/dtype.h"
#include "cuda/scalar.h"

namespace bnbops::cuda {

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
