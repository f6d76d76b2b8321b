// Products of up to kTensorRows rows of 16-bit activations with a 4-bit weight, on tensor cores.
//
// The weight is the left matrix, 16 output features high, and 8 rows of activations are the right one's columns. Codes
// become pairs of 16-bit floats in the very registers where the tensor cores want them: k may be counted in any order
// that both matrices agree on, so each lane takes codes that are neighbors in memory.
//
// Few instructions a weight matter more than few operations: even one row, which leaves 7 columns of 8 unused, goes
// this way, where the ordinary cores would take an instruction a weight and row. Two neighboring codes, a byte, become
// a pair by one look-up in a table of 256 pairs that every lane has to itself: no two lanes ever meet in a bank. That
// is a shift, a mask and a load, 1.5 instructions a weight, and 64 weights a cycle. (Permuting the bytes of a codebook
// in registers takes 11 instructions for four codes, 8 of them at half rate.)
//
// The memory of an H100 brings 26 weights a cycle and multiprocessor, which leaves 4.9 instructions for each. Up to 8
// rows the loop has about 7.5, counted in the machine code for sm_90: addresses, scales and choices between layouts are
// the rest. Not measured on a GPU yet. Two tiles of features for a warp, as for more rows, would halve that rest, at
// the price of fewer thread blocks.
//
// Scales multiply the sums of 32 products, in fp32: exact, and 2 multiplications for 8 rows and 32 weights. Only the
// codebook's entries are rounded to 16 bits.
#include "cuda/decode_4bit.h"
#include "cuda/grouping.h"
#include "cuda/mma.h"
#include "cuda/threads.h"

namespace bnbops::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kHeight = 16, kWidth = 8;  // of a tile: output features and rows
constexpr int kFragment = 4;             // sums of a tile that a lane has
constexpr int kReduced = 2;              // tiles that are added up over the warps at a time
// Weights of a feature that a warp takes at a time. Each half has one scale.
constexpr int kHalf = 32, kSegment = 2 * kHalf;

// The table has the codebook times 9/8: FP4's entries are then exact (twelfths become powers of two times 3), and NF4's
// round, in the mean, by 0.7 (bfloat16) or 0.5 (float16) of what rounding each weight would.
constexpr float kEntryFactor = 1.125F;

struct Pairs {
  alignas(uint4) uint32_t of_byte[256][kWarp];
};

template <DType kDType>
BNBOPS_DEVICE void make_pairs(QuantType type, Pairs& pairs) {
  const float* entry = kCodebooks4bit[static_cast<int>(type)].value;
  constexpr int kVectors = kWarp / 4;
#pragma unroll 2
  for (int i = threadIdx.x; i < 256 * kVectors; i += kThreads) {
    const int byte = i / kVectors;
    const uint32_t pair = pack_halves(kDType, entry[byte >> 4] * kEntryFactor, entry[byte & 15] * kEntryFactor);
    store_vector(&pairs.of_byte[byte][i % kVectors * 4], make_uint4(pair, pair, pair, pair));
  }
}

// How a lane's eight weights of each half lie. Where a segment has one scale, a lane's halves are neighbors: it loads
// them together.
struct Layout {
  bool whole;      // segments of one scale
  int lane, half;  // steps along k
};

BNBOPS_DEVICE Layout layout_of(const Linear4bitJob& job) {
  const bool whole =
      job.in_features % kSegment == 0 && job.weight.blocksize >= kSegment && is_aligned<uint2>(job.weight.codes);
  return whole ? Layout{true, kSegment / 4, kHalf / 4} : Layout{false, kHalf / 4, kHalf};
}

// Warps take turns over the segments of k. A lane is number g in a column of eight, and number t in a row of four.
template <DType kDType, int kTiles>
class Product {
 public:
  // Up to 8 rows, two blocks share a multiprocessor. For more, features share the activations that were read, and
  // their sums take the registers of two blocks.
  static constexpr int kHeights = kTiles == 1 ? 1 : 2, kResident = kTiles == 1 ? 2 : 1;
  static constexpr int kAhead = 2;  // segments on their way from memory
  static constexpr int kFeatures = kHeights * kHeight, kRows = kTiles * kWidth;
  using Sums = float[kHeights][kTiles][kFragment];

  BNBOPS_DEVICE Product(const Linear4bitJob& job, const Part& part, const Pairs& pairs)
      : job_(job),
        layout_(layout_of(job)),
        pairs_(pairs),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        g_(lane_ / 4),
        lane_k_(lane_ % 4 * layout_.lane),
        features_(static_cast<int>(job.in_features)),
        segments_((features_ + kSegment - 1) / kSegment) {
    const int64_t first = part.expert * job.out_features + part.column, rest = job.out_features - part.column;
    const int last = rest < kFeatures ? static_cast<int>(rest) - 1 : kFeatures - 1;  // others are not stored
    const auto feature = [&](int i) { return (i < last ? i : last) * features_; };
    codes_ = job.weight.codes + first * job.in_features / 2;
#pragma unroll
    for (int m = 0; m < kHeights; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) lane_codes_[m][r] = (feature(m * kHeight + r * 8 + g_) + lane_k_) / 2;
    }
    first_scaled_ = first * job.in_features + feature(lane_ % kFeatures);
  }

  // This warp's part of the sums, times kEntryFactor, for rows [row, row + rows). `when_ready` runs before the table is
  // used, while the first weights are on their way.
  template <class WhenReady>
  BNBOPS_DEVICE void multiply(int64_t row, int rows, Sums& sum, const WhenReady& when_ready) const {
    Segment ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(warp_ + i * kWarps, ahead[i]);
    when_ready();
    const uint16_t* x = static_cast<const uint16_t*>(job_.x) + row * features_;
    for (int first = warp_; first < segments_; first += kAhead * kWarps) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int segment = first + i * kWarps;
        if (segment >= segments_) break;
        const Segment now = ahead[i];
        load(segment + kAhead * kWarps, ahead[i]);
        multiply_segment(segment, now, x, rows, sum);
      }
    }
  }

 private:
  struct Segment {
    uint32_t codes[kHeights][2][2];  // of features g and g + 8, of both halves: eight each
    StoredScale scale[2];            // of feature number `lane`, of both halves
  };

  BNBOPS_DEVICE bool has_half(int segment, int half) const { return segment * kSegment + half * kHalf < features_; }

  BNBOPS_DEVICE void load(int segment, Segment& to) const {
    if (segment >= segments_) return;
    const int k = segment * kSegment;
    const bool both = has_half(segment, 1);
#pragma unroll
    for (int m = 0; m < kHeights; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint8_t* from = codes_ + (lane_codes_[m][r] + k / 2);
        uint32_t (&codes)[2] = to.codes[m][r];
        if (layout_.whole) {
          const auto two = load_vector<uint2>(from);
          codes[0] = two.x, codes[1] = two.y;
        } else {
          codes[0] = load_vector<uint32_t>(from);
          codes[1] = both ? load_vector<uint32_t>(from + kHalf / 2) : 0;
        }
      }
    }
    const int64_t first = first_scaled_ + k;
    to.scale[0] = to.scale[1] = load_scale(job_.weight, block_of(job_.weight, first));
    if (!layout_.whole && both) to.scale[1] = load_scale(job_.weight, block_of(job_.weight, first + kHalf));
  }

  BNBOPS_DEVICE void multiply_segment(int segment, const Segment& weights, const uint16_t* x, int rows,
                                      Sums& sum) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has_half(segment, half)) break;
      const float own_scale = scale_of(job_.weight, weights.scale[half]);
      uint32_t pair[kHeights][4][2];  // along k; of features g and g + 8
      float scale[kHeights][2];
#pragma unroll
      for (int m = 0; m < kHeights; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[m][r] = __shfl_sync(kAllLanes, own_scale, m * kHeight + r * 8 + g_);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            pair[m][i][r] = pairs_.of_byte[weights.codes[m][r][half] >> (8 * i) & 255U][lane_];
        }
      }
      const int k = segment * kSegment + lane_k_ + half * layout_.half;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n * kWidth >= rows) break;
        const int number = n * kWidth + g_;  // rows beyond the last are computed as it is, and not stored
        const auto right = load_vector<uint4>(x + ((number < rows ? number : rows - 1) * features_ + k));
#pragma unroll
        for (int m = 0; m < kHeights; ++m) {
          float dot[kFragment] = {};
          multiply_add_tiles<kDType>(dot, {pair[m][0][0], pair[m][0][1], pair[m][1][0], pair[m][1][1]},
                                     {right.x, right.y});
          multiply_add_tiles<kDType>(dot, {pair[m][2][0], pair[m][2][1], pair[m][3][0], pair[m][3][1]},
                                     {right.z, right.w});
#pragma unroll
          for (int i = 0; i < kFragment; ++i) {
            sum[m][n][i] = fused_multiply_add(dot[i], scale[m][i / 2], sum[m][n][i]);
          }
        }
      }
    }
  }

  const Linear4bitJob& job_;
  const Layout layout_;
  const Pairs& pairs_;
  const int warp_, lane_, g_, lane_k_;
  const int features_, segments_;
  const uint8_t* codes_;         // of the part's first feature
  int lane_codes_[kHeights][2];  // where, from there on, this lane's codes of its features begin
  int64_t first_scaled_;         // the first weight of the feature whose scales this lane loads
};

struct Partial {
  float of_warp[kReduced][kWarps][kFragment * kWarp];
};

// Adds up the warps' sums, in the order of the warps, and writes the results.
template <int kHeights, int kTiles>
BNBOPS_DEVICE void reduce_and_store(const Linear4bitJob& job, const Part& part, int64_t row, int rows,
                                    const float (&sum)[kHeights][kTiles][kFragment], Partial& partial) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int first = 0; first < kHeights * kTiles; first += kReduced) {
    __syncthreads();  // the last sums have been read
#pragma unroll
    for (int i = 0; i < kReduced; ++i) {
      const int tile = first + i;
      if (tile >= kHeights * kTiles) break;
#pragma unroll
      for (int j = 0; j < kFragment; ++j) {
        partial.of_warp[i][warp][j * kWarp + lane] = sum[tile / kTiles][tile % kTiles][j];
      }
    }
    __syncthreads();
    const int tile = first + threadIdx.x / (kFragment * kWarp), element = threadIdx.x % (kFragment * kWarp);
    static_assert(kThreads == kReduced * kFragment * kWarp, "a thread for each element");
    const int j = element / kWarp, r = tile % kTiles * kWidth + lane % 4 * 2 + j % 2;
    const int64_t feature = part.column + tile / kTiles * kHeight + j / 2 * 8 + lane / 4;
    if (tile >= kHeights * kTiles || r >= rows || feature >= job.out_features) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial.of_warp[tile - first][w][element];
    total *= 1 / kEntryFactor;
    if (job.bias != nullptr) total += load_element(job.bias, job.dtype, part.expert * job.out_features + feature);
    store_element(job.out, job.dtype, (row + r) * job.out_features + feature, total);
  }
}

template <DType kDType, int kTiles>
__global__ void __launch_bounds__(kThreads, Product<kDType, kTiles>::kResident) tensor_core_kernel(Linear4bitJob job) {
  using Product = Product<kDType, kTiles>;
  __shared__ Pairs pairs;
  __shared__ Partial partial;
  const Part part = part_of_block<Product::kFeatures>(job.grouping, job.out_features);
  if (!part.has_expert) return write_zeros<Product::kFeatures>(part, job.out, job.dtype, job.out_features);
  const Product product(job, part, pairs);
  bool has_pairs = false;
  for (int64_t row = part.row_begin; row < part.row_end; row += Product::kRows) {
    const int rows = part.row_end - row < Product::kRows ? static_cast<int>(part.row_end - row) : Product::kRows;
    typename Product::Sums sum = {};
    product.multiply(row, rows, sum, [&] {
      if (has_pairs) return;
      make_pairs<kDType>(job.weight.quant_type, pairs);
      __syncthreads();
      has_pairs = true;
    });
    reduce_and_store(job, part, row, rows, sum, partial);
  }
}

template <DType kDType, int kTiles>
void launch(const Linear4bitJob& job, cudaStream_t stream) {
  const dim3 grid = grid_of_parts<Product<kDType, kTiles>::kFeatures>(job.grouping, job.out_features);
  LAUNCH((tensor_core_kernel<kDType, kTiles>), grid, dim3(kThreads), 0, stream, job);
}

// As many tiles of rows as an expert has in the mean, since nobody knows more here.
template <DType kDType>
void launch_for_rows(const Linear4bitJob& job, cudaStream_t stream) {
  const int64_t rows = divide_up(job.grouping.rows, job.grouping.experts);
  if (rows <= kWidth) return launch<kDType, 1>(job, stream);
  if (rows <= 2 * kWidth) return launch<kDType, 2>(job, stream);
  if (rows <= 4 * kWidth) return launch<kDType, 4>(job, stream);
  launch<kDType, kTensorRows / kWidth>(job, stream);
}

}  // namespace

bool takes_tensor_cores(const Linear4bitJob& job) {
  const bool aligned = reinterpret_cast<uintptr_t>(job.weight.codes) % sizeof(uint32_t) == 0;
  // The kernel counts the elements of a part with 32 bits.
  return job.dtype != DType::kFloat32 && job.in_features % kHalf == 0 && job.in_features < (1 << 24) && aligned;
}

cudaError_t linear_4bit_tensor_cores(const Linear4bitJob& job, cudaStream_t stream) {
  if (job.grouping.rows == 0 || job.out_features == 0) return cudaSuccess;
  job.dtype == DType::kBFloat16 ? launch_for_rows<DType::kBFloat16>(job, stream)
                                : launch_for_rows<DType::kFloat16>(job, stream);
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
