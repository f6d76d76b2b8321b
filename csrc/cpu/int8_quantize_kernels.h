// Int8 codes of rows and columns, and back. The loops are plain, and the compiler makes vectors of them; only reading
// and writing (Lanes) know the instruction set.
#pragma once

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/int8_kernels_table.h"
#include "cpu/scratch.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::Int8DequantJob;
using cpu::Int8QuantJob;
using cpu::kInt8Piece;

constexpr float kInverse127 = 1.0F / 127.0F;
constexpr uint32_t kFloatMaxBits = 0x7F7FFFFFU;

// ---- one element -----------------------------------------------------------------------------------------------

// The bits of the smallest magnitude that is left out: an outlier or, without a threshold, a NaN. A NaN's bits are
// larger than any number's, so it is always left out.
inline uint32_t left_out_from(const Int8QuantJob& job) {
  return job.has_threshold ? std::min(bits_of(job.threshold), kInfinityBits) : kInfinityBits + 1;
}

BNBOPS_HD uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFU; }

// 0 for what is left out. An infinity counts as the largest float. (A mask: choices are not always vectorized.)
BNBOPS_HD uint32_t counted_bits(float x, uint32_t limit) {
  const uint32_t bits = magnitude_bits(x);
  const uint32_t all_ones_if_counted = 0U - static_cast<uint32_t>(bits < limit);
  return std::min(bits, kFloatMaxBits) & all_ones_if_counted;
}

// The code of x: x * factor to nearest, ties to even, by the float adder.
BNBOPS_HD int8_t code_of(float x, float factor, uint32_t limit) {
  const float counted = float_from_bits(counted_bits(x, limit) | (bits_of(x) & 0x80000000U));
  return static_cast<int8_t>(bits_of(counted * factor + 12582912.0F) - 0x4B400000U);
}

// 127 / absmax; 0 for zeros. A tiny absmax has no finite inverse.
BNBOPS_HD float code_factor(float absmax) {
  const float factor = 127.0F * (1.0F / absmax);  // in the roundings of bitsandbytes, for the same codes
  return absmax > 0 ? std::min(factor, kFloatMax) : 0.0F;
}

// An infinite scale counts as the largest float: 0 times it is 0. A NaN remains.
BNBOPS_HD float finite_scale(float scale) { return kFloatMax < scale ? kFloatMax : scale; }

BNBOPS_HD float decoded(int8_t code, float scale) { return static_cast<float>(code) * scale * kInverse127; }

// ---- rows of activations ---------------------------------------------------------------------------------------

inline int64_t padded_inner(int64_t inner) { return (inner + 63) / 64 * 64; }

// From one row of activations to the next. An odd number of cache lines apart, rows of a tile share no cache set.
inline int64_t row_stride(int64_t inner) { return (padded_inner(inner) / 64 | 1) * 64; }

template <class Dots>
int64_t row_bytes(int64_t inner) {
  return row_stride(inner) * static_cast<int64_t>(sizeof(typename Dots::Activation));
}

template <class Dots>
int32_t prepare(const int8_t* codes, int64_t inner, void* row) {
  auto* to = static_cast<typename Dots::Activation*>(row);
  int32_t sum = 0;
  for (int64_t k = 0; k < inner; ++k) {
    to[k] = codes[k];
    sum += codes[k];
  }
  std::fill(to + inner, to + padded_inner(inner), typename Dots::Activation{0});
  return sum;
}

// ---- rows and columns ------------------------------------------------------------------------------------------

// Loops over a piece. Plain arguments, or the compiler would fear that a code written changes a loop's bound.
inline uint32_t largest_counted(const float* __restrict x, int64_t n, uint32_t limit) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, counted_bits(x[i], limit));
  return largest;
}

inline void encode(const float* __restrict x, int64_t n, float factor, uint32_t limit, int8_t* __restrict codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = code_of(x[i], factor, limit);
}

inline void encode_each(const float* __restrict x, int64_t n, const float* __restrict factor, uint32_t limit,
                        int8_t* __restrict codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = code_of(x[i], factor[i], limit);
}

inline void take_larger(const float* __restrict x, int64_t n, uint32_t limit, uint32_t* __restrict largest) {
  for (int64_t i = 0; i < n; ++i) largest[i] = std::max(largest[i], counted_bits(x[i], limit));
}

inline void note_outliers(const float* __restrict x, int64_t n, uint32_t limit, uint8_t* __restrict noted) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    noted[i] |=
        static_cast<uint8_t>(static_cast<uint32_t>(bits >= limit) & static_cast<uint32_t>(bits <= kInfinityBits));
  }
}

// Calls visit(x, n, i) for the elements from the i-th to the (i + n)-th of a row, in fp32.
template <class Lanes, class Visit>
inline void each_piece(const Int8QuantJob& job, int64_t row, int64_t begin, int64_t end, const Visit& visit) {
  alignas(64) float scratch[kInt8Piece];
  for (int64_t i = begin; i < end; i += kInt8Piece) {
    const int64_t n = std::min(kInt8Piece, end - i);
    visit(read<Lanes>(job.values, job.dtype, row * job.inner + i, n, scratch), n, i);
  }
}

template <class Lanes>
void scan_rows(const Int8QuantJob& job, int64_t first, int64_t last) {
  const uint32_t limit = left_out_from(job);
  const Scratch<uint8_t> noted = make_scratch<uint8_t>(job.inner);
  std::fill_n(noted.get(), job.inner, uint8_t{0});
  for (int64_t row = first; row < last; ++row) {
    uint32_t largest = 0;
    each_piece<Lanes>(job, row, 0, job.inner, [&](const float* x, int64_t n, int64_t i) {
      largest = std::max(largest, largest_counted(x, n, limit));
      if (job.has_threshold) note_outliers(x, n, limit, noted.get() + i);
    });
    job.row_stats[row] = float_from_bits(largest);
  }
  for (int64_t i = 0; job.has_threshold && i < job.inner; ++i) {  // other threads may find the same columns
    if (noted[i] != 0) __atomic_store_n(job.is_outlier + i, true, __ATOMIC_RELAXED);
  }
}

template <class Lanes, class Dots>
void encode_rows(const Int8QuantJob& job, int64_t first, int64_t last) {
  const uint32_t limit = left_out_from(job);
  const bool only_activations = job.activations != nullptr;
  const Scratch<int8_t> row_codes = make_scratch<int8_t>(only_activations ? job.inner : 0);
  for (int64_t row = first; row < last; ++row) {
    const float factor = code_factor(job.row_stats[row]);
    int8_t* codes = only_activations ? row_codes.get() : job.codes + row * job.inner;
    float* kept = job.outlier_values == nullptr ? nullptr : job.outlier_values + row * job.outlier_count;
    int64_t o = 0;
    each_piece<Lanes>(job, row, 0, job.inner, [&](const float* x, int64_t n, int64_t i) {
      encode(x, n, factor, limit, codes + i);
      for (; o < job.outlier_count && job.outliers[o] < i + n; ++o) {
        codes[job.outliers[o]] = 0;
        if (kept != nullptr) kept[o] = encodable(x[job.outliers[o] - i]);
      }
    });
    if (only_activations) {
      auto* to = static_cast<uint8_t*>(job.activations) + row * row_bytes<Dots>(job.inner);
      job.activation_sums[row] = prepare<Dots>(codes, job.inner, to);
    }
  }
}

// Ranges of pieces of columns.
template <class Lanes>
void quantize_columns(const Int8QuantJob& job, int64_t first, int64_t last) {
  const uint32_t limit = left_out_from(job);
  for (int64_t begin = first * kInt8Piece; begin < std::min(job.inner, last * kInt8Piece); begin += kInt8Piece) {
    const int64_t end = std::min(job.inner, begin + kInt8Piece);
    uint32_t largest[kInt8Piece] = {};
    float factor[kInt8Piece];
    for (int64_t row = 0; row < job.rows; ++row) {
      each_piece<Lanes>(job, row, begin, end,
                        [&](const float* x, int64_t n, int64_t) { take_larger(x, n, limit, largest); });
    }
    for (int64_t j = 0; j < end - begin; ++j) {
      job.col_stats[begin + j] = float_from_bits(largest[j]);
      factor[j] = code_factor(job.col_stats[begin + j]);
    }
    for (int64_t row = 0; row < job.rows; ++row) {
      each_piece<Lanes>(job, row, begin, end, [&](const float* x, int64_t n, int64_t i) {
        encode_each(x, n, factor, limit, job.codes + row * job.inner + i);
      });
    }
  }
}

// ---- back ------------------------------------------------------------------------------------------------------

// Writes n values from fp32.
template <class Lanes>
inline void write(const float* values, int64_t n, void* to, DType dtype) {
  auto* bytes = static_cast<uint8_t*>(to);
  for_chunks<Lanes::kWidth>(
      n, [&](int64_t i) { store_as<Lanes>(to, dtype, i, Lanes::load(values + i)); },
      [&](int64_t i, int64_t rest) {
        float padded[Lanes::kWidth] = {};
        uint8_t stored[Lanes::kWidth * sizeof(float)];
        Lanes::copy(padded, values + i, rest * sizeof(float));
        store_as<Lanes>(stored, dtype, 0, Lanes::load(padded));
        Lanes::copy(bytes + i * size_of(dtype), stored, rest * size_of(dtype));
      });
}

template <class Lanes>
void dequantize_int8(const Int8DequantJob& job, int64_t first, int64_t last) {
  alignas(64) float values[kInt8Piece];
  for (int64_t row = first; row < last; ++row) {
    const float scale = finite_scale(job.stats[row]);
    const int8_t* codes = job.codes + row * job.inner + job.begin;
    auto* out = static_cast<uint8_t*>(job.values) + row * job.width * size_of(job.dtype);
    for (int64_t i = 0; i < job.width; i += kInt8Piece) {
      const int64_t n = std::min(kInt8Piece, job.width - i);
      for (int64_t j = 0; j < n; ++j) values[j] = decoded(codes[i + j], scale);
      write<Lanes>(values, n, out + i * size_of(job.dtype), job.dtype);
    }
  }
}

BNBOPS_NAMESPACE_END
