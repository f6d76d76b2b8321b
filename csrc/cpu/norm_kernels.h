// Sums of squares for norms. The order of additions is fixed, so that they have the same bits everywhere: sixteen
// interleaved sums in fp64 for each piece, then a tree.
#pragma once

#include "cpu/step_kernels.h"

BNBOPS_NAMESPACE_BEGIN

// Of the finite elements: the others are never updated, and must not spoil the norm of those that are.
inline double sum_of_squares(const float* x, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  const auto add = [&](const float* from) {
    for (int j = 0; j < kSums; ++j) {
      const double finite = is_finite(from[j]) ? from[j] : 0.0F;
      sums[j] += finite * finite;  // exact but for the sum
    }
  };
  for_chunks<kSums>(
      n, [&](int64_t i) { add(x + i); },
      [&](int64_t i, int64_t rest) {
        float padded[kSums] = {};
        memcpy(padded, x + i, rest * sizeof(float));
        add(padded);
      });
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// One sum for each piece of kChunk elements.
template <class Lanes>
void squares(const void* values, DType dtype, int64_t numel, int64_t first, int64_t last, double* sums) {
  alignas(64) float scratch[cpu::kChunk];
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t begin = piece * cpu::kChunk, n = std::min(cpu::kChunk, numel - begin);
    sums[piece] = sum_of_squares(read<Lanes>(values, dtype, begin, n, scratch), n);
  }
}

// One sum for each block of a rule's directions, at the states that a step would give. Nothing is written.
template <class Lanes, class Rule>
void direction_squares(const StepJob& job, const void* opaque, int64_t first, int64_t last, double* sums) {
  using Number = typename Lanes::Number;
  alignas(64) float p[kStateBlock] = {}, g[kStateBlock] = {}, s[kSlots<Rule>][kStateBlock] = {};
  const auto hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    Lanes::copy(p, read<Lanes>(job.param, job.param_dtype, span.begin, span.n, p), span.n * sizeof(float));
    Lanes::copy(g, read<Lanes>(job.grad, job.grad_dtype, span.begin, span.n, g), span.n * sizeof(float));
    for (int k = 0; k < Rule::kStates; ++k) {
      if (job.absmax[k] != nullptr) {
        const auto* codes = static_cast<const uint8_t*>(job.state[k]) + span.begin;
        decode<Lanes>(state_codebook<Lanes>(Rule::kStateSpecs[k].is_signed), codes, span.n,
                      decodable(job.absmax[k][block]), s[k], DType::kFloat32);
      } else {
        Lanes::copy(s[k], static_cast<const float*>(job.state[k]) + span.begin, span.n * sizeof(float));
      }
    }
    for (int64_t i = 0; i < span.n; i += Lanes::kWidth) {  // beyond n: computed, not counted
      StatesOf<Number, Rule> state;
      for (int k = 0; k < Rule::kStates; ++k) state[k] = Number(Lanes::load(s[k] + i));
      const Number u = Rule::direction(Number(Lanes::load(g + i)), Number(Lanes::load(p + i)), state, hyper);
      // an element that no step would touch does not count
      Lanes::store(p + i, vector_of(select(is_finite(Rule::witness(state)), u, Number(0.0F))));
    }
    sums[block] = sum_of_squares(p, span.n);
  }
}

BNBOPS_NAMESPACE_END
