// Checks that the (de)quantization operators of all backends share.
#pragma once

#include "core/check.h"
#include "core/layout.h"

namespace bnbops {

void check_quantize(const Tensor& A, const Tensor& code, int64_t blocksize);
void check_dequantize(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize, ScalarType dtype);
void check_dequantize_out(const Tensor& A, const Tensor& absmax, const Tensor& code, ScalarType dtype,
                          const Tensor& out);

}  // namespace bnbops
