// The scales of blocks: fp32, or codes of a table of 256 entries, times an outer scale, plus an offset. The latter are
// nested: "double quantization" (Dettmers et al., "QLoRA", arXiv:2305.14314, section 3) has the dynamic map for a table
// and the scales' mean for an offset. Scales of 8-bit floats are others of these tables, with the offset 0.
#pragma once

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

struct Scales4bit {
  const float* absmax;          // null if the scales are nested:
  const uint8_t* nested_codes;  // scale b is nested_table[nested_codes[b]] * nested_absmax[b / nested_block]
  const float* nested_table;    //   + *nested_offset
  const float* nested_absmax;
  const float* nested_offset;
  int64_t nested_block;
};

BNBOPS_HD float nested_scale(float entry, float nested_absmax, float offset) {
  const float product = entry * nested_absmax;
  return product + offset;
}

// A block's scale as memory has it: loading is apart from computing, so that loads can be far ahead.
struct StoredScale {
  float absmax;  // of the block, or of the codes of scales
  uint8_t code;  // if the scales are nested
};

BNBOPS_HD StoredScale load_scale(const Scales4bit& scales, int64_t block) {
  if (scales.absmax != nullptr) return {scales.absmax[block], 0};
  return {scales.nested_absmax[block / scales.nested_block], scales.nested_codes[block]};
}

BNBOPS_HD float scale_of(const Scales4bit& scales, const StoredScale& stored) {
  if (scales.absmax != nullptr) return stored.absmax;
  return nested_scale(scales.nested_table[stored.code], stored.absmax, *scales.nested_offset);
}

BNBOPS_HD float scale_of_block(const Scales4bit& scales, int64_t block) {
  return scale_of(scales, load_scale(scales, block));
}

BNBOPS_NAMESPACE_END
