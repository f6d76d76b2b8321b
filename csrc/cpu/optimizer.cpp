// CPU binding of the optimizer operators.
#include "optimizer.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/binding.h"
#include "rules.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth a thread

double scalar(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : *static_cast<const float*>(data);
}

// Pops the arguments off the dispatcher's stack, in the order of step_schema.
template <class Rule>
StepArguments unpack(StableIValue* stack) {
  using torch::stable::detail::to;
  const auto list = [&] { return to<std::vector<Tensor>>(*stack++); };
  StepArguments a;
  a.params = list();
  a.grads = list();
  for (int k = 0; k < Rule::kStates; ++k) a.states.push_back(list());
  for (int k = 0; k < Rule::kStates; ++k) a.absmax.push_back(list());
  a.steps = list();
  a.lr = to<Tensor>(*stack++);
  for (int i = 0; i < Rule::kOptions; ++i) a.options.push_back(to<double>(*stack++));
  a.maximize = to<bool>(*stack++);
  a.grad_scale = to<std::optional<Tensor>>(*stack++);
  a.found_inf = to<std::optional<Tensor>>(*stack++);
  return a;
}

// The values that only a host-side tensor can have checked.
template <class Rule>
void check_values(const StepNames& names, const StepArguments& a) {
  const char* invalid = Rule::invalid(a.options.data());
  BNBOPS_CHECK(invalid == nullptr, "bnbops::", names.op, ": ", invalid);
  BNBOPS_CHECK(std::isfinite(scalar(*a.lr)), "bnbops::", names.op, ": lr must be finite, got ", scalar(*a.lr));
  if (a.grad_scale) {
    const double scale = scalar(*a.grad_scale);
    BNBOPS_CHECK(std::isfinite(scale) && scale > 0, "bnbops::", names.op,
                 ": grad_scale must be positive and finite, got ", scale);
  }
  for (size_t i = 0; i < a.steps.size(); ++i) {
    const double step = scalar(a.steps[i]);
    BNBOPS_CHECK(std::isfinite(step) && step >= 0, "bnbops::", names.op, ": steps[", i,
                 "] must be finite and not negative, got ", step);
  }
}

struct Work {  // jobs and, for each, the number of the first block in the whole call
  std::vector<StepJob> jobs;
  std::vector<int64_t> first_block;
};

StepJob make_job(const StepArguments& a, size_t i, const Tensor& grad, const BlockLayout& layout, const void* hyper) {
  StepJob job{};
  job.param = a.params[i].mutable_data_ptr();
  job.grad = grad.const_data_ptr();
  for (size_t k = 0; k < a.states.size(); ++k) {
    job.state[k] = a.states[k][i].mutable_data_ptr();
    job.absmax[k] = a.quantized() ? static_cast<float*>(a.absmax[k][i].mutable_data_ptr()) : nullptr;
  }
  job.hyper = hyper;
  job.inner = layout.inner;
  job.blocks_per_row = layout.blocks_per_row;
  job.param_dtype = dtype_of(a.params[i]);
  job.grad_dtype = dtype_of(grad);
  return job;
}

// Runs all blocks of all jobs, split evenly among the threads however the tensors' sizes differ.
void run(const Work& work, int64_t blocks, StepKernel kernel) {
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    auto next = std::upper_bound(work.first_block.begin(), work.first_block.end(), first) - work.first_block.begin();
    for (size_t j = next - 1; first < last; ++j) {
      const int64_t begin = work.first_block[j];
      const int64_t end = j + 1 < work.jobs.size() ? std::min(last, work.first_block[j + 1]) : last;
      kernel(work.jobs[j], first - begin, end - begin);
      first = end;
    }
  });
}

template <class Rule>
void step(StepArguments& a, StepKernel kernel) {
  const StepNames names = step_names<Rule>();
  check_step(names, a);
  check_values<Rule>(names, a);
  if (a.found_inf && scalar(*a.found_inf) != 0) return;

  const double lr = scalar(*a.lr);
  const double factor = (a.maximize ? -1.0 : 1.0) / (a.grad_scale ? scalar(*a.grad_scale) : 1.0);
  std::vector<typename Rule::Hyper> hypers;  // one for each distinct step in a run of parameters
  std::vector<Tensor> grads;                 // keeps copies of strided gradients alive
  hypers.reserve(a.params.size());
  grads.reserve(a.params.size());
  Work work;
  int64_t blocks = 0;
  double prepared = -1;
  for (size_t i = 0; i < a.params.size(); ++i) {
    const double count = scalar(a.steps[i]) + 1;
    const BlockLayout layout = state_layout(a, i);
    if (layout.blocks() == 0) continue;
    if (count != prepared) {
      hypers.push_back(Rule::prepare(a.options.data(), lr, count, factor));
      prepared = count;
    }
    grads.push_back(in_logical_order(a.grads[i]));
    work.jobs.push_back(make_job(a, i, grads.back(), layout, &hypers.back()));
    work.first_block.push_back(blocks);
    blocks += layout.blocks();
  }
  for (Tensor& count : a.steps) *static_cast<float*>(count.mutable_data_ptr()) += 1;
  run(work, blocks, kernel);
}

template <class Rule, int kIndex>
void boxed_step(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  StepArguments arguments = unpack<Rule>(stack);
  step<Rule>(arguments, isa().kernels->step[kIndex]);
}

template <class... Rules, int... kIndex>
void implement_steps(torch::stable::detail::StableLibrary& m, RuleList<Rules...>,
                     std::integer_sequence<int, kIndex...>) {
  (m.impl(step_names<Rules>().op.c_str(), &boxed_step<Rules, kIndex>), ...);
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  using bnbops::AllRules;
  bnbops::cpu::implement_steps(m, AllRules{}, std::make_integer_sequence<int, AllRules::kSize>{});
}
