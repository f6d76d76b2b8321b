// What the operators ask of the CPU: plain pointers and sizes, no torch. One table of functions per instruction set.
#pragma once

#include <cstdint>

namespace bnbops::cpu {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int kMaxStates = 3;
constexpr int kMaxRules = 16;
constexpr int64_t kChunk = 4096;  // elements of a piece of work that has no blocks

struct QuantizeJob {
  const void* values;
  DType dtype;
  const float* codebook;  // 256 sorted entries
  uint8_t* codes;
  float* absmax;
  int64_t numel, blocksize;
};

struct DequantizeJob {
  const uint8_t* codes;
  const float* absmax;
  const float* codebook;
  void* values;
  DType dtype;
  int64_t numel, blocksize;
};

// One parameter of an optimizer step: `rows` rows of `inner` elements, each row cut into blocks of 256 and a rest.
struct StepJob {
  void* param;
  const void* grad;
  void* state[kMaxStates];    // uint8 codes, or fp32 where absmax is null
  float* absmax[kMaxStates];  // [rows, blocks_per_row]
  const void* hyper;          // the rule's Hyper
  int64_t inner, blocks_per_row;
  DType param_dtype, grad_dtype;
};

using StepKernel = void (*)(const StepJob&, int64_t first, int64_t last);
using SquaresKernel = void (*)(const StepJob&, int64_t first, int64_t last, double* sums);

// Each works on a range of blocks (dequantize: of chunks), so that callers can split a job among threads.
struct Kernels {
  void (*quantize)(const QuantizeJob&, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeJob&, int64_t first, int64_t last);
  // Sums of squares, one for each chunk; every sum has the same bits everywhere.
  void (*squares)(const void* values, DType dtype, int64_t numel, int64_t first, int64_t last, double* sums);
  // By position in AllRules:
  StepKernel step[kMaxRules];
  SquaresKernel direction_squares[kMaxRules];  // of the rule's directions, one sum for each block; or null
};

extern const Kernels kBaselineKernels;
#ifdef BNBOPS_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The kernels for this machine, or those that the environment variable BNBOPS_ISA names.
struct Isa {
  const char* name;
  const Kernels* kernels;
};
const Isa& isa();

}  // namespace bnbops::cpu
