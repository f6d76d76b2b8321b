// What threads do together: barriers, shuffles, votes, reductions.
#pragma once

#include <type_traits>

#include "cusim/scheduler.h"

namespace cusim {

template <class T>
struct Shuffle {
  T value;
  unsigned source;
  T result;

  CUSIM_UNWATCHED static void combine(Shuffle* const (&lanes)[kWarpSize], unsigned mask) {
    for (; mask; mask &= mask - 1) {
      Shuffle& lane = *lanes[__builtin_ctz(mask)];
      lane.result = lanes[lane.source]->value;
    }
  }
};

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a type that shuffles take");
  if (!(mask >> source & 1)) {
    fail("%s:%u: lane %u reads lane %u, which mask %08x lacks", site.file, site.line, current->lane, source, mask);
  }
  Shuffle<T> mine = {value, source, {}};
  collective(mask, mine, Shuffle<T>::combine, site);
  return mine.result;
}

// The first lane of the segment that holds the calling lane.
inline unsigned segment_start(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s:%u: a width of %d lanes", site.file, site.line, width);
  }
  return current->lane & ~static_cast<unsigned>(width - 1);
}

struct Ballot {
  bool predicate;
  unsigned result;

  CUSIM_UNWATCHED static void combine(Ballot* const (&lanes)[kWarpSize], unsigned mask) {
    unsigned result = 0;
    for (unsigned left = mask; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      result |= static_cast<unsigned>(lanes[lane]->predicate) << lane;
    }
    for (; mask; mask &= mask - 1) lanes[__builtin_ctz(mask)]->result = result;
  }
};

// The lanes whose value equals that of each lane.
template <class T>
struct Match {
  T value;
  unsigned result;

  CUSIM_UNWATCHED static void combine(Match* const (&lanes)[kWarpSize], unsigned mask) {
    for (unsigned left = mask; left; left &= left - 1) {
      Match& lane = *lanes[__builtin_ctz(left)];
      for (unsigned other = mask; other; other &= other - 1) {
        const int index = __builtin_ctz(other);
        lane.result |= static_cast<unsigned>(lanes[index]->value == lane.value) << index;
      }
    }
  }
};

template <class T, T (*operation)(T, T)>
struct Reduction {
  T value;
  T result;

  CUSIM_UNWATCHED static void combine(Reduction* const (&lanes)[kWarpSize], unsigned mask) {
    T result = lanes[__builtin_ctz(mask)]->value;
    for (unsigned left = mask & (mask - 1); left; left &= left - 1) {
      result = operation(result, lanes[__builtin_ctz(left)]->value);
    }
    for (; mask; mask &= mask - 1) lanes[__builtin_ctz(mask)]->result = result;
  }
};

template <class T, T (*operation)(T, T)>
T reduce(unsigned mask, T value, Site site) {
  Reduction<T, operation> mine = {value, {}};
  collective(mask, mine, Reduction<T, operation>::combine, site);
  return mine.result;
}

template <class T>
T add(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <class T>
T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}
inline unsigned bit_and(unsigned a, unsigned b) { return a & b; }
inline unsigned bit_or(unsigned a, unsigned b) { return a | b; }
inline unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

}  // namespace cusim

inline void __syncthreads(cusim::Site site = cusim::Site::here()) { cusim::wait_for_block(site); }

inline int __syncthreads_count(int predicate, cusim::Site site = cusim::Site::here()) {
  return static_cast<int>(cusim::wait_for_block(site, predicate != 0).yes);
}

inline int __syncthreads_or(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::wait_for_block(site, predicate != 0).yes != 0;
}

inline int __syncthreads_and(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::wait_for_block(site, predicate != 0).no == 0;
}

inline void __syncwarp(unsigned mask = cusim::kAllLanes, cusim::Site site = cusim::Site::here()) {
  cusim::wait_for_warp(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cusim::Site site = cusim::Site::here()) {
  const unsigned start = cusim::segment_start(width, site);
  return cusim::shuffle(mask, value, start + (static_cast<unsigned>(source) & (width - 1)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cusim::Site site = cusim::Site::here()) {
  const unsigned lane = cusim::current->lane, start = cusim::segment_start(width, site);
  return cusim::shuffle(mask, value, lane - start >= delta ? lane - delta : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cusim::Site site = cusim::Site::here()) {
  const unsigned lane = cusim::current->lane, left = cusim::segment_start(width, site) + width - lane;
  return cusim::shuffle(mask, value, delta < left ? lane + delta : lane, site);
}

// Lanes of earlier segments can be read, those of later ones cannot.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, cusim::Site site = cusim::Site::here()) {
  const unsigned lane = cusim::current->lane, end = cusim::segment_start(width, site) + width;
  const unsigned source = lane ^ static_cast<unsigned>(flip);
  return cusim::shuffle(mask, value, source < end ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  cusim::Ballot mine = {predicate != 0, 0};
  cusim::collective(mask, mine, cusim::Ballot::combine, site);
  return mine.result;
}

inline int __any_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, cusim::Site site = cusim::Site::here()) {
  cusim::Match<T> mine = {value, 0};
  cusim::collective(mask, mine, cusim::Match<T>::combine, site);
  return mine.result;
}

template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* same, cusim::Site site = cusim::Site::here()) {
  *same = __match_any_sync(mask, value, site) == mask;
  return *same ? mask : 0;
}

#define CUSIM_REDUCE(name, T, operation)                                          \
  inline T name(unsigned mask, T value, cusim::Site site = cusim::Site::here()) { \
    return cusim::reduce<T, operation>(mask, value, site);                        \
  }
CUSIM_REDUCE(__reduce_add_sync, int, cusim::add<int>)
CUSIM_REDUCE(__reduce_add_sync, unsigned, cusim::add<unsigned>)
CUSIM_REDUCE(__reduce_min_sync, int, cusim::smaller<int>)
CUSIM_REDUCE(__reduce_min_sync, unsigned, cusim::smaller<unsigned>)
CUSIM_REDUCE(__reduce_max_sync, int, cusim::larger<int>)
CUSIM_REDUCE(__reduce_max_sync, unsigned, cusim::larger<unsigned>)
CUSIM_REDUCE(__reduce_and_sync, unsigned, cusim::bit_and)
CUSIM_REDUCE(__reduce_or_sync, unsigned, cusim::bit_or)
CUSIM_REDUCE(__reduce_xor_sync, unsigned, cusim::bit_xor)
#undef CUSIM_REDUCE
