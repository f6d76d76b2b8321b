// The int8 operators on the CPU.
#include <memory>

#include "cpu/binding.h"
#include "cpu/scratch.h"
#include "ops/int8/int8_binding.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kProductGrain = 1 << 18;  // products worth a thread

// Fills in the rows' absmax and the marks of outlier columns, and lists these columns.
std::vector<int64_t> scan_rows(const Int8QuantJob& job) {
  in_parallel(job.rows, job.inner, isa().int8->scan_rows, job);
  std::vector<int64_t> outliers;
  for (int64_t i = 0; job.has_threshold && i < job.inner; ++i) {
    if (job.is_outlier[i]) outliers.push_back(i);
  }
  return outliers;
}

void encode_rows(Int8EncodeJob job, const std::vector<int64_t>& outliers) {
  job.outliers = outliers.data();
  job.outlier_count = static_cast<int64_t>(outliers.size());
  in_parallel(job.rows, job.inner, isa().int8->encode_rows, job);
}

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
  in_parallel(a.rows, a.inner, kThreadElements, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      a.sums[row] = kernels.prepare(data_of<int8_t>(codes) + row * a.inner, a.inner, a.bytes.get() + row * row_bytes);
    }
  });
  return a;
}

void multiply_activations(const Activations& a, const Tensor& weight, int32_t* sums, const Int8Epilogue* epilogue,
                          const Int8Outliers& outliers = {}) {
  const Int8Kernels& kernels = *isa().int8;
  const Int8MatmulJob job{a.bytes.get(), a.sums.get(), data_of<int8_t>(weight), a.rows, weight.size(0), a.inner, sums,
                          epilogue,      outliers};
  const int64_t tiles = divide_up(job.columns, kInt8Panel) * divide_up(job.rows, kernels.row_block);
  const int64_t products = std::min(job.rows, kernels.row_block) * kInt8Panel * job.inner;
  in_parallel(tiles, products, kernels.multiply, job, kProductGrain);
}

struct Int8OnCpu : OnCpu {
  static constexpr int64_t kWeightPanel = 512;  // what caches hold

  using OnCpu::OnCpu;

  static void quantize_rows(const Int8QuantJob& job) { encode_rows({job}, scan_rows(job)); }

  static void quantize_columns(const Int8QuantJob& job) {
    in_parallel(divide_up(job.inner, kInt8Piece), job.rows * kInt8Piece, isa().int8->quantize_columns, job);
  }

  static void dequantize(const Int8DequantJob& job) { in_parallel(job.rows, job.width, isa().int8->dequantize, job); }

  static void multiply(const Tensor& codes, const Tensor& weight, Tensor& sums) {
    multiply_activations(prepared(codes), weight, mutable_data<int32_t>(sums), nullptr);
  }

  static void multiply(const Tensor& codes, const Tensor& weight, const Int8Epilogue& epilogue) {
    multiply_activations(prepared(codes), weight, nullptr, &epilogue);
  }

  static void dequantize_sums(const int32_t* sums, const Int8Epilogue& epilogue) {
    in_parallel(epilogue.rows, epilogue.columns, kThreadElements,
                [&](int64_t first, int64_t last) { isa().int8->dequantize_sums(sums, epilogue, first, last); });
  }

  static void linear(const Int8QuantJob& quant_job, const Tensor& /*values*/, const Tensor& weight,
                     Int8Epilogue epilogue) {
    Int8EncodeJob job{quant_job};
    const Activations a(job.rows, job.inner);
    const Scratch<float> row_stats = make_scratch<float>(job.rows);
    const std::unique_ptr<bool[]> is_outlier(new bool[job.inner]());
    job.row_stats = row_stats.get();
    job.is_outlier = is_outlier.get();
    const std::vector<int64_t> columns = scan_rows(job);
    const auto count = static_cast<int64_t>(columns.size());
    const Scratch<float> outlier_values = make_scratch<float>(job.rows * count);
    job.outlier_values = outlier_values.get();
    job.activations = a.bytes.get();
    job.activation_sums = a.sums.get();
    encode_rows(job, columns);
    epilogue.row_stats = row_stats.get();
    multiply_activations(a, weight, nullptr, &epilogue, {columns.data(), count, outlier_values.get()});
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::Int8Operators<bnbops::cpu::Int8OnCpu>::implement(m); }
