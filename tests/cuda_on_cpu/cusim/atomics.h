// Atomic read-modify-write operations, relaxed as in CUDA: they order no other accesses.
#pragma once

#include <type_traits>

#include "cusim/math.h"
#include "cusim/memory.h"

namespace cusim {

template <class T>
struct Identity {
  using type = T;
};
// A parameter that converts to the type of the memory.
template <class T>
using Same = typename Identity<T>::type;

// Stores next(old), returns old.
template <class T, class Next>
T update_atomically(T* p, Next next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a type that atomics take");
  check_aligned(p, sizeof(T), "atomic access");
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    desired = next(old);
  } while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  } else {
    return a + b;
  }
}

}  // namespace cusim

#define CUSIM_ATOMIC(name, expression)                                                           \
  template <class T>                                                                             \
  T name(T* p, cusim::Same<T> value) {                                                           \
    return cusim::update_atomically(p, [&]([[maybe_unused]] T old) -> T { return expression; }); \
  }
CUSIM_ATOMIC(atomicAdd, cusim::wrapping_add(old, value))
CUSIM_ATOMIC(atomicSub, cusim::wrapping_add(old, static_cast<T>(0 - value)))
CUSIM_ATOMIC(atomicMin, min(old, value))
CUSIM_ATOMIC(atomicMax, max(old, value))
CUSIM_ATOMIC(atomicExch, value)
CUSIM_ATOMIC(atomicAnd, old& value)
CUSIM_ATOMIC(atomicOr, old | value)
CUSIM_ATOMIC(atomicXor, old ^ value)
CUSIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUSIM_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUSIM_ATOMIC

template <class T>
T atomicCAS(T* p, cusim::Same<T> expected, cusim::Same<T> value) {
  return cusim::update_atomically(p, [&](T old) { return old == expected ? value : old; });
}

// Threads of a block see each other's writes at once; other blocks run before or after.
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
