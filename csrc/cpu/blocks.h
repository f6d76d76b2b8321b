// Loops over one block, for any lanes. A tail is copied into a padded chunk and goes through the body's function.
#pragma once

#include "codecs.h"
#include "cpu/kernels.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::DType;

template <class Lanes>
constexpr int kGroup = 4 * Lanes::kWidth;  // elements whose codes are stored together

// Calls full(i) for each whole chunk of n elements, then tail(i, rest) for what is left.
template <int kSize, class Full, class Tail>
BNBOPS_HD void for_chunks(int64_t n, const Full& full, const Tail& tail) {
  int64_t i = 0;
  for (; i + kSize <= n; i += kSize) full(i);
  if (i < n) tail(i, n - i);
}

// The bits of the largest magnitude among n elements. As integers, so that infinities and NaN show: they are largest.
template <class Lanes, bool kSigned>
BNBOPS_HD uint32_t largest_magnitude_bits(const float* x, int64_t n) {
  auto largest = Lanes::splat_int(0);
  const auto take = [&](const float* from) {
    const auto value = Lanes::load(from);
    largest = Lanes::max(largest, Lanes::as_int(kSigned ? Lanes::abs(value) : value));
  };
  for_chunks<Lanes::kWidth>(
      n, [&](int64_t i) { take(x + i); },
      [&](int64_t i, int64_t rest) {
        float padded[Lanes::kWidth] = {};
        memcpy(padded, x + i, rest * sizeof(float));
        take(padded);
      });
  return static_cast<uint32_t>(Lanes::reduce_max(largest));
}

constexpr uint32_t kInfinityBits = 0x7F800000U;

// Codes of n elements: `group(x, codes)` encodes kGroup of them.
template <class Lanes, class Group>
BNBOPS_HD void encode_groups(const float* x, int64_t n, uint8_t* codes, const Group& group) {
  for_chunks<kGroup<Lanes>>(
      n, [&](int64_t i) { group(x + i, codes + i); },
      [&](int64_t i, int64_t rest) {
        float padded[kGroup<Lanes>] = {};
        uint8_t padded_codes[kGroup<Lanes>];
        memcpy(padded, x + i, rest * sizeof(float));
        group(padded, padded_codes);
        memcpy(codes + i, padded_codes, rest);
      });
}

template <class Lanes, bool kSigned>
BNBOPS_HD void encode_dynamic(const float* x, int64_t n, float inverse_absmax, uint8_t* codes) {
  const DynamicTables<Lanes> tables(kSigned ? kEncodeSigned : kEncodeUnsigned);
  const auto inverse = Lanes::splat(inverse_absmax);
  encode_groups<Lanes>(x, n, codes, [&](const float* from, uint8_t* to) {
    typename Lanes::Int k[4];
    for (int i = 0; i < 4; ++i) {
      k[i] = nearest_magnitude<Lanes, kSigned>(Lanes::load(from + i * Lanes::kWidth), inverse, tables);
    }
    kSigned ? Lanes::store_signed(k, to) : Lanes::store_unsigned(k, to);
  });
}

// `entry(x)` numbers the codebook's entry for a vector of normalised elements.
template <class Lanes, class Entry>
BNBOPS_HD void encode_entries(const float* x, int64_t n, float inverse_absmax, uint8_t* codes, const Entry& entry) {
  const auto inverse = Lanes::splat(inverse_absmax);
  encode_groups<Lanes>(x, n, codes, [&](const float* from, uint8_t* to) {
    typename Lanes::Int k[4];
    for (int i = 0; i < 4; ++i) {
      const auto normalized = Lanes::mul(Lanes::load(from + i * Lanes::kWidth), inverse);
      k[i] = entry(normalized);
    }
    Lanes::store_codes(k, to);
  });
}

template <class Lanes>
BNBOPS_HD void decode(const typename Lanes::Codebook& codebook, const uint8_t* codes, int64_t n, float absmax,
                      float* out) {
  const auto group = [&](const uint8_t* from, float* to) {
    typename Lanes::Float values[4];
    codebook.decode(from, absmax, values);
    for (int i = 0; i < 4; ++i) Lanes::store(to + i * Lanes::kWidth, values[i]);
  };
  for_chunks<kGroup<Lanes>>(
      n, [&](int64_t i) { group(codes + i, out + i); },
      [&](int64_t i, int64_t rest) {
        uint8_t padded[kGroup<Lanes>] = {};
        float values[kGroup<Lanes>];
        memcpy(padded, codes + i, rest);
        group(padded, values);
        memcpy(out + i, values, rest * sizeof(float));
      });
}

// 16-bit floats to and from fp32: `vector` moves kWidth elements.
template <class Lanes, class Vector>
BNBOPS_HD void widen(const uint16_t* from, int64_t n, float* to, const Vector& vector) {
  for_chunks<Lanes::kWidth>(
      n, [&](int64_t i) { Lanes::store(to + i, vector(from + i)); },
      [&](int64_t i, int64_t rest) {
        uint16_t padded[Lanes::kWidth] = {};
        float values[Lanes::kWidth];
        memcpy(padded, from + i, rest * sizeof(uint16_t));
        Lanes::store(values, vector(padded));
        memcpy(to + i, values, rest * sizeof(float));
      });
}

template <class Lanes, class Vector>
BNBOPS_HD void narrow(const float* from, int64_t n, uint16_t* to, const Vector& vector) {
  for_chunks<Lanes::kWidth>(
      n, [&](int64_t i) { vector(to + i, Lanes::load(from + i)); },
      [&](int64_t i, int64_t rest) {
        float padded[Lanes::kWidth] = {};
        uint16_t halves[Lanes::kWidth];
        memcpy(padded, from + i, rest * sizeof(float));
        vector(halves, Lanes::load(padded));
        memcpy(to + i, halves, rest * sizeof(uint16_t));
      });
}

// Elements [first, first + n) of a tensor as fp32: in place, or converted into `scratch`.
template <class Lanes>
inline const float* read(const void* tensor, DType dtype, int64_t first, int64_t n, float* scratch) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(tensor) + first;
  const auto* from = static_cast<const uint16_t*>(tensor) + first;
  if (dtype == DType::kBFloat16) {
    widen<Lanes>(from, n, scratch, [](const uint16_t* x) { return Lanes::load_bfloat16(x); });
  } else {
    widen<Lanes>(from, n, scratch, [](const uint16_t* x) { return Lanes::load_float16(x); });
  }
  return scratch;
}

// The way back of `read`: nothing to do where `values` already is the tensor.
template <class Lanes>
inline void write(void* tensor, DType dtype, int64_t first, int64_t n, const float* values) {
  if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(tensor) + first;
    if (to != values) memcpy(to, values, n * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(tensor) + first;
  if (dtype == DType::kBFloat16) {
    narrow<Lanes>(values, n, to, [](uint16_t* out, typename Lanes::Float x) { Lanes::store_bfloat16(out, x); });
  } else {
    narrow<Lanes>(values, n, to, [](uint16_t* out, typename Lanes::Float x) { Lanes::store_float16(out, x); });
  }
}

BNBOPS_NAMESPACE_END
