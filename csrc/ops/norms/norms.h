// The norm operators of every device, which does the work:
//   struct Device {
//     static Tensor squared_norms(const std::vector<Tensor>& tensors);  // in logical order
//     static void check_values(const Operator&, const ClipArguments&);  // those that the host can read
//     static Tensor percentile_clip(const ClipArguments&);
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include "core/tensors.h"
#include "ops/norms/norm_math.h"

namespace bnbops {

struct ClipArguments {
  const std::vector<Tensor>& gnorm_vec;
  const Tensor& squared_norms;
  const std::vector<Tensor>& steps;
  int64_t percentile;
  const OptionalTensor &grad_scale, &found_inf;
};

template <class Device>
struct NormOperators {
  static Tensor squared_norms(std::vector<Tensor> tensors) {
    constexpr Operator op{"squared_norms"};
    for (size_t i = 0; i < tensors.size(); ++i) {
      op(tensors[i], "tensors", static_cast<int64_t>(i)).floats().device_of(tensors[0]);
    }
    for (Tensor& tensor : tensors) tensor = in_logical_order(tensor);
    return Device::squared_norms(tensors);
  }

  static Tensor percentile_clip(const std::vector<Tensor>& gnorm_vec, const Tensor& squared_norms,
                                const std::vector<Tensor>& steps, int64_t percentile, const OptionalTensor& grad_scale,
                                const OptionalTensor& found_inf) {
    const ClipArguments a{gnorm_vec, squared_norms, steps, percentile, grad_scale, found_inf};
    check(a);
    Device::check_values(kClip, a);
    return Device::percentile_clip(a);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("squared_norms", TORCH_BOX(&squared_norms));
    m.impl("percentile_clip_", TORCH_BOX(&percentile_clip));
  }

 private:
  static constexpr Operator kClip{"percentile_clip_"};

  static void check(const ClipArguments& a) {
    const auto count = static_cast<int64_t>(a.gnorm_vec.size());
    BNBOPS_CHECK(a.percentile >= 0 && a.percentile < kNormHistory, kClip, "percentile must be in [0, ", kNormHistory,
                 "), got ", a.percentile);
    BNBOPS_CHECK(a.steps.size() == a.gnorm_vec.size(), kClip, "steps has ", a.steps.size(), " tensors for ", count,
                 " in gnorm_vec");
    const Tensor& first = a.squared_norms;
    const Argument norms = kClip(first, "squared_norms").dtype(ScalarType::Double).contiguous();
    norms.shape({count}, "one number for each of gnorm_vec");
    Overlaps overlaps;
    for (int64_t i = 0; i < count; ++i) {
      const Argument history = kClip(a.gnorm_vec[i], "gnorm_vec", i), step = kClip(a.steps[i], "steps", i);
      history.dtype(ScalarType::Float).device_of(first).contiguous().shape({kNormHistory});
      step.dtype(ScalarType::Float).one_element().device_of(first);
      overlaps.writes(history);
      overlaps.reads(step);
    }
    overlaps.reads(norms);
    for (const auto& [tensor, name] : {std::pair{&a.grad_scale, "grad_scale"}, std::pair{&a.found_inf, "found_inf"}}) {
      if (!*tensor) continue;
      overlaps.reads(kClip(**tensor, name).dtype(ScalarType::Float).one_element().readable_beside(first));
    }
    overlaps.check();
  }
};

}  // namespace bnbops
