// CPU binding of the optimizer operators.
#include "optimizer.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/binding.h"
#include "cpu/schedule.h"
#include "rules.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth a thread

// Takes arguments off the dispatcher's stack, one by one.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  double option(const OptionSpec& spec) {
    switch (spec.type[0]) {
      case 'b': return take<bool>();
      case 'i': return static_cast<double>(take<int64_t>());
      default: return take<double>();
    }
  }

 private:
  StableIValue* next_;
};

// The arguments of common_schema.
template <class Rule>
StepArguments take_common(Arguments& stack) {
  const auto list = [&] { return stack.take<std::vector<Tensor>>(); };
  StepArguments a;
  a.params = list();
  a.grads = list();
  for (int k = 0; k < Rule::kStates; ++k) a.states.push_back(list());
  for (int k = 0; k < Rule::kStates; ++k) a.absmax.push_back(list());
  a.steps = list();
  a.lr = stack.take<Tensor>();
  for (const auto& option : Rule::kOptions) a.options.push_back(stack.option(option));
  a.maximize = stack.take<bool>();
  a.held_options = stack.take<std::optional<Tensor>>();
  a.grad_scale = stack.take<std::optional<Tensor>>();
  return a;
}

void check_factors(const StepNames& names, const std::optional<Tensor>& factors, const char* argument) {
  for (int64_t i = 0; factors && i < factors->numel(); ++i) {
    const float factor = static_cast<const float*>(factors->const_data_ptr())[i];
    BNBOPS_CHECK(std::isfinite(factor) && factor >= 0, "bnbops::", names.op, ": ", argument, "[", i,
                 "] must be finite and not negative, got ", factor);
  }
}

// Options in a tensor are no constants of a compiled graph.
void use_held_options(StepArguments& a) {
  if (!a.held_options) return;
  const auto* values = static_cast<const double*>(a.held_options->const_data_ptr());
  a.options.assign(values, values + a.options.size());
}

double factor_of(const std::optional<Tensor>& factors, size_t i) {
  return factors ? static_cast<const float*>(factors->const_data_ptr())[i] : 1.0;
}

// The values that only a host-side tensor can have checked.
template <class Rule>
void check_values(const StepNames& names, const StepArguments& a) {
  const char* invalid = Rule::invalid(a.options.data());
  BNBOPS_CHECK(invalid == nullptr, "bnbops::", names.op, ": ", invalid);
  BNBOPS_CHECK(std::isfinite(scalar(*a.lr)), "bnbops::", names.op, ": lr must be finite, got ", scalar(*a.lr));
  const std::string op = "bnbops::" + names.op + ": ";
  if (a.grad_scale) check_grad_scale(op, *a.grad_scale);
  check_factors(names, a.clip, "clip");
  check_factors(names, a.trust, "trust");
  check_step_values(op, a.steps);
}

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

// What a call has to do, and what must live until it is done.
template <class Rule>
struct Work {
  std::vector<StepJob> jobs;
  Schedule schedule;                         // of blocks
  std::vector<typename Rule::Hyper> hypers;  // one for each distinct set of scalars in a run of parameters
  std::vector<Tensor> grads;                 // copies of strided gradients
};

template <class Rule>
Work<Rule> make_work(const StepArguments& a) {
  Work<Rule> work;
  work.hypers.reserve(a.params.size());
  work.grads.reserve(a.params.size());
  const double sign = a.maximize ? -1.0 : 1.0;
  StepScalars x{scalar(*a.lr), -1, sign / (a.grad_scale ? scalar(*a.grad_scale) : 1.0), 1.0};
  const double grad_factor = x.grad_factor;
  for (size_t i = 0; i < a.params.size(); ++i) {
    const BlockLayout layout = state_layout(a, i);
    const double step = scalar(a.steps[i]) + 1;
    if (work.hypers.empty() || step != x.step || a.clip || a.trust) {
      x.step = step;
      x.grad_factor = grad_factor * factor_of(a.clip, i);
      x.trust = factor_of(a.trust, i);
      work.hypers.push_back(Rule::prepare(a.options.data(), x));
    }
    work.grads.push_back(in_logical_order(a.grads[i]));
    work.jobs.push_back(make_job(a, i, work.grads.back(), layout, &work.hypers.back()));
    work.schedule.add(layout.blocks());
  }
  return work;
}

template <class Rule>
void step(StepArguments& a, StepKernel kernel) {
  const StepNames names = step_names<Rule>();
  check_step(names, a);
  use_held_options(a);
  check_values<Rule>(names, a);
  if (a.found_inf && scalar(*a.found_inf) != 0) return;
  const Work<Rule> work = make_work<Rule>(a);
  for (const Tensor& count : a.steps) *static_cast<float*>(count.mutable_data_ptr()) += 1;
  work.schedule.run(kGrain, [&](size_t job, int64_t first, int64_t last) { kernel(work.jobs[job], first, last); });
}

template <class Rule>
Tensor direction_norms(StepArguments& a, SquaresKernel kernel) {
  const StepNames names = direction_names<Rule>();
  check_arguments(names, a);
  use_held_options(a);
  check_values<Rule>(names, a);
  const Work<Rule> work = make_work<Rule>(a);
  std::vector<double> sums(work.schedule.pieces());
  work.schedule.run(kGrain, [&](size_t job, int64_t first, int64_t last) {
    kernel(work.jobs[job], first, last, sums.data() + work.schedule.first_piece(job));
  });
  Tensor result = torch::stable::empty({static_cast<int64_t>(a.params.size())}, ScalarType::Double);
  work.schedule.sum_by_job(sums, static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

template <class Rule, int kIndex>
void boxed_step(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  Arguments arguments(stack);
  StepArguments a = take_common<Rule>(arguments);
  a.found_inf = arguments.take<std::optional<Tensor>>();
  a.clip = arguments.take<std::optional<Tensor>>();
  if (Rule::kTrust) a.trust = arguments.take<std::optional<Tensor>>();
  step<Rule>(a, isa().kernels->step[kIndex]);
}

template <class Rule, int kIndex>
void boxed_direction_norms(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  Arguments arguments(stack);
  StepArguments a = take_common<Rule>(arguments);
  a.clip = arguments.take<std::optional<Tensor>>();
  stack[0] = torch::stable::detail::from(direction_norms<Rule>(a, isa().kernels->direction_squares[kIndex]));
}

template <class Rule, int kIndex>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl(step_names<Rule>().op.c_str(), &boxed_step<Rule, kIndex>);
  if constexpr (Rule::kDirectionNorm) {
    m.impl(direction_names<Rule>().op.c_str(), &boxed_direction_norms<Rule, kIndex>);
  }
}

template <class... Rules, int... kIndex>
void implement_all(torch::stable::detail::StableLibrary& m, RuleList<Rules...>, std::integer_sequence<int, kIndex...>) {
  (implement<Rules, kIndex>(m), ...);
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  using bnbops::AllRules;
  bnbops::cpu::implement_all(m, AllRules{}, std::make_integer_sequence<int, AllRules::kSize>{});
}
