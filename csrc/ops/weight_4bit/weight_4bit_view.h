// From an operator's arguments to the kernels' view of a 4-bit weight, on any device.
#pragma once

#include "core/tensors.h"
#include "ops/jobs.h"
#include "ops/weight_4bit/weight_4bit.h"

namespace bnbops {

inline Weight4bit kernel_view(const Weight4bitArguments& arguments) {
  Weight4bit weight{};
  weight.codes = data_of<uint8_t>(arguments.weight);
  weight.blocksize = arguments.blocksize;
  weight.format = format_of(arguments.op, arguments.quant_type);
  if (arguments.nested_absmax) {
    weight.scales = {nullptr,
                     data_of<uint8_t>(arguments.absmax),
                     data_of<float>(*arguments.nested_code),
                     data_of<float>(*arguments.nested_absmax),
                     data_of<float>(*arguments.nested_offset),
                     arguments.nested_blocksize};
  } else {
    weight.scales.absmax = data_of<float>(arguments.absmax);
  }
  return weight;
}

}  // namespace bnbops
