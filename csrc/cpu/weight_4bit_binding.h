// From an operator's arguments to the kernels' view of a 4-bit weight.
#pragma once

#include "codecs_4bit.h"
#include "cpu/binding.h"
#include "weight_4bit.h"

namespace bnbops::cpu {

inline const float* codebook_of(const std::string& quant_type) { return quant_type == "nf4" ? kNF4 : kFP4; }

inline Weight4bit kernel_view(const Weight4bitArguments& arguments) {
  Weight4bit weight{};
  weight.codes = data_of<uint8_t>(arguments.weight);
  weight.codebook = codebook_of(arguments.quant_type);
  weight.blocksize = arguments.blocksize;
  if (arguments.nested_absmax) {
    weight.nested_codes = data_of<uint8_t>(arguments.absmax);
    weight.nested_codebook = data_of<float>(*arguments.nested_code);
    weight.nested_absmax = data_of<float>(*arguments.nested_absmax);
    weight.nested_offset = data_of<float>(*arguments.nested_offset);
    weight.nested_blocksize = arguments.nested_blocksize;
  } else {
    weight.absmax = data_of<float>(arguments.absmax);
  }
  return weight;
}

// Writes elements [first, first + numel) of the weight to contiguous memory, on all threads.
void dequantize_range(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype);

}  // namespace bnbops::cpu
