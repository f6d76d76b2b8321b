// What the bytes of a quantized block mean, written once, for scalar code, SIMD and devices.
//
// A block is an array of codes and one fp32 scale, `absmax`. Element i has the value codebook[code[i]] * absmax.
// Encoding takes the codebook's nearest entry to x * (1 / absmax), where absmax is the largest |x|. Before that, a NaN
// counts as 0 and an infinity as the largest finite float: then nothing that was not NaN can become NaN.
#pragma once

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kCodebookSize = 256;
constexpr int kStateBlock = 256;  // elements of one optimizer-state block

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

// Encoders see |x| + 2^-31, which makes the exponents of all magnitudes up to 1 neighbours, 32 of them.
constexpr int kSmallestOctave = 96;  // exponent field of 2^-31, far below half of the smallest magnitude
constexpr float kShift = 4.656612873077392578125e-10F;  // 2^-31

BNBOPS_NAMESPACE_END
