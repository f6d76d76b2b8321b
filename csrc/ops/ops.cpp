// Every operator's schema.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/facts.h"
#include "ops/int8/int8.h"
#include "ops/optimizer/optimizer.h"
#include "ops/optimizer/state_codes.h"
#include "ops/weight_4bit/weight_4bit.h"
#include "rules/all.h"

#ifndef BNBOPS_LIBRARY
#define BNBOPS_LIBRARY bnbops
#endif

namespace bnbops {
namespace {

void define_rules(torch::stable::detail::StableLibrary& m) {
  for (const char* schema : kStateSchemas) m.def(schema);
  for_each_rule(AllRules{}, [&](auto rule, int) {
    using Rule = decltype(rule);
    for (const Part part : {Part::kStep, Part::kDirection, Part::kApply}) m.def(schema_of<Rule>(part).c_str());
  });
}

// Operators on 4-bit weights: weight_4bit/weight_4bit.h tells what the arguments mean.
void define_4bit(torch::stable::detail::StableLibrary& m) {
  const std::string type = "int[] shape, int blocksize, str quant_type, ";
  const std::string typed_result = "int blocksize, str quant_type, int[] shape, ScalarType dtype, ";
  const std::string nested = kNestedSchema;
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def("quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)");
  def("dequantize_4bit(Tensor A, Tensor absmax, " + typed_result + nested + ") -> Tensor");
  def("dequantize_4bit.out(Tensor A, Tensor absmax, " + typed_result + nested + ", Tensor(a!) out) -> ()");
  def("embedding_4bit(Tensor indices, Tensor weight, Tensor absmax, int[] shape, int blocksize, str quant_type, "
      "ScalarType dtype, " +
      nested + ") -> Tensor");
  def("linear_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, " + type + nested + ") -> Tensor");
  def("linear_4bit_input_grad(Tensor grad, Tensor weight, Tensor absmax, " + type + nested + ") -> Tensor");
  def("grouped_linear_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, Tensor offsets, " + type + nested +
      ") -> Tensor");
  def("grouped_linear_4bit_input_grad(Tensor grad, Tensor weight, Tensor absmax, Tensor offsets, " + type + nested +
      ") -> Tensor");
}

}  // namespace
}  // namespace bnbops

STABLE_TORCH_LIBRARY(BNBOPS_LIBRARY, m) {
  m.def("isa() -> str");
  m.def("isas() -> str[]");
  m.def("facts() -> str");
  m.def("quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)");
  m.def("dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, *, "
      "Tensor(a!) out) -> ()");
  bnbops::define_4bit(m);
  m.def("squared_norms(Tensor[] tensors) -> Tensor");
  m.def(
      "percentile_clip_(Tensor(a!)[] gnorm_vec, Tensor squared_norms, Tensor[] steps, *, int percentile, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor");
  bnbops::define_rules(m);
  bnbops::define_int8(m);
}

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, CompositeExplicitAutograd, m) { m.impl("facts", TORCH_BOX(&bnbops::facts)); }
