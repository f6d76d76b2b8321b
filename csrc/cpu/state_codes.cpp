// The operators on states outside a step, on the CPU.
#include "ops/optimizer/state_codes.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 128;  // blocks worth a thread

struct StatesOnCpu {
  explicit StatesOnCpu(const Tensor& /*like*/) {}
  static void prepare(Tensor& fresh) { prefer_huge_pages(fresh); }
  void encode(const StateJob& job) const { run(isa().kernels->encode_states, job); }
  void decode(const StateJob& job) const { run(isa().kernels->decode_states, job); }

 private:
  static void run(StateKernel kernel, const StateJob& job) {
    torch::stable::parallel_for(0, job.blocks, kGrain, [&](int64_t first, int64_t last) { kernel(job, first, last); });
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::StateOperators<bnbops::cpu::StatesOnCpu>::implement(m); }
