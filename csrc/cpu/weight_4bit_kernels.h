// Quantization, dequantization and products of 4-bit weights, for any lanes.
#pragma once

#include <algorithm>

#include "codecs_4bit.h"
#include "cpu/blockwise_kernels.h"
#include "cpu/lanes_scalar.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::Linear4bitJob;
using cpu::Weight4bit;

template <class Lanes>
void quantize_4bit(const QuantizeJob& job, int64_t first, int64_t last) {
  const bool nf4 = memcmp(job.codebook, kNF4, sizeof(kNF4)) == 0;
  const EncoderTables4bit<Lanes> tables(nf4 ? kEncodeNF4 : kEncodeFP4);
  quantize_blocks<Lanes>(job, first, last, true, [&](const float* x, int64_t n, float inverse_absmax, int64_t i) {
    const auto inverse = Lanes::splat(inverse_absmax);
    encode_groups<Lanes, 2>(x, n, job.codes + i / 2, [&](const float* from, uint8_t* to) {
      typename Lanes::Int k[4];
      for (int v = 0; v < 4; ++v) k[v] = encode_4bit(Lanes::load(from + v * Lanes::kWidth), inverse, tables);
      Lanes::store_nibbles(k, to);
    });
  });
}

BNBOPS_HD float scale_of_block(const Weight4bit& weight, int64_t block) {
  if (weight.absmax != nullptr) return weight.absmax[block];
  return nested_scale(weight.nested_codebook[weight.nested_codes[block]],
                      weight.nested_absmax[block / weight.nested_blocksize], weight.nested_offset);
}

// Writes elements [first, first + numel) as `dtype`.
template <class Lanes>
void dequantize_4bit(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype) {
  const typename Lanes::Codebook4bit codebook(weight.codebook);
  const int64_t end = first + numel;
  auto* to = static_cast<uint8_t*>(out);
  for (int64_t i = first; i < end;) {
    const int64_t block = i / weight.blocksize, size = size_of(dtype);
    const float scale = scale_of_block(weight, block);
    if (i % 2 == 1) {  // in the lower half of a byte
      uint8_t pair[2 * sizeof(float)];
      decode<Lanes>(codebook, weight.codes + i / 2, 2, scale, pair, dtype);
      memcpy(to, pair + size, size);
      to += size;
      ++i;
      continue;
    }
    const int64_t n = std::min(end, (block + 1) * weight.blocksize) - i;
    decode<Lanes>(codebook, weight.codes + i / 2, n, scale, to, dtype);
    to += n * size;
    i += n;
  }
}

inline void store_output(const Linear4bitJob& job, int64_t row, int64_t feature, float sum) {
  const float bias = job.bias == nullptr ? 0.0F : load_as<ScalarLanes>(job.bias, job.dtype, feature);
  store_as<ScalarLanes>(job.out, job.dtype, row * job.out_features + feature, sum + bias);
}

// kRows rows of the output. Few rows are summed in several parts, or each addition would wait for the one before.
template <class Lanes, int kRows>
void linear_4bit_rows(const Linear4bitJob& job, int64_t first_feature, int64_t last_feature, int64_t first_row) {
  constexpr int kParts = kRows >= 4 ? 1 : 4;
  static_assert(cpu::kXPadding % (kParts * Lanes::kWidth) == 0);
  alignas(64) float w[cpu::kXPadding];
  for (int64_t feature = first_feature; feature < last_feature; ++feature) {
    typename Lanes::Float sums[kRows][kParts];
    for (auto& row : sums) std::fill_n(row, kParts, Lanes::splat(0.0F));
    for (int64_t k = 0; k < job.in_features; k += cpu::kXPadding) {
      const int64_t n = std::min(cpu::kXPadding, job.in_features - k);
      dequantize_4bit<Lanes>(job.weight, job.first + feature * job.in_features + k, n, w, DType::kFloat32);
      std::fill(w + n, w + cpu::kXPadding, 0.0F);
      for (int64_t i = 0; i < cpu::kXPadding; i += kParts * Lanes::kWidth) {
        for (int part = 0; part < kParts; ++part) {
          const auto weight = Lanes::load(w + i + part * Lanes::kWidth);
          const float* x = job.x + first_row * job.x_stride + k + i + part * Lanes::kWidth;
          for (int row = 0; row < kRows; ++row) {
            sums[row][part] = Lanes::fma(weight, Lanes::load(x + row * job.x_stride), sums[row][part]);
          }
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      float sum = 0;
      for (int part = 0; part < kParts; ++part) sum += Lanes::reduce_add(sums[row][part]);
      store_output(job, first_row + row, feature, sum);
    }
  }
}

template <class Lanes>
void linear_4bit(const Linear4bitJob& job, int64_t first_feature, int64_t last_feature) {
  for (int64_t row = 0; row < job.rows;) {
    const int64_t rest = job.rows - row;
    const int64_t rows = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    const auto run = rows == 8   ? linear_4bit_rows<Lanes, 8>
                     : rows == 4 ? linear_4bit_rows<Lanes, 4>
                     : rows == 2 ? linear_4bit_rows<Lanes, 2>
                                 : linear_4bit_rows<Lanes, 1>;
    run(job, first_feature, last_feature, row);
    row += rows;
  }
}

BNBOPS_NAMESPACE_END
