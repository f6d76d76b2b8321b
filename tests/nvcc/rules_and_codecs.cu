// The shared rules and codecs in kernels: compiled by tests/test_nvcc_headers.py, not run.
#include "codecs.h"
#include "lanes_scalar.h"
#include "rules.h"

using namespace bnbops;

template <class Rule>
__global__ void update(const float* g, float* p, float* state, int n, typename Rule::Hyper hyper) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  StatesOf<float, Rule> s;
  for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k * n + i];
  guarded_update<Rule>(g[i], p[i], s, hyper);
  for (int k = 0; k < Rule::kStates; ++k) state[k * n + i] = s[k];
}

// A kernel for each rule of the table.
template <class... Rules>
void launch_all(RuleList<Rules...>) {
  (update<Rules><<<1, 256>>>(nullptr, nullptr, nullptr, 0, typename Rules::Hyper{}), ...);
}
void launch_all() { launch_all(AllRules{}); }

template <bool kSigned>
__global__ void encode_dynamic(const float* x, int* codes, int n, float absmax, DynamicEncoder encoder) {
  const DynamicTables<ScalarLanes> tables(encoder);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) codes[i] = nearest_magnitude<ScalarLanes, kSigned>(x[i], inverse_scale(absmax), tables);
}
template __global__ void encode_dynamic<true>(const float*, int*, int, float, DynamicEncoder);
template __global__ void encode_dynamic<false>(const float*, int*, int, float, DynamicEncoder);

__global__ void encode_nearest(const float* x, int* codes, int n, float absmax, const NearestEncoder* encoder) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) codes[i] = nearest_entry<ScalarLanes>(x[i] * inverse_scale(absmax), *encoder);
}
