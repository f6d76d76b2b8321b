// Tensor cores: mma.sync and ldmatrix, by the fragment layouts of the PTX ISA ("Warp-level matrix instructions").
#pragma once

#include <cstdint>
#include <cstring>

#include "cusim/math.h"
#include "cusim/memory.h"
#include "cusim/scheduler.h"

namespace cusim {

// What a 32-bit register of a fragment holds, and how products are summed. The order in which hardware sums, and how it
// rounds on the way, is unspecified; here each product is fused into a float sum, in order of k.
struct Bfloat16 {
  using Sum = float;
  static constexpr int kPerRegister = 2;
  static float element(unsigned bits, int i) { return from_bfloat16(static_cast<uint16_t>(bits >> 16 * i)); }
  static float multiply_add(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
};

struct Float16 {
  using Sum = float;
  static constexpr int kPerRegister = 2;
  static float element(unsigned bits, int i) { return from_float16(static_cast<uint16_t>(bits >> 16 * i)); }
  static float multiply_add(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
};

struct Int8 {
  using Sum = int;
  static constexpr int kPerRegister = 4;
  static int element(unsigned bits, int i) { return static_cast<int8_t>(bits >> 8 * i); }
  static int multiply_add(int a, int b, int sum) {
    return static_cast<int>(static_cast<unsigned>(sum) + static_cast<unsigned>(a * b));  // wraps
  }
};

// d[16][8] += a[16][K] * b[K][8], where a register holds neighbors along k and K is eight registers.
template <class Element>
struct Mma {
  using Sum = typename Element::Sum;
  static constexpr int kK = 8 * Element::kPerRegister;

  unsigned a[4], b[2];
  Sum d[4];

  // Row-major a: its 8x8 register blocks go down first. Column-major b. Group of four lanes: a row of a, a column of b.
  CUSIM_UNWATCHED static void combine(Mma* const (&lanes)[kWarpSize], unsigned) {
    Sum a[16][kK], b[8][kK];
    for (int k = 0; k < kK; k++) {
      const int e = k % Element::kPerRegister, lane = k / Element::kPerRegister % 4, half = k / (kK / 2);
      for (int row = 0; row < 16; row++) {
        a[row][k] = Element::element(lanes[row % 8 * 4 + lane]->a[row / 8 + 2 * half], e);
      }
      for (int column = 0; column < 8; column++) b[column][k] = Element::element(lanes[column * 4 + lane]->b[half], e);
    }
    for (unsigned lane = 0; lane < kWarpSize; lane++) {
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        Sum& sum = lanes[lane]->d[i];
        for (int k = 0; k < kK; k++) sum = Element::multiply_add(a[row][k], b[column][k], sum);
      }
    }
  }
};

template <class Element>
void mma(typename Element::Sum (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site) {
  Mma<Element> mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  std::memcpy(mine.d, d, sizeof(d));
  collective(kAllLanes, mine, Mma<Element>::combine, site);
  std::memcpy(d, mine.d, sizeof(d));
}

// d += a * b
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site = Site::here()) {
  mma<Bfloat16>(d, a, b, site);
}
inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site = Site::here()) {
  mma<Float16>(d, a, b, site);
}
inline void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site = Site::here()) {
  mma<Int8>(d, a, b, site);
}

// `count` matrices of 8x8 16-bit elements; lane 8 * i + j holds row j of matrix i.
template <int count, bool transposed>
struct LoadMatrix {
  uint16_t row[8];
  unsigned result[count];

  CUSIM_UNWATCHED static void combine(LoadMatrix* const (&lanes)[kWarpSize], unsigned) {
    for (unsigned lane = 0; lane < kWarpSize; lane++) {
      for (int i = 0; i < count; i++) {
        const unsigned major = lane / 4, minor = lane % 4 * 2;
        const unsigned low = transposed ? lanes[8 * i + minor]->row[major] : lanes[8 * i + major]->row[minor];
        const unsigned high = transposed ? lanes[8 * i + minor + 1]->row[major] : lanes[8 * i + major]->row[minor + 1];
        lanes[lane]->result[i] = high << 16 | low;
      }
    }
  }
};

// ldmatrix.x1/x2/x4[.trans]. Lane 8 * i + j passes the address of row j of matrix i; other lanes' addresses are not
// used.
template <int count, bool transposed = false>
void ldmatrix(unsigned (&result)[count], const void* row, Site site = Site::here()) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  LoadMatrix<count, transposed> mine = {};
  if (current->lane < 8 * count) {
    check_aligned(row, sizeof(mine.row), "ldmatrix");
    check_shared(row, sizeof(mine.row), "ldmatrix");
    std::memcpy(mine.row, row, sizeof(mine.row));
  }
  collective(kAllLanes, mine, LoadMatrix<count, transposed>::combine, site);
  std::memcpy(result, mine.result, sizeof(result));
}

}  // namespace cusim
