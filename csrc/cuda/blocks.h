// Groups of threads that take a block of elements at a time.
#pragma once

#include <type_traits>

#include "codecs/codec.h"
#include "core/layout.h"
#include "cuda/elements.h"
#include "cuda/threads.h"
#include "ops/jobs.h"

namespace bnbops::cuda {

// The part of a thread in its group's next block: octets, each kStride elements after the last.
template <int kGroup>
struct Share {
  static constexpr int kStride = kGroup * kOctet;
  using Count = std::conditional_t<kGroup == kThreads, int64_t, int>;  // a smaller group is for short blocks

  int64_t block, at;  // of elements, the first one
  Count count;        // from `at` to the end of the block; at most 0 if there is nothing
  int lane;           // among the threads of the group
};

// Calls visit(share) for the blocks of this thread's group, with an empty share where others still have a block: all
// threads make the same number of calls.
template <int kGroup, class Job, class Visit>
BNBOPS_DEVICE void for_blocks(const Job& job, const Visit& visit) {
  using Count = typename Share<kGroup>::Count;
  constexpr int kGroups = kThreads / kGroup;
  const int64_t blocksize = job.blocksize < job.numel ? job.blocksize : job.numel;
  const int64_t blocks = divide_up(job.numel, blocksize), step = int64_t{gridDim.x} * kGroups;
  const int lane = threadIdx.x % kGroup;
  const Count most = static_cast<Count>(blocksize) - lane * kOctet;
  int64_t first = int64_t{blockIdx.x} * kGroups, block = first + threadIdx.x / kGroup;
  int64_t at = block * blocksize + lane * kOctet;
  for (; first < blocks; first += step, block += step, at += step * blocksize) {
    const int64_t rest = job.numel - at;
    visit(Share<kGroup>{block, at, rest < most ? static_cast<Count>(rest) : most, lane});
  }
}

// Takes the scales of a job's blocks and calls write(x, inverse, at, count) for every octet, with its elements from
// `at` on, made encodable, of which `count` exist; the others are zeros. A thread keeps the first octets of its share
// in registers. Only blocks of more than 4096 elements are read twice. `kMore`: a share may have more than one octet.
template <int kGroup, bool kMore = kGroup == kThreads, class Write>
BNBOPS_DEVICE void quantize_blocks(const QuantizeJob& job, const Write& write) {
  __shared__ uint32_t scratch[kWarps];
  using Count = typename Share<kGroup>::Count;
  constexpr int kKept = kGroup == kThreads ? 2 : 1, kStride = Share<kGroup>::kStride;
  for_blocks<kGroup>(job, [&](const Share<kGroup>& share) {
    const auto load = [&](Count from) {
      return load_octet(job.values, job.dtype, share.at + from, share.count - from);
    };
    Octet octet[kKept];
    unrolled<kKept>([&](int k) { octet[k] = load(k * kStride); });
    float largest = 0, kept[kKept][kOctet], x[kOctet];
    unrolled<kKept>([&](int k) {
      to_floats(octet[k], job.dtype, kept[k]);
      largest = max_or_nan(largest, make_encodable(kept[k]));
    });
    for (Count from = kKept * kStride; kMore && from < share.count; from += kStride) {
      to_floats(load(from), job.dtype, x);
      largest = max_or_nan(largest, make_encodable(x));
    }
    const float absmax = float_from_bits(group_max<kGroup>(bits_of(largest), scratch)), inverse = inverse_scale(absmax);
    if (share.lane == 0 && share.count > 0) job.absmax[share.block] = absmax;

    unrolled<kKept>([&](int k) {
      if (k * kStride < share.count) write(kept[k], inverse, share.at + k * kStride, share.count - k * kStride);
    });
    for (Count from = kKept * kStride; kMore && from < share.count; from += kStride) {
      to_floats(load(from), job.dtype, x);
      make_encodable(x);
      write(x, inverse, share.at + from, share.count - from);
    }
  });
}

// What launch(group, grid) gives for the number of threads that suits a block, a constant, and the grid for it.
template <class Job, class Launch>
cudaError_t with_groups(const Job& job, const Launch& launch) {
  const auto call = [&](auto group) {
    return launch(group, grid_of(divide_up(divide_up(job.numel, job.blocksize), kThreads / group)));
  };
  if (job.blocksize <= 8 * kOctet) return call(std::integral_constant<int, 8>{});
  if (job.blocksize <= kWarp * kOctet) return call(std::integral_constant<int, kWarp>{});
  if (job.blocksize <= 128 * kOctet) return call(std::integral_constant<int, 128>{});
  return call(std::integral_constant<int, kThreads>{});
}

}  // namespace bnbops::cuda
