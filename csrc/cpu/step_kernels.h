// Optimizer steps over blocks: they decode, update by a rule, and encode, and know nothing of Adam or of bytes.
//
// Where all states have a codec that ships compiled together with every rule (FusedCodecs), there is a fast way. Fp32
// states stay where they are. Any other mixture, and whatever is not a whole step, goes through fp32 scratch.
#pragma once

#include <type_traits>

#include "cpu/coded_step.h"

BNBOPS_NAMESPACE_BEGIN

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
        coding_of<Lanes>(state.codec, Rule::kStateSpecs[k].role).decode(codes, span.n, state.absmax[block], s[k]);
      }
    }
  }

  void store_states(const StepJob& job, const Span& span, int64_t block) {
    for (int k = 0; k < Rule::kStates; ++k) {
      const StateSlot& state = job.state[k];
      if (state.codec != kUncoded) {
        auto* codes = static_cast<uint8_t*>(state.data) + span.begin;
        state.absmax[block] = coding_of<Lanes>(state.codec, Rule::kStateSpecs[k].role).encode(s[k], span.n, codes);
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

// States in fp32, in place; a block that vectors do not fill goes through scratch.
template <class Lanes, class Rule>
void step_float32(const StepJob& job, const typename Rule::Hyper hyper, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    if (span.n % Lanes::kWidth != 0) {
      step_any<Lanes, Rule>(job, hyper, block, block + 1);
      continue;
    }
    for (int64_t i = span.begin; i < span.begin + span.n; i += Lanes::kWidth) {
      StatesOf<Number, Rule> s;
      for (int k = 0; k < Rule::kStates; ++k) s[k] = Number(Lanes::load(static_cast<float*>(job.state[k].data) + i));
      Number p(load_as<Lanes>(job.param, job.param_dtype, i));
      guarded_update<Rule>(Number(load_as<Lanes>(job.grad, job.grad_dtype, i)), p, s, hyper);
      store_as<Lanes>(job.param, job.param_dtype, i, vector_of(p));
      for (int k = 0; k < Rule::kStates; ++k) store_as<Lanes>(job.state[k].data, DType::kFloat32, i, vector_of(s[k]));
    }
  }
}

// The fast way, if it leads there.
template <class Lanes, class Rule, Part kPart>
bool take_coded(const StepJob& job, const typename Rule::Hyper& hyper, int64_t first, int64_t last) {
  bool done = false;
  if constexpr (Rule::kStates > 0) {
    const int common = common_codec(job, Rule::kStates);
    for_each_codec(FusedCodecs{}, [&](auto codec, int) {
      using Codec = decltype(codec);
      if (common != number_of<Codec>()) return;
      CodedStep<Lanes, Rule, Codec, kPart>(job, hyper).run(first, last);
      done = true;
    });
  }
  return done;
}

// Moves the states on and writes the directions, of elements that no step would touch as NaN. The rules whose own step
// consists of halves have the fast way.
template <class Lanes, class Rule>
void direction(const StepJob& job, const void* opaque, int64_t first, int64_t last) {
  using Number = typename Lanes::Number;
  const auto hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  if constexpr (Rule::kTrust == Trust::kDirection) {
    if (take_coded<Lanes, Rule, Part::kDirection>(job, hyper, first, last)) return;
  }
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
  if (common_codec(job, Rule::kStates) == kUncoded) return step_float32<Lanes, Rule>(job, hyper, first, last);
  if (!take_coded<Lanes, Rule, Part::kStep>(job, hyper, first, last)) step_any<Lanes, Rule>(job, hyper, first, last);
}

BNBOPS_NAMESPACE_END
