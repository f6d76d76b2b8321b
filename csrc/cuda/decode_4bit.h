// From the packed codes of a 4-bit weight to fp32 values, for all kernels that read one.
//
// Eight codes are a word of four bytes. Blocks are of eight elements or more, so the eight from a multiple of eight on
// share a scale, which scale_of_block (formats/scale.h) reads or computes.
#pragma once

#include <type_traits>

#include "cuda/elements.h"
#include "cuda/threads.h"
#include "formats/all.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

struct Codebook4bit {
  float value[kCodes4bit];
};

// A copy for devices.
static __device__ const auto kDeviceFormats4bit = kFormats4bit;

// What visit(nibbles) gives for the order of a format's codes, a constant: kernels whose loops depend on it have an
// instance for each order that some format has.
template <class Visit>
cudaError_t with_nibbles_of(int format, const Visit& visit) {
  constexpr bool kSome = !every_format_4bit([](const Format4bit& f) { return f.nibbles == Nibbles::kHighFirst; });
  if constexpr (kSome) {
    if (kFormats4bit[format].nibbles == Nibbles::kLowFirst) {
      return visit(std::integral_constant<Nibbles, Nibbles::kLowFirst>{});
    }
  }
  return visit(std::integral_constant<Nibbles, Nibbles::kHighFirst>{});
}

// To shared memory; a barrier must follow. The 16 entries lie in 16 banks, so a warp's look-ups never conflict.
BNBOPS_DEVICE void copy_codebook(int format, Codebook4bit& to) {
  if (threadIdx.x < kCodes4bit) to.value[threadIdx.x] = kDeviceFormats4bit[format].values[threadIdx.x];
}

// Likewise the table of nested scales, and has the weight look there.
BNBOPS_DEVICE void copy_nested_table(Weight4bit& weight, float (&to)[kCodebookSize]) {
  if (weight.scales.absmax != nullptr) return;
  for (unsigned i = threadIdx.x; i < kCodebookSize; i += blockDim.x) to[i] = weight.scales.nested_table[i];
  weight.scales.nested_table = to;
}

// Block sizes are powers of two.
BNBOPS_DEVICE int log_of_blocksize(const Weight4bit& weight) { return __ffsll(weight.blocksize) - 1; }

// The block that an element belongs to.
BNBOPS_DEVICE int64_t block_of(const Weight4bit& weight, int64_t element) {
  return element >> log_of_blocksize(weight);
}

// The codes of elements `first` ... `first` + 7, of which `count` exist; `first` is even.
BNBOPS_DEVICE uint32_t load_packed(const uint8_t* codes, int64_t first, int64_t count) {
  const uint8_t* from = codes + first / 2;
  if (count >= kOctet && is_aligned<uint32_t>(from)) return load_vector<uint32_t>(from);
  uint32_t packed = 0;
  unrolled<kOctet / 2>([&](int i) {
    if (2 * i < count) packed |= static_cast<uint32_t>(from[i]) << (i * 8);
  });
  return packed;
}

// The code of element i of a word.
template <Nibbles kNibbles>
BNBOPS_DEVICE uint32_t code_4bit(uint32_t packed, int i) {
  return packed >> nibble_shift(kNibbles, i) & 15U;
}

template <Nibbles kNibbles>
BNBOPS_DEVICE void decode_packed(uint32_t packed, const Codebook4bit& codebook, float scale, float (&x)[kOctet]) {
  unrolled<kOctet>([&](int i) { x[i] = codebook.value[code_4bit<kNibbles>(packed, i)] * scale; });
}

// ---- two codes at a time ---------------------------------------------------------------------------------------

// The values of the two elements of a byte.
struct Pair4bit {
  float first, second;
};

BNBOPS_DEVICE Pair4bit pair_of_byte(int format, unsigned byte) {
  const Format4bit& of = kDeviceFormats4bit[format];
  return {of.values[byte >> nibble_shift(of.nibbles, 0) & 15U], of.values[byte >> nibble_shift(of.nibbles, 1) & 15U]};
}

template <int kCount>
struct alignas(kCount * sizeof(uint32_t)) Words {
  uint32_t word[kCount];
};

// What the two codes of a byte stand for, in one or two words, in shared memory. Lanes have copies of their own (two
// words: each half of a warp, which is served by itself), so that no two of them ever meet in a bank.
template <int kWords>
class PairTable {
 public:
  // By all threads of a thread block, each with the pair of byte threadIdx.x; a barrier must follow.
  BNBOPS_DEVICE void fill(const Words<kWords>& pair) {
    static_assert(kThreads == 256, "a thread for each byte");
    const uint32_t (&word)[kWords] = pair.word;
    const uint4 copies = make_uint4(word[0], word[1 % kWords], word[0], word[1 % kWords]);
#pragma unroll
    for (unsigned i = 0; i < kVectors; ++i) {  // neighbors begin at different vectors of their rows: other banks
      store_vector(&of_byte_[threadIdx.x][(threadIdx.x ^ i) % kVectors], copies);
    }
  }

  // This thread's copy: PairTable::look_up finds the pair of byte i of a word there.
  BNBOPS_DEVICE const char* own() const {
    return in_one_register(reinterpret_cast<const Words<kWords>*>(of_byte_) +
                           threadIdx.x % (kRow / sizeof(Words<kWords>)));
  }
  static BNBOPS_DEVICE Words<kWords> look_up(const char* own, uint32_t packed, int i) {
    return load_vector<Words<kWords>>(own + __byte_perm(packed, 0, 0x4440 + i) * kRow);
  }

 private:
  static constexpr unsigned kRow = 128, kVectors = kRow / sizeof(uint4);
  uint4 of_byte_[256][kVectors];
};

// The scales of elements from `first` on, which 32 bits count from there.
class ScaleReader {
 public:
  BNBOPS_DEVICE ScaleReader(const Weight4bit& weight, int64_t first)
      : scales_(weight.scales),
        log_blocksize_(log_of_blocksize(weight)),
        block_(first >> log_blocksize_),
        absmax_(weight.scales.absmax == nullptr ? nullptr : weight.scales.absmax + block_),
        rest_(static_cast<unsigned>(first & (weight.blocksize - 1))) {}

  BNBOPS_DEVICE StoredScale load(unsigned element) const {
    if (absmax_ != nullptr) return {absmax_[block(element)], 0};
    return load_scale(scales_, block_ + block(element));
  }

  // Of several elements, by one choice between the kinds of scales.
  template <int kCount>
  BNBOPS_DEVICE void load(const unsigned (&elements)[kCount], float (&scale)[kCount]) const {
    if (absmax_ != nullptr) {
      unrolled<kCount>([&](int i) { scale[i] = absmax_[block(elements[i])]; });
    } else {
      unrolled<kCount>([&](int i) { scale[i] = scale_of_block(scales_, block_ + block(elements[i])); });
    }
  }

 private:
  BNBOPS_DEVICE unsigned block(unsigned element) const { return (rest_ + element) >> log_blocksize_; }

  const Scales4bit& scales_;
  int log_blocksize_;
  int64_t block_;
  const float* absmax_;
  unsigned rest_;
};

}  // namespace bnbops::cuda
