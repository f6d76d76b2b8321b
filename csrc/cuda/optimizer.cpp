// The optimizer operators on CUDA devices.
#include "cuda/binding.h"
#include "cuda/optimizer_kernels.h"
#include "ops/norms/norm_math.h"
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

  Work(const StepArguments& a, int rule, int64_t unit_blocks) {
    for (size_t i = 0; i < a.params.size(); ++i) {
      grads.push_back(in_logical_order(a.grads[i]));
      const StepJob job = step_job(a, i, grads.back());
      items.push_back({job, static_cast<float*>(a.steps[i].mutable_data_ptr()), call.units});
      call.units += divide_up(job.blocks, unit_blocks);
    }
    records = fresh(some_tensor(a), static_cast<int64_t>(items.size() * record_size(rule)), ScalarType::Byte);
    call.items = items.data();
    call.count = static_cast<int>(items.size());
    call.quantized = a.quantized();
    call.records = records.mutable_data_ptr();
    StepCommon& common = call.common;
    common.lr = scalar_of(*a.lr);
    common.grad_scale = scalar_of(a.grad_scale, 1.0);
    common.found_inf = scalar_of(a.found_inf, 0.0);
    common.clip = factors_of(a.clip);
    common.trust = factors_of(a.trust);
    std::copy(a.options.begin(), a.options.end(), common.option);
    common.unit_blocks = unit_blocks;
    common.maximize = a.maximize;
  }
};

struct OptimizerOnCuda {
  // The kernels leave a parameter alone where they find a number that is refused here.
  static void check_values(const std::string& op, const StepArguments& a) {
    if (on_host(*a.lr)) check_lr(op, *a.lr);
    if (a.grad_scale && on_host(*a.grad_scale)) check_grad_scale(op, *a.grad_scale);
  }

  template <class Rule, int kIndex>
  static void step(const StepArguments& a) {
    if (a.found_inf && on_host(*a.found_inf) && scalar(*a.found_inf) != 0) return;
    const OnDevice device(some_tensor(a));
    Work work(a, kIndex, 1);
    work.call.common.counts_step = true;
    check_launch(cuda::step(kIndex, work.call, device.stream()), step_names<Rule>().op, " of ", work.call.count,
                 " parameters");
  }

  template <class Rule, int kIndex>
  static Tensor direction_norms(const StepArguments& a) {
    const Tensor& like = some_tensor(a);
    const OnDevice device(like);
    const Work work(a, kIndex, kPieceBlocks);
    Tensor pieces = fresh(like, work.call.units, ScalarType::Double);
    Tensor norms = fresh(like, work.call.count, ScalarType::Double);
    check_launch(cuda::direction_norms(kIndex, work.call, mutable_data<double>(pieces), mutable_data<double>(norms),
                                       device.stream()),
                 direction_names<Rule>().op, " of ", work.call.count, " parameters");
    return norms;
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::OptimizerOperators<bnbops::cuda::OptimizerOnCuda>::implement(m);
}
