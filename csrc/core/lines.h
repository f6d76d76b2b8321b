// Functions made of straight lines, which is what the arithmetic of codecs is: lanes make their tables of them.
#pragma once

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

// f(n) of the numbers n = code - 127 of a map for either sign, or n = code + 1 of one that is never negative:
// fma(|n|, slope, base) with the sign of n, by the line e where 2^e <= |n| < 2^(e + 1), rounded once. f(0) = 0, and
// in maps that are never negative f(1) = 0.
constexpr int kOctaveLines = 9;
struct OctaveLines {
  float slope[kOctaveLines], base[kOctaveLines];
};

// Encoders see |x| + 2^-31, which makes the exponents of all magnitudes up to 1 neighbours, 32 of them.
constexpr int kOctaves = 32;
constexpr int kSmallestOctave = 96;  // exponent field of 2^-31, far below half of the smallest magnitude
constexpr float kShift = 4.656612873077392578125e-10F;  // 2^-31

// fma(a, slope, offset) of such magnitudes. Line i ends where line i + 1 begins, which is in an octave [2^e, 2^(e + 1))
// of its own, even together with the next one where e is even. Lanes with short tables have no line 0, and take what
// lies below 2^-22 for 2^-22: no rounding may tell.
constexpr int kPieces = 9;
constexpr uint32_t kTwoToMinus22 = 105U << 23;
struct PieceLines {
  uint32_t begin[kPieces];  // bits of each line's first magnitude
  float slope[kPieces], offset[kPieces];
  uint32_t carry[kOctaves];  // by octave: added to a magnitude's bits, it leaves its line's number from bit 23 on
  uint8_t first[16];         // by the upper 8 bits, of which 4 tell: the line, from 1 on, at the bottom of two octaves

  constexpr uint32_t piece(uint32_t bits) const {
    uint32_t piece = 0;
    for (int i = 1; i < kPieces; ++i) piece += bits >= begin[i];
    return piece;
  }

  // Makes the tables from the lines.
  constexpr void prepare() {
    for (uint32_t octave = 0; octave < kOctaves; ++octave) {
      const uint32_t bottom = (kSmallestOctave + octave) << 23, last = bottom + 0x7FFFFF, below = piece(bottom);
      const uint32_t to_carry = piece(last) == below ? 0 : 0x800000 - (begin[below + 1] & 0x7FFFFF);
      carry[octave] = (below << 23) - bottom + to_carry;
    }
    for (uint32_t top = kTwoToMinus22 >> 24; top < 64; ++top) {
      const uint32_t line = piece(top << 24);
      first[top % 16] = static_cast<uint8_t>(line < 1 ? 1 : line > kPieces - 2 ? kPieces - 2 : line);
    }
  }
};

// What lanes take the numbers of float8_e4m3fn for, NaN for 480: so many of these are one.
constexpr float kFloat8Unit = 256;

BNBOPS_NAMESPACE_END
