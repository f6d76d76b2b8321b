// FROM_FIRST_GLIBC(name): the library calls the first version of glibc's function, which every system has, rather than
// the one that came with the glibc it is built on. Both do the same. Its calls go through a hidden jump of that name.
#pragma once

#include <cstddef>  // __GLIBC__

#if defined(__x86_64__)
#define BNBOPS_FIRST_GLIBC "GLIBC_2.2.5"
#define BNBOPS_JUMP_TO(name) "jmp " name "@PLT;"
#elif defined(__aarch64__)
#define BNBOPS_FIRST_GLIBC "GLIBC_2.17"
#define BNBOPS_JUMP_TO(name) "b " name ";"
#endif

#if defined(__GLIBC__) && defined(BNBOPS_FIRST_GLIBC)
#define FROM_GLIBC(version, name)                  \
  __asm__(                                         \
      ".pushsection .text;"                        \
      ".symver first_" #name "," #name "@" version \
      ";"                                          \
      ".globl " #name                              \
      ";"                                          \
      ".hidden " #name                             \
      ";"                                          \
      ".type " #name ",@function;" #name ":" BNBOPS_JUMP_TO("first_" #name) ".popsection;")
#define FROM_FIRST_GLIBC(name) FROM_GLIBC(BNBOPS_FIRST_GLIBC, name)
#else
#define FROM_GLIBC(version, name) static_assert(true)
#define FROM_FIRST_GLIBC(name) static_assert(true)
#endif
