// Loops over one block, for any lanes. A tail is copied into a padded chunk and goes through the body's function.
#pragma once

#include "codecs/codec.h"
#include "codecs/dynamic8.h"
#include "cpu/kernels.h"

BNBOPS_NAMESPACE_BEGIN

template <class Lanes>
constexpr int kGroup = 4 * Lanes::kWidth;  // elements whose codes are stored together

template <class Lanes>
BNBOPS_HD typename Lanes::Float load_half(const uint16_t* x, DType dtype) {
  return dtype == DType::kBFloat16 ? Lanes::load_bfloat16(x) : Lanes::load_float16(x);
}

// kWidth elements of a tensor from the i-th on, as fp32. The dtype is the same for a whole call: a well-predicted
// branch.
template <class Lanes>
BNBOPS_HD typename Lanes::Float load_as(const void* tensor, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return Lanes::load(static_cast<const float*>(tensor) + i);
  return load_half<Lanes>(static_cast<const uint16_t*>(tensor) + i, dtype);
}

// Whatever NaN x is, the one of portable.h is written.
template <class Lanes>
BNBOPS_HD void store_as(void* tensor, DType dtype, int64_t i, typename Lanes::Float x) {
  auto* halves = static_cast<uint16_t*>(tensor) + i;
  switch (dtype) {
    case DType::kFloat32: return Lanes::store(static_cast<float*>(tensor) + i, Lanes::with_one_nan(x));
    case DType::kBFloat16: return Lanes::store_bfloat16(halves, x);
    case DType::kFloat16: return Lanes::store_float16(halves, x);
  }
}

// Vector v of a group of four.
template <class Lanes, DType kDType>
BNBOPS_HD typename Lanes::Float load_of_group(const uint8_t* group, int v) {
  if constexpr (kDType == DType::kBFloat16 && Lanes::kPairs) {
    return Lanes::load_bfloat16(reinterpret_cast<const uint16_t*>(group), v);
  } else {
    return load_as<Lanes>(group, kDType, v * Lanes::kWidth);
  }
}

// x changes. Of finite numbers, where kFinite says so.
template <class Lanes, DType kDType, bool kFinite>
BNBOPS_HD void store_group(uint8_t* to, typename Lanes::Float (&x)[4]) {
  if constexpr (kDType == DType::kBFloat16 && Lanes::kPairs) {
    auto* halves = reinterpret_cast<uint16_t*>(to);
    kFinite ? Lanes::store_bfloat16_group(halves, x) : Lanes::store_bfloat16_group_with_nan(halves, x);
  } else if constexpr (kDType == DType::kFloat32 && kFinite) {
    for (int v = 0; v < 4; ++v) Lanes::store(reinterpret_cast<float*>(to) + v * Lanes::kWidth, x[v]);
  } else {
    for (int v = 0; v < 4; ++v) store_as<Lanes>(to, kDType, v * Lanes::kWidth, x[v]);
  }
}

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
        Lanes::copy(padded, x + i, rest * sizeof(float));
        take(padded);
      });
  return static_cast<uint32_t>(Lanes::reduce_max(largest));
}

// The rare elements that need care before encoding: non-finite ones, and negative ones under an unsigned map.
inline void make_encodable(const float* from, int64_t n, bool is_signed, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = encodable(from[i], is_signed);
}

// Calls chunk(from, to) for kSize of n elements at a time, which have so many bits each. A rest goes through padded
// copies; elements beyond the last one are 0.
template <class Lanes, int kSize, class Chunk>
BNBOPS_HD void map_chunks(const void* from, int from_bits, void* to, int to_bits, int64_t n, const Chunk& chunk) {
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  const int64_t source_step = kSize * from_bits / 8, target_step = kSize * to_bits / 8;
  for (; n >= kSize; n -= kSize, source += source_step, target += target_step) chunk(source, target);
  if (n == 0) return;
  alignas(64) uint8_t padded[kSize * sizeof(float)] = {}, mapped[kSize * sizeof(float)];
  Lanes::copy(padded, source, (n * from_bits + 7) / 8);
  chunk(padded, mapped);
  Lanes::copy(target, mapped, (n * to_bits + 7) / 8);
}

constexpr int kFloatBits = 32;
BNBOPS_HD int size_in_bits(DType dtype) { return static_cast<int>(8 * size_of(dtype)); }

// Codes of n elements: `group(x, codes)` encodes kGroup of them.
template <class Lanes, int kPerByte = 1, class Group>
BNBOPS_HD void encode_groups(const float* x, int64_t n, uint8_t* codes, const Group& group) {
  map_chunks<Lanes, kGroup<Lanes>>(x, kFloatBits, codes, 8 / kPerByte, n, [&](const uint8_t* from, uint8_t* to) {
    group(reinterpret_cast<const float*>(from), to);
  });
}

// By a codec's encoder.
template <class Lanes, class Encoder>
BNBOPS_HD void encode(const float* x, int64_t n, float inverse_absmax, uint8_t* codes) {
  const Encoder encoder;
  const auto inverse = Lanes::splat(inverse_absmax);
  encode_groups<Lanes>(x, n, codes, [&](const float* from, uint8_t* to) {
    typename Lanes::Int numbers[4];
    for (int v = 0; v < 4; ++v) numbers[v] = encoder.number(Lanes::load(from + v * Lanes::kWidth), inverse);
    Encoder::store(numbers, to);
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

// Writes the values of n codes, the first one at the beginning of a byte, as `dtype`.
template <class Lanes, class Codebook>
BNBOPS_HD void decode(const Codebook& codebook, const uint8_t* codes, int64_t n, float absmax, void* out, DType dtype) {
  const auto group = [&](const uint8_t* from, uint8_t* to) {
    typename Lanes::Float values[4];
    codebook.decode(from, absmax, values);
    for (int v = 0; v < 4; ++v) store_as<Lanes>(to, dtype, v * Lanes::kWidth, values[v]);
  };
  map_chunks<Lanes, kGroup<Lanes>>(codes, 8 / Codebook::kPerByte, out, size_in_bits(dtype), n, group);
}

// Writes n elements from the `first` one of a tensor on.
template <class Lanes>
inline void write(void* tensor, DType dtype, int64_t first, int64_t n, const float* x) {
  auto* to = static_cast<uint8_t*>(tensor) + first * size_of(dtype);
  map_chunks<Lanes, Lanes::kWidth>(x, kFloatBits, to, size_in_bits(dtype), n, [&](const uint8_t* from, uint8_t* out) {
    store_as<Lanes>(out, dtype, 0, Lanes::load(reinterpret_cast<const float*>(from)));
  });
}

// Elements [first, first + n) of a tensor as fp32: in place, or converted into `scratch`.
template <class Lanes>
inline const float* read(const void* tensor, DType dtype, int64_t first, int64_t n, float* scratch) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(tensor) + first;
  const auto* halves = static_cast<const uint16_t*>(tensor) + first;
  map_chunks<Lanes, Lanes::kWidth>(halves, 16, scratch, kFloatBits, n, [&](const uint8_t* from, uint8_t* to) {
    Lanes::store(reinterpret_cast<float*>(to), load_half<Lanes>(reinterpret_cast<const uint16_t*>(from), dtype));
  });
  return scratch;
}

BNBOPS_NAMESPACE_END
