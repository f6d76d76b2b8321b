// Quantization and dequantization of 4-bit weights, for any lanes.
#pragma once

#include <algorithm>

#include "cpu/blockwise_kernels.h"
#include "formats/all.h"

BNBOPS_NAMESPACE_BEGIN

// The bits of the largest magnitude in a block of whole vectors.
template <class Lanes, DType kType>
BNBOPS_HD uint32_t largest_bits_of_block(const QuantizeJob& job, int64_t block) {
  auto largest = Lanes::splat_int(0);
  for (int64_t i = block * job.blocksize; i < (block + 1) * job.blocksize; i += Lanes::kWidth) {
    largest = Lanes::max(largest, Lanes::as_int(Lanes::abs(load_as<Lanes>(job.values, kType, i))));
  }
  return static_cast<uint32_t>(Lanes::reduce_max(largest));
}

// Whole blocks of finite elements are encoded straight from memory, each while the next one's scale is on its way:
// alone, an encoding would wait for its scale. (The job is a copy, which no store can change, as far as C++ knows.)
template <class Lanes, DType kType>
void quantize_4bit_from(const QuantizeJob job, int64_t first, int64_t last) {
  const Format4bit& format = kFormats4bit[job.format];
  const EncoderTables4bit<Lanes> tables(format.encoder);
  const auto encode = [&](const auto& load, float inverse_absmax, uint8_t* codes) {
    const auto inverse = Lanes::splat(inverse_absmax);
    typename Lanes::Int k[4];
    for (int v = 0; v < 4; ++v) k[v] = encode_4bit(load(v * Lanes::kWidth), inverse, tables);
    Lanes::store_nibbles(k, format.nibbles, codes);
  };
  const auto any_block = [&](int64_t block) {
    quantize_blocks<Lanes>(job, block, block + 1, true, [&](const float* x, int64_t n, float inverse, int64_t i) {
      encode_groups<Lanes, 2>(x, n, job.codes + i / 2, [&](const float* from, uint8_t* to) {
        encode([&](int64_t v) { return Lanes::load(from + v); }, inverse, to);
      });
    });
  };
  const int64_t whole = job.blocksize % kGroup<Lanes> == 0 ? std::min(last, job.numel / job.blocksize) : first;
  uint32_t next = first < whole ? largest_bits_of_block<Lanes, kType>(job, first) : 0;
  for (int64_t block = first; block < whole; ++block) {
    const uint32_t bits = next;
    const float absmax = float_from_bits(bits), inverse = inverse_scale(absmax);
    job.absmax[block] = absmax;
    if (block + 1 < whole) next = largest_bits_of_block<Lanes, kType>(job, block + 1);
    if (bits >= kInfinityBits) {
      any_block(block);
      continue;
    }
    for (int64_t i = block * job.blocksize; i < (block + 1) * job.blocksize; i += kGroup<Lanes>) {
      encode([&](int64_t v) { return load_as<Lanes>(job.values, kType, i + v); }, inverse, job.codes + i / 2);
    }
  }
  for (int64_t block = std::max(first, whole); block < last; ++block) any_block(block);
}

template <class Lanes>
void quantize_4bit(const QuantizeJob& job, int64_t first, int64_t last) {
  switch (job.dtype) {
    case DType::kFloat32: return quantize_4bit_from<Lanes, DType::kFloat32>(job, first, last);
    case DType::kBFloat16: return quantize_4bit_from<Lanes, DType::kBFloat16>(job, first, last);
    case DType::kFloat16: return quantize_4bit_from<Lanes, DType::kFloat16>(job, first, last);
  }
}

// Scales of blocks [first, first + n).
template <class Lanes>
void scales_of_blocks(const Scales4bit& scales, int64_t first, int64_t n, float* to) {
  if (scales.absmax != nullptr) {
    Lanes::copy(to, scales.absmax + first, n * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t outer = (first + i) / scales.nested_block;
    const int64_t end = std::min(n, (outer + 1) * scales.nested_block - first);
    const float absmax = scales.nested_absmax[outer];
    for (; i < end; ++i) {
      to[i] = nested_scale(scales.nested_table[scales.nested_codes[first + i]], absmax, *scales.nested_offset);
    }
  }
}

// Values of n codes of a block. As 16 bits, a block has but 16 of them: they are rounded once and then looked up.
template <class Lanes>
BNBOPS_HD void decode_4bit(const Format4bit& format, const typename Lanes::Codebook4bit& codebook, const uint8_t* codes,
                           int64_t n, float scale, void* out, DType dtype) {
  if (dtype == DType::kFloat32) return decode<Lanes>(codebook, codes, n, scale, out, dtype);
  uint16_t values[kCodes4bit] = {};
  for (int i = 0; i < kCodes4bit; i += Lanes::kWidth) {
    store_as<Lanes>(values, dtype, i, Lanes::mul(Lanes::load(format.values + i), Lanes::splat(scale)));
  }
  const typename Lanes::HalfCodebook4bit halves(values, format.nibbles);
  map_chunks<Lanes, kGroup<Lanes>>(codes, 4, out, 16, n, [&](const uint8_t* from, uint8_t* to) {
    Lanes::store_int(to, halves.decode(from));
    Lanes::store_int(to + kGroup<Lanes>, halves.decode(from + Lanes::kWidth));
  });
}

template <class Lanes>
void dequantize_elements(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype) {
  const Format4bit& format = kFormats4bit[weight.format];
  const typename Lanes::Codebook4bit codebook(format.values, format.nibbles);
  const int64_t end = first + numel;
  const int log2_blocksize = __builtin_ctzll(weight.blocksize);
  auto* to = static_cast<uint8_t*>(out);
  for (int64_t i = first; i < end;) {
    const int64_t block = i >> log2_blocksize, size = size_of(dtype);
    const float scale = scale_of_block(weight.scales, block);
    if (i % 2 == 1) {  // the second one of a byte
      uint8_t pair[2 * sizeof(float)];
      decode_4bit<Lanes>(format, codebook, weight.codes + i / 2, 2, scale, pair, dtype);
      memcpy(to, pair + size, size);
      to += size;
      ++i;
      continue;
    }
    const int64_t n = std::min(end, (block + 1) * weight.blocksize) - i;
    decode_4bit<Lanes>(format, codebook, weight.codes + i / 2, n, scale, to, dtype);
    to += n * size;
    i += n;
  }
}

// Writes elements [first, first + numel) as `dtype`. `past_caches` asks for lines written past the caches: `out` begins
// with a cache line, and blocks and `first` are multiples of 64 elements.
template <class Lanes>
void dequantize_4bit(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype, bool past_caches) {
  if (!past_caches) return dequantize_elements<Lanes>(weight, first, numel, out, dtype);
  dequantize_elements<typename Lanes::PastCaches>(weight, first, numel, out, dtype);
  Lanes::PastCaches::fence();
}

BNBOPS_NAMESPACE_END
