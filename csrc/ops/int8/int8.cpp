#include "ops/int8/int8.h"

namespace bnbops {
namespace {

void check_has_rows(const Named& named) {
  BNBOPS_CHECK(named.tensor.dim() > 0, named, " must have at least one dimension, got a scalar");
}

void check_int8(const Named& named, const Tensor& first) {
  check_dtype(named, ScalarType::Char);
  check_same_device(named, first);
}

void check_matrix(const Named& named) {
  BNBOPS_CHECK(named.tensor.dim() == 2, named, " must have two dimensions, got ", shape_of(named.tensor));
}

void check_stats(const Named& named, const Tensor& first, int64_t count, const char* what) {
  check_scales(named);
  check_same_device(named, first);
  BNBOPS_CHECK(named.tensor.numel() == count, named, " has ", named.tensor.numel(), " elements, but there are ", count,
               " ", what);
}

void check_bias(const Named& named, const Tensor& first, int64_t columns) {
  check_float(named);
  check_same_device(named, first);
  BNBOPS_CHECK(named.tensor.dim() == 1 && named.tensor.numel() == columns, named, " must have shape [", columns,
               "], got ", shape_of(named.tensor));
}

void check_threshold(const char* op, double threshold) {
  BNBOPS_CHECK(threshold >= 0, "bnbops::", op, ": threshold must be positive, or 0 for none, got ", threshold);
}

// `a` [..., K] and `b` [N, K].
void check_inner(const Named& a, const Named& b) {
  const int64_t inner = columns_of(a.tensor);
  BNBOPS_CHECK(columns_of(b.tensor) == inner, b, " has shape ", shape_of(b.tensor), ", but ", a.argument, " has ",
               shape_of(a.tensor), ": their last dimensions must be equal");
  BNBOPS_CHECK(inner <= kMaxInt8Products, a, " has ", inner, " columns; an int32 holds the sum of at most ",
               kMaxInt8Products, " products");
}

}  // namespace

void define_int8(torch::stable::detail::StableLibrary& m) {
  m.def("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor)");
  m.def("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor");
  m.def("int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("int8_linear_matmul(Tensor A, Tensor B) -> Tensor");
  m.def("int8_linear_matmul.out(Tensor A, Tensor B, *, Tensor(a!) out) -> ()");
  m.def(
      "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
      "ScalarType? dtype=None) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, float threshold) -> Tensor");
  m.def("linear_int8_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("linear_int8_input_grad(Tensor grad, Tensor weight, Tensor scale) -> Tensor");
}

void check_int8_quant(const char* op, const Tensor& A, double threshold) {
  check_float({A, op, "A"});
  check_has_rows({A, op, "A"});
  check_threshold(op, threshold);
}

void check_int8_dequant(const Tensor& A, const Tensor& stats) {
  constexpr const char* kOp = "int8_vectorwise_dequant";
  check_int8({A, kOp, "A"}, A);
  check_has_rows({A, kOp, "A"});
  check_stats({stats, kOp, "stats"}, A, rows_of(A), "rows in A");
}

void check_int8_matmul(const char* op, const Tensor& A, const Tensor& B) {
  check_int8({A, op, "A"}, A);
  check_has_rows({A, op, "A"});
  check_int8({B, op, "B"}, A);
  check_matrix({B, op, "B"});
  check_inner({A, op, "A"}, {B, op, "B"});
}

void check_int8_matmul_out(const Tensor& A, const Tensor& B, const Tensor& out) {
  constexpr const char* kOp = "int8_linear_matmul";
  const Named named{out, kOp, "out"};
  check_dtype(named, ScalarType::Int);
  check_same_device(named, A);
  bool fits = out.dim() == A.dim() && columns_of(out) == B.size(0);
  for (int64_t d = 0; fits && d + 1 < A.dim(); ++d) fits = out.size(d) == A.size(d);
  BNBOPS_CHECK(fits, named, " has shape ", shape_of(out), ", but A has ", shape_of(A), " and B ", shape_of(B));
  for (int64_t d = 0; d < out.dim(); ++d) {
    BNBOPS_CHECK(out.size(d) < 2 || out.stride(d) != 0, named, " is expanded; its elements need memory of their own");
  }
  Overlaps overlaps;
  overlaps.reads({A, kOp, "A"});
  overlaps.reads({B, kOp, "B"});
  overlaps.writes(named);
  overlaps.check();
}

void check_int8_scales(const char* op, const Tensor& first, int64_t rows, int64_t columns, const Tensor& row_stats,
                       const Tensor& col_stats, const std::optional<Tensor>& bias, ScalarType dtype) {
  check_stats({row_stats, op, "row_stats"}, first, rows, "rows");
  check_stats({col_stats, op, "col_stats"}, first, columns, "columns");
  if (bias) check_bias({*bias, op, "bias"}, first, columns);
  BNBOPS_CHECK(is_float(dtype), "bnbops::", op, ": dtype must be float32, bfloat16 or float16, got ",
               dtype_name(dtype));
}

void check_int8_mm_dequant(const Tensor& A, const Tensor& row_stats, const Tensor& col_stats,
                           const std::optional<Tensor>& bias, ScalarType dtype) {
  constexpr const char* kOp = "int8_mm_dequant";
  check_dtype({A, kOp, "A"}, ScalarType::Int);
  check_has_rows({A, kOp, "A"});
  check_int8_scales(kOp, A, rows_of(A), columns_of(A), row_stats, col_stats, bias, dtype);
}

void check_linear_int8(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias, double threshold) {
  check_float({x, op, "x"});
  check_has_rows({x, op, "x"});
  check_int8({weight, op, "weight"}, x);
  check_matrix({weight, op, "weight"});
  check_inner({x, op, "x"}, {weight, op, "weight"});
  check_stats({scale, op, "scale"}, x, weight.size(0), "rows in weight");
  if (bias) {
    check_bias({*bias, op, "bias"}, x, weight.size(0));
    check_dtype({*bias, op, "bias"}, x.scalar_type());
  }
  check_threshold(op, threshold);
}

void check_linear_int8_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& scale) {
  constexpr const char* kOp = "linear_int8_input_grad";
  check_float({grad, kOp, "grad"});
  check_has_rows({grad, kOp, "grad"});
  check_int8({weight, kOp, "weight"}, grad);
  check_matrix({weight, kOp, "weight"});
  BNBOPS_CHECK(columns_of(grad) == weight.size(0), "bnbops::", kOp, ": grad has shape ", shape_of(grad),
               ", but weight has ", shape_of(weight), ": grad needs a column for each row of weight");
  check_stats({scale, kOp, "scale"}, grad, weight.size(0), "rows in weight");
}

}  // namespace bnbops
