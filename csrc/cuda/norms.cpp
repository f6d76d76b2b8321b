// The norm operators on CUDA devices.
#include "ops/norms/norms.h"

#include <torch/csrc/stable/library.h>

#include "core/layout.h"
#include "cuda/binding.h"
#include "cuda/norm_kernels.h"

namespace bnbops::cuda {
namespace {

Tensor squared_norms_of(std::vector<Tensor> tensors) {
  check_squared_norms(tensors);
  const OnDevice device(tensors[0]);
  std::vector<SquaresItem> items;
  int64_t pieces = 0;
  for (Tensor& tensor : tensors) {
    tensor = in_logical_order(tensor);
    const int64_t first = pieces;
    pieces += divide_up(tensor.numel(), kNormPiece);
    items.push_back({tensor.const_data_ptr(), tensor.numel(), first, pieces, dtype_of(tensor)});
  }
  const auto count = static_cast<int64_t>(items.size());
  Tensor records = fresh(tensors[0], count * static_cast<int64_t>(sizeof(SquaresItem)), ScalarType::Byte);
  Tensor sums = fresh(tensors[0], pieces, ScalarType::Double);
  Tensor norms = fresh(tensors[0], count, ScalarType::Double);
  const SquaresCall call{items.data(),
                         static_cast<int>(count),
                         pieces,
                         static_cast<SquaresItem*>(records.mutable_data_ptr()),
                         mutable_data<double>(sums),
                         mutable_data<double>(norms)};
  check_launch(squared_norms(call, device.stream()), "squared_norms of ", count, " tensors");
  return norms;
}

Tensor clip_to_percentile(std::vector<Tensor> gnorm_vec, const Tensor& norms, const std::vector<Tensor>& steps,
                          int64_t percentile, const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf) {
  check_percentile_clip(gnorm_vec, norms, steps, percentile, grad_scale, found_inf);
  if (grad_scale && on_host(*grad_scale)) check_grad_scale("bnbops::percentile_clip_: ", *grad_scale);
  const OnDevice device(norms);
  std::vector<ClipItem> items;
  for (size_t i = 0; i < gnorm_vec.size(); ++i) {
    items.push_back({mutable_data<float>(gnorm_vec[i]), data_of<float>(steps[i])});
  }
  Tensor factors = fresh(norms, static_cast<int64_t>(items.size()), ScalarType::Float);
  const ClipCall call{items.data(),
                      static_cast<int>(items.size()),
                      static_cast<int>(percentile),
                      data_of<double>(norms),
                      scalar_of(grad_scale, 1.0),
                      scalar_of(found_inf, 0.0),
                      mutable_data<float>(factors)};
  check_launch(percentile_clip(call, device.stream()), "percentile_clip_ of ", items.size(), " parameters");
  return factors;
}

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  m.impl("squared_norms", TORCH_BOX(&bnbops::cuda::squared_norms_of));
  m.impl("percentile_clip_", TORCH_BOX(&bnbops::cuda::clip_to_percentile));
}
