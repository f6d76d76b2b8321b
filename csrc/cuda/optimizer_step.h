// The kernels of a step and of its halves: one launch for all parameters of a call, a warp for each block.
#pragma once

#include "cuda/optimizer_block.h"
#include "cuda/optimizer_prepare.h"

namespace bnbops::cuda {

// `Codec`: of all states, or what is in place of one.
template <class Rule, class Codec>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule, Codec>) step_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  const auto& maps = shared_maps<Rule, Codec>();
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    if (record.skipped) return;
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    auto x = load_elements<Rule, Codec>(job, place, maps);
    x.each([&](float g, float& p, StatesOf<float, Rule>& s) { guarded_update<Rule>(g, p, s, record.hyper); });
    store_octet(job.param, job.param_dtype, place.at, place.count, x.p);
    store_states<Rule, Codec>(job, place, maps, x);
  });
}

// Moves the states on and writes the directions, NaN for what no step would touch.
template <class Rule>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule, AnyCodec>)
    direction_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    Elements<Rule> x;
    if (record.skipped) {
#pragma unroll
      for (float& u : x.p) u = float_from_bits(kNanBits);
    } else {
      x = load_elements<Rule, AnyCodec>(job, place, NoMaps{});
      x.each([&](float g, float& p, StatesOf<float, Rule>& s) { p = guarded_direction<Rule>(g, p, s, record.hyper); });
      store_states<Rule, AnyCodec>(job, place, NoMaps{}, x);
    }
    store_octet(job.direction, DType::kFloat32, place.at, place.count, x.p);
  });
}

// Takes a step along given directions.
template <class Rule>
__global__ void __launch_bounds__(kThreads, kResident) apply_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    if (record.skipped) return;
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    const Octet from = load_octet(job.param, job.param_dtype, place.at, place.count);
    const Octet along = load_octet(job.direction, DType::kFloat32, place.at, place.count);
    float p[kOctet], u[kOctet];
    to_floats(from, job.param_dtype, p);
    to_floats(along, DType::kFloat32, u);
    unrolled<kOctet>([&](int i) { guarded_apply<Rule>(p[i], u[i], record.hyper); });
    store_octet(job.param, job.param_dtype, place.at, place.count, p);
  });
}

}  // namespace bnbops::cuda
