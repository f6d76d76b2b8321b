# TORCH_DIR, where torch is installed, and bnbops_torch, what a library of operators needs of it.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import os; from importlib.util import find_spec; print(os.path.dirname(find_spec('torch').origin))"
  OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

# libtorch's stable ABI: one binary for every torch from the oldest one on that pyproject.toml allows. Its headers are
# those of a later torch: they leave out what that oldest one lacks.
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/../pyproject.toml TORCH_REQUIREMENT REGEX "^dependencies = .*torch>=")
if(NOT TORCH_REQUIREMENT MATCHES "torch>=([0-9]+)\\.([0-9]+)\"")
  message(FATAL_ERROR "pyproject.toml: expected a line such as dependencies = [\"torch>=2.10\"]")
endif()
math(EXPR TORCH_TARGET_VERSION "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)
add_library(bnbops_torch INTERFACE)
target_compile_definitions(bnbops_torch INTERFACE TORCH_TARGET_VERSION=${TORCH_TARGET_VERSION})
target_compile_options(bnbops_torch INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/core/torch_errors.h>)
target_include_directories(bnbops_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_directories(bnbops_torch INTERFACE ${TORCH_DIR}/lib)
target_link_libraries(bnbops_torch INTERFACE -Wl,--no-as-needed torch torch_cpu)
