"""bnbops.nn.Embedding8bit: int8 rows that are looked up without dequantizing the table, saved and loaded.

Copies and state dicts of its weight are Linear8bitLt's: test_linear_8bit, test_linear_8bit_state_dict. It is compiled
and exported in test_linear_8bit_compile.
"""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call

from bnbops.nn import Embedding8bit, Int8Params

SIZE = (50, 12)
INDICES = torch.tensor([[1, 5, 0], [49, 5, 2]])


def quantized(dtype: torch.dtype | None = None) -> tuple[Embedding8bit, Tensor]:
    """An embedding, and the float table that it was."""
    torch.manual_seed(0)
    module = Embedding8bit(*SIZE, dtype=dtype)
    table = module.weight.detach().clone()
    return module.to("cpu"), table


def dequantized(module: Embedding8bit) -> Tensor:
    return module.weight.data.float() * (module.SCB / 127).unsqueeze(1)


def test_construction():
    """The start of torch's embedding."""
    torch.manual_seed(0)
    plain = nn.Embedding(*SIZE)
    torch.manual_seed(0)
    module = Embedding8bit(*SIZE)
    assert isinstance(module, nn.Embedding) and type(module.weight) is Int8Params and not module.weight.requires_grad
    assert torch.equal(module.weight, plain.weight) and module.dtype == torch.float32
    module = Embedding8bit(*SIZE, "meta", torch.float16)
    assert module.weight.is_meta and module.dtype == module.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows(index_dtype, dtype):
    """code * scale / 127 in fp32, rounded to the dtype; within half a step of the float table."""
    module, table = quantized(dtype)
    rows = module(INDICES.to(index_dtype))
    assert rows.dtype == dtype and rows.shape == (2, 3, 12) and not rows.requires_grad
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.float(), dequantized(module)[INDICES], rtol=unit, atol=0)
    error = (dequantized(module) - table.float()).abs().amax(1)
    assert (error <= module.SCB * (0.5 / 127 + 1e-3)).all()


def test_only_the_rows_are_dequantized():
    """No tensor of the table's size is made but the table."""
    module, _ = quantized()
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            views = func in (torch.ops.aten.detach.default, torch.ops.aten.view.dtype, torch.ops.aten.unsqueeze.default)
            sizes.append(0 if views else out.numel())
            return out

    with Sizes():
        module(INDICES)
    assert 0 < max(sizes) <= INDICES.numel() * SIZE[1]


def test_no_indices_and_one():
    module, _ = quantized()
    assert module(INDICES[:0]).shape == (0, 3, 12)
    assert torch.equal(module(torch.tensor(5)), module(INDICES)[0, 1])


def test_casts_change_the_output():
    """As those of a float embedding would; codes and scales stay."""
    module, _ = quantized()
    codes, scales, rows = module.weight.CB.clone(), module.SCB.clone(), module(INDICES)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module.to(dtype)
        assert torch.equal(module(INDICES), rows.to(dtype))
    assert torch.equal(module.weight, codes) and torch.equal(module.SCB, scales)
    assert copy.deepcopy(module).dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dict(device, assign):
    module, _ = quantized()
    state = load(save(module.state_dict()))
    assert {k: v.dtype for k, v in state.items()} == {
        "weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8
    }  # fmt: skip
    other = Embedding8bit(*SIZE, device=device)
    if device == "meta" and not assign:
        other.to_empty(device="cpu")
    assert not any(other.load_state_dict(state, assign=assign))
    assert torch.equal(other(INDICES), module(INDICES))


def test_float_state_dict():
    plain, module = nn.Embedding(*SIZE), Embedding8bit(*SIZE)
    module.load_state_dict(plain.state_dict())
    other, _ = quantized()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(module.to("cpu")(INDICES), other(INDICES))
    torch.testing.assert_close(other(INDICES), plain(INDICES), rtol=0, atol=0.02)


def test_functional_call():
    module, _ = quantized()
    tensors = {name: p.detach().as_subclass(Tensor) for name, p in module.named_parameters()}
    tensors["weight"] = -tensors["weight"]
    assert torch.equal(functional_call(module, tensors, INDICES), -module(INDICES))


def test_bad_input():
    module, _ = quantized()
    with pytest.raises(IndexError, match="out of range"):
        module(INDICES + 1)
    with pytest.raises(RuntimeError, match="Float"):
        module(INDICES.float())
    with pytest.raises(RuntimeError, match="this Embedding8bit is not quantized"):
        Embedding8bit(*SIZE)(INDICES)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Embedding8bit(51, 12).load_state_dict(module.state_dict())
