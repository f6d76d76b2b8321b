#include "ops/norms/norms.h"

namespace bnbops {

void check_squared_norms(const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Named named{tensors[i], "squared_norms", "tensors", static_cast<int64_t>(i)};
    check_float(named);
    check_same_device(named, tensors[0]);
  }
}

void check_percentile_clip(const std::vector<Tensor>& gnorm_vec, const Tensor& squared_norms,
                           const std::vector<Tensor>& steps, int64_t percentile,
                           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const char* op = "percentile_clip_";
  const size_t count = gnorm_vec.size();
  BNBOPS_CHECK(percentile >= 0 && percentile < kNormHistory, "bnbops::", op, ": percentile must be in [0, ",
               kNormHistory, "), got ", percentile);
  BNBOPS_CHECK(steps.size() == count, "bnbops::", op, ": steps has ", steps.size(), " tensors for ", count,
               " in gnorm_vec");
  const Named norms{squared_norms, op, "squared_norms"};
  check_dtype(norms, ScalarType::Double);
  check_contiguous(norms);
  BNBOPS_CHECK(squared_norms.dim() == 1 && squared_norms.numel() == static_cast<int64_t>(count), norms,
               " must have shape [", count, "], one number for each of gnorm_vec, got ", shape_of(squared_norms));
  Overlaps overlaps;
  for (size_t i = 0; i < count; ++i) {
    const Named history{gnorm_vec[i], op, "gnorm_vec", static_cast<int64_t>(i)};
    check_dtype(history, ScalarType::Float);
    check_same_device(history, squared_norms);
    check_contiguous(history);
    BNBOPS_CHECK(history.tensor.dim() == 1 && history.tensor.numel() == kNormHistory, history, " must have shape [",
                 kNormHistory, "], got ", shape_of(history.tensor));
    overlaps.writes(history);
    const Named step{steps[i], op, "steps", static_cast<int64_t>(i)};
    check_dtype(step, ScalarType::Float);
    check_one_element(step);
    check_same_device(step, squared_norms);
    overlaps.reads(step);
  }
  overlaps.reads(norms);
  for (const auto& [tensor, name] : {std::pair{&grad_scale, "grad_scale"}, std::pair{&found_inf, "found_inf"}}) {
    if (!*tensor) continue;
    const Named named{**tensor, op, name};
    check_dtype(named, ScalarType::Float);
    check_one_element(named);
    check_readable(named, squared_norms);
    overlaps.reads(named);
  }
  overlaps.check();
}

}  // namespace bnbops
