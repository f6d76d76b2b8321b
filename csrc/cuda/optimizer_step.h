// The step kernel: one launch for all parameters of a call, a warp for each block.
#pragma once

#include "cuda/optimizer_block.h"
#include "cuda/optimizer_prepare.h"

namespace bnbops::cuda {

template <class Rule, bool kQuantized>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule>) step_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  const MapsOf<Rule>* maps = shared_maps<Rule, kQuantized>();
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    if (record.skipped) return;
    auto x = load_elements<Rule, kQuantized>(record.job, block, maps);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      auto states = states_of(x, i);
      guarded_update<Rule>(x.g[i], x.p[i], states, record.hyper);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) x.s[k][i] = states[k];
    }
    store_elements<Rule, kQuantized>(record.job, block, maps, x);
  });
}

template <class Rule, bool kQuantized>
void launch_step(const Many<StepRecord<Rule>>& many, cudaStream_t stream) {
  LAUNCH((step_kernel<Rule, kQuantized>), grid_of_units(many.units, kStepResident<Rule>), dim3(kThreads), 0, stream,
         many);
}

}  // namespace bnbops::cuda
