// What the operators ask of the CPU: plain pointers and sizes, no torch. One table of functions per instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/jobs.h"
#include "ops/optimizer/step_job.h"

namespace bnbops::cpu {

constexpr int kMaxRules = 16;
constexpr int64_t kChunk = 4096;    // elements of a piece of work that has no blocks
constexpr int64_t kXPadding = 256;  // in_features are padded to a multiple of this

// out = x @ W.T + bias for the matrix W [out_features, in_features] that begins at element `first` of the weight and
// whose rows consist of whole blocks.
struct Linear4bitJob {
  Weight4bit weight;
  int64_t first, in_features, out_features, rows;
  const float* x;  // [rows, x_stride], order_for_codes of fp32 rows with zeros after in_features
  int64_t x_stride;
  const void* bias;  // of out's dtype, or null
  void* out;         // [rows, out_features]
  DType dtype;
};

// ---- int8 --------------------------------------------------------------------------------------------------------

constexpr int64_t kInt8Panel = 64;   // rows of a weight that are multiplied together
constexpr int64_t kInt8Piece = 256;  // elements converted to fp32 at a time

// For codes of rows: also the outlier columns, and a form for products.
struct Int8EncodeJob : Int8QuantJob {
  const int64_t* outliers = nullptr;  // the columns that have any
  int64_t outlier_count = 0;
  float* outlier_values = nullptr;  // what x has there, [rows, outlier_count]; or null
  // Or instead of `codes`, for a product with them: rows as `prepare` makes them, and their sums.
  void* activations = nullptr;
  int32_t* activation_sums = nullptr;
};

// The columns of x that stay in floating point.
struct Int8Outliers {
  const int64_t* columns = nullptr;
  int64_t count = 0;
  const float* values = nullptr;  // [rows, count]
};

// a [rows, inner] times the transpose of b [columns, inner].
struct Int8MatmulJob {
  const void* activations;         // a, as `prepare` made it: [rows, stride]
  const int32_t* activation_sums;  // of its rows
  const int8_t* weight;            // b
  int64_t rows, columns, inner;
  int32_t* sums;                 // [rows, columns], or null, and then
  const Int8Epilogue* epilogue;  // tells what to make of the sums
  Int8Outliers outliers;
};

struct Int8Kernels {
  // On ranges of rows.
  void (*scan_rows)(const Int8QuantJob&, int64_t first, int64_t last);     // row_stats, is_outlier
  void (*encode_rows)(const Int8EncodeJob&, int64_t first, int64_t last);  // codes or activations, outlier_values
  void (*dequantize)(const Int8DequantJob&, int64_t first, int64_t last);
  // On ranges of pieces of columns: col_stats and codes.
  void (*quantize_columns)(const Int8QuantJob&, int64_t first, int64_t last);

  // A matrix product. `prepare` brings one row of a into the form that `multiply` wants, `row_bytes(inner)` long, and
  // returns its sum. `multiply` works on a range of tiles, of kInt8Panel columns by `row_block` rows.
  int64_t (*row_bytes)(int64_t inner);
  int32_t (*prepare)(const int8_t* codes, int64_t inner, void* row);
  int64_t row_block;
  void (*multiply)(const Int8MatmulJob&, int64_t first, int64_t last);

  // The epilogue alone, on sums of a range of rows.
  void (*dequantize_sums)(const int32_t* sums, const Int8Epilogue&, int64_t first, int64_t last);
};

// ---- tiles -------------------------------------------------------------------------------------------------------
// Products of bfloat16 activations with 4-bit weights, for processors with instructions for them. They multiply the
// very weights that dequantize_4bit gives in bfloat16 (denormal ones count as 0) and add in fp32.

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

// ---- the tables --------------------------------------------------------------------------------------------------

using StateKernel = void (*)(const StateJob&, int64_t first, int64_t last);
// `hyper` is the rule's Hyper.
using StepKernel = void (*)(const StepJob&, const void* hyper, int64_t first, int64_t last);

// Each works on a range of blocks (dequantize: of chunks), so that callers can split a job among threads.
struct Kernels {
  void (*quantize)(const QuantizeJob&, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeJob&, int64_t first, int64_t last);
  // 4-bit weights. `quantize` works on blocks.
  void (*quantize_4bit)(const QuantizeJob&, int64_t first, int64_t last);
  void (*dequantize_4bit)(const Weight4bit&, int64_t first, int64_t numel, void* out, DType dtype, bool past_caches);
  void (*scales_4bit)(const Scales4bit&, int64_t first_block, int64_t n, float* to);
  void (*order_for_codes)(const void* x, DType dtype, int format, int64_t n, int64_t padded, float* to);
  void (*linear_4bit)(const Linear4bitJob&, int64_t first_feature, int64_t last_feature);
  // Sums of squares, one for each piece (norm_math.h).
  void (*squares)(const void* values, DType dtype, int64_t numel, int64_t first, int64_t last, double* sums);
};

// Of optimizers; all work on blocks.
struct StepKernels {
  StepKernel parts[3][kMaxRules];  // by the part of a step, and by position in AllRules
  StateKernel encode, decode;      // codes of states
};

extern const Kernels kBaselineKernels;
extern const StepKernels kBaselineSteps;
extern const Int8Kernels kInt8BaselineKernels;
#ifdef BNBOPS_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
extern const StepKernels kAvx2Steps, kAvx512Steps;
extern const Int8Kernels kInt8Avx2Kernels, kInt8Avx512Kernels, kInt8AmxKernels;
extern const TileKernels kAmxKernels;
#endif

// The kernels for an instruction set.
struct Isa {
  const char* name;
  const Kernels* kernels;
  const StepKernels* steps;
  const Int8Kernels* int8;
  const TileKernels* tiles;  // or null
};

// Those that this build and this machine have, the best one first; and the one in use, which is the best one or what
// the environment variable BNBOPS_ISA names.
const std::vector<Isa>& isas();
const Isa& isa();

}  // namespace bnbops::cpu
