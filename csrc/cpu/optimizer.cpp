// The optimizer operators on the CPU.
#include "cpu/binding.h"
#include "cpu/schedule.h"
#include "ops/optimizer/optimizer_binding.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth a thread
constexpr int64_t kNormGrain = kGrain / kPieceBlocks;

double factor_of(const std::optional<Tensor>& factors, size_t i) { return factors ? data_of<float>(*factors)[i] : 1.0; }

// What a call has to do, and what must live until it is done.
template <class Rule>
struct Work {
  std::vector<StepJob> jobs;
  Schedule schedule;                         // of pieces, made of so many blocks
  std::vector<typename Rule::Hyper> hypers;  // one for each distinct set of scalars in a run of parameters
  std::vector<size_t> hyper_of;              // by job
  std::vector<Tensor> grads;                 // copies of strided gradients

  Work(const StepArguments& a, int64_t piece_blocks) {
    const double sign = a.maximize ? -1.0 : 1.0;
    StepScalars x{scalar(*a.lr), -1, sign / (a.grad_scale ? scalar(*a.grad_scale) : 1.0), 1.0};
    const double grad_factor = x.grad_factor;
    for (size_t i = 0; i < a.params.size(); ++i) {
      const double step = scalar(a.steps[i]) + 1;
      if (hypers.empty() || step != x.step || a.clip || a.trust) {
        x.step = step;
        x.grad_factor = grad_factor * factor_of(a.clip, i);
        x.trust = factor_of(a.trust, i);
        hypers.push_back(Rule::prepare(a.options.data(), x));
      }
      grads.push_back(in_logical_order(a.grads[i]));
      jobs.push_back(step_job(a, i, grads.back()));
      hyper_of.push_back(hypers.size() - 1);
      schedule.add(divide_up(jobs.back().blocks, piece_blocks));
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
  static void step(const StepArguments& a) {
    if (a.found_inf && scalar(*a.found_inf) != 0) return;
    const Work<Rule> work(a, 1);
    for (const Tensor& count : a.steps) *static_cast<float*>(count.mutable_data_ptr()) += 1;
    const StepKernel kernel = isa().kernels->step[kIndex];
    work.schedule.run(
        kGrain, [&](size_t job, int64_t first, int64_t last) { kernel(work.jobs[job], work.hyper(job), first, last); });
  }

  template <class Rule, int kIndex>
  static Tensor direction_norms(const StepArguments& a) {
    const Work<Rule> work(a, kPieceBlocks);
    std::vector<double> sums(work.schedule.pieces());
    const SquaresKernel kernel = isa().kernels->direction_squares[kIndex];
    work.schedule.run(kNormGrain, [&](size_t job, int64_t first, int64_t last) {
      kernel(work.jobs[job], work.hyper(job), first, last, sums.data() + work.schedule.first_piece(job));
    });
    Tensor result = torch::stable::empty({static_cast<int64_t>(a.params.size())}, ScalarType::Double);
    work.schedule.sum_by_job(sums, mutable_data<double>(result));
    return result;
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::OptimizerOperators<bnbops::cpu::OptimizerOnCpu>::implement(m); }
