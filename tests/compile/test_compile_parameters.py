"""What a step may do over `model.parameters()` of a model with quantized layers. Reference: the same step, eager."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.variables import ConstantVariable, torch_function
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm, parameters_to_vector

import bnbops
from bnbops.dynamo import dynamo_mended
from bnbops.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bnbops.optim import AdamW8bit
from bnbops.versions import require_torch_for, torch_is
from cases.compiled import Step, assert_same, batches, snapshot

IN, OUT = 48, 8
BASES: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: Linear4bit(IN, OUT, quant_type="nf4").to("cpu"),
    "stored in bfloat16": lambda: Linear4bit(IN, OUT, quant_storage=torch.bfloat16).to("cpu"),
    "int8": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False).to("cpu"),
}


class Adapted(nn.Module):
    """A frozen quantized layer with a low-rank addition."""

    def __init__(self, base: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = BASES[base]().requires_grad_(False)
        self.down, self.up = nn.Linear(IN, 4, bias=False), nn.Linear(4, OUT, bias=False)
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}  # for averaged() below

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


# In graphs, Dynamo knows `len` of a tensor of another class since torch 2.13.
length = len if torch_is("2.13") else lambda p: p.shape[0]


def step_of(model: nn.Module, optimizer: AdamW8bit, before: Callable | None, after: Callable | None = None) -> Step:
    """`before` and `after` the optimizer's step something is done with the model."""

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        seen = before(model) if before else None
        optimizer.step()
        if after:
            after(model)
        else:
            optimizer.zero_grad()
        return loss, seen

    return step


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bytes: among codes that are stored in floats there are NaNs."""
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def run(compiled: bool, make: Callable[[], nn.Module], before: Callable | None, after: Callable | None = None) -> list:
    model = make()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)  # all of them: it finds out what has a gradient
    optimizer.init_state()
    step = step_of(model, optimizer, before, after)
    if compiled:
        step = bnbops.compiled_train_step(step, optimizer, backend="eager")
    seen = [step(*batch) for batch in batches(3)]
    assert not compiled or step.graph_count == (2 if after is multiplied_by_0 else 1)
    tensors = snapshot(model, optimizer) | {f"average {name}": x for name, x in getattr(model, "average", {}).items()}
    losses = torch.stack([loss.detach() for loss, _ in seen])
    return [bits({**tensors, "losses": losses}), torch.utils._pytree.tree_leaves([value for _, value in seen])]


def assert_as_eager(make: Callable[[], nn.Module], before: Callable | None, after: Callable | None = None) -> None:
    (tensors, seen), (expected, expected_seen) = run(True, make, before, after), run(False, make, before, after)
    assert_same(tensors, expected)
    assert len(seen) == len(expected_seen)
    for actual, value in zip(seen, expected_seen, strict=True):
        assert torch.equal(actual, value) if isinstance(value, Tensor) else actual == value


# ---- looking at parameters -------------------------------------------------------------------------------------


def looked_at(model: nn.Module) -> dict[str, Any]:
    """All that one may ask a parameter for."""
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    return {
        "numel": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(p.numel() * p.element_size() for p in parameters) + sum(p.nbytes for p in parameters),
        "floats": [p.is_floating_point() for p in parameters],
        "devices": [p.device.type for p in parameters],
        "dtypes": [str(p.dtype) for p in parameters],
        "shapes": [
            (*p.shape, p.ndim, p.dim(), *p.size(), *p.stride(), length(p), p.is_contiguous()) for p in parameters
        ],
        "leaves": [(p.is_leaf, p.is_cuda, p.is_meta, p.is_sparse, p.layout == torch.strided) for p in parameters],
        "classes": [(isinstance(p, Params4bit), isinstance(p, Int8Params)) for p in parameters],
        "parameters": [(isinstance(p, nn.Parameter), isinstance(p, Tensor), type(p).__name__) for p in parameters],
        "quantized": [getattr(p, "bnb_quantized", None) for p in parameters],
        "states": [getattr(p, "quant_state", None) is not None for p in parameters],
        "the layer's own": [p is model.base.weight for p in parameters],
        "different": len(set(parameters)) + len({id(p) for p in parameters}),
        "names": [(name, p.grad is None) for name, p in model.named_parameters()],
        "norms": [*torch._foreach_norm(grads), get_total_norm(grads), *(grad.norm() for grad in grads)],
        "sums": [p.detach().sum(dtype=torch.float32).nan_to_num() for p in parameters],
        "vector": parameters_to_vector(p for p in parameters if p.requires_grad).norm(),
    }


@pytest.mark.every_torch
@pytest.mark.parametrize("base", BASES)
def test_looking_at_parameters(base: str) -> None:
    assert_as_eager(lambda: Adapted(base), looked_at)


# ---- clipping, clearing, averaging -----------------------------------------------------------------------------


def halved(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad.mul_(0.5)


def averaged(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.requires_grad:
                model.average[name].lerp_(p, 0.1)
    model.zero_grad()


def set_to_none(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def set_to_none_where_there_is_one(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad = None


def multiplied_by_0(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)  # a second graph adds to what the first one has left


BEFORE: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: clip_grad_norm_(model.parameters(), 0.1),
    "norm, foreach": lambda model: clip_grad_norm_(model.parameters(), 0.1, foreach=True),
    "norm, one by one": lambda model: clip_grad_norm_(model.parameters(), 0.1, norm_type=torch.inf, foreach=False),
    "value": lambda model: clip_grad_value_(model.parameters(), 1e-3),
    "value, foreach": lambda model: clip_grad_value_(model.parameters(), 1e-3, foreach=True),
    "halved": halved,
}
AFTER = (nn.Module.zero_grad, multiplied_by_0, set_to_none, set_to_none_where_there_is_one, averaged)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("before", BEFORE)
def test_changing_gradients(before: str, base: str) -> None:
    assert_as_eager(lambda: Adapted(base), BEFORE[before])


@pytest.mark.every_torch
@pytest.mark.parametrize("after", AFTER, ids=lambda fn: fn.__name__)
def test_clearing_gradients(after: Callable[[nn.Module], None]) -> None:
    assert_as_eager(lambda: Adapted("nf4"), None, after)


class Named(nn.Parameter):
    pass


@pytest.mark.every_torch
@pytest.mark.parametrize("cls", [Named, Params4bit, Int8Params])
def test_training_a_weight_that_has_a_class_of_its_own(cls: type[nn.Parameter]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(IN, OUT)
        model.weight = cls(model.weight.detach(), requires_grad=True)
        return model

    assert_as_eager(make, BEFORE["norm"], set_to_none_where_there_is_one)


@pytest.mark.every_torch
def test_dynamo_is_as_it_was_afterwards() -> None:
    """When the last one of the calls that overlap, in other threads, has ended."""
    require_torch_for("compiled_train_step")
    entered, ends = threading.Event(), threading.Event()
    refused = sorted(torch_function.banned_attrs)
    assert "grad" in refused

    def call_in_another_thread() -> None:
        with dynamo_mended():
            entered.set()
            ends.wait()

    other = threading.Thread(target=call_in_another_thread)
    with dynamo_mended():
        other.start()
        entered.wait()
    assert "grad" not in torch_function.banned_attrs and "__setattr__" in vars(ConstantVariable)
    ends.set()
    other.join()
    assert sorted(torch_function.banned_attrs) == refused and "__setattr__" not in vars(ConstantVariable)
