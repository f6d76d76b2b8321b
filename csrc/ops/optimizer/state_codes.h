// The operators that read and write states outside a step, of every device:
//   struct Device : OnCpu {  // or cuda::OnDevice
//     void encode(const StateJob&) const;
//     void decode(const StateJob&) const;
//   };
#pragma once

#include <tuple>

#include "ops/optimizer/optimizer.h"

namespace bnbops {

inline Role role_named(const Operator& op, const std::string& name) {
  std::string known;
  for (const Role role : kCodedRoles) {
    if (name == name_of(role)) return role;
    known += (known.empty() ? "'" : ", '") + std::string(name_of(role)) + "'";
  }
  fail(op, "role must be one of ", known, ", got '", name, "'");
}

// Blocks are of each row, or of the whole: the scales' shape tells, [rows, blocks] or [blocks].
template <class Device>
struct StateOperators {
  static std::tuple<Tensor, Tensor> encode(const Tensor& values, const std::string& codec, const std::string& role,
                                           bool flat) {
    constexpr Operator op{"encode_state"};
    const bool of_whole = flat || values.dim() < 2;
    StateJob job = job_of(op, values, codec, role, of_whole);
    op(values, "values").dtype(ScalarType::Float);
    const Device device(values);
    const Tensor from = in_logical_order(values);
    Tensor codes = Device::new_result(values, values.sizes(), dtype_of_codes(job.codec));
    const BlockLayout rows = row_layout(values);
    const std::vector<int64_t> by_rows{rows.rows, rows.blocks_per_row}, whole{job.blocks};
    Tensor absmax = torch::stable::new_empty(values, of_whole ? whole : by_rows, ScalarType::Float);
    job.from = from.const_data_ptr();
    job.to = codes.mutable_data_ptr();
    job.absmax = mutable_data<float>(absmax);
    device.encode(job);
    return {codes, absmax};
  }

  static Tensor decode(const Tensor& codes, const Tensor& absmax, const std::string& codec, const std::string& role) {
    constexpr Operator op{"decode_state"};
    StateJob job = job_of(op, codes, codec, role, absmax.dim() < 2);
    op(codes, "codes").dtype(dtype_of_codes(job.codec));
    check_absmax(op(absmax, "absmax"), codes);
    const Device device(codes);
    const Tensor from = in_logical_order(codes);
    Tensor values = Device::new_result(codes, codes.sizes(), ScalarType::Float);
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

 private:
  // Without pointers.
  static StateJob job_of(const Operator& op, const Tensor& like, const std::string& codec, const std::string& role,
                         bool flat) {
    StateJob job{};
    job.codec = codec_named(op, codec, codec);
    BNBOPS_CHECK(job.codec != kUncoded, op, "codec must be one that has codes, got '", codec, "'");
    job.role = role_named(op, role);
    const BlockLayout layout = flat ? flat_layout(like.numel(), kStateBlock) : row_layout(like);
    job.inner = layout.inner;
    job.blocks_per_row = layout.blocks_per_row;
    job.blocks = layout.blocks();
    return job;
  }
};

}  // namespace bnbops
