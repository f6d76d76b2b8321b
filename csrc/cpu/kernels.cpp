// The table of CPU kernels. Compiled once per instruction set, with BNBOPS_ISA, BNBOPS_LANES_HEADER, BNBOPS_LANES and
// BNBOPS_KERNELS defined by the build.
#include "cpu/kernels.h"

#include BNBOPS_LANES_HEADER
#include "cpu/blockwise_kernels.h"
#include "cpu/linear_4bit_kernels.h"
#include "cpu/norm_kernels.h"

namespace bnbops {
inline namespace BNBOPS_ISA {
namespace {

template <class Lanes>
constexpr cpu::Kernels make_kernels() {
  cpu::Kernels kernels{};
  kernels.quantize = quantize<Lanes>;
  kernels.dequantize = dequantize<Lanes>;
  kernels.quantize_4bit = quantize_4bit<Lanes>;
  kernels.dequantize_4bit = dequantize_4bit<Lanes>;
  kernels.scales_4bit = scales_of_blocks<Lanes>;
  kernels.order_for_codes = order_for_codes<Lanes>;
  kernels.linear_4bit = linear_4bit<Lanes>;
  kernels.squares = squares<Lanes>;
  return kernels;
}

}  // namespace
}  // namespace BNBOPS_ISA

namespace cpu {
extern const Kernels BNBOPS_KERNELS;  // a constant: no code of one instruction set may run at load
constexpr Kernels BNBOPS_KERNELS = BNBOPS_ISA::make_kernels<BNBOPS_LANES>();
}  // namespace cpu
}  // namespace bnbops
