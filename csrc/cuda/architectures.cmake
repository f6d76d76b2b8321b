# CMAKE_CUDA_ARCHITECTURES, unless it or the environment variable CUDAARCHS says: every GPU from Ampere on that this nvcc
# compiles for, and PTX of the newest one for what comes after.
if(NOT CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code
    OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" known "${known}")
  foreach(architecture 80 86 89 90 100 120)
    if(sm_${architecture} IN_LIST known)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture}-real)
      set(newest ${architecture})
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
endif()
