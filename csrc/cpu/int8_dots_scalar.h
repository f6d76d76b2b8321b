// Sums of products of int8, and what the other int8_dots_*.h mean.
#pragma once

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

struct ScalarDots {
  using Activation = int16_t;                      // how `prepare` stores a code
  static constexpr int64_t kRowBlock = 32;         // rows of activations that stay in cache while the weight passes
  static constexpr int kRows = 1, kColumns = 4;    // of a tile
  static constexpr int64_t kPackFrom = INT64_MAX;  // rows from which `packed_rows` multiplies; never

  // sums[r * sums_stride + c] = sum over k < inner of a[r * stride + k] * w[c][k]. Beyond `inner` the activations are
  // zeros up to the next multiple of 64, and the weight must not be read.
  template <int kTileRows>
  static void tile(const Activation* a, int64_t stride, const int32_t* /*activation_sums*/,
                   const int8_t* const (&w)[kColumns], int64_t inner, int32_t* sums, int64_t sums_stride) {
    static_assert(kTileRows == 1);
    (void)stride, (void)sums_stride;
    for (int c = 0; c < kColumns; ++c) {
      int32_t sum = 0;
      for (int64_t k = 0; k < inner; ++k) sum += a[k] * static_cast<int16_t>(w[c][k]);
      sums[c] = sum;
    }
  }
};

BNBOPS_NAMESPACE_END
