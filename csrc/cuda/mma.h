// Tensor cores, by the instructions that every GPU since sm_80 has.
#pragma once

#include "cuda/device.h"

namespace bnbops::cuda {

// d += a * b, a product of [16, 16] and [16, 8] that a warp holds in pieces ("fragments", PTX ISA, mma.m16n8k16).
// Lane 4 * g + t has, of a, rows g (a[0], a[2]) and g + 8 (a[1], a[3]); of b, column g; of d, columns 2 t and 2 t + 1
// in row g (d[0], d[1]) and in row g + 8 (d[2], d[3]). Every register of a and b has two neighbors along k.
template <DType kDType>
BNBOPS_DEVICE void multiply_add_tiles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(kDType != DType::kFloat32, "tensor cores multiply 16-bit elements here");
#ifdef CUSIM
  if constexpr (kDType == DType::kBFloat16) {
    cusim::mma_m16n8k16_bf16(d, a, b);
  } else {
    cusim::mma_m16n8k16_f16(d, a, b);
  }
#else
  if constexpr (kDType == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a * b, a product of [16, 32] and [32, 8] that a warp holds in pieces ("fragments", PTX ISA, mma.m16n8k32).
// Lane 4 * g + t has, of a, rows g (a[0], a[2]) and g + 8 (a[1], a[3]); of b, column g; of d, columns 2 t and 2 t + 1
// in row g (d[0], d[1]) and in row g + 8 (d[2], d[3]). Every register of a and b has four neighbors along k. Sums wrap.
BNBOPS_DEVICE void multiply_add_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef CUSIM
  cusim::mma_m16n8k32_s8(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace bnbops::cuda
