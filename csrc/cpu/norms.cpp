// CPU binding of the norm operators.
#include "ops/norms/norms.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "core/layout.h"
#include "cpu/binding.h"
#include "cpu/schedule.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 8;  // pieces worth a thread

Tensor squared_norms(std::vector<Tensor> tensors) {
  check_squared_norms(tensors);
  Schedule schedule;
  for (Tensor& tensor : tensors) {
    tensor = in_logical_order(tensor);
    schedule.add(divide_up(tensor.numel(), kNormPiece));
  }
  std::vector<double> sums(schedule.pieces());
  const Kernels& kernels = *isa().kernels;
  schedule.run(kGrain, [&](size_t job, int64_t first, int64_t last) {
    const Tensor& tensor = tensors[job];
    kernels.squares(tensor.const_data_ptr(), dtype_of(tensor), tensor.numel(), first, last,
                    sums.data() + schedule.first_piece(job));
  });
  Tensor result = torch::stable::empty({static_cast<int64_t>(tensors.size())}, ScalarType::Double);
  schedule.sum_by_job(sums, static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

// Puts a squared norm into a parameter's history, the first one into all of it, and returns the factor that brings the
// norm down to the percentile-th smallest of the history.
float clip_to_history(float* history, float newest, float steps, int64_t percentile) {
  if (steps < 1) {
    std::fill(history, history + kNormHistory, newest);
  } else {
    history[history_place(steps)] = newest;
  }
  float sorted[kNormHistory];
  std::copy(history, history + kNormHistory, sorted);
  std::nth_element(sorted, sorted + percentile, sorted + kNormHistory);
  return clip_factor(newest, sorted[percentile]);
}

// The values that only a host-side tensor can have checked.
void check_clip_values(const Tensor& norms, const std::vector<Tensor>& steps, const std::optional<Tensor>& grad_scale) {
  const char* op = "bnbops::percentile_clip_: ";
  for (int64_t i = 0; i < norms.numel(); ++i) {
    const double squared = static_cast<const double*>(norms.const_data_ptr())[i];
    BNBOPS_CHECK(std::isfinite(squared) && squared >= 0, op, "squared_norms[", i,
                 "] must be finite and not negative, got ", squared);
  }
  check_step_values(op, steps);
  if (grad_scale) check_grad_scale(op, *grad_scale);
}

Tensor percentile_clip(std::vector<Tensor> gnorm_vec, const Tensor& norms, const std::vector<Tensor>& steps,
                       int64_t percentile, const std::optional<Tensor>& grad_scale,
                       const std::optional<Tensor>& found_inf) {
  check_percentile_clip(gnorm_vec, norms, steps, percentile, grad_scale, found_inf);
  check_clip_values(norms, steps, grad_scale);
  Tensor result = torch::stable::empty({static_cast<int64_t>(gnorm_vec.size())}, ScalarType::Float);
  auto* factors = static_cast<float*>(result.mutable_data_ptr());
  std::fill(factors, factors + gnorm_vec.size(), 1.0F);
  if (found_inf && scalar(*found_inf) != 0) return result;
  const double scale = grad_scale ? scalar(*grad_scale) : 1.0;
  const auto* squared = static_cast<const double*>(norms.const_data_ptr());
  for (size_t i = 0; i < gnorm_vec.size(); ++i) {
    factors[i] = clip_to_history(mutable_data<float>(gnorm_vec[i]), kept_norm(squared[i], scale),
                                 data_of<float>(steps[i])[0], percentile);
  }
  return result;
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  m.impl("squared_norms", TORCH_BOX(&bnbops::cpu::squared_norms));
  m.impl("percentile_clip_", TORCH_BOX(&bnbops::cpu::percentile_clip));
}
