// The operators on 4-bit weights on the CPU. Few rows are multiplied by a kernel that decodes the weight as it goes;
// many are worth decoding it once, for torch's own matrix product.
#include "cpu/binding.h"
#include "cpu/scratch.h"
#include "ops/weight_4bit/linear_4bit_binding.h"
#include "ops/weight_4bit/weight_4bit_binding.h"

namespace bnbops::cpu {
namespace {

// Writes elements [first, first + numel) of the weight to contiguous memory.
void dequantize_range(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype) {
  const auto kernel = isa().kernels->dequantize_4bit;
  const int64_t size = size_of(dtype);
  constexpr int64_t kLines = 64;  // elements; a multiple of it fills whole lines in every dtype
  const bool past_caches =
      first % kLines == 0 && weight.blocksize % kLines == 0 && worth_past_caches(out, numel * size);
  in_parallel(divide_up(numel, kChunk), kChunk, kThreadElements, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kChunk, to = std::min(numel, end * kChunk);
    kernel(weight, first + from, to - from, static_cast<uint8_t*>(out) + from * size, dtype, past_caches);
  });
}

struct Weight4bitOnCpu : OnCpu {
  using OnCpu::OnCpu;

  static void check_indices(const Tensor& indices, int64_t rows) {
    indices.scalar_type() == ScalarType::Long ? check_each<int64_t>(indices, rows) : check_each<int32_t>(indices, rows);
  }

  static void quantize(const QuantizeJob& job) {
    in_parallel(divide_up(job.numel, job.blocksize), job.blocksize, isa().kernels->quantize_4bit, job);
  }

  static void dequantize(const Weight4bit& weight, int64_t numel, void* out, DType dtype) {
    dequantize_range(weight, 0, numel, out, dtype);
  }

  static void look_up(const LookUpJob& job) {
    const auto kernel = isa().kernels->dequantize_4bit;
    const int64_t width = job.width, row_bytes = width * size_of(job.dtype);
    in_parallel(job.count, width, kThreadElements, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        auto* row = static_cast<uint8_t*>(job.out) + i * row_bytes;
        kernel(job.weight, job.index(i) * width, width, row, job.dtype, false);
      }
    });
  }

 private:
  template <class Index>
  static void check_each(const Tensor& indices, int64_t rows) {
    const auto* index = data_of<Index>(indices);
    for (int64_t i = 0; i < indices.numel(); ++i) {
      BNBOPS_CHECK(index[i] >= 0 && index[i] < rows, "bnbops::embedding_4bit: index ", index[i], " at position ", i,
                   " is out of range; the table has ", rows, " rows");
    }
  }
};

// ---- products ---------------------------------------------------------------------------------------------------

constexpr int64_t kThreadWeights = 65536;  // what is worth a thread
// Up to so many rows of activations, decoding the weight once for every eight of them is the fastest way.
constexpr int64_t kFewRows = 4, kFewRowsWithoutTiles = 32;

// One matrix [out_features, in_features] of a weight: all of it, or an expert's.
struct Matrix4bit {
  Weight4bit weight;
  int64_t first, out_features, in_features;
};

Tensor dense(const Matrix4bit& matrix, const Tensor& like) {
  Tensor out = OnCpu::new_result(like, {matrix.out_features, matrix.in_features}, like.scalar_type());
  dequantize_range(matrix.weight, matrix.first, out.numel(), out.mutable_data_ptr(), dtype_of(out));
  return out;
}

bool has_whole_blocks(const Matrix4bit& matrix) { return matrix.in_features % matrix.weight.blocksize == 0; }

bool takes_tiles(const Tensor& activations, const Matrix4bit& matrix) {
  return activations.scalar_type() == ScalarType::BFloat16 && has_whole_blocks(matrix) &&
         matrix.weight.blocksize >= kChunk32 && isa().tiles != nullptr;
}

// x is contiguous.
void few_rows_linear(const Tensor& x, const Matrix4bit& matrix, const void* bias, Tensor& out) {
  const Kernels& kernels = *isa().kernels;
  const int64_t rows = rows_of(x), features = matrix.in_features, stride = divide_up(features, kXPadding) * kXPadding;
  const Scratch<float> ordered = make_scratch<float>(rows * stride);
  for (int64_t row = 0; row < rows; ++row) {
    const auto* from = data_of<uint8_t>(x) + row * features * static_cast<int64_t>(x.element_size());
    kernels.order_for_codes(from, dtype_of(x), matrix.weight.format, features, stride, ordered.get() + row * stride);
  }
  const Linear4bitJob job{matrix.weight, matrix.first, features, matrix.out_features,    rows,
                          ordered.get(), stride,       bias,     out.mutable_data_ptr(), dtype_of(out)};
  in_parallel(matrix.out_features, features, kernels.linear_4bit, job, kThreadWeights);
}

// The weight of a matrix that begins with a block, as if it were alone. Nested scales are decoded into `scales`.
Weight4bit alone(const Matrix4bit& matrix, Tensor& scales) {
  Weight4bit weight = matrix.weight;
  const int64_t first = matrix.first / weight.blocksize;
  weight.codes += matrix.first / 2;
  if (weight.scales.absmax != nullptr) {
    weight.scales.absmax += first;
    return weight;
  }
  const int64_t blocks = matrix.out_features * matrix.in_features / weight.blocksize;
  scales = torch::stable::new_empty(scales, {blocks}, ScalarType::Float);
  auto* to = mutable_data<float>(scales);
  const Kernels& kernels = *isa().kernels;
  in_parallel(blocks, 1, kThreadWeights, [&](int64_t begin, int64_t end) {
    kernels.scales_4bit(matrix.weight.scales, first + begin, end - begin, to + begin);
  });
  weight.scales.absmax = to;
  return weight;
}

// `summed` is the activations' dimension, `kept` the result's.
void tile_product(const TileProduct& kernels, const Tensor& activations, const Matrix4bit& matrix, const void* bias,
                  int64_t summed, int64_t kept, Tensor& out) {
  const int64_t rows = rows_of(activations);
  const int64_t tiles = 2 * divide_up(rows, kTilePair) * divide_up(summed, kTilePair);
  Tensor packed = torch::stable::new_empty(activations, {tiles, kTile * kTilePair});
  Tensor scales = packed;
  const TileJob job{alone(matrix, scales),
                    matrix.out_features,
                    matrix.in_features,
                    rows,
                    data_of<uint16_t>(activations),
                    mutable_data<uint16_t>(packed),
                    static_cast<const uint16_t*>(bias),
                    mutable_data<uint16_t>(out)};
  in_parallel(tiles, kTile * kTilePair, kernels.pack, job);
  in_parallel(divide_up(kept, kTilePair), kTilePair * summed, kernels.multiply, job, kThreadWeights);
}

// x [..., in_features] to out [..., out_features], contiguous.
void linear_into(const Tensor& x, const Matrix4bit& matrix, const OptionalTensor& bias, Tensor& out) {
  const int64_t rows = rows_of(x);
  const bool tiles = takes_tiles(x, matrix);
  const bool few = has_whole_blocks(matrix) && rows <= (tiles ? kFewRows : kFewRowsWithoutTiles);
  if (!few && !tiles) {
    Tensor out_rows = as_matrix(out);
    torch::stable::copy_(out_rows, dense_linear(as_matrix(x), dense(matrix, x), bias));
    return;
  }
  const OptionalTensor own_bias = in_logical_order(bias);
  const void* bias_data = own_bias ? own_bias->const_data_ptr() : nullptr;
  const Tensor contiguous = in_logical_order(x);
  if (few) return few_rows_linear(contiguous, matrix, bias_data, out);
  tile_product(isa().tiles->linear, contiguous, matrix, bias_data, matrix.in_features, matrix.out_features, out);
}

// gradient [..., out_features] to out [..., in_features], contiguous.
void input_grad_into(const Tensor& gradient, const Matrix4bit& matrix, Tensor& out) {
  if (takes_tiles(gradient, matrix)) {
    tile_product(isa().tiles->input_grad, in_logical_order(gradient), matrix, nullptr, matrix.out_features,
                 matrix.in_features, out);
  } else {
    matrix_product(as_matrix(gradient), dense(matrix, gradient), as_matrix(out));
  }
}

// Where each expert's rows end, after a check that they are in order and exist.
std::vector<int64_t> ends_of(const Operator& op, const Tensor& offsets, int64_t rows) {
  std::vector<int64_t> ends;
  int64_t previous = 0;
  for (int64_t expert = 0; expert < offsets.numel(); ++expert) {
    const int64_t end = data_of<int32_t>(offsets)[expert];
    BNBOPS_CHECK(end >= previous && end <= rows, op, "offsets must not decrease and not exceed the ", rows,
                 " rows, but offsets[", expert, "] = ", end, " after ", previous);
    ends.push_back(end);
    previous = end;
  }
  return ends;
}

struct Linear4bitOnCpu {
  static Tensor multiply(const Product4bit& product) {
    if (product.offsets) return multiply_by_experts(product);
    return by_rows(product.x, product.kept(), [&](const Tensor& x, Tensor& out) {
      multiply_into(product, x, matrix_of(product, 0), product.bias, out);
    });
  }

 private:
  static Matrix4bit matrix_of(const Product4bit& product, int64_t expert) {
    const int64_t out_features = product.out_features(), in_features = product.in_features();
    return {kernel_view(product.weight), expert * out_features * in_features, out_features, in_features};
  }

  static void multiply_into(const Product4bit& product, const Tensor& x, const Matrix4bit& matrix,
                            const OptionalTensor& bias, Tensor& out) {
    product.is_gradient ? input_grad_into(x, matrix, out) : linear_into(x, matrix, bias, out);
  }

  static Tensor multiply_by_experts(const Product4bit& product) {
    const int64_t rows = product.x.size(0);
    Tensor x = product.x, out = torch::stable::new_empty(x, {rows, product.kept()});
    int64_t begin = 0, expert = 0;
    for (const int64_t end : ends_of(product.weight.op, *product.offsets, rows)) {
      Tensor part = torch::stable::narrow(out, 0, begin, end - begin);
      OptionalTensor bias = product.bias;
      if (bias) bias = torch::stable::select(*bias, 0, expert);
      if (end > begin) {
        const Tensor own = torch::stable::narrow(x, 0, begin, end - begin);
        multiply_into(product, own, matrix_of(product, expert), bias, part);
      }
      begin = end;
      ++expert;
    }
    Tensor rest = torch::stable::narrow(out, 0, begin, rows - begin);
    torch::stable::zero_(rest);
    return out;
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  bnbops::Weight4bitOperators<bnbops::cpu::Weight4bitOnCpu>::implement(m);
  bnbops::Linear4bitOperators<bnbops::cpu::Linear4bitOnCpu>::implement(m);
}
