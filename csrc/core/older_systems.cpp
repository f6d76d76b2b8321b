// What current compilers and headers call, and a system of manylinux_2_28 (glibc 2.28, the libraries of GCC 8) lacks.
// With these definitions in it, hidden, a library does not ask the system for them.
#include <new>
#include <sstream>

#include "core/older_glibc.h"

// glibc 2.29: exp and log that leave errno alone.
FROM_FIRST_GLIBC(exp, log);

#if defined(__GLIBC__) && defined(__GLIBCXX__)

#define HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: whether the process has one thread as yet, which spares reference counts their atomic operations. False
// is always right.
extern "C" {
HIDDEN char __libc_single_threaded = 0;
}

// GCC 11: what std::vector calls for more bytes than there are addresses.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
__asm__(".hidden _ZSt28__throw_bad_array_new_lengthv");  // the header's declaration forbids the attribute

// GCC 9: the constructors without arguments.
template HIDDEN std::ostringstream::basic_ostringstream();
template HIDDEN std::stringstream::basic_stringstream();

#endif
