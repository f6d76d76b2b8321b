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
  // By the part of a step, and by position in AllRules:
  StepKernel parts[3][kMaxRules];
  // Codes of states, by number in AllCodecs. Works on blocks.
  StateKernel encode_states, decode_states;
};

extern const Kernels kBaselineKernels;
#ifdef BNBOPS_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

struct Int8Kernels;
struct TileKernels;

// The kernels for an instruction set.
struct Isa {
  const char* name;
  const Kernels* kernels;
  const Int8Kernels* int8;
  const TileKernels* tiles;  // or null
};

// Those that this build and this machine have, the best one first; and the one in use, which is the best one or what
// the environment variable BNBOPS_ISA names.
const std::vector<Isa>& isas();
const Isa& isa();

}  // namespace bnbops::cpu
