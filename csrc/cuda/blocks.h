// Groups of threads that take a block of elements at a time.
#pragma once

#include <type_traits>

#include "codecs.h"
#include "cuda/elements.h"
#include "cuda/threads.h"
#include "jobs.h"
#include "layout.h"

namespace bnbops::cuda {

// The part of a thread in its group's next block.
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
    visit(Share{block, begin, block < blocks ? end : begin, static_cast<int>(threadIdx.x) % kGroup});
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

// Takes the scales of a job's blocks and calls write(x, inverse, at, count) for every octet, with its elements from
// `at` on, of which `count` exist; the others are zeros. A thread keeps the first octets of its share in
// registers. Only blocks of more than 4096 elements are read twice.
template <int kGroup, class Write>
BNBOPS_DEVICE void quantize_blocks(const QuantizeJob& job, const Write& write) {
  __shared__ uint32_t scratch[kThreads / kWarp];
  constexpr int kKept = kGroup == kThreads ? 2 : 1;
  constexpr int64_t kStride = kGroup * kOctet;
  for_blocks<kGroup>(job, [&](const Share& share) {
    const int64_t begin = share.begin + share.lane * kOctet, rest = begin + kKept * kStride;
    Octet kept[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t at = begin + k * kStride;
      kept[k] = load_octet(job.values, job.dtype, at, share.end - at);
    }
    uint32_t largest = 0;
    float x[kOctet];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      to_floats(kept[k], job.dtype, x);
      largest = largest_magnitude(x, largest);
    }
    for (int64_t at = rest; at < share.end; at += kStride) {
      to_floats(load_octet(job.values, job.dtype, at, share.end - at), job.dtype, x);
      largest = largest_magnitude(x, largest);
    }
    const float absmax = float_from_bits(group_max<kGroup>(largest, scratch)), inverse = inverse_scale(absmax);
    if (share.lane == 0 && share.begin < share.end) job.absmax[share.block] = absmax;

#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t at = begin + k * kStride;
      to_floats(kept[k], job.dtype, x);
      if (at < share.end) write(x, inverse, at, share.end - at);
    }
    for (int64_t at = rest; at < share.end; at += kStride) {
      to_floats(load_octet(job.values, job.dtype, at, share.end - at), job.dtype, x);
      write(x, inverse, at, share.end - at);
    }
  });
}

// Calls launch(group, grid) with the number of threads that suits a block, as a constant, and the grid for it.
template <class Job, class Launch>
void with_groups(const Job& job, const Launch& launch) {
  const auto call = [&](auto group) {
    launch(group, grid_of(divide_up(divide_up(job.numel, job.blocksize), kThreads / group)));
  };
  if (job.blocksize <= 8 * kOctet) return call(std::integral_constant<int, 8>{});
  if (job.blocksize <= kWarp * kOctet) return call(std::integral_constant<int, kWarp>{});
  if (job.blocksize <= 128 * kOctet) return call(std::integral_constant<int, 128>{});
  call(std::integral_constant<int, kThreads>{});
}

}  // namespace bnbops::cuda
