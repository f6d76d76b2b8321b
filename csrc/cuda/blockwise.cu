// Quantization and dequantization of blocks. A group of threads has a block of elements at a time.
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/maps.h"
#include "layout.h"

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

BNBOPS_DEVICE uint32_t encode(float x, float inverse, Codebook codebook, const QuantizeTables& tables) {
  switch (codebook) {
    case Codebook::kSigned: return dynamic_code<true>(encodable(x), inverse, tables.dynamic);
    case Codebook::kUnsigned: return dynamic_code<false>(encodable(x, false), inverse, tables.dynamic);
    default: return nearest_entry<ScalarLanes>(encodable(x) * inverse, tables.nearest);
  }
}

// The part of a thread in its group's next block.
template <int kGroup>
struct Share {
  int64_t block, begin, end;  // of elements
  int lane;                   // among the threads of the group
};

// Calls visit(share) for the blocks of this thread's group, with an empty share where others still have a block: all
// threads make the same number of calls.
template <int kGroup, class Job, class Visit>
BNBOPS_DEVICE void for_blocks(const Job& job, const Visit& visit) {
  constexpr int kGroups = kThreads / kGroup;
  const int64_t blocks = divide_up(job.numel, job.blocksize);
  const int group = threadIdx.x / kGroup;
  for (int64_t first = int64_t{blockIdx.x} * kGroups; first < blocks; first += int64_t{gridDim.x} * kGroups) {
    const int64_t block = first + group, begin = block * job.blocksize;
    const int64_t end = begin + job.blocksize < job.numel ? begin + job.blocksize : job.numel;
    visit(Share<kGroup>{block, begin, block < blocks ? end : begin, static_cast<int>(threadIdx.x) % kGroup});
  }
}

// The bits of the largest magnitude.
BNBOPS_DEVICE uint32_t largest_magnitude(const float (&x)[kOctet], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const uint32_t bits = bits_of(encodable(x[i])) & 0x7FFFFFFFU;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Every thread keeps its first kKept octets of a block in registers; it reads the others twice, where a block is larger
// than kKept * kGroup octets.
template <int kGroup, int kKept>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(QuantizeJob job) {
  __shared__ QuantizeTables tables;
  __shared__ uint32_t scratch[kThreads / kWarp];
  const Codebook codebook = prepare_tables(job.codebook, tables);
  constexpr int64_t kStride = kGroup * kOctet;
  for_blocks<kGroup>(job, [&](const Share<kGroup>& share) {
    const int64_t begin = share.begin + share.lane * kOctet;
    Octet kept[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      kept[k] = load_octet(job.values, job.dtype, begin + k * kStride, share.end - begin - k * kStride);
    }
    uint32_t largest = 0;
    float x[kOctet];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      to_floats(kept[k], job.dtype, x);
      largest = largest_magnitude(x, largest);
    }
    for (int64_t at = begin + kKept * kStride; at < share.end; at += kStride) {
      to_floats(load_octet(job.values, job.dtype, at, share.end - at), job.dtype, x);
      largest = largest_magnitude(x, largest);
    }
    const float absmax = float_from_bits(group_max<kGroup>(largest, scratch)), inverse = inverse_scale(absmax);
    if (share.lane == 0 && share.begin < share.end) job.absmax[share.block] = absmax;

    const auto write = [&](int64_t at) {
      uint32_t code[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) code[i] = encode(x[i], inverse, codebook, tables);
      store_codes(job.codes + at, share.end - at, code);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      to_floats(kept[k], job.dtype, x);
      if (begin + k * kStride < share.end) write(begin + k * kStride);
    }
    for (int64_t at = begin + kKept * kStride; at < share.end; at += kStride) {
      to_floats(load_octet(job.values, job.dtype, at, share.end - at), job.dtype, x);
      write(at);
    }
  });
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kResident) dequantize_kernel(DequantizeJob job) {
  __shared__ float codebook[kCodebookSize];
  codebook[threadIdx.x] = job.codebook[threadIdx.x];
  __syncthreads();
  for_blocks<kGroup>(job, [&](const Share<kGroup>& share) {
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

// Calls launch(size) with the number of threads that suits a block, as a constant.
template <class Launch>
void with_group_for(int64_t blocksize, const Launch& launch) {
  if (blocksize <= 8 * kOctet) return launch(std::integral_constant<int, 8>{});
  if (blocksize <= kWarp * kOctet) return launch(std::integral_constant<int, kWarp>{});
  if (blocksize <= 128 * kOctet) return launch(std::integral_constant<int, 128>{});
  launch(std::integral_constant<int, kThreads>{});
}

dim3 grid_of_groups(int64_t numel, int64_t blocksize, int group) {
  return grid_of(divide_up(divide_up(numel, blocksize), kThreads / group));
}

}  // namespace

cudaError_t quantize(const QuantizeJob& job, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  with_group_for(job.blocksize, [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    constexpr int kKept = kGroup == kThreads ? 2 : 1;
    LAUNCH((quantize_kernel<kGroup, kKept>), grid_of_groups(job.numel, job.blocksize, kGroup), dim3(kThreads), 0,
           stream, job);
  });
  return cudaGetLastError();
}

cudaError_t dequantize(const DequantizeJob& job, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  with_group_for(job.blocksize, [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    LAUNCH((dequantize_kernel<kGroup>), grid_of_groups(job.numel, job.blocksize, kGroup), dim3(kThreads), 0, stream,
           job);
  });
  return cudaGetLastError();
}

}  // namespace bnbops::cuda
