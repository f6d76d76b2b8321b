// Tensor cores, by the instructions that every GPU since sm_80 has.
//
// d += a * b, products that a warp holds in pieces ("fragments", PTX ISA, mma.m16n8k16 and mma.m16n8k32). Lane 4 * g +
// t has, of a, rows g (a[0], a[2]) and g + 8 (a[1], a[3]); of b, column g; of d, columns 2 t and 2 t + 1 in row g
// (d[0], d[1]) and in row g + 8 (d[2], d[3]). Every register of a and b has neighbors along k.
#pragma once

#include "cuda/device.h"

#ifdef CUSIM
#define BNBOPS_MMA(simulated, instruction, number) cusim::simulated(d, a, b)
#else
#define BNBOPS_MMA(simulated, instruction, number)                                                       \
  asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+" number(d[0]), "+" number(d[1]), "+" number(d[2]), "+" number(d[3])                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

namespace bnbops::cuda {

// Of [16, 16] and [16, 8], two 16-bit floats in a register.
template <DType kDType>
BNBOPS_DEVICE void multiply_add_tiles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(kDType != DType::kFloat32, "tensor cores multiply 16-bit elements here");
  if constexpr (kDType == DType::kBFloat16) {
    BNBOPS_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", "f");
  } else {
    BNBOPS_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32", "f");
  }
}

// Of [16, 32] and [32, 8], four codes in a register. Sums wrap.
BNBOPS_DEVICE void multiply_add_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  BNBOPS_MMA(mma_m16n8k32_s8, "m16n8k32.row.col.s32.s8.s8.s32", "r");
}

}  // namespace bnbops::cuda
