// The products with 4-bit weights, on CUDA devices. Few rows go through kernels that decode the weight as they
// multiply; many are worth decoding it once, for torch's own matrix product. Products of experts always go through
// kernels: only the device knows which rows are whose.
#include "ops/weight_4bit/linear_4bit_binding.h"

#include "cuda/binding.h"
#include "cuda/linear_4bit_kernels.h"
#include "cuda/weight_4bit_kernels.h"

namespace bnbops::cuda {
namespace {

// The weight in the dtype of `like`, as a matrix with in_features columns.
Tensor dense(const OnDevice& device, const Weight4bitArguments& arguments, const Tensor& like) {
  const std::vector<int64_t>& shape = arguments.shape;
  const int64_t columns = shape.back(), rows = shape.size() == 2 ? shape[0] : shape[0] * shape[1];
  Tensor out = torch::stable::new_empty(like, {rows, columns});
  check_launch(
      dequantize_4bit(kernel_view(arguments), out.numel(), out.mutable_data_ptr(), dtype_of(out), device.stream()),
      arguments.op.name, " with a weight of ", rows, " x ", columns);
  return out;
}

// In logical order, and aligned as new tensors are.
Tensor aligned(const Tensor& tensor) {
  const Tensor ordered = in_logical_order(tensor);
  return is_aligned(ordered) ? ordered : torch::stable::clone(ordered);
}

// What is known before there are tensors: enough to choose a kernel.
Linear4bitJob job_of(const Weight4bitArguments& arguments, const Tensor& x, const Grouping& grouping) {
  Linear4bitJob job{};
  job.weight = kernel_view(arguments);
  job.out_features = arguments.shape[arguments.shape.size() - 2];
  job.in_features = arguments.shape.back();
  job.grouping = grouping;
  job.dtype = dtype_of(x);
  return job;
}

Tensor multiply(const OnDevice& device, const char* op, Linear4bitJob job, const Tensor& x,
                const OptionalTensor& bias) {
  const Tensor activations = aligned(x);
  const OptionalTensor own_bias = in_logical_order(bias);
  Tensor out = torch::stable::new_empty(x, with_last(x, job.out_features));
  job.x = activations.const_data_ptr();
  job.bias = own_bias ? own_bias->const_data_ptr() : nullptr;
  job.out = out.mutable_data_ptr();
  const auto kernel = takes_tensor_cores(job) ? linear_4bit_tensor_cores : linear_4bit_gemv;
  check_launch(kernel(job, device.stream()), op, " of ", job.grouping.rows, " rows with ", job.grouping.experts, " x ",
               job.out_features, " x ", job.in_features, " weights");
  return out;
}

Grouping grouping_of(const Tensor& x, const Tensor& offsets) {
  return {x.size(0), offsets.numel(), data_of<int32_t>(offsets)};
}

struct Linear4bitOnCuda {
  static Tensor linear(const Tensor& x, const Weight4bitArguments& arguments, const OptionalTensor& bias) {
    const OnDevice device(x);
    const Linear4bitJob job = job_of(arguments, x, {rows_of(x), 1, nullptr});
    const bool few = rows_of(x) <= (takes_tensor_cores(job) ? kTensorRows : kGemvRows);
    return few ? multiply(device, arguments.op.name, job, x, bias) : dense_linear(x, dense(device, arguments, x), bias);
  }

  static Tensor input_grad(const Tensor& grad, const Weight4bitArguments& arguments) {
    const OnDevice device(grad);
    return by_rows(grad, arguments.shape[1],
                   [&](const Tensor& rows, Tensor& out) { matrix_product(rows, dense(device, arguments, grad), out); });
  }

  static Tensor grouped_linear(const Tensor& x, const Weight4bitArguments& arguments, const OptionalTensor& bias,
                               const Tensor& offsets) {
    const OnDevice device(x);
    if (offsets.numel() == 0) return torch::stable::new_zeros(x, {x.size(0), arguments.shape[1]});
    return multiply(device, arguments.op.name, job_of(arguments, x, grouping_of(x, offsets)), x, bias);
  }

  static Tensor grouped_input_grad(const Tensor& grad, const Weight4bitArguments& arguments, const Tensor& offsets) {
    const OnDevice device(grad);
    if (offsets.numel() == 0) return torch::stable::new_zeros(grad, {grad.size(0), arguments.shape[2]});
    const Tensor ordered = in_logical_order(grad), weight = dense(device, arguments, grad);
    const int64_t inner = arguments.shape[1], columns = arguments.shape[2];
    Tensor out = torch::stable::new_empty(grad, {grad.size(0), columns});
    const GroupedProductJob job{
        grouping_of(grad, offsets), inner,         columns, ordered.const_data_ptr(), weight.const_data_ptr(),
        out.mutable_data_ptr(),     dtype_of(grad)};
    check_launch(grouped_product(job, device.stream()), arguments.op.name, " of ", grad.size(0), " rows");
    return out;
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::Linear4bitOperators<bnbops::cuda::Linear4bitOnCuda>::implement(m);
}
