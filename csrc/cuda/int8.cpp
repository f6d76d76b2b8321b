// The int8 operators on CUDA devices. Nothing waits for the device: how many outlier columns there are, it alone knows.
#include "cuda/binding.h"
#include "cuda/kernels.h"
#include "ops/int8/int8_binding.h"

namespace bnbops::cuda {
namespace {

// Whether torch's own product takes these matrices: what _int_mm_out_cuda (ATen/native/cuda/Blas.cpp) asks for, and
// memory that suits cuBLASLt's fast kernels. Up to 16 rows, reading the weight is all that takes time.
bool suits_torch(const Tensor& codes, const Tensor& weight, int64_t rows) {
  const int64_t columns = weight.size(0), inner = weight.size(1);
  return rows > 16 && columns > 0 && columns % 8 == 0 && inner > 0 && inner % 8 == 0 && is_aligned(codes) &&
         is_aligned(weight);
}

// sums = codes @ weight.T, all of them matrices.
void torch_product(const Tensor& codes, const Tensor& weight, const Tensor& sums) {
  matrix_product(codes, torch::stable::transpose(weight, 0, 1), sums, "aten::_int_mm");
}

Tensor as_matrix(const Tensor& tensor) { return torch::stable::view(tensor, {rows_of(tensor), columns_of(tensor)}); }

struct Int8OnCuda : OnDevice {
  static constexpr int64_t kWeightPanel = 8192;  // large enough for a fast product

  using OnDevice::OnDevice;

  void quantize_rows(const Int8QuantJob& job) const {
    check_launch(cuda::quantize_rows(job, stream()), "int8 quantization of ", job.rows, " rows of ", job.inner);
  }

  void quantize_columns(const Int8QuantJob& job) const {
    check_launch(cuda::quantize_columns(job, stream()), "int8 quantization of ", job.inner, " columns of ", job.rows);
  }

  void dequantize(const Int8DequantJob& job) const {
    check_launch(cuda::dequantize(job, stream()), "int8 dequantization of ", job.rows, " rows of ", job.width);
  }

  void multiply(const Tensor& codes, const Tensor& weight, Tensor& sums) const {
    if (suits_torch(codes, weight, rows_of(codes))) {
      return torch_product(as_matrix(codes), weight, as_matrix(sums));
    }
    multiply_by_kernel(codes, weight, mutable_data<int32_t>(sums), {}, {});
  }

  void multiply(const Tensor& codes, const Tensor& weight, const Int8Epilogue& epilogue,
                const Int8Outliers& outliers = {}) const {
    if (!suits_torch(codes, weight, epilogue.rows)) {
      return multiply_by_kernel(codes, weight, nullptr, epilogue, outliers);
    }
    Tensor sums = torch::stable::new_empty(codes, {epilogue.rows, epilogue.columns}, ScalarType::Int);
    torch_product(as_matrix(codes), weight, sums);
    dequantize_sums(data_of<int32_t>(sums), epilogue, outliers);
  }

  void dequantize_sums(const int32_t* sums, const Int8Epilogue& epilogue, const Int8Outliers& outliers = {}) const {
    check_launch(cuda::dequantize_sums(sums, epilogue, outliers, stream()), "int8_mm_dequant of ", epilogue.rows,
                 " rows of ", epilogue.columns);
  }

  void linear(Int8QuantJob job, const Tensor& values, const Tensor& weight, Int8Epilogue epilogue) const {
    Tensor codes = torch::stable::new_empty(values, values.sizes(), ScalarType::Char);
    Tensor row_stats = torch::stable::new_empty(values, {job.rows}, ScalarType::Float);
    job.codes = mutable_data<int8_t>(codes);
    epilogue.row_stats = job.row_stats = mutable_data<float>(row_stats);
    if (!job.has_threshold) {
      quantize_rows(job);
      return multiply(codes, weight, epilogue);
    }
    Tensor is_outlier = torch::stable::new_zeros(values, {job.inner}, ScalarType::Bool);
    Tensor listed = torch::stable::new_empty(values, {job.inner + 1}, ScalarType::Int);
    job.is_outlier = mutable_data<bool>(is_outlier);
    quantize_rows(job);
    auto* count = mutable_data<int32_t>(listed);
    const Int8Outliers outliers{job.values, count + 1, count, data_of<int8_t>(weight), job.inner};
    check_launch(list_outliers(job.is_outlier, job.inner, count + 1, count, stream()), "linear_int8 of ", job.rows,
                 " rows of ", job.inner);
    multiply(codes, weight, epilogue, outliers);
  }

 private:
  void multiply_by_kernel(const Tensor& codes, const Tensor& weight, int32_t* sums, const Int8Epilogue& epilogue,
                          const Int8Outliers& outliers) const {
    const int64_t rows = rows_of(codes), columns = weight.size(0), inner = weight.size(1);
    const Int8ProductJob job{
        data_of<int8_t>(codes), data_of<int8_t>(weight), rows, columns, inner, sums, epilogue, outliers};
    check_launch(cuda::multiply(job, stream()), "int8 product of ", rows, " rows with ", columns, " of ", inner);
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::Int8Operators<bnbops::cuda::Int8OnCuda>::implement(m);
}
