// The operators that read and write states outside a step, of every device:
//   struct Device {
//     explicit Device(const Tensor& like);  // makes its device current for as long as it lives
//     static void prepare(Tensor& fresh);
//     void encode(const StateJob&) const;
//     void decode(const StateJob&) const;
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "core/tensors.h"
#include "ops/optimizer/optimizer.h"
#include "ops/optimizer/step_job.h"

namespace bnbops {

// Blocks are of each row, or of the whole: the scales' shape tells, [rows, blocks] or [blocks].
constexpr const char* kStateSchemas[] = {
    "encode_state(Tensor values, str codec, str role, bool flat=False) -> (Tensor, Tensor)",
    "decode_state(Tensor codes, Tensor absmax, str codec, str role) -> Tensor"};

// Refuse what is wrong with the arguments. Jobs without pointers.
StateJob check_encode_state(const Tensor& values, const std::string& codec, const std::string& role, bool flat);
StateJob check_decode_state(const Tensor& codes, const Tensor& absmax, const std::string& codec,
                            const std::string& role);

template <class Device>
struct StateOperators {
  static std::tuple<Tensor, Tensor> encode(const Tensor& values, const std::string& codec, const std::string& role,
                                           bool flat) {
    StateJob job = check_encode_state(values, codec, role, flat);
    const Device device(values);
    const Tensor from = in_logical_order(values);
    Tensor codes = torch::stable::new_empty(values, values.sizes(), dtype_of_codes(job.codec));
    Tensor absmax = torch::stable::new_empty(values, absmax_shape(values, flat), ScalarType::Float);
    Device::prepare(codes);
    job.from = from.const_data_ptr();
    job.to = codes.mutable_data_ptr();
    job.absmax = mutable_data<float>(absmax);
    device.encode(job);
    return {codes, absmax};
  }

  static Tensor decode(const Tensor& codes, const Tensor& absmax, const std::string& codec, const std::string& role) {
    StateJob job = check_decode_state(codes, absmax, codec, role);
    const Device device(codes);
    const Tensor from = in_logical_order(codes);
    Tensor values = torch::stable::new_empty(codes, codes.sizes(), ScalarType::Float);
    Device::prepare(values);
    job.from = from.const_data_ptr();
    job.to = values.mutable_data_ptr();
    job.absmax = mutable_data<float>(absmax);
    device.decode(job);
    return values;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("encode_state", TORCH_BOX(&encode));
    m.impl("decode_state", TORCH_BOX(&decode));
  }
};

}  // namespace bnbops
