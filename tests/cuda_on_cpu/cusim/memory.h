// Shared memory and its poison, checked vector accesses, cp.async.
#pragma once

#include <link.h>

#include <cstdint>
#include <cstring>
#include <memory>

#include "cusim/scheduler.h"

// Blocks run one after another on one OS thread, so that a static variable serves as the running block's.
//
// In the plain build it is thread_local: these variables then lie together in the module's TLS segment, where they can
// be filled with poison before each block. (A named section would do, but GCC 12 ignores the attribute in templates and
// rejects it in inline functions.) The sanitizers do not watch thread_local variables, hence plain static ones there.
#if defined(CUSIM_ASAN) || defined(CUSIM_TSAN)
#define CUSIM_SANITIZED
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// Dynamic shared memory as T* name.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cusim::dynamic_shared.bytes.get())

namespace cusim {

constexpr unsigned char kPoison = 0xCD;

struct DynamicShared {
  std::unique_ptr<char[]> bytes;  // exactly as many as asked for, and aligned to no more than 16
  size_t size = 0;
};

struct Range {
  char* begin = nullptr;
  size_t size = 0;

  bool contains(const void* p, size_t bytes) const {
    const char* at = static_cast<const char*>(p);
    return at >= begin && at + bytes <= begin + size;
  }
};

inline DynamicShared dynamic_shared;
inline Range static_shared;

// volatile keeps the compiler from calling memset, which the sanitizers watch.
CUSIM_UNWATCHED inline void poison(char* bytes, size_t size) {
  size_t i = 0;
  for (; i < size && (reinterpret_cast<uintptr_t>(bytes + i) & 7) != 0; i++) {
    *const_cast<volatile char*>(bytes + i) = static_cast<char>(kPoison);
  }
  for (; i + 8 <= size; i += 8) *reinterpret_cast<volatile uint64_t*>(bytes + i) = kPoison * 0x0101010101010101ULL;
  for (; i < size; i++) *const_cast<volatile char*>(bytes + i) = static_cast<char>(kPoison);
}

CUSIM_UNWATCHED inline void poison_shared() {
  poison(dynamic_shared.bytes.get(), dynamic_shared.size);
  poison(static_shared.begin, static_shared.size);
}

// The zero-initialized thread_local variables of this module, which are its __shared__ ones.
inline Range find_static_shared() {
#ifdef CUSIM_SANITIZED
  return {};
#else
  static thread_local char anchor;
  struct Search {
    const char* anchor;
    Range found;
  } search = {&anchor, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        Search& search = *static_cast<Search*>(argument);
        char* data = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; data && i < module->dlpi_phnum; i++) {
          const ElfW(Phdr) & segment = module->dlpi_phdr[i];
          if (segment.p_type != PT_TLS || !Range{data, segment.p_memsz}.contains(search.anchor, 1)) continue;
          search.found = {data + segment.p_filesz, segment.p_memsz - segment.p_filesz};
          return 1;
        }
        return 0;
      },
      &search);
  return search.found;
#endif
}

inline void check_aligned(const void* p, size_t bytes, const char* access) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes != 0) {
    fail("misaligned %s of %zu bytes at %p (%zu past a boundary)", access, bytes, p, address % bytes);
  }
}

// The plain build alone knows where all of it lies.
inline void check_shared(const void* p, size_t bytes, const char* access) {
#ifdef CUSIM_SANITIZED
  (void)p, (void)bytes, (void)access;
#else
  const Range dynamic = {dynamic_shared.bytes.get(), dynamic_shared.size};
  if (!dynamic.contains(p, bytes) && !static_shared.contains(p, bytes)) fail("%s outside of shared memory", access);
#endif
}

// cp.async: N bytes to shared memory, of which the first `source_bytes` come from global memory; the rest are zero.
// The bytes arrive when the thread waits for them; until then the place holds poison, as a copy may also be early.
template <unsigned N>
void cp_async(void* shared, const void* global, unsigned source_bytes = N) {
  static_assert(N == 4 || N == 8 || N == 16, "cp.async copies 4, 8 or 16 bytes");
  check_aligned(shared, N, "cp.async to shared memory");
  check_aligned(global, N, "cp.async from global memory");
  check_shared(shared, N, "cp.async");
  if (source_bytes > N) fail("cp.async reads %u of %u bytes", source_bytes, N);
  AsyncCopy copy = {static_cast<char*>(shared), {}, N, current->copy_group};
  std::memcpy(copy.bytes, global, source_bytes);
  std::memset(shared, kPoison, N);
  current->copies.push_back(copy);
}

inline void cp_async_commit() { current->copy_group++; }

inline void finish_copies_before(unsigned group) {
  auto& copies = current->copies;
  size_t kept = 0;
  for (const AsyncCopy& copy : copies) {
    if (copy.group < group) {
      std::memcpy(copy.to, copy.bytes, copy.size);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

// Waits for all but the last `pending` committed groups.
template <unsigned pending>
void cp_async_wait() {
  const unsigned groups = current->copy_group;
  finish_copies_before(groups < pending ? 0 : groups - pending);
}

inline void cp_async_wait_all() { finish_copies_before(current->copy_group + 1); }

}  // namespace cusim

// One access of sizeof(T) bytes to memory of any type. The address must be a multiple of that size.
template <class T>
T load_vector(const void* p) {
  cusim::check_aligned(p, sizeof(T), "load");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
void store_vector(void* p, const T& value) {
  cusim::check_aligned(p, sizeof(T), "store");
  std::memcpy(p, &value, sizeof(T));
}

// Loads and stores with a cache hint.
#define CUSIM_LOAD(name)      \
  template <class T>          \
  T name(const T* p) {        \
    return load_vector<T>(p); \
  }
#define CUSIM_STORE(name)      \
  template <class T>           \
  void name(T* p, T value) {   \
    store_vector<T>(p, value); \
  }
CUSIM_LOAD(__ldg)
CUSIM_LOAD(__ldca)
CUSIM_LOAD(__ldcg)
CUSIM_LOAD(__ldcs)
CUSIM_LOAD(__ldlu)
CUSIM_LOAD(__ldcv)
CUSIM_STORE(__stwb)
CUSIM_STORE(__stcg)
CUSIM_STORE(__stcs)
CUSIM_STORE(__stwt)
#undef CUSIM_LOAD
#undef CUSIM_STORE
