// Sums of products of int8 by AMX: signed by signed, a tile of 16 rows times 16 columns and 64 products deep at once.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/int8_dots_avx512.h"

BNBOPS_NAMESPACE_BEGIN

struct AmxDots : Avx512Dots {  // whose way is as good for a few rows
  static constexpr int64_t kPackFrom = 5;
  static constexpr int64_t kDepth = 512;
  static constexpr uint8_t kShift = 0;

  BNBOPS_HD static int32_t initial_sum(int32_t /*activation_sum*/) { return 0; }

  static void packed_rows(const Activation* a, int64_t stride, int64_t rows, const int8_t* packed, int64_t depth,
                          int32_t* sums) {
    const int64_t whole = rows / 32 * 32, rest = rows - whole;
    if (whole > 0) {
      const TileRegisters registers;
      for (int64_t r = 0; r < whole; r += 32) tiles_2x2(a + r * stride, stride, packed, depth, sums + 64 * r);
    }
    a += whole * stride;
    sums += 64 * whole;
    if (rest > 16) {
      TileConfig config;
      config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(rest - 16);
      const TileRegisters registers(config);
      tiles_2x2(a, stride, packed, depth, sums);
    } else if (rest > 0) {
      TileConfig config;
      for (int tile = 0; tile <= 4; ++tile) config.rows[tile] = static_cast<uint8_t>(rest);
      const TileRegisters registers(config);
      tiles_1x4(a, stride, packed, depth, sums);
    }
  }

 private:
  static constexpr int kSumsStride = 64 * sizeof(int32_t);

  // Two tiles of rows (0, 1, 4 and 2, 3, 5), two groups of columns (6 and 7) at a time.
  static void tiles_2x2(const Activation* a, int64_t stride, const int8_t* packed, int64_t depth, int32_t* sums) {
    add_2x2(a, stride, packed, packed + 16 * depth, depth, sums);
    add_2x2(a, stride, packed + 32 * depth, packed + 48 * depth, depth, sums + 32);
  }

  static void add_2x2(const Activation* a, int64_t stride, const int8_t* left, const int8_t* right, int64_t depth,
                      int32_t* sums) {
    const SumTiles tiles{{sums, sums + 16, sums + 16 * 64, sums + 16 * 64 + 16}, kSumsStride};
    tiles.load();
    for (int64_t k = 0; k < depth; k += 64) {
      _tile_loadd(4, a + k, stride);
      _tile_loadd(6, left + 16 * k, kTileStride);
      _tile_loadd(7, right + 16 * k, kTileStride);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(5, a + 16 * stride + k, stride);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    tiles.store();
  }

  // One tile of rows (4), four groups of columns.
  static void tiles_1x4(const Activation* a, int64_t stride, const int8_t* packed, int64_t depth, int32_t* sums) {
    const SumTiles tiles{{sums, sums + 16, sums + 32, sums + 48}, kSumsStride};
    tiles.load();
    for (int64_t k = 0; k < depth; k += 64) {
      _tile_loadd(4, a + k, stride);
      _tile_loadd(5, packed + 16 * k, kTileStride);
      _tile_dpbssd(0, 4, 5);
      _tile_loadd(6, packed + 16 * (depth + k), kTileStride);
      _tile_dpbssd(1, 4, 6);
      _tile_loadd(7, packed + 16 * (2 * depth + k), kTileStride);
      _tile_dpbssd(2, 4, 7);
      _tile_loadd(5, packed + 16 * (3 * depth + k), kTileStride);
      _tile_dpbssd(3, 4, 5);
    }
    tiles.store();
  }
};

BNBOPS_NAMESPACE_END
