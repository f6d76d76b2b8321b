// The order in which blocks, warps and threads get their turn: CUSIM_ORDER=forward | reverse | random:SEED.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace cusim {

// The numbers below n in the order first, first + step, first + 2 * step, ... modulo n.
struct Permutation {
  uint64_t n, first, step;

  uint64_t after(uint64_t i) const { return i + step < n ? i + step : i + step - n; }
};

class Order {
 public:
  void read_environment() {
    const char* name = std::getenv("CUSIM_ORDER");
    if (!name || std::strcmp(name, "forward") == 0) {
      kind_ = kForward;
    } else if (std::strcmp(name, "reverse") == 0) {
      kind_ = kReverse;
    } else if (std::strncmp(name, "random:", 7) == 0) {
      kind_ = kRandom;
      state_ = std::strtoull(name + 7, nullptr, 10);
    } else {
      std::fprintf(stderr, "cusim: CUSIM_ORDER=%s is not forward, reverse or random:SEED\n", name);
      std::abort();
    }
  }

  Permutation next(uint64_t n) {
    if (kind_ == kForward) return {n, 0, 1};
    if (kind_ == kReverse) return {n, n - 1, n - 1};
    uint64_t step;
    do step = random() % n;
    while (std::gcd(step, n) != 1);
    return {n, random() % n, step};
  }

 private:
  enum Kind { kForward, kReverse, kRandom };

  // SplitMix64 (Steele, Lea, Flood 2014).
  uint64_t random() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }

  Kind kind_ = kForward;
  uint64_t state_ = 0;
};

}  // namespace cusim
