// The norm operators on CUDA devices.
#include "ops/norms/norms.h"

#include "core/layout.h"
#include "cuda/binding.h"
#include "cuda/norm_kernels.h"

namespace bnbops::cuda {
namespace {

struct NormsOnCuda {
  static Tensor squared_norms(const std::vector<Tensor>& tensors) {
    const OnDevice device(tensors[0]);
    std::vector<SquaresItem> items;
    int64_t pieces = 0;
    for (const Tensor& tensor : tensors) {
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
    check_launch(cuda::squared_norms(call, device.stream()), "squared_norms of ", count, " tensors");
    return norms;
  }

  static void check_values(const Operator& op, const ClipArguments& a) {
    if (a.grad_scale && on_host(*a.grad_scale)) check_grad_scale(op, *a.grad_scale);
  }

  static Tensor percentile_clip(const ClipArguments& a) {
    const OnDevice device(a.squared_norms);
    std::vector<ClipItem> items;
    for (size_t i = 0; i < a.gnorm_vec.size(); ++i) {
      items.push_back({mutable_data<float>(a.gnorm_vec[i]), data_of<float>(a.steps[i])});
    }
    Tensor factors = fresh(a.squared_norms, static_cast<int64_t>(items.size()), ScalarType::Float);
    const ClipCall call{items.data(),
                        static_cast<int>(items.size()),
                        static_cast<int>(a.percentile),
                        data_of<double>(a.squared_norms),
                        scalar_of(a.grad_scale, 1.0),
                        scalar_of(a.found_inf, 0.0),
                        mutable_data<float>(factors)};
    check_launch(cuda::percentile_clip(call, device.stream()), "percentile_clip_ of ", items.size(), " parameters");
    return factors;
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::NormOperators<bnbops::cuda::NormsOnCuda>::implement(m);
}
