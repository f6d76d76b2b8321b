// Sums of squares for norms, in the order of norm_math.h.
#pragma once

#include "cpu/blocks.h"
#include "ops/norms/norm_math.h"

BNBOPS_NAMESPACE_BEGIN

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

BNBOPS_NAMESPACE_END
