// The fast way through steps, or their first halves: all states coded alike, blocks of 256 elements.
//
// A block's scales are known only once all of it is updated, so block b is decoded and updated while block b - 1 is
// encoded, a vector of the one after a vector of the other: what one waits for, the other fills. In between, states
// are fp32 in scratch. Elements that no step may touch are rare: one look tells whether a group of vectors has any,
// and then the group is done over with care.
#pragma once

#include <tuple>
#include <utility>

#include "cpu/state_codecs.h"
#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// The lanes of a rule's number.
[[maybe_unused]] BNBOPS_HD float vector_of(float x) { return x; }
template <class Number>
BNBOPS_HD auto vector_of(const Number& x) {
  return x.v;
}

// Calls body(k) for k = 0 ... kCount - 1, each a constant.
template <class Body, int... k>
BNBOPS_HD void for_each_index(std::integer_sequence<int, k...>, const Body& body) {
  (body(std::integral_constant<int, k>{}), ...);
}
#define BNBOPS_INLINE __attribute__((always_inline))

template <class Lanes, class Rule, class Codec, Part kPart>
class CodedStep {
  static_assert(kPart != Part::kApply);

 public:
  CodedStep(const StepJob& job, const typename Rule::Hyper& hyper) : job_(job), hyper_(hyper) {}

  void run(int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) step(block);
    encode_pending();
  }

 private:
  using Float = typename Lanes::Float;
  using Number = typename Lanes::Number;
  using Hyper = typename Rule::Hyper;
  static constexpr int kStates = Rule::kStates;
  using AllStates = std::make_integer_sequence<int, kStates>;
  template <class L, int k>
  using CodingOf = Coding<L, Codec, Rule::kStateSpecs[k].role>;
  template <DType kDType>  // of parameters
  static constexpr DType kOut = kPart == Part::kStep ? kDType : DType::kFloat32;
  template <DType kDType>
  using LanesOf = std::conditional_t<kOut<kDType> == DType::kBFloat16, typename Lanes::Paired, Lanes>;
  static constexpr int64_t kAhead = 1024;  // elements to fetch before they are needed

  struct Block {  // whole; bytes, or elements as they are computed with
    const uint8_t *grad, *param;
    uint8_t* out;  // the parameter, or where its directions go
    const uint8_t* codes[kStates];
    float absmax[kStates];
    int64_t n;  // elements to update, of which the last group's may be padding
  };
  struct Pending {  // what is updated but not encoded
    uint8_t* codes[kStates];
    float inverse[kStates];
    int64_t n = 0;
    bool paired = false;  // in which lanes' order
  };

  // One decoder and one encoder for each kind of states, so that states of a kind share their registers.
  template <class L>
  struct Coders {
    typename Codec::template Decoder<L, true> decode_signed;
    typename Codec::template Decoder<L, false> decode_unsigned;
    typename Codec::template Encoder<L, true, false> encode_signed;
    typename Codec::template Encoder<L, true, true> encode_signed_square;
    typename Codec::template Encoder<L, false, true> encode_square;

    template <int k>
    BNBOPS_HD const auto& decoder() const {
      if constexpr (CodingOf<L, k>::kSigned) {
        return decode_signed;
      } else {
        return decode_unsigned;
      }
    }
    template <int k>
    BNBOPS_HD const auto& encoder() const {
      constexpr Role kRole = Rule::kStateSpecs[k].role;
      if constexpr (kRole == Role::kSigned) {
        return encode_signed;
      } else if constexpr (kRole == Role::kSignedSquare) {
        return encode_signed_square;
      } else {
        return encode_square;
      }
    }
    template <int... k>
    BNBOPS_HD auto open(const Block& block, int64_t i, std::integer_sequence<int, k...>) const {
      return std::make_tuple(decoder<k>().open(block.codes[k] + i)...);
    }
  };

  void step(int64_t index) {
    const Span span = span_of(job_, index);
    const bool whole = span.n == kStateBlock, alike = job_.param_dtype == job_.grad_dtype;
    auto* param = static_cast<uint8_t*>(job_.param) + span.begin * size_of(job_.param_dtype);
    auto* directions = reinterpret_cast<uint8_t*>(job_.direction + span.begin);
    const auto* grad = static_cast<const uint8_t*>(job_.grad) + span.begin * size_of(job_.grad_dtype);
    Block block{grad, param, kPart == Part::kStep ? param : directions, {}, {}, span.n};
    uint8_t* codes[kStates];
    for (int k = 0; k < kStates; ++k) {
      block.codes[k] = codes[k] = static_cast<uint8_t*>(job_.state[k].data) + span.begin;
      block.absmax[k] = decodable(job_.state[k].absmax[index]);
    }
    careful_ = false;
    if (whole && alike && job_.param_dtype == DType::kFloat32) {
      update<DType::kFloat32>(block);
    } else if (whole && alike && job_.param_dtype == DType::kBFloat16) {
      update<DType::kBFloat16>(block);
    } else {
      update_converted(block, span);
    }
    for_each_index(AllStates{}, [&](auto k) {
      constexpr bool kSigned = CodingOf<Lanes, k>::kSigned;
      float* x = updated_[which_][k];
      const uint32_t largest = careful_ ? largest_magnitude_bits<Lanes, kSigned>(x, span.n)
                                        : static_cast<uint32_t>(Lanes::reduce_max(Lanes::as_int(largest_[k])));
      const float absmax = scale_of<Lanes, kSigned>(x, span.n, largest);
      job_.state[k].absmax[index] = absmax;
      pending_.codes[k] = codes[k];
      pending_.inverse[k] = inverse_scale(absmax);
    });
    pending_.n = span.n;
    which_ ^= 1;
    if (!whole) encode_pending();
  }

  // A block in fp32 scratch, padded with zeros: they change nothing, neither an element nor a largest magnitude.
  __attribute__((noinline)) void update_converted(Block block, const Span& span) {
    alignas(64) float p[kStateBlock] = {}, g[kStateBlock] = {}, out[kStateBlock];
    alignas(64) uint8_t codes[kStates][kStateBlock];
    const float* param = read<Lanes>(job_.param, job_.param_dtype, span.begin, span.n, p);
    if (param != p) Lanes::copy(p, param, span.n * sizeof(float));
    const float* grad = read<Lanes>(job_.grad, job_.grad_dtype, span.begin, span.n, g);
    if (grad != g) Lanes::copy(g, grad, span.n * sizeof(float));
    block.param = reinterpret_cast<const uint8_t*>(p);
    block.grad = reinterpret_cast<const uint8_t*>(g);
    block.out = reinterpret_cast<uint8_t*>(out);
    for_each_index(AllStates{}, [&](auto k) {
      memset(codes[k], code_of<Codec>(0, CodingOf<Lanes, k>::kSigned), kStateBlock);
      Lanes::copy(codes[k], block.codes[k], span.n);
      block.codes[k] = codes[k];
    });
    update<DType::kFloat32>(block);
    if (kPart == Part::kStep) {
      write<Lanes>(job_.param, job_.param_dtype, span.begin, span.n, out);
    } else {
      write<Lanes>(job_.direction, DType::kFloat32, span.begin, span.n, out);
    }
  }

  template <DType kDType>
  BNBOPS_HD void update(const Block& block) {
    using L = LanesOf<kDType>;
    if (pending_.paired != L::kPairs || block.n < kStateBlock) encode_pending();
    pending_.n > 0 ? run_block<L, kDType, true>(block) : run_block<L, kDType, false>(block);
    pending_.paired = L::kPairs;
  }

  template <class L, DType kDType, bool kEncode>
  BNBOPS_HD void run_block(const Block& block) {
    const Hyper hyper = hyper_;  // a copy of its own stays in registers
    const Coders<L> coders;
    float (*const updated)[kStateBlock] = updated_[which_];
    const float (*const previous)[kStateBlock] = updated_[which_ ^ 1];
    Float largest[kStates], absmax[kStates], inverse[kStates];
    for (int k = 0; k < kStates; ++k) {
      largest[k] = L::splat(0);
      absmax[k] = L::splat(block.absmax[k]);
      inverse[k] = L::splat(kEncode ? pending_.inverse[k] : 0);
    }
    for (int64_t i = 0; i < (kEncode ? kStateBlock : block.n); i += kGroup<L>) {
      fetch<kDType>(block, i);
      typename L::Int numbers[kStates][4];
      Float out[4];
      Number witness(0.0F);
      const auto opened = coders.open(block, i, AllStates{});
      const uint8_t *grad = block.grad + i * size_of(kDType), *param = block.param + i * size_of(kDType);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * L::kWidth;
        StatesOf<Number, Rule> s;
        for_each_index(AllStates{}, [&](auto k) BNBOPS_INLINE {
          s[k] = Number(L::mul(coders.template decoder<k>().decode(std::get<k>(opened), v), absmax[k]));
        });
        const Number old(load_of_group<L, kDType>(param, v)), g(load_of_group<L, kDType>(grad, v));
        const Number u = Rule::direction(g, old, s, hyper);
        const Number result = kPart == Part::kStep ? Rule::apply(old, u, hyper) : u;
        witness = witness + Rule::witness(s, u) + result;
        out[v] = vector_of(result);
        for_each_index(AllStates{}, [&](auto k) BNBOPS_INLINE {
          largest[k] = L::template larger<CodingOf<L, k>::kSigned>(largest[k], vector_of(s[k]));
          if constexpr (kEncode) {
            numbers[k][v] = coders.template encoder<k>().number(L::load(previous[k] + at), inverse[k]);
          }
          L::store(updated[k] + at, vector_of(s[k]));
        });
      }
      if (__builtin_expect(L::all_finite(vector_of(witness)), 1)) {
        store_group<L, kOut<kDType>, true>(block.out + i * size_of(kOut<kDType>), out);
      } else {
        update_with_care<L, kDType>(block, i);
      }
      if constexpr (kEncode) {
        for_each_index(AllStates{}, [&](auto k) BNBOPS_INLINE {
          CodingOf<L, k>::Encoder::store(numbers[k], pending_.codes[k] + i);
        });
      }
    }
    for (int k = 0; k < kStates; ++k) largest_[k] = largest[k];
  }

  // A group again, whose sound elements alone change.
  template <class L, DType kDType>
  __attribute__((noinline, cold)) void update_with_care(const Block& block, int64_t i) {
    careful_ = true;
    const Coders<L> coders;
    const auto opened = coders.open(block, i, AllStates{});
    const uint8_t *grad = block.grad + i * size_of(kDType), *param = block.param + i * size_of(kDType);
    Float out[4];
    for (int v = 0; v < 4; ++v) {
      StatesOf<Number, Rule> s;
      for_each_index(AllStates{}, [&](auto k) {
        const auto decoded = coders.template decoder<k>().decode(std::get<k>(opened), v);
        s[k] = Number(L::mul(decoded, L::splat(block.absmax[k])));
      });
      const Number g(load_of_group<L, kDType>(grad, v));
      Number p(load_of_group<L, kDType>(param, v));
      if constexpr (kPart == Part::kStep) {
        guarded_update<Rule>(g, p, s, hyper_);
      } else {
        p = guarded_direction<Rule>(g, p, s, hyper_);
      }
      out[v] = vector_of(p);
      for (int k = 0; k < kStates; ++k) L::store(updated_[which_][k] + i + v * L::kWidth, vector_of(s[k]));
    }
    store_group<L, kOut<kDType>, false>(block.out + i * size_of(kOut<kDType>), out);
  }

  void encode_pending() {
    if (pending_.n == 0) return;
    pending_.paired ? encode_in_order_of<typename Lanes::Paired>() : encode_in_order_of<Lanes>();
    pending_.n = 0;
  }

  template <class L>
  void encode_in_order_of() {
    for_each_index(AllStates{}, [&](auto k) {
      encode<L, typename CodingOf<L, k>::Encoder>(updated_[which_ ^ 1][k], pending_.n, pending_.inverse[k],
                                                  pending_.codes[k]);
    });
  }

  template <DType kDType>
  BNBOPS_HD static void fetch(const Block& block, int64_t i) {
    constexpr int64_t kLine = 64, kSize = size_of(kDType);
    for (int64_t byte = 0; byte < kGroup<Lanes> * kSize; byte += kLine) {
      __builtin_prefetch(block.grad + (i + kAhead) * kSize + byte, 0, 2);
      __builtin_prefetch(block.param + (i + kAhead) * kSize + byte, 0, 2);
    }
    for (int k = 0; k < kStates; ++k) __builtin_prefetch(block.codes[k] + i + kAhead, 0, 2);
  }

  const StepJob& job_;
  const Hyper& hyper_;
  alignas(64) float updated_[2][kStates][kStateBlock];  // the block at hand, and the one before
  Float largest_[kStates];
  Pending pending_;
  int which_ = 0;
  bool careful_ = false;
};

BNBOPS_NAMESPACE_END
