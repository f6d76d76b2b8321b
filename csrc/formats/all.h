// All 4-bit formats. A job names one by its index here.
#pragma once

#include <array>

#include "formats/fp4.h"
#include "formats/int4.h"
#include "formats/nf4.h"

BNBOPS_NAMESPACE_BEGIN

constexpr std::array kFormats4bit = {kNF4, kFP4, kInt4};

// Loops take the codes of eight elements, a word, with one scale; some take more, and leave smaller blocks to others.
constexpr int64_t kSmallestBlock4bit = 8, kLargestBlock4bit = 4096;

template <class Holds>
constexpr bool every_format_4bit(const Holds& holds) {
  for (const Format4bit& format : kFormats4bit) {
    if (!holds(format)) return false;
  }
  return true;
}

static_assert(every_format_4bit([](const Format4bit& format) { return format.buckets_suffice; }),
              "of the midpoints between a 4-bit format's values, two lie in the same sixteenth, or one lies just below "
              "the next: Encoder4bit needs smaller buckets for such values");
static_assert(every_format_4bit([](const Format4bit& format) {
                return format.smallest_block >= kSmallestBlock4bit &&
                       (format.smallest_block & (format.smallest_block - 1)) == 0;
              }),
              "a 4-bit format's smallest block must be a power of two of at least kSmallestBlock4bit elements");

BNBOPS_NAMESPACE_END
