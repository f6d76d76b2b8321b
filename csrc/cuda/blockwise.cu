// Quantization and dequantization of blocks. A group of threads has a block of elements at a time.
#include "codecs/dynamic8.h"
#include "codecs/nearest.h"
#include "core/lanes_scalar.h"
#include "cuda/blocks.h"
#include "cuda/kernels.h"
#include "cuda/maps.h"

namespace bnbops::cuda {
namespace {

enum class Codebook { kUnsigned, kSigned, kOther };

union QuantizeTables {
  CodeTable<Dynamic8, true> signed_map;
  CodeTable<Dynamic8, false> unsigned_map;
  NearestEncoder nearest;
};

struct Values {
  float value[kCodebookSize];
};
constexpr Values copy_of(const float* table) {
  Values values{};
  for (int i = 0; i < kCodebookSize; ++i) values.value[i] = table[i];
  return values;
}
static __device__ const Values kSignedMap = copy_of(kDynamicSigned), kUnsignedMap = copy_of(kDynamicUnsigned);

// Fills in the table that the codebook needs, and tells which.
BNBOPS_DEVICE Codebook prepare_tables(const float* codebook, QuantizeTables& tables) {
  static_assert(kThreads == kCodebookSize, "one thread for each entry");
  const int i = threadIdx.x;
  const uint32_t entry = bits_of(codebook[i]);
  const bool is_signed = __syncthreads_and(entry == bits_of(kSignedMap.value[i]));
  const bool is_unsigned = __syncthreads_and(entry == bits_of(kUnsignedMap.value[i]));
  if (is_signed) {
    copy_table(kMap<Dynamic8, true>.code, tables.signed_map);
  } else if (is_unsigned) {
    copy_table(kMap<Dynamic8, false>.code, tables.unsigned_map);
  } else {
    tables.nearest.midpoint[i] = midpoint_after(codebook, i);
  }
  __syncthreads();
  return is_signed ? Codebook::kSigned : is_unsigned ? Codebook::kUnsigned : Codebook::kOther;
}

BNBOPS_DEVICE uint2 encode(const float (&x)[kOctet], float inverse, Codebook codebook, const QuantizeTables& tables) {
  if (codebook == Codebook::kSigned) return codes_of(x, inverse, tables.signed_map);
  if (codebook == Codebook::kUnsigned) {
    float positive[kOctet];
    unrolled<kOctet>([&](int i) { positive[i] = x[i] > 0 ? x[i] : 0.0F; });
    return codes_of(positive, inverse, tables.unsigned_map);
  }
  uint32_t code[kOctet];
  unrolled<kOctet>([&](int i) { code[i] = nearest_entry<ScalarLanes>(x[i] * inverse, tables.nearest); });
  return pack_codes(code);
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(QuantizeJob job) {
  __shared__ QuantizeTables tables;
  const Codebook codebook = prepare_tables(job.codebook, tables);
  quantize_blocks<kGroup>(job, [&](const float (&x)[kOctet], float inverse, int64_t at, int64_t count) {
    store_codes(job.codes + at, count, encode(x, inverse, codebook, tables));
  });
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) dequantize_kernel(DequantizeJob job) {
  __shared__ float codebook[kCodebookSize];
  codebook[threadIdx.x] = job.codebook[threadIdx.x];
  __syncthreads();
  for_blocks<kGroup>(job, [&](const Share<kGroup>& share) {
    const float absmax = share.count > 0 ? job.absmax[share.block] : 0.0F;
    for (auto from = 0 * share.count; from < share.count; from += share.kStride) {
      const uint2 codes = load_codes(job.codes + share.at + from, share.count - from);
      float x[kOctet];
      unrolled<kOctet>([&](int i) { x[i] = codebook[code_of(codes, i)] * absmax; });
      store_octet(job.values, job.dtype, share.at + from, share.count - from, x);
      if (kGroup < kThreads) break;  // one octet is a thread's whole share
    }
  });
}

}  // namespace

cudaError_t quantize(const QuantizeJob& job, cudaStream_t stream) {
  return with_groups(job, [&](auto group, dim3 grid) { return launch(quantize_kernel<group>, grid, stream, job); });
}

cudaError_t dequantize(const DequantizeJob& job, cudaStream_t stream) {
  return with_groups(job, [&](auto group, dim3 grid) { return launch(dequantize_kernel<group>, grid, stream, job); });
}

}  // namespace bnbops::cuda
