// Optimizer steps and the norms of their directions, for every rule.
#include "cuda/optimizer_kernels.h"
#include "cuda/optimizer_step.h"
#include "cuda/sums.h"
#include "rules/all.h"

namespace bnbops::cuda {
namespace {

template <class Rule>
cudaError_t step_of(const StepCall& call, cudaStream_t stream) {
  if (call.count == 0) return cudaSuccess;
  const auto many = launch_prepare<Rule>(call, stream);
  if (call.units == 0) return cudaGetLastError();
  if constexpr (Rule::kStates > 0) {
    if (call.quantized) {
      launch_step<Rule, true>(many, stream);
      return cudaGetLastError();
    }
  }
  launch_step<Rule, false>(many, stream);
  return cudaGetLastError();
}

constexpr int kDirectionResident = 2;  // beside an element's states there are columns in fp64

// A warp has a piece of blocks at a time.
template <class Rule, bool kQuantized>
__global__ void __launch_bounds__(kThreads, kDirectionResident)
    direction_squares_kernel(const Many<StepRecord<Rule>> many, double* pieces) {
  __shared__ StepRecord<Rule> records[kWarps];
  const MapsOf<Rule>* maps = shared_maps<Rule, kQuantized>();
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t piece) {
    double column[kOctet] = {};
    int64_t end = (piece + 1) * kPieceBlocks;
    if (end > record.job.blocks) end = record.job.blocks;
    for (int64_t block = piece * kPieceBlocks; block < end && !record.skipped; ++block) {
      auto x = load_elements<Rule, kQuantized>(record.job, block, maps);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        auto states = states_of(x, i);
        const float u = Rule::direction(x.g[i], x.p[i], states, record.hyper);
        x.p[i] = select(is_finite(Rule::witness(states)), u, 0.0F);  // an element that no step would touch
      }
      add_squares(x.p, column);
    }
    const double sum = sum_of_columns(column);
    if (lane_of_warp() == 0) pieces[record.first + piece] = sum;
  });
}

template <class Rule>
cudaError_t direction_norms_of(const StepCall& call, double* pieces, double* norms, cudaStream_t stream) {
  if (call.count == 0) return cudaSuccess;
  const auto many = launch_prepare<Rule>(call, stream);
  if (call.units > 0) {
    const auto kernel = call.quantized ? direction_squares_kernel<Rule, true> : direction_squares_kernel<Rule, false>;
    LAUNCH(kernel, grid_of_units(call.units, kDirectionResident), dim3(kThreads), 0, stream, many, pieces);
  }
  LAUNCH((sum_pieces_kernel<StepRecord<Rule>>), dim3(call.count), dim3(kThreads), 0, stream, many.record, pieces,
         norms);
  return cudaGetLastError();
}

struct Table {
  size_t record_size[AllRules::kSize];
  decltype(&step_of<Adam>) step[AllRules::kSize];
  decltype(&direction_norms_of<Lamb>) direction_norms[AllRules::kSize];  // or null
};

constexpr Table make_table() {
  Table table{};
  for_each_rule(AllRules{}, [&](auto rule, int index) {
    using Rule = decltype(rule);
    static_assert(sizeof(Rule::kOptions) / sizeof(OptionSpec) <= kMaxOptions);
    table.record_size[index] = sizeof(StepRecord<Rule>);
    table.step[index] = step_of<Rule>;
    if constexpr (Rule::kDirectionNorm) table.direction_norms[index] = direction_norms_of<Rule>;
  });
  return table;
}

const Table kTable = make_table();

}  // namespace

size_t record_size(int rule) { return kTable.record_size[rule]; }

cudaError_t step(int rule, const StepCall& call, cudaStream_t stream) { return kTable.step[rule](call, stream); }

cudaError_t direction_norms(int rule, const StepCall& call, double* pieces, double* norms, cudaStream_t stream) {
  return kTable.direction_norms[rule](call, pieces, norms, stream);
}

}  // namespace bnbops::cuda
