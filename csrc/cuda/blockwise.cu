// Quantization and dequantization of blocks. A group of threads has a block of elements at a time.
#include "cuda/blocks.h"
#include "cuda/kernels.h"
#include "cuda/maps.h"

namespace bnbops::cuda {
namespace {

enum class Codebook { kUnsigned, kSigned, kOther };

struct QuantizeTables {
  NearestEncoder nearest;
  DynamicEncoder dynamic;
};

// Fills in the tables, and tells whether the codebook is a dynamic map, whose encoding is arithmetic.
BNBOPS_DEVICE Codebook prepare_tables(const float* codebook, QuantizeTables& tables) {
  static_assert(kThreads == kCodebookSize, "one thread for each entry");
  const int i = threadIdx.x;
  const uint32_t entry = bits_of(codebook[i]);
  const bool is_signed = __syncthreads_and(entry == bits_of(kMaps[1].value[i]));
  const bool is_unsigned = __syncthreads_and(entry == bits_of(kMaps[0].value[i]));
  tables.nearest.midpoint[i] = midpoint_after(codebook, i);
  copy_table(kMaps[is_signed].encoder, tables.dynamic);
  __syncthreads();
  return is_signed ? Codebook::kSigned : is_unsigned ? Codebook::kUnsigned : Codebook::kOther;
}

BNBOPS_DEVICE void encode(const float (&x)[kOctet], float inverse, Codebook codebook, const QuantizeTables& tables,
                          uint32_t (&code)[kOctet]) {
  if (codebook == Codebook::kSigned) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) code[i] = dynamic_code<true>(encodable(x[i]), inverse, tables.dynamic);
  } else if (codebook == Codebook::kUnsigned) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) code[i] = dynamic_code<false>(encodable(x[i], false), inverse, tables.dynamic);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) code[i] = nearest_entry<ScalarLanes>(encodable(x[i]) * inverse, tables.nearest);
  }
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(QuantizeJob job) {
  __shared__ QuantizeTables tables;
  const Codebook codebook = prepare_tables(job.codebook, tables);
  quantize_blocks<kGroup>(job, [&](const float (&x)[kOctet], float inverse, int64_t at, int64_t count) {
    uint32_t code[kOctet];
    encode(x, inverse, codebook, tables, code);
    store_codes(job.codes + at, count, code);
  });
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) dequantize_kernel(DequantizeJob job) {
  __shared__ float codebook[kCodebookSize];
  codebook[threadIdx.x] = job.codebook[threadIdx.x];
  __syncthreads();
  for_blocks<kGroup>(job, [&](const Share& share) {
    const float absmax = share.begin < share.end ? job.absmax[share.block] : 0.0F;
    for (int64_t at = share.begin + share.lane * kOctet; at < share.end; at += kGroup * kOctet) {
      const uint2 codes = load_codes(job.codes + at, share.end - at);
      float x[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] = codebook[code_of(codes, i)] * absmax;
      store_octet(job.values, job.dtype, at, share.end - at, x);
    }
  });
}

}  // namespace

cudaError_t quantize(const QuantizeJob& job, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  with_groups(job, [&](auto group, dim3 grid) {
    LAUNCH((quantize_kernel<decltype(group)::value>), grid, dim3(kThreads), 0, stream, job);
  });
  return cudaGetLastError();
}

cudaError_t dequantize(const DequantizeJob& job, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  with_groups(job, [&](auto group, dim3 grid) {
    LAUNCH((dequantize_kernel<decltype(group)::value>), grid, dim3(kThreads), 0, stream, job);
  });
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
