// Squared norms of many tensors, and percentile clipping.
#include "cuda/norm_kernels.h"
#include "cuda/sums.h"

namespace bnbops::cuda {
namespace {

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
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        octets[i] = load_octet(record.values, record.dtype, at + i * kColumns, record.numel - at - i * kColumns);
      }
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
  if (call.count == 0) return cudaSuccess;
  in_batches(call.items, call.count, [&](const Batch<SquaresItem>& batch) {
    LAUNCH(place_kernel, dim3(1), dim3(batch.kMost), 0, stream, batch, call.records);
  });
  if (call.pieces > 0) {
    const Many<SquaresItem> many{call.records, call.count, call.pieces};
    LAUNCH(squares_kernel, grid_of_units(call.pieces, kResident), dim3(kThreads), 0, stream, many, call.sums);
  }
  LAUNCH((sum_pieces_kernel<SquaresItem>), dim3(call.count), dim3(kThreads), 0, stream, call.records, call.sums,
         call.norms);
  return cudaGetLastError();
}

cudaError_t percentile_clip(const ClipCall& call, cudaStream_t stream) {
  in_batches(call.items, call.count, [&](const Batch<ClipItem>& batch) {
    LAUNCH(percentile_clip_kernel, dim3(batch.count), dim3(kClipThreads), 0, stream, batch, call);
  });
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
