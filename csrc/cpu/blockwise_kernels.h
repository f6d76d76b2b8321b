// Quantization and dequantization of blocks.
#pragma once

#include <algorithm>
#include <utility>

#include "codecs/dynamic8.h"
#include "codecs/nearest.h"
#include "cpu/blocks.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::kChunk;

constexpr int64_t kPiece = 256;  // elements converted to fp32 at a time

inline bool same_codebook(const float* a, const float* b) { return memcmp(a, b, kCodebookSize * sizeof(float)) == 0; }

inline NearestEncoder make_nearest_encoder(const float* codebook) {
  NearestEncoder encoder;
  for (int i = 0; i < kCodebookSize; ++i) encoder.midpoint[i] = midpoint_after(codebook, i);
  return encoder;
}

// Fills in the bucket table; false where some bucket holds more than one midpoint.
inline bool make_buckets(BucketEncoder& encoder) {
  const float *begin = encoder.nearest.midpoint, *end = begin + kCodebookSize;
  for (int b = 0; b < kBuckets; ++b) {
    const double first = float_from_bits(static_cast<uint32_t>((kSmallestOctave << 7) + b) << 16);
    const double next = float_from_bits(static_cast<uint32_t>((kSmallestOctave << 7) + b + 1) << 16);
    const double slack = first / (1 << 22);  // more than the rounding of |x| + 2^-31
    const double low = first - kShift - slack, high = next - kShift + slack;
    const auto *positive = std::lower_bound(begin, end, low), *negative = std::lower_bound(begin, end, -high);
    if (std::upper_bound(positive, end, high) - positive > 1) return false;
    if (std::upper_bound(negative, end, -low) - negative > 1) return false;
    encoder.below[b] = static_cast<uint8_t>(positive - begin);
    encoder.below[kBuckets + b] = static_cast<uint8_t>(negative - begin);
  }
  return true;
}

// Reads the pieces of one block of a job in the form that encoders take.
template <class Lanes>
struct BlockReader {
  const QuantizeJob& job;
  int64_t begin, end;
  bool is_signed, careful;
  alignas(64) float scratch[kPiece];

  template <class Visit>
  void each_piece(const Visit& visit) {
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t n = std::min(kPiece, end - i);
      const float* x = read<Lanes>(job.values, job.dtype, i, n, scratch);
      if (careful) make_encodable(x, n, is_signed, scratch);
      visit(careful ? scratch : x, n, i);
    }
  }

  float absmax() {
    uint32_t largest = 0;
    const auto take = [&](const float* x, int64_t n, int64_t) {
      largest = std::max(largest, largest_magnitude_bits<Lanes, true>(x, n));
    };
    careful = false;
    each_piece(take);
    if (largest >= kInfinityBits) {
      careful = true;
      largest = 0;
      const bool map_is_signed = std::exchange(is_signed, true);  // negative elements count
      each_piece(take);
      is_signed = map_is_signed;
    }
    return float_from_bits(largest);
  }
};

// Quantizes blocks [first, last): `encode(x, n, inverse_absmax, i)` is the codec, x the elements from the i-th on.
template <class Lanes, class Encode>
void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last, bool is_signed, const Encode& encode) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    BlockReader<Lanes> reader{job, begin, std::min(job.numel, begin + job.blocksize), is_signed, false, {}};
    job.absmax[block] = reader.absmax();
    const float inverse = inverse_scale(job.absmax[block]);
    reader.careful |= !is_signed;
    reader.each_piece([&](const float* x, int64_t n, int64_t i) { encode(x, n, inverse, i); });
  }
}

// Any sorted codebook.
template <class Lanes>
void quantize_any(const QuantizeJob& job, int64_t first, int64_t last) {
  constexpr int64_t kWorthBuckets = 1 << 19;  // elements for which making the table pays
  BucketEncoder encoder;
  encoder.nearest = make_nearest_encoder(job.codebook);
  const auto run = [&](const auto& entry) {
    quantize_blocks<Lanes>(job, first, last, true, [&](const float* x, int64_t n, float inverse, int64_t i) {
      encode_entries<Lanes>(x, n, inverse, job.codes + i, entry);
    });
  };
  if ((last - first) * std::min(job.blocksize, job.numel) >= kWorthBuckets && make_buckets(encoder)) {
    run([&](typename Lanes::Float x) { return bucketed_entry<Lanes>(x, encoder); });
  } else {
    run([&](typename Lanes::Float x) { return nearest_entry<Lanes>(x, encoder.nearest); });
  }
}

template <class Lanes, bool kSigned>
void quantize_dynamic(const QuantizeJob& job, int64_t first, int64_t last) {
  quantize_blocks<Lanes>(job, first, last, kSigned, [&](const float* x, int64_t n, float inverse, int64_t i) {
    encode<Lanes, Dynamic8::Encoder<Lanes, kSigned>>(x, n, inverse, job.codes + i);
  });
}

template <class Lanes>
void quantize(const QuantizeJob& job, int64_t first, int64_t last) {
  if (same_codebook(job.codebook, kDynamicSigned)) {
    quantize_dynamic<Lanes, true>(job, first, last);
  } else if (same_codebook(job.codebook, kDynamicUnsigned)) {
    quantize_dynamic<Lanes, false>(job, first, last);
  } else {
    quantize_any<Lanes>(job, first, last);
  }
}

template <class Lanes>
void dequantize(const DequantizeJob& job, int64_t first, int64_t last) {
  const typename Lanes::Codebook codebook(job.codebook);
  const int64_t end = std::min(job.numel, last * kChunk);
  for (int64_t i = first * kChunk; i < end;) {
    const int64_t block = i / job.blocksize;
    const int64_t n = std::min(end, (block + 1) * job.blocksize) - i;
    decode<Lanes>(codebook, job.codes + i, n, job.absmax[block],
                  static_cast<uint8_t*>(job.values) + i * size_of(job.dtype), job.dtype);
    i += n;
  }
}

BNBOPS_NAMESPACE_END
