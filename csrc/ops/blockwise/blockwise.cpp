#include "ops/blockwise/blockwise.h"

namespace bnbops {

void check_quantize(const Tensor& A, const Tensor& code, int64_t blocksize) {
  constexpr const char* kOp = "quantize_blockwise";
  check_float({A, kOp, "A"});
  check_codebook({code, kOp, "code"}, A);
  BNBOPS_CHECK(blocksize > 0, "bnbops::", kOp, ": blocksize must be positive, got ", blocksize);
}

void check_dequantize(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize, ScalarType dtype) {
  constexpr const char* kOp = "dequantize_blockwise";
  check_dtype({A, kOp, "A"}, ScalarType::Byte);
  check_codebook({code, kOp, "code"}, A);
  BNBOPS_CHECK(blocksize > 0, "bnbops::", kOp, ": blocksize must be positive, got ", blocksize);
  const Named named{absmax, kOp, "absmax"};
  check_dtype(named, ScalarType::Float);
  check_same_device(named, A);
  const int64_t blocks = divide_up(A.numel(), blocksize);
  BNBOPS_CHECK(absmax.numel() == blocks, named, " has ", absmax.numel(), " elements, but ", A.numel(),
               " codes in blocks of ", blocksize, " need ", blocks);
  BNBOPS_CHECK(is_float(dtype), "bnbops::", kOp, ": dtype must be float32, bfloat16 or float16, got ",
               dtype_name(dtype));
}

void check_dequantize_out(const Tensor& A, const Tensor& absmax, const Tensor& code, ScalarType dtype,
                          const Tensor& out) {
  constexpr const char* kOp = "dequantize_blockwise";
  const Named named{out, kOp, "out"};
  check_dtype(named, dtype);
  check_same_device(named, A);
  BNBOPS_CHECK(same_shape(out, A), named, " has shape ", shape_of(out), ", but A has ", shape_of(A));
  check_not_expanded(named);
  Overlaps overlaps;
  overlaps.reads({A, kOp, "A"});
  overlaps.reads({absmax, kOp, "absmax"});
  overlaps.reads({code, kOp, "code"});
  overlaps.writes(named);
  overlaps.check();
}

}  // namespace bnbops
