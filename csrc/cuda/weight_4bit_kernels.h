// What the operators on 4-bit weights ask of a CUDA device. Every function launches on a stream and returns at once.
#pragma once

#include "cuda/runtime.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

cudaError_t quantize_4bit(const QuantizeJob& job, cudaStream_t stream);
cudaError_t dequantize_4bit(const Weight4bit& weight, int64_t numel, void* out, DType dtype, cudaStream_t stream);
// An index out of range is a failed assertion on the device; nothing is read for it.
cudaError_t look_up_4bit(const LookUpJob& job, cudaStream_t stream);

}  // namespace bnbops::cuda
