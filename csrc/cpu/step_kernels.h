// Optimizer steps over blocks: they decode, update by a rule, and encode, and know nothing of Adam or of bytes.
//
// Two ways lead through a block. Where all states are fp32, or all have a codec that ships compiled together with every
// rule (FusedCodecs), elements stay in registers from decoding to the largest magnitude. Any other mixture, and
// whatever is not a whole step, goes through fp32 scratch.
#pragma once

#include <type_traits>

#include "cpu/state_codecs.h"
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

template <bool kQuantized>
constexpr int64_t kStateSize = kQuantized ? 1 : sizeof(float);

template <class Rule, bool kQuantized>
BNBOPS_HD Elements<Rule> elements_at(const StepJob& job, int64_t i) {
  Elements<Rule> at{};
  at.grad = static_cast<const uint8_t*>(job.grad) + i * size_of(job.grad_dtype);
  at.param = static_cast<uint8_t*>(job.param) + i * size_of(job.param_dtype);
  for (int k = 0; k < Rule::kStates; ++k) {
    at.state[k] = static_cast<uint8_t*>(job.state[k].data) + i * kStateSize<kQuantized>;
  }
  return at;
}

// How fp32 states are encoded: not at all.
struct Uncoded {};

// Calls body(elements, i) for every kSize elements i ... of a block. The rest is moved into padded arrays: zeros, which
// change nothing, neither an element nor a largest magnitude.
template <class Lanes, class Rule, class Codec, int kSize, class Body>
BNBOPS_HD void for_elements(const StepJob& job, const Span& span, const Body& body) {
  constexpr bool kQuantized = !std::is_same_v<Codec, Uncoded>;
  for_chunks<kSize>(
      span.n, [&](int64_t i) { body(elements_at<Rule, kQuantized>(job, span.begin + i), i); },
      [&](int64_t i, int64_t rest) {
        alignas(64) uint8_t grad[kSize * sizeof(float)] = {}, param[kSize * sizeof(float)] = {};
        alignas(64) uint8_t state[kSlots<Rule>][kSize * kStateSize<kQuantized>] = {};
        const auto at = elements_at<Rule, kQuantized>(job, span.begin + i);
        Elements<Rule> padded{grad, param, {}};
        Lanes::copy(grad, at.grad, rest * size_of(job.grad_dtype));
        Lanes::copy(param, at.param, rest * size_of(job.param_dtype));
        for (int k = 0; k < Rule::kStates; ++k) {
          if constexpr (kQuantized)
            memset(state[k], code_of<Codec>(0, has_sign(Rule::kStateSpecs[k].role)), sizeof(state[k]));
          Lanes::copy(state[k], at.state[k], rest * kStateSize<kQuantized>);
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
    for_elements<Lanes, Rule, Uncoded, Lanes::kWidth>(job, span_of(job, block), [&](const Elements<Rule>& at, int64_t) {
      StatesOf<Number, Rule> s;
      for (int k = 0; k < Rule::kStates; ++k) s[k] = Number(Lanes::load(reinterpret_cast<float*>(at.state[k])));
      update_vector<Lanes>(job, at, 0, s, hyper);
      for (int k = 0; k < Rule::kStates; ++k) store_as<Lanes>(at.state[k], DType::kFloat32, 0, vector_of(s[k]));
    });
  }
}

// One block of coded states on its way through a step: decoded and updated in registers, group by group, into fp32
// scratch; encoded once the whole block's largest magnitude is known.
template <class Lanes, class Rule, class Codec>
struct CodedBlock {
  alignas(64) float state[kSlots<Rule>][kStateBlock];
  typename Lanes::Int largest[kSlots<Rule>];
  float absmax[kSlots<Rule>];
  const typename Lanes::Codebook* codebooks[2];  // by has_sign: states that have the same one share its registers

  BNBOPS_HD void update_group(const StepJob& job, const Elements<Rule>& at, int64_t i,
                              const typename Rule::Hyper& hyper) {
    typename Lanes::Float decoded[kSlots<Rule>][4];
    for (int k = 0; k < Rule::kStates; ++k) {
      codebooks[has_sign(Rule::kStateSpecs[k].role)]->decode(at.state[k], absmax[k], decoded[k]);
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
        largest[k] = Lanes::max(largest[k], Lanes::as_int(has_sign(Rule::kStateSpecs[k].role) ? Lanes::abs(x) : x));
      }
    }
  }
};

template <class Lanes, class Rule, class Codec>
void step_coded(const StepJob& job, const typename Rule::Hyper hyper, int64_t first, int64_t last) {
  CodedBlock<Lanes, Rule, Codec> work;
  work.codebooks[has_sign(Role::kSquare)] = &codebook_of<Lanes, Codec>(Role::kSquare);
  work.codebooks[has_sign(Role::kSigned)] = &codebook_of<Lanes, Codec>(Role::kSigned);
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    for (int k = 0; k < Rule::kStates; ++k) {
      work.absmax[k] = decodable(job.state[k].absmax[block]);
      work.largest[k] = Lanes::splat_int(0);
    }
    for_elements<Lanes, Rule, Codec, kGroup<Lanes>>(
        job, span, [&](const Elements<Rule>& at, int64_t i) { work.update_group(job, at, i, hyper); });
    for (int k = 0; k < Rule::kStates; ++k) {
      const auto encode = encoder_of<Lanes, Codec>(Rule::kStateSpecs[k].role);
      const auto largest = static_cast<uint32_t>(Lanes::reduce_max(work.largest[k]));
      uint8_t* codes = static_cast<uint8_t*>(job.state[k].data) + span.begin;
      job.state[k].absmax[block] = encode(work.state[k], span.n, largest, codes);
    }
  }
}

// A block of elements in fp32, whatever their states' codecs: in place where memory has a whole block of them, else in
// scratch. What is beyond a short block does not matter.
template <class Lanes, class Rule>
struct Block {
  using Number = typename Lanes::Number;
  alignas(64) float scratch_p[kStateBlock] = {}, scratch_g[kStateBlock] = {};
  alignas(64) float scratch_s[kSlots<Rule>][kStateBlock] = {};
  const float *p, *g;
  float* s[kSlots<Rule>];

  void load(const StepJob& job, const Span& span, int64_t block) {
    p = whole(read<Lanes>(job.param, job.param_dtype, span.begin, span.n, scratch_p), span.n, scratch_p);
    g = whole(read<Lanes>(job.grad, job.grad_dtype, span.begin, span.n, scratch_g), span.n, scratch_g);
    for (int k = 0; k < Rule::kStates; ++k) {
      const StateSlot& state = job.state[k];
      if (state.codec == kUncoded) {
        s[k] = const_cast<float*>(whole(static_cast<float*>(state.data) + span.begin, span.n, scratch_s[k]));
      } else {
        s[k] = scratch_s[k];
        const auto* codes = static_cast<const uint8_t*>(state.data) + span.begin;
        codec_numbered<Lanes>(state.codec).decode(Rule::kStateSpecs[k].role, codes, span.n, state.absmax[block], s[k]);
      }
    }
  }

  void store_states(const StepJob& job, const Span& span, int64_t block) {
    for (int k = 0; k < Rule::kStates; ++k) {
      const StateSlot& state = job.state[k];
      if (state.codec != kUncoded) {
        auto* codes = static_cast<uint8_t*>(state.data) + span.begin;
        state.absmax[block] = codec_numbered<Lanes>(state.codec).encode(Rule::kStateSpecs[k].role, s[k], span.n, codes);
      } else if (s[k] == scratch_s[k]) {
        Lanes::copy(static_cast<float*>(state.data) + span.begin, s[k], span.n * sizeof(float));
      }
    }
  }

  // Calls visit(g, p, states) for every vector. What p is afterwards goes to `out`, and the states to where they were.
  template <class Visit>
  void each_vector(int64_t n, float* out, const Visit& visit) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) {
      StatesOf<Number, Rule> states;
      for (int k = 0; k < Rule::kStates; ++k) states[k] = Number(Lanes::load(s[k] + i));
      Number x(Lanes::load(p + i));
      visit(Number(Lanes::load(g + i)), x, states);
      store_as<Lanes>(out, DType::kFloat32, i, vector_of(x));
      for (int k = 0; k < Rule::kStates; ++k) store_as<Lanes>(s[k], DType::kFloat32, i, vector_of(states[k]));
    }
  }

 private:
  // The numbers themselves, or a copy that may be read beyond n.
  static const float* whole(const float* x, int64_t n, float* scratch) {
    if (n == kStateBlock || x == scratch) return x;
    Lanes::copy(scratch, x, n * sizeof(float));
    return scratch;
  }
};

// Calls visit(g, p, states) for all elements of some blocks, and writes what becomes of p to `out`.
template <class Lanes, class Rule, class Visit>
void through_scratch(const StepJob& job, int64_t first, int64_t last, void* out, DType dtype, const Visit& visit) {
  Block<Lanes, Rule> elements;
  alignas(64) float result[kStateBlock];
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    elements.load(job, span, block);
    const bool in_place = dtype == DType::kFloat32 && span.n == kStateBlock;
    elements.each_vector(span.n, in_place ? static_cast<float*>(out) + span.begin : result, visit);
    if (!in_place) write<Lanes>(out, dtype, span.begin, span.n, result);
    elements.store_states(job, span, block);
  }
}

template <class Lanes, class Rule>
void step_any(const StepJob& job, const typename Rule::Hyper hyper, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  through_scratch<Lanes, Rule>(
      job, first, last, job.param, job.param_dtype,
      [&](Number g, Number& p, StatesOf<Number, Rule>& s) { guarded_update<Rule>(g, p, s, hyper); });
}

// Moves the states on and writes the directions, of elements that no step would touch as NaN.
template <class Lanes, class Rule>
void direction(const StepJob& job, const void* opaque, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  const auto hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  through_scratch<Lanes, Rule>(
      job, first, last, job.direction, DType::kFloat32,
      [&](Number g, Number& p, StatesOf<Number, Rule>& s) { p = guarded_direction<Rule>(g, p, s, hyper); });
}

// Takes a step along given directions.
template <class Lanes, class Rule>
void apply(const StepJob& job, const void* opaque, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  const auto hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  alignas(64) float p[kStateBlock] = {}, u[kStateBlock] = {};
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    const float* from = read<Lanes>(job.param, job.param_dtype, span.begin, span.n, p);
    if (from != p) Lanes::copy(p, from, span.n * sizeof(float));
    Lanes::copy(u, job.direction + span.begin, span.n * sizeof(float));
    for (int64_t i = 0; i < span.n; i += Lanes::kWidth) {
      Number x(Lanes::load(p + i));
      guarded_apply<Rule>(x, Number(Lanes::load(u + i)), hyper);
      Lanes::store(p + i, vector_of(x));
    }
    write<Lanes>(job.param, job.param_dtype, span.begin, span.n, p);
  }
}

template <class Lanes, class Rule>
void step(const StepJob& job, const void* opaque, int64_t first, int64_t last) {
  const auto& hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  const int codec = common_codec(job, Rule::kStates);
  if (codec == kUncoded) return step_float32<Lanes, Rule>(job, hyper, first, last);
  if constexpr (Rule::kStates > 0) {
    bool done = false;
    for_each_codec(FusedCodecs{}, [&](auto fused, int) {
      using Codec = decltype(fused);
      if (codec != number_of<Codec>()) return;
      step_coded<Lanes, Rule, Codec>(job, hyper, first, last);
      done = true;
    });
    if (!done) step_any<Lanes, Rule>(job, hyper, first, last);
  }
}

BNBOPS_NAMESPACE_END
