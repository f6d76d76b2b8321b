// Products of bfloat16 activations with 4-bit weights, for processors with instructions for them. They multiply the
// very weights that dequantize_4bit gives in bfloat16 (denormal ones count as 0) and add in fp32.
#pragma once

#include "cpu/kernels.h"

namespace bnbops::cpu {

constexpr int64_t kChunk32 = 32;  // elements decoded at a time: of one block

// The weight is a matrix [out_features, in_features], whose rows consist of whole blocks of whole chunks.
struct TileJob {
  Weight4bit weight;  // with fp32 scales
  int64_t out_features, in_features, rows;
  const uint16_t* activations;  // [rows, in_features], for input_grad [rows, out_features]
  uint16_t* packed;             // as large, for tiles with rows and columns rounded up to kTilePair
  const uint16_t* bias;         // [out_features] or null
  uint16_t* out;                // [rows, out_features], for input_grad [rows, in_features]
};

constexpr int64_t kTile = 16;  // rows of a tile, and its columns in pairs of bfloat16
constexpr int64_t kTilePair = 2 * kTile;

// `pack` works on tiles of the activations, `multiply` on pairs of weight tiles.
struct TileProduct {
  void (*pack)(const TileJob&, int64_t first, int64_t last);
  void (*multiply)(const TileJob&, int64_t first, int64_t last);
};

// AMX: x @ W.T + bias, and gradient @ W.
struct TileKernels {
  TileProduct linear, input_grad;
};

#ifdef BNBOPS_X86
extern const TileKernels kAmxKernels;
#endif

}  // namespace bnbops::cpu
