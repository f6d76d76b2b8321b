// The first kernel of every optimizer operator: a thread has a parameter. It turns the options and the numbers in the
// device's memory into the scalars of a step, once for all blocks, and counts the step.
#pragma once

#include "cuda/many_tensors.h"
#include "cuda/optimizer_kernels.h"
#include "rules/rule.h"

namespace bnbops::cuda {

template <class Rule>
struct StepRecord {
  StepJob job;
  typename Rule::Hyper hyper;
  int64_t first, end;  // blocks among those of all
  bool skipped;
};

// A parameter whose numbers the CPU's operator would refuse is left alone, its step count too.
template <class Rule>
BNBOPS_DEVICE void prepare(const StepItem& item, int i, const StepCommon& common, StepRecord<Rule>& record) {
  const double scale = value_of(common.grad_scale), steps = *item.step;
  const double clip = common.clip ? common.clip[i] : 1.0;
  const StepScalars x{value_of(common.lr), steps + (common.counts_step ? 1 : 0),
                      (common.maximize ? -1.0 : 1.0) / scale * clip, common.trust ? common.trust[i] : 1.0};
  const bool usable = is_finite(x.lr) && is_scale(scale) && is_amount_or_count(steps) && is_amount_or_count(clip) &&
                      is_amount_or_count(x.trust);
  clear_record(record);
  record.job = item.job;
  record.first = item.first;
  record.end = item.first + item.job.blocks;
  record.skipped = !usable || value_of(common.found_inf) != 0;
  if (record.skipped) return;
  record.hyper = Rule::prepare(common.option, x);
  if (common.counts_step) *item.step = to_float(x.step);
}

template <class Rule>
__global__ void prepare_kernel(const __grid_constant__ Batch<StepItem> batch, const __grid_constant__ StepCommon common,
                               StepRecord<Rule>* records) {
  const int i = static_cast<int>(blockIdx.x * kWarp + threadIdx.x);
  if (i >= batch.count) return;
  prepare<Rule>(batch.item[i], batch.first + i, common, records[batch.first + i]);
}

template <class Rule>
Many<StepRecord<Rule>> launch_prepare(const StepCall& call, cudaStream_t stream) {
  static_assert(sizeof(Batch<StepItem>) + sizeof(StepCommon) + sizeof(void*) <= 32764);
  auto* records = static_cast<StepRecord<Rule>*>(call.records);
  in_batches(call.items, call.count, [&](const Batch<StepItem>& batch) {
    const dim3 grid(static_cast<unsigned>(divide_up(batch.count, kWarp)));
    LAUNCH((prepare_kernel<Rule>), grid, dim3(kWarp), 0, stream, batch, call.common, records);
  });
  return {records, call.count, call.blocks};
}

}  // namespace bnbops::cuda
