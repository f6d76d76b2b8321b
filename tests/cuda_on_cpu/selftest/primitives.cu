// Each primitive against a formula for one element.
#include <cmath>
#include <limits>

#include "harness.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

unsigned byte_of(unsigned low, unsigned high, int i) { return (i < 4 ? low >> 8 * i : high >> 8 * (i - 4)) & 255; }

// The table of the modes in the PTX ISA, byte by byte.
int source_byte(cusim::Prmt mode, int i, int position) {
  switch (mode) {
    case cusim::Prmt::kForward4: return (position + i) % 8;
    case cusim::Prmt::kBackward4: return (position - i + 8) % 8;
    case cusim::Prmt::kReplicate8: return position;
    case cusim::Prmt::kClampLeft: return std::max(i, position);
    case cusim::Prmt::kClampRight: return std::min(i, position);
    case cusim::Prmt::kReplicate16: return position % 2 * 2 + i % 2;
    default: std::abort();
  }
}

struct Shuffled {
  int exact, up, down, flip;
};

__global__ void shuffle_all(Shuffled* y, int argument, int width) {
  const int lane = threadIdx.x;
  y[lane] = {__shfl_sync(~0U, lane, argument, width), __shfl_up_sync(~0U, lane, argument, width),
             __shfl_down_sync(~0U, lane, argument, width), __shfl_xor_sync(~0U, lane, argument, width)};
}

__global__ void shuffle_types(double* y) {
  const int lane = threadIdx.x;
  y[lane] = __shfl_xor_sync(~0U, 1e300 * lane, 3) + __shfl_xor_sync(~0U, 0.5F * lane, 3) +
            __shfl_xor_sync(~0U, 1LL << lane, 3) + __shfl_xor_sync(~0U, 1U << lane, 3);
}

struct Voted {
  unsigned ballot, match, all_match, any, all, sum, low, high, conjunction, disjunction, parity;
  int signed_sum, signed_low, signed_high;
};

// The lanes of `mask` and the others vote apart, one group on values that are all the same.
__global__ void vote(Voted* y, const unsigned* x, unsigned mask) {
  const unsigned lane = threadIdx.x, mine = mask >> lane & 1 ? mask : ~mask, value = x[lane];
  int same;
  Voted& v = y[lane];
  v.ballot = __ballot_sync(mine, value & 1);
  v.match = __match_any_sync(mine, value % 4);
  v.all_match = __match_all_sync(mine, mine == mask ? 7 : value, &same) + same;
  v.any = __any_sync(mine, value % 4 == 3);
  v.all = __all_sync(mine, value % 4 != 3);
  v.sum = __reduce_add_sync(mine, value);
  v.low = __reduce_min_sync(mine, value);
  v.high = __reduce_max_sync(mine, value);
  v.conjunction = __reduce_and_sync(mine, value);
  v.disjunction = __reduce_or_sync(mine, value);
  v.parity = __reduce_xor_sync(mine, value);
  v.signed_sum = __reduce_add_sync(mine, static_cast<int>(value));
  v.signed_low = __reduce_min_sync(mine, static_cast<int>(value));
  v.signed_high = __reduce_max_sync(mine, static_cast<int>(value));
}

// Round by round, one more thread of those that are left says yes, until all do; then one leaves.
__global__ void vote_in_block(int* wrong) {
  const int n = blockDim.x, i = threadIdx.x;
  for (int left = n; left > n - 3; left--) {
    if (i >= left) return;
    for (int yes = 0; yes <= left; yes++) {
      const bool mine = i < yes;
      const int count = __syncthreads_count(mine), any = __syncthreads_or(mine), all = __syncthreads_and(mine);
      if (count != yes || any != (yes > 0) || all != (yes == left)) atomicAdd(wrong, 1);
    }
  }
}

__global__ void where(uint3* y) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * threads + thread] = {blockIdx.x + 10 * threadIdx.x, blockIdx.y + 10 * threadIdx.y,
                                 blockIdx.z + 10 * threadIdx.z};
}

__global__ void nothing(const void*) {}

struct Totals {
  int sum, difference, low, high, bits, last;
  unsigned wrapping, falling;
  float real;
  unsigned long long wide;
};

__global__ void atomics(Totals* y) {
  const int i = threadIdx.x;
  atomicAdd(&y->sum, i);
  atomicSub(&y->difference, i);
  atomicMin(&y->low, -i);
  atomicMax(&y->high, i);
  atomicOr(&y->bits, 1 << i % 20);
  atomicInc(&y->wrapping, 9);
  atomicDec(&y->falling, 9);
  atomicAdd(&y->real, 0.5F);
  atomicAdd(&y->wide, 1ULL << 32);
  if (atomicCAS(&y->last, 0, i + 1) == 0) atomicExch(&y->last, 77);
}

// c[16][8] = a[16][k] * b[k][8], from shared memory by ldmatrix.
template <class Element, class Sum>
__global__ void multiply(const uint16_t* a, const uint16_t* b, Sum* c) {
  constexpr int kK = 16;
  alignas(16) __shared__ uint16_t tile_a[16][kK], tile_b[kK][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * kK; i += 32) tile_a[i / kK][i % kK] = a[i];
  for (int i = lane; i < kK * 8; i += 32) tile_b[i / 8][i % 8] = b[i];
  __syncthreads();
  unsigned fragment_a[4], fragment_b[2];
  cusim::ldmatrix<4>(fragment_a, &tile_a[lane % 16][lane / 16 * 8]);
  cusim::ldmatrix<2, true>(fragment_b, tile_b[lane % 16]);
  Sum d[4] = {};
  cusim::mma<Element>(d, fragment_a, fragment_b, cusim::Site::here());
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// The same with int8, whose fragments are 16-bit pairs of neighbors; b is given column by column.
__global__ void multiply_int8(const int8_t* a, const int8_t* b, int* c) {
  constexpr int kK = 32;
  alignas(16) __shared__ int8_t tile_a[16][kK], tile_b[8][kK];
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * kK; i += 32) tile_a[i / kK][i % kK] = a[i];
  for (int i = lane; i < 8 * kK; i += 32) tile_b[i / kK][i % kK] = b[i];
  __syncthreads();
  unsigned fragment_a[4], fragment_b[2], half_b[1];
  cusim::ldmatrix<4>(fragment_a, &tile_a[lane % 16][lane / 16 * 16]);
  cusim::ldmatrix<2>(fragment_b, &tile_b[lane % 8][lane / 8 % 2 * 16]);
  cusim::ldmatrix<1>(half_b, lane < 8 ? tile_b[lane] : nullptr);
  int d[4] = {};
  for (int i = 0; i < 4; i++) d[i] = half_b[0] == fragment_b[0] ? 0 : 1 << 20;
  cusim::mma_m16n8k32_s8(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

float small_integer() { return static_cast<int>(random_bits() % 17) - 8; }

uint16_t bfloat16_bits(float x) { return __float_as_uint(x) >> 16; }
uint16_t float16_bits(float x) { return cusim::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// Small integers: every order of summation is exact.
template <class Element>
void check_multiply(uint16_t (*bits)(float)) {
  auto a = array<uint16_t>(16 * 16), b = array<uint16_t>(16 * 8);
  auto x = array<float>(16 * 16), y = array<float>(16 * 8), c = array<float>(16 * 8);
  for (int i = 0; i < 16 * 16; i++) a[i] = bits(x[i] = small_integer());
  for (int i = 0; i < 16 * 8; i++) b[i] = bits(y[i] = small_integer());
  LAUNCH((multiply<Element, float>), 1, 32, 0, nullptr, a.get(), b.get(), c.get());
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      double sum = 0;
      for (int k = 0; k < 16; k++) sum += static_cast<double>(x[row * 16 + k]) * y[k * 8 + column];
      EXPECT_EQUAL(c[row * 8 + column], static_cast<float>(sum));
    }
  }
}

}  // namespace

TEST(prmt) {
  const unsigned x = 0x83C2410F, y = 0xF1107E98;
  for (unsigned selector = 0; selector < 0x10000; selector++) {
    unsigned expected = 0, without_signs = 0;
    for (int i = 0; i < 4; i++) {
      const unsigned nibble = selector >> 4 * i & 15, byte = byte_of(x, y, nibble % 8);
      expected |= (nibble < 8 ? byte : byte > 127 ? 255 : 0) << 8 * i;
      without_signs |= byte << 8 * i;
    }
    EXPECT_EQUAL(cusim::prmt(x, y, selector), expected);
    EXPECT_EQUAL(__byte_perm(x, y, selector), without_signs);
  }
  for (int mode = 1; mode <= 6; mode++) {
    for (int position = 0; position < 4; position++) {
      unsigned expected = 0;
      for (int i = 0; i < 4; i++) {
        expected |= byte_of(x, y, source_byte(cusim::Prmt(mode), i, position)) << 8 * i;
      }
      EXPECT_EQUAL(cusim::prmt(x, y, position + 4, cusim::Prmt(mode)), expected);
    }
  }
}

TEST(shuffles) {
  auto y = array<Shuffled>(32);
  for (int width = 1; width <= 32; width *= 2) {
    for (int argument = 0; argument < 40; argument++) {
      LAUNCH(shuffle_all, 1, 32, 0, nullptr, y.get(), argument, width);
      for (int lane = 0; lane < 32; lane++) {
        const int start = lane / width * width, end = start + width, flipped = lane ^ argument;
        EXPECT_EQUAL(y[lane].exact, start + argument % width);
        EXPECT_EQUAL(y[lane].up, lane - argument >= start ? lane - argument : lane);
        EXPECT_EQUAL(y[lane].down, lane + argument < end ? lane + argument : lane);
        EXPECT_EQUAL(y[lane].flip, flipped < end ? flipped : lane);
      }
    }
  }
}

TEST(shuffles_of_each_type) {
  auto y = array<double>(64);
  LAUNCH(shuffle_types, 2, 32, 0, nullptr, y.get());
  for (int lane = 0; lane < 32; lane++) {
    const int other = lane ^ 3;
    EXPECT_EQUAL(y[lane], 1e300 * other + 0.5F * other + (1LL << other) + (1U << other));
  }
}

TEST(votes_and_reductions) {
  auto x = array<unsigned>(32);
  auto y = array<Voted>(32);
  for (unsigned mask : {0xFFFFFFFFU, 0x0000FFFFU, 0x80000001U, random_bits(), random_bits()}) {
    for (int i = 0; i < 32; i++) x[i] = random_bits();
    LAUNCH(vote, 1, 32, 0, nullptr, y.get(), x.get(), mask);
    for (int lane = 0; lane < 32; lane++) {
      const unsigned mine = mask >> lane & 1 ? mask : ~mask;
      Voted v = {0, 0, 0, 0, 1, 0, ~0U, 0, ~0U, 0, 0, 0, INT32_MAX, INT32_MIN};
      bool same = true;
      for (int i = 0; i < 32; i++) {
        if (!(mine >> i & 1)) continue;
        const int number = static_cast<int>(x[i]);
        v.ballot |= (x[i] & 1) << i;
        v.match |= static_cast<unsigned>(x[i] % 4 == x[lane] % 4) << i;
        same = same && (mine == mask || x[i] == x[lane]);
        v.any |= x[i] % 4 == 3;
        v.all &= x[i] % 4 != 3;
        v.sum += x[i];
        v.low = x[i] < v.low ? x[i] : v.low;
        v.high = x[i] > v.high ? x[i] : v.high;
        v.conjunction &= x[i];
        v.disjunction |= x[i];
        v.parity ^= x[i];
        v.signed_low = number < v.signed_low ? number : v.signed_low;
        v.signed_high = number > v.signed_high ? number : v.signed_high;
      }
      v.all_match = same ? mine + 1 : 0;
      v.signed_sum = static_cast<int>(v.sum);
      if (std::memcmp(&y[lane], &v, sizeof(v)) != 0) {
        std::fprintf(stderr, "mask %08x lane %d: a vote or reduction differs\n", mask, lane);
        std::exit(1);
      }
    }
  }
}

TEST(votes_of_a_block) {
  int wrong = 0;
  LAUNCH(vote_in_block, 2, 70, 0, nullptr, &wrong);
  EXPECT_EQUAL(wrong, 0);
}

// What is halfway between two neighbors goes to the even one, what is not to the nearer one.
template <class To, class From>
static void check_rounding(To to, From from, int first, int last) {
  for (int bits = first; bits < last; bits++) {
    const float low = from(bits), high = from(bits + 1), half = low + (high - low) / 2;
    EXPECT_EQUAL(to(low), static_cast<uint16_t>(bits));
    EXPECT_EQUAL(to(half), static_cast<uint16_t>(bits + bits % 2));
    EXPECT_EQUAL(to(std::nextafterf(half, low)), static_cast<uint16_t>(bits));
    EXPECT_EQUAL(to(std::nextafterf(half, high)), static_cast<uint16_t>(bits + 1));
  }
}

TEST(conversions_of_16_bit_floats) {
  for (int sign : {0, 0x8000}) {
    check_rounding(cusim::to_float16, cusim::from_float16, sign, sign + 0x7BFF);  // up to the largest number
    check_rounding(cusim::to_bfloat16, cusim::from_bfloat16, sign, sign + 0x7F7F);
  }
  EXPECT_EQUAL(cusim::from_float16(0x3555), 0x1.554p-2F);
  EXPECT_EQUAL(cusim::from_float16(0x0001), 0x1p-24F);
  EXPECT_EQUAL(cusim::to_float16(65519.0F), uint16_t{0x7BFF});
  EXPECT_EQUAL(cusim::to_float16(65520.0F), uint16_t{0x7C00});
  EXPECT_EQUAL(cusim::from_bfloat16(0x3EAB), 0x1.56p-2F);
  EXPECT_EQUAL(cusim::to_bfloat16(3.4e38F), uint16_t{0x7F80});
  EXPECT_EQUAL(cusim::to_float16(-kNan), uint16_t{0x7FFF});
  EXPECT_EQUAL(cusim::to_bfloat16(-kNan), uint16_t{0x7FFF});
}

TEST(indices) {
  const dim3 grid(3, 4, 2), size(5, 3, 7);
  auto y = array<uint3>(24 * 105);
  LAUNCH(where, grid, size, 0, nullptr, y.get());
  for (unsigned i = 0; i < 24 * 105; i++) {
    const unsigned b = i / 105, t = i % 105;
    EXPECT_EQUAL(y[i].x, b % 3 + 10 * (t % 5));
    EXPECT_EQUAL(y[i].y, b / 3 % 4 + 10 * (t / 5 % 3));
    EXPECT_EQUAL(y[i].z, b / 12 + 10 * (t / 15));
  }
}

TEST(launch_errors) {
  const auto launch = [](dim3 grid, dim3 size, size_t shared_bytes) {
    LAUNCH(nothing, grid, size, shared_bytes, nullptr, nullptr);
    return cudaGetLastError();
  };
  EXPECT_EQUAL(launch(1, 1024, 48 * 1024), cudaSuccess);
  EXPECT_EQUAL(launch(0, 32, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(launch(dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(launch(1, 1025, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(launch(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(launch(1, 32, 48 * 1024 + 1), cudaErrorInvalidValue);
  const auto raise = [](int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  EXPECT_EQUAL(raise(227 * 1024 + 1), cudaErrorInvalidValue);
  EXPECT_EQUAL(raise(100 * 1024), cudaSuccess);
  EXPECT_EQUAL(launch(1, 32, 100 * 1024), cudaSuccess);
  EXPECT_EQUAL(launch(1, 32, 100 * 1024 + 1), cudaErrorInvalidValue);
}

TEST(conversions_saturate) {
  const struct {
    float x;
    int rn, rz, rd, ru;
    unsigned urn, urz, urd, uru;
  } rows[] = {
      {2.5F, 2, 2, 2, 3, 2, 2, 2, 3},
      {3.5F, 4, 3, 3, 4, 4, 3, 3, 4},
      {-2.5F, -2, -2, -3, -2, 0, 0, 0, 0},
      {-0.5F, 0, 0, -1, 0, 0, 0, 0, 0},
      {kNan, 0, 0, 0, 0, 0, 0, 0, 0},
      {3e9F, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, 3000000000U, 3000000000U, 3000000000U, 3000000000U},
      {-3e9F, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, 0, 0, 0, 0},
      {2147483648.0F, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, 1U << 31, 1U << 31, 1U << 31, 1U << 31},
      {2147483520.0F, 2147483520, 2147483520, 2147483520, 2147483520, 2147483520, 2147483520, 2147483520, 2147483520},
      {kInfinity, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
      {-kInfinity, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, 0, 0, 0, 0},
  };
  for (const auto& row : rows) {
    EXPECT_EQUAL(__float2int_rn(row.x), row.rn);
    EXPECT_EQUAL(__float2int_rz(row.x), row.rz);
    EXPECT_EQUAL(__float2int_rd(row.x), row.rd);
    EXPECT_EQUAL(__float2int_ru(row.x), row.ru);
    EXPECT_EQUAL(__float2uint_rn(row.x), row.urn);
    EXPECT_EQUAL(__float2uint_rz(row.x), row.urz);
    EXPECT_EQUAL(__float2uint_rd(row.x), row.urd);
    EXPECT_EQUAL(__float2uint_ru(row.x), row.uru);
  }
}

TEST(smaller_and_larger_numbers) {
  const float numbers[] = {-kInfinity, -1.0F, -0.0F, 0.0F, 1e-45F, kInfinity};  // in ascending order
  for (const float& a : numbers) {
    for (const float& b : numbers) {
      EXPECT_EQUAL(fminf(a, b), &a < &b ? a : b);
      EXPECT_EQUAL(fmaxf(a, b), &a < &b ? b : a);
      EXPECT_EQUAL(min(a, b), &a < &b ? a : b);
      EXPECT_EQUAL(max(a, b), &a < &b ? b : a);
    }
    EXPECT_EQUAL(fminf(a, kNan), a);
    EXPECT_EQUAL(fmaxf(kNan, a), a);
  }
  EXPECT_EQUAL(fmaxf(kNan, kNan), kNan);
  EXPECT_EQUAL(__saturatef(kNan), 0.0F);
  EXPECT_EQUAL(__saturatef(-0.0F), 0.0F);
  EXPECT_EQUAL(__saturatef(7.0F), 1.0F);
  EXPECT_EQUAL(min(-1, 1), -1);
  EXPECT_EQUAL(max(~0U, 1U), ~0U);
}

TEST(arithmetic_rounds_once) {
  const float a = 1 + 0x1p-12F;
  EXPECT_EQUAL(__fmaf_rn(a, a, -1.0F), 0x1p-11F + 0x1p-24F);
  EXPECT_EQUAL(__fsub_rn(__fmul_rn(a, a), 1.0F), 0x1p-11F);
  EXPECT_EQUAL(__fdiv_rn(1.0F, 3.0F), 0x1.555556p-2F);
  EXPECT_EQUAL(__frcp_rn(3.0F), 0x1.555556p-2F);
  EXPECT_EQUAL(__fsqrt_rn(2.0F), 0x1.6A09E6p+0F);
  EXPECT_EQUAL(__fadd_rn(1.0F, 0x1p-24F), 1.0F);
  EXPECT_EQUAL(__fmul_rn(0x1p-100F, 0x1p-49F), 0x1p-149F);  // denormals are kept
}

TEST(integers) {
  for (int round = 0; round < 1000; round++) {
    const unsigned a = random_bits() >> round % 33 % 32, b = random_bits(), shift = random_bits() % 70;
    int dot = static_cast<int>(b);
    unsigned unsigned_dot = b, reversed = 0;
    int ones = 0, leading = 32, first = 0;
    for (int i = 0; i < 4; i++) {
      dot = static_cast<int>(static_cast<unsigned>(dot) +
                             static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i));
      unsigned_dot += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    }
    for (int i = 31; i >= 0; i--) {
      if (!(a >> i & 1)) continue;
      ones++;
      leading = std::min(leading, 31 - i);
      first = i + 1;
      reversed += 1U << (31 - i);
    }
    EXPECT_EQUAL(__dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(b)), dot);
    EXPECT_EQUAL(__dp4a(a, b, b), unsigned_dot);
    EXPECT_EQUAL(__popc(a), ones);
    EXPECT_EQUAL(__clz(static_cast<int>(a)), leading);
    EXPECT_EQUAL(__ffs(static_cast<int>(a)), first);
    EXPECT_EQUAL(__brev(a), reversed);
    EXPECT_EQUAL(__umulhi(a, b), static_cast<unsigned>(uint64_t{a} * b / (1ULL << 32)));
    unsigned left = b, right = a, clamped_left = b, clamped_right = a;  // bit by bit
    for (unsigned i = 0, low = a, high = b; i < shift; i++, low <<= 1) {
      high = high << 1 | low >> 31;
      if (i < shift % 32) left = high;
      if (i < 32) clamped_left = high;
    }
    for (unsigned i = 0, low = a, high = b; i < shift; i++, high >>= 1) {
      low = low >> 1 | high << 31;
      if (i < shift % 32) right = low;
      if (i < 32) clamped_right = low;
    }
    EXPECT_EQUAL(__funnelshift_l(a, b, shift), left);
    EXPECT_EQUAL(__funnelshift_r(a, b, shift), right);
    EXPECT_EQUAL(__funnelshift_lc(a, b, shift), clamped_left);
    EXPECT_EQUAL(__funnelshift_rc(a, b, shift), clamped_right);
  }
  EXPECT_EQUAL(__clzll(1), 63);
  EXPECT_EQUAL(__clzll(0), 64);
  EXPECT_EQUAL(__popcll(~0ULL), 64);
  EXPECT_EQUAL(__ffsll(1LL << 40), 41);
  EXPECT_EQUAL(__mulhi(-1, 1), -1);
}

TEST(atomic_operations) {
  Totals y = {};
  y.falling = 3;
  constexpr int n = 100;
  LAUNCH(atomics, 1, n, 0, nullptr, &y);
  EXPECT_EQUAL(y.sum, n * (n - 1) / 2);
  EXPECT_EQUAL(y.difference, -n * (n - 1) / 2);
  EXPECT_EQUAL(y.low, 1 - n);
  EXPECT_EQUAL(y.high, n - 1);
  EXPECT_EQUAL(y.bits, (1 << 20) - 1);
  EXPECT_EQUAL(y.wrapping, 0U);  // 100 steps through 0 ... 9
  EXPECT_EQUAL(y.falling, 3U);
  EXPECT_EQUAL(y.real, 50.0F);
  EXPECT_EQUAL(y.wide, 100ULL << 32);
  EXPECT_EQUAL(y.last, 77);
}

TEST(mma_bfloat16) { check_multiply<cusim::Bfloat16>(bfloat16_bits); }
TEST(mma_float16) { check_multiply<cusim::Float16>(float16_bits); }

TEST(mma_int8) {
  auto a = array<int8_t>(16 * 32), b = array<int8_t>(8 * 32);
  auto c = array<int>(16 * 8);
  for (int i = 0; i < 16 * 32; i++) a[i] = static_cast<int8_t>(random_bits());
  for (int i = 0; i < 8 * 32; i++) b[i] = static_cast<int8_t>(random_bits());
  LAUNCH(multiply_int8, 1, 32, 0, nullptr, a.get(), b.get(), c.get());
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      int sum = 0;
      for (int k = 0; k < 32; k++) sum += a[row * 32 + k] * b[column * 32 + k];
      EXPECT_EQUAL(c[row * 8 + column], sum);
    }
  }
}
