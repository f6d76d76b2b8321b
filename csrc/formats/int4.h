// Symmetric integers: -7 to 7, times absmax / 7. Zero and absmax of either sign are exact, which -8 to 7 would not
// give; of the sixteen codes one is left over. The Int4 that Dettmers et al., "QLoRA" (arXiv:2305.14314), table 2,
// compare NF4 with; the codes are those of bitsandbytes' table "int4", from 7 down to 0 and from 0 down to -7.
#pragma once

#include "formats/format.h"

BNBOPS_NAMESPACE_BEGIN

// Nobody else stores weights in these codes: they lie as other tools' 4-bit integers and OCP's formats do, low half
// first.
constexpr Format4bit kInt4 =
    make_format_4bit("int4",
                     {1.0F, 6.0F / 7, 5.0F / 7, 4.0F / 7, 3.0F / 7, 2.0F / 7, 1.0F / 7, 0.0F,  //
                      0.0F, -1.0F / 7, -2.0F / 7, -3.0F / 7, -4.0F / 7, -5.0F / 7, -6.0F / 7, -1.0F},
                     Nibbles::kLowFirst, 16);

BNBOPS_NAMESPACE_END
