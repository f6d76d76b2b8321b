// Decoding a 4-bit weight on the CPU, for all operators that do.
#pragma once

#include "cpu/binding.h"
#include "ops/weight_4bit/weight_4bit_view.h"

namespace bnbops::cpu {

// Writes elements [first, first + numel) of the weight to contiguous memory, on all threads.
void dequantize_range(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype);

}  // namespace bnbops::cpu
