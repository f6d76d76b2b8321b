// Uninitialised memory for intermediate results.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

// An array that begins at a cache line, of a type without constructors.
template <class T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Scratch<T> make_scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kCacheLine)));
}

BNBOPS_NAMESPACE_END
