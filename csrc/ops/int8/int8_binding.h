// The int8 operators of every device. A device says how it runs a job, and what fresh memory needs:
//   struct Device {
//     static constexpr int64_t kWeightPanel;  // rows or columns of a weight that are dequantized at a time
//     explicit Device(const Tensor& like);      // makes its device current for as long as it lives
//     static void prepare(Tensor& fresh);
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
#include "ops/int8/int8.h"
#include "ops/int8/int8_jobs.h"

namespace bnbops {

template <class Device>
struct Int8Operators {
  // ---- quantization ----------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor> vectorwise_quant(const Tensor& A, double threshold) {
    check_int8_quant("int8_vectorwise_quant", A, threshold);
    return quantize_rows(Device(A), in_logical_order(A), threshold);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_quant(const Tensor& A, double threshold) {
    check_int8_quant("int8_double_quant", A, threshold);
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
    check_int8_dequant(A, stats);
    Tensor out = torch::stable::new_empty(A, A.sizes(), ScalarType::Float);
    Device::prepare(out);
    return dequantized(Device(A), in_logical_order(A), in_logical_order(stats), 0, columns_of(A), out);
  }

  // ---- matrix products -------------------------------------------------------------------------------------------

  static Tensor linear_matmul(const Tensor& A, const Tensor& B) {
    check_int8_matmul("int8_linear_matmul", A, B);
    Tensor out = new_product(A, B.size(0), ScalarType::Int);
    Device(A).multiply(in_logical_order(A), in_logical_order(B), out);
    return out;
  }

  static void linear_matmul_out(const Tensor& A, const Tensor& B, Tensor out) {
    check_int8_matmul("int8_linear_matmul", A, B);
    check_int8_matmul_out(A, B, out);
    if (out.is_contiguous()) return Device(A).multiply(in_logical_order(A), in_logical_order(B), out);
    torch::stable::copy_(out, linear_matmul(A, B));
  }

  static Tensor mm_dequant(const Tensor& A, const Tensor& row_stats, const Tensor& col_stats,
                           std::optional<ScalarType> dtype, const std::optional<Tensor>& bias) {
    const ScalarType to = dtype.value_or(ScalarType::Half);
    check_int8_mm_dequant(A, row_stats, col_stats, bias, to);
    const Device device(A);
    const Tensor sums = in_logical_order(A), rows = in_logical_order(row_stats);
    const Tensor columns = in_logical_order(col_stats);
    const std::optional<Tensor> biases = in_logical_order(bias);
    Tensor out = new_product(A, columns_of(A), to);
    device.dequantize_sums(data_of<int32_t>(sums), epilogue_of(data_of<float>(rows), columns, biases, out));
    return out;
  }

  static Tensor scaled_mm(const Tensor& A, const Tensor& B, const Tensor& row_stats, const Tensor& col_stats,
                          const std::optional<Tensor>& bias, std::optional<ScalarType> dtype) {
    const ScalarType to = dtype.value_or(ScalarType::Half);
    check_int8_matmul("int8_scaled_mm", A, B);
    check_int8_scales("int8_scaled_mm", A, rows_of(A), B.size(0), row_stats, col_stats, bias, to);
    const Device device(A);
    const Tensor codes = in_logical_order(A), weight = in_logical_order(B);
    const Tensor rows = in_logical_order(row_stats), columns = in_logical_order(col_stats);
    const std::optional<Tensor> biases = in_logical_order(bias);
    Tensor out = new_product(A, B.size(0), to);
    device.multiply(codes, weight, epilogue_of(data_of<float>(rows), columns, biases, out));
    return out;
  }

  // ---- the linear layer ------------------------------------------------------------------------------------------

  static Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                       double threshold) {
    check_linear_int8("linear_int8", x, weight, scale, bias, threshold);
    const Device device(x);
    const Tensor values = in_logical_order(x), matrix = in_logical_order(weight);
    const Tensor scales = in_logical_order(scale);
    const std::optional<Tensor> biases = in_logical_order(bias);
    Tensor out = new_product(x, weight.size(0), x.scalar_type());
    device.linear(quant_job(values, threshold), values, matrix, epilogue_of(nullptr, scales, biases, out));
    return out;
  }

  // x @ W.T + bias in panels of W's rows, so that a large W is never whole in floating point.
  static Tensor linear_weight_only(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                   const OptionalTensor& bias) {
    check_linear_int8("linear_int8_weight_only", x, weight, scale, bias);
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
      Tensor panel = torch::stable::new_empty(x, {width, inner});
      dequantized(device, of_panel(matrix), of_panel(scale_of_row), 0, inner, panel);
      Tensor columns = torch::stable::narrow(rows_of_out, 1, begin, width);
      torch::stable::copy_(columns, dense_linear(rows_of_x, panel, bias ? OptionalTensor(of_panel(*bias)) : bias));
    }
    return out;
  }

  // grad @ W in panels of W's columns.
  static Tensor linear_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& scale) {
    check_linear_int8_input_grad(grad, weight, scale);
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
  // An element is an outlier from the threshold on, as a float: from the first float that is not below it.
  static Int8QuantJob quant_job(const Tensor& values, double threshold) {
    auto nearest = static_cast<float>(std::min<double>(threshold, kFloatMax));
    if (nearest < threshold) nearest = std::nextafter(nearest, std::numeric_limits<float>::infinity());
    Int8QuantJob job{};
    job.values = values.const_data_ptr();
    job.dtype = dtype_of(values);
    job.rows = rows_of(values);
    job.inner = columns_of(values);
    job.has_threshold = threshold > 0;
    job.limit = left_out_from(nearest);
    return job;
  }

  static std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Device& device, const Tensor& values,
                                                          double threshold) {
    Int8QuantJob job = quant_job(values, threshold);
    Tensor codes = torch::stable::new_empty(values, values.sizes(), ScalarType::Char);
    Tensor stats = torch::stable::new_empty(values, {job.rows}, ScalarType::Float);
    Tensor is_outlier = torch::stable::new_zeros(values, {job.inner}, ScalarType::Bool);
    Device::prepare(codes);
    job.row_stats = mutable_data<float>(stats);
    job.is_outlier = mutable_data<bool>(is_outlier);
    job.codes = mutable_data<int8_t>(codes);
    device.quantize_rows(job);
    return {codes, stats, is_outlier};
  }

  // Columns [begin, begin + width) of the values, [rows, width].
  static Tensor dequantized(const Device& device, const Tensor& codes, const Tensor& stats, int64_t begin,
                            int64_t width, Tensor out) {
    device.dequantize({data_of<int8_t>(codes), data_of<float>(stats), rows_of(codes), columns_of(codes), begin, width,
                       out.mutable_data_ptr(), dtype_of(out)});
    return out;
  }

  static Tensor new_product(const Tensor& A, int64_t columns, ScalarType dtype) {
    Tensor out = torch::stable::new_empty(A, with_last(A, columns), dtype);
    Device::prepare(out);
    return out;
  }

  // Tensors in logical order, which the caller keeps, to what the kernels want.
  static Int8Epilogue epilogue_of(const float* row_stats, const Tensor& col_stats, const std::optional<Tensor>& bias,
                                  Tensor& out) {
    Int8Epilogue epilogue{};
    epilogue.rows = rows_of(out);
    epilogue.columns = columns_of(out);
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
};

}  // namespace bnbops
