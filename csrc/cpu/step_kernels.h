// Optimizer steps over blocks: they decode, update by a rule, and encode, and know nothing of Adam or of bytes.
#pragma once

#include "codecs/dynamic8.h"
#include "cpu/blocks.h"
#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// The lanes of a rule's number.
[[maybe_unused]] BNBOPS_HD float vector_of(float x) { return x; }
template <class Number>
BNBOPS_HD auto vector_of(const Number& x) {
  return x.v;
}

// Some consecutive elements: of gradient, parameter and states (codes, or fp32).
template <class Rule>
struct Elements {
  const uint8_t* grad;
  uint8_t* param;
  uint8_t* state[kSlots<Rule>];
};

template <class Rule, bool kQuantized>
constexpr int64_t kStateSize = kQuantized ? 1 : sizeof(float);

template <class Rule, bool kQuantized>
BNBOPS_HD Elements<Rule> elements_at(const StepJob& job, int64_t i) {
  Elements<Rule> at{};
  at.grad = static_cast<const uint8_t*>(job.grad) + i * size_of(job.grad_dtype);
  at.param = static_cast<uint8_t*>(job.param) + i * size_of(job.param_dtype);
  for (int k = 0; k < Rule::kStates; ++k) {
    at.state[k] = static_cast<uint8_t*>(job.state[k]) + i * kStateSize<Rule, kQuantized>;
  }
  return at;
}

// Calls body(elements, i) for every kSize elements i ... of a block. The rest is moved into padded arrays: zeros, which
// change nothing, neither an element nor a largest magnitude.
template <class Lanes, class Rule, bool kQuantized, int kSize, class Body>
BNBOPS_HD void for_elements(const StepJob& job, const Span& span, const Body& body) {
  for_chunks<kSize>(
      span.n, [&](int64_t i) { body(elements_at<Rule, kQuantized>(job, span.begin + i), i); },
      [&](int64_t i, int64_t rest) {
        alignas(64) uint8_t grad[kSize * sizeof(float)] = {}, param[kSize * sizeof(float)] = {};
        alignas(64) uint8_t state[kSlots<Rule>][kSize * kStateSize<Rule, kQuantized>];
        const auto at = elements_at<Rule, kQuantized>(job, span.begin + i);
        Elements<Rule> padded{grad, param, {}};
        Lanes::copy(grad, at.grad, rest * size_of(job.grad_dtype));
        Lanes::copy(param, at.param, rest * size_of(job.param_dtype));
        for (int k = 0; k < Rule::kStates; ++k) {
          memset(state[k], kQuantized ? zero_code(Rule::kStateSpecs[k].is_signed) : 0, sizeof(state[k]));
          Lanes::copy(state[k], at.state[k], rest * kStateSize<Rule, kQuantized>);
          padded.state[k] = state[k];
        }
        body(padded, i);
        Lanes::copy(at.param, param, rest * size_of(job.param_dtype));
        if (kQuantized) return;  // codes are written once the block's scale is known
        for (int k = 0; k < Rule::kStates; ++k) Lanes::copy(at.state[k], state[k], rest * sizeof(float));
      });
}

// Updates kWidth elements from the i-th on, their states in registers.
template <class Lanes, class Rule>
BNBOPS_HD void update_vector(const StepJob& job, const Elements<Rule>& at, int64_t i,
                             StatesOf<typename Lanes::Number, Rule>& state, const typename Rule::Hyper& hyper) {
  using Number = typename Lanes::Number;
  Number p(load_as<Lanes>(at.param, job.param_dtype, i));
  guarded_update<Rule>(Number(load_as<Lanes>(at.grad, job.grad_dtype, i)), p, state, hyper);
  store_as<Lanes>(at.param, job.param_dtype, i, vector_of(p));
}

template <class Lanes, class Rule>
void step_float32(const StepJob& job, const typename Rule::Hyper hyper, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  for (int64_t block = first; block < last; ++block) {
    for_elements<Lanes, Rule, false, Lanes::kWidth>(job, span_of(job, block), [&](const Elements<Rule>& at, int64_t) {
      StatesOf<Number, Rule> s;
      for (int k = 0; k < Rule::kStates; ++k) s[k] = Number(Lanes::load(reinterpret_cast<float*>(at.state[k])));
      update_vector<Lanes>(job, at, 0, s, hyper);
      for (int k = 0; k < Rule::kStates; ++k) store_as<Lanes>(at.state[k], DType::kFloat32, 0, vector_of(s[k]));
    });
  }
}

// Encodes one block of a state and returns its scale; `largest` are the bits of its largest magnitude. Elements of x
// that have no encoding as they are change.
template <class Lanes, bool kSigned, bool kDivisor>
float encode_state(float* x, int64_t n, uint32_t largest, uint8_t* codes) {
  if (largest >= kInfinityBits) {
    make_encodable(x, n, kSigned, x);
    largest = largest_magnitude_bits<Lanes, kSigned>(x, n);
  }
  const float absmax = float_from_bits(largest);
  encode_dynamic<Lanes, kSigned, kDivisor>(x, n, inverse_scale(absmax), codes);
  return absmax;
}

template <class Lanes>
auto encoder_of(const StateSpec& spec) {
  if (spec.is_divisor) return spec.is_signed ? encode_state<Lanes, true, true> : encode_state<Lanes, false, true>;
  return spec.is_signed ? encode_state<Lanes, true, false> : encode_state<Lanes, false, false>;
}

// The maps of 8-bit states, by StateSpec::is_signed.
template <class Lanes>
const typename Lanes::Codebook& state_codebook(bool is_signed) {
  static const typename Lanes::Codebook codebooks[2] = {typename Lanes::Codebook(kDynamicUnsigned),
                                                        typename Lanes::Codebook(kDynamicSigned)};
  return codebooks[is_signed];
}

// One block of 8-bit states on its way through a step: decoded and updated in registers, group by group, into fp32
// scratch; encoded once the whole block's largest magnitude is known.
template <class Lanes, class Rule>
struct QuantizedBlock {
  alignas(64) float state[kSlots<Rule>][kStateBlock];
  typename Lanes::Int largest[kSlots<Rule>];
  float absmax[kSlots<Rule>];
  const typename Lanes::Codebook* codebooks[2];

  BNBOPS_HD void update_group(const StepJob& job, const Elements<Rule>& at, int64_t i,
                              const typename Rule::Hyper& hyper) {
    typename Lanes::Float decoded[kSlots<Rule>][4];
    for (int k = 0; k < Rule::kStates; ++k) {
      codebooks[Rule::kStateSpecs[k].is_signed]->decode(at.state[k], absmax[k], decoded[k]);
    }
#pragma GCC unroll 4  // or the vectors live in memory
    for (int v = 0; v < 4; ++v) {
      const int64_t offset = v * Lanes::kWidth;
      StatesOf<typename Lanes::Number, Rule> s;
      for (int k = 0; k < Rule::kStates; ++k) s[k] = typename Lanes::Number(decoded[k][v]);
      update_vector<Lanes>(job, at, offset, s, hyper);
      for (int k = 0; k < Rule::kStates; ++k) {
        const auto x = vector_of(s[k]);
        Lanes::store(state[k] + i + offset, x);
        largest[k] = Lanes::max(largest[k], Lanes::as_int(Rule::kStateSpecs[k].is_signed ? Lanes::abs(x) : x));
      }
    }
  }
};

template <class Lanes, class Rule>
void step_quantized(const StepJob& job, const typename Rule::Hyper hyper, int64_t first, int64_t last) {
  QuantizedBlock<Lanes, Rule> work;
  for (int s = 0; s < 2; ++s) work.codebooks[s] = &state_codebook<Lanes>(s);
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    for (int k = 0; k < Rule::kStates; ++k) {
      work.absmax[k] = decodable(job.absmax[k][block]);
      work.largest[k] = Lanes::splat_int(0);
    }
    for_elements<Lanes, Rule, true, kGroup<Lanes>>(
        job, span, [&](const Elements<Rule>& at, int64_t i) { work.update_group(job, at, i, hyper); });
    for (int k = 0; k < Rule::kStates; ++k) {
      const auto encode = encoder_of<Lanes>(Rule::kStateSpecs[k]);
      const auto largest = static_cast<uint32_t>(Lanes::reduce_max(work.largest[k]));
      uint8_t* codes = static_cast<uint8_t*>(job.state[k]) + span.begin;
      job.absmax[k][block] = encode(work.state[k], span.n, largest, codes);
    }
  }
}

template <class Lanes, class Rule>
void step(const StepJob& job, const void* opaque, int64_t first, int64_t last) {
  const auto& hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  if constexpr (Rule::kStates > 0) {
    if (job.absmax[0] != nullptr) return step_quantized<Lanes, Rule>(job, hyper, first, last);
  }
  step_float32<Lanes, Rule>(job, hyper, first, last);
}

BNBOPS_NAMESPACE_END
