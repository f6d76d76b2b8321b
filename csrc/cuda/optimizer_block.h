// A block of 256 elements of a parameter, its gradient and its states, in the registers of a warp: eight in each lane.
#pragma once

#include <utility>

#include "cuda/states.h"
#include "rules/rule.h"

namespace bnbops::cuda {

// Thread blocks on a multiprocessor: as many registers as it takes. States of any codec take as many as one state more.
template <class Rule, class Codec>
constexpr int kStepResident = [] {
  constexpr int kWeight = Rule::kStates + (Rule::kStates > 0 && std::is_same_v<Codec, AnyCodec>);
  return kWeight > 2 ? 2 : kWeight > 1 ? 3 : kResident;
}();

// Calls visit(k) for each state of a rule; k is a constant.
template <class Rule, class Visit>
BNBOPS_DEVICE void for_states(const Visit& visit) {
  if constexpr (Rule::kStates > 0) visit(std::integral_constant<int, 0>{});
  if constexpr (Rule::kStates > 1) visit(std::integral_constant<int, 1>{});
  if constexpr (Rule::kStates > 2) visit(std::integral_constant<int, 2>{});
  static_assert(Rule::kStates <= kMaxStates && kMaxStates == 3);
}

// Whether a rule has a state with, or without, a sign.
template <class Rule, bool kSigned>
constexpr bool kHasState = [] {
  for (int k = 0; k < Rule::kStates; ++k) {
    if (has_sign(Rule::kStateSpecs[k].role) == kSigned) return true;
  }
  return false;
}();

// The maps of a rule's states, all of one codec.
template <bool kSigned>
struct NoMap {};
template <class Rule, class Codec, bool kSigned>
using MapOrNone = std::conditional_t<kHasState<Rule, kSigned>, Map<Codec, kSigned>, NoMap<kSigned>>;
template <class Rule, class Codec>
struct MapsOf : MapOrNone<Rule, Codec, true>, MapOrNone<Rule, Codec, false> {};

// Those in shared memory, which all threads of a thread block must ask for; NoMaps in place of a codec.
template <class Rule, class Codec>
BNBOPS_DEVICE decltype(auto) shared_maps() {
  if constexpr (number_of<Codec>() == kUncoded) {
    return NoMaps{};
  } else {
    __shared__ MapsOf<Rule, Codec> maps;
    if constexpr (kHasState<Rule, true>) copy_table<Map<Codec, true>>(kMap<Codec, true>, maps);
    if constexpr (kHasState<Rule, false>) copy_table<Map<Codec, false>>(kMap<Codec, false>, maps);
    __syncthreads();
    return static_cast<const MapsOf<Rule, Codec>&>(maps);
  }
}

// What a rule sees of a lane's elements.
template <class Rule>
struct Elements {
  float p[kOctet], g[kOctet], s[kSlots<Rule>][kOctet];

  // Calls visit(g, p, states) for each; what they hold afterwards is kept.
  template <class Visit>
  BNBOPS_DEVICE void each(const Visit& visit) {
    unrolled<kOctet>([&](int i) {
      StatesOf<float, Rule> states{};
      unrolled<Rule::kStates>([&](int k) { states[k] = s[k][i]; });
      visit(g[i], p[i], states);
      unrolled<Rule::kStates>([&](int k) { s[k][i] = states[k]; });
    });
  }
};

template <class Rule, class Codec, class Maps>
BNBOPS_DEVICE Elements<Rule> load_elements(const StepJob& job, const Place& place, const Maps& maps) {
  Loaded state[kSlots<Rule>];
  for_states<Rule>([&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::load(job.state[k], place, state[k]); });
  const Octet p = load_octet(job.param, job.param_dtype, place.at, place.count);
  const Octet g = load_octet(job.grad, job.grad_dtype, place.at, place.count);
  Elements<Rule> x;
  for_states<Rule>(
      [&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::decode(job.state[k], state[k], maps, x.s[k]); });
  to_floats(p, job.param_dtype, x.p);
  to_floats(g, job.grad_dtype, x.g);
  return x;
}

template <class Rule, class Codec, class Maps>
BNBOPS_DEVICE void store_states(const StepJob& job, const Place& place, const Maps& maps, Elements<Rule>& x) {
  if constexpr (!std::is_same_v<Codec, Uncoded>) __syncwarp();  // every lane has read the old scales
  for_states<Rule>(
      [&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::store(job.state[k], place, maps, x.s[k]); });
}

}  // namespace bnbops::cuda
