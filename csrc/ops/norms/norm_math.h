// The arithmetic of norms, the same on every device.
//
// Sums of many numbers are added up in one order everywhere, so that they have the same bits: number i is added to
// column i % 256, and the columns are added pairwise, neighbours first. Squares are summed up in this way over pieces
// of 16 * 256 numbers, and so are the sums of the pieces.
#pragma once

#include <cmath>

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kColumns = 256;
constexpr int64_t kNormPiece = 16 * kColumns;

// Elements that are not finite are never updated, and must not spoil the norm of those that are.
BNBOPS_HD float counted(float x) { return is_finite(x) ? x : 0.0F; }

// The sum of columns, which change.
inline double sum_of_columns(double* column) {
  for (int n = kColumns / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) column[i] = column[2 * i] + column[2 * i + 1];
  }
  return column[0];
}

inline double sum_in_order(const double* x, int64_t n) {
  double column[kColumns] = {};
  for (int64_t i = 0; i < n; ++i) column[i % kColumns] += x[i];
  return sum_of_columns(column);
}

// ---- percentile clipping ---------------------------------------------------------------------------------------

constexpr int kNormHistory = 100;  // gradient norms to look back on

// A squared norm as the history has it.
BNBOPS_HD float kept_norm(double squared_norm, double grad_scale) {
  const double unscaled = squared_norm / (grad_scale * grad_scale);
  return unscaled < kFloatMax ? static_cast<float>(unscaled) : kFloatMax;
}

// Its place there, for the step that comes after `steps` others.
BNBOPS_HD int history_place(float steps) {
  return static_cast<int>(std::fmod(std::trunc(static_cast<double>(steps)) + 1, kNormHistory));
}

// What brings a squared norm down to a limit.
BNBOPS_HD float clip_factor(float squared_norm, float limit) {
  return squared_norm > limit ? static_cast<float>(std::sqrt(static_cast<double>(limit) / squared_norm)) : 1.0F;
}

BNBOPS_NAMESPACE_END
