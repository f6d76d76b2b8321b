// What a thread block makes of the sums of a tile of a product.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/threads.h"
#include "formats/int8.h"

namespace bnbops::cuda {

BNBOPS_DEVICE float rounded_to(DType dtype, float x) {
  return dtype == DType::kFloat32 ? x : from_half(dtype, pack_halves(dtype, x, 0.0F) & 0xFFFFU);
}

// Threads have eight columns each, of kOwn rows; some may have none.
template <int kColumns, int kRows, int kOwn>
struct Int8Tile {
  static constexpr int kOutliers = 16;  // at a time
  // What they multiply: a row of weights and one of activations for each outlier.
  struct Shared {
    alignas(16) float weight[kOutliers][kColumns], x[kOutliers][kRows];
  };

  const Int8Epilogue& epilogue;
  int64_t row, column;      // where the tile begins
  int own_row, own_column;  // of this thread, in the tile

  BNBOPS_DEVICE Int8Tile(const Int8Epilogue& of, int64_t first_row, int64_t first_column)
      : epilogue(of),
        row(first_row),
        column(first_column),
        own_row(threadIdx.x / (kColumns / kOctet) * kOwn),
        own_column(threadIdx.x % (kColumns / kOctet) * kOctet) {}

  // All threads of the thread block call; load_sums(row, sum) gives those of this thread's columns in a row of the
  // tile.
  template <class LoadSums>
  BNBOPS_DEVICE void write(const Int8Outliers& outliers, Shared& shared, const LoadSums& load_sums) const {
    float part[kOwn][kOctet] = {};
    const int count = outliers.x == nullptr ? 0 : *outliers.count;
    for (int first = 0; first < count; first += kOutliers) {
      const int some = count - first < kOutliers ? count - first : kOutliers;
      __syncthreads();  // the last ones have been multiplied
      load_outliers(outliers, first, some, shared);
      __syncthreads();
      if (own_row < kRows) add_products(some, shared, part);
    }
    if (own_row >= kRows || column + own_column >= epilogue.columns) return;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      if (row + own_row + r >= epilogue.rows) return;
      int32_t sum[kOctet];
      load_sums(own_row + r, sum);
      write_row(row + own_row + r, sum, part[r], count > 0);
    }
  }

 private:
  BNBOPS_DEVICE void load_outliers(const Int8Outliers& outliers, int first, int some, Shared& shared) const {
    for (int i = threadIdx.x; i < some * kColumns; i += kThreads) {
      const int which = i / kColumns, c = i % kColumns;
      float weight = 0.0F;
      if (column + c < epilogue.columns) {
        const int8_t code = outliers.weight[(column + c) * outliers.inner + outliers.columns[first + which]];
        weight = rounded_to(epilogue.dtype, int8_value(code, decodable(epilogue.col_stats[column + c])));
      }
      shared.weight[which][c] = weight;
    }
    for (int i = threadIdx.x; i < some * kRows; i += kThreads) {
      const int which = i / kRows, r = i % kRows;
      float x = 0.0F;
      if (row + r < epilogue.rows) {
        const int64_t at = (row + r) * outliers.inner + outliers.columns[first + which];
        x = encodable(load_element(outliers.x, epilogue.dtype, at));
      }
      shared.x[which][r] = x;
    }
  }

  // In the order of the columns, as on every device.
  BNBOPS_DEVICE void add_products(int some, const Shared& shared, float (&part)[kOwn][kOctet]) const {
    for (int o = 0; o < some; ++o) {
      const auto low = load_vector<float4>(shared.weight[o] + own_column);
      const auto high = load_vector<float4>(shared.weight[o] + own_column + 4);
      const float weight[kOctet] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      unrolled<kOwn>([&](int r) {
        const float x = shared.x[o][own_row + r];
        unrolled<kOctet>([&](int i) { part[r][i] = fused_multiply_add(x, weight[i], part[r][i]); });
      });
    }
  }

  BNBOPS_DEVICE void write_row(int64_t at_row, const int32_t (&sum)[kOctet], const float (&outlier_part)[kOctet],
                               bool has_outliers) const {
    const int64_t at = column + own_column, count = epilogue.columns - at;
    const float row_scale = decodable(epilogue.row_stats[at_row]);
    float scale[kOctet], x[kOctet];
    to_floats(load_octet(epilogue.col_stats, DType::kFloat32, at, count), DType::kFloat32, scale);
    unrolled<kOctet>([&](int i) {
      x[i] = product_value(sum[i], row_scale, decodable(scale[i]));
      if (has_outliers) x[i] += outlier_part[i];
    });
    if (epilogue.bias != nullptr) {
      float bias[kOctet];
      to_floats(load_octet(epilogue.bias, epilogue.bias_dtype, at, count), epilogue.bias_dtype, bias);
      unrolled<kOctet>([&](int i) { x[i] += bias[i]; });
    }
    store_octet(epilogue.out, epilogue.dtype, at_row * epilogue.columns + at, count, x);
  }
};

}  // namespace bnbops::cuda
