// Optimizer steps and their halves, for every rule: a kernel of a thread for each parameter, and one of a warp for each
// block of 256 elements, for all parameters of a call.
#include <utility>

#include "cuda/optimizer_kernels.h"
#include "cuda/states.h"
#include "rules/all.h"
#include "rules/rule.h"

namespace bnbops::cuda {
namespace {

// ---- the first kernel ----------------------------------------------------------------------------------------------

// What it makes of a parameter: the options and the numbers in the device's memory become the scalars of a step, once
// for all blocks.
template <class Rule>
struct StepRecord {
  StepJob job;
  typename Rule::Hyper hyper;
  int64_t first, end;  // blocks among those of all
  bool skipped;
};

// A thread has a parameter, and counts its step. One whose numbers the CPU's operator would refuse is left alone.
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

// ---- a block in the registers of a warp: eight elements of a parameter, its gradient and its states in each lane ---

// Thread blocks on a multiprocessor: as many registers as it takes. States of any codec take as many as one state more.
template <class Rule, class Codec>
constexpr int kStepResident = [] {
  constexpr int kWeight = Rule::kStates + (Rule::kStates > 0 && std::is_same_v<Codec, AnyCodec>);
  return kWeight > 2 ? 2 : kWeight > 1 ? 3 : kResident;
}();

// Calls visit(k) for each state of a rule; k is a constant.
template <class Rule, class Visit>
BNBOPS_DEVICE void for_states(const Visit& visit) {
  if constexpr (Rule::kStates > 0) visit(std::integral_constant<int, 0>{});
  if constexpr (Rule::kStates > 1) visit(std::integral_constant<int, 1>{});
  if constexpr (Rule::kStates > 2) visit(std::integral_constant<int, 2>{});
  static_assert(Rule::kStates <= kMaxStates && kMaxStates == 3);
}

// Whether a rule has a state with, or without, a sign.
template <class Rule, bool kSigned>
constexpr bool kHasState = [] {
  for (int k = 0; k < Rule::kStates; ++k) {
    if (has_sign(Rule::kStateSpecs[k].role) == kSigned) return true;
  }
  return false;
}();

// The maps of a rule's states, all of one codec.
template <bool kSigned>
struct NoMap {};
template <class Rule, class Codec, bool kSigned>
using MapOrNone = std::conditional_t<kHasState<Rule, kSigned>, Map<Codec, kSigned>, NoMap<kSigned>>;
template <class Rule, class Codec>
struct MapsOf : MapOrNone<Rule, Codec, true>, MapOrNone<Rule, Codec, false> {};

// Those in shared memory, which all threads of a thread block must ask for; NoMaps in place of a codec.
template <class Rule, class Codec>
BNBOPS_DEVICE decltype(auto) shared_maps() {
  if constexpr (number_of<Codec>() == kUncoded) {
    return NoMaps{};
  } else {
    __shared__ MapsOf<Rule, Codec> maps;
    if constexpr (kHasState<Rule, true>) copy_table<Map<Codec, true>>(kMap<Codec, true>, maps);
    if constexpr (kHasState<Rule, false>) copy_table<Map<Codec, false>>(kMap<Codec, false>, maps);
    __syncthreads();
    return static_cast<const MapsOf<Rule, Codec>&>(maps);
  }
}

// What a rule sees of a lane's elements.
template <class Rule>
struct Elements {
  float p[kOctet], g[kOctet], s[kSlots<Rule>][kOctet];

  // Calls visit(g, p, states) for each; what they hold afterwards is kept.
  template <class Visit>
  BNBOPS_DEVICE void each(const Visit& visit) {
    unrolled<kOctet>([&](int i) {
      StatesOf<float, Rule> states{};
      unrolled<Rule::kStates>([&](int k) { states[k] = s[k][i]; });
      visit(g[i], p[i], states);
      unrolled<Rule::kStates>([&](int k) { s[k][i] = states[k]; });
    });
  }
};

template <class Rule, class Codec, class Maps>
BNBOPS_DEVICE Elements<Rule> load_elements(const StepJob& job, const Place& place, const Maps& maps) {
  Loaded state[kSlots<Rule>];
  for_states<Rule>([&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::load(job.state[k], place, state[k]); });
  const Octet p = load_octet(job.param, job.param_dtype, place.at, place.count);
  const Octet g = load_octet(job.grad, job.grad_dtype, place.at, place.count);
  Elements<Rule> x;
  for_states<Rule>(
      [&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::decode(job.state[k], state[k], maps, x.s[k]); });
  to_floats(p, job.param_dtype, x.p);
  to_floats(g, job.grad_dtype, x.g);
  return x;
}

template <class Rule, class Codec, class Maps>
BNBOPS_DEVICE void store_states(const StepJob& job, const Place& place, const Maps& maps, Elements<Rule>& x) {
  if constexpr (!std::is_same_v<Codec, Uncoded>) __syncwarp();  // every lane has read the old scales
  for_states<Rule>(
      [&](auto k) { StateOf<Codec, Rule::kStateSpecs[k].role>::store(job.state[k], place, maps, x.s[k]); });
}

// ---- the second kernel ---------------------------------------------------------------------------------------------

// `Codec`: of all states, or what is in place of one.
template <class Rule, class Codec>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule, Codec>) step_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  const auto& maps = shared_maps<Rule, Codec>();
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    if (record.skipped) return;
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    auto x = load_elements<Rule, Codec>(job, place, maps);
    x.each([&](float g, float& p, StatesOf<float, Rule>& s) { guarded_update<Rule>(g, p, s, record.hyper); });
    store_octet(job.param, job.param_dtype, place.at, place.count, x.p);
    store_states<Rule, Codec>(job, place, maps, x);
  });
}

// Moves the states on and writes the directions, NaN for what no step would touch.
template <class Rule>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule, AnyCodec>)
    direction_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    Elements<Rule> x;
    if (record.skipped) {
#pragma unroll
      for (float& u : x.p) u = float_from_bits(kNanBits);
    } else {
      x = load_elements<Rule, AnyCodec>(job, place, NoMaps{});
      x.each([&](float g, float& p, StatesOf<float, Rule>& s) { p = guarded_direction<Rule>(g, p, s, record.hyper); });
      store_states<Rule, AnyCodec>(job, place, NoMaps{}, x);
    }
    store_octet(job.direction, DType::kFloat32, place.at, place.count, x.p);
  });
}

// Takes a step along given directions.
template <class Rule>
__global__ void __launch_bounds__(kThreads, kResident) apply_kernel(const Many<StepRecord<Rule>> many) {
  __shared__ StepRecord<Rule> records[kWarps];
  for_units(many, records, [&](const StepRecord<Rule>& record, int64_t block) {
    if (record.skipped) return;
    const StepJob& job = record.job;
    const Place place = place_in(job, block);
    const Octet from = load_octet(job.param, job.param_dtype, place.at, place.count);
    const Octet along = load_octet(job.direction, DType::kFloat32, place.at, place.count);
    float p[kOctet], u[kOctet];
    to_floats(from, job.param_dtype, p);
    to_floats(along, DType::kFloat32, u);
    unrolled<kOctet>([&](int i) { guarded_apply<Rule>(p[i], u[i], record.hyper); });
    store_octet(job.param, job.param_dtype, place.at, place.count, p);
  });
}

// ---- launches ------------------------------------------------------------------------------------------------------

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
  static_assert(sizeof(Rule::kOptions) / sizeof(OptionSpec) <= kMaxOptions);
  const auto many = launch_prepare<Rule>(call, stream);
  const StepKernel<Rule> kernel = kernel_for<Rule>(call.part, call.codec);
  return launch(kernel.run, grid_of_units(call.blocks, kernel.resident), stream, many);
}

}  // namespace

size_t record_size(int rule) {
  size_t size = 0;
  for_each_rule(AllRules{}, [&](auto that, int index) {
    if (index == rule) size = sizeof(StepRecord<decltype(that)>);
  });
  return size;
}

cudaError_t step(int rule, const StepCall& call, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  for_each_rule(AllRules{}, [&](auto that, int index) {
    if (index == rule) error = run_rule<decltype(that)>(call, stream);
  });
  return error;
}

}  // namespace bnbops::cuda
