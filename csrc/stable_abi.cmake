# TORCH_DIR, where torch is installed, and bnbops_torch, what a library of operators needs of it.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import os; from importlib.util import find_spec; print(os.path.dirname(find_spec('torch').origin))"
  OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

# libtorch's stable ABI: one binary for every torch from 2.13 on.
add_library(bnbops_torch INTERFACE)
target_compile_definitions(bnbops_torch INTERFACE TORCH_TARGET_VERSION=0x020d000000000000)
target_include_directories(bnbops_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_directories(bnbops_torch INTERFACE ${TORCH_DIR}/lib)
target_link_libraries(bnbops_torch INTERFACE -Wl,--no-as-needed torch torch_cpu)
