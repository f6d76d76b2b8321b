// Int8 codes of rows and columns, and back. The loops are plain, and the compiler makes vectors of them; only reading
// and writing (Lanes) know the instruction set.
#pragma once

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "formats/int8.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::Int8EncodeJob;
using cpu::kInt8Piece;

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
  for (int64_t i = 0; i < n; ++i) codes[i] = int8_code(x[i], factor, limit);
}

inline void encode_each(const float* __restrict x, int64_t n, const float* __restrict factor, uint32_t limit,
                        int8_t* __restrict codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = int8_code(x[i], factor[i], limit);
}

inline void take_larger(const float* __restrict x, int64_t n, uint32_t limit, uint32_t* __restrict largest) {
  for (int64_t i = 0; i < n; ++i) largest[i] = std::max(largest[i], counted_bits(x[i], limit));
}

inline void note_outliers(const float* __restrict x, int64_t n, uint32_t limit, uint8_t* __restrict noted) {
  for (int64_t i = 0; i < n; ++i) noted[i] |= static_cast<uint8_t>(is_outlier(x[i], limit));
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
  const Scratch<uint8_t> noted = make_scratch<uint8_t>(job.inner);
  std::fill_n(noted.get(), job.inner, uint8_t{0});
  for (int64_t row = first; row < last; ++row) {
    uint32_t largest = 0;
    each_piece<Lanes>(job, row, 0, job.inner, [&](const float* x, int64_t n, int64_t i) {
      largest = std::max(largest, largest_counted(x, n, job.limit));
      if (job.has_threshold) note_outliers(x, n, job.limit, noted.get() + i);
    });
    job.row_stats[row] = float_from_bits(largest);
  }
  for (int64_t i = 0; job.has_threshold && i < job.inner; ++i) {  // other threads may find the same columns
    if (noted[i] != 0) __atomic_store_n(job.is_outlier + i, true, __ATOMIC_RELAXED);
  }
}

template <class Lanes, class Dots>
void encode_rows(const Int8EncodeJob& job, int64_t first, int64_t last) {
  const bool only_activations = job.activations != nullptr;
  const Scratch<int8_t> row_codes = make_scratch<int8_t>(only_activations ? job.inner : 0);
  for (int64_t row = first; row < last; ++row) {
    const float factor = code_factor(inverse_scale(job.row_stats[row]));
    int8_t* codes = only_activations ? row_codes.get() : job.codes + row * job.inner;
    float* kept = job.outlier_values == nullptr ? nullptr : job.outlier_values + row * job.outlier_count;
    int64_t o = 0;
    each_piece<Lanes>(job, row, 0, job.inner, [&](const float* x, int64_t n, int64_t i) {
      encode(x, n, factor, job.limit, codes + i);
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
  for (int64_t begin = first * kInt8Piece; begin < std::min(job.inner, last * kInt8Piece); begin += kInt8Piece) {
    const int64_t end = std::min(job.inner, begin + kInt8Piece);
    uint32_t largest[kInt8Piece] = {};
    float factor[kInt8Piece];
    for (int64_t row = 0; row < job.rows; ++row) {
      each_piece<Lanes>(job, row, begin, end,
                        [&](const float* x, int64_t n, int64_t) { take_larger(x, n, job.limit, largest); });
    }
    for (int64_t j = 0; j < end - begin; ++j) {
      job.col_stats[begin + j] = float_from_bits(largest[j]);
      factor[j] = code_factor(inverse_scale(job.col_stats[begin + j]));
    }
    for (int64_t row = 0; row < job.rows; ++row) {
      each_piece<Lanes>(job, row, begin, end, [&](const float* x, int64_t n, int64_t i) {
        encode_each(x, n, factor, job.limit, job.codes + row * job.inner + i);
      });
    }
  }
}

// ---- back ------------------------------------------------------------------------------------------------------

template <class Lanes>
void dequantize_int8(const Int8DequantJob& job, int64_t first, int64_t last) {
  alignas(64) float values[kInt8Piece];
  for (int64_t row = first; row < last; ++row) {
    const float scale = decodable(job.stats[row]);
    const int8_t* codes = job.codes + row * job.inner + job.begin;
    auto* out = static_cast<uint8_t*>(job.values) + row * job.width * size_of(job.dtype);
    for (int64_t i = 0; i < job.width; i += kInt8Piece) {
      const int64_t n = std::min(kInt8Piece, job.width - i);
      for (int64_t j = 0; j < n; ++j) values[j] = int8_value(codes[i + j], scale);
      write<Lanes>(out, job.dtype, i, n, values);
    }
  }
}

BNBOPS_NAMESPACE_END
