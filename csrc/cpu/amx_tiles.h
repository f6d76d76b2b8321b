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

// Where the four tiles of sums, 0 to 3, are in memory, and how many bytes apart their rows.
struct SumTiles {
  void* at[4];
  int stride;

  void load() const {
    _tile_loadd(0, at[0], stride);
    _tile_loadd(1, at[1], stride);
    _tile_loadd(2, at[2], stride);
    _tile_loadd(3, at[3], stride);
  }
  void store() const {
    _tile_stored(0, at[0], stride);
    _tile_stored(1, at[1], stride);
    _tile_stored(2, at[2], stride);
    _tile_stored(3, at[3], stride);
  }
};

BNBOPS_NAMESPACE_END
