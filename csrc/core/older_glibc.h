// FROM_FIRST_GLIBC(names): the library calls the first version of glibc's functions, which every system has, rather
// than the one that came with the glibc it is built on. Both do the same. Its calls go through hidden jumps of those
// names.
#pragma once

#include <cstddef>  // __GLIBC__

#if defined(__x86_64__)
#define BNBOPS_FIRST_GLIBC "GLIBC_2.2.5"
#define BNBOPS_JUMP "jmp first_\\name@PLT;"
#elif defined(__aarch64__)
#define BNBOPS_FIRST_GLIBC "GLIBC_2.17"
#define BNBOPS_JUMP "b first_\\name;"
#endif

#if defined(__GLIBC__) && defined(BNBOPS_FIRST_GLIBC)
#define FROM_GLIBC(version, ...)                        \
  __asm__(".pushsection .text; .irp name," #__VA_ARGS__ \
          ";"                                           \
          ".symver first_\\name,\\name@" version        \
          ";"                                           \
          ".globl \\name; .hidden \\name;"              \
          ".type \\name,@function; \\name:" BNBOPS_JUMP ".endr; .popsection;")
#define FROM_FIRST_GLIBC(...) FROM_GLIBC(BNBOPS_FIRST_GLIBC, __VA_ARGS__)
#else
#define FROM_GLIBC(version, ...) static_assert(true)
#define FROM_FIRST_GLIBC(...) static_assert(true)
#endif
