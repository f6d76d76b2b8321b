// Products of up to kTensorRows rows of 16-bit activations with a 4-bit weight, on tensor cores.
//
// The weight is the left matrix, 16 output features high, and 8 rows of activations are the right one's columns. Codes
// become pairs of 16-bit floats in the very registers where the tensor cores want them: k may be counted in any order
// that both matrices agree on, so each lane takes codes that are neighbors in memory.
//
// Few instructions a weight matter more than few operations: even one row, which leaves 7 columns of 8 unused, goes
// this way, where the ordinary cores would take an instruction a weight and row. Two neighboring codes, a byte, become
// a pair by one look-up in a table of 256 pairs that every lane has to itself: no two lanes ever meet in a bank. That
// is 1.5 instructions a weight, and 64 weights a cycle. (Permuting the bytes of a codebook in registers takes 11
// instructions for four codes, 8 of them at half rate.)
//
// The memory of an H100 brings 25 weights a cycle and multiprocessor, which leaves 5 instructions for each. Up to 8
// rows the loop has about 3, counted in the machine code for sm_90. Not measured on a GPU yet.
//
// Scales multiply the sums of 64 products, in fp32: exact, and little work. Only the codebook's entries are rounded to
// 16 bits.
#include "cuda/decode_4bit.h"
#include "cuda/grouping.h"
#include "cuda/mma.h"

namespace bnbops::cuda {
namespace {

constexpr int kHeight = 16, kWidth = 8;  // of a tile: output features and rows
constexpr int kFragment = 4;             // sums of a tile that a lane has
constexpr int kReduced = 2;              // tiles that are added up over the warps at a time
// Weights of a feature that a warp takes at a time, with one scale: long segments where the weight allows it.
constexpr int kShort = 32, kLong = 64;

// The table has the codebook times 9/8: FP4's entries are then exact (twelfths become powers of two times 3), and NF4's
// round, in the mean, by 0.7 (bfloat16) or 0.5 (float16) of what rounding each weight would.
constexpr float kEntryFactor = 1.125F;

template <DType kDType>
BNBOPS_DEVICE void fill(PairTable<1>& pairs, int format) {
  const Pair4bit pair = pair_of_byte(format, threadIdx.x);
  pairs.fill({{pack_halves(kDType, pair.first * kEntryFactor, pair.second * kEntryFactor)}});
}

// Warps take turns over the segments of k. A lane is number g in a column of eight, and number t in a row of four.
template <DType kDType, int kSegment, int kHeights, int kTiles>
class Product {
 public:
  static constexpr int kFeatures = kHeights * kHeight, kColumns = kFeatures / 8, kRows = kTiles * kWidth;
  static constexpr int kResident = kTiles == 1 ? 2 : 1;
  static constexpr int kAhead = kHeights == 1 ? 4 : 2;  // segments on their way from memory
  using Sums = float[kHeights][kTiles][kFragment];

  BNBOPS_DEVICE Product(const Linear4bitJob& job, const Part& part, const PairTable<1>& pairs)
      : job_(job),
        pairs_(pairs.own()),
        scales_(job.weight, first_of(job, part)),
        codes_(job.weight.codes + first_of(job, part) / 2),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        g_(lane_ / 4),
        features_(static_cast<int>(job.in_features)) {
    const int64_t rest = job.out_features - part.column;
    last_ = rest < kFeatures ? static_cast<int>(rest) - 1 : kFeatures - 1;
    scaled_ = feature(lane_ % kFeatures);
  }

  // This warp's part of the sums, times kEntryFactor, for rows [row, row + rows). `when_ready` runs before the table is
  // used, while the first weights are on their way.
  template <class WhenReady>
  BNBOPS_DEVICE void multiply(int64_t row, int rows, Sums& sum, const WhenReady& when_ready) const {
    Position at = begin(row, rows);
    Segment ahead[kAhead];
    unrolled<kAhead>([&](int i) { load(at, i, ahead[i]); });
    when_ready();
    for (; at.k < features_; advance(at)) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at.k + i * kStep >= features_) break;
        multiply_segment(ahead[i], at, i, rows, sum);
        load(at, i + kAhead, ahead[i]);
      }
    }
  }

 private:
  static constexpr int kLaneWeights = kSegment / 4;  // of a feature, side by side
  static constexpr int kWords = kLaneWeights / kOctet;
  static constexpr int kStep = kWarps * kSegment;  // from a segment of a warp to the next one

  // Pointers that move, so that no address is computed anew.
  struct Position {
    const uint8_t* codes[kColumns];  // this lane's, of every eighth feature, from number g on
    const uint16_t* x[kTiles];       // this lane's, of every eighth row, from number g on
    int k;                           // of the warp's segment
  };

  struct Segment {
    Words<kWords> codes[kColumns];
    StoredScale scale;  // of feature number `lane`
  };

  static BNBOPS_DEVICE int64_t first_of(const Linear4bitJob& job, const Part& part) {
    return (part.expert * job.out_features + part.column) * job.in_features;
  }
  BNBOPS_DEVICE int feature(int i) const { return (i < last_ ? i : last_) * features_; }

  BNBOPS_DEVICE Position begin(int64_t row, int rows) const {
    Position at;
    at.k = warp_ * kSegment;
    const int own = at.k + lane_ % 4 * kLaneWeights;
    unrolled<kColumns>([&](int i) { at.codes[i] = codes_ + (feature(i * 8 + g_) + own) / 2; });
    const uint16_t* x = static_cast<const uint16_t*>(job_.x) + row * features_;
    unrolled<kTiles>([&](int n) {
      const int number = n * kWidth + g_;  // rows beyond the last are computed as it is, and not stored
      at.x[n] = x + ((number < rows ? number : rows - 1) * features_ + own);
    });
    return at;
  }

  static BNBOPS_DEVICE void advance(Position& at) {
    at.k += kAhead * kStep;
    unrolled<kColumns>([&](int i) { at.codes[i] += kAhead * kStep / 2; });
    unrolled<kTiles>([&](int n) { at.x[n] += kAhead * kStep; });
  }

  BNBOPS_DEVICE void load(const Position& at, int ahead, Segment& to) const {
    const int k = at.k + ahead * kStep;
    if (k >= features_) return;
    unrolled<kColumns>([&](int i) { to.codes[i] = load_vector<Words<kWords>>(at.codes[i] + ahead * (kStep / 2)); });
    to.scale = scales_.load(scaled_ + k);
  }

  BNBOPS_DEVICE void multiply_segment(const Segment& weights, const Position& at, int ahead, int rows,
                                      Sums& sum) const {
    uint32_t pair[kHeights][kWords * 4][2];  // along k; of features g and g + 8
    float scale[kHeights][2];
    const float own_scale = scale_of(job_.weight.scales, weights.scale);
    unrolled<kColumns>([&](int i) {
      scale[i / 2][i % 2] = __shfl_sync(kAllLanes, own_scale, i * 8 + g_);
      unrolled<kWords * 4>([&](int j) {
        pair[i / 2][j][i % 2] = PairTable<1>::look_up(pairs_, weights.codes[i].word[j / 4], j % 4).word[0];
      });
    });
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n > 0 && n * kWidth >= rows) break;
      float dot[kHeights][kFragment] = {};
#pragma unroll
      for (int j = 0; j < kWords * 4; j += 4) {
        const auto right = load_vector<uint4>(at.x[n] + (ahead * kStep + 2 * j));
        unrolled<kHeights>([&](int m) {
          const uint32_t (&left)[kWords * 4][2] = pair[m];
          multiply_add_tiles<kDType>(dot[m], {left[j][0], left[j][1], left[j + 1][0], left[j + 1][1]},
                                     {right.x, right.y});
          multiply_add_tiles<kDType>(dot[m], {left[j + 2][0], left[j + 2][1], left[j + 3][0], left[j + 3][1]},
                                     {right.z, right.w});
        });
      }
      unrolled<kHeights * kFragment>([&](int j) {
        const int m = j / kFragment, i = j % kFragment;
        sum[m][n][i] = fused_multiply_add(dot[m][i], scale[m][i / 2], sum[m][n][i]);
      });
    }
  }

  const Linear4bitJob& job_;
  const char* const pairs_;
  const ScaleReader scales_;
  const uint8_t* const codes_;
  const int warp_, lane_, g_, features_;
  int last_;    // feature: others are computed as it is, and not stored
  int scaled_;  // the feature whose scales this lane loads
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
      unrolled<kFragment>(
          [&](int j) { partial.of_warp[i][warp][j * kWarp + lane] = sum[tile / kTiles][tile % kTiles][j]; });
    }
    __syncthreads();
    const int tile = first + threadIdx.x / (kFragment * kWarp), element = threadIdx.x % (kFragment * kWarp);
    static_assert(kThreads == kReduced * kFragment * kWarp, "a thread for each element");
    const int j = element / kWarp, r = tile % kTiles * kWidth + lane % 4 * 2 + j % 2;
    const int64_t feature = part.column + tile / kTiles * kHeight + j / 2 * 8 + lane / 4;
    if (tile >= kHeights * kTiles || r >= rows || feature >= job.out_features) continue;
    float total = 0;
    unrolled<kWarps>([&](int w) { total += partial.of_warp[tile - first][w][element]; });
    total *= 1 / kEntryFactor;
    if (job.bias != nullptr) total += load_element(job.bias, job.dtype, part.expert * job.out_features + feature);
    store_element(job.out, job.dtype, (row + r) * job.out_features + feature, total);
  }
}

template <DType kDType, int kSegment, int kHeights, int kTiles>
__global__ void __launch_bounds__(kThreads, Product<kDType, kSegment, kHeights, kTiles>::kResident)
    tensor_core_kernel(Linear4bitJob job) {
  using Product = Product<kDType, kSegment, kHeights, kTiles>;
  __shared__ PairTable<1> pairs;
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
      fill<kDType>(pairs, job.weight.format);
      __syncthreads();
      has_pairs = true;
    });
    reduce_and_store(job, part, row, rows, sum, partial);
  }
}

template <DType kDType, int kSegment, int kHeights, int kTiles>
cudaError_t launch_tiles(const Linear4bitJob& job, cudaStream_t stream) {
  constexpr int kFeatures = Product<kDType, kSegment, kHeights, kTiles>::kFeatures;
  const dim3 grid = grid_of_parts<kFeatures>(job.grouping, job.out_features);
  return launch(tensor_core_kernel<kDType, kSegment, kHeights, kTiles>, grid, stream, job);
}

bool has_long_segments(const Linear4bitJob& job) {
  return job.in_features % kLong == 0 && job.weight.blocksize >= kLong && is_aligned<Words<2>>(job.weight.codes);
}

// As many tiles of rows as an expert has in the mean, since nobody knows more here.
template <DType kDType>
cudaError_t launch_for_rows(const Linear4bitJob& job, cudaStream_t stream) {
  const int64_t rows = divide_up(job.grouping.rows, job.grouping.experts);
  constexpr int kMost = kTensorRows / kWidth;
  if (!has_long_segments(job)) return launch_tiles<kDType, kShort, 2, kMost>(job, stream);
  if (rows <= kWidth) {
    // Two tiles of features share the activations that were read, but make half as many thread blocks: of these there
    // must be as many as the device can run at a time.
    using Wide = Product<kDType, kLong, 2, 1>;
    const int64_t most = int64_t{Wide::kResident * Wide::kFeatures} * multiprocessors();
    const bool wide = job.grouping.experts * job.out_features >= most;
    return wide ? launch_tiles<kDType, kLong, 2, 1>(job, stream) : launch_tiles<kDType, kLong, 1, 1>(job, stream);
  }
  if (rows <= 2 * kWidth) return launch_tiles<kDType, kLong, 2, 2>(job, stream);
  if (rows <= 4 * kWidth) return launch_tiles<kDType, kLong, 2, 4>(job, stream);
  return launch_tiles<kDType, kLong, 2, kMost>(job, stream);
}

}  // namespace

bool takes_tensor_cores(const Linear4bitJob& job) {
  // The kernel counts the elements of a part with 32 bits.
  return job.dtype != DType::kFloat32 && job.in_features % kShort == 0 && job.in_features < (1 << 24) &&
         is_aligned<uint32_t>(job.weight.codes) && job.weight.blocksize >= kShort;
}

cudaError_t linear_4bit_tensor_cores(const Linear4bitJob& job, cudaStream_t stream) {
  return job.dtype == DType::kBFloat16 ? launch_for_rows<DType::kBFloat16>(job, stream)
                                       : launch_for_rows<DType::kFloat16>(job, stream);
}

}  // namespace bnbops::cuda
