// CPU binding of the int8 operators.
#include "int8.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "cpu/binding.h"
#include "cpu/int8_kernels_table.h"
#include "cpu/memory.h"
#include "cpu/scratch.h"
#include "layout.h"

namespace bnbops::cpu {

namespace {

constexpr int64_t kGrain = 32768;           // elements worth a thread
constexpr int64_t kProductGrain = 1 << 18;  // products worth a thread

// Calls work(first, last) on ranges of n pieces of so many elements each.
template <class Work>
void in_parallel(int64_t n, int64_t elements, int64_t grain, const Work& work) {
  if (n == 0) return;
  torch::stable::parallel_for(0, n, divide_up(grain, std::max<int64_t>(elements, 1)), work);
}

// ---- quantization ----------------------------------------------------------------------------------------------

Int8QuantJob quant_job(const Tensor& values, double threshold) {
  Int8QuantJob job{};
  job.values = values.const_data_ptr();
  job.dtype = dtype_of(values);
  job.rows = rows_of(values);
  job.inner = columns_of(values);
  job.has_threshold = threshold > 0;
  job.threshold = static_cast<float>(std::min<double>(threshold, std::numeric_limits<float>::max()));
  if (job.threshold < threshold) job.threshold = std::nextafter(job.threshold, std::numeric_limits<float>::infinity());
  return job;
}

// Fills in the rows' absmax and the marks of outlier columns, and lists these columns.
std::vector<int64_t> scan_rows(const Int8QuantJob& job) {
  in_parallel(job.rows, job.inner, kGrain,
              [&](int64_t first, int64_t last) { isa().int8->scan_rows(job, first, last); });
  std::vector<int64_t> outliers;
  for (int64_t i = 0; job.has_threshold && i < job.inner; ++i) {
    if (job.is_outlier[i]) outliers.push_back(i);
  }
  return outliers;
}

void encode_rows(Int8QuantJob job, const std::vector<int64_t>& outliers) {
  job.outliers = outliers.data();
  job.outlier_count = static_cast<int64_t>(outliers.size());
  in_parallel(job.rows, job.inner, kGrain,
              [&](int64_t first, int64_t last) { isa().int8->encode_rows(job, first, last); });
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& values, double threshold) {
  Int8QuantJob job = quant_job(values, threshold);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), ScalarType::Char);
  Tensor stats = torch::stable::new_empty(values, {job.rows}, ScalarType::Float);
  Tensor is_outlier = torch::stable::new_zeros(values, {job.inner}, ScalarType::Bool);
  prefer_huge_pages(codes);
  job.row_stats = mutable_data<float>(stats);
  job.is_outlier = mutable_data<bool>(is_outlier);
  job.codes = mutable_data<int8_t>(codes);
  encode_rows(job, scan_rows(job));
  return {codes, stats, is_outlier};
}

std::tuple<Tensor, Tensor, Tensor> int8_vectorwise_quant(const Tensor& A, double threshold) {
  check_int8_quant("int8_vectorwise_quant", A, threshold);
  return quantize_rows(in_logical_order(A), threshold);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> int8_double_quant(const Tensor& A, double threshold) {
  check_int8_quant("int8_double_quant", A, threshold);
  const Tensor values = in_logical_order(A);
  const auto [row_codes, row_stats, is_outlier] = quantize_rows(values, threshold);
  Int8QuantJob job = quant_job(values, threshold);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), ScalarType::Char);
  Tensor stats = torch::stable::new_empty(values, {job.inner}, ScalarType::Float);
  job.codes = mutable_data<int8_t>(codes);
  job.col_stats = mutable_data<float>(stats);
  in_parallel(divide_up(job.inner, kInt8Piece), job.rows * kInt8Piece, kGrain,
              [&](int64_t first, int64_t last) { isa().int8->quantize_columns(job, first, last); });
  return {row_codes, codes, row_stats, stats, is_outlier};
}

// Columns [begin, begin + width) of the values, [rows, width].
Tensor dequantized(const Tensor& codes, const Tensor& stats, int64_t begin, int64_t width, Tensor out) {
  const Int8DequantJob job{data_of<int8_t>(codes), data_of<float>(stats), columns_of(codes), begin, width,
                           out.mutable_data_ptr(), dtype_of(out)};
  in_parallel(rows_of(codes), width, kGrain,
              [&](int64_t first, int64_t last) { isa().int8->dequantize(job, first, last); });
  return out;
}

Tensor int8_vectorwise_dequant(const Tensor& A, const Tensor& stats) {
  check_int8_dequant(A, stats);
  Tensor out = torch::stable::new_empty(A, A.sizes(), ScalarType::Float);
  prefer_huge_pages(out);
  return dequantized(in_logical_order(A), in_logical_order(stats), 0, columns_of(A), out);
}

// ---- matrix products -------------------------------------------------------------------------------------------

// Codes in the form that the kernels multiply.
struct Activations {
  int64_t rows, inner;
  Scratch<uint8_t> bytes;
  Scratch<int32_t> sums;

  Activations(int64_t row_count, int64_t columns)
      : rows(row_count),
        inner(columns),
        bytes(make_scratch<uint8_t>(rows * isa().int8->row_bytes(inner))),
        sums(make_scratch<int32_t>(rows)) {}
};

Activations prepared(const Tensor& codes) {
  Activations a(rows_of(codes), columns_of(codes));
  const Int8Kernels& kernels = *isa().int8;
  const int64_t row_bytes = kernels.row_bytes(a.inner);
  in_parallel(a.rows, a.inner, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      a.sums[row] = kernels.prepare(data_of<int8_t>(codes) + row * a.inner, a.inner, a.bytes.get() + row * row_bytes);
    }
  });
  return a;
}

void multiply(const Activations& a, const Tensor& weight, int32_t* sums, const Int8Epilogue* epilogue) {
  const Int8Kernels& kernels = *isa().int8;
  const Int8MatmulJob job{a.bytes.get(), a.sums.get(), data_of<int8_t>(weight), a.rows, weight.size(0), a.inner,
                          sums,          epilogue};
  const int64_t tiles = divide_up(job.columns, kInt8Panel) * divide_up(job.rows, kernels.row_block);
  const int64_t products = std::min(job.rows, kernels.row_block) * kInt8Panel * job.inner;
  in_parallel(tiles, products, kProductGrain, [&](int64_t first, int64_t last) { kernels.multiply(job, first, last); });
}

Tensor new_product(const Tensor& A, int64_t columns, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(A, with_last(A, columns), dtype);
  prefer_huge_pages(out);
  return out;
}

void matmul_into(const Tensor& A, const Tensor& B, Tensor& out) {
  const Tensor codes = in_logical_order(A), weight = in_logical_order(B);
  multiply(prepared(codes), weight, mutable_data<int32_t>(out), nullptr);
}

Tensor int8_linear_matmul(const Tensor& A, const Tensor& B) {
  check_int8_matmul("int8_linear_matmul", A, B);
  Tensor out = new_product(A, B.size(0), ScalarType::Int);
  matmul_into(A, B, out);
  return out;
}

void int8_linear_matmul_out(const Tensor& A, const Tensor& B, Tensor out) {
  check_int8_matmul("int8_linear_matmul", A, B);
  check_int8_matmul_out(A, B, out);
  if (out.is_contiguous()) return matmul_into(A, B, out);
  torch::stable::copy_(out, int8_linear_matmul(A, B));
}

// Tensors in logical order, which the caller keeps, to what the kernels want.
Int8Epilogue epilogue_of(const float* row_stats, const Tensor& col_stats, const std::optional<Tensor>& bias,
                         Tensor& out) {
  Int8Epilogue epilogue{};
  epilogue.row_stats = row_stats;
  epilogue.col_stats = data_of<float>(col_stats);
  if (bias) {
    epilogue.bias = bias->const_data_ptr();
    epilogue.bias_dtype = dtype_of(*bias);
  }
  epilogue.out = out.mutable_data_ptr();
  epilogue.dtype = dtype_of(out);
  return epilogue;
}

Tensor int8_mm_dequant(const Tensor& A, const Tensor& row_stats, const Tensor& col_stats,
                       std::optional<ScalarType> dtype, const std::optional<Tensor>& bias) {
  const ScalarType to = dtype.value_or(ScalarType::Half);
  check_int8_mm_dequant(A, row_stats, col_stats, bias, to);
  const Tensor sums = in_logical_order(A), rows = in_logical_order(row_stats);
  const Tensor columns = in_logical_order(col_stats);
  const std::optional<Tensor> biases = in_logical_order(bias);
  Tensor out = new_product(A, columns_of(A), to);
  const Int8Epilogue epilogue = epilogue_of(data_of<float>(rows), columns, biases, out);
  in_parallel(rows_of(A), columns_of(A), kGrain, [&](int64_t first, int64_t last) {
    isa().int8->dequantize_sums(data_of<int32_t>(sums), columns_of(A), epilogue, first, last);
  });
  return out;
}

Tensor int8_scaled_mm(const Tensor& A, const Tensor& B, const Tensor& row_stats, const Tensor& col_stats,
                      const std::optional<Tensor>& bias, std::optional<ScalarType> dtype) {
  const ScalarType to = dtype.value_or(ScalarType::Half);
  check_int8_matmul("int8_scaled_mm", A, B);
  check_int8_scales("int8_scaled_mm", A, rows_of(A), B.size(0), row_stats, col_stats, bias, to);
  const Tensor codes = in_logical_order(A), weight = in_logical_order(B);
  const Tensor rows = in_logical_order(row_stats), columns = in_logical_order(col_stats);
  const std::optional<Tensor> biases = in_logical_order(bias);
  Tensor out = new_product(A, B.size(0), to);
  const Int8Epilogue epilogue = epilogue_of(data_of<float>(rows), columns, biases, out);
  multiply(prepared(codes), weight, nullptr, &epilogue);
  return out;
}

// ---- the linear layer ------------------------------------------------------------------------------------------

Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                   double threshold) {
  check_linear_int8(x, weight, scale, bias, threshold);
  const Tensor values = in_logical_order(x), matrix = in_logical_order(weight);
  const Tensor scales = in_logical_order(scale);
  const std::optional<Tensor> biases = in_logical_order(bias);
  Int8QuantJob job = quant_job(values, threshold);
  const Activations a(job.rows, job.inner);
  const Scratch<float> row_stats = make_scratch<float>(job.rows);
  const std::unique_ptr<bool[]> is_outlier(new bool[job.inner]());
  job.row_stats = row_stats.get();
  job.is_outlier = is_outlier.get();
  const std::vector<int64_t> outliers = scan_rows(job);
  const Scratch<float> outlier_values = make_scratch<float>(job.rows * static_cast<int64_t>(outliers.size()));
  job.outlier_values = outlier_values.get();
  job.activations = a.bytes.get();
  job.activation_sums = a.sums.get();
  encode_rows(job, outliers);

  Tensor out = new_product(x, weight.size(0), x.scalar_type());
  Int8Epilogue epilogue = epilogue_of(row_stats.get(), scales, biases, out);
  epilogue.outliers = outliers.data();
  epilogue.outlier_count = static_cast<int64_t>(outliers.size());
  epilogue.outlier_values = outlier_values.get();
  multiply(a, matrix, nullptr, &epilogue);
  return out;
}

// grad @ W in panels of W's columns, so that W is never whole in floating point.
Tensor linear_int8_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& scale) {
  check_linear_int8_input_grad(grad, weight, scale);
  constexpr int64_t kPanel = 512;
  const Tensor matrix = in_logical_order(weight), scales = in_logical_order(scale);
  const int64_t rows = rows_of(grad), outputs = weight.size(0), inner = weight.size(1);
  const Tensor rows_of_grad = torch::stable::view(in_logical_order(grad), {rows, outputs});
  Tensor out = torch::stable::new_empty(grad, {rows, inner});
  Tensor memory = torch::stable::new_empty(grad, {outputs * std::min(kPanel, inner)});
  for (int64_t begin = 0; begin < inner; begin += kPanel) {
    const int64_t width = std::min(kPanel, inner - begin);
    Tensor part = torch::stable::narrow(memory, 0, 0, outputs * width);
    const Tensor panel = torch::stable::view(part, {outputs, width});
    matrix_product(rows_of_grad, dequantized(matrix, scales, begin, width, panel),
                   torch::stable::narrow(out, 1, begin, width));
  }
  return torch::stable::view(out, with_last(grad, inner));
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  m.impl("int8_vectorwise_quant", TORCH_BOX(&bnbops::cpu::int8_vectorwise_quant));
  m.impl("int8_vectorwise_dequant", TORCH_BOX(&bnbops::cpu::int8_vectorwise_dequant));
  m.impl("int8_double_quant", TORCH_BOX(&bnbops::cpu::int8_double_quant));
  m.impl("int8_linear_matmul", TORCH_BOX(&bnbops::cpu::int8_linear_matmul));
  m.impl("int8_linear_matmul.out", TORCH_BOX(&bnbops::cpu::int8_linear_matmul_out));
  m.impl("int8_mm_dequant", TORCH_BOX(&bnbops::cpu::int8_mm_dequant));
  m.impl("int8_scaled_mm", TORCH_BOX(&bnbops::cpu::int8_scaled_mm));
  m.impl("linear_int8", TORCH_BOX(&bnbops::cpu::linear_int8));
  m.impl("linear_int8_input_grad", TORCH_BOX(&bnbops::cpu::linear_int8_input_grad));
}
