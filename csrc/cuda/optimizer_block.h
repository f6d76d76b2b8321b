// A block of 256 elements of a parameter, its gradient and its states, in the registers of a warp: eight in each lane.
#pragma once

#include <type_traits>
#include <utility>

#include "codecs/dynamic8.h"
#include "cuda/elements.h"
#include "cuda/many_tensors.h"
#include "cuda/maps.h"
#include "ops/optimizer/step_job.h"
#include "rules/rule.h"

namespace bnbops::cuda {

static_assert(kStateBlock == kWarp * kOctet);

// Thread blocks on a multiprocessor: as many registers as it takes.
template <class Rule>
constexpr int kStepResident = Rule::kStates > 2   ? 2
                              : Rule::kStates > 1 ? 3
                                                  : kResident;

// Calls visit(k) for each state of a rule; k is a constant.
template <class Rule, class Visit>
BNBOPS_DEVICE void for_states(const Visit& visit) {
  if constexpr (Rule::kStates > 0) visit(std::integral_constant<int, 0>{});
  if constexpr (Rule::kStates > 1) visit(std::integral_constant<int, 1>{});
  if constexpr (Rule::kStates > 2) visit(std::integral_constant<int, 2>{});
  static_assert(Rule::kStates <= 3);
}

// Whether a rule has a state with, or without, a sign.
template <class Rule, bool kSigned>
constexpr bool kHasState = [] {
  for (int k = 0; k < Rule::kStates; ++k) {
    if (Rule::kStateSpecs[k].is_signed == kSigned) return true;
  }
  return false;
}();

// The maps of a rule's states.
template <bool kSigned>
struct NoMap {};
template <class Rule, bool kSigned>
using MapOrNone = std::conditional_t<kHasState<Rule, kSigned>, Map<kSigned>, NoMap<kSigned>>;
template <class Rule>
struct MapsOf : MapOrNone<Rule, true>, MapOrNone<Rule, false> {};

template <class Rule>
struct Elements {
  int64_t at;  // the lane's first one in the parameter
  int count;   // how many there are: 8, or fewer at the end of a block
  float p[kOctet], g[kOctet], s[kSlots<Rule>][kOctet];
};

// All loads are under way before the first element is converted. What is beyond `count` is 0, as on the CPU.
template <class Rule, bool kQuantized>
BNBOPS_DEVICE Elements<Rule> load_elements(const StepJob& job, int64_t block, const MapsOf<Rule>* maps) {
  Elements<Rule> x;
  const Span span = span_of(job, block);
  x.at = span.begin + lane_of_warp() * kOctet;
  x.count = static_cast<int>(span.n) - lane_of_warp() * kOctet;
  std::conditional_t<kQuantized, uint2, Octet> state[kSlots<Rule>];
  float absmax[kSlots<Rule>];
  for_states<Rule>([&](auto k) {
    if constexpr (kQuantized) {
      constexpr StateSpec spec = Rule::kStateSpecs[k];
      state[k] = load_codes(static_cast<const uint8_t*>(job.state[k]) + x.at, x.count, zero_code(spec.is_signed));
      absmax[k] = global_pointer(job.absmax[k])[block];
    } else {
      state[k] = load_octet(job.state[k], DType::kFloat32, x.at, x.count);
    }
  });
  const Octet p = load_octet(job.param, job.param_dtype, x.at, x.count);
  const Octet g = load_octet(job.grad, job.grad_dtype, x.at, x.count);
  for_states<Rule>([&](auto k) {
    if constexpr (kQuantized) {
      constexpr StateSpec spec = Rule::kStateSpecs[k];
      const Map<spec.is_signed>& map = *maps;
      const float scale = decodable(absmax[k]);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x.s[k][i] = map.value[code_of(state[k], i)] * scale;
    } else {
      to_floats(state[k], DType::kFloat32, x.s[k]);
    }
  });
  to_floats(p, job.param_dtype, x.p);
  to_floats(g, job.grad_dtype, x.g);
  return x;
}

template <class Rule>
BNBOPS_DEVICE StatesOf<float, Rule> states_of(const Elements<Rule>& x, int i) {
  StatesOf<float, Rule> states{};
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) states[k] = x.s[k][i];
  return states;
}

// Encodes a block of a state and returns its scale. Elements that have no encoding as they are change.
template <bool kDivisor, bool kSigned>
BNBOPS_DEVICE float encode_state(float (&x)[kOctet], const Map<kSigned>& map, uint8_t* codes, int64_t count) {
  const float absmax = float_from_bits(__reduce_max_sync(kAllLanes, bits_of(make_encodable(x))));
  store_codes(codes, count, dynamic_codes<kDivisor>(x, inverse_scale(absmax), map.code));
  return absmax;
}

template <class Rule, bool kQuantized>
BNBOPS_DEVICE void store_elements(const StepJob& job, int64_t block, const MapsOf<Rule>* maps, Elements<Rule>& x) {
  store_octet(job.param, job.param_dtype, x.at, x.count, x.p);
  if (kQuantized) __syncwarp();  // every lane has read the old scales
  for_states<Rule>([&](auto k) {
    if constexpr (kQuantized) {
      constexpr StateSpec spec = Rule::kStateSpecs[k];
      const Map<spec.is_signed>& map = *maps;
      const float absmax =
          encode_state<spec.is_divisor>(x.s[k], map, static_cast<uint8_t*>(job.state[k]) + x.at, x.count);
      if (lane_of_warp() == 0) global_pointer(job.absmax[k])[block] = absmax;
    } else {
      store_octet(job.state[k], DType::kFloat32, x.at, x.count, x.s[k]);
    }
  });
}

// The maps in shared memory; all threads of a thread block call.
template <class Rule, bool kQuantized>
BNBOPS_DEVICE const MapsOf<Rule>* shared_maps() {
  if constexpr (kQuantized) {
    __shared__ MapsOf<Rule> maps;
    if constexpr (kHasState<Rule, true>) copy_table<Map<true>>(kMap<true>, maps);
    if constexpr (kHasState<Rule, false>) copy_table<Map<false>>(kMap<false>, maps);
    __syncthreads();
    return &maps;
  } else {
    return nullptr;
  }
}

}  // namespace bnbops::cuda
