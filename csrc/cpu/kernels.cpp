// The CPU drivers: they cut tensors into blocks and know nothing of Adam or of bytes. Compiled once per instruction
// set, with BNBOPS_ISA, BNBOPS_LANES_HEADER, BNBOPS_LANES and BNBOPS_KERNELS defined by the build.
#include "cpu/kernels.h"

#include <algorithm>
#include <utility>

#include BNBOPS_LANES_HEADER
#include "cpu/blocks.h"
#include "rules.h"

namespace bnbops {
inline namespace BNBOPS_ISA {
namespace {

using namespace bnbops::cpu;
using Lanes = BNBOPS_LANES;
constexpr int64_t kPiece = 256;  // elements converted to fp32 at a time

// The lanes of a rule's number.
[[maybe_unused]] BNBOPS_HD float vector_of(float x) { return x; }
template <class Number>
BNBOPS_HD auto vector_of(const Number& x) {
  return x.v;
}

bool same_codebook(const float* a, const float* b) { return memcmp(a, b, kCodebookSize * sizeof(float)) == 0; }

NearestEncoder make_nearest_encoder(const float* codebook) {
  NearestEncoder encoder;
  for (int i = 0; i + 1 < kCodebookSize; ++i) encoder.midpoint[i] = 0.5F * codebook[i] + 0.5F * codebook[i + 1];
  encoder.midpoint[kCodebookSize - 1] = __builtin_inff();
  return encoder;
}

// Fills in the bucket table; false where some bucket holds more than one midpoint.
bool make_buckets(BucketEncoder& encoder) {
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

// The rare elements that need care before encoding: non-finite ones, and negative ones under an unsigned map.
void make_encodable(const float* from, int64_t n, bool is_signed, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = encodable(from[i]);
    to[i] = is_signed || x > 0 ? x : 0.0F;
  }
}

// Reads the pieces of one block of a job in the form that encoders take.
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

// Quantizes blocks [first, last): `encode(x, n, inverse_absmax, codes)` is the codec.
template <class Encode>
void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last, bool is_signed, const Encode& encode) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    BlockReader reader{job, begin, std::min(job.numel, begin + job.blocksize), is_signed, false, {}};
    job.absmax[block] = reader.absmax();
    const float inverse = inverse_scale(job.absmax[block]);
    reader.careful |= !is_signed;
    reader.each_piece([&](const float* x, int64_t n, int64_t i) { encode(x, n, inverse, job.codes + i); });
  }
}

// Any sorted codebook.
void quantize_any(const QuantizeJob& job, int64_t first, int64_t last) {
  constexpr int64_t kWorthBuckets = 1 << 19;  // elements for which making the table pays
  BucketEncoder encoder;
  encoder.nearest = make_nearest_encoder(job.codebook);
  const auto run = [&](const auto& entry) {
    quantize_blocks(job, first, last, true, [&](const float* x, int64_t n, float inverse, uint8_t* codes) {
      encode_entries<Lanes>(x, n, inverse, codes, entry);
    });
  };
  if ((last - first) * std::min(job.blocksize, job.numel) >= kWorthBuckets && make_buckets(encoder)) {
    run([&](Lanes::Float x) { return bucketed_entry<Lanes>(x, encoder); });
  } else {
    run([&](Lanes::Float x) { return nearest_entry<Lanes>(x, encoder.nearest); });
  }
}

void quantize(const QuantizeJob& job, int64_t first, int64_t last) {
  if (same_codebook(job.codebook, kDynamicSigned)) {
    quantize_blocks(job, first, last, true, encode_dynamic<Lanes, true>);
  } else if (same_codebook(job.codebook, kDynamicUnsigned)) {
    quantize_blocks(job, first, last, false, encode_dynamic<Lanes, false>);
  } else {
    quantize_any(job, first, last);
  }
}

void dequantize(const DequantizeJob& job, int64_t first, int64_t last) {
  const Lanes::Codebook codebook(job.codebook);
  alignas(64) float scratch[kPiece];
  const int64_t end = std::min(job.numel, last * kChunk);
  for (int64_t i = first * kChunk; i < end;) {
    const int64_t block = i / job.blocksize;
    const int64_t n = std::min({end, (block + 1) * job.blocksize, i + kPiece}) - i;
    float* out = job.dtype == DType::kFloat32 ? static_cast<float*>(job.values) + i : scratch;
    decode<Lanes>(codebook, job.codes + i, n, job.absmax[block], out);
    write<Lanes>(job.values, job.dtype, i, n, out);
    i += n;
  }
}

struct Span {  // elements of a parameter that make a block of its states
  int64_t begin, n;
};

Span span_of(const StepJob& job, int64_t block) {
  const int64_t row = block / job.blocks_per_row, column = (block % job.blocks_per_row) * kStateBlock;
  return {row * job.inner + column, std::min<int64_t>(kStateBlock, job.inner - column)};
}

// Updates kWidth elements, their states in registers.
template <class Rule>
BNBOPS_HD void update_vector(const float* grad, float* param, Lanes::Number (&state)[Rule::kStates],
                             const typename Rule::Hyper& h) {
  Lanes::Number p(Lanes::load(param));
  guarded_update<Rule>(Lanes::Number(Lanes::load(grad)), p, state, h);
  Lanes::store(param, vector_of(p));
}

template <class Rule>
void step_float32(const StepJob& job, int64_t first, int64_t last) {
  constexpr int kWidth = Lanes::kWidth;
  alignas(64) float param_scratch[kStateBlock], grad_scratch[kStateBlock];
  const auto hyper = *static_cast<const typename Rule::Hyper*>(job.hyper);
  const auto update = [&](const float* grad, float* param, float* const(&state)[Rule::kStates]) {
    Lanes::Number s[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = Lanes::Number(Lanes::load(state[k]));
    update_vector<Rule>(grad, param, s, hyper);
    for (int k = 0; k < Rule::kStates; ++k) Lanes::store(state[k], vector_of(s[k]));
  };
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    const float* grad = read<Lanes>(job.grad, job.grad_dtype, span.begin, span.n, grad_scratch);
    auto* param = const_cast<float*>(read<Lanes>(job.param, job.param_dtype, span.begin, span.n, param_scratch));
    float* state[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) state[k] = static_cast<float*>(job.state[k]) + span.begin;
    for_chunks<kWidth>(
        span.n,
        [&](int64_t i) {
          float* at[Rule::kStates];
          for (int k = 0; k < Rule::kStates; ++k) at[k] = state[k] + i;
          update(grad + i, param + i, at);
        },
        [&](int64_t i, int64_t rest) {
          float g[kWidth] = {}, p[kWidth] = {}, s[Rule::kStates][kWidth] = {};
          float* at[Rule::kStates];
          memcpy(g, grad + i, rest * sizeof(float));
          memcpy(p, param + i, rest * sizeof(float));
          for (int k = 0; k < Rule::kStates; ++k) memcpy(at[k] = s[k], state[k] + i, rest * sizeof(float));
          update(g, p, at);
          memcpy(param + i, p, rest * sizeof(float));
          for (int k = 0; k < Rule::kStates; ++k) memcpy(state[k] + i, s[k], rest * sizeof(float));
        });
    write<Lanes>(job.param, job.param_dtype, span.begin, span.n, param);
  }
}

// Encodes one block of a state and returns its scale; `largest` are the bits of its largest magnitude. Elements of x
// that have no encoding as they are change.
template <bool kSigned>
float encode_state(float* x, int64_t n, uint32_t largest, uint8_t* codes) {
  if (largest >= kInfinityBits) {
    make_encodable(x, n, kSigned, x);
    largest = largest_magnitude_bits<Lanes, kSigned>(x, n);
  }
  const float absmax = float_from_bits(largest);
  encode_dynamic<Lanes, kSigned>(x, n, inverse_scale(absmax), codes);
  return absmax;
}

// One block of 8-bit states on its way through a step: decoded and updated in registers, group by group, into fp32
// scratch; encoded once the whole block's largest magnitude is known.
template <class Rule>
struct QuantizedBlock {
  static constexpr int kStates = Rule::kStates;
  alignas(64) float state[kStates][kStateBlock];
  Lanes::Int largest[kStates];

  BNBOPS_HD void update_group(const Lanes::Codebook (&codebooks)[2], const uint8_t* const (&codes)[kStates],
                              const float (&absmax)[kStates], const float* grad, float* param, int64_t i,
                              const typename Rule::Hyper& hyper) {
    Lanes::Float decoded[kStates][4];
    for (int k = 0; k < kStates; ++k) {
      codebooks[Rule::kStateSpecs[k].is_signed].decode(codes[k], absmax[k], decoded[k]);
    }
#pragma GCC unroll 4  // or the vectors live in memory
    for (int v = 0; v < 4; ++v) {
      const int64_t at = v * Lanes::kWidth;
      Lanes::Number s[kStates];
      for (int k = 0; k < kStates; ++k) s[k] = Lanes::Number(decoded[k][v]);
      update_vector<Rule>(grad + at, param + at, s, hyper);
      for (int k = 0; k < kStates; ++k) {
        const auto x = vector_of(s[k]);
        Lanes::store(state[k] + i + at, x);
        largest[k] = Lanes::max(largest[k], Lanes::as_int(Rule::kStateSpecs[k].is_signed ? Lanes::abs(x) : x));
      }
    }
  }
};

template <class Rule>
void step_quantized(const StepJob& job, int64_t first, int64_t last) {
  constexpr int kStates = Rule::kStates, kSize = kGroup<Lanes>;
  constexpr uint8_t kZeroCode[2] = {0, 127};  // unsigned, signed
  static const Lanes::Codebook codebooks[2] = {Lanes::Codebook(kDynamicUnsigned), Lanes::Codebook(kDynamicSigned)};
  alignas(64) float param_scratch[kStateBlock], grad_scratch[kStateBlock];
  QuantizedBlock<Rule> work;
  const auto hyper = *static_cast<const typename Rule::Hyper*>(job.hyper);
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    const float* grad = read<Lanes>(job.grad, job.grad_dtype, span.begin, span.n, grad_scratch);
    auto* param = const_cast<float*>(read<Lanes>(job.param, job.param_dtype, span.begin, span.n, param_scratch));
    uint8_t* codes[kStates];
    float absmax[kStates];
    for (int k = 0; k < kStates; ++k) {
      codes[k] = static_cast<uint8_t*>(job.state[k]) + span.begin;
      absmax[k] = decodable(job.absmax[k][block]);
      work.largest[k] = Lanes::splat_int(0);
    }
    for_chunks<kSize>(
        span.n,
        [&](int64_t i) {
          const uint8_t* at[kStates];
          for (int k = 0; k < kStates; ++k) at[k] = codes[k] + i;
          work.update_group(codebooks, at, absmax, grad + i, param + i, i, hyper);
        },
        [&](int64_t i, int64_t rest) {  // padded with zeros, which no largest magnitude notices
          float g[kSize] = {}, p[kSize] = {};
          uint8_t c[kStates][kSize];
          const uint8_t* at[kStates];
          memcpy(g, grad + i, rest * sizeof(float));
          memcpy(p, param + i, rest * sizeof(float));
          for (int k = 0; k < kStates; ++k) {
            memset(c[k], kZeroCode[Rule::kStateSpecs[k].is_signed], kSize);
            memcpy(c[k], codes[k] + i, rest);
            at[k] = c[k];
          }
          work.update_group(codebooks, at, absmax, g, p, i, hyper);
          memcpy(param + i, p, rest * sizeof(float));
        });
    write<Lanes>(job.param, job.param_dtype, span.begin, span.n, param);
    for (int k = 0; k < kStates; ++k) {
      const auto encode = Rule::kStateSpecs[k].is_signed ? encode_state<true> : encode_state<false>;
      const auto largest = static_cast<uint32_t>(Lanes::reduce_max(work.largest[k]));
      job.absmax[k][block] = encode(work.state[k], span.n, largest, codes[k]);
    }
  }
}

template <class Rule>
void step(const StepJob& job, int64_t first, int64_t last) {
  (job.absmax[0] != nullptr ? step_quantized<Rule> : step_float32<Rule>)(job, first, last);
}

template <class... Rules>
constexpr Kernels make_kernels(RuleList<Rules...>) {
  static_assert(sizeof...(Rules) <= kMaxRules);
  return {quantize, dequantize, {step<Rules>...}};
}

}  // namespace
}  // namespace BNBOPS_ISA

namespace cpu {
extern const Kernels BNBOPS_KERNELS;
const Kernels BNBOPS_KERNELS = BNBOPS_ISA::make_kernels(AllRules{});
}  // namespace cpu
}  // namespace bnbops
