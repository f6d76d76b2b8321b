// What the operators ask of a CUDA device. Every function launches on a stream and returns at once.
#pragma once

#include "cuda/runtime.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

cudaError_t quantize(const QuantizeJob& job, cudaStream_t stream);
cudaError_t dequantize(const DequantizeJob& job, cudaStream_t stream);

}  // namespace bnbops::cuda
