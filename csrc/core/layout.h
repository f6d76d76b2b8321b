// How a tensor is cut into blocks.
#pragma once

#include <cstdint>

namespace bnbops {

constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// `rows` rows of `inner` elements, each cut into `blocks_per_row` blocks, the last of which may be short. Blocks never
// straddle a row, so that any sharding by rows keeps whole blocks. One row is the flat layout of bitsandbytes.
struct BlockLayout {
  int64_t rows, inner, blocks_per_row;
  int64_t blocks() const { return rows * blocks_per_row; }
};

inline BlockLayout flat_layout(int64_t numel, int64_t block) { return {1, numel, divide_up(numel, block)}; }

}  // namespace bnbops
