// How two 4-bit codes share a byte.
#pragma once

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

// Which half of a byte holds the first of its two elements, the even one.
enum class Nibbles : uint8_t { kLowFirst, kHighFirst };

// The bits of a word below the code of its element i.
BNBOPS_HD constexpr int nibble_shift(Nibbles nibbles, int i) { return (i ^ static_cast<int>(nibbles)) * 4; }

BNBOPS_NAMESPACE_END
