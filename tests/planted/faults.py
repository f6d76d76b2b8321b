"""Faults that the tests have to notice: what stands in a file, and what a slip would have made of it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`old` stands in `file` once; with `new` in its place one of `tests`, files in tests/, has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # ---- codecs ----
    Fault(
        "the last element of a block with a rest does not count for its scale",
        "csrc/cpu/blocks.h",
        "Lanes::copy(padded, x + i, rest * sizeof(float));\n        take(padded);",
        "Lanes::copy(padded, x + i, (rest - 1) * sizeof(float));\n        take(padded);",
        ("ops/test_quantize.py",),
    ),
    Fault(
        "what divides becomes 0 where it is small",
        "csrc/codecs/dynamic8.h",
        "return Lanes::round_if_less(zero, x, place);",
        "return Lanes::round_if_less(Lanes::splat(kLargestZero), a, place);",
        ("ops/test_rules.py", "ops/test_rules_edges.py"),
    ),
    Fault(
        "a NaN is encoded as it is",
        "csrc/codecs/codec.h",
        "return x != x ? 0.0F : without_infinity(x);",
        "return without_infinity(x);",
        ("ops/test_quantize.py", "ops/test_rules_edges.py"),
    ),
    Fault(
        "elements that begin anew get the code 0, not that of 0",
        "bnbops/optim/core/codec.py",
        "as_bytes(tensor).masked_fill_(mask, code(name, codec, 0.0))",
        "as_bytes(tensor).masked_fill_(mask, 0)",
        ("optim/test_edit_state.py",),
    ),
    Fault(
        "a block waits for its codes while the next one has another order",
        "csrc/cpu/coded_step.h",
        "if (pending_.paired != L::kPairs || block.n < kStateBlock) encode_pending();",
        "",
        ("ops/test_isa.py", "ops/test_rules.py"),
    ),
    Fault(
        "states that a careful look left out of the largest magnitude",
        "csrc/cpu/coded_step.h",
        "    careful_ = true;\n    const Coders",
        "    const Coders",
        ("ops/test_rules_edges.py",),
    ),
    Fault(
        "a group has a NaN in its parameters alone",
        "csrc/cpu/coded_step.h",
        "witness = witness + Rule::witness(s, u) + result;",
        "witness = witness + Rule::witness(s, u);",
        ("ops/test_nan_bits.py", "ops/test_rules_edges.py"),
    ),
    # ---- rules ----
    Fault(
        "AdamW's weight decay has the wrong sign",
        "csrc/rules/adam.h",
        "h.decay = to_float(1 - x.lr * weight_decay);",
        "h.decay = to_float(1 + x.lr * weight_decay);",
        ("ops/test_rules.py",),
    ),
    Fault(
        "Lion's average has the other beta",
        "csrc/rules/lion.h",
        "s[0] = fused_multiply_add(F(h.beta2), s[0], F(h.grad_weight2) * g);",
        "s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight2) * g);",
        ("ops/test_rules.py",),
    ),
    Fault(
        "AdEMAMix's alpha grows beyond its end",
        "csrc/rules/ademamix.h",
        "std::min(step / horizon, 1.0) * alpha",
        "(step / horizon) * alpha",
        ("ops/test_rules.py", "optim/test_optimizer_families.py"),
    ),
    # ---- layout ----
    Fault(
        "blocks straddle the rows of a matrix",
        "csrc/ops/optimizer/optimizer.cpp",
        "layout.inner % kStateBlock == 0)",
        "layout.inner >= kStateBlock)",
        ("ops/test_rules.py",),
    ),
    Fault(
        "a scale of scales serves one scale too few",
        "csrc/formats/scale.h",
        "scales.nested_absmax[block / scales.nested_block]",
        "scales.nested_absmax[(block + 1) / scales.nested_block]",
        ("ops/test_quantize_4bit.py", "ops/test_linear_4bit_ops.py"),
    ),
    Fault(
        "a parameter of just min_8bit_size elements has 32-bit states",
        "bnbops/optim/core/state.py",
        "param.numel() >= least",
        "param.numel() > least",
        ("optim/test_optimizer_class.py", "optim/test_vector_states.py"),
    ),
    # ---- checks ----
    Fault(
        "a tensor that is written may share memory with others",
        "csrc/ops/optimizer/optimizer.cpp",
        "written ? overlaps.writes(argument) : overlaps.reads(argument);",
        "overlaps.reads(argument);",
        ("ops/test_bad_input.py", "ops/test_rules_edges.py"),
    ),
    Fault(
        "a bias of another dtype is taken",
        "csrc/ops/weight_4bit/linear_4bit_binding.h",
        'op(*bias, "bias").dtype(x.scalar_type())',
        'op(*bias, "bias")',
        ("ops/test_linear_4bit_ops.py", "ops/test_fakes.py"),
    ),
    # ---- fakes ----
    Fault(
        "the fake of a product has the shape of what is multiplied",
        "meta_kernels/four_bit.py",
        "tensor.new_empty((*tensor.shape[:-1], a.shape[kept]))",
        "tensor.new_empty((*tensor.shape[:-1], a.shape[summed]))",
        ("ops/test_fakes.py", "ops/test_registry.py"),
    ),
    Fault(
        "the fake of scales lacks that of a short block",
        "meta_kernels/blockwise.py",
        "new_empty((blocks(a.A.numel(), a.blocksize),), dtype=torch.float32)",
        "new_empty((a.A.numel() // a.blocksize,), dtype=torch.float32)",
        ("ops/test_fakes.py", "ops/test_registry.py"),
    ),
    # ---- formats ----
    Fault(
        "a negative element halfway between two 4-bit codes takes the other one",
        "csrc/formats/format.h",
        "fraction_bits(positive ? magnitude : below(magnitude))",
        "fraction_bits(magnitude)",
        ("ops/test_quantize_4bit.py", "ops/test_golden_4bit.py"),
    ),
    Fault(
        "an element of just the threshold is no outlier",
        "csrc/formats/int8.h",
        "static_cast<uint32_t>(bits >= limit) & static_cast<uint32_t>(bits <= kInfinityBits)",
        "static_cast<uint32_t>(bits > limit) & static_cast<uint32_t>(bits <= kInfinityBits)",
        ("ops/test_int8_ops.py",),
    ),
    # ---- optimizers ----
    Fault(
        "a parameter with strides of its own keeps its values",
        "bnbops/optim/core/call.py",
        "original.copy_(copy)",
        "pass",
        ("optim/test_optimizer_training.py",),
    ),
    # ---- modules ----
    Fault(
        "a doubly quantized state dict names the wrong block of scales",
        "bnbops/functional/quant_state.py",
        'values |= described(self.state2, "nested_")',
        'values |= described(self.state2, "nested_") | {"nested_blocksize": self.blocksize}',
        ("nn/test_linear_4bit_state.py", "ops/test_functional_4bit.py"),
    ),
    Fault(
        "nothing is said of scales that a state dict lacks",
        "bnbops/nn/int8/module.py",
        'return None, [key, *([] if tied or bits is not None else [prefix + "SCB"])]',
        "return None, [key]",
        ("nn/test_linear_8bit_state_dict.py",),
    ),
    # ---- checkpoints ----
    Fault(
        "bitsandbytes' step count loses a step",
        "bnbops/optim/checkpoints/interchange.py",
        'torch.tensor(float(state["step"])',
        'torch.tensor(float(state["step"]) - 1',
        ("optim/test_interchange.py",),
    ),
    Fault(
        "a learning rate in a tensor is not loaded",
        "bnbops/optim/checkpoints/checkpoint.py",
        'group["lr"].fill_(saved["lr"])',
        "pass",
        ("optim/test_optimizer_checkpoint.py",),
    ),
    # ---- several ranks ----
    Fault(
        "the norm of a sharded parameter is that of its longest part",
        "bnbops/optim/core/norms.py",
        'all_reduce(squared_norms, "sum"',
        'all_reduce(squared_norms, "max"',
        ("distributed/test_sharded_norms.py",),
    ),
    Fault(
        "each rank adds the bias to its part of a sum",
        "bnbops/distributed/sharding.py",
        'local["bias"] = bias if adds else None',
        'local["bias"] = bias',
        ("distributed/test_sharding_rules.py",),
    ),
    # ---- CUDA ----
    Fault(
        "equal norms share a place among the percentiles",
        "csrc/cuda/norms.cu",
        "(norms[j] == norms[i] && j < i)",
        "(norms[j] == norms[i] && j <= i)",
        ("ops/test_percentile_clip.py",),
    ),
    Fault(
        "every expert has the bias of the first",
        "csrc/cuda/linear_4bit_gemv.cu",
        "load_element(job.bias, job.dtype, part.expert * job.out_features + feature)",
        "load_element(job.bias, job.dtype, feature)",
        ("ops/test_grouped_linear_4bit_ops.py",),
    ),
    Fault(
        "rows that begin within a byte have their codes swapped",
        "csrc/cuda/weight_4bit.cu",
        "weight.codes[element / 2], static_cast<int>(element % 2)",
        "weight.codes[element / 2], static_cast<int>(1 - element % 2)",
        ("cuda/test_cuda_weight_4bit.py", "ops/test_embedding_4bit_ops.py"),
    ),
    Fault(
        "what is behind the end of a block is no zero",
        "csrc/cuda/states.h",
        "place.at, place.count, kZero)",
        "place.at, place.count, 0)",
        ("cuda/test_cuda_optimizer.py",),
    ),
)
