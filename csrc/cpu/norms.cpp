// The norm operators on the CPU.
#include "ops/norms/norms.h"

#include "cpu/binding.h"
#include "cpu/schedule.h"

namespace bnbops::cpu {
namespace {

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

struct NormsOnCpu {
  static Tensor squared_norms(const std::vector<Tensor>& tensors) {
    Schedule schedule;
    for (const Tensor& tensor : tensors) schedule.add(divide_up(tensor.numel(), kNormPiece));
    std::vector<double> sums(schedule.pieces());
    const Kernels& kernels = *isa().kernels;
    schedule.run(kThreadElements / kNormPiece, [&](size_t job, int64_t first, int64_t last) {
      const Tensor& tensor = tensors[job];
      kernels.squares(tensor.const_data_ptr(), dtype_of(tensor), tensor.numel(), first, last,
                      sums.data() + schedule.first_piece(job));
    });
    Tensor result = torch::stable::empty({static_cast<int64_t>(tensors.size())}, ScalarType::Double);
    schedule.sum_by_job(sums, mutable_data<double>(result));
    return result;
  }

  static void check_values(const Operator& op, const ClipArguments& a) {
    for (int64_t i = 0; i < a.squared_norms.numel(); ++i) {
      const double squared = data_of<double>(a.squared_norms)[i];
      BNBOPS_CHECK(std::isfinite(squared) && squared >= 0, op, "squared_norms[", i,
                   "] must be finite and not negative, got ", squared);
    }
    check_step_values(op, a.steps);
    if (a.grad_scale) check_grad_scale(op, *a.grad_scale);
  }

  static Tensor percentile_clip(const ClipArguments& a) {
    const size_t count = a.gnorm_vec.size();
    Tensor result = torch::stable::empty({static_cast<int64_t>(count)}, ScalarType::Float);
    auto* factors = mutable_data<float>(result);
    std::fill_n(factors, count, 1.0F);
    if (a.found_inf && scalar(*a.found_inf) != 0) return result;
    const double scale = a.grad_scale ? scalar(*a.grad_scale) : 1.0;
    for (size_t i = 0; i < count; ++i) {
      const float newest = kept_norm(data_of<double>(a.squared_norms)[i], scale);
      factors[i] =
          clip_to_history(mutable_data<float>(a.gnorm_vec[i]), newest, data_of<float>(a.steps[i])[0], a.percentile);
    }
    return result;
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::NormOperators<bnbops::cpu::NormsOnCpu>::implement(m); }
