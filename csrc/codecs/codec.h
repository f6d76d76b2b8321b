// What the bytes of a quantized block mean, written once, for scalar code, SIMD and devices.
//
// A codec is a struct:
//   kName, kCodes                            what users call it; the dtype of its codes
//   static constexpr const float* values(bool is_signed);  what codes mean: 256 values, 0 and 1 among them
//   template <class Lanes, bool kSigned> struct Decoder {   the same by arithmetic, 4 vectors of codes at a time
//     auto open(const uint8_t* codes) const;                what decode takes of them
//     Float decode(opened, int v) const;                    the values of the v-th vector
//   };
//   template <class Lanes, bool kSigned, bool kKeepPositive> struct Encoder {
//     Int number(Float x, Float inverse) const;             the codes of x * inverse, counted as `store` has it; x is
//     encodable static void store(const Int (&numbers)[4], uint8_t* codes);
//   };
//   What devices make a table of, for one look-up an element. The bits are those of |x| * inverse + 2^-31, which is
//   rounded once and counts as 1 beyond:
//   template <bool kSigned> static constexpr int code_of_magnitude(uint32_t bits);  grows with them, by ones
//   template <bool kSigned> static constexpr int kFractionBits;  so many bits of fraction and the exponent keep the
//     codes' steps apart
//   static uint32_t with_signs(uint32_t codes, uint32_t negative);  four codes of magnitudes under the map for either
//     sign, each a byte, to those of elements which are negative where `negative` has the byte 255
// Tables come in two kinds, for numbers of either sign and for those that are never negative; they may be the same.
// Under kKeepPositive, the smallest positive code stands for whatever is positive and nearer to 0, and that of 0 for
// whatever is negative.
//
// A block is an array of codes and one fp32 scale, `absmax`. Element i has the value codebook[code[i]] * absmax.
// Encoding takes the codebook's nearest entry to x * (1 / absmax), where absmax is the largest |x|. Before that, a NaN
// counts as 0 and an infinity as the largest finite float: then nothing that was not NaN can become NaN.
#pragma once

#include "core/lines.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kCodebookSize = 256;
constexpr int kStateBlock = 256;  // elements of one optimizer-state block

// What the numbers of a state are.
enum class Role : uint8_t {
  kSigned,
  kSquare,        // never negative, and a step divides by its root: what is positive must stay so
  kSignedSquare,  // a square under the table for either sign, as bitsandbytes has it
  kMaster,        // what is never coded
};
constexpr Role kCodedRoles[] = {Role::kSigned, Role::kSquare, Role::kSignedSquare};
constexpr bool has_sign(Role role) { return role != Role::kSquare; }
constexpr bool is_divisor(Role role) { return role == Role::kSquare || role == Role::kSignedSquare; }
constexpr const char* name_of(Role role) {
  constexpr const char* kNames[] = {"signed", "square", "signed_square", "master"};
  return kNames[static_cast<int>(role)];
}

enum class CodeType : uint8_t { kUint8, kFloat8 };  // the latter is float8_e4m3fn

// The code of a value that the codec's table has.
template <class Codec>
constexpr uint8_t code_of(float value, bool is_signed) {
  int code = 0;
  while (Codec::values(is_signed)[code] != value) ++code;
  return static_cast<uint8_t>(code);
}

// An infinity counts as the largest float: 0 * infinity would be NaN. NaN remains.
BNBOPS_HD float without_infinity(float x) { return x > kFloatMax ? kFloatMax : x < -kFloatMax ? -kFloatMax : x; }

// An element as its encoding sees it.
BNBOPS_HD float encodable(float x) { return x != x ? 0.0F : without_infinity(x); }

// Likewise under a map that may have no negative entries.
BNBOPS_HD float encodable(float x, bool is_signed) { return is_signed || x > 0 ? encodable(x) : 0.0F; }

// Bits from which on a magnitude is not finite.
constexpr uint32_t kInfinityBits = 0x7F800000U;

// A scale as its decoding sees it. The sign of a NaN would choose how its block is encoded again.
BNBOPS_HD float decodable(float absmax) { return with_one_nan(without_infinity(absmax)); }

// The factor that normalises a block: 1 / absmax, 0 for a block of zeros. A denormal absmax has no finite inverse.
BNBOPS_HD float inverse_scale(float absmax) { return absmax > 0 ? decodable(1.0F / absmax) : 0.0F; }

BNBOPS_NAMESPACE_END
