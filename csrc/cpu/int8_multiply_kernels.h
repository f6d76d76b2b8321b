// Int8 matrix products and what follows them. The sums of products are exact, so that only they (Dots), reading and
// writing (Lanes) know the instruction set.
#pragma once

#include <algorithm>

#include "cpu/int8_quantize_kernels.h"
#include "cpu/unrolled.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::Int8MatmulJob;
using cpu::Int8Outliers;
using cpu::kInt8Panel;

// ---- what follows a product ------------------------------------------------------------------------------------

// The scales and biases of a panel's columns, and the weights that meet outliers.
template <class Lanes>
struct PanelEpilogue {
  static constexpr int64_t kOutliers = 64;                   // at a time
  static constexpr int kRows = Lanes::kWidth == 16 ? 6 : 2;  // of a tile, as many as the registers hold

  const Int8Epilogue& epilogue;
  int64_t begin, width;
  alignas(64) float scales[kInt8Panel] = {}, biases[kInt8Panel] = {};

  PanelEpilogue(const Int8Epilogue& of, int64_t first_column)
      : epilogue(of), begin(first_column), width(std::min(kInt8Panel, of.columns - first_column)) {
    for (int64_t c = 0; c < width; ++c) scales[c] = decodable(of.col_stats[begin + c]);
    if (of.bias != nullptr) {
      float scratch[kInt8Panel];
      std::copy_n(read<Lanes>(of.bias, of.bias_dtype, begin, width, scratch), width, biases);
    }
  }

  // One row of sums, with the outliers' part in fp32 or null.
  void row(const int32_t* sums, int64_t row, const float* outlier_part) const {
    alignas(64) float values[kInt8Panel];
    const float row_scale = decodable(epilogue.row_stats[row]);
    for (int64_t c = 0; c < width; ++c) {
      values[c] = product_value(sums[c], row_scale, scales[c]);
    }
    if (outlier_part != nullptr) {
      for (int64_t c = 0; c < width; ++c) values[c] += outlier_part[c];
    }
    if (epilogue.bias != nullptr) {
      for (int64_t c = 0; c < width; ++c) values[c] += biases[c];
    }
    write<Lanes>(epilogue.out, epilogue.dtype, row * epilogue.columns + begin, width, values);
  }

  // part[r][c] = sum over the outlier columns, in order, of x[first_row + r] times the decoded weights of the panel,
  // which are rounded to x's dtype.
  void multiply_outliers(const Int8Outliers& outliers, const int8_t* weight, int64_t inner, int64_t first_row,
                         int64_t rows, float (*part)[kInt8Panel]) const {
    alignas(64) float decoded_weights[kOutliers][kInt8Panel] = {};
    for (int64_t r = 0; r < rows; ++r) std::fill_n(part[r], kInt8Panel, 0.0F);
    for (int64_t o = 0; o < outliers.count; o += kOutliers) {
      const int64_t n = std::min(kOutliers, outliers.count - o);
      decode_columns(weight + begin * inner, inner, outliers.columns + o, n, decoded_weights);
      const float* x = outliers.values + first_row * outliers.count + o;
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows) {
        add_products<kRows>(x + r * outliers.count, outliers.count, n, decoded_weights, part + r);
      }
      for (; r < rows; ++r) {
        add_products<1>(x + r * outliers.count, outliers.count, n, decoded_weights, part + r);
      }
    }
  }

  // A tile of kTileRows rows by four vectors of columns at a time, whose sums stay in registers.
  template <int kTileRows>
  static void add_products(const float* x, int64_t stride, int64_t n, const float (*weights)[kInt8Panel],
                           float (*part)[kInt8Panel]) {
    constexpr int kWidth = Lanes::kWidth;
    for (int64_t c = 0; c < kInt8Panel; c += 4 * kWidth) {
      typename Lanes::Float sum[4 * kTileRows];
      unrolled<4 * kTileRows>([&](auto i) { sum[i] = Lanes::load(part[i / 4] + c + i % 4 * kWidth); });
      for (int64_t o = 0; o < n; ++o) {
        typename Lanes::Float weight[4];
        unrolled<4>([&](auto v) { weight[v] = Lanes::load(weights[o] + c + v * kWidth); });
        unrolled<kTileRows>([&](auto r) {
          const auto value = Lanes::splat(x[r * stride + o]);
          unrolled<4>([&](auto v) { sum[4 * r + v] = Lanes::fma(value, weight[v], sum[4 * r + v]); });
        });
      }
      unrolled<4 * kTileRows>([&](auto i) { Lanes::store(part[i / 4] + c + i % 4 * kWidth, sum[i]); });
    }
  }

  void decode_columns(const int8_t* weight, int64_t inner, const int64_t* which, int64_t n,
                      float (*to)[kInt8Panel]) const {
    int8_t codes[kOutliers][kInt8Panel] = {};
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = 0; i < n; ++i) codes[i][c] = weight[c * inner + which[i]];
    }
    for (int64_t i = 0; i < n; ++i) {
      float exact[kInt8Panel];
      for (int64_t c = 0; c < kInt8Panel; ++c) exact[c] = int8_value(codes[i][c], scales[c]);
      uint8_t rounded[kInt8Panel * sizeof(float)] = {};
      write<Lanes>(rounded, epilogue.dtype, 0, kInt8Panel, exact);
      std::copy_n(read<Lanes>(rounded, epilogue.dtype, 0, kInt8Panel, exact), kInt8Panel, to[i]);
    }
  }
};

template <class Lanes>
void dequantize_sums(const int32_t* sums, const Int8Epilogue& epilogue, int64_t first, int64_t last) {
  for (int64_t begin = 0; begin < epilogue.columns; begin += kInt8Panel) {
    const PanelEpilogue<Lanes> panel(epilogue, begin);
    for (int64_t row = first; row < last; ++row) panel.row(sums + row * epilogue.columns + begin, row, nullptr);
  }
}

// ---- matrix products -------------------------------------------------------------------------------------------

// The sums of `rows` rows from `row` on, and of the panel of columns from `column` on.
template <class Dots>
void multiply_panel(const Int8MatmulJob& job, int64_t row, int64_t rows, int64_t column, int32_t* sums) {
  const int64_t stride = row_stride(job.inner), last_column = job.columns - 1;
  const auto* a = static_cast<const typename Dots::Activation*>(job.activations) + row * stride;
  const int64_t width = std::min(kInt8Panel, job.columns - column);
  for (int64_t c = 0; c < width; c += Dots::kColumns) {
    const int8_t* w[Dots::kColumns];  // beyond the last column: that one again
    for (int i = 0; i < Dots::kColumns; ++i) w[i] = job.weight + std::min(column + c + i, last_column) * job.inner;
    const auto tile = [&](auto tile_rows, int64_t r) {
      Dots::template tile<tile_rows()>(a + r * stride, stride, job.activation_sums + row + r, w, job.inner,
                                       sums + r * kInt8Panel + c, kInt8Panel);
    };
    int64_t r = 0;
    for (; r + Dots::kRows <= rows; r += Dots::kRows) tile(std::integral_constant<int, Dots::kRows>{}, r);
    for (; r < rows; ++r) tile(std::integral_constant<int, 1>{}, r);
  }
}

// The same from weights that are packed, a part of their depth after the other.
template <class Dots>
void multiply_packed_panel(const Int8MatmulJob& job, int64_t row, int64_t rows, int64_t column, int32_t* sums) {
  const int64_t stride = row_stride(job.inner), width = std::min(kInt8Panel, job.columns - column);
  const auto* a = static_cast<const typename Dots::Activation*>(job.activations) + row * stride;
  alignas(64) int8_t packed[kInt8Panel * Dots::kDepth];
  for (int64_t r = 0; r < rows; ++r) {
    std::fill_n(sums + r * kInt8Panel, kInt8Panel, Dots::initial_sum(job.activation_sums[row + r]));
  }
  for (int64_t k = 0; k < job.inner; k += Dots::kDepth) {
    const int64_t depth = std::min(Dots::kDepth, job.inner - k);
    pack_weights(job.weight + column * job.inner + k, job.inner, width, depth, Dots::kShift, packed);
    Dots::packed_rows(a + k, stride, rows, packed, padded_inner(depth), sums);
  }
}

template <class Dots>
void multiply_tile(const Int8MatmulJob& job, int64_t row, int64_t rows, int64_t column, int32_t* sums) {
  if constexpr (Dots::kPackFrom < INT64_MAX) {
    if (rows >= Dots::kPackFrom) return multiply_packed_panel<Dots>(job, row, rows, column, sums);
  }
  multiply_panel<Dots>(job, row, rows, column, sums);
}

template <class Lanes, class Dots>
void multiply(const Int8MatmulJob& job, int64_t first, int64_t last) {
  using Row = int32_t[kInt8Panel];
  using Part = float[kInt8Panel];
  const int64_t row_blocks = (job.rows + Dots::kRowBlock - 1) / Dots::kRowBlock;
  const int64_t block_rows = std::min(Dots::kRowBlock, job.rows);
  const Scratch<Row> sums = make_scratch<Row>(block_rows);
  const bool has_outliers = job.outliers.count > 0;
  const Scratch<Part> part = make_scratch<Part>(has_outliers ? block_rows : 0);
  for (int64_t task = first; task < last; ++task) {
    const int64_t column = task / row_blocks * kInt8Panel, row = task % row_blocks * Dots::kRowBlock;
    const int64_t rows = std::min(Dots::kRowBlock, job.rows - row), width = std::min(kInt8Panel, job.columns - column);
    multiply_tile<Dots>(job, row, rows, column, sums[0]);
    if (job.epilogue == nullptr) {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(sums[r], width, job.sums + (row + r) * job.columns + column);
      continue;
    }
    const PanelEpilogue<Lanes> panel(*job.epilogue, column);
    if (has_outliers) panel.multiply_outliers(job.outliers, job.weight, job.inner, row, rows, part.get());
    for (int64_t r = 0; r < rows; ++r) panel.row(sums[r], row + r, has_outliers ? part[r] : nullptr);
  }
}

BNBOPS_NAMESPACE_END
