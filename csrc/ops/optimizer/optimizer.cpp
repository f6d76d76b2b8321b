#include "ops/optimizer/optimizer.h"

#include <algorithm>

namespace bnbops {

int codec_named(const std::string& op, const std::string& given, const std::string& name) {
  int found = name == kUncodedName ? kUncoded : kMixed;
  std::string known;
  for_each_codec(AllCodecs{}, [&](auto codec, int number) {
    if (name == codec.kName) found = number;
    known += std::string("'") + codec.kName + "', ";
  });
  BNBOPS_CHECK(found != kMixed, "bnbops::", op, ": codec must be ", known, "'", kUncodedName,
               "', or one of these for each state with commas between, got '", given, "'");
  return found;
}

ScalarType dtype_of_codes(int number) {
  ScalarType dtype = ScalarType::Float;
  for_each_codec(AllCodecs{}, [&](auto codec, int i) {
    if (i == number) dtype = codec.kCodes == CodeType::kUint8 ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
  });
  return dtype;
}

BlockLayout row_layout(const Tensor& t) {
  const int64_t rows = t.dim() > 0 ? t.size(0) : 1, inner = rows > 0 ? t.numel() / rows : 0;
  return {rows, inner, divide_up(inner, kStateBlock)};
}

std::vector<int64_t> absmax_shape(const Tensor& t, bool flat) {
  if (flat || t.dim() < 2) return {divide_up(t.numel(), kStateBlock)};
  return {row_layout(t).rows, row_layout(t).blocks_per_row};
}

void check_absmax(const Named& absmax, const Tensor& param) {
  check_dtype(absmax, ScalarType::Float);
  check_same_device(absmax, param);
  check_contiguous(absmax);
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
    BNBOPS_CHECK(length == a.params.size(), "bnbops::", names.op, ": ", list, " has ", length, " tensors for ",
                 a.params.size(), " params", remark);
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
    named.push_back(codec_named(names.op, a.codec, a.codec.substr(begin, end - begin)));
    begin = end + 1;
  }
  const bool one = named.size() == 1;
  BNBOPS_CHECK(one || named.size() == a.states.size(), "bnbops::", names.op, ": codec names ", named.size(),
               " codecs for ", a.states.size(), " states, got '", a.codec, "'");
  for (size_t k = 0; k < a.states.size(); ++k) {
    const int codec = named[one ? 0 : k];
    const bool fits = a.coded(k) ? codec != kUncoded : one || codec == kUncoded || a.params.empty();
    BNBOPS_CHECK(fits, "bnbops::", names.op, ": ", names.absmax[k], " has ", a.absmax[k].size(),
                 " tensors, which does not fit the codec that '", a.codec, "' names for ", names.states[k].name);
    a.codecs.push_back(a.coded(k) ? codec : kUncoded);
  }
}

void check_shape(const Named& named, const Tensor& param) {
  BNBOPS_CHECK(same_shape(named.tensor, param), named, " has shape ", shape_of(named.tensor),
               ", but its parameter has ", shape_of(param));
}

size_t first_coded(const StepArguments& a) {
  size_t k = 0;
  while (k < a.states.size() && !a.coded(k)) ++k;
  return k;
}

void check_state(const StepNames& names, const StepArguments& a, size_t k, size_t i) {
  const char* op = names.op.c_str();
  const auto index = static_cast<int64_t>(i);
  const Tensor& param = a.params[i];
  const Named state{a.states[k][i], op, names.states[k].name, index};
  const ScalarType dtype = dtype_of_codes(a.codecs[k]);
  BNBOPS_CHECK(state.tensor.scalar_type() == dtype, state, " must be ", dtype_name(dtype),
               a.coded(k) ? "" : ", as there is no " + names.absmax[k], ", got ",
               dtype_name(state.tensor.scalar_type()));
  check_same_device(state, param);
  check_contiguous(state);
  check_shape(state, param);
  if (!a.coded(k)) return;
  const Named absmax{a.absmax[k][i], op, names.absmax[k].c_str(), index};
  check_absmax(absmax, param);
  const size_t first = first_coded(a);
  BNBOPS_CHECK(a.absmax[k][i].dim() == a.absmax[first][i].dim(), absmax,
               " is laid out by rows and another by flat blocks; use one layout for all states of a parameter");
}

void check_param(const StepNames& names, const StepArguments& a, size_t i) {
  const char* op = names.op.c_str();
  const auto index = static_cast<int64_t>(i);
  const Tensor& param = a.params[i];
  const Named named_param{param, op, "params", index};
  check_float(named_param);
  check_same_device(named_param, a.params[0]);
  check_contiguous(named_param);
  if (names.part != Part::kApply) {
    const Named grad{a.grads[i], op, "grads", index};
    const ScalarType dtype = grad.tensor.scalar_type();
    BNBOPS_CHECK(dtype == param.scalar_type() || dtype == ScalarType::Float, grad, " must be ",
                 dtype_name(param.scalar_type()), " (its parameter's dtype) or float32, got ", dtype_name(dtype));
    check_same_device(grad, param);
    check_shape(grad, param);
  }
  if (names.part != Part::kStep) {
    const Named direction{a.directions[i], op, "directions", index};
    check_dtype(direction, ScalarType::Float);
    check_same_device(direction, param);
    check_contiguous(direction);
    check_shape(direction, param);
  }
  for (size_t k = 0; k < a.states.size(); ++k) check_state(names, a, k, i);
  const Named step{a.steps[i], op, "steps", index};
  check_dtype(step, ScalarType::Float);
  check_one_element(step);
  check_same_device(step, param);
}

// One fp32 number for each parameter.
void check_factors(const Named& named, const std::vector<Tensor>& params) {
  check_dtype(named, ScalarType::Float);
  check_contiguous(named);
  BNBOPS_CHECK(named.tensor.dim() == 1 && named.tensor.numel() == static_cast<int64_t>(params.size()), named,
               " must have shape [", params.size(), "], one number for each parameter, got ", shape_of(named.tensor));
  if (!params.empty()) check_same_device(named, params[0]);
}

void check_options(const Named& named, size_t count) {
  check_dtype(named, ScalarType::Double);
  check_contiguous(named);
  BNBOPS_CHECK(named.tensor.is_cpu(), named, " must be on the CPU");
  BNBOPS_CHECK(named.tensor.dim() == 1 && named.tensor.numel() == static_cast<int64_t>(count), named,
               " must have shape [", count, "], one number for each option in the schema's order, got ",
               shape_of(named.tensor));
}

void check_scalars(const StepNames& names, const StepArguments& a) {
  const char* op = names.op.c_str();
  const Named lr{*a.lr, op, "lr"};
  const ScalarType dtype = a.lr->scalar_type();
  BNBOPS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, lr, " must be float32 or float64, got ",
               dtype_name(dtype));
  check_one_element(lr);
  if (!a.params.empty()) check_readable(lr, a.params[0]);
  for (const auto& [tensor, name] : {std::pair{&a.grad_scale, "grad_scale"}, std::pair{&a.found_inf, "found_inf"}}) {
    if (!*tensor) continue;
    const Named named{**tensor, op, name};
    check_dtype(named, ScalarType::Float);
    check_one_element(named);
    if (!a.params.empty()) check_readable(named, a.params[0]);
  }
  for (const auto& [tensor, name] : {std::pair{&a.clip, "clip"}, std::pair{&a.trust, "trust"}}) {
    if (*tensor) check_factors({**tensor, op, name}, a.params);
  }
  if (a.held_options) check_options({*a.held_options, op, "options"}, a.options.size());
}

void check_aliases(const StepNames& names, const StepArguments& a) {
  const char* op = names.op.c_str();
  Overlaps overlaps;
  const auto touch = [&](bool writes, const std::vector<Tensor>& list, const char* name, size_t i) {
    if (list.empty()) return;
    const Named named{list[i], op, name, static_cast<int64_t>(i)};
    writes ? overlaps.writes(named) : overlaps.reads(named);
  };
  for (size_t i = 0; i < a.params.size(); ++i) {
    touch(names.part != Part::kDirection, a.params, "params", i);
    touch(false, a.grads, "grads", i);
    touch(names.part == Part::kDirection, a.directions, "directions", i);
    touch(names.part != Part::kApply, a.steps, "steps", i);
    for (size_t k = 0; k < a.states.size(); ++k) {
      touch(true, a.states[k], names.states[k].name, i);
      touch(true, a.absmax[k], names.absmax[k].c_str(), i);
    }
  }
  overlaps.reads({*a.lr, op, "lr"});
  if (a.held_options) overlaps.reads({*a.held_options, op, "options"});
  if (a.grad_scale) overlaps.reads({*a.grad_scale, op, "grad_scale"});
  if (a.found_inf) overlaps.reads({*a.found_inf, op, "found_inf"});
  if (a.clip) overlaps.reads({*a.clip, op, "clip"});
  if (a.trust) overlaps.reads({*a.trust, op, "trust"});
  overlaps.check();
}

}  // namespace

void check_step(const StepNames& names, StepArguments& arguments) {
  check_lengths(names, arguments);
  find_codecs(names, arguments);
  for (size_t i = 0; i < arguments.params.size(); ++i) check_param(names, arguments, i);
  check_scalars(names, arguments);
  check_aliases(names, arguments);
}

BlockLayout state_layout(const StepArguments& a, size_t i) {
  const Tensor& param = a.params[i];
  const size_t first = first_coded(a);
  if (first == a.states.size() || a.absmax[first][i].dim() == 1) return flat_layout(param.numel(), kStateBlock);
  const BlockLayout layout = row_layout(param);
  return layout.inner % kStateBlock == 0 ? flat_layout(param.numel(), kStateBlock) : layout;  // the same blocks
}

}  // namespace bnbops
