// Loops without a loop.
#pragma once

#include <type_traits>
#include <utility>

#include "core/portable.h"

#define BNBOPS_INLINE_LAMBDA __attribute__((always_inline))

BNBOPS_NAMESPACE_BEGIN

template <class Body, int... kIndices>
BNBOPS_HD void unrolled_over(std::integer_sequence<int, kIndices...>, const Body& body) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

// body(0) to body(kCount - 1), with constants: an array that it indexes by them lives in registers. (GCC unrolls plain
// loops too late for that.)
template <int kCount, class Body>
BNBOPS_HD void unrolled(const Body& body) {
  unrolled_over(std::make_integer_sequence<int, kCount>{}, body);
}

BNBOPS_NAMESPACE_END
