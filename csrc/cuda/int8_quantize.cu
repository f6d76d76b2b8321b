// Int8 codes of rows and columns, and back.
#include "cuda/blocks.h"
#include "cuda/kernels.h"
#include "formats/int8.h"

namespace bnbops::cuda {
namespace {

// ---- rows: blocks as long as a row -----------------------------------------------------------------------------

struct RowsAsBlocks {
  int64_t numel, blocksize;
};

// What launch(group, grid) gives for the number of threads for a row: a warp or, for a long one, the thread block.
template <class Launch>
cudaError_t with_row_groups(int64_t rows, int64_t width, const Launch& launch) {
  if (width > 4 * kWarp * kOctet) return launch(std::integral_constant<int, kThreads>{}, grid_of(rows));
  return launch(std::integral_constant<int, kWarp>{}, grid_of(divide_up(rows, kWarps)));
}

// Calls visit(x, from) for a thread's octets of a block, `from` elements into its share, two of them loaded at a time.
template <int kGroup, class Visit>
BNBOPS_DEVICE void for_octets(const void* values, DType dtype, const Share<kGroup>& share, const Visit& visit) {
  constexpr int kStride = Share<kGroup>::kStride;
  for (auto from = 0 * share.count; from < share.count; from += 2 * kStride) {
    const int64_t at = share.at + from;
    const Octet octets[2] = {load_octet(values, dtype, at, share.count - from),
                             load_octet(values, dtype, at + kStride, share.count - from - kStride)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x[kOctet];
      to_floats(octets[i], dtype, x);
      if (from + i * kStride < share.count) visit(x, from + i * kStride);
    }
  }
}

// Without a threshold, in one pass.
template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) quantize_rows_kernel(QuantizeJob job, uint32_t limit) {
  quantize_blocks<kGroup, true>(job, [&](const float (&x)[kOctet], float inverse, int64_t at, int64_t count) {
    const float factor = code_factor(inverse);
    uint32_t code[kOctet];
    unrolled<kOctet>([&](int i) { code[i] = int8_code(x[i], factor, limit); });
    store_codes(job.codes + at, count, pack_codes(code));
  });
}

// With one, all rows must be seen before the codes of the first: row_stats and is_outlier ...
template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) scan_rows_kernel(Int8QuantJob job) {
  __shared__ uint32_t scratch[kWarps];
  for_blocks<kGroup>(RowsAsBlocks{job.rows * job.inner, job.inner}, [&](const Share<kGroup>& share) {
    uint32_t largest = 0;
    for_octets(job.values, job.dtype, share, [&](const float (&x)[kOctet], auto from) {
      unrolled<kOctet>([&](int i) {
        const uint32_t bits = counted_bits(x[i], job.limit);
        largest = bits > largest ? bits : largest;
        if (is_outlier(x[i], job.limit)) set_flag(job.is_outlier + share.lane * kOctet + from + i);
      });
    });
    largest = group_max<kGroup>(largest, scratch);
    if (share.lane == 0 && share.count > 0) job.row_stats[share.block] = float_from_bits(largest);
  });
}

// ... and then codes.
template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) encode_rows_kernel(Int8QuantJob job) {
  for_blocks<kGroup>(RowsAsBlocks{job.rows * job.inner, job.inner}, [&](const Share<kGroup>& share) {
    const float factor = share.count > 0 ? code_factor(inverse_scale(job.row_stats[share.block])) : 0.0F;
    for_octets(job.values, job.dtype, share, [&](const float (&x)[kOctet], auto from) {
      const auto* marks = reinterpret_cast<const uint8_t*>(job.is_outlier) + share.lane * kOctet + from;
      const uint2 marked = load_codes(marks, share.count - from);
      uint32_t code[kOctet];
      unrolled<kOctet>([&](int i) { code[i] = code_of(marked, i) != 0 ? 0 : int8_code(x[i], factor, job.limit); });
      store_codes(reinterpret_cast<uint8_t*>(job.codes) + share.at + from, share.count - from, pack_codes(code));
    });
  });
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) dequantize_rows_kernel(Int8DequantJob job) {
  for_blocks<kGroup>(RowsAsBlocks{job.rows * job.width, job.width}, [&](const Share<kGroup>& share) {
    const float scale = share.count > 0 ? decodable(job.stats[share.block]) : 0.0F;
    const auto* row = reinterpret_cast<const uint8_t*>(job.codes) + share.block * job.inner + job.begin;
    for (auto from = 0 * share.count; from < share.count; from += share.kStride) {
      const uint2 codes = load_codes(row + share.lane * kOctet + from, share.count - from);
      float x[kOctet];
      unrolled<kOctet>([&](int i) { x[i] = int8_value(static_cast<int8_t>(code_of(codes, i)), scale); });
      store_octet(job.values, job.dtype, share.at + from, share.count - from, x);
    }
  });
}

// ---- columns ---------------------------------------------------------------------------------------------------

// A thread has eight columns and, of a part of so many rows, every eighth.
constexpr int64_t kPartColumns = kWarp * kOctet, kPartRows = 128;
static_assert(kPartColumns == kThreads, "one thread for each column");

BNBOPS_DEVICE int64_t first_column(const Int8QuantJob& job) {
  return blockIdx.x % divide_up(job.inner, kPartColumns) * kPartColumns;
}

// Calls visit(x, at, count) for this thread's octets.
template <class Visit>
BNBOPS_DEVICE void for_rows(const Int8QuantJob& job, int64_t column, const Visit& visit) {
  if (column >= job.inner) return;
  const int64_t begin = blockIdx.x / divide_up(job.inner, kPartColumns) * kPartRows;
  const int64_t end = begin + kPartRows < job.rows ? begin + kPartRows : job.rows;
#pragma unroll 2
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kThreads / kWarp) {
    const int64_t at = row * job.inner + column, count = job.inner - column;
    float x[kOctet];
    to_floats(load_octet(job.values, job.dtype, at, count), job.dtype, x);
    visit(x, at, count);
  }
}

// col_stats, which are zeros beforehand, by their bits.
__global__ void __launch_bounds__(kThreads, kResident) scan_columns_kernel(Int8QuantJob job) {
  __shared__ uint32_t largest[kPartColumns];
  const int64_t first = first_column(job);
  const int lane_column = threadIdx.x % kWarp * kOctet;
  uint32_t mine[kOctet] = {};
  for_rows(job, first + lane_column, [&](const float (&x)[kOctet], int64_t /*at*/, int64_t /*count*/) {
    unrolled<kOctet>([&](int i) {
      const uint32_t bits = counted_bits(x[i], job.limit);
      mine[i] = bits > mine[i] ? bits : mine[i];
    });
  });
  largest[threadIdx.x] = 0;
  __syncthreads();
  unrolled<kOctet>([&](int i) { atomicMax(largest + lane_column + i, mine[i]); });
  __syncthreads();
  const int64_t column = first + threadIdx.x;
  if (column < job.inner) atomicMax(reinterpret_cast<uint32_t*>(job.col_stats) + column, largest[threadIdx.x]);
}

__global__ void __launch_bounds__(kThreads, kResident) encode_columns_kernel(Int8QuantJob job) {
  const int64_t column = first_column(job) + threadIdx.x % kWarp * kOctet;
  float factor[kOctet];
  to_floats(load_octet(job.col_stats, DType::kFloat32, column, job.inner - column), DType::kFloat32, factor);
  unrolled<kOctet>([&](int i) { factor[i] = code_factor(inverse_scale(factor[i])); });
  for_rows(job, column, [&](const float (&x)[kOctet], int64_t at, int64_t count) {
    uint32_t code[kOctet];
    unrolled<kOctet>([&](int i) { code[i] = int8_code(x[i], factor[i], job.limit); });
    store_codes(reinterpret_cast<uint8_t*>(job.codes) + at, count, pack_codes(code));
  });
}

// ---- the list of outlier columns -------------------------------------------------------------------------------

constexpr int kListThreads = 1024;

// One thread block. Each thread has eight columns at a time.
__global__ void __launch_bounds__(kListThreads, 1)
    list_outliers_kernel(const bool* is_outlier, int64_t inner, int32_t* columns, int32_t* count) {
  __shared__ int32_t in_warp[kListThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t listed = 0;
  for (int64_t first = 0; first < inner; first += kListThreads * kOctet) {
    const int64_t column = first + threadIdx.x * kOctet;
    const uint2 marked = load_codes(reinterpret_cast<const uint8_t*>(is_outlier) + column, inner - column);
    int32_t mine = 0;
    unrolled<kOctet>([&](int i) { mine += code_of(marked, i) != 0; });
    int32_t upto = mine;  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += before;
    }
    if (lane == kWarp - 1) in_warp[warp] = upto;
    __syncthreads();
    int32_t at = listed + upto - mine;
    for (int w = 0; w < kListThreads / kWarp; ++w) {
      if (w < warp) at += in_warp[w];
      listed += in_warp[w];
    }
    unrolled<kOctet>([&](int i) {
      if (code_of(marked, i) != 0) columns[at++] = static_cast<int32_t>(column) + i;
    });
    __syncthreads();  // before the next numbers
  }
  if (threadIdx.x == 0) *count = listed;
}

}  // namespace

cudaError_t quantize_rows(const Int8QuantJob& job, cudaStream_t stream) {
  if (job.rows == 0) return cudaSuccess;
  if (job.inner == 0) return cudaMemsetAsync(job.row_stats, 0, job.rows * sizeof(float), stream);
  auto* codes = reinterpret_cast<uint8_t*>(job.codes);
  const QuantizeJob blocks{job.values, job.dtype, nullptr, codes, job.row_stats, job.rows * job.inner, job.inner};
  return with_row_groups(job.rows, job.inner, [&](auto group, dim3 grid) {
    if (!job.has_threshold) return launch(quantize_rows_kernel<group>, grid, stream, blocks, job.limit);
    const cudaError_t error = launch(scan_rows_kernel<group>, grid, stream, job);
    return error == cudaSuccess ? launch(encode_rows_kernel<group>, grid, stream, job) : error;
  });
}

cudaError_t quantize_columns(const Int8QuantJob& job, cudaStream_t stream) {
  if (job.inner == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(divide_up(job.inner, kPartColumns) * divide_up(job.rows, kPartRows)));
  cudaError_t error = cudaMemsetAsync(job.col_stats, 0, job.inner * sizeof(float), stream);
  if (error == cudaSuccess) error = launch(scan_columns_kernel, grid, stream, job);
  return error == cudaSuccess ? launch(encode_columns_kernel, grid, stream, job) : error;
}

cudaError_t dequantize(const Int8DequantJob& job, cudaStream_t stream) {
  if (job.width == 0) return cudaSuccess;
  return with_row_groups(job.rows, job.width, [&](auto group, dim3 grid) {
    return launch(dequantize_rows_kernel<group>, grid, stream, job);
  });
}

cudaError_t list_outliers(const bool* is_outlier, int64_t inner, int32_t* columns, int32_t* count,
                          cudaStream_t stream) {
  LAUNCH(list_outliers_kernel, dim3(1), dim3(kListThreads), 0, stream, is_outlier, inner, columns, count);
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
