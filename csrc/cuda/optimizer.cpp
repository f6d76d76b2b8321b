// The optimizer operators on CUDA devices.
#include "cuda/binding.h"
#include "cuda/optimizer_kernels.h"
#include "ops/optimizer/optimizer_binding.h"

namespace bnbops::cuda {
namespace {

const Tensor& some_tensor(const StepArguments& a) { return a.params.empty() ? *a.lr : a.params[0]; }

const float* factors_of(const std::optional<Tensor>& factors) { return factors ? data_of<float>(*factors) : nullptr; }

// What a call has to do, and what must live until it is launched.
struct Work {
  std::vector<Tensor> grads;  // copies of strided gradients
  std::vector<StepItem> items;
  Tensor records;
  StepCall call{};

  Work(const StepArguments& a, int rule, Part part) {
    for (size_t i = 0; i < a.params.size(); ++i) {
      if (!a.grads.empty()) grads.push_back(in_logical_order(a.grads[i]));
      const StepJob job = step_job(a, i, a.grads.empty() ? a.params[i] : grads.back());
      items.push_back({job, mutable_data<float>(a.steps[i]), call.blocks});
      call.blocks += job.blocks;
    }
    records = fresh(some_tensor(a), static_cast<int64_t>(items.size() * record_size(rule)), ScalarType::Byte);
    call.part = part;
    call.codec = items.empty() ? kUncoded : common_codec(items[0].job, static_cast<int>(a.states.size()));
    call.items = items.data();
    call.count = static_cast<int>(items.size());
    call.records = records.mutable_data_ptr();
    StepCommon& common = call.common;
    common.lr = scalar_of(*a.lr);
    common.grad_scale = scalar_of(a.grad_scale, 1.0);
    common.found_inf = scalar_of(a.found_inf, 0.0);
    common.clip = factors_of(a.clip);
    common.trust = factors_of(a.trust);
    std::copy(a.options.begin(), a.options.end(), common.option);
    common.maximize = a.maximize;
    common.counts_step = part != Part::kApply;
  }
};

struct OptimizerOnCuda {
  // The kernels leave a parameter alone where they find a number that is refused here.
  static void check_values(const std::string& op, const StepArguments& a) {
    if (on_host(*a.lr)) check_lr(op, *a.lr);
    if (a.grad_scale && on_host(*a.grad_scale)) check_grad_scale(op, *a.grad_scale);
  }

  template <class Rule, int kIndex>
  static void run(const StepNames& names, const StepArguments& a) {
    const bool overflow = a.found_inf && on_host(*a.found_inf) && scalar(*a.found_inf) != 0;
    if (overflow && a.directions.empty()) return;  // directions become NaN
    const OnDevice device(some_tensor(a));
    const Work work(a, kIndex, names.part);
    check_launch(step(kIndex, work.call, device.stream()), names.name, " of ", work.call.count, " parameters");
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::OptimizerOperators<bnbops::cuda::OptimizerOnCuda>::implement(m);
}
