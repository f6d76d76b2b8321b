// A 4-bit float as bitsandbytes has it: a sign bit, two bits of exponent and one of fraction, over the largest of their
// values, 12. Larger exponent bits mean smaller values, but 0 is sub-normal: 0 and 1/16.
#pragma once

#include "formats/format.h"

BNBOPS_NAMESPACE_BEGIN

// Code 8, with the sign bit and no other, is +0, too, and the code of small positive elements.
constexpr Format4bit kFP4 =
    make_format_4bit("fp4",
                     {0.0F, 0.0625F / 12, 8.0F / 12, 1.0F, 4.0F / 12, 6.0F / 12, 2.0F / 12, 3.0F / 12,  //
                      0.0F, -0.0625F / 12, -8.0F / 12, -1.0F, -4.0F / 12, -6.0F / 12, -2.0F / 12, -3.0F / 12},
                     Nibbles::kHighFirst, 32, {{11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}, 16});

BNBOPS_NAMESPACE_END
