// The operators of optimizers on CUDA devices: steps, states outside a step, and norms.
#include "ops/optimizer/optimizer.h"
#include "core/layout.h"
#include "cuda/binding.h"
#include "cuda/optimizer_kernels.h"
#include "ops/norms/norms.h"
#include "ops/optimizer/state_codes.h"

namespace bnbops::cuda {
namespace {

// Whether the host may read a tensor's numbers. The simulator's device has the host's memory: there, tensors without
// dimensions play those on the host.
bool on_host(const Tensor& tensor) {
#ifdef CUSIM
  return tensor.dim() == 0;
#else
  return tensor.is_cpu();
#endif
}

Scalar scalar_of(const Tensor& tensor) {
  if (on_host(tensor)) return {nullptr, scalar(tensor), false};
  return {tensor.const_data_ptr(), 0, tensor.scalar_type() == ScalarType::Double};
}
Scalar scalar_of(const std::optional<Tensor>& tensor, double otherwise) {
  return tensor ? scalar_of(*tensor) : Scalar{nullptr, otherwise, false};
}

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

struct StatesOnCuda : OnDevice {
  using OnDevice::OnDevice;

  void encode(const StateJob& job) const {
    check_launch(encode_state(job, stream()), "encode_state of ", job.blocks, " blocks");
  }
  void decode(const StateJob& job) const {
    check_launch(decode_state(job, stream()), "decode_state of ", job.blocks, " blocks");
  }
};

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
    auto* own_records = static_cast<SquaresItem*>(records.mutable_data_ptr());
    const SquaresCall call{items.data(), static_cast<int>(count),    pieces,
                           own_records,  mutable_data<double>(sums), mutable_data<double>(norms)};
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
  bnbops::OptimizerOperators<bnbops::cuda::OptimizerOnCuda>::implement(m);
  bnbops::StateOperators<bnbops::cuda::StatesOnCuda>::implement(m);
  bnbops::NormOperators<bnbops::cuda::NormsOnCuda>::implement(m);
}
