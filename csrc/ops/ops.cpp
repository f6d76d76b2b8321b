// Every operator's schema.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/optimizer/optimizer.h"
#include "rules/all.h"

namespace bnbops {
namespace {

void define_rules(torch::stable::detail::StableLibrary& m) {
  for_each_rule(AllRules{}, [&](auto rule, int) {
    using Rule = decltype(rule);
    for (const Part part : {Part::kStep, Part::kDirection, Part::kApply}) {
      m.def(schema_of(names_of<Rule>(part)).c_str());
    }
  });
}

// Operators on 4-bit weights: weight_4bit/weight_4bit.h tells what the arguments mean.
void define_4bit(torch::stable::detail::StableLibrary& m) {
  const std::string nested =
      "*, Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256";
  const std::string weight = "Tensor weight, Tensor absmax, ", type = "int[] shape, int blocksize, str quant_type, ";
  const std::string rest = type + nested + ") -> Tensor";
  const std::string codes = "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, ";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def("quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)");
  def("dequantize_4bit" + codes + nested + ") -> Tensor");
  def("dequantize_4bit.out" + codes + nested + ", Tensor(a!) out) -> ()");
  def("embedding_4bit(Tensor indices, " + weight + type + "ScalarType dtype, " + nested + ") -> Tensor");
  def("linear_4bit(Tensor x, " + weight + "Tensor? bias, " + rest);
  def("linear_4bit_input_grad(Tensor grad, " + weight + rest);
  def("grouped_linear_4bit(Tensor x, " + weight + "Tensor? bias, Tensor offsets, " + rest);
  def("grouped_linear_4bit_input_grad(Tensor grad, " + weight + "Tensor offsets, " + rest);
}

void define_int8(torch::stable::detail::StableLibrary& m) {
  m.def("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor)");
  m.def("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor");
  m.def("int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("int8_linear_matmul(Tensor A, Tensor B) -> Tensor");
  m.def("int8_linear_matmul.out(Tensor A, Tensor B, *, Tensor(a!) out) -> ()");
  m.def(
      "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
      "ScalarType? dtype=None) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, float threshold) -> Tensor");
  m.def("linear_int8_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("linear_int8_input_grad(Tensor grad, Tensor weight, Tensor scale) -> Tensor");
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
  m.def("encode_state(Tensor values, str codec, str role, bool flat=False) -> (Tensor, Tensor)");
  m.def("decode_state(Tensor codes, Tensor absmax, str codec, str role) -> Tensor");
  bnbops::define_rules(m);
  bnbops::define_int8(m);
}
