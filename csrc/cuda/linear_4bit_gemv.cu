// Products of a few rows with a 4-bit weight, on the ordinary cores: for fp32, and for what tensor cores cannot take.
//
// The weight's bytes should bound it: a weight is 4 bits and a 64th of an fp32 scale, 0.5625 bytes, of which a
// multiprocessor gets 13.4 bytes a cycle at most on an A100 and 13.9 on an H100, 24 and 25 weights, while it issues 128
// instructions for a lane. Neighboring codes, a byte, are one look-up in a table of 256 pairs: half of 3 instructions,
// and one to multiply and add for each row. Addresses, scales and activations of one row double that, in the machine
// code for sm_90, which is about what the memory leaves time for. Shared memory serves 32 weights a cycle. Not measured
// on a GPU yet.
//
// A thread block has some output features. Its threads go along the rows of the weight together, eight codes each, so
// that a warp reads 128 bytes of each feature, and every x that is read serves all features.
#include "cuda/decode_4bit.h"
#include "cuda/grouping.h"
#include "cuda/threads.h"

namespace bnbops::cuda {
namespace {

constexpr int kFeatures = 4, kRows = kGemvRows;
constexpr int kGemvResident = 2;
using Sums = float[kFeatures][kRows];
constexpr int kStep = kThreads * kOctet;  // from a thread's octet to its next one

// Of each feature, with the scale that multiplies them.
struct Octets {
  float weight[kFeatures][kOctet], scale[kFeatures];
  int64_t count;  // weights in the row from there on; others are 0
};

BNBOPS_DEVICE int64_t feature_of(const Linear4bitJob& job, const Part& part, int f) {  // others are not stored
  const int64_t last = job.out_features - 1;
  return part.expert * job.out_features + (part.column + f < last ? part.column + f : last);
}

// A part of the weight whose octets are words of codes with one scale. Two codes are looked up at a time, and the words
// of the next step are on their way from memory.
class WholeOctets {
 public:
  using Index = int;
  using Table = PairTable<2>;
  static BNBOPS_DEVICE void fill(Table& table, int format) {
    const Pair4bit pair = pair_of_byte(format, threadIdx.x);
    table.fill({{bits_of(pair.first), bits_of(pair.second)}});
  }

  BNBOPS_DEVICE WholeOctets(const Linear4bitJob& job, const Part& part, const Table& table)
      : features_(static_cast<int>(job.in_features)),
        table_(table.own()),
        codes_(job.weight.codes + feature_of(job, part, 0) * features_ / 2),
        scales_(job.weight, feature_of(job, part, 0) * features_) {
    const int64_t first = feature_of(job, part, 0);
    unrolled<kFeatures>(
        [&](int f) { first_[f] = static_cast<unsigned>(feature_of(job, part, f) - first) * features_; });
  }

  BNBOPS_DEVICE void begin(int k) { load(k); }

  // Those from k on.
  BNBOPS_DEVICE void next(int k, Octets& octets) {
    uint32_t codes[kFeatures];
    unsigned first[kFeatures];
    unrolled<kFeatures>([&](int f) {
      codes[f] = ahead_[f];
      first[f] = first_[f] + k;
    });
    octets.count = kOctet;
    scales_.load(first, octets.scale);
    load(k + kStep);
    unrolled<kFeatures>([&](int f) {
      unrolled<kOctet / 2>([&](int i) {
        const Words<2> pair = Table::look_up(table_, codes[f], i);
        octets.weight[f][2 * i] = float_from_bits(pair.word[0]);
        octets.weight[f][2 * i + 1] = float_from_bits(pair.word[1]);
      });
    });
  }

 private:
  BNBOPS_DEVICE void load(int k) {
    if (k >= features_) return;
    unrolled<kFeatures>([&](int f) { ahead_[f] = load_vector<uint32_t>(codes_ + (first_[f] + k) / 2); });
  }

  const int features_;
  const char* const table_;
  const uint8_t* const codes_;
  const ScaleReader scales_;
  unsigned first_[kFeatures];  // elements, from the part's first one on
  uint32_t ahead_[kFeatures];
};

// A part of any weight: an octet may begin within a byte, and end in another block or at the end of its row.
template <Nibbles kNibbles>
class AnyOctets {
 public:
  using Index = int64_t;
  using Table = Codebook4bit;
  static BNBOPS_DEVICE void fill(Table& table, int format) { copy_codebook(format, table); }

  BNBOPS_DEVICE AnyOctets(const Linear4bitJob& job, const Part& part, const Table& table)
      : job_(job), part_(part), table_(table) {}

  BNBOPS_DEVICE void begin(int64_t) {}

  BNBOPS_DEVICE void next(int64_t k, Octets& octets) {
    octets.count = job_.in_features - k;
    unrolled<kFeatures>([&](int f) {
      const int64_t first = feature_of(job_, part_, f) * job_.in_features + k;
      octets.scale[f] = load(first, octets.count, octets.weight[f]);
    });
  }

 private:
  // The scale that an octet shares, as a whole one does whatever its alignment: the same bits. Others are multiplied by
  // their scales here.
  BNBOPS_DEVICE float load(int64_t first, int64_t count, float (&w)[kOctet]) const {
    const Weight4bit& weight = job_.weight;
    if (first % kOctet == 0 && count >= kOctet) {
      decode_packed<kNibbles>(load_packed(weight.codes, first, count), table_, 1.0F, w);
      return scale_of_block(weight.scales, block_of(weight, first));
    }
    unrolled<kOctet>([&](int i) {
      const int64_t at = first + i;
      w[i] = i < count ? table_.value[code_4bit<kNibbles>(weight.codes[at / 2], at % 2)] *
                             scale_of_block(weight.scales, block_of(weight, at))
                       : 0.0F;
    });
    return 1.0F;
  }

  const Linear4bitJob& job_;
  const Part& part_;
  const Table& table_;
};

// A thread's part of the sums.
template <class Weights>
BNBOPS_DEVICE void multiply(const Linear4bitJob& job, Weights& weights, int64_t row, int rows, Sums& sum) {
  using Index = typename Weights::Index;
  const auto features = static_cast<Index>(job.in_features);
  for (Index k = threadIdx.x * kOctet; k < features; k += kStep) {
    Octets octets;
    weights.next(k, octets);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r > 0 && r >= rows) break;
      float x[kOctet];
      to_floats(load_octet(job.x, job.dtype, (row + r) * job.in_features + k, octets.count), job.dtype, x);
      unrolled<kFeatures>([&](int f) {
        float dot = octets.weight[f][0] * x[0];
#pragma unroll
        for (int i = 1; i < kOctet; ++i) dot = fused_multiply_add(octets.weight[f][i], x[i], dot);
        sum[f][r] = fused_multiply_add(dot, octets.scale[f], sum[f][r]);
      });
    }
  }
}

BNBOPS_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class Weights>
__global__ void __launch_bounds__(kThreads, kGemvResident) gemv_kernel(Linear4bitJob job) {
  __shared__ typename Weights::Table table;
  __shared__ Sums of_warp[kWarps];
  const Part part = part_of_block<kFeatures>(job.grouping, job.out_features);
  if (!part.has_expert) return write_zeros<kFeatures>(part, job.out, job.dtype, job.out_features);
  Weights weights(job, part, table);
  bool filled = false;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t row = part.row_begin; row < part.row_end; row += kRows) {
    const int rows = part.row_end - row < kRows ? static_cast<int>(part.row_end - row) : kRows;
    weights.begin(threadIdx.x * kOctet);
    if (!filled) Weights::fill(table, job.weight.format);
    filled = true;
    __syncthreads();  // the table is there, and the last sums have been read
    Sums sum = {};
    multiply(job, weights, row, rows, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      unrolled<kFeatures>([&](int f) {
        const float total = warp_sum(sum[f][r]);
        if (lane == 0) of_warp[warp][f][r] = total;
      });
    }
    __syncthreads();
    const int f = threadIdx.x % kFeatures, r = threadIdx.x / kFeatures;
    const int64_t feature = part.column + f;
    if (r >= rows || feature >= job.out_features) continue;
    float total = of_warp[0][f][r];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][f][r];  // in this order always
    if (job.bias != nullptr) total += load_element(job.bias, job.dtype, part.expert * job.out_features + feature);
    store_element(job.out, job.dtype, (row + r) * job.out_features + feature, total);
  }
}

}  // namespace

cudaError_t linear_4bit_gemv(const Linear4bitJob& job, cudaStream_t stream) {
  const dim3 grid = grid_of_parts<kFeatures>(job.grouping, job.out_features);
  const bool whole =
      job.in_features % kOctet == 0 && job.in_features < (1 << 24) && is_aligned<uint32_t>(job.weight.codes);
  if (whole) return launch(gemv_kernel<WholeOctets>, grid, stream, job);
  return with_nibbles_of(job.weight.format,
                         [&](auto nibbles) { return launch(gemv_kernel<AnyOctets<nibbles>>, grid, stream, job); });
}

}  // namespace bnbops::cuda
