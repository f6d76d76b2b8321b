// Few rows of activations times a 4-bit weight, for any lanes: codes become fp32 values in a register, are multiplied
// and forgotten.
#pragma once

#include "core/lanes_scalar.h"
#include "cpu/unrolled.h"
#include "cpu/weight_4bit_kernels.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::Linear4bitJob;

constexpr int kCodesPerDword = 8;

template <class Lanes>
constexpr int kDwordsGroup = kCodesPerDword * Lanes::kWidth;  // elements of a vector of codes

// Shifting a dword of codes to the right by 4 * t brings a code to the bottom: that of its element t ^ 1 if high
// nibbles are the first ones. So activations come in an order for which no code need move to another lane: of each
// group of kLanes dwords, first element 1 of every dword, then element 0, 3, 2, ...
// One row of n elements, as fp32; zeros after it, up to `padded`, a multiple of a group.
template <class Lanes>
void order_for_codes(const void* x, DType dtype, int format, int64_t n, int64_t padded, float* to) {
  const Nibbles nibbles = kFormats4bit[format].nibbles;
  for (int64_t group = 0; group < padded; group += kDwordsGroup<Lanes>) {
    for (int position = 0; position < kCodesPerDword; ++position) {
      for (int64_t dword = 0; dword < Lanes::kWidth; ++dword) {
        const int64_t i = group + dword * kCodesPerDword + nibble_shift(nibbles, position) / 4;
        *to++ = i < n ? load_as<ScalarLanes>(x, dtype, i) : 0.0F;
      }
    }
  }
}

inline void store_output(const Linear4bitJob& job, int64_t row, int64_t feature, float sum) {
  const float bias = job.bias == nullptr ? 0.0F : load_as<ScalarLanes>(job.bias, job.dtype, feature);
  store_as<ScalarLanes>(job.out, job.dtype, row * job.out_features + feature, sum + bias);
}

// Features are taken in blocks and in_features in pieces, so that activations are read from the first cache.
constexpr int64_t kFeatureBlock = 16;
constexpr int64_t kAhead = 4096;  // bytes: processors do not prefetch across a page's end
template <int kRows>
constexpr int64_t kPiece4bit = kRows <= 2 ? 4096 : 8192 / kRows;  // elements; a multiple of every group

// The products of one piece of a row of weights, whose scales are given, with kRows rows of activations.
template <class Lanes, int kRows>
BNBOPS_HD void multiply_piece(const typename Lanes::Codebook4bit& codebook, const typename Lanes::Spread& spread,
                              const uint8_t* codes, const float* scales, int log2_blocksize, const float* x,
                              int64_t x_stride, int64_t n, typename Lanes::Float (&result)[kRows]) {
  typename Lanes::Float sums[kRows];  // in registers: `result` might be where the codes are, as far as C++ knows
  std::copy_n(result, kRows, sums);
  const auto add_group = [&](const uint8_t* from, int64_t k) {
    typename Lanes::Float parts[2][kRows];
    for (auto& part : parts) std::fill_n(part, kRows, Lanes::splat(0.0F));
    const auto dwords = Lanes::load_int(from);
    unrolled<kCodesPerDword>([&](auto position) BNBOPS_INLINE_LAMBDA {
      const auto weights = codebook.lookup(Lanes::template shift_right<4 * position>(dwords));
      for (int row = 0; row < kRows; ++row) {
        auto& sum = parts[position % 2][row];  // two, that do not wait for each other
        sum = Lanes::fma(weights, Lanes::load(x + k + row * x_stride + position * Lanes::kWidth), sum);
      }
    });
    const auto scale = spread(scales + (k >> log2_blocksize));
    for (int row = 0; row < kRows; ++row) {
      sums[row] = Lanes::fma(parts[0][row], scale, sums[row]);
      sums[row] = Lanes::fma(parts[1][row], scale, sums[row]);
    }
  };
  for_chunks<kDwordsGroup<Lanes>>(
      n,
      [&](int64_t k) {
        __builtin_prefetch(codes + k / 2 + kAhead);
        add_group(codes + k / 2, k);
      },
      [&](int64_t k, int64_t rest) {
        alignas(64) uint8_t padded[kDwordsGroup<Lanes> / 2] = {};
        Lanes::copy(padded, codes + k / 2, rest / 2);
        add_group(padded, k);
      });
  std::copy_n(sums, kRows, result);
}

// Rows [first_row, first_row + kRows) of the output.
template <class Lanes, int kRows>
void linear_4bit_rows(const Linear4bitJob& job, int64_t first_feature, int64_t last_feature, int64_t first_row) {
  using Float = typename Lanes::Float;
  constexpr int64_t kPiece = kPiece4bit<kRows>;
  const int64_t blocksize = job.weight.blocksize;
  const int log2_blocksize = __builtin_ctzll(blocksize);
  const Format4bit& format = kFormats4bit[job.weight.format];
  const typename Lanes::Codebook4bit codebook(format.values, format.nibbles);
  const typename Lanes::Spread spread(static_cast<int>(blocksize / kCodesPerDword));
  alignas(64) float scales[kPiece / kSmallestBlock4bit + Lanes::kWidth] = {};
  const float* x = job.x + first_row * job.x_stride;
  for (int64_t block = first_feature; block < last_feature; block += kFeatureBlock) {
    const int64_t features = std::min(kFeatureBlock, last_feature - block);
    Float sums[kFeatureBlock][kRows];
    for (auto& of_feature : sums) std::fill_n(of_feature, kRows, Lanes::splat(0.0F));
    for (int64_t k = 0; k < job.in_features; k += kPiece) {
      const int64_t n = std::min(kPiece, job.in_features - k);
      for (int64_t f = 0; f < features; ++f) {
        const int64_t element = job.first + (block + f) * job.in_features + k;
        scales_of_blocks<Lanes>(job.weight.scales, element / blocksize, (n + blocksize - 1) / blocksize, scales);
        multiply_piece<Lanes, kRows>(codebook, spread, job.weight.codes + element / 2, scales, log2_blocksize, x + k,
                                     job.x_stride, n, sums[f]);
      }
    }
    for (int64_t f = 0; f < features; ++f) {
      for (int row = 0; row < kRows; ++row) {
        store_output(job, first_row + row, block + f, Lanes::reduce_add(sums[f][row]));
      }
    }
  }
}

template <class Lanes>
void linear_4bit(const Linear4bitJob& job, int64_t first_feature, int64_t last_feature) {
  for (int64_t row = 0; row < job.rows;) {
    const int64_t rest = job.rows - row, rows = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    const auto run = rows == 8   ? linear_4bit_rows<Lanes, 8>
                     : rows == 4 ? linear_4bit_rows<Lanes, 4>
                     : rows == 2 ? linear_4bit_rows<Lanes, 2>
                                 : linear_4bit_rows<Lanes, 1>;
    run(job, first_feature, last_feature, row);
    row += rows;
  }
}

BNBOPS_NAMESPACE_END
