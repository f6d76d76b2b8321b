// The optimizer operators on the CPU.
#include "ops/optimizer/optimizer.h"
#include "cpu/binding.h"
#include "cpu/schedule.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth a thread

double factor_of(const std::optional<Tensor>& factors, size_t i) { return factors ? data_of<float>(*factors)[i] : 1.0; }

// What a call has to do, and what must live until it is done.
template <class Rule>
struct Work {
  std::vector<StepJob> jobs;
  Schedule schedule;                         // of blocks
  std::vector<typename Rule::Hyper> hypers;  // one for each distinct set of scalars in a run of parameters
  std::vector<size_t> hyper_of;              // by job
  std::vector<Tensor> grads;                 // copies of strided gradients

  // `next`: the step that comes after those counted, or the one that was counted last.
  Work(const StepArguments& a, bool next) {
    const double sign = a.maximize ? -1.0 : 1.0;
    StepScalars x{scalar(*a.lr), -1, sign / (a.grad_scale ? scalar(*a.grad_scale) : 1.0), 1.0};
    const double grad_factor = x.grad_factor;
    for (size_t i = 0; i < a.params.size(); ++i) {
      const double step = scalar(a.steps[i]) + (next ? 1 : 0);
      if (hypers.empty() || step != x.step || a.clip || a.trust) {
        x.step = step;
        x.grad_factor = grad_factor * factor_of(a.clip, i);
        x.trust = factor_of(a.trust, i);
        hypers.push_back(Rule::prepare(a.options.data(), x));
      }
      if (!a.grads.empty()) grads.push_back(in_logical_order(a.grads[i]));
      jobs.push_back(step_job(a, i, a.grads.empty() ? a.params[i] : grads.back()));
      hyper_of.push_back(hypers.size() - 1);
      schedule.add(jobs.back().blocks);
    }
  }

  const void* hyper(size_t job) const { return &hypers[hyper_of[job]]; }
};

struct OptimizerOnCpu {
  static void check_values(const std::string& op, const StepArguments& a) {
    check_lr(op, *a.lr);
    if (a.grad_scale) check_grad_scale(op, *a.grad_scale);
    check_factors(op, a.clip, "clip");
    check_factors(op, a.trust, "trust");
    check_step_values(op, a.steps);
  }

  template <class Rule, int kIndex>
  static void run(const StepNames& names, const StepArguments& a) {
    if (a.found_inf && scalar(*a.found_inf) != 0) return leave_alone(a);
    const Work<Rule> work(a, names.part != Part::kApply);
    if (names.part != Part::kApply) {
      for (const Tensor& count : a.steps) *mutable_data<float>(count) += 1;
    }
    const StepKernel kernel = isa().steps->parts[static_cast<int>(names.part)][kIndex];
    work.schedule.run(
        kGrain, [&](size_t job, int64_t first, int64_t last) { kernel(work.jobs[job], work.hyper(job), first, last); });
  }

  // Directions that no step is taken along.
  static void leave_alone(const StepArguments& a) {
    for (const Tensor& direction : a.directions) {
      std::fill_n(mutable_data<float>(direction), direction.numel(), float_from_bits(kNanBits));
    }
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::OptimizerOperators<bnbops::cpu::OptimizerOnCpu>::implement(m); }
