// The int8 operators: their schemas, and the checks that all backends share.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "core/tensors.h"

namespace bnbops {

// The most products of two int8 whose sum an int32 holds for certain: 2^31 / 2^14, less one.
constexpr int64_t kMaxInt8Products = 131071;

void define_int8(torch::stable::detail::StableLibrary& m);

void check_int8_quant(const char* op, const Tensor& A, double threshold);
void check_int8_dequant(const Tensor& A, const Tensor& stats);
void check_int8_matmul(const char* op, const Tensor& A, const Tensor& B);
void check_int8_matmul_out(const Tensor& A, const Tensor& B, const Tensor& out);
// Of a product of `rows` rows and `columns` columns.
void check_int8_scales(const char* op, const Tensor& first, int64_t rows, int64_t columns, const Tensor& row_stats,
                       const Tensor& col_stats, const std::optional<Tensor>& bias, ScalarType dtype);
void check_int8_mm_dequant(const Tensor& A, const Tensor& row_stats, const Tensor& col_stats,
                           const std::optional<Tensor>& bias, ScalarType dtype);
void check_linear_int8(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias, double threshold = 0);
void check_linear_int8_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& scale);

}  // namespace bnbops
