#include "ops/optimizer/state_codes.h"

namespace bnbops {
namespace {

Role role_named(const char* op, const std::string& name) {
  std::string known;
  for (const Role role : kCodedRoles) {
    if (name == name_of(role)) return role;
    known += (known.empty() ? "'" : ", '") + std::string(name_of(role)) + "'";
  }
  fail("bnbops::", op, ": role must be one of ", known, ", got '", name, "'");
}

StateJob job_of(const char* op, const Tensor& like, const std::string& codec, const std::string& role, bool flat) {
  StateJob job{};
  job.codec = codec_named(op, codec, codec);
  BNBOPS_CHECK(job.codec != kUncoded, "bnbops::", op, ": codec must be one that has codes, got '", codec, "'");
  job.role = role_named(op, role);
  const BlockLayout layout = flat ? flat_layout(like.numel(), kStateBlock) : row_layout(like);
  job.inner = layout.inner;
  job.blocks_per_row = layout.blocks_per_row;
  job.blocks = layout.blocks();
  return job;
}

}  // namespace

StateJob check_encode_state(const Tensor& values, const std::string& codec, const std::string& role, bool flat) {
  const char* op = "encode_state";
  const StateJob job = job_of(op, values, codec, role, flat || values.dim() < 2);
  check_dtype({values, op, "values"}, ScalarType::Float);
  return job;
}

StateJob check_decode_state(const Tensor& codes, const Tensor& absmax, const std::string& codec,
                            const std::string& role) {
  const char* op = "decode_state";
  const StateJob job = job_of(op, codes, codec, role, absmax.dim() < 2);
  check_dtype({codes, op, "codes"}, dtype_of_codes(job.codec));
  check_absmax({absmax, op, "absmax"}, codes);
  return job;
}

}  // namespace bnbops
