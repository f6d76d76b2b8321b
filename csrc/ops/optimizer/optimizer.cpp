#include "ops/optimizer/optimizer.h"

#include <algorithm>
#include <string_view>

namespace bnbops {

int codec_named(const Operator& op, const std::string& given, const std::string& name) {
  int found = name == kUncodedName ? kUncoded : kMixed;
  std::string known;
  for_each_codec(AllCodecs{}, [&](auto codec, int number) {
    if (name == codec.kName) found = number;
    known += std::string("'") + codec.kName + "', ";
  });
  BNBOPS_CHECK(found != kMixed, op, "codec must be ", known, "'", kUncodedName,
               "', or one of these for each state with commas between, got '", given, "'");
  return found;
}

BlockLayout row_layout(const Tensor& t) {
  const int64_t rows = t.dim() > 0 ? t.size(0) : 1, inner = rows > 0 ? t.numel() / rows : 0;
  return {rows, inner, divide_up(inner, kStateBlock)};
}

ScalarType dtype_of_codes(int number) {
  ScalarType dtype = ScalarType::Float;
  for_each_codec(AllCodecs{}, [&](auto codec, int i) {
    if (i == number) dtype = codec.kCodes == CodeType::kUint8 ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
  });
  return dtype;
}

void check_absmax(const Argument& absmax, const Tensor& param) {
  absmax.dtype(ScalarType::Float).device_of(param).contiguous();
  const auto [rows, inner, per_row] = row_layout(param);
  const int64_t flat = divide_up(param.numel(), kStateBlock);
  const Tensor& t = absmax.tensor;
  const bool ok = (t.dim() == 2 && t.size(0) == rows && (t.size(1) == per_row || param.numel() == 0)) ||
                  (t.dim() == 1 && t.size(0) == flat);
  BNBOPS_CHECK(ok, absmax, " has shape ", shape_of(t), ", but params of shape ", shape_of(param), " need [", rows, ", ",
               per_row, "] (blocks of ", kStateBlock, " in each row) or [", flat, "] (flat blocks)");
}

namespace {

void check_lengths(const StepNames& names, const StepArguments& a) {
  const auto check = [&](const std::string& list, size_t length, const char* remark) {
    BNBOPS_CHECK(length == a.params.size(), names.op(), list, " has ", length, " tensors for ", a.params.size(),
                 " params", remark);
  };
  if (names.part != Part::kApply) check("grads", a.grads.size(), "");
  if (names.part != Part::kStep) check("directions", a.directions.size(), "");
  check("steps", a.steps.size(), "");
  for (size_t k = 0; k < a.states.size(); ++k) {
    check(names.states[k].name, a.states[k].size(), "");
    if (a.coded(k)) {
      check(names.absmax[k], a.absmax[k].size(), " (one each for 8-bit states, none at all for float32 states)");
    }
  }
}

// Fills in the codec of each state: kUncoded where there are no scales, else what it is named.
void find_codecs(const StepNames& names, StepArguments& a) {
  std::vector<int> named;
  for (size_t begin = 0; begin <= a.codec.size();) {
    const size_t end = std::min(a.codec.find(',', begin), a.codec.size());
    named.push_back(codec_named(names.op(), a.codec, a.codec.substr(begin, end - begin)));
    begin = end + 1;
  }
  const bool one = named.size() == 1;
  BNBOPS_CHECK(one || named.size() == a.states.size(), names.op(), "codec names ", named.size(), " codecs for ",
               a.states.size(), " states, got '", a.codec, "'");
  for (size_t k = 0; k < a.states.size(); ++k) {
    const int codec = named[one ? 0 : k];
    const bool fits = a.coded(k) ? codec != kUncoded : one || codec == kUncoded || a.params.empty();
    BNBOPS_CHECK(fits, names.op(), names.absmax[k], " has ", a.absmax[k].size(),
                 " tensors, which does not fit the codec that '", a.codec, "' names for ", names.states[k].name);
    a.codecs.push_back(a.coded(k) ? codec : kUncoded);
  }
}

size_t first_coded(const StepArguments& a) {
  size_t k = 0;
  while (k < a.states.size() && !a.coded(k)) ++k;
  return k;
}

void check_shape(const Argument& argument, const Tensor& param) {
  BNBOPS_CHECK(same_sizes(argument.tensor.sizes(), param.sizes()), argument, " has shape ", shape_of(argument.tensor),
               ", but its parameter has ", shape_of(param));
}

void check_state(const StepNames& names, const StepArguments& a, size_t k, int64_t i) {
  const Tensor& param = a.params[i];
  const Argument state = names.op()(a.states[k][i], names.states[k].name, i);
  const ScalarType dtype = dtype_of_codes(a.codecs[k]), found = state.tensor.scalar_type();
  BNBOPS_CHECK(found == dtype, state, " must be ", dtype_name(dtype),
               a.coded(k) ? "" : ", as there is no " + names.absmax[k], ", got ", dtype_name(found));
  check_shape(state.device_of(param).contiguous(), param);
  if (!a.coded(k)) return;
  const Argument absmax = names.op()(a.absmax[k][i], names.absmax[k].c_str(), i);
  check_absmax(absmax, param);
  BNBOPS_CHECK(absmax.tensor.dim() == a.absmax[first_coded(a)][i].dim(), absmax,
               " is laid out by rows and another by flat blocks; use one layout for all states of a parameter");
}

void check_param(const StepNames& names, const StepArguments& a, int64_t i) {
  const Operator op = names.op();
  const Tensor& param = a.params[i];
  op(param, "params", i).floats().device_of(a.params[0]).contiguous();
  if (names.part != Part::kApply) {
    const Argument grad = op(a.grads[i], "grads", i);
    const ScalarType dtype = grad.tensor.scalar_type();
    BNBOPS_CHECK(dtype == param.scalar_type() || dtype == ScalarType::Float, grad, " must be ",
                 dtype_name(param.scalar_type()), " (its parameter's dtype) or float32, got ", dtype_name(dtype));
    check_shape(grad.device_of(param), param);
  }
  if (names.part != Part::kStep) {
    check_shape(op(a.directions[i], "directions", i).dtype(ScalarType::Float).device_of(param).contiguous(), param);
  }
  for (size_t k = 0; k < a.states.size(); ++k) check_state(names, a, k, i);
  op(a.steps[i], "steps", i).dtype(ScalarType::Float).one_element().device_of(param);
}

void check_tensors_of_all(const StepNames& names, const StepArguments& a) {
  const Operator op = names.op();
  const Argument lr = op(*a.lr, "lr");
  const ScalarType dtype = a.lr->scalar_type();
  BNBOPS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, lr, " must be float32 or float64, got ",
               dtype_name(dtype));
  lr.one_element();
  if (!a.params.empty()) lr.readable_beside(a.params[0]);
  for (const auto& [tensor, name] : {std::pair{&a.grad_scale, "grad_scale"}, std::pair{&a.found_inf, "found_inf"}}) {
    if (!*tensor) continue;
    const Argument number = op(**tensor, name).dtype(ScalarType::Float).one_element();
    if (!a.params.empty()) number.readable_beside(a.params[0]);
  }
  const auto count = static_cast<int64_t>(a.params.size()), options = static_cast<int64_t>(a.options.size());
  for (const auto& [tensor, name] : {std::pair{&a.clip, "clip"}, std::pair{&a.trust, "trust"}}) {
    if (!*tensor) continue;
    const Argument factors = op(**tensor, name).dtype(ScalarType::Float).contiguous();
    factors.shape({count}, "one number for each parameter");
    if (count > 0) factors.device_of(a.params[0]);
  }
  if (!a.held_options) return;
  const Argument held = op(*a.held_options, "options").dtype(ScalarType::Double).contiguous();
  BNBOPS_CHECK(held.tensor.is_cpu(), held, " must be on the CPU");
  held.shape({options}, "one number for each option in the schema's order");
}

// Options in a tensor are no constants of a compiled graph.
void check_options(const StepNames& names, StepArguments& a) {
  if (a.held_options) std::copy_n(data_of<double>(*a.held_options), a.options.size(), a.options.begin());
  for (size_t k = 0; k < a.options.size(); ++k) {
    const OptionSpec& spec = names.options[k];
    BNBOPS_CHECK(spec.range.has(a.options[k]), names.op(), spec.name, " must be ", spec.range.text, ", got ",
                 a.options[k]);
  }
  const char* conflict = names.conflict(a.options.data());
  BNBOPS_CHECK(conflict == nullptr, names.op(), conflict);
}

// ---- the visitors of arguments -----------------------------------------------------------------------------------

struct Schema {
  std::string text;
  char alias = 'a';

  void list(const char* name, const std::vector<Tensor>& /*tensors*/, bool written) {
    text += (text.empty() ? "" : ", ") + (written ? std::string("Tensor(") + alias++ + "!)[] " : "Tensor[] ") + name;
  }
  template <class Value>
  void value(const char* type, const char* name, const char* otherwise, const Value& /*value*/) {
    if (text.find('*') == std::string::npos) text += ", *";
    const char* quote = std::is_same_v<Value, std::string> ? "\"" : "";
    text += std::string(", ") + type + " " + name;
    if (otherwise != nullptr) text += std::string("=") + quote + otherwise + quote;
  }
};

struct FromStack {
  Stack stack;

  void list(const char* /*name*/, std::vector<Tensor>& tensors, bool /*written*/) {
    tensors = stack.take<std::vector<Tensor>>();
  }
  void value(const char* type, const char* /*name*/, const char* /*otherwise*/, double& number) {
    switch (type[0]) {
      case 'b': number = stack.take<bool>(); break;
      case 'i': number = static_cast<double>(stack.take<int64_t>()); break;
      default: number = stack.take<double>();
    }
  }
  void value(const char* type, const char* /*name*/, const char* /*otherwise*/, OptionalTensor& tensor) {
    const bool optional = std::string_view(type) == "Tensor?";
    tensor = optional ? stack.take<OptionalTensor>() : stack.take<Tensor>();
  }
  template <class Value>
  void value(const char* /*type*/, const char* /*name*/, const char* /*otherwise*/, Value& value) {
    value = stack.take<Value>();
  }
};

struct Touched {
  Operator op;
  Overlaps overlaps;

  void list(const char* name, const std::vector<Tensor>& tensors, bool written) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Argument argument = op(tensors[i], name, static_cast<int64_t>(i));
      written ? overlaps.writes(argument) : overlaps.reads(argument);
    }
  }
  void value(const char* /*type*/, const char* name, const char* /*otherwise*/, const OptionalTensor& tensor) {
    if (tensor) overlaps.reads(op(*tensor, name));
  }
  template <class Value>
  void value(const char* /*type*/, const char* /*name*/, const char* /*otherwise*/, const Value& /*no tensor*/) {}
};

}  // namespace

std::string schema_of(const StepNames& names) {
  Schema schema;
  const StepArguments none(names);
  each_argument(names, none, schema);
  return names.name + "(" + schema.text + ") -> ()";
}

StepArguments arguments_of(const StepNames& names, StableIValue* values) {
  StepArguments arguments(names);
  FromStack taken{Stack(values)};
  each_argument(names, arguments, taken);
  return arguments;
}

void check_step(const StepNames& names, StepArguments& a) {
  check_lengths(names, a);
  find_codecs(names, a);
  for (size_t i = 0; i < a.params.size(); ++i) check_param(names, a, static_cast<int64_t>(i));
  check_tensors_of_all(names, a);
  Touched touched{names.op(), {}};
  each_argument(names, a, touched);
  touched.overlaps.check();
  check_options(names, a);
}

StepJob step_job(const StepArguments& a, size_t i, const Tensor& grad) {
  const Tensor& param = a.params[i];
  const size_t first = first_coded(a);
  const bool by_rows = first < a.states.size() && a.absmax[first][i].dim() == 2;
  BlockLayout layout = by_rows ? row_layout(param) : flat_layout(param.numel(), kStateBlock);
  if (layout.inner % kStateBlock == 0) layout = flat_layout(param.numel(), kStateBlock);  // the same blocks
  StepJob job{};
  job.param = param.mutable_data_ptr();
  if (!a.grads.empty()) job.grad = grad.const_data_ptr();
  if (!a.directions.empty()) job.direction = mutable_data<float>(a.directions[i]);
  for (size_t k = 0; k < a.states.size(); ++k) {
    job.state[k] = {a.states[k][i].mutable_data_ptr(), a.coded(k) ? mutable_data<float>(a.absmax[k][i]) : nullptr,
                    a.codecs[k]};
  }
  job.inner = layout.inner;
  job.blocks_per_row = layout.blocks_per_row;
  job.blocks = layout.blocks();
  job.param_dtype = dtype_of(param);
  job.grad_dtype = dtype_of(grad);
  return job;
}

}  // namespace bnbops
