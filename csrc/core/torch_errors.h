// What torch says when a call of its C interface fails. Its headers ask for that only in libraries that need
// torch 2.13. This one runs on older torch, too, and asks wherever there is something to ask. Included before all else.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // since torch 2.13

namespace bnbops {

[[noreturn, maybe_unused]] static void throw_torch_error(const char* call) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
  throw std::runtime_error(std::string(call) + " failed; torch wrote why to stderr");
}

}  // namespace bnbops

#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call)                               \
  if ((call) != TORCH_SUCCESS) { /* braces: torch's headers add no `;` */ \
    ::bnbops::throw_torch_error(#call);                                   \
  }
