// The int8 operators of every device. A device says how it runs a job:
//   struct Device : OnCpu {  // or cuda::OnDevice
//     static constexpr int64_t kWeightPanel;  // rows or columns of a weight that are dequantized at a time
//     void quantize_rows(const Int8QuantJob&) const;
//     void quantize_columns(const Int8QuantJob&) const;
//     void dequantize(const Int8DequantJob&) const;
//     void multiply(const Tensor& codes, const Tensor& weight, Tensor& sums) const;
//     void multiply(const Tensor& codes, const Tensor& weight, const Int8Epilogue&) const;
//     void dequantize_sums(const int32_t* sums, const Int8Epilogue&) const;
//     void linear(Int8QuantJob, const Tensor& values, const Tensor& weight, Int8Epilogue) const;  // job: of the values
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "core/tensors.h"
#include "formats/int8.h"
#include "ops/jobs.h"

namespace bnbops {

template <class Device>
struct Int8Operators {
  // ---- quantization ----------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor> vectorwise_quant(const Tensor& A, double threshold) {
    check_quant({"int8_vectorwise_quant"}, A, threshold);
    return quantize_rows(Device(A), in_logical_order(A), threshold);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_quant(const Tensor& A, double threshold) {
    check_quant({"int8_double_quant"}, A, threshold);
    const Device device(A);
    const Tensor values = in_logical_order(A);
    const auto [row_codes, row_stats, is_outlier] = quantize_rows(device, values, threshold);
    Int8QuantJob job = quant_job(values, threshold);
    Tensor codes = torch::stable::new_empty(values, values.sizes(), ScalarType::Char);
    Tensor stats = torch::stable::new_empty(values, {job.inner}, ScalarType::Float);
    job.codes = mutable_data<int8_t>(codes);
    job.col_stats = mutable_data<float>(stats);
    device.quantize_columns(job);
    return {row_codes, codes, row_stats, stats, is_outlier};
  }

  static Tensor vectorwise_dequant(const Tensor& A, const Tensor& stats) {
    constexpr Operator op{"int8_vectorwise_dequant"};
    check_has_rows(op(A, "A").dtype(ScalarType::Char));
    check_stats(op(stats, "stats"), A, rows_of(A), "rows in A");
    const Tensor out = Device::new_result(A, A.sizes(), ScalarType::Float);
    return dequantized(Device(A), in_logical_order(A), in_logical_order(stats), 0, columns_of(A), out);
  }

  // ---- matrix products -------------------------------------------------------------------------------------------

  static Tensor linear_matmul(const Tensor& A, const Tensor& B) {
    check_matmul(kMatmul, A, B);
    Tensor out = new_product(A, B.size(0), ScalarType::Int);
    Device(A).multiply(in_logical_order(A), in_logical_order(B), out);
    return out;
  }

  static void linear_matmul_out(const Tensor& A, const Tensor& B, Tensor out) {
    check_matmul(kMatmul, A, B);
    check_out(kMatmul(out, "out"), ScalarType::Int, A, with_last(A, B.size(0)),
              [&] { return ", but A has " + shape_of(A) + " and B " + shape_of(B); },
              {kMatmul(A, "A"), kMatmul(B, "B")});
    if (out.is_contiguous()) return Device(A).multiply(in_logical_order(A), in_logical_order(B), out);
    torch::stable::copy_(out, linear_matmul(A, B));
  }

  static Tensor mm_dequant(const Tensor& A, const Tensor& row_stats, const Tensor& col_stats,
                           std::optional<ScalarType> dtype, const OptionalTensor& bias) {
    constexpr Operator op{"int8_mm_dequant"};
    check_has_rows(op(A, "A").dtype(ScalarType::Int));
    const ScalarType to = dtype.value_or(ScalarType::Half);
    check_scaling(op, A, columns_of(A), row_stats, col_stats, bias, to);
    const Device device(A);
    const Tensor sums = in_logical_order(A);
    Tensor out = new_product(A, columns_of(A), to);
    device.dequantize_sums(data_of<int32_t>(sums), Epilogue(row_stats, col_stats, bias, out));
    return out;
  }

  static Tensor scaled_mm(const Tensor& A, const Tensor& B, const Tensor& row_stats, const Tensor& col_stats,
                          const OptionalTensor& bias, std::optional<ScalarType> dtype) {
    constexpr Operator op{"int8_scaled_mm"};
    check_matmul(op, A, B);
    const ScalarType to = dtype.value_or(ScalarType::Half);
    check_scaling(op, A, B.size(0), row_stats, col_stats, bias, to);
    Tensor out = new_product(A, B.size(0), to);
    Device(A).multiply(in_logical_order(A), in_logical_order(B), Epilogue(row_stats, col_stats, bias, out));
    return out;
  }

  // ---- the linear layer ------------------------------------------------------------------------------------------

  static Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const OptionalTensor& bias,
                       double threshold) {
    constexpr Operator op{"linear_int8"};
    check_linear(op, x, weight, scale, bias);
    check_threshold(op, threshold);
    const Tensor values = in_logical_order(x), matrix = in_logical_order(weight);
    Tensor out = new_product(x, weight.size(0), x.scalar_type());
    Device(x).linear(quant_job(values, threshold), values, matrix, Epilogue(std::nullopt, scale, bias, out));
    return out;
  }

  // x @ W.T + bias in panels of W's rows, so that a large W is never whole in floating point.
  static Tensor linear_weight_only(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                   const OptionalTensor& bias) {
    check_linear({"linear_int8_weight_only"}, x, weight, scale, bias);
    const Device device(x);
    const Tensor matrix = in_logical_order(weight), scales = in_logical_order(scale);
    const int64_t rows = rows_of(x), outputs = weight.size(0), inner = weight.size(1);
    const Tensor rows_of_x = torch::stable::view(in_logical_order(x), {rows, inner});
    const Tensor scale_of_row = torch::stable::view(scales, {outputs});
    const Tensor out = torch::stable::new_empty(x, with_last(x, outputs));
    Tensor rows_of_out = torch::stable::view(out, {rows, outputs});
    for (int64_t begin = 0; begin < outputs; begin += Device::kWeightPanel) {
      const int64_t width = std::min(Device::kWeightPanel, outputs - begin);
      const auto of_panel = [&](Tensor whole) { return torch::stable::narrow(whole, 0, begin, width); };
      const Tensor panel = torch::stable::new_empty(x, {width, inner});
      dequantized(device, of_panel(matrix), of_panel(scale_of_row), 0, inner, panel);
      Tensor columns = torch::stable::narrow(rows_of_out, 1, begin, width);
      torch::stable::copy_(columns, dense_linear(rows_of_x, panel, bias ? OptionalTensor(of_panel(*bias)) : bias));
    }
    return out;
  }

  // grad @ W in panels of W's columns.
  static Tensor linear_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& scale) {
    constexpr Operator op{"linear_int8_input_grad"};
    check_has_rows(op(grad, "grad").floats());
    check_matrix(op(weight, "weight"), grad);
    BNBOPS_CHECK(columns_of(grad) == weight.size(0), op, "grad has shape ", shape_of(grad), ", but weight has ",
                 shape_of(weight), ": grad needs a column for each row of weight");
    check_stats(op(scale, "scale"), grad, weight.size(0), "rows in weight");
    const Device device(grad);
    const Tensor matrix = in_logical_order(weight), scales = in_logical_order(scale);
    const int64_t rows = rows_of(grad), outputs = weight.size(0), inner = weight.size(1);
    const Tensor rows_of_grad = torch::stable::view(in_logical_order(grad), {rows, outputs});
    const Tensor out = torch::stable::new_empty(grad, with_last(grad, inner));
    Tensor rows_of_out = torch::stable::view(out, {rows, inner});
    Tensor memory = torch::stable::new_empty(grad, {outputs * std::min(Device::kWeightPanel, inner)});
    for (int64_t begin = 0; begin < inner; begin += Device::kWeightPanel) {
      const int64_t width = std::min(Device::kWeightPanel, inner - begin);
      Tensor part = torch::stable::narrow(memory, 0, 0, outputs * width);
      const Tensor panel = torch::stable::view(part, {outputs, width});
      matrix_product(rows_of_grad, dequantized(device, matrix, scales, begin, width, panel),
                     torch::stable::narrow(rows_of_out, 1, begin, width));
    }
    return out;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("int8_vectorwise_quant", TORCH_BOX(&vectorwise_quant));
    m.impl("int8_vectorwise_dequant", TORCH_BOX(&vectorwise_dequant));
    m.impl("int8_double_quant", TORCH_BOX(&double_quant));
    m.impl("int8_linear_matmul", TORCH_BOX(&linear_matmul));
    m.impl("int8_linear_matmul.out", TORCH_BOX(&linear_matmul_out));
    m.impl("int8_mm_dequant", TORCH_BOX(&mm_dequant));
    m.impl("int8_scaled_mm", TORCH_BOX(&scaled_mm));
    m.impl("linear_int8", TORCH_BOX(&linear));
    m.impl("linear_int8_weight_only", TORCH_BOX(&linear_weight_only));
    m.impl("linear_int8_input_grad", TORCH_BOX(&linear_input_grad));
  }

 private:
  static constexpr Operator kMatmul{"int8_linear_matmul"};

  // ---- checks ----------------------------------------------------------------------------------------------------

  static void check_has_rows(const Argument& a) {
    BNBOPS_CHECK(a.tensor.dim() > 0, a, " must have at least one dimension, got a scalar");
  }

  static void check_matrix(const Argument& weight, const Tensor& first) {
    weight.dtype(ScalarType::Char).device_of(first);
    BNBOPS_CHECK(weight.tensor.dim() == 2, weight, " must have two dimensions, got ", shape_of(weight.tensor));
  }

  static void check_stats(const Argument& stats, const Tensor& first, int64_t count, const char* what) {
    stats.scales().device_of(first);
    BNBOPS_CHECK(stats.tensor.numel() == count, stats, " has ", stats.tensor.numel(), " elements, but there are ",
                 count, " ", what);
  }

  static void check_threshold(const Operator& op, double threshold) {
    BNBOPS_CHECK(threshold >= 0, op, "threshold must be positive, or 0 for none, got ", threshold);
  }

  static void check_quant(const Operator& op, const Tensor& A, double threshold) {
    check_has_rows(op(A, "A").floats());
    check_threshold(op, threshold);
  }

  // `a` [..., K] and the matrix `b` [N, K].
  static void check_inner(const Argument& a, const Argument& b) {
    const int64_t inner = columns_of(a.tensor);
    BNBOPS_CHECK(columns_of(b.tensor) == inner, b, " has shape ", shape_of(b.tensor), ", but ", a.name, " has ",
                 shape_of(a.tensor), ": their last dimensions must be equal");
    BNBOPS_CHECK(inner <= kMaxInt8Products, a, " has ", inner, " columns; an int32 holds the sum of at most ",
                 kMaxInt8Products, " products");
  }

  static void check_matmul(const Operator& op, const Tensor& A, const Tensor& B) {
    check_has_rows(op(A, "A").dtype(ScalarType::Char));
    check_matrix(op(B, "B"), A);
    check_inner(op(A, "A"), op(B, "B"));
  }

  static void check_scaling(const Operator& op, const Tensor& A, int64_t columns, const Tensor& row_stats,
                            const Tensor& col_stats, const OptionalTensor& bias, ScalarType dtype) {
    check_stats(op(row_stats, "row_stats"), A, rows_of(A), "rows");
    check_stats(op(col_stats, "col_stats"), A, columns, "columns");
    if (bias) op(*bias, "bias").floats().device_of(A).shape({columns});
    op.check_result_dtype(dtype);
  }

  static void check_linear(const Operator& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                           const OptionalTensor& bias) {
    check_has_rows(op(x, "x").floats());
    check_matrix(op(weight, "weight"), x);
    check_inner(op(x, "x"), op(weight, "weight"));
    check_stats(op(scale, "scale"), x, weight.size(0), "rows in weight");
    if (bias) op(*bias, "bias").floats().device_of(x).shape({weight.size(0)}).dtype(x.scalar_type());
  }

  // ---- jobs ------------------------------------------------------------------------------------------------------

  // An element is an outlier from the threshold on, as a float: from the first float that is not below it.
  static Int8QuantJob quant_job(const Tensor& values, double threshold) {
    auto nearest = static_cast<float>(std::min<double>(threshold, kFloatMax));
    if (nearest < threshold) nearest = std::nextafter(nearest, std::numeric_limits<float>::infinity());
    return {values.const_data_ptr(), dtype_of(values), rows_of(values),
            columns_of(values),      threshold > 0,    left_out_from(nearest)};
  }

  static std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Device& device, const Tensor& values,
                                                          double threshold) {
    Int8QuantJob job = quant_job(values, threshold);
    Tensor codes = Device::new_result(values, values.sizes(), ScalarType::Char);
    Tensor stats = torch::stable::new_empty(values, {job.rows}, ScalarType::Float);
    Tensor is_outlier = torch::stable::new_zeros(values, {job.inner}, ScalarType::Bool);
    job.row_stats = mutable_data<float>(stats);
    job.is_outlier = mutable_data<bool>(is_outlier);
    job.codes = mutable_data<int8_t>(codes);
    device.quantize_rows(job);
    return {codes, stats, is_outlier};
  }

  // Columns [begin, begin + width) of the values, [rows, width].
  static Tensor dequantized(const Device& device, const Tensor& codes, const Tensor& stats, int64_t begin,
                            int64_t width, const Tensor& out) {
    device.dequantize({data_of<int8_t>(codes), data_of<float>(stats), rows_of(codes), columns_of(codes), begin, width,
                       out.mutable_data_ptr(), dtype_of(out)});
    return out;
  }

  static Tensor new_product(const Tensor& A, int64_t columns, ScalarType dtype) {
    return Device::new_result(A, with_last(A, columns), dtype);
  }

  // What follows a product, and the tensors in logical order whose memory it reads.
  struct Epilogue : Int8Epilogue {
    OptionalTensor of_rows, of_bias;
    Tensor of_columns;

    Epilogue(const OptionalTensor& row_scales, const Tensor& column_scales, const OptionalTensor& biases,
             const Tensor& result)
        : Int8Epilogue{},
          of_rows(in_logical_order(row_scales)),
          of_bias(in_logical_order(biases)),
          of_columns(in_logical_order(column_scales)) {
      rows = rows_of(result);
      columns = columns_of(result);
      if (of_rows) row_stats = data_of<float>(*of_rows);
      col_stats = data_of<float>(of_columns);
      if (of_bias) bias = of_bias->const_data_ptr();
      if (of_bias) bias_dtype = dtype_of(*of_bias);
      out = result.mutable_data_ptr();
      dtype = dtype_of(result);
    }
  };
};

}  // namespace bnbops
