// Squared norms of many tensors, and percentile clipping. Sums are in the order of norm_math.h: a lane has eight
// neighbouring columns of the 256, or a thread has one.
#include "cuda/elements.h"
#include "cuda/many_tensors.h"
#include "cuda/optimizer_kernels.h"
#include "ops/norms/norm_math.h"

namespace bnbops::cuda {
namespace {

static_assert(kColumns == kWarp * kOctet && kColumns == kThreads);

BNBOPS_DEVICE void add_squares(const float (&x)[kOctet], double (&column)[kOctet]) {
  unrolled<kOctet>([&](int i) {
    const double value = counted(x[i]);
    column[i] = __fma_rn(value, value, column[i]);  // the square of a float is exact either way
  });
}

// Of the columns of all lanes, neighbours first.
BNBOPS_DEVICE double sum_over_warp(double column) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) column += __shfl_xor_sync(kAllLanes, column, step);
  return column;
}

BNBOPS_DEVICE double sum_of_columns(const double (&column)[kOctet]) {
  return sum_over_warp(((column[0] + column[1]) + (column[2] + column[3])) +
                       ((column[4] + column[5]) + (column[6] + column[7])));
}

__global__ void place_kernel(const __grid_constant__ Batch<SquaresItem> batch, SquaresItem* records) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= batch.count) return;
  SquaresItem& record = records[batch.first + i];
  clear_record(record);
  record = batch.item[i];
}

// A warp has a piece at a time, of which it loads some blocks at once.
__global__ void __launch_bounds__(kThreads, kResident) squares_kernel(const Many<SquaresItem> many, double* sums) {
  __shared__ SquaresItem records[kWarps];
  constexpr int kAtOnce = 2;
  for_units(many, records, [&](const SquaresItem& record, int64_t piece) {
    const int64_t begin = piece * kNormPiece + lane_of_warp() * kOctet;
    double column[kOctet] = {};
    for (int64_t at = begin; at < begin + kNormPiece; at += kAtOnce * kColumns) {
      Octet octets[kAtOnce];
      unrolled<kAtOnce>([&](int i) {
        octets[i] = load_octet(record.values, record.dtype, at + i * kColumns, record.numel - at - i * kColumns);
      });
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float x[kOctet];
        to_floats(octets[i], record.dtype, x);
        add_squares(x, column);
      }
    }
    const double sum = sum_of_columns(column);
    if (lane_of_warp() == 0) sums[record.first + piece] = sum;
  });
}

// A thread block sums up the pieces of its tensor.
__global__ void __launch_bounds__(kThreads, kResident)
    sum_pieces_kernel(const SquaresItem* records, const double* pieces, double* sums) {
  __shared__ double of_warp[kWarps];
  const int64_t end = records[blockIdx.x].end;
  double column = 0;
#pragma unroll 8
  for (int64_t i = records[blockIdx.x].first + threadIdx.x; i < end; i += kColumns) column += pieces[i];
  column = sum_over_warp(column);
  if (lane_of_warp() == 0) of_warp[warp_of_block()] = column;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2) {
#pragma unroll
    for (int i = 0; i < kWarps; i += 2 * step) of_warp[i] += of_warp[i + step];
  }
  sums[blockIdx.x] = of_warp[0];
}

// A thread block has a parameter, a thread one norm of its history.
constexpr int kClipThreads = 128;
static_assert(kClipThreads >= kNormHistory);

__global__ void __launch_bounds__(kClipThreads)
    percentile_clip_kernel(const __grid_constant__ Batch<ClipItem> batch, const __grid_constant__ ClipCall call) {
  __shared__ float norms[kNormHistory];
  const ClipItem& item = batch.item[blockIdx.x];
  const int tensor = batch.first + static_cast<int>(blockIdx.x), i = static_cast<int>(threadIdx.x);
  const double squared = call.squared_norms[tensor], scale = value_of(call.grad_scale);
  const float steps = *item.step;
  const bool usable = is_amount_or_count(squared) && is_scale(scale) && is_amount_or_count(steps);
  if (i == 0) call.factors[tensor] = 1.0F;
  if (!usable || value_of(call.found_inf) != 0) return;

  const float newest = kept_norm(squared, scale);
  const bool is_newest = steps < 1 || i == history_place(steps);
  if (i < kNormHistory) {
    if (is_newest) item.history[i] = newest;
    norms[i] = item.history[i];
  }
  __syncthreads();
  if (i >= kNormHistory) return;
  int rank = 0;  // among the norms, equal ones by their places: one thread has the percentile's
  for (int j = 0; j < kNormHistory; ++j) rank += norms[j] < norms[i] || (norms[j] == norms[i] && j < i);
  if (rank == call.percentile) call.factors[tensor] = clip_factor(newest, norms[i]);
}

}  // namespace

cudaError_t squared_norms(const SquaresCall& call, cudaStream_t stream) {
  in_batches(call.items, call.count, [&](const Batch<SquaresItem>& batch) {
    LAUNCH(place_kernel, dim3(1), dim3(batch.kMost), 0, stream, batch, call.records);
  });
  const Many<SquaresItem> many{call.records, call.count, call.pieces};
  const cudaError_t error = launch(squares_kernel, grid_of_units(call.pieces), stream, many, call.sums);
  if (error != cudaSuccess) return error;
  return launch(sum_pieces_kernel, dim3(call.count), stream, call.records, call.sums, call.norms);
}

cudaError_t percentile_clip(const ClipCall& call, cudaStream_t stream) {
  in_batches(call.items, call.count, [&](const Batch<ClipItem>& batch) {
    LAUNCH(percentile_clip_kernel, dim3(batch.count), dim3(kClipThreads), 0, stream, batch, call);
  });
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
