// The operators on 4-bit weights on CUDA devices. Few rows of activations go through kernels that decode the weight as
// they multiply; many are worth decoding it once, for torch's own matrix product. Products of experts always go through
// kernels: only the device knows which rows are whose.
#include "cuda/binding.h"
#include "cuda/kernels.h"
#include "ops/weight_4bit/linear_4bit_binding.h"
#include "ops/weight_4bit/weight_4bit_binding.h"

namespace bnbops::cuda {
namespace {

struct Weight4bitOnCuda : OnDevice {
  using OnDevice::OnDevice;

  static void check_indices(const Tensor& /*indices*/, int64_t /*rows*/) {}  // the kernel does

  void quantize(const QuantizeJob& job) const {
    check_launch(quantize_4bit(job, stream()), "quantize_4bit of ", job.numel, " elements in blocks of ",
                 job.blocksize);
  }
  void dequantize(const Weight4bit& weight, int64_t numel, void* out, DType dtype) const {
    check_launch(dequantize_4bit(weight, numel, out, dtype, stream()), "dequantize_4bit of ", numel,
                 " elements in blocks of ", weight.blocksize);
  }
  void look_up(const LookUpJob& job) const {
    check_launch(look_up_4bit(job, stream()), "embedding_4bit of ", job.count, " rows of ", job.width, " elements");
  }
};

// ---- products ------------------------------------------------------------------------------------------------------

// The weight in the activations' dtype, as a matrix with in_features columns.
Tensor dense(const OnDevice& device, const Product4bit& product) {
  const int64_t columns = product.in_features();
  const int64_t rows = product.out_features() * (product.offsets ? product.offsets->numel() : 1);
  Tensor out = torch::stable::new_empty(product.x, {rows, columns});
  check_launch(
      dequantize_4bit(kernel_view(product.weight), out.numel(), out.mutable_data_ptr(), dtype_of(out), device.stream()),
      product.weight.op.name, " with a weight of ", rows, " x ", columns);
  return out;
}

// In logical order, and aligned as new tensors are.
Tensor aligned(const Tensor& tensor) {
  const Tensor ordered = in_logical_order(tensor);
  return is_aligned(ordered) ? ordered : torch::stable::clone(ordered);
}

// What is known before there are tensors: enough to choose a kernel.
Linear4bitJob job_of(const Product4bit& product, const Grouping& grouping) {
  Linear4bitJob job{};
  job.weight = kernel_view(product.weight);
  job.out_features = product.out_features();
  job.in_features = product.in_features();
  job.grouping = grouping;
  job.dtype = dtype_of(product.x);
  return job;
}

Tensor multiply_by_kernel(const OnDevice& device, Linear4bitJob job, const Product4bit& product) {
  const Tensor activations = aligned(product.x);
  const OptionalTensor own_bias = in_logical_order(product.bias);
  Tensor out = torch::stable::new_empty(product.x, with_last(product.x, job.out_features));
  job.x = activations.const_data_ptr();
  job.bias = own_bias ? own_bias->const_data_ptr() : nullptr;
  job.out = out.mutable_data_ptr();
  const auto kernel = takes_tensor_cores(job) ? linear_4bit_tensor_cores : linear_4bit_gemv;
  check_launch(kernel(job, device.stream()), product.weight.op.name, " of ", job.grouping.rows, " rows with ",
               job.grouping.experts, " x ", job.out_features, " x ", job.in_features, " weights");
  return out;
}

struct Linear4bitOnCuda {
  static Tensor multiply(const Product4bit& product) {
    const Tensor& x = product.x;
    const OnDevice device(x);
    if (product.offsets && product.offsets->numel() == 0) {
      return torch::stable::new_zeros(x, {x.size(0), product.kept()});
    }
    return product.is_gradient ? input_grad(device, product) : linear(device, product);
  }

 private:
  static Grouping grouping_of(const Product4bit& product) {
    if (!product.offsets) return {rows_of(product.x), 1, nullptr};
    return {product.x.size(0), product.offsets->numel(), data_of<int32_t>(*product.offsets)};
  }

  static Tensor linear(const OnDevice& device, const Product4bit& product) {
    const Linear4bitJob job = job_of(product, grouping_of(product));
    const int64_t few = takes_tensor_cores(job) ? kTensorRows : kGemvRows;
    if (product.offsets || rows_of(product.x) <= few) return multiply_by_kernel(device, job, product);
    return dense_linear(product.x, dense(device, product), product.bias);
  }

  static Tensor input_grad(const OnDevice& device, const Product4bit& product) {
    const Tensor& grad = product.x;
    if (!product.offsets) {
      return by_rows(grad, product.kept(), [&](const Tensor& x, Tensor& out) {
        matrix_product(as_matrix(x), dense(device, product), as_matrix(out));
      });
    }
    const Tensor ordered = in_logical_order(grad), weight = dense(device, product);
    Tensor out = torch::stable::new_empty(grad, {grad.size(0), product.kept()});
    const GroupedProductJob job{
        grouping_of(product),    product.summed(),       product.kept(), ordered.const_data_ptr(),
        weight.const_data_ptr(), out.mutable_data_ptr(), dtype_of(grad)};
    check_launch(grouped_product(job, device.stream()), product.weight.op.name, " of ", grad.size(0), " rows");
    return out;
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::Weight4bitOperators<bnbops::cuda::Weight4bitOnCuda>::implement(m);
  bnbops::Linear4bitOperators<bnbops::cuda::Linear4bitOnCuda>::implement(m);
}
