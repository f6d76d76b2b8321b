// Sums of squares for norms, in the order of norm_math.h.
#pragma once

#include "cpu/step_kernels.h"
#include "ops/norms/norm_math.h"

BNBOPS_NAMESPACE_BEGIN

static_assert(kColumns == kStateBlock);

// Adds the squares of a block to its columns.
inline void add_squares(const float* x, int64_t n, double* column) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = counted(x[i]);
    column[i] += value * value;  // exact but for the sum
  }
}

// One sum for each piece of elements.
template <class Lanes>
void squares(const void* values, DType dtype, int64_t numel, int64_t first, int64_t last, double* sums) {
  alignas(64) float scratch[kColumns];
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t end = std::min(numel, (piece + 1) * kNormPiece);
    double column[kColumns] = {};
    for (int64_t i = piece * kNormPiece; i < end; i += kColumns) {
      const int64_t n = std::min<int64_t>(kColumns, end - i);
      add_squares(read<Lanes>(values, dtype, i, n, scratch), n, column);
    }
    sums[piece] = sum_of_columns(column);
  }
}

// Directions of one block's elements, at the states that a step would give. Nothing of it is written.
template <class Lanes, class Rule>
struct Directions {
  alignas(64) float p[kStateBlock] = {}, g[kStateBlock] = {}, s[kSlots<Rule>][kStateBlock] = {};

  // Into p; elements that no step would touch get 0, which does not count.
  void compute(const StepJob& job, const typename Rule::Hyper& hyper, const Span& span, int64_t block) {
    using Number = typename Lanes::Number;
    Lanes::copy(p, read<Lanes>(job.param, job.param_dtype, span.begin, span.n, p), span.n * sizeof(float));
    Lanes::copy(g, read<Lanes>(job.grad, job.grad_dtype, span.begin, span.n, g), span.n * sizeof(float));
    for (int k = 0; k < Rule::kStates; ++k) read_state(job, span, block, k);
    for (int64_t i = 0; i < span.n; i += Lanes::kWidth) {  // beyond n: computed, not counted
      StatesOf<Number, Rule> state;
      for (int k = 0; k < Rule::kStates; ++k) state[k] = Number(Lanes::load(s[k] + i));
      const Number u = Rule::direction(Number(Lanes::load(g + i)), Number(Lanes::load(p + i)), state, hyper);
      Lanes::store(p + i, vector_of(select(is_finite(Rule::witness(state)), u, Number(0.0F))));
    }
  }

  void read_state(const StepJob& job, const Span& span, int64_t block, int k) {
    if (job.absmax[k] == nullptr) {
      Lanes::copy(s[k], static_cast<const float*>(job.state[k]) + span.begin, span.n * sizeof(float));
      return;
    }
    const auto* codes = static_cast<const uint8_t*>(job.state[k]) + span.begin;
    decode<Lanes>(state_codebook<Lanes>(Rule::kStateSpecs[k].is_signed), codes, span.n, decodable(job.absmax[k][block]),
                  s[k], DType::kFloat32);
  }
};

// One sum for each piece of blocks.
template <class Lanes, class Rule>
void direction_squares(const StepJob& job, const void* opaque, int64_t first, int64_t last, double* sums) {
  const auto hyper = *static_cast<const typename Rule::Hyper*>(opaque);
  Directions<Lanes, Rule> directions;
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t end = std::min(job.blocks, (piece + 1) * kPieceBlocks);
    double column[kColumns] = {};
    for (int64_t block = piece * kPieceBlocks; block < end; ++block) {
      const Span span = span_of(job, block);
      directions.compute(job, hyper, span, block);
      add_squares(directions.p, span.n, column);
    }
    sums[piece] = sum_of_columns(column);
  }
}

BNBOPS_NAMESPACE_END
