# Sources that more than one library is made of, relative to this folder.

# The schemas of all operators, and what their tables say.
set(BNBOPS_SCHEMAS ops/ops.cpp ops/facts.cpp)

# The argument checks, which every backend has in it.
set(BNBOPS_CHECKS core/check.cpp ops/optimizer/optimizer.cpp ops/weight_4bit/weight_4bit.cpp)

# The CUDA backend. The bindings call what the kernel files define; tests/cuda_on_cpu builds the same files.
set(BNBOPS_CUDA_KERNELS cuda/blockwise.cu cuda/weight_4bit.cu cuda/int8_quantize.cu cuda/int8_product.cu
  cuda/linear_4bit_gemv.cu cuda/linear_4bit_mma.cu cuda/grouped_product.cu cuda/norms.cu cuda/optimizer.cu
  cuda/state_codes.cu)
set(BNBOPS_CUDA_BINDINGS cuda/blockwise.cpp cuda/weight_4bit.cpp cuda/int8.cpp cuda/optimizer.cpp cuda/managed.cpp)
