// Optimizer steps and their halves, for every rule.
#include "cuda/optimizer_kernels.h"
#include "cuda/optimizer_step.h"
#include "rules/all.h"

namespace bnbops::cuda {
namespace {

// Whether a rule's states may be neither all fp32 nor all of a codec that has a kernel of its own.
template <class Rule>
constexpr bool kMixes = Rule::kStates > 1 || (Rule::kStates > 0 && AllCodecs::kSize > FusedCodecs::kSize);

// A kernel and how many of its thread blocks are resident.
template <class Rule>
struct StepKernel {
  void (*run)(Many<StepRecord<Rule>>);
  int resident;
};

template <class Rule, class Codec>
StepKernel<Rule> coded_step() {
  return {step_kernel<Rule, Codec>, kStepResident<Rule, Codec>};
}

template <class Rule>
StepKernel<Rule> kernel_for(Part part, int codec) {
  if (part == Part::kDirection) return {direction_kernel<Rule>, kStepResident<Rule, AnyCodec>};
  if (part == Part::kApply) return {apply_kernel<Rule>, kResident};
  StepKernel<Rule> kernel = coded_step<Rule, Uncoded>();
  if constexpr (kMixes<Rule>) {
    if (codec != kUncoded) kernel = coded_step<Rule, AnyCodec>();
  }
  if constexpr (Rule::kStates > 0) {
    for_each_codec(FusedCodecs{}, [&](auto fused, int) {
      if (codec == number_of<decltype(fused)>()) kernel = coded_step<Rule, decltype(fused)>();
    });
  }
  return kernel;
}

template <class Rule>
cudaError_t run_rule(const StepCall& call, cudaStream_t stream) {
  const auto many = launch_prepare<Rule>(call, stream);
  const StepKernel<Rule> kernel = kernel_for<Rule>(call.part, call.codec);
  return launch(kernel.run, grid_of_units(call.blocks, kernel.resident), stream, many);
}

struct Table {
  size_t record_size[AllRules::kSize];
  decltype(&run_rule<Adam>) run[AllRules::kSize];
};

constexpr Table make_table() {
  Table table{};
  for_each_rule(AllRules{}, [&](auto rule, int index) {
    using Rule = decltype(rule);
    static_assert(sizeof(Rule::kOptions) / sizeof(OptionSpec) <= kMaxOptions);
    table.record_size[index] = sizeof(StepRecord<Rule>);
    table.run[index] = run_rule<Rule>;
  });
  return table;
}

const Table kTable = make_table();

}  // namespace

size_t record_size(int rule) { return kTable.record_size[rule]; }

cudaError_t step(int rule, const StepCall& call, cudaStream_t stream) { return kTable.run[rule](call, stream); }

}  // namespace bnbops::cuda
