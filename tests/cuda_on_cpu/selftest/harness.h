// Self-tests of the simulator: `selftest` runs all tests, `selftest BUG` one kernel with a planted bug.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "cusim/cusim.h"

struct Case {
  void (*run)();
  bool planted;
};

// By name, in order of name.
inline std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)(), bool planted) { cases()[name] = {run, planted}; }
};

#define TEST(name)                                           \
  static void name();                                        \
  static const Register register_##name(#name, name, false); \
  static void name()

// template <bool bug> void name(): a test without the bug, named for what must find it with the bug.
#define BUG(name)                                                            \
  template <bool bug>                                                        \
  static void name();                                                        \
  static const Register register_##name(#name " fixed", name<false>, false); \
  static const Register register_bug_##name(#name, name<true>, true);        \
  template <bool bug>                                                        \
  static void name()

#define EXPECT_EQUAL(actual, expected) expect_equal((actual), (expected), #actual, __FILE__, __LINE__)

// Fails at the first difference. Compares bits: NaN equals itself, -0 differs from +0.
template <class T>
void expect_equal(T actual, T expected, const char* what, const char* file, int line) {
  if (std::memcmp(&actual, &expected, sizeof(T)) == 0) return;
  std::fprintf(stderr, "%s:%d: %s is %.9g, expected %.9g\n", file, line, what, static_cast<double>(actual),
               static_cast<double>(expected));
  std::exit(1);
}

// An array of exactly n elements, which the address sanitizer surrounds.
template <class T>
std::unique_ptr<T[]> array(size_t n) {
  return std::unique_ptr<T[]>(new T[n]());
}

// Pseudo-random bits, always the same (Knuth's constants).
inline unsigned random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005 + 1442695040888963407;
  return static_cast<unsigned>(state >> 32);
}
