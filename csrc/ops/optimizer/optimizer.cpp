#include "ops/optimizer/optimizer.h"

namespace bnbops {
namespace {

void check_lengths(const StepNames& names, const StepArguments& a) {
  const auto check = [&](const std::string& list, size_t length, const char* remark) {
    BNBOPS_CHECK(length == a.params.size(), "bnbops::", names.op, ": ", list, " has ", length, " tensors for ",
                 a.params.size(), " params", remark);
  };
  check("grads", a.grads.size(), "");
  check("steps", a.steps.size(), "");
  for (size_t k = 0; k < a.states.size(); ++k) {
    check(names.states[k], a.states[k].size(), "");
    if (a.quantized()) {
      check(names.absmax[k], a.absmax[k].size(), " (one each for 8-bit states, none at all for float32 states)");
    }
  }
}

void check_absmax(const Named& absmax, const Tensor& param) {
  check_dtype(absmax, ScalarType::Float);
  check_same_device(absmax, param);
  check_contiguous(absmax);
  const int64_t rows = param.dim() > 0 ? param.size(0) : 1;
  const int64_t inner = rows > 0 ? param.numel() / rows : 0;
  const int64_t per_row = divide_up(inner, kStateBlock), flat = divide_up(param.numel(), kStateBlock);
  const Tensor& t = absmax.tensor;
  const bool ok = (t.dim() == 2 && t.size(0) == rows && (t.size(1) == per_row || param.numel() == 0)) ||
                  (t.dim() == 1 && t.size(0) == flat);
  BNBOPS_CHECK(ok, absmax, " has shape ", shape_of(t), ", but params of shape ", shape_of(param), " need [", rows, ", ",
               per_row, "] (blocks of ", kStateBlock, " in each row) or [", flat, "] (flat blocks)");
}

void check_param(const StepNames& names, const StepArguments& a, size_t i) {
  const char* op = names.op.c_str();
  const auto index = static_cast<int64_t>(i);
  const Tensor& param = a.params[i];
  const Named named_param{param, op, "params", index}, grad{a.grads[i], op, "grads", index};
  const auto check_shape = [&](const Named& named) {
    BNBOPS_CHECK(same_shape(named.tensor, param), named, " has shape ", shape_of(named.tensor),
                 ", but its parameter has ", shape_of(param));
  };
  check_float(named_param);
  check_same_device(named_param, a.params[0]);
  check_contiguous(named_param);

  const ScalarType dtype = grad.tensor.scalar_type();
  BNBOPS_CHECK(dtype == param.scalar_type() || dtype == ScalarType::Float, grad, " must be ",
               dtype_name(param.scalar_type()), " (its parameter's dtype) or float32, got ", dtype_name(dtype));
  check_same_device(grad, param);
  check_shape(grad);

  for (size_t k = 0; k < a.states.size(); ++k) {
    const Named state{a.states[k][i], op, names.states[k], index};
    check_dtype(state, a.quantized() ? ScalarType::Byte : ScalarType::Float);
    check_same_device(state, param);
    check_contiguous(state);
    check_shape(state);
    if (!a.quantized()) continue;
    const Named absmax{a.absmax[k][i], op, names.absmax[k].c_str(), index};
    check_absmax(absmax, param);
    BNBOPS_CHECK(a.absmax[k][i].dim() == a.absmax[0][i].dim(), absmax,
                 " is laid out by rows and another by flat blocks; use one layout for all states of a parameter");
  }
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
  for (size_t i = 0; i < a.params.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    overlaps.writes({a.params[i], op, "params", index});
    overlaps.reads({a.grads[i], op, "grads", index});
    overlaps.writes({a.steps[i], op, "steps", index});
    for (size_t k = 0; k < a.states.size(); ++k) {
      overlaps.writes({a.states[k][i], op, names.states[k], index});
      if (a.quantized()) overlaps.writes({a.absmax[k][i], op, names.absmax[k].c_str(), index});
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

void check_arguments(const StepNames& names, const StepArguments& arguments) {
  check_lengths(names, arguments);
  for (size_t i = 0; i < arguments.params.size(); ++i) check_param(names, arguments, i);
  check_scalars(names, arguments);
}

void check_step(const StepNames& names, const StepArguments& arguments) {
  check_arguments(names, arguments);
  check_aliases(names, arguments);
}

BlockLayout state_layout(const StepArguments& a, size_t i) {
  const Tensor& param = a.params[i];
  if (!a.quantized() || a.absmax[0][i].dim() == 1) return flat_layout(param.numel(), kStateBlock);
  const int64_t rows = param.dim() > 0 ? param.size(0) : 1;
  const int64_t inner = rows > 0 ? param.numel() / rows : 0;
  if (inner % kStateBlock == 0) return flat_layout(param.numel(), kStateBlock);  // the same blocks
  return {rows, inner, divide_up(inner, kStateBlock)};
}

}  // namespace bnbops
