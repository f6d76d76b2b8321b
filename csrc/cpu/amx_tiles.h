// The tile registers of AMX.
#pragma once

#include <immintrin.h>

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kTileStride = 64;  // bytes between the rows of a tile in memory: tiles are contiguous

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread, while it lives.
class TileRegisters {
 public:
  explicit TileRegisters(const TileConfig& config = {}) { _tile_loadconfig(&config); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

BNBOPS_NAMESPACE_END
